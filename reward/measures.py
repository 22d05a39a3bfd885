"""What is measured of a judge on held-out data: records that say everything, or why they cannot.

All statistics are those of `reward.metrics`. Intervals come from drawing prompts. Accuracies are shares, not per cent.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from scipy.special import expit

from reward import metrics, rows
from reward.files import DataError
from reward.held_out import Compared, Counts, HeldOut, PairLabel, Searched, VideoLabel, has_tag, is_unsafe, preferred
from reward.metrics import Calibration, Confusion, Estimate, Numbers, PairAccuracy
from reward.probes import PROBED
from reward.records import DIMENSIONS, TAGS, Dimension, Pair, VideoSample, videos_of
from reward.verdicts import Calibration as Scales

P = ParamSpec("P")
T = TypeVar("T")

TAG_THRESHOLD = 0.5
"""Of a tag's probability."""


@dataclass(frozen=True, kw_only=True)
class NotMeasured:
    """Why there is no number."""

    not_measured: str


UNTRAINED = NotMeasured(not_measured="the model was not trained to tell")


def attempt(measure: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | NotMeasured:
    """Give what a measure gives, or what it says is missing."""
    try:
        return measure(*args, **kwargs)
    except ValueError as error:
        return NotMeasured(not_measured=str(error))


# Pairs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """How often one dimension is ranked as people do."""

    accuracy: PairAccuracy | NotMeasured
    unanimous: PairAccuracy | NotMeasured
    """On pairs where all six dimensions prefer one video, as MJ-Video scores SafeSora."""
    within_generator: PairAccuracy | NotMeasured
    """On pairs of one generator, where knowing it helps nothing."""
    generator_only: Estimate | NotMeasured
    """Of the best rule that knows the two generators and nothing else; ties halved."""
    ceiling: float | None
    """The best accuracy that the noise of the labels leaves, if it is known."""
    gap_points: float | None
    """Accuracy, ties dropped, less the ceiling, in points; < 0: below it."""


def ranking(
    dimension: Dimension, test: HeldOut, validation: HeldOut, train: Sequence[Pair], ceiling: float | None
) -> Ranking:
    """Measure a dimension that was trained."""
    label = preferred(dimension)
    same = test.only(len(set(generators_of(pair))) == 1 and None not in generators_of(pair) for pair in test.pairs)
    parts = (test, test.only(map(is_unanimous, test.pairs)), same)
    accuracy, unanimous, within = (attempt(accuracy_on, dimension, part, validation, label) for part in parts)
    known = None if ceiling is None or isinstance(accuracy, NotMeasured) else accuracy.ties_dropped.value - ceiling
    return Ranking(
        accuracy=accuracy,
        unanimous=unanimous,
        within_generator=within,
        generator_only=attempt(generator_only, dimension, train, test.pairs),
        ceiling=ceiling,
        gap_points=None if known is None else 100 * known,
    )


def accuracy_on(dimension: Dimension, test: HeldOut, validation: HeldOut, label: PairLabel) -> PairAccuracy:
    """Give the accuracies, with the tie threshold that is best on the validation pairs."""
    chosen_on, compared = validation.compared(dimension, label), test.compared(dimension, label)
    return accuracy_of(compared, metrics.best_tie_threshold(chosen_on.difference, chosen_on.preference))


def accuracy_of(pairs: Compared, tie_threshold: float = 0.0) -> PairAccuracy:
    """Give the accuracies."""
    return metrics.pair_accuracy(pairs.difference, pairs.preference, pairs.prompt_ids, tie_threshold=tie_threshold)


def is_unanimous(pair: Pair) -> bool:
    """Tell whether all six dimensions are labelled and prefer one video; in cost, the less costly one."""
    shares = [preferred(dimension)(pair) for dimension in DIMENSIONS]
    better = [share if d != "cost" or share is None else 1 - share for d, share in zip(DIMENSIONS, shares, strict=True)]
    return None not in better and bool(metrics.unanimous(np.array([better], dtype=float))[0])


def generators_of(pair: Pair) -> tuple[str | None, ...]:
    """Give what made the two videos."""
    return tuple(video.generator for video in videos_of(pair))


def generator_only(dimension: Dimension, train: Sequence[Pair], test: Sequence[Pair]) -> Estimate:
    """Give the accuracy of the best rule that knows which generators made the two videos, and nothing else.

    Raises: ValueError: there is no labelled pair whose generators are known.
    """
    label = preferred(dimension)
    known = [[p for p in split if None not in generators_of(p) and label(p) is not None] for split in (train, test)]
    if not all(known):
        raise ValueError("no labelled pair whose generators are known, in training or in test")
    named, labels = ([np.array([of(p) for p in split]) for split in known] for of in (generators_of, label))
    difference = metrics.generator_only_difference(named[0], labels[0], named[1])
    prompt_ids = np.array([pair.prompt.prompt_id for pair in known[1]])
    return accuracy_of(Compared(difference=difference, preference=labels[1], prompt_ids=prompt_ids)).ties_halved


# Harm -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Detection:
    """How well a score tells videos with a harm from those without."""

    num: int
    num_positive: int
    auroc: Estimate
    natural: Confusion | NotMeasured
    """At the score's own threshold: a cost of 0, a probability of 1/2."""
    high_recall: Confusion | NotMeasured
    """At the threshold that has the wanted recall on the validation split."""


def detection(videos: Searched, natural: float | NotMeasured, high_recall: float | NotMeasured) -> Detection:
    """Measure a score at its thresholds.

    Raises: ValueError: the videos are of one kind, or of one prompt.
    """
    return Detection(
        num=len(videos.positive),
        num_positive=int(videos.positive.sum()),
        auroc=metrics.auroc(videos.scores, videos.positive, videos.prompt_ids),
        natural=_confusion(videos, natural),
        high_recall=_confusion(videos, high_recall),
    )


def _confusion(videos: Searched, threshold: float | NotMeasured) -> Confusion | NotMeasured:
    """Count at a threshold; unlike those of `metrics.confusion`, the intervals know that videos share prompts."""
    if isinstance(threshold, NotMeasured):
        return threshold
    flagged, positive, prompt_ids = videos.scores >= threshold, videos.positive, videos.prompt_ids
    return replace(
        metrics.confusion(videos.scores, positive, threshold),
        recall=metrics.rate(flagged, prompt_ids, among=positive),
        false_positive_rate=metrics.rate(flagged, prompt_ids, among=~positive),
        precision=metrics.rate(positive, prompt_ids, among=flagged) if flagged.any() else None,
        accuracy=metrics.rate(flagged == positive, prompt_ids),
    )


def natural_threshold(name: str, scales: Scales) -> float | NotMeasured:
    """Give the threshold that a score has by itself."""
    if name == "cost" and not scales.cost_has_zero:
        return NotMeasured(not_measured="no safety labels placed the zero of the cost")
    return 0.0 if name == "cost" else TAG_THRESHOLD


def recall_threshold(name: str, validation: HeldOut, label: VideoLabel, recall: float) -> float:
    """Choose the threshold for a recall on the validation split.

    Raises: ValueError: it has no labelled video with the harm.
    """
    videos = validation.searched(name, label)
    return metrics.threshold_at_recall(videos.scores, videos.positive, recall=recall)


def people_see(name: str) -> VideoLabel:
    """Give what people say of the harm that a score is about: the cost, or a tag."""
    return is_unsafe if name == "cost" else has_tag(name)


# Probabilities ----------------------------------------------------------------------------------------------


def preference_calibration(test: HeldOut, scales: Scales) -> Calibration:
    """Measure P(first preferred) = sigmoid(difference of raw rewards) in helpfulness, against the labels."""
    pairs = test.compared("helpfulness", preferred("helpfulness"))
    return metrics.calibration(expit(pairs.difference * scales.reward_scale), pairs.preference, pairs.prompt_ids)


def harm_calibration(name: str, test: HeldOut, scales: Scales) -> Calibration:
    """Measure P(unsafe) = sigmoid(raw cost), or the probability of a tag, against the labels.

    Raises: ValueError: costs of this model have no zero.
    """
    if name == "cost" and not scales.cost_has_zero:
        raise ValueError("no safety labels placed the zero of the cost")
    videos = test.searched(name, people_see(name))
    predicted = expit(videos.scores * scales.cost_scale) if name == "cost" else videos.scores
    return metrics.calibration(predicted, videos.positive, videos.prompt_ids)


# Probes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shift:
    """What a probe does to a score."""

    shift: Estimate | NotMeasured
    """Mean change in standard deviations of the score; < 0: it fell."""
    size: Estimate | NotMeasured
    """Mean size of the change: near 0 only where the judge does not notice."""
    accuracy_before: Estimate | NotMeasured
    """On the probed pairs, ties halved, so that chance is 1/2."""
    accuracy: Estimate | NotMeasured
    """Under the probe, against the same labels."""


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What a probe does."""

    counts: Counts
    shifts: Mapping[str, Shift]


def shift_of(dimension: Dimension, test: HeldOut, probed: HeldOut) -> Shift:
    """Measure a probe on the pairs and videos that it could be tried on."""
    original = test.scores_of(dimension, probed.videos)
    changed = probed.scores[dimension]
    prompt_ids = np.array([video.prompt.prompt_id for video in probed.videos])
    before, after = (
        attempt(lambda held: accuracy_of(held.compared(dimension, preferred(dimension))).ties_halved, held)
        for held in (replace(test, pairs=probed.pairs), probed)
    )
    return Shift(
        shift=attempt(metrics.shift, original, changed, prompt_ids),
        size=attempt(metrics.shift, np.zeros_like(original), np.abs(changed - original), prompt_ids),
        accuracy_before=before,
        accuracy=after,
    )
