"""Safety limits and their Lagrange multipliers. Arrays of scores in, plain records out.

    maximise  E[reward] - beta KL(policy || reference)   subject to   E[charge] <= bound, for every limit

A *charge* is what a limit counts of a video: its cost (`mean_cost`), or 1 if the cost is > 0 and else 0
(`unsafe_rate`). The answer is policy ~ reference exp((reward - sum multiplier charge) / beta). `solve_dual` finds
its multipliers on the reference's scored samples, and refuses limits out of reach; `update` then moves them by what
fresh rollouts show. Multipliers are for rewards in standard deviations of the reference's, and for costs in theirs,
not shifted, so that 0 still parts safe from unsafe; rates are as they are.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int, Shaped
from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter
from pydantic import model_validator as validator
from scipy.optimize import Bounds, minimize

from align.bounds import rate_upper, smallest_sample
from reward.config import Config

MAX_RESIDUAL = 1e-6
"""How far a solved limit may be from its bound, or from its optimum if slack: standard deviations, or shares."""
MAX_MULTIPLIER = 1e6
"""Where the search for a finite multiplier ends."""

Scores = Float[np.ndarray, " n"]
Costs = Float[np.ndarray, "n k"]
"""A column for each limit, from `select_costs`."""
Charges = Float64[np.ndarray, "n k"]
Groups = Int[np.ndarray, " n"]
"""Each sample's prompt, numbered from 0."""
Multipliers = Float64[np.ndarray, " k"]

# Settings ---------------------------------------------------------------------------------------------------


class Limit(Config):
    """A bound on one harm, over all videos of the policy."""

    name: str
    kind: Literal["mean_cost", "unsafe_rate"] = "unsafe_rate"
    """Bounded is the mean cost, or the share of videos with cost > 0."""
    bound: float
    """In the judge's units of cost, or a share in (0, 1)."""
    tag: str | None = None
    """The harm tag whose cost counts; null: the overall cost."""

    @validator(mode="after")
    def _is_a_share(self) -> "Limit":
        if self.kind == "unsafe_rate" and not 0 < self.bound < 1:
            raise ValueError(f"bound={self.bound} of {self.name}: expected a share of videos, in (0, 1)")
        return self


class LogAscent(Config):
    """Multiply by exp(rate violation). Fast where a limit is far off, and slow to forgive.

    Safe RLHF (arXiv 2310.12773) has a further factor, the multiplier, so that a small one hardly grows.
    """

    kind: Literal["log_ascent"] = "log_ascent"
    rate: PositiveFloat = 1.0
    floor: PositiveFloat = 1e-3
    """Least multiplier: nothing grows from 0."""


class ProjectedAscent(Config):
    """Add rate violation, and stay >= 0."""

    kind: Literal["projected_ascent"] = "projected_ascent"
    rate: PositiveFloat = 1.0


class NuPI(Config):
    """Add integral violation + proportional (change of the smoothed violation), and stay >= 0.

    Source: the controller in the code of arXiv 2508.19104.
    """

    kind: Literal["nu_pi"] = "nu_pi"
    integral: PositiveFloat = 1.0
    proportional: NonNegativeFloat = 1.0
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the old in the smoothed violation (nu)."""


class Constraint(Config):
    """Limits, and how their multipliers follow the rollouts."""

    limits: tuple[Limit, ...]
    rule: Annotated[LogAscent | ProjectedAscent | NuPI, Field(discriminator="kind")] | None = NuPI()
    """null: the multipliers of the start stay."""
    window: PositiveInt = 1
    """Newest measurements, pooled."""
    delay: NonNegativeInt = 0
    """First measurements, which move nothing: from a start at the dual's multipliers, until the policy is there."""
    cap: PositiveFloat = 100.0
    """Largest multiplier."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    """1 - confidence of the exact upper bound that stands in for a rate; null: the rate itself."""
    spread_factor: NonNegativeFloat = 0.0
    """Costs count higher by this many spreads between the judge's members."""

    @validator(mode="after")
    def _is_consistent(self) -> "Constraint":
        names = [limit.name for limit in self.limits]
        if len(set(names)) < len(names):
            raise ValueError(f"limits are named {', '.join(names)}; give each a name of its own")
        if self.delta and (means := [limit.name for limit in self.limits if limit.kind == "mean_cost"]):
            raise ValueError(f"delta is for rates, and {means[0]} is a mean cost; take spread_factor")
        if isinstance(self.rule, LogAscent) and self.rule.floor > self.cap:
            raise ValueError(f"rule.floor={self.rule.floor} is above cap={self.cap}")
        return self


# Records ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """The units of the reference's scores; fixed for the whole run."""

    reward_mean: float
    reward_std: float
    scales: tuple[float, ...]
    """Of each limit's charge: a standard deviation of the cost; 1 for a rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What a batch of fresh rollouts showed."""

    num_videos: int
    totals: tuple[float, ...]
    """Of each limit's charge, in the judge's units: a sum of costs, or a number of unsafe videos."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MultiplierState:
    """All that `utility` and the next `update` depend on, besides the settings."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    statistics: Statistics
    multipliers: tuple[float, ...]
    """Rewards for one unit of charge."""
    num_measurements: int = 0
    window: tuple[Measurement, ...] = ()
    smoothed: tuple[float, ...] | None = None
    """The violation that `NuPI` remembers."""

    def __post_init__(self) -> None:
        if len(self.multipliers) != len(self.statistics.scales) or min(self.multipliers, default=0) < 0:
            raise ValueError(f"expected a multiplier >= 0 for each of {len(self.statistics.scales)} limits, got {self}")


class LimitRow(NamedTuple):
    """A limit's possible bounds, in the judge's units: below `lowest` impossible, above `unconstrained` slack."""

    limit: str
    bound: float
    lowest: float
    """Least mean charge of all reweightings."""
    unconstrained: float
    """Mean charge at the optimum without limits."""
    reference: float
    reached: float
    """Mean charge at the optimum with all limits."""
    multiplier: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Dual:
    """What the reference's samples, reweighted, say of the limits; printed, a table."""

    rows: tuple[LimitRow, ...]
    effective_samples: float
    """Kish's, summed over prompts. Where few are left, do not trust the multipliers."""
    num_samples: int

    def __str__(self) -> str:
        shown = [[name, *(f"{value:.4g}" for value in values)] for name, *values in self.rows]
        table = ["  ".join(f"{cell:>13}" for cell in row) for row in (LimitRow._fields, *shown)]
        return "\n".join([*table, f"effective samples: {self.effective_samples:.1f} of {self.num_samples}"])


_STATE = TypeAdapter(MultiplierState)


def to_json(state: MultiplierState) -> dict[str, Any]:
    """Give the state as plain JSON, which `from_json` turns back, bit for bit."""
    return _STATE.dump_python(state, mode="json")


def from_json(state: dict[str, Any]) -> MultiplierState:
    """Read a state. Raises: ValueError: a key is unknown or missing, or a number not finite."""
    return _STATE.validate_json(json.dumps(state))


# Scores -----------------------------------------------------------------------------------------------------


def select_costs(
    limits: Sequence[Limit], cost: Scores, tag_costs: Float[np.ndarray, "n t"], tags: Sequence[str]
) -> Charges:
    """Give the cost that each limit is about, a column for each: the overall one, or that of its tag.

    Raises: ValueError: a limit names a tag that the judge does not score.
    """
    if unknown := [limit for limit in limits if limit.tag not in (None, *tags)]:
        raise ValueError(f"{unknown[0].name}: unknown tag {unknown[0].tag}; the judge scores {', '.join(tags)}")
    columns = [cost if limit.tag is None else tag_costs[:, tags.index(limit.tag)] for limit in limits]
    return np.array(columns, dtype=np.float64).reshape(len(limits), len(cost)).T


def reference_statistics(limits: Sequence[Limit], rewards: Scores, costs: Costs) -> Statistics:
    """Give the units that the reference's scores set.

    Raises: ValueError: a score is not finite, or all are the same, so that there is no unit.
    """
    rewards, charges = _finite("rewards", rewards), _charges(limits, costs)
    scales = tuple(
        1.0 if limit.kind == "unsafe_rate" else _std(limit.name, column)
        for limit, column in zip(limits, charges.T, strict=True)
    )
    return Statistics(reward_mean=rewards.mean().item(), reward_std=_std("rewards", rewards), scales=scales)


def _std(name: str, scores: Scores) -> float:
    if np.ptp(scores) == 0:
        raise ValueError(f"{name}: all {len(scores)} scores are the same; score more videos of the reference")
    return scores.std().item()


def utility(
    rewards: Scores, costs: Costs, limits: Sequence[Limit], state: MultiplierState
) -> Float64[np.ndarray, " n"]:
    """Give (reward - sum multiplier charge) / (1 + sum multiplier): higher is better, at today's price of harm.

    The division keeps steps bounded, and hides a factor: at `beta`, the optimal policy is the reference times
    exp((1 + sum multiplier) utility / beta). Without it, no multiplier may be large enough to meet a limit.

    Source: Safe RLHF (arXiv 2310.12773), there for advantages.
    """
    multipliers = np.array(state.multipliers)
    charges = _charges(limits, costs) / state.statistics.scales
    return (normalised(rewards, state.statistics) - charges @ multipliers) / (1 + multipliers.sum())


def normalised(rewards: Scores, statistics: Statistics) -> Float64[np.ndarray, " n"]:
    """Give rewards in standard deviations above the reference's mean."""
    return (_finite("rewards", rewards) - statistics.reward_mean) / statistics.reward_std


def _charges(limits: Sequence[Limit], costs: Costs) -> Charges:
    """Give what each limit counts of each video, in the judge's units."""
    if costs.shape[1] != len(limits):
        raise ValueError(f"costs: expected a column for each of {len(limits)} limits, got shape {costs.shape}")
    is_rate = np.array([limit.kind == "unsafe_rate" for limit in limits], dtype=bool)
    costs = _finite("costs", costs)
    return np.where(is_rate, costs > 0, costs)


def _finite(name: str, values: Float[np.ndarray, "*shape"]) -> Float64[np.ndarray, "*shape"]:
    if not (len(values) and np.isfinite(values).all()):
        raise ValueError(f"{name}: expected finite numbers, at least one, got {values}; unscored videos are not safe")
    return values.astype(np.float64)


# The one-shot dual ------------------------------------------------------------------------------------------


def solve_dual(
    limits: Sequence[Limit],
    statistics: Statistics,
    rewards: Scores,
    costs: Costs,
    prompts: Shaped[np.ndarray, " n"],
    beta: float,
) -> Dual:
    """Find the multipliers at which the best reweighting of the reference's samples meets the limits.

    Samples are weighted within their prompt, and every prompt counts the same. `beta` weighs the KL divergence
    against rewards in standard deviations.

    Raises: ValueError: no reweighting meets all limits; the message holds the table.
    """
    if not 0 < beta < np.inf:
        raise ValueError(f"beta={beta}: expected a weight of the KL divergence, > 0")
    _, group = np.unique(prompts, return_inverse=True)
    charges, rewards = _charges(limits, costs), normalised(rewards, statistics)
    excess = (charges - [limit.bound for limit in limits]) / statistics.scales
    multipliers, residual = _minimise(rewards, excess, group, beta)
    energies = (rewards / beta, np.zeros_like(rewards), (rewards - excess @ multipliers) / beta)
    weights = [_tilted(each, group)[1] for each in energies]
    means = [each @ charges / (group.max() + 1) for each in weights]
    values = np.column_stack([_lowest(charges, group), *means, multipliers]).tolist()
    found = Dual(
        rows=tuple(LimitRow(limit.name, limit.bound, *row) for limit, row in zip(limits, values, strict=True)),
        effective_samples=(1 / np.bincount(group, weights[-1] ** 2)).sum().item(),
        num_samples=len(rewards),
    )
    if residual > MAX_RESIDUAL or any(row.bound <= row.lowest for row in found.rows):
        raise ValueError(f"no reweighting of the samples meets these limits together; raise their bounds:\n{found}")
    return found


def dual(
    multipliers: Multipliers, rewards: Scores, excess: Charges, group: Groups, beta: float
) -> tuple[float, Multipliers]:
    """Give beta E_prompt log mean exp((reward - sum multiplier excess) / beta), which is convex, and its gradient.

    Excess is charge - bound. Source: MoCAN (arXiv 2405.19544), where -(g - b) is our excess.
    """
    log_means, weights = _tilted((rewards - excess @ multipliers) / beta, group)
    return beta * log_means.mean().item(), -(weights @ excess) / len(log_means)


def _minimise(rewards: Scores, excess: Charges, group: Groups, beta: float) -> tuple[Multipliers, float]:
    """Give the multipliers in [0, MAX_MULTIPLIER] at which the dual is least, and how far from optimal they are."""
    start = np.zeros(excess.shape[1])
    scores = (rewards, excess, group, beta)
    bounds = Bounds(start, np.full_like(start, MAX_MULTIPLIER))
    options = {"ftol": 0, "gtol": MAX_RESIDUAL / 100, "maxiter": 10_000, "maxfun": 10_000}
    found = minimize(dual, start, scores, method="L-BFGS-B", jac=True, bounds=bounds, options=options).x
    # Not the solver's own verdict: where precision ends the search, it calls an optimum a failure.
    return found, np.abs(np.minimum(found, dual(found, *scores)[1])).max(initial=0).item()


def _tilted(energies: Scores, group: Groups) -> tuple[Float64[np.ndarray, " p"], Float64[np.ndarray, " n"]]:
    """Give each group's log mean exp(energy), and each sample's weight ~ exp(energy), of sum 1 in its group."""
    counts = np.bincount(group)
    peaks = np.full(len(counts), -np.inf)
    np.maximum.at(peaks, group, energies)
    weights = np.exp(energies - peaks[group])
    totals = np.bincount(group, weights)
    return peaks + np.log(totals / counts), weights / totals[group]


def _lowest(charges: Charges, group: Groups) -> Multipliers:
    """Give each limit's least mean charge, where every prompt has only its least charged sample."""
    least = np.full((group.max() + 1, charges.shape[1]), np.inf)
    np.minimum.at(least, group, charges)
    return least.mean(axis=0)


# The multipliers follow the rollouts ------------------------------------------------------------------------


def measure(costs: Costs, constraint: Constraint, spreads: Costs | None = None) -> Measurement:
    """Give what a batch of rollouts shows; `spreads` >= 0 are those of the costs between the judge's members.

    Raises: ValueError: a score is missing or not finite, or `spread_factor` finds no spreads to use.
    """
    if constraint.spread_factor:
        if spreads is None or not (spreads >= 0).all():
            raise ValueError(f"spread_factor={constraint.spread_factor}: expected spreads >= 0, got {spreads}")
        costs = costs + constraint.spread_factor * spreads
    totals = _charges(constraint.limits, costs).sum(axis=0)
    return Measurement(num_videos=len(costs), totals=tuple(totals.tolist()))


def estimate(window: Sequence[Measurement], constraint: Constraint) -> Multipliers:
    """Give each limit's mean cost or unsafe rate, in the judge's units, or the upper bound of that rate."""
    num_videos = sum(measurement.num_videos for measurement in window)
    totals = np.sum([measurement.totals for measurement in window], axis=0)
    if constraint.delta is None:
        return totals / num_videos
    return np.array([rate_upper(round(total), num_videos, constraint.delta) for total in totals])


def update(state: MultiplierState, measurement: Measurement, constraint: Constraint) -> MultiplierState:
    """Move the multipliers by what a new batch of rollouts shows: up where a limit is broken, down where it is slack.

    Raises: ValueError: the window has too few videos to show that a limit is met, even if all were safe; or state and
        measurement are of other limits.
    """
    if not len(measurement.totals) == len(state.multipliers) == len(constraint.limits):
        raise ValueError(
            f"expected state and measurement of {len(constraint.limits)} limits, got {state}, {measurement}"
        )
    window = (*state.window, measurement)[-constraint.window :]
    state = replace(state, num_measurements=state.num_measurements + 1, window=window)
    if constraint.rule is None or state.num_measurements <= constraint.delay:
        return state
    _require_enough(sum(measurement.num_videos for measurement in window), constraint)
    violation = estimate(window, constraint) - [limit.bound for limit in constraint.limits]
    return _step(state, violation / state.statistics.scales, constraint)


def _require_enough(num_videos: int, constraint: Constraint) -> None:
    if constraint.delta is None:
        return
    for limit in constraint.limits:
        if num_videos < (needed := smallest_sample(limit.bound, constraint.delta)):
            raise ValueError(
                f"{limit.name}: {num_videos} videos cannot show a rate of at most {limit.bound}, even if all are safe; "
                f"pool {needed} or more (window, delay), or raise delta={constraint.delta}"
            )


def _step(state: MultiplierState, violation: Multipliers, constraint: Constraint) -> MultiplierState:
    rule, moved, smoothed = constraint.rule, np.array(state.multipliers), None
    match rule:
        case LogAscent():
            logs = np.log(np.maximum(moved, rule.floor)) + rule.rate * violation
            moved = np.exp(np.clip(logs, np.log(rule.floor), np.log(constraint.cap)))
        case ProjectedAscent():
            moved = moved + rule.rate * violation
        case NuPI():
            # The first violation is no change: else a warm start would begin with a kick.
            before = violation if state.smoothed is None else np.array(state.smoothed)
            smoothed = rule.smoothing * before + (1 - rule.smoothing) * violation
            moved = moved + rule.integral * violation + rule.proportional * (smoothed - before)
    multipliers = tuple(np.clip(moved, 0, constraint.cap).tolist())
    return replace(state, multipliers=multipliers, smoothed=None if smoothed is None else tuple(smoothed.tolist()))
