"""How strongly DPO holds the policy to its reference: beta, given or steered. Numbers in, numbers out.

A beta means nothing without its error: for means over a video's D numbers it is D times that for sums, and both
depend on the model. What it does can be measured: the *gradient factor* sigmoid(-margin) is 1/2 for a pair nothing
was learnt of, and 0 for one that no longer trains. So beta can be set by a target for its mean.

Steered is sigmoid(-|margin|), which falls as beta rises, whatever the policy got right. The mean of sigmoid(-margin)
itself stays near 1/2 at any beta for a policy that is right about half of the pairs: no beta would reach the target.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt
from pydantic import model_validator as validator

from reward.config import Config


class FixedBeta(Config):
    """One beta for the whole run."""

    kind: Literal["fixed"] = "fixed"
    value: PositiveFloat = 2000.0
    """For errors that are means."""


class SteeredBeta(Config):
    """A beta that keeps the gradient factor at a target: the same run whether errors are means or sums."""

    kind: Literal["steered"] = "steered"
    target: float = Field(default=0.2, gt=0, lt=0.5)
    """Mean of sigmoid(-|margin|). The smaller, the less is learnt from pairs that are already right."""
    start: PositiveFloat = 400.0
    """First beta, in units of 1 / mean error of the reference; so are the next two."""
    least: PositiveFloat = 20.0
    most: PositiveFloat = 40_000.0
    rate: PositiveFloat = 0.5
    """A step moves log beta by rate (factor - target)."""
    num_steps: PositiveInt | None = None
    """Steps after which beta stays as it is; null: never."""

    @validator(mode="after")
    def _is_ordered(self) -> "SteeredBeta":
        if not self.least <= self.start <= self.most:
            raise ValueError(f"expected least <= start <= most, got {self.least}, {self.start}, {self.most}")
        return self


Beta = Annotated[FixedBeta | SteeredBeta, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True, slots=True)
class BetaState:
    """All that the next beta depends on, besides the settings; its fields are plain JSON."""

    strength: float
    """Beta in `unit`s."""
    unit: float
    num_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("strength", "unit"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} of beta: expected a positive finite number, got {getattr(self, name)}")

    @property
    def value(self) -> float:
        """The beta that errors are multiplied by."""
        return self.strength * self.unit


def start_beta(settings: FixedBeta | SteeredBeta, reference_error: float) -> BetaState:
    """Give the first beta; the error is the mean over the first step's videos, of all processes.

    Raises: ValueError: the error is not positive and finite.
    """
    if not 0 < reference_error < math.inf:
        raise ValueError(f"mean error of the reference: expected a positive finite number, got {reference_error}")
    match settings:
        case FixedBeta():
            return BetaState(strength=settings.value, unit=1.0)
        case SteeredBeta():
            return BetaState(strength=settings.start, unit=1 / reference_error)


def steer(settings: FixedBeta | SteeredBeta, state: BetaState, factor: float) -> BetaState:
    """Give the beta of the next step: larger where the factor is above its target, so where margins are small.

    `factor` is the mean `folded_factor` over the step's pairs, of all processes and accumulated batches: fed with one
    process's own mean, processes would drift apart.

    Raises: ValueError: the factor is not in [0, 1/2].
    """
    if not 0 <= factor <= 0.5:
        raise ValueError(f"factor: expected a mean of sigmoid(-|margin|), in [0, 1/2], got {factor}")
    next_state = replace(state, num_steps=state.num_steps + 1)
    if isinstance(settings, FixedBeta) or (settings.num_steps is not None and state.num_steps >= settings.num_steps):
        return next_state
    strength = state.strength * math.exp(settings.rate * (factor - settings.target))
    return replace(next_state, strength=min(max(strength, settings.least), settings.most))
