"""What a sample proves about all prompts: one-sided bounds, valid for every sample size.

Each bound fails, which is to say that the truth lies beyond it, in at most a share `delta` of all samples. The
prompts of a sample must be independent draws of those that the claim is about, and no value of theirs may have
helped to choose what is measured. Student's t is absent: where harm is rare, its bounds fail far more often.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import optimize, stats

Upper = Callable[[float], float]
"""An upper bound as a function of its delta; it may only fall as delta rises."""

Values = Float[np.ndarray, " n"]
Verdict = Literal["PASS", "FAIL", "INSUFFICIENT-DATA"]
VERDICTS: Sequence[Verdict] = ("PASS", "INSUFFICIENT-DATA", "FAIL")
"""From the best to the worst."""

MAX_STAKE = 0.5
"""Most of its capital that a bet may lose; Waudby-Smith & Ramdas advise 1/2 or 3/4."""
DESIGN_DELTA = 0.05
"""The bets are sized for this delta, the bound holds for every one."""


def verdict(estimate: float, upper: float, limit: float) -> Verdict:
    """Judge whether something is at most a limit.

    - FAIL: the estimate is above the limit, proven or not. To sample on until it passes is to pass by luck.
    - PASS: the upper bound is within the limit.
    - INSUFFICIENT-DATA: only the estimate is, so that more prompts may decide, in a new test with its own delta.
    """
    if estimate > limit:
        return "FAIL"
    return "PASS" if upper <= limit else "INSUFFICIENT-DATA"


# Rates ------------------------------------------------------------------------------------------------------


def rate_upper(num_unsafe: int, num: int, delta: float) -> float:
    """Bound a rate from above: at that rate, so few unsafe ones or fewer have probability delta.

    Source: Clopper & Pearson 1934, one-sided.
    Raises: ValueError: impossible counts, or delta outside (0, 1).
    """
    _require_counts(num_unsafe, num, delta)
    return 1.0 if num_unsafe == num else float(stats.beta.isf(delta, num_unsafe + 1, num - num_unsafe))


def rate_lower(num_unsafe: int, num: int, delta: float) -> float:
    """Bound a rate from below: at that rate, so many unsafe ones or more have probability delta.

    Source: Clopper & Pearson 1934, one-sided.
    Raises: ValueError: impossible counts, or delta outside (0, 1).
    """
    _require_counts(num_unsafe, num, delta)
    return 0.0 if num_unsafe == 0 else float(stats.beta.ppf(delta, num_unsafe, num - num_unsafe + 1))


def judged_rate_upper(num_flagged: int, num: int, num_found: int, num_labelled: int, delta: float) -> float:
    """Bound the rate of what is truly unsafe, of which a judge flags only a part.

    The judge found `num_found` of `num_labelled` independent clips known to be unsafe. Half of delta goes to the
    rate of flags, at least rate times recall, half to the recall. False alarms add flags, and so can only
    raise the bound. It assumes that the labelled clips are no easier to judge than those of the sample.

    Raises: ValueError: impossible counts, or delta outside (0, 1).
    """
    flagged, recall = rate_upper(num_flagged, num, delta / 2), rate_lower(num_found, num_labelled, delta / 2)
    return flagged / recall if flagged < recall else 1.0


def smallest_sample(limit: float, delta: float) -> int:
    """Give the smallest number of prompts, none of them unsafe, whose bound is within a limit in (0, 1)."""
    return math.ceil(math.log(delta) / math.log1p(-limit))


# Bounded means ----------------------------------------------------------------------------------------------


def bernstein_upper(costs: Values, delta: float, *, low: float = 0.0, high: float = 1.0) -> float:
    """Bound the mean of at least two costs in [low, high] from above, by their variance.

    Source: Maurer & Pontil 2009 (arXiv 0907.3740), the empirical Bernstein bound.
    Raises: ValueError: fewer than two costs, costs outside [low, high], or delta outside (0, 1).
    """
    shares = _shares(costs, low, high, delta)
    if len(shares) < 2:
        raise ValueError(f"expected at least two costs, for their variance, got {len(shares)}")
    log, num = math.log(2 / delta), len(shares)
    margin = math.sqrt(2 * shares.var(ddof=1) * log / num) + 7 * log / (3 * (num - 1))
    return low + (high - low) * min(1.0, float(shares.mean()) + margin)


def betting_upper(costs: Values, delta: float, *, low: float = 0.0, high: float = 1.0) -> float:
    """Bound the mean of costs in [low, high] from above: the least at which bets on less would make 1 / delta.

    Tighter than `bernstein_upper`, never below the costs' own mean. Their order must not depend on them.

    Source: Waudby-Smith & Ramdas 2020 (arXiv 2010.09686), the hedged capital's side against large means with
    predictable plug-in bets for a fixed sample size, its whole stake on that side.
    Raises: ValueError: no cost, costs outside [low, high], or delta outside (0, 1).
    """
    return low + (high - low) * _betting_upper(_shares(costs, low, high, delta), delta)


def betting_lower(values: Values, delta: float, *, low: float = 0.0, high: float = 1.0) -> float:
    """Bound the mean of values in [low, high] from below, as `betting_upper` does from above.

    For a win rate, give 1 for a win, 1/2 for a tie and 0 for a loss or a video that is missing.

    Raises: ValueError: no value, values outside [low, high], or delta outside (0, 1).
    """
    return high - (high - low) * _betting_upper(1 - _shares(values, low, high, delta), delta)


def _betting_upper(shares: Values, delta: float) -> float:
    bets, goal = _bets(shares), math.log(1 / delta)
    if _log_capital(1.0, shares, bets) <= goal:
        return 1.0
    edge = optimize.brentq(lambda mean: _log_capital(mean, shares, bets) - goal, 0.0, 1.0)
    return max(float(edge), float(shares.mean()))


def _log_capital(mean: float, shares: Values, bets: Values) -> float:
    """Give the most, as a logarithm, that bets on values below a mean ever made of 1; it rises with the mean."""
    stakes = MAX_STAKE / np.maximum(MAX_STAKE / bets, 1 - mean)
    return float(np.log1p(stakes * (mean - shares)).cumsum().max())


def _bets(shares: Values) -> Values:
    """Size each bet by the spread of the values before it and of one guess, a half plus or minus a half."""
    counts = np.arange(1, len(shares) + 1)
    means = (0.5 + shares.cumsum()) / (counts + 1)
    variances = (0.25 + ((shares - means) ** 2).cumsum()) / (counts + 1)
    known = np.concatenate([[0.25], variances[:-1]])
    return np.sqrt(2 * math.log(1 / DESIGN_DELTA) / (known * len(shares)))


# Several claims at once -------------------------------------------------------------------------------------


def bonferroni(uppers: Sequence[Upper], delta: float) -> list[float]:
    """Give upper bounds that all hold at once, but for a share delta of samples: delta is shared evenly."""
    return [upper(delta / len(uppers)) for upper in uppers]


def holm(uppers: Sequence[Upper], limits: Sequence[float], delta: float) -> list[float]:
    """Give upper bounds that all hold at once, and pass every limit that `bonferroni` passes and more.

    A claim that passes leaves its share of delta to the others. Unless all pass, its limit is then its bound.

    Sources: Holm 1979; Strassburger & Bretz 2008 for the bounds.
    """
    left = set(range(len(uppers)))
    while left:
        passed = {index for index in left if uppers[index](delta / len(left)) <= limits[index]}
        if not passed:
            return [upper(delta / len(left)) if i in left else limits[i] for i, upper in enumerate(uppers)]
        left -= passed
    return [min(pair) for pair in zip(bonferroni(uppers, delta), limits, strict=True)]


def fixed_sequence(uppers: Sequence[Upper], limit: float, delta: float) -> int:
    """Give how many candidates, from the first on, are proven to keep a limit; the last of them is the choice.

    The candidates, checkpoints or LoRA scales, stand in an order that was fixed before the data were seen, from
    the safest to the most helpful. None needs a share of delta, since the first that fails ends the test. Of
    the choice it proves the limit, not the tighter bound that it would have had alone.

    Source: Angelopoulos et al. 2021 (Learn then Test, arXiv 2110.01052), fixed sequence testing.
    """
    kept = [upper(delta) <= limit for upper in uppers]
    return [*kept, False].index(False)


# What can be used -------------------------------------------------------------------------------------------


def _require_counts(num_part: int, num: int, delta: float) -> None:
    if not 0 <= num_part <= num:
        raise ValueError(f"expected a count and a part of it, got {num_part} of {num}")
    _require_delta(delta)


def _require_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"expected delta, 1 - confidence, between 0 and 1, got {delta}")


def _shares(values: Values, low: float, high: float, delta: float) -> Values:
    """Map [low, high] to [0, 1]."""
    _require_delta(delta)
    outside = values[~((values >= low) & (values <= high))]
    if not len(values) or len(outside):
        raise ValueError(f"expected values in [{low}, {high}], got {outside[0] if len(outside) else 'none'}")
    return (values.astype(np.float64) - low) / (high - low)
