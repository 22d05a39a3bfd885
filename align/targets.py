"""What a network may be trained to predict of a noisy video, and how far off it is. Tensors in, tensors out.

    kind        target                                                networks
    velocity    noise - clean                                         Wan, LTX, Hunyuan
    epsilon     noise                                                 ModelScope, AnimateDiff
    v           sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) clean     CogVideoX

The last two see sqrt(alpha_bar) clean + sqrt(1 - alpha_bar) noise: the flow's noisy latents, at the same ratio of
clean to noise, in another scale. So a schedule of alpha_bar is one of sigma, and only `preserving_variance` differs.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from align import flow
from align.flow import Latents, Sigmas

Kind = Literal["velocity", "epsilon", "v"]


def error(prediction: Float[Tensor, "b ..."], target: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """Give each sample's squared error, averaged over all its axes, in float32 or better.

    Gaps between errors are a thousandth of the errors: bfloat16 would round them away.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)


def target_for(kind: Kind, clean: Latents, noise: Latents, sigma: Sigmas) -> Latents:
    """Give what a network of this kind should predict.

    Source: Ho et al. 2020 (arXiv 2006.11239) for epsilon, Salimans and Ho 2022 (arXiv 2202.00512) for v.
    """
    match kind:
        case "velocity":
            return flow.velocity(clean, noise)
        case "epsilon":
            return noise
        case "v":
            share = _beside(alpha_bar(sigma), clean)
            return share.sqrt() * noise - (1 - share).sqrt() * clean


def velocity_from(kind: Kind, prediction: Latents, noisy: Latents, sigma: Sigmas) -> Latents:
    """Turn a prediction of this kind into a velocity; from epsilon only where sigma < 1.

    `noisy` is the flow's. Squared errors of velocities are those of epsilon over (1 - sigma)^2, and those of v over
    (1 - sigma)^2 + sigma^2.
    """
    s = _beside(sigma, noisy)
    match kind:
        case "velocity":
            return prediction
        case "epsilon":
            return (prediction - noisy) / (1 - s)
        case "v":
            variance = (1 - s).square() + s.square()
            return prediction / variance.sqrt() + (2 * s - 1) / variance * noisy


def preserving_variance(noisy: Latents, sigma: Sigmas) -> Latents:
    """Scale the flow's noisy latents to what networks of epsilon and v see."""
    return noisy / _beside(((1 - sigma).square() + sigma.square()).sqrt(), noisy)


def alpha_bar(sigma: Sigmas) -> Sigmas:
    """Give the schedule value with the same ratio of clean to noise: 1 for a clean video, 0 for pure noise."""
    return (1 - sigma).square() / ((1 - sigma).square() + sigma.square())


def sigma_from(alpha_bar: Sigmas) -> Sigmas:
    """Give the sigma with the same ratio of clean to noise."""
    clean, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return noise / (clean + noise)


def _beside(value: Sigmas, latents: Latents) -> Float[Tensor, "b 1 1 1 1"]:
    """Shape one number a sample so that it multiplies that sample's latents, in their precision."""
    return value.to(latents.dtype).reshape(-1, 1, 1, 1, 1)
