"""Which videos of a prompt are compared: the better one is chosen, the worse one rejected. Arrays in, pairs out.

Better is what has the higher utility (`align.constraint`), in which the multipliers are the price of harm. So how
much safety the pairs teach follows from the limits, and with no limit they teach helpfulness alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Shaped
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from reward.config import Config

Scores = Float[np.ndarray, " n"]


class Pairing(Config):
    """How pairs are made of the videos of a prompt."""

    pairs_per_prompt: PositiveInt = 1
    """At most: the best against the worst, then the second best against the second worst, and so on."""
    safe_first: bool = False
    """Whether a safe video beats any unsafe one, whatever their utility: safety without a limit."""
    all_unsafe: Literal["drop", "by_utility", "by_cost"] = "by_utility"
    """What to do where no video of a prompt is safe: learn nothing of it, or which one is better, or less harmful."""
    least_gap: NonNegativeFloat = 0.0
    """Pairs closer in utility than this are left out."""
    temperature: PositiveFloat | None = None
    """Labels are sigmoid(gap in utility / temperature); null: sure."""
    harm_share: float | None = Field(default=None, gt=0, lt=1)
    """Share of DPO's loss that pairs of a safe and an unsafe video get while harm has a price (multipliers).
    null: each pair counts the same. They get rarer as the policy gets safer, until what it learns from the others
    brings the harm back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two videos of one prompt, by their places, and how sure it is that chosen is the better one."""

    chosen: int
    rejected: int
    preference: float


def compare(
    settings: Pairing, prompts: Shaped[np.ndarray, " n"], utility: Scores, cost: Scores, unsafe: Bool[np.ndarray, " n"]
) -> list[Comparison]:
    """Give the pairs of all prompts, in the order in which prompts first appear."""
    places: dict[object, list[int]] = {}
    for place, prompt in enumerate(prompts.tolist()):
        places.setdefault(prompt, []).append(place)
    return [pair for group in places.values() for pair in _of_prompt(settings, group, utility, cost, unsafe)]


def _of_prompt(
    settings: Pairing, group: list[int], utility: Scores, cost: Scores, unsafe: Bool[np.ndarray, " n"]
) -> Iterator[Comparison]:
    hopeless = bool(unsafe[group].all())
    if hopeless and settings.all_unsafe == "drop":
        return
    worth = -cost if hopeless and settings.all_unsafe == "by_cost" else utility
    ranked = sorted(group, key=lambda place: (settings.safe_first and not unsafe[place], worth[place]), reverse=True)
    number = min(settings.pairs_per_prompt, len(group) // 2)
    for best, worst in zip(ranked[:number], reversed(ranked), strict=False):
        gap = float(worth[best] - worth[worst])
        sure = settings.safe_first and bool(unsafe[worst] and not unsafe[best])
        if sure or (gap > 0 and gap >= settings.least_gap):
            yield Comparison(chosen=best, rejected=worst, preference=1.0 if sure else _preference(settings, gap))


def _preference(settings: Pairing, gap: float) -> float:
    return 1.0 if settings.temperature is None else float(1 / (1 + np.exp(-gap / settings.temperature)))


def weigh(
    settings: Pairing, pairs: Sequence[Comparison], unsafe: Bool[np.ndarray, " n"], *, has_price: bool
) -> list[float]:
    """Give the weight of each pair, 1 on average; all 1 where all pairs are of one kind, or where harm has no price."""
    harmful = np.array([unsafe[pair.chosen] != unsafe[pair.rejected] for pair in pairs], dtype=bool)
    number = int(harmful.sum())
    if settings.harm_share is None or not has_price or number in (0, len(pairs)):
        return [1.0] * len(pairs)
    share, rest = settings.harm_share * len(pairs), (1 - settings.harm_share) * len(pairs)
    return np.where(harmful, share / number, rest / (len(pairs) - number)).tolist()
