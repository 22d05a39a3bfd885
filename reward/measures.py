"""What is measured of a judge on held-out data: records that give each number, or say why there is none.

All statistics are those of `reward.metrics`; accuracies and rates are shares, and intervals come from drawing prompts.
Thresholds are chosen on validation pairs, all else is measured on test pairs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import expit

from reward import losses, metrics
from reward.held_out import (
    Compared,
    Counts,
    HeldOut,
    PairLabel,
    Searched,
    VideoLabel,
    has_any_tag,
    has_tag,
    is_unsafe,
    preferred,
)
from reward.metrics import Calibration, Confusion, Estimate, PairAccuracy
from reward.records import DIMENSIONS, TAGS, Dimension, Pair, videos_of
from reward.truth import Gold
from reward.verdicts import Calibration as Scales

P = ParamSpec("P")
T = TypeVar("T")

HARMS = ("cost", *TAGS)
TAG_THRESHOLD = 0.5
"""Of a tag's probability."""


@dataclass(frozen=True, kw_only=True)
class NotMeasured:
    """Why there is no number."""

    not_measured: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Splits:
    """What the measures are taken of."""

    train: Sequence[Pair]
    """Not scored: it only tells how the generators compare."""
    validation: HeldOut
    test: HeldOut
    scales: Scales

    def of_trained(self, names: Iterable[str], measure: Callable[[Any], T]) -> dict[str, T | NotMeasured]:
        """Give a measure for each score, or why there is none."""
        untrained = NotMeasured(not_measured="the model was not trained to tell")
        return {name: attempt(measure, name) if name in self.scales.trained else untrained for name in names}


def attempt(measure: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | NotMeasured:
    """Give what a measure gives, or what it says is missing."""
    try:
        return measure(*args, **kwargs)
    except ValueError as error:
        return NotMeasured(not_measured=str(error))


# Pairs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """What the likelihood of wins, ties and losses is worth that a dimension was trained with."""

    theta: float
    """Fitted to the validation split; from it follows all else."""
    tie_threshold: float
    """Up to which difference a tie is the likeliest outcome, in the judge's units; 0: nowhere."""
    accuracy: Estimate
    """How often the likeliest outcome came, on all pairs."""
    log_likelihood: Estimate
    """Mean of log P(what came), in nats; ln(1/3) = -1.10 says nothing."""


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
    """The best accuracy that the noise of the labels leaves, where it is known."""
    gap_points: float | None
    """Accuracy, ties dropped, less the ceiling, in points; < 0: below it."""
    outcomes: Outcomes | NotMeasured | None = None
    """None where ties have no likelihood of their own."""


def rankings(splits: Splits, ceilings: Mapping[Dimension, float]) -> dict[str, Ranking | NotMeasured]:
    """Measure all dimensions."""
    return splits.of_trained(DIMENSIONS, lambda dimension: _ranking(dimension, splits, ceilings.get(dimension)))


def _ranking(dimension: Dimension, splits: Splits, ceiling: float | None) -> Ranking:
    test, label = splits.test, preferred(dimension)
    parts = (test, test.only(map(is_unanimous, test.pairs)), test.only(map(is_of_one_generator, test.pairs)))
    accuracy, unanimous, within = (attempt(_accuracy, dimension, part, splits.validation) for part in parts)
    has_gap = ceiling is not None and isinstance(accuracy, PairAccuracy)
    return Ranking(
        accuracy=accuracy,
        unanimous=unanimous,
        within_generator=within,
        generator_only=attempt(generator_only, label, splits.train, test.pairs),
        ceiling=ceiling,
        gap_points=100 * (accuracy.ties_dropped.value - ceiling) if has_gap else None,
        outcomes=attempt(_outcomes, dimension, splits) if dimension in splits.scales.thetas else None,
    )


def _outcomes(dimension: Dimension, splits: Splits) -> Outcomes:
    pairs, theta = splits.test.compared(dimension, preferred(dimension)), splits.scales.thetas[dimension]
    column = 2 * (1 - pairs.preference)  # of those that `outcome_probabilities` gives
    if (column % 1).any():
        raise ValueError("expected wins, losses and ties, got shares of votes")
    probabilities = outcome_probabilities(dimension, pairs, splits.scales)
    came = probabilities[np.arange(len(column)), column.astype(int)]
    threshold = losses.tie_threshold(theta) / splits.scales.unit(dimension)
    return Outcomes(
        theta=theta,
        tie_threshold=threshold,
        accuracy=accuracy_of(pairs, threshold).tie_aware,
        log_likelihood=metrics.mean(np.log(came), pairs.prompt_ids),
    )


def outcome_probabilities(dimension: Dimension, pairs: Compared, scales: Scales) -> Float[np.ndarray, "n 3"]:
    """Give P(first is chosen), P(tie), P(second is chosen) of a dimension that has a theta."""
    raw = torch.tensor(pairs.difference * scales.unit(dimension), dtype=torch.float64)
    both = torch.stack([raw, torch.zeros_like(raw)], dim=1)
    return losses.outcome_probabilities(both, scales.thetas[dimension]).numpy()


def _accuracy(dimension: Dimension, test: HeldOut, validation: HeldOut) -> PairAccuracy:
    label = preferred(dimension)
    chosen_on = validation.compared(dimension, label)
    threshold = metrics.best_tie_threshold(chosen_on.difference, chosen_on.preference)
    return accuracy_of(test.compared(dimension, label), threshold)


def accuracy_of(pairs: Compared, tie_threshold: float = 0.0) -> PairAccuracy:
    """Give the accuracies."""
    return metrics.pair_accuracy(pairs.difference, pairs.preference, pairs.prompt_ids, tie_threshold=tie_threshold)


def is_unanimous(pair: Pair) -> bool:
    """Tell whether all six dimensions are labelled and prefer one video; in cost, the less costly one."""
    shares = {dimension: preferred(dimension)(pair) for dimension in DIMENSIONS}
    if None in shares.values():
        return False
    better = [1 - share if dimension == "cost" else share for dimension, share in shares.items() if share is not None]
    return bool(metrics.unanimous(np.array([better]))[0])


def is_of_one_generator(pair: Pair) -> bool:
    """Tell whether one generator is known to have made both videos."""
    first, second = _generators(pair)
    return first is not None and first == second


def _generators(pair: Pair) -> tuple[str | None, ...]:
    return tuple(video.generator for video in videos_of(pair))


def generator_only(label: PairLabel, train: Sequence[Pair], test: Sequence[Pair]) -> Estimate:
    """Give the accuracy of the best rule that knows which generators made the two videos, and nothing else.

    Raises: ValueError: there is no labelled pair whose generators are known.
    """
    train, test = ([p for p in pairs if None not in _generators(p) and label(p) is not None] for pairs in (train, test))
    if not (train and test):
        raise ValueError("no labelled pair whose generators are known, in training or in test")
    made_train, made_test = (np.array([_generators(pair) for pair in pairs]) for pairs in (train, test))
    said_train, said_test = (np.array([label(pair) for pair in pairs], dtype=float) for pairs in (train, test))
    difference = metrics.generator_only_difference(made_train, said_train, made_test)
    prompt_ids = np.array([pair.prompt.prompt_id for pair in test])
    return accuracy_of(Compared(difference=difference, preference=said_test, prompt_ids=prompt_ids)).ties_halved


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


def harms(splits: Splits, recall: float) -> dict[str, Detection | NotMeasured]:
    """Measure the cost and all tags against what people say."""
    return splits.of_trained(HARMS, lambda name: _detection(name, splits, recall, people_see(name)))


def people_see(name: str) -> VideoLabel:
    """Give what people say of the harm that a score is about: the cost, or a tag."""
    return is_unsafe if name == "cost" else has_tag(name)


def _detection(name: str, splits: Splits, recall: float, label: VideoLabel) -> Detection:
    """Measure a score against any label; its thresholds know only what people say."""
    videos = splits.test.searched(name, label)
    return Detection(
        num=len(videos.positive),
        num_positive=int(videos.positive.sum()),
        auroc=metrics.auroc(videos.scores, videos.positive, videos.prompt_ids),
        natural=attempt(lambda: confusion(videos, natural_threshold(name, splits.scales))),
        high_recall=attempt(lambda: confusion(videos, _recall_threshold(name, splits.validation, recall))),
    )


def natural_threshold(name: str, scales: Scales) -> float:
    """Give the threshold that a score has by itself.

    Raises: ValueError: a cost of this model has none.
    """
    if name == "cost" and not scales.cost_has_zero:
        raise ValueError("no safety labels placed the zero of the cost")
    return 0.0 if name == "cost" else TAG_THRESHOLD


def _recall_threshold(name: str, validation: HeldOut, recall: float) -> float:
    videos = validation.searched(name, people_see(name))
    return metrics.threshold_at_recall(videos.scores, videos.positive, recall=recall)


def confusion(videos: Searched, threshold: float) -> Confusion:
    """Count at a threshold; unlike those of `metrics.confusion`, the intervals know that videos share prompts.

    Raises: ValueError: the videos are of one kind.
    """
    flagged, positive, prompt_ids = videos.scores >= threshold, videos.positive, videos.prompt_ids
    return replace(
        metrics.confusion(videos.scores, positive, threshold),
        recall=metrics.rate(flagged, prompt_ids, among=positive),
        false_positive_rate=metrics.rate(flagged, prompt_ids, among=~positive),
        precision=metrics.rate(positive, prompt_ids, among=flagged) if flagged.any() else None,
        accuracy=metrics.rate(flagged == positive, prompt_ids),
    )


def label_agreement(test: HeldOut) -> Estimate:
    """Give Cohen's kappa of "not `is_safe`" and "any tag", in [-1, 1]: a judge that learnt both agrees no better.

    Raises: ValueError: no video has both labels, or one of the two says the same of all.
    """
    both = [(is_unsafe(video), has_any_tag(video), video.prompt.prompt_id) for video in test.videos]
    known = [each for each in both if None not in each]
    if not known:
        raise ValueError("no video has both is_safe and all tags")
    unsafe, tagged, prompt_ids = (np.array(column) for column in zip(*known, strict=True))
    for name, said in (("is_safe", unsafe), ("tags", tagged)):
        if said.all() or not said.any():
            what = "harm" if said.any() else "no harm"
            raise ValueError(f"expected labels of both kinds, got {what} by {name} in each of {len(said)} videos")
    return metrics.kappa(unsafe, tagged, prompt_ids)


# Probabilities ----------------------------------------------------------------------------------------------


def calibrations(splits: Splits) -> dict[str, Calibration | NotMeasured]:
    """Measure the probabilities that the first video is the more helpful one, and that a video shows a harm."""
    preference = splits.of_trained(["helpfulness"], lambda _: _preference_calibration(splits))
    return preference | splits.of_trained(HARMS, lambda name: _harm_calibration(name, splits))


def _preference_calibration(splits: Splits) -> Calibration:
    """P(first preferred) = sigmoid(difference of raw rewards), as Bradley and Terry have it; a tie counts half."""
    pairs, scales = splits.test.compared("helpfulness", preferred("helpfulness")), splits.scales
    if "helpfulness" in scales.thetas:
        first, _, second = outcome_probabilities("helpfulness", pairs, scales).T
        predicted = (1 + first - second) / 2  # the first, and half of the ties
    else:
        predicted = expit(pairs.difference * scales.unit("helpfulness"))
    return metrics.calibration(predicted, pairs.preference, pairs.prompt_ids)


def _harm_calibration(name: str, splits: Splits) -> Calibration:
    """P(unsafe) = sigmoid(raw cost), as the signed cost loss has it; a tag is a probability already."""
    natural_threshold(name, splits.scales)  # raises where the cost has no zero
    videos = splits.test.searched(name, people_see(name))
    predicted = expit(videos.scores * splits.scales.cost_scale) if name == "cost" else videos.scores
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
    """Of test videos; those that were not probed are excluded."""
    shifts: Mapping[str, Shift]


def shift_of(dimension: Dimension, test: HeldOut, probed: HeldOut) -> Shift:
    """Compare the probed pairs and videos with what they were before."""
    original, changed = test.scores_of(dimension, probed.videos), probed.scores[dimension]
    prompt_ids = np.array([video.prompt.prompt_id for video in probed.videos])

    def accuracy(held: HeldOut) -> Estimate:
        return accuracy_of(held.compared(dimension, preferred(dimension))).ties_halved

    return Shift(
        shift=attempt(metrics.shift, original, changed, prompt_ids),
        size=attempt(metrics.shift, original, original + np.abs(changed - original), prompt_ids),
        accuracy_before=attempt(accuracy, replace(test, pairs=probed.pairs)),
        accuracy=attempt(accuracy, probed),
    )


# Gold -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GoldResult:
    """The same against exact measures, which have no noise."""

    counts: Counts
    """Of test videos; those that gold does not know are excluded."""
    margin: float
    accuracy: Mapping[str, Estimate | NotMeasured]
    """On pairs whose gold values differ at all; in cost, those of different numbers of hazards."""
    accuracy_above_margin: Mapping[str, Estimate | NotMeasured]
    """On pairs whose gold values differ by more than the margin."""
    harm: Mapping[str, Detection | NotMeasured]
    """Cost, and the tags that a hazard stands for, against what gold sees."""


def against_gold(splits: Splits, gold: Gold, hazards: Mapping[str, str], margin: float, recall: float) -> GoldResult:
    """Measure all that gold knows; `hazards` says which hazard a tag stands for."""
    known, num = sum(video.video_id in gold.values for video in splits.test.videos), len(splits.test.videos)
    labels = {"cost": gold.is_unsafe} | {tag: gold.shows(hazard) for tag, hazard in hazards.items()}

    def accuracies(least: float) -> dict[str, Estimate | NotMeasured]:
        return splits.of_trained(DIMENSIONS, lambda dimension: _gold_accuracy(dimension, splits.test, gold, least))

    return GoldResult(
        counts=Counts(attempted=known, scored=known, failed=0, excluded=num - known),
        margin=margin,
        accuracy=accuracies(0.0),
        accuracy_above_margin=accuracies(margin),
        harm=splits.of_trained(labels, lambda name: _detection(name, splits, recall, labels[name])),
    )


def _gold_accuracy(dimension: Dimension, test: HeldOut, gold: Gold, margin: float) -> Estimate:
    return accuracy_of(test.compared(dimension, gold.preferred(dimension, margin))).ties_dropped


# The whole --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a data source."""

    read: int
    excluded: Mapping[str, int]
    """Those that may not be used, by reason."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that an evaluation says; as JSON, it is RUN/evaluation.json."""

    run: str
    judge_sha256: str
    settings: Mapping[str, Any]
    data: Mapping[str, Rows]
    """By path: the run's own, and other data to test on."""
    counts: Mapping[str, Counts]
    """Of `validation_videos`, `validation_pairs`, `test_videos` and `test_pairs`."""
    failures: Mapping[str, str]
    """File -> why it could not be judged."""
    ranking: Mapping[str, Ranking | NotMeasured]
    """By dimension."""
    harm: Mapping[str, Detection | NotMeasured]
    """Of `cost`, against is_safe, and of each tag."""
    label_agreement: Estimate | NotMeasured
    """Of the two labels that say whether a test video is harmful; see `label_agreement`."""
    calibration: Mapping[str, Calibration | NotMeasured]
    """Of `helpfulness` (which video is preferred), `cost` (is it unsafe) and each tag."""
    probes: Mapping[str, ProbeResult]
    gold: GoldResult | None
