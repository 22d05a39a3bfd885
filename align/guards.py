"""Guards of a run: they warn, then stop it, where an alignment pays for its reward with something else.

Each guard compares the policy with its reference, so that the reference itself never breaks one. What is compared is
measured elsewhere, now and then, on fresh rollouts or the latest pairs, and comes as one `Reading` for all processes:
from the same reading, all of them draw the same events. A run that is stopped goes back to its `Best` checkpoint.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveInt, TypeAdapter
from pydantic import model_validator as validator

from align import pixels
from align.constraint import Limit, Multipliers, Statistics
from reward.config import Config

Guard = Literal[
    "motion", "chosen_gap", "rejected_dominant", "velocity_norm", "benign_reward", "degenerate", "disagreement"
]
Share = Annotated[float, Field(ge=0, lt=1)]

# Settings ---------------------------------------------------------------------------------------------------


class Guards(Config):
    """What must not happen to the policy; null switches a guard off."""

    least_motion: float | None = Field(default=0.8, gt=0, lt=1)
    """Motion over the reference's. Calm videos have fewer faults, so that preferences slow a policy down (arXiv
    2506.03517); judges that reward this can freeze it."""
    most_chosen_gap: NonNegativeFloat | None = 0.05
    """Rise of the error on chosen videos, over the reference's error. Learning moves it by about a thousandth."""
    most_rejected_dominant: Share | None = 0.5
    """Share of pairs won only because rejected got worse than chosen did; chance alone gives an eighth to a quarter."""
    velocity_norm: tuple[float, float] | None = (0.7, 1.4)
    """Least and most norm of the velocity over the reference's: half of its energy, and twice."""
    least_benign_reward: float | None = Field(default=-0.3, le=0)
    """Change of the mean reward on harmless prompts, in standard deviations of the reference's rewards. By chance, the
    means of 64 videos differ by about 0.18."""
    most_degenerate: Share | None = 0.05
    """Share of blank, frozen and noise videos, less the reference's."""
    most_disagreement: float | None = Field(default=1.5, ge=1)
    """Spread of the judge's members over that on the reference's videos: beyond, they guess at what they never saw."""
    patience: PositiveInt = 2
    """Readings in a row at which a broken guard stops the run; it warns before."""

    @validator(mode="after")
    def _lets_the_reference_pass(self) -> "Guards":
        if self.velocity_norm is not None and not 0 <= self.velocity_norm[0] <= 1 <= self.velocity_norm[1]:
            raise ValueError(f"velocity_norm={self.velocity_norm}: expected 0 <= least <= 1 <= most")
        return self

    @property
    def ranges(self) -> dict[Guard, tuple[float | None, float | None]]:
        """The least and the most that each guard lets pass; None: any."""
        return {
            "motion": (self.least_motion, None),
            "chosen_gap": (None, self.most_chosen_gap),
            "rejected_dominant": (None, self.most_rejected_dominant),
            "velocity_norm": self.velocity_norm or (None, None),
            "benign_reward": (self.least_benign_reward, None),
            "degenerate": (None, self.most_degenerate),
            "disagreement": (None, self.most_disagreement),
        }


# Records ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What one check measured, over all processes; None: not measured this time, and its guard waits.

    Raises: ValueError: a measure is not finite.
    """

    step: int
    motion: float | None = None
    """From `motion_ratio`."""
    chosen_gap: float | None = None
    """Mean `DpoLoss.chosen_gap`, over the reference's mean error on the same videos."""
    rejected_dominant: float | None = None
    """Mean `DpoLoss.rejected_dominant`."""
    velocity_norm: float | None = None
    """Norm of the policy's velocity over the reference's, at the same noisy latents."""
    benign_reward: float | None = None
    """(mean reward of the policy - of the reference) / standard deviation of the reference's, on harmless prompts."""
    degenerate: float | None = None
    """From `degenerate_excess`."""
    disagreement: float | None = None
    """Mean `Spread` on the policy's videos, over the mean on the reference's."""

    def __post_init__(self) -> None:
        for name in (each.name for each in fields(self)):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} at step {self.step}: expected a finite number, got {value}; find its cause")


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A guard that a reading broke; its fields are plain JSON, for the run's log."""

    guard: Guard
    level: Literal["warn", "stop"]
    value: float
    threshold: float
    step: int

    def __str__(self) -> str:
        side = "below" if self.value < self.threshold else "above"
        return f"step {self.step}: {self.level}: {self.guard} {self.value:.4g} is {side} {self.threshold:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """A checkpoint to go back to. Raises: ValueError: a number is not finite, or the violation below 0."""

    step: int
    reward: float
    """Mean over the rollouts. Not their utility, whose multipliers change from step to step."""
    violation: float
    """From `violation_of`; 0: all limits are met."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.reward) and 0 <= self.violation < math.inf):
            raise ValueError(f"expected a finite reward and a finite violation >= 0, got {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardState:
    """All that the next check depends on, besides the settings, and the best checkpoint so far."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    in_a_row: Mapping[Guard, PositiveInt] = field(default_factory=dict)
    """Latest readings in a row that broke a guard; guards that hold are not in it."""
    best: Best | None = None


_STATE = TypeAdapter(GuardState)


def to_json(state: GuardState) -> dict[str, Any]:
    """Give the state as plain JSON, which `from_json` turns back."""
    return _STATE.dump_python(state, mode="json")


def from_json(state: dict[str, Any]) -> GuardState:
    """Read a state. Raises: ValueError: a key is unknown or missing, or a number impossible."""
    return _STATE.validate_json(json.dumps(state))


# Checking ---------------------------------------------------------------------------------------------------


def check(guards: Guards, reading: Reading, state: GuardState) -> tuple[GuardState, tuple[Event, ...]]:
    """Give the next state, and an event for each guard that the reading breaks."""
    in_a_row, events = dict(state.in_a_row), []
    for guard, (least, most) in guards.ranges.items():
        value = getattr(reading, guard)
        if value is None:
            continue
        threshold = _broken(value, least, most)
        if threshold is None:
            in_a_row.pop(guard, None)
            continue
        in_a_row[guard] = in_a_row.get(guard, 0) + 1
        level = "stop" if in_a_row[guard] >= guards.patience else "warn"
        events.append(Event(guard=guard, level=level, value=value, threshold=threshold, step=reading.step))
    return replace(state, in_a_row=in_a_row), tuple(events)


def _broken(value: float, least: float | None, most: float | None) -> float | None:
    """Give the threshold that a value is beyond, if any; on it is within."""
    if least is not None and value < least:
        return least
    return most if most is not None and value > most else None


# The best checkpoint ----------------------------------------------------------------------------------------


def is_better(new: Best, old: Best | None) -> bool:
    """Tell whether to keep the new one: less violation first, then more reward; of equals, the old one stays."""
    return old is None or (-new.violation, new.reward) > (-old.violation, old.reward)


def violation_of(estimates: Multipliers, limits: Sequence[Limit], statistics: Statistics) -> float:
    """Give by how much the worst limit is broken, in its unit of `statistics`; 0 where all are met.

    `estimates` are from `constraint.estimate`.
    """
    excess = (estimates - [limit.bound for limit in limits]) / statistics.scales
    return excess.max(initial=0.0).item()


# What videos look like --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Footage:
    """What the pixels of some videos show, in sums."""

    num_videos: int
    motion: float
    num_blank: int
    num_noise: int
    num_frozen: int

    @classmethod
    def of(cls, motions: Sequence[float], flaws: Sequence[pixels.Flaw | None]) -> "Footage":
        """Add up what `align.pixels` says of videos."""
        return cls(
            num_videos=len(motions),
            motion=math.fsum(motions),
            num_blank=flaws.count("blank"),
            num_noise=flaws.count("noise"),
            num_frozen=flaws.count("frozen"),
        )

    @property
    def mean_motion(self) -> float:
        """Contrasts a second; see `align.pixels`."""
        return self.motion / self.num_videos

    @property
    def degenerate_rate(self) -> float:
        """Share of videos that are blank, noise or frozen."""
        return (self.num_blank + self.num_noise + self.num_frozen) / self.num_videos


def motion_ratio(policy: Footage, reference: Footage) -> float:
    """Give the policy's motion over the reference's, on the same prompts and seeds.

    Raises: ValueError: they are not of equally many videos, or the reference's hardly move.
    """
    _require_alike(policy, reference)
    if reference.mean_motion < pixels.FROZEN:
        raise ValueError(
            f"the reference's videos hardly move, {reference.mean_motion:.3g} contrasts a second: nothing to compare "
            "motion with; take prompts that ask for motion, or least_motion=null"
        )
    return policy.mean_motion / reference.mean_motion


def degenerate_excess(policy: Footage, reference: Footage) -> float:
    """Give the policy's share of degenerate videos less the reference's, on the same prompts and seeds.

    Raises: ValueError: they are not of equally many videos.
    """
    _require_alike(policy, reference)
    return policy.degenerate_rate - reference.degenerate_rate


def _require_alike(policy: Footage, reference: Footage) -> None:
    if not policy.num_videos == reference.num_videos > 0:
        raise ValueError(
            f"expected videos of the same prompts and seeds, got {policy.num_videos} of the policy and "
            f"{reference.num_videos} of the reference"
        )
