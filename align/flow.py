"""The mathematics of a straight flow between videos and noise. Tensors in, tensors out.

`sigma` in [0, 1] is the share of noise: 0 is a clean video, 1 is pure noise. The network predicts

    velocity = noise - clean        where        noisy = (1 - sigma) clean + sigma noise

so that sampling integrates the velocity from sigma = 1 down to 0.
"""

import torch
from jaxtyping import Float
from torch import Tensor

Latents = Float[Tensor, "b c f h w"]
Sigmas = Float[Tensor, " b"]

# The path between clean and noise ---------------------------------------------------------------------------


def noisy(clean: Latents, noise: Latents, sigma: Sigmas) -> Latents:
    """Mix clean latents with noise: (1 - sigma) clean + sigma noise.

    Source: Liu et al. 2022 (rectified flow, arXiv 2209.03003), with time running from clean to noise.
    """
    s = _beside(sigma, clean)
    return (1 - s) * clean + s * noise


def velocity(clean: Latents, noise: Latents) -> Latents:
    """Give the network's target, the change of `noisy` with sigma: noise - clean."""
    return noise - clean


def clean_from_velocity(noisy: Latents, velocity: Latents, sigma: Sigmas) -> Latents:
    """Give the clean latents that a velocity implies: noisy - sigma velocity."""
    return noisy - _beside(sigma, noisy) * velocity


def noise_from_velocity(noisy: Latents, velocity: Latents, sigma: Sigmas) -> Latents:
    """Give the noise that a velocity implies: noisy + (1 - sigma) velocity."""
    return noisy + (1 - _beside(sigma, noisy)) * velocity


# Sigmas: which ones to train on, which ones to sample at ----------------------------------------------------


def shifted(sigma: Sigmas, shift: float) -> Sigmas:
    """Move sigmas towards noise by shift > 1; 0 and 1 stay, and shift 1 changes nothing.

    Source: Esser et al. 2024 (Stable Diffusion 3, arXiv 2403.03206), resolution-dependent shifting.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def schedule(num_steps: int, shift: float) -> Float[Tensor, " {num_steps}+1"]:
    """Give the falling sigmas of an Euler sampler, from 1 to exactly 0.

    As in diffusers' `FlowMatchEulerDiscreteScheduler`, the smallest sigma but 0 is 1 / 1000 shifted twice.
    """
    smallest = shifted(torch.tensor([1e-3], dtype=torch.float64), shift).item()
    sigmas = shifted(torch.linspace(1, smallest, num_steps, dtype=torch.float64), shift)
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


# Steps from one sigma to the next ---------------------------------------------------------------------------


def euler_step(noisy: Latents, velocity: Latents, sigma: Sigmas, next_sigma: Sigmas) -> Latents:
    """Follow the velocity in a straight line: noisy + (next_sigma - sigma) velocity."""
    return noisy + _beside(next_sigma - sigma, noisy) * velocity


def sde_step(
    noisy: Latents, velocity: Latents, sigma: Sigmas, next_sigma: Sigmas, eta: float
) -> tuple[Latents, Sigmas]:
    """Give mean and standard deviation of a random step; its endpoints are spread as the flow's are.

    With t = sigma > 0, dt = next_sigma - sigma < 0 and the diffusion g = eta sqrt(t / (1 - t)):

        mean = noisy (1 + g^2 / (2 t) dt) + velocity (1 + g^2 (1 - t) / (2 t)) dt
        std  = g sqrt(-dt)

    eta = 0 is the Euler step. At t = 1, where g is infinite, 1 - next_sigma stands in for its 1 - t, as in
    the authors' code.

    Source: Liu et al. 2025 (Flow-GRPO, arXiv 2505.05470), the update rule of its SDE.
    """
    g_squared = eta**2 * sigma / (1 - torch.where(sigma == 1, next_sigma, sigma))
    dt = next_sigma - sigma
    keep = 1 + g_squared / (2 * sigma) * dt
    move = (1 + g_squared * (1 - sigma) / (2 * sigma)) * dt
    mean = _beside(keep, noisy) * noisy + _beside(move, noisy) * velocity
    return mean, torch.sqrt(-g_squared * dt)


def _beside(value: Sigmas, latents: Latents) -> Float[Tensor, "b 1 1 1 1"]:
    """Shape one number a sample so that it multiplies that sample's latents, in their precision."""
    return value.to(latents.dtype).reshape(-1, 1, 1, 1, 1)
