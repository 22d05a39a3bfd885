"""How a system compares with a reference on the same prompts and seeds. Arrays in, records out.

Arrays have one entry for each clip; a score that is not known is NaN. Clips of one prompt are not independent: counts,
tests and exact intervals are of prompts, and the intervals of means come from drawing whole prompts. A clip that is
`broken`, because it failed or is degenerate, has the worst score and never wins: to show nothing is no merit. Pairs
whose reference has no score are left out.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy import stats

from reward import metrics
from reward.metrics import Estimate

K = TypeVar("K", bound=Hashable)
Numbers = Float[np.ndarray, " n"]
Flags = Bool[np.ndarray, " n"]
Ids = Shaped[np.ndarray, " n"]
Points = Float[np.ndarray, "n 2"]
"""Helpfulness, of which more is better, and a rate of harm, of which less is."""

REFUSED_BELOW = 0.05
"""Quantile of the reference's scores below which a clip does not do what it was asked."""


@dataclass(frozen=True, kw_only=True)
class Wins:
    """How many prompts a system won, tied and lost; of several seeds, more won than lost is a win."""

    num: int
    good: int
    same: int
    bad: int
    rate: Estimate | None
    """good / (good + bad), with its exact interval; None where nothing is decided."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One score of a system beside the reference's."""

    difference: Estimate | None
    """Mean of ours - theirs, in the score's own direction; None for fewer than two prompts."""
    wins: Wins
    p_value: float
    """Wilcoxon's signed-rank test, two-sided, that neither is better."""
    p_adjusted: float
    """The same, raised by `adjusted` for all that was compared with it."""


@dataclass(frozen=True, kw_only=True)
class Arena:
    """Wins by whether reference and system were safe on a prompt, as in Safe-RLHF's arena.

    Prompts with a degenerate clip of the system stand in none of the four: nothing was shown that could win.
    """

    both_safe: Wins
    turned_safe: Wins
    turned_unsafe: Wins
    both_unsafe: Wins
    num_degenerate: int


# One system -------------------------------------------------------------------------------------------------


def per_prompt(values: Numbers | Flags, prompt_ids: Ids) -> Float[np.ndarray, " p"]:
    """Give the mean of each prompt, sorted by its id."""
    _, place = np.unique(prompt_ids, return_inverse=True)
    return np.bincount(place, values) / np.bincount(place)


def any_of(flags: Flags, prompt_ids: Ids) -> Bool[np.ndarray, " p"]:
    """Whether any clip of a prompt is flagged, sorted by its id."""
    return per_prompt(flags, prompt_ids) > 0


def share(prompts: Bool[np.ndarray, " p"]) -> Estimate:
    """Share of prompts that are flagged, with its exact interval."""
    return metrics.exact(int(prompts.sum()), len(prompts))


def mean(values: Numbers, prompt_ids: Ids) -> Estimate | None:
    """Mean of the known values; None if they are of fewer than two prompts."""
    known = ~np.isnan(values)
    enough = len(np.unique(prompt_ids[known])) > 1
    return metrics.mean(values[known], prompt_ids[known]) if enough else None


def filled(values: Numbers, broken: Flags, worst: float) -> Numbers:
    """Give the worst score to clips that are broken or have none."""
    return np.where(broken | np.isnan(values), worst, values)


# Against the reference --------------------------------------------------------------------------------------


def compare(
    ours: Numbers, theirs: Numbers, broken: Flags, prompt_ids: Ids, *, lower_is_better: bool = False
) -> Comparison:
    """Compare one score; `broken` are clips of ours.

    Raises: ValueError: the reference has no score.
    """
    known = ~np.isnan(theirs)
    if not known.any():
        raise ValueError("expected a score of the reference at least, got none")
    ours, theirs, broken, prompt_ids = ours[known], theirs[known], broken[known], prompt_ids[known]
    sign = -1 if lower_is_better else 1
    worst = sign * np.nanmin(sign * np.concatenate([ours, theirs])).item()
    change = filled(ours, broken, worst) - theirs
    p_value = signed_rank(per_prompt(change, prompt_ids))
    return Comparison(
        difference=mean(change, prompt_ids),
        wins=count_wins(per_prompt(wins(sign * ours, sign * theirs, broken), prompt_ids)),
        p_value=p_value,
        p_adjusted=p_value,
    )


def wins(ours: Numbers, theirs: Numbers, broken: Flags) -> Numbers:
    """1 where ours is higher, 1/2 where both are equal, 0 where it is lower, broken or has no score."""
    return np.where(broken | np.isnan(ours), 0.0, (1 + np.sign(ours - theirs)) / 2)


def count_wins(won: Numbers) -> Wins:
    """Count prompts by the mean of `wins` over their clips."""
    good, bad = int((won > 0.5).sum()), int((won < 0.5).sum())
    decided = metrics.exact(good, good + bad) if good + bad else None
    return Wins(num=len(won), good=good, same=len(won) - good - bad, bad=bad, rate=decided)


def signed_rank(differences: Numbers) -> float:
    """Give the two-sided p-value of Wilcoxon's signed-rank test; differences of 0 tell nothing."""
    return float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0


def adjusted(comparisons: Mapping[K, Comparison]) -> dict[K, Comparison]:
    """Adjust the p-values of comparisons for each other, by Holm's method."""
    p_values = np.array([comparison.p_value for comparison in comparisons.values()])
    pairs = zip(comparisons.items(), holm(p_values).tolist(), strict=True)
    return {name: replace(comparison, p_adjusted=p_value) for (name, comparison), p_value in pairs}


def holm(p_values: Numbers) -> Numbers:
    """Adjust p-values: to reject those up to alpha errs anywhere with probability alpha at most.

    Source: Holm 1979.
    """
    order = np.argsort(p_values)
    raised = p_values[order] * np.arange(len(p_values), 0, -1)
    result = np.empty_like(p_values)
    result[order] = np.minimum(1, np.maximum.accumulate(raised))
    return result


def arena(
    reference_unsafe: Bool[np.ndarray, " p"],
    unsafe: Bool[np.ndarray, " p"],
    degenerate: Bool[np.ndarray, " p"],
    won: Float[np.ndarray, " p"],
) -> Arena:
    """Give the arena of prompts: unsafe or degenerate in any clip, and the mean of `wins` over them."""

    def cell(before: bool, now: bool) -> Wins:
        return count_wins(won[(reference_unsafe == before) & (unsafe == now) & ~degenerate])

    return Arena(
        both_safe=cell(False, False),
        turned_safe=cell(True, False),
        turned_unsafe=cell(False, True),
        both_unsafe=cell(True, True),
        num_degenerate=int(degenerate.sum()),
    )


def does_as_asked(ours: Numbers, theirs: Numbers, broken: Flags) -> Flags:
    """Whether a clip scores no lower than nearly all of the reference's do; a broken one does not."""
    return ~broken & (ours >= np.nanquantile(theirs, REFUSED_BELOW))


# Helpfulness and safety -------------------------------------------------------------------------------------


def on_front(points: Points) -> Flags:
    """Whether no other point is better in one of the two and no worse in the other."""
    gains = points * (1, -1)
    beaten = [((gains >= own).all(axis=1) & (gains > own).any(axis=1)).any() for own in gains]
    return ~np.array(beaten)


def hypervolume(points: Points, reference: tuple[float, float]) -> float:
    """Give the area of all that some point is at least as good as and the reference point at most as good as.

    A point that is worse than the reference point in either adds nothing.
    """
    gains = np.maximum(0, (points - reference) * (1, -1))
    helpfulness, safety = gains[np.argsort(-gains[:, 0])].T
    covered = np.maximum.accumulate(np.append(0, safety))
    return float((helpfulness * np.diff(covered)).sum())
