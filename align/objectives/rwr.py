"""Reward-weighted regression: fine-tune on all videos, each as much as its reward, less the price of its harm, says.

    weight ~ exp((reward - sum multiplier cost) / temperature)        loss = weight * error

Weights compare the videos of one prompt: within it their mean is 1, so hard prompts count as much as easy ones. They
are made once from all scores, not batch by batch, which would compare each video with whatever is beside it.

Source: Peters and Schaal 2007 (reward-weighted regression); Liu et al. 2025 (Flow-RWR, arXiv 2501.13918).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, PositiveFloat
from torch import Tensor

from reward.config import Config

Samples = Float[Tensor, " n"]
Flags = Bool[Tensor, " n"]


class Rwr(Config):
    """Reward-weighted regression; with no temperature and only chosen videos, plain supervised fine-tuning."""

    kind: Literal["rwr"] = "rwr"
    temperature: PositiveFloat | None = 1.0
    """In units of the reward; null: infinite, so that all weights are the same."""
    most: float = Field(default=5.0, ge=1)
    """Larger weights are cut to this; the mean for a prompt is 1 before."""
    safe_only: bool = False
    """Whether unsafe videos get weight 0, whatever the multipliers."""
    chosen_only: bool = False
    """Whether videos that were not chosen in a pair get weight 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """What is known of all videos to train on. Raises: ValueError: a reward or cost is not finite."""

    prompt: Int[Tensor, " n"]
    """A number for each prompt."""
    reward: Samples
    costs: Float[Tensor, "n k"]
    """> 0 unsafe; a column for each multiplier."""
    unsafe: Flags | None = None
    chosen: Flags | None = None

    def __post_init__(self) -> None:
        for name, values in (("reward", self.reward), ("costs", self.costs)):
            if not values.isfinite().all():
                raise ValueError(f"{name}: expected finite scores, got {values.tolist()}; drop and count those videos")


@dataclass(frozen=True, kw_only=True, slots=True)
class RwrLoss:
    """What a batch gave, a number for each video; the mean of `loss` is what to minimise."""

    loss: Samples
    weight: Samples
    error: Samples


def rwr_loss(error: Samples, weight: Samples) -> RwrLoss:
    """Give weight * error. Raises: ValueError: an error is not finite."""
    if not error.isfinite().all():
        raise ValueError(f"error: expected finite errors, got {error.tolist()}; lower the learning rate")
    return RwrLoss(loss=weight * error, weight=weight, error=error.detach())


def weights(settings: Rwr, scored: Scored, multipliers: Float[Tensor, " k"]) -> Samples:
    """Give each video's weight, >= 0; a prompt none of whose videos may be learnt has only zeros.

    Raises: ValueError: a setting asks for what is not known of the videos.
    """
    net = scored.reward - scored.costs @ multipliers
    may = eligible(settings, scored)
    logits = torch.zeros_like(net) if settings.temperature is None else net / settings.temperature
    prompts, prompt = scored.prompt.unique(return_inverse=True)
    best = logits.new_full(prompts.shape, -torch.inf).scatter_reduce(0, prompt, logits.where(may, -torch.inf), "amax")
    raw = (logits - best[prompt]).exp().where(may, 0)  # the best of each prompt is 1, so none overflows
    total, number = (logits.new_zeros(prompts.shape).index_add(0, prompt, x) for x in (raw, may.to(raw.dtype)))
    return (raw * number[prompt] / total[prompt]).where(may, 0).clamp(max=settings.most)


def eligible(settings: Rwr, scored: Scored) -> Flags:
    """Tell which videos may be learnt at all."""
    may = torch.ones_like(scored.reward, dtype=torch.bool)
    if settings.safe_only:
        may &= ~_known("safe_only", "unsafe", scored.unsafe)
    if settings.chosen_only:
        may &= _known("chosen_only", "chosen", scored.chosen)
    return may


def effective_sample_size(weight: Samples) -> float:
    """Give (sum of weights)^2 / sum of squares: how many videos of equal weight would be as informative. 0 to n."""
    squares = weight.square().sum()
    return (weight.sum().square() / squares).item() if squares > 0 else 0.0


def _known(setting: str, name: str, flags: Flags | None) -> Flags:
    if flags is None:
        raise ValueError(f"{setting}: needs to know of every video whether it is {name}; set it to false")
    return flags
