"""Pairs of videos, made ready for a step; the two of a pair differ in nothing but the video.

A pair tells nothing where chosen and rejected saw different noise, sigmas, frames, crops or captions: the gap between
their errors is then mostly that difference. So noise, sigma and caption embeddings exist once for both, and what was
done to each video before is compared when a batch is made.
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from align.flow import Latents, Sigmas

Samples = Float[Tensor, " b"]


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """How a network is shown a video."""

    caption: str
    """Empty where it was dropped."""
    frame_seconds: tuple[float, ...]
    crop: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    """Top, left, height and width, as shares of the largest part of the network's shape, in the middle of the video."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """What is known of each pair. Raises: ValueError: a preference or weight is missing or out of range."""

    preference: Samples
    """Probability that chosen is the better one: 1 for a sure label, .5 for a tie."""
    weight: Samples
    """Of the pair's loss."""
    chosen_unsafe: Bool[Tensor, " b"] | None = None
    """None: not known, of any pair."""
    rejected_unsafe: Bool[Tensor, " b"] | None = None

    def __post_init__(self) -> None:
        p, weight = self.preference, self.weight
        _require("preference", "probabilities in [0, 1]", p, (p >= 0) & (p <= 1))
        _require("weight", "finite numbers >= 0", weight, (weight >= 0) & weight.isfinite())


@dataclass(frozen=True, kw_only=True, slots=True)
class PairBatch:
    """Pairs for one step.

    Raises: ValueError: the videos of a pair are shown differently, or anything differs in size.
    """

    chosen: Latents
    rejected: Latents
    noise: Latents
    sigma: Sigmas
    prompt_embeds: Float[Tensor, "b tokens d"]
    chosen_views: tuple[View, ...]
    rejected_views: tuple[View, ...]
    labels: Labels

    def __post_init__(self) -> None:
        sizes = [len(getattr(self, field.name)) for field in fields(self) if field.name != "labels"]
        if len({*sizes, len(self.labels.weight)}) > 1:
            raise ValueError(f"expected one number of pairs in all fields, got {[*sizes, len(self.labels.weight)]}")
        for index, (chosen, rejected) in enumerate(zip(self.chosen_views, self.rejected_views, strict=True)):
            _require_same(index, chosen, rejected)
        shapes = [tuple(latents.shape) for latents in (self.chosen, self.rejected, self.noise)]
        if len(set(shapes)) > 1:
            raise ValueError(f"chosen, rejected and noise: expected one shape, got {shapes}; resize the videos alike")


@dataclass(frozen=True, kw_only=True, slots=True)
class PairErrors:
    """Errors on both videos of each pair, with the same noise, sigma and caption.

    Raises: ValueError: an error is not finite.
    """

    policy_chosen: Samples
    policy_rejected: Samples
    reference_chosen: Samples
    reference_rejected: Samples
    rejected_scale: Samples | None = None
    """From `preserving_scale`, where the settings have a `chosen_reserve`."""
    distance: Samples | None = None
    """Squared distance of the policy's prediction from the reference's, averaged over both videos and all axes."""

    def __post_init__(self) -> None:
        for name in ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"):
            errors = getattr(self, name)
            _require(name, "finite errors", errors, errors.isfinite())


def preference_from(chosen: Samples, rejected: Samples, temperature: float) -> Samples:
    """Give the probability that chosen is the better one, from utilities: sigmoid((chosen - rejected) / temperature).

    Raises: ValueError: a utility is not finite, or the temperature not positive.
    """
    _require("utility of chosen", "finite numbers", chosen, chosen.isfinite())
    _require("utility of rejected", "finite numbers", rejected, rejected.isfinite())
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    return torch.sigmoid((chosen - rejected) / temperature)


def _require(name: str, expected: str, values: Samples, good: Bool[Tensor, " b"]) -> None:
    if not good.all():
        raise ValueError(f"{name}: expected {expected}, got {values.tolist()}")


def _require_same(index: int, chosen: View, rejected: View) -> None:
    for name in (field.name for field in fields(View)):
        one, other = getattr(chosen, name), getattr(rejected, name)
        if one != other:
            raise ValueError(
                f"pair {index}: {name} is {one!r} for chosen, {other!r} for rejected; draw it once for both"
            )
