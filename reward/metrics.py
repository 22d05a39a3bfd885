"""What held-out data say of a judge: accuracies, detection, calibration, ceilings. Arrays in, records out.

Every array has one entry an item. Items of one prompt are not independent: intervals come from drawing whole prompts
(`prompt_ids`), unless a docstring says otherwise. A `preference` is the probability, or the share of votes, that the
first video is preferred: 1 or 0 for a choice, 0.5 for a tie. A `difference` is the first video's score less the
second's. So in `cost`, where the costlier video is "preferred", neither changes its sign.

All functions raise ValueError on input that is empty, not finite, out of range or of unequal lengths.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy import stats

CONFIDENCE = 0.95
"""Of every interval, two-sided."""
NUM_RESAMPLES = 2_000

Numbers = Float[np.ndarray, " n"]
Flags = Bool[np.ndarray, " n"]
Ids = Shaped[np.ndarray, " n"]
Weights = Float[np.ndarray, "n r"]
"""How often each of n items was drawn in each of r resamples."""
Statistic = Callable[[Weights], Float[np.ndarray, " r"]]

_NUM_WEIGHTS_AT_ONCE = 2**17


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value, its 95 % interval, and the number of items that it rests on."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class PairAccuracy:
    """Accuracy on pairs by each way to count ties, of labels and of scores; in [0, 1]."""

    strict: Estimate
    """All pairs. Equal scores are right for a tie and wrong for a choice; unequal ones are wrong for a tie."""
    tie_aware: Estimate
    """As strict, but differences up to `tie_threshold` call a tie. Source: Deutsch et al. 2023, arXiv 2305.14324."""
    ties_dropped: Estimate
    """Pairs with a choice. Equal scores are wrong."""
    ties_halved: Estimate
    """Pairs with a choice. Equal scores count half, so chance is 1/2. MJ-Video calls this one "tie-aware"."""
    tie_threshold: float


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Counts where scores at or above a threshold are flagged, and their rates.

    The rates' intervals are exact (Clopper-Pearson) for independent items, too narrow for several items a prompt.
    """

    threshold: float
    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int
    recall: Estimate
    false_positive_rate: Estimate
    precision: Estimate | None
    """None where nothing is flagged."""
    accuracy: Estimate


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin:
    """For one range of predictions: their mean, and what came."""

    predicted: float
    observed: Estimate


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How far probabilities can be taken at their word."""

    ece: float
    """Expected calibration error: the mean over items of |observed - predicted| of their bin; in [0, 1]."""
    noise_floor: float
    """The `ece` that perfectly calibrated predictions would show on as many independent outcomes, nearly."""
    brier: float
    """Mean squared error."""
    bins: tuple[ReliabilityBin, ...]


# Intervals --------------------------------------------------------------------------------------------------


def bootstrap(
    statistic: Statistic, prompt_ids: Ids, *, limits: tuple[float, float] = (0.0, 1.0), seed: int = 0
) -> Estimate:
    """Percentile interval of a statistic, from drawing prompts, with all their items, with replacement.

    A resample that cannot tell (NaN; say, without the only positive) could have said anything: in `low` it counts as
    the lower of the statistic's limits, in `high` as the upper. No width means that all resamples agree, not that the
    value is certain.
    """
    _check(prompt_ids=prompt_ids)
    prompts, prompt_of_item = np.unique(prompt_ids, return_inverse=True)
    if len(prompts) < 2:
        raise ValueError(f"expected items of at least two prompts for an interval, got only prompt {prompts[0]}")
    random = np.random.default_rng(seed)
    at_once = max(1, _NUM_WEIGHTS_AT_ONCE // len(prompt_ids))
    sizes = (min(at_once, NUM_RESAMPLES - done) for done in range(0, NUM_RESAMPLES, at_once))
    with np.errstate(invalid="ignore"):  # 0 / 0 is how a resample says that it cannot tell
        value = statistic(np.ones((len(prompt_ids), 1))).item()
        drawn = np.concatenate([statistic(_draw(random, len(prompts), size)[prompt_of_item]) for size in sizes])
    lows, highs = (np.where(np.isnan(drawn), limit, drawn) for limit in limits)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(lows, tail).item(), np.quantile(highs, 1 - tail).item()
    return Estimate(value=value, low=low, high=high, n=len(prompt_ids))


def _draw(random: np.random.Generator, num: int, size: int) -> Float[np.ndarray, "{num} {size}"]:
    """How often each of num things comes up in num draws, `size` times over."""
    place = random.integers(num, size=(num, size)) * size + np.arange(size)
    return np.bincount(place.ravel(), minlength=num * size).reshape(num, size).astype(float)


def mean(values: Numbers, prompt_ids: Ids) -> Estimate:
    """Mean over items."""
    _check(values=values, prompt_ids=prompt_ids)
    return bootstrap(lambda weights: values @ weights / weights.sum(axis=0), prompt_ids)


def rate(values: Numbers | Flags, prompt_ids: Ids, *, among: Flags | None = None) -> Estimate:
    """Mean of values in [0, 1] over the items `among` which they count; all, if not given.

    At exactly 0 or 1 the bootstrap has no width: the interval then is the exact one for as many independent prompts.
    """
    counted = np.ones(len(values)) if among is None else among.astype(float)
    _check_shares(values=values)
    _check(values=values, among=counted, prompt_ids=prompt_ids)
    if not counted.any():
        raise ValueError(f"expected at least one item that counts, got none of {len(counted)}")
    hits = values * counted
    estimate = bootstrap(lambda weights: hits @ weights / (counted @ weights), prompt_ids)
    if estimate.value in (0, 1):
        num_prompts = len(np.unique(prompt_ids[counted > 0]))
        estimate = exact(int(estimate.value) * num_prompts, num_prompts)
    return replace(estimate, n=int(counted.sum()))


def exact(num_hits: int, num: int) -> Estimate:
    """Share of hits among independent items, with its exact interval (Clopper-Pearson)."""
    interval = stats.binomtest(num_hits, num).proportion_ci(CONFIDENCE, method="exact")
    return Estimate(value=num_hits / num, low=float(interval.low), high=float(interval.high), n=num)


def shift(original: Numbers, probed: Numbers, prompt_ids: Ids) -> Estimate:
    """Mean change of a score under a probe, in standard deviations of the original scores; < 0: it fell."""
    _check(original=original, probed=probed, prompt_ids=prompt_ids)
    if np.ptp(original) == 0:
        raise ValueError(f"expected scores that differ, got {original[0]} for each of {len(original)} items")
    return mean((probed - original) / original.std(), prompt_ids)


# Pairs ------------------------------------------------------------------------------------------------------


def pair_accuracy(difference: Numbers, preference: Numbers, prompt_ids: Ids, *, tie_threshold: float) -> PairAccuracy:
    """How often the preferred video, of several votes the majority's, has the higher score.

    `tie_threshold` is the `best_tie_threshold` of validation pairs, never of these.
    """
    chosen = _chosen(difference, preference)
    called = np.sign(difference)
    decided = chosen != 0
    if not decided.any():
        raise ValueError("expected a pair with a choice, got ties (preference 0.5) only")
    if not 0 <= tie_threshold < np.inf:
        raise ValueError(f"expected a finite tie_threshold >= 0, got {tie_threshold}")
    right, called_aware = called == chosen, np.where(np.abs(difference) > tie_threshold, called, 0)
    return PairAccuracy(
        strict=rate(right, prompt_ids),
        tie_aware=rate(called_aware == chosen, prompt_ids),
        ties_dropped=rate(right, prompt_ids, among=decided),
        ties_halved=rate(np.where(called == 0, 0.5, right), prompt_ids, among=decided),
        tie_threshold=tie_threshold,
    )


def best_tie_threshold(difference: Numbers, preference: Numbers) -> float:
    """Up to which |difference| to call a tie for the best tie-aware accuracy on these pairs; the smallest such.

    Source: Deutsch et al. 2023 ("Ties Matter", arXiv 2305.14324), tie calibration.
    """
    chosen, size = _chosen(difference, preference), np.abs(difference)
    candidates = np.unique(np.append(size, 0.0))
    ties, right = np.sort(size[chosen == 0]), np.sort(size[np.sign(difference) * chosen > 0])
    gained = np.searchsorted(ties, candidates, side="right") - np.searchsorted(right, candidates, side="right")
    return candidates[gained.argmax()].item()


def unanimous(preferences: Float[np.ndarray, "n d"]) -> Flags:
    """Whether all dimensions prefer the same video: the pairs on which MJ-Video scores SafeSora.

    All must say which video is better, so for `cost` give 1 - preference.
    """
    _check_shares(preferences=preferences)
    return np.abs(np.sign(preferences - 0.5).sum(axis=1)) == preferences.shape[1]


def generator_only_difference(
    train_generators: Shaped[np.ndarray, "m 2"],
    train_preference: Float[np.ndarray, " m"],
    generators: Shaped[np.ndarray, "n 2"],
) -> Numbers:
    """The differences of the best rule that knows only which generators made the two videos.

    Between two generators, the first one's mean preference in training less 1/2. It is 0 for two videos of one
    generator and for generators that training never compared: the fair accuracy to read is `ties_halved`.
    """
    _check_shares(train_preference=train_preference)
    _check(train_generators=train_generators, train_preference=train_preference)
    _check(generators=generators)
    names, codes = np.unique(np.concatenate([train_generators, generators]), return_inverse=True)
    train, asked = np.split(codes.reshape(-1, 2), [len(train_generators)])
    lean, seen = np.zeros((2, len(names), len(names)))
    np.add.at(lean, tuple(train.T), train_preference - 0.5)
    np.add.at(seen, tuple(train.T), 1.0)
    return ((lean - lean.T) / np.maximum(seen + seen.T, 1))[tuple(asked.T)]


def _chosen(difference: Numbers, preference: Numbers) -> Numbers:
    """1 where the first video is preferred, -1 where the second, 0 for a tie."""
    _check_shares(preference=preference)
    _check(difference=difference, preference=preference)
    return np.sign(preference - 0.5)


# Detection: higher scores should be the positives' ----------------------------------------------------------


def auroc(scores: Numbers, positive: Flags, prompt_ids: Ids) -> Estimate:
    """Probability that a positive scores above a negative, equal scores counted half."""
    _check_classes(positive, scores=scores, prompt_ids=prompt_ids)
    negatives = np.flatnonzero(~positive)[np.argsort(scores[~positive])]
    below, upto = (np.searchsorted(scores[negatives], scores[positive], side) for side in ("left", "right"))

    def area(weights: Weights) -> Float[np.ndarray, " r"]:
        hits, lower = weights[positive], np.pad(weights[negatives].cumsum(axis=0), ((1, 0), (0, 0)))
        return (hits * (lower[below] + lower[upto]) / 2).sum(axis=0) / (hits.sum(axis=0) * lower[-1])

    return bootstrap(area, prompt_ids)


def threshold_at_recall(scores: Numbers, positive: Flags, *, recall: float) -> float:
    """The highest threshold that flags this share of the positives; choose it on validation.

    Raises:
        ValueError: There is no positive.
    """
    _check(scores=scores, positive=positive)
    if not 0 < recall <= 1:
        raise ValueError(f"expected recall in (0, 1], got {recall}")
    found = np.sort(scores[positive])[::-1]
    if not len(found):
        raise ValueError(f"expected positives, got none among {len(scores)} items")
    enough = np.arange(1, len(found) + 1) / len(found) >= recall
    return found[enough.argmax()].item()


def confusion(scores: Numbers, positive: Flags, threshold: float) -> Confusion:
    """Counts and rates at a threshold. For the sign of a cost it is 0: a cost of 0 is flagged, as doubt is no pass."""
    _check_classes(positive, scores=scores)
    if not np.isfinite(threshold):
        raise ValueError(f"expected a finite threshold, got {threshold}")
    flagged, num = scores >= threshold, len(scores)
    hits, false_alarms, misses = (
        int(kind.sum()) for kind in (flagged & positive, flagged & ~positive, ~flagged & positive)
    )
    passes = num - hits - false_alarms - misses
    return Confusion(
        threshold=threshold,
        true_positives=hits,
        false_positives=false_alarms,
        true_negatives=passes,
        false_negatives=misses,
        recall=exact(hits, hits + misses),
        false_positive_rate=exact(false_alarms, false_alarms + passes),
        precision=exact(hits, hits + false_alarms) if flagged.any() else None,
        accuracy=exact(hits + passes, num),
    )


# Probabilities ----------------------------------------------------------------------------------------------


def calibration(predicted: Numbers, observed: Numbers | Flags, prompt_ids: Ids, *, num_bins: int = 10) -> Calibration:
    """Reliability of predicted probabilities, in bins of about equally many items; equal predictions share one."""
    _check_shares(predicted=predicted, observed=observed)
    _check(predicted=predicted, observed=observed, prompt_ids=prompt_ids)
    bin_of_item = ((stats.rankdata(predicted) - 0.5) / len(predicted) * num_bins).astype(int)
    bins = tuple(
        ReliabilityBin(predicted=predicted[inside].mean().item(), observed=rate(observed, prompt_ids, among=inside))
        for inside in (bin_of_item == index for index in np.unique(bin_of_item))
    )
    gaps = (each.observed.n * abs(each.observed.value - each.predicted) for each in bins)
    variances = np.bincount(bin_of_item, predicted * (1 - predicted))
    return Calibration(
        ece=sum(gaps) / len(predicted),
        # A bin's sum is off by a nearly normal error, whose mean size is sqrt(2 / pi) of its deviation.
        noise_floor=np.sqrt(2 / np.pi * variances).sum().item() / len(predicted),
        brier=np.square(predicted - observed).mean().item(),
        bins=bins,
    )


def kappa(first: Ids, second: Ids, prompt_ids: Ids) -> Estimate:
    """Cohen's kappa of two raters' categories: their agreement beyond chance, in [-1, 1].

    Source: Cohen 1960.
    """
    _check(first=first, second=second, prompt_ids=prompt_ids)
    names, codes = np.unique(np.stack([first, second]), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"expected at least two categories, got only {names[0]}")
    one, other = np.eye(len(names))[:, codes.reshape(2, -1)].swapaxes(0, 1)

    def beyond_chance(weights: Weights) -> Float[np.ndarray, " r"]:
        num = weights.sum(axis=0)
        chance = ((one @ weights) * (other @ weights)).sum(axis=0) / num**2
        return ((one * other).sum(axis=0) @ weights / num - chance) / (1 - chance)

    return bootstrap(beyond_chance, prompt_ids, limits=(-1.0, 1.0))


# What is refused --------------------------------------------------------------------------------------------


def _check(**arrays: np.ndarray) -> None:
    lengths = {name: len(array) for name, array in arrays.items()}
    if min(lengths.values()) == 0 or len(set(lengths.values())) > 1:
        raise ValueError(f"expected the same number of items, at least one, in each array, got {lengths}")
    for name, array in arrays.items():
        wrong = np.argwhere(~np.isfinite(array)) if array.dtype.kind == "f" else ()
        if len(wrong):
            item = wrong[0, 0]
            raise ValueError(
                f"expected finite {name}, got {array[tuple(wrong[0])]} for item {item}; leave it out, counted"
            )


def _check_shares(**arrays: np.ndarray) -> None:
    _check(**arrays)
    for name, array in arrays.items():
        if array.min() < 0 or array.max() > 1:
            raise ValueError(f"expected {name} in [0, 1], got {array.min()} to {array.max()}")


def _check_classes(positive: Flags, **arrays: np.ndarray) -> None:
    _check(positive=positive, **arrays)
    if positive.all() or not positive.any():
        raise ValueError(f"expected positives and negatives, got {positive.sum()} positives of {positive.size} items")
