import math
from collections.abc import Iterator

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from reward import metrics

NAN, INF = math.nan, math.inf
few = settings(max_examples=20)
seeds = st.integers(0, 2**32 - 1)


def numbers(*values: float) -> np.ndarray:
    return np.array(values, dtype=float)


def flags(text: str) -> np.ndarray:
    """`+-+` as true, false, true."""
    return np.array([sign == "+" for sign in text], dtype=bool)


def ids(num: int, num_items_each: int = 1) -> np.ndarray:
    return np.repeat(np.arange(num), num_items_each)


def interval(estimate: metrics.Estimate) -> tuple[float, float]:
    return estimate.low, estimate.high


def tied_scores(seed: int, num: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Scores of few values, so that many are equal, and both classes."""
    random = np.random.default_rng(seed)
    positive = np.arange(num) < random.integers(1, num)
    return np.round(random.normal(size=num) + positive, 0), positive


# Intervals --------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_that_of_scipy():
    """Prompts of one item each: the usual bootstrap. 5 standard errors of a 2.5 % quantile of 2,000 draws."""
    values = np.random.default_rng(0).gamma(2.0, size=200)
    ours = metrics.mean(values, ids(200))
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1, vectorized=True)
    tolerance = 5 * theirs.standard_error * 0.059  # sqrt(0.025 * 0.975 / 2000) / normal density at -1.96
    assert ours.value == values.mean()
    assert interval(ours) == pytest.approx(tuple(theirs.confidence_interval), abs=tolerance)
    assert ours.n == 200


def test_copies_of_an_item_within_its_prompt_tell_nothing_new():
    values = np.random.default_rng(0).normal(size=15)
    once, four_times = metrics.mean(values, ids(15)), metrics.mean(np.repeat(values, 4), ids(15, 4))
    assert interval(four_times) == pytest.approx(interval(once))
    assert (once.n, four_times.n) == (15, 60)


def test_as_many_copies_taken_for_prompts_would_halve_the_interval():
    values = np.repeat(np.random.default_rng(0).normal(size=300), 4)
    honest, naive = metrics.mean(values, ids(300, 4)), metrics.mean(values, ids(1200))
    assert (honest.high - honest.low) / (naive.high - naive.low) == pytest.approx(2, rel=0.15)


def test_ninety_five_in_a_hundred_intervals_hold_the_truth():
    """50 prompts of unequal size that share an effect. 300 repeats: 0.95 less 5 standard errors (0.0126) is 0.887."""
    random, held = np.random.default_rng(0), 0
    for _ in range(300):
        prompts = np.repeat(np.arange(50), random.integers(1, 6, size=50))
        estimate = metrics.mean(random.normal(size=50)[prompts] + random.normal(size=len(prompts)), prompts)
        held += estimate.low <= 0 <= estimate.high
    assert 0.887 <= held / 300 <= 1


@few
@given(seed=seeds)
def test_estimates_depend_neither_on_the_order_of_items_nor_on_the_names_of_prompts(seed: int):
    random = np.random.default_rng(seed)
    values, prompts, order = random.random(40), ids(10, 4), random.permutation(40)
    names = np.array([f"prompt {chr(ord('a') + index)}" for index in prompts])
    first = metrics.mean(values, prompts)
    again, other = metrics.mean(values, prompts), metrics.mean(values[order], names[order])
    assert first == again
    assert (first.value, *interval(first)) == pytest.approx((other.value, *interval(other)))


def test_another_seed_gives_another_interval_of_the_same_value():
    values = np.random.default_rng(0).normal(size=50)

    def estimate(seed: int) -> metrics.Estimate:
        return metrics.bootstrap(lambda weights: values @ weights / weights.sum(axis=0), ids(50), seed=seed)

    assert estimate(0) == estimate(0) == metrics.mean(values, ids(50))
    assert estimate(0).low != estimate(1).low
    assert estimate(0).value == estimate(1).value


def test_resamples_are_the_same_number_of_whole_prompts_however_many_fit_into_memory(monkeypatch: pytest.MonkeyPatch):
    """7 weights at once and 3 items: 1,000 turns of 2 resamples."""
    monkeypatch.setattr(metrics, "_NUM_WEIGHTS_AT_ONCE", 7)
    seen = []

    def statistic(weights: np.ndarray) -> np.ndarray:
        seen.append(weights)
        return weights[0]

    metrics.bootstrap(statistic, np.array([5, 5, 8]))
    weights = np.concatenate(seen[1:], axis=1)
    assert weights.shape == (3, metrics.NUM_RESAMPLES)
    assert np.array_equal(weights[0], weights[1])
    assert (weights[1] + weights[2] == 2).all()


def test_a_perfect_rate_has_an_interval_of_its_prompts():
    """Nothing wrong in 100 prompts: (1 - low)^0 low^100 = 0.025, low = 0.025^0.01 = 0.96378."""
    perfect = metrics.rate(np.ones(300), ids(100, 3))
    assert (perfect.value, perfect.high, perfect.n) == (1, 1, 300)
    assert perfect.low == pytest.approx(0.025**0.01)
    hopeless = metrics.rate(np.zeros(300), ids(100, 3))
    assert interval(hopeless) == pytest.approx((0, 1 - 0.025**0.01))


def test_a_rate_counts_only_the_items_among_which_it_is_asked():
    """Of +-+- the last two count: 1 of 2, though 3 of 4 in all were right."""
    estimate = metrics.rate(numbers(1, 1, 1, 0), ids(4), among=flags("--++"))
    assert (estimate.value, estimate.n) == (0.5, 2)
    assert interval(estimate) == (0, 1)
    only = metrics.rate(flags("+-"), ids(2), among=flags("+-"))
    assert (only.value, only.low, only.n) == (1, pytest.approx(0.025), 1)


def test_a_resample_that_cannot_tell_could_have_said_anything():
    """1 positive among 40 prompts is missing from (39 / 40)^40 = 36 % of the resamples."""
    estimate = metrics.auroc(np.arange(40.0), np.arange(40) == 30, ids(40))
    assert estimate.value == pytest.approx(30 / 39)
    assert interval(estimate) == (0, 1)


def test_a_shift_by_hand():
    """Scores 0, 2, 4 have deviation sqrt(8 / 3); they fall by 1, 2 and 3, by 2 on average."""
    shift = metrics.shift(numbers(0, 2, 4), numbers(-1, 0, 1), ids(3))
    assert shift.value == pytest.approx(-2 / math.sqrt(8 / 3))
    assert interval(shift) == pytest.approx((-3 / math.sqrt(8 / 3), -1 / math.sqrt(8 / 3)))


@few
@given(scale=st.floats(0.1, 10), offset=st.floats(-10, 10))
def test_a_shift_has_no_unit(scale: float, offset: float):
    original, probed = np.random.default_rng(0).normal(size=(2, 10))
    ours = metrics.shift(scale * original + offset, scale * probed + offset, ids(10))
    assert ours.value == pytest.approx(metrics.shift(original, probed, ids(10)).value)


# Pairs ------------------------------------------------------------------------------------------------------


def test_pair_accuracy_by_hand():
    """Scores call 1 2 = = 1 2, or 1 2 = = = 2 up to a difference of 0.5; the majority chose 1 2 1 = = 1.

    strict: 1st, 2nd, 4th of 6. tie-aware: the 5th too. Choices are the 1st, 2nd, 3rd, 6th: 2 of 4; or 2.5 of 4.
    """
    accuracy = metrics.pair_accuracy(
        numbers(2, -1, 0, 0, 0.5, -3), numbers(1, 0.2, 0.6, 0.5, 0.5, 1), ids(6), tie_threshold=0.5
    )
    assert (accuracy.strict.value, accuracy.strict.n) == (0.5, 6)
    assert (accuracy.tie_aware.value, accuracy.tie_aware.n) == (pytest.approx(4 / 6), 6)
    assert (accuracy.ties_dropped.value, accuracy.ties_dropped.n) == (0.5, 4)
    assert (accuracy.ties_halved.value, accuracy.ties_halved.n) == (0.625, 4)
    assert accuracy.tie_threshold == 0.5


def random_pairs(seed: int, num: int = 40) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    preference = random.integers(0, 5, size=num) / 4
    preference[0] = 1
    return np.round(random.normal(size=num) + preference - 0.5, 1), preference


@few
@given(seed=seeds, threshold=st.floats(0, 2))
def test_swapping_the_videos_changes_no_accuracy(seed: int, threshold: float):
    difference, preference = random_pairs(seed)
    swapped = metrics.pair_accuracy(-difference, 1 - preference, ids(40), tie_threshold=threshold)
    assert metrics.pair_accuracy(difference, preference, ids(40), tie_threshold=threshold) == swapped


@few
@given(seed=seeds)
def test_the_accuracies_keep_their_order_and_swapped_scores_are_wrong(seed: int):
    difference, preference = random_pairs(seed)
    right = metrics.pair_accuracy(difference, preference, ids(40), tie_threshold=0.0)
    wrong = metrics.pair_accuracy(-difference, preference, ids(40), tie_threshold=0.0)
    assert right.tie_aware == right.strict
    assert right.ties_dropped.value <= right.ties_halved.value
    assert right.ties_halved.value + wrong.ties_halved.value == pytest.approx(1)


def test_a_judge_without_an_opinion_gains_nothing_but_chance():
    accuracy = metrics.pair_accuracy(np.zeros(4), numbers(1, 0, 0, 1), ids(4), tie_threshold=1.0)
    assert accuracy.strict.value == accuracy.tie_aware.value == accuracy.ties_dropped.value == 0
    assert accuracy.ties_halved.value == 0.5


@given(seed=seeds)
def test_the_best_tie_threshold_is_the_first_best_of_all(seed: int):
    difference, preference = random_pairs(seed)
    candidates = [0.0, *np.unique(np.abs(difference)).tolist()]
    accuracies = [
        np.mean(np.where(np.abs(difference) > each, np.sign(difference), 0) == np.sign(preference - 0.5))
        for each in candidates
    ]
    assert metrics.best_tie_threshold(difference, preference) == candidates[int(np.argmax(accuracies))]


def test_the_best_tie_threshold_by_hand():
    """Ties at 0.1 and 0.3, a right choice at 0.2, right ones from 1 on: up to 0.3, 2 ties are won and 1 choice lost."""
    difference, preference = numbers(0.1, -0.3, 0.2, 1.0, -2.0), numbers(0.5, 0.5, 1, 1, 0)
    assert metrics.best_tie_threshold(difference, preference) == 0.1  # 4 of 5, as with 0.3
    assert metrics.best_tie_threshold(np.delete(difference, 2), np.delete(preference, 2)) == 0.3
    assert metrics.best_tie_threshold(difference[2:], preference[2:]) == 0


def test_unanimous_pairs_by_hand():
    """All first; all second; one dissents; one is tied; shares of votes on one side."""
    preferences = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 1], [1, 0.5, 1], [0.6, 0.9, 1]])
    agreed = metrics.unanimous(preferences)
    assert agreed.tolist() == [True, True, False, False, True]
    assert np.array_equal(metrics.unanimous(1 - preferences), agreed)


def test_the_generator_rule_by_hand():
    """Training: a beat b, b lost to a, b beat a: a is ahead by (.5 + .5 - .5) / 3. c only met d, and tied."""
    train = np.array([["a", "b"], ["b", "a"], ["b", "a"], ["c", "d"], ["a", "a"]])
    asked = np.array([["a", "b"], ["b", "a"], ["a", "a"], ["a", "c"], ["c", "d"], ["a", "new"]])
    difference = metrics.generator_only_difference(train, numbers(1, 0, 1, 0.5, 1), asked)
    assert difference == pytest.approx([1 / 6, -1 / 6, 0, 0, 0, 0])


def test_the_generator_rule_scores_what_generators_alone_explain():
    """Of 4 pairs the better generator wins 3; two videos of one generator are a coin's throw: 3.5 of 5."""
    train, preference = np.array([["good", "bad"]] * 4), numbers(1, 1, 1, 0)
    generators = np.vstack([train, [["bad", "bad"]]])
    difference = metrics.generator_only_difference(train, preference, generators)
    accuracy = metrics.pair_accuracy(difference, np.append(preference, 1), ids(5), tie_threshold=0.0)
    assert accuracy.ties_halved.value == pytest.approx(3.5 / 5)


# Detection --------------------------------------------------------------------------------------------------


@few
@given(seed=seeds)
def test_auroc_is_scipys_u_statistic_ties_included(seed: int):
    scores, positive = tied_scores(seed)
    u = stats.mannwhitneyu(scores[positive], scores[~positive]).statistic
    expected = u / positive.sum() / (~positive).sum()
    assert metrics.auroc(scores, positive, ids(60)).value == pytest.approx(expected)


@few
@given(seed=seeds)
def test_resampled_areas_are_those_of_repeated_items(seed: int):
    """What the bootstrap does by weights, done by writing items down as often as they were drawn."""
    scores, positive = tied_scores(seed)
    for weights, value in resamples_of_auroc(scores, positive):
        times = weights.astype(int)
        expected = plain_auroc(np.repeat(scores, times), np.repeat(positive, times))
        assert value == pytest.approx(expected, nan_ok=True)


def resamples_of_auroc(scores: np.ndarray, positive: np.ndarray) -> Iterator[tuple[np.ndarray, float]]:
    with pytest.MonkeyPatch.context() as patch:
        statistics = []
        patch.setattr(metrics, "bootstrap", lambda statistic, _: statistics.append(statistic) or NOTHING)
        metrics.auroc(scores, positive, ids(len(scores)))
    weights = np.random.default_rng(0).multinomial(len(scores), np.full(len(scores), 1 / len(scores)), size=5).T
    with np.errstate(invalid="ignore"):
        yield from zip(weights.T, statistics[0](weights.astype(float)), strict=True)


NOTHING = metrics.Estimate(value=0.0, low=0.0, high=0.0, n=0)


def plain_auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    above = scores[positive][:, None] - scores[~positive]
    return float(np.mean((np.sign(above) + 1) / 2)) if above.size else NAN


def test_the_area_by_hand():
    """From the top: + - + = - (the last two equal). Positives beat 2, and 0.5, of 2 negatives: 2.5 / 4."""
    assert metrics.auroc(numbers(4, 3, 2, 2), flags("+-+-"), ids(4)).value == pytest.approx(2.5 / 4)


def test_areas_of_perfect_reversed_and_constant_scores():
    scores, positive = numbers(1, 2, 3, 4), flags("--++")
    for sign, area in ((1, 1), (-1, 0), (0, 0.5)):
        assert metrics.auroc(sign * scores, positive, ids(4)).value == pytest.approx(area)


def test_thresholds_by_hand():
    """Positives 1 to 20: 95 % of them are 19, so from 2 on; all from 1 on; half from 11 on. Negatives don't matter."""
    scores, positive = np.append(np.arange(1.0, 21.0), 99.0), np.arange(21) < 20
    assert metrics.threshold_at_recall(scores, positive, recall=0.95) == 2
    assert metrics.threshold_at_recall(scores, positive, recall=1.0) == 1
    assert metrics.threshold_at_recall(scores, positive, recall=0.5) == 11
    assert metrics.threshold_at_recall(scores, positive, recall=0.951) == 1


@given(num=st.integers(1, 150), hundredths=st.integers(1, 100), seed=seeds)
def test_a_threshold_keeps_its_recall_and_none_higher_does(num: int, hundredths: int, seed: int):
    recall, scores = hundredths / 100, np.random.default_rng(seed).integers(0, 30, size=num).astype(float)
    threshold = metrics.threshold_at_recall(scores, np.ones(num, dtype=bool), recall=recall)
    assert 100 * (scores >= threshold).sum() >= hundredths * num
    assert 100 * (scores > threshold).sum() < hundredths * num


def test_confusion_by_hand():
    """Flagged from 0 on: 3 of 4 positives, 2 of 6 negatives. The exact bounds are quantiles of beta distributions."""
    scores, positive = numbers(2, 1, 0, -1, 3, 0, -2, -3, -4, -5), flags("++++------")
    ours = metrics.confusion(scores, positive, 0.0)
    assert (ours.true_positives, ours.false_positives, ours.true_negatives, ours.false_negatives) == (3, 2, 4, 1)
    assert (ours.recall.value, ours.recall.n) == (0.75, 4)
    assert (ours.false_positive_rate.value, ours.false_positive_rate.n) == (pytest.approx(2 / 6), 6)
    assert (ours.accuracy.value, ours.accuracy.n) == (0.7, 10)
    assert ours.precision is not None
    assert (ours.precision.value, ours.precision.n) == (0.6, 5)
    exact = stats.beta.ppf([0.025, 0.975], [2, 3], [5, 4])
    assert interval(ours.false_positive_rate) == pytest.approx(tuple(exact))


def test_precision_is_not_known_where_nothing_is_flagged():
    ours = metrics.confusion(numbers(-1, -2), flags("+-"), 0.0)
    assert ours.precision is None
    assert interval(ours.recall) == pytest.approx((0, 0.975))


# Probabilities ----------------------------------------------------------------------------------------------


def test_calibration_by_hand():
    """Two bins: 0.2 twice, none came; 0.8 twice, one came: (2 * 0.2 + 2 * 0.3) / 4 = 0.25.

    Brier: (0.04 + 0.04 + 0.04 + 0.64) / 4 = 0.19. Noise: sqrt(2 / pi) * 2 sqrt(2 * 0.16) / 4 = 0.22568.
    """
    ours = metrics.calibration(numbers(0.2, 0.8, 0.2, 0.8), flags("-+--"), ids(4), num_bins=2)
    assert ours.ece == pytest.approx(0.25)
    assert ours.brier == pytest.approx(0.19)
    assert ours.noise_floor == pytest.approx(0.22568, abs=1e-5)
    assert [(each.predicted, each.observed.value, each.observed.n) for each in ours.bins] == [
        (pytest.approx(0.2), 0, 2),
        (pytest.approx(0.8), 0.5, 2),
    ]


def test_bins_hold_equally_many_items_and_equal_predictions_share_one():
    predicted = np.linspace(0, 1, 100)
    ours = metrics.calibration(predicted, predicted, ids(100))
    assert [each.observed.n for each in ours.bins] == [10] * 10
    assert ours.ece == pytest.approx(0)
    (only,) = metrics.calibration(np.full(100, 0.3), predicted, ids(100)).bins
    assert (only.predicted, only.observed.value) == (pytest.approx(0.3), pytest.approx(0.5))


@pytest.mark.parametrize("num_low", [1, 2, 3])
def test_few_different_predictions_keep_to_themselves(num_low: int):
    """Of 4 items, 1 to 3 predicted at 0.1 and the rest at 0.9: never one bin, whichever side has more."""
    predicted = np.where(np.arange(4) < num_low, 0.1, 0.9)
    ours = metrics.calibration(predicted, predicted, ids(4), num_bins=2)
    assert [each.predicted for each in ours.bins] == pytest.approx([0.1, 0.9])


def test_the_noise_floor_is_the_error_of_true_probabilities(monkeypatch: pytest.MonkeyPatch):
    """Errors of 200 repeats of 500 items: their mean is known to about 2 %."""
    monkeypatch.setattr(metrics, "NUM_RESAMPLES", 1)  # intervals play no part
    random = np.random.default_rng(0)
    probability = random.random(500)
    runs = [metrics.calibration(probability, random.random(500) < probability, ids(500)) for _ in range(200)]
    assert np.mean([run.ece for run in runs]) == pytest.approx(runs[0].noise_floor, rel=0.08)


def test_calibration_sees_overconfidence():
    random = np.random.default_rng(0)
    probability = 0.3 + 0.4 * random.random(1000)
    came, boast = random.random(1000) < probability, np.clip(4 * (probability - 0.5) + 0.5, 0, 1)
    honest, overconfident = (metrics.calibration(each, came, ids(1000)) for each in (probability, boast))
    assert honest.ece < 2 * honest.noise_floor
    assert overconfident.ece > 0.2
    assert honest.brier < overconfident.brier


def test_kappa_by_hand():
    """20 times both yes, 5 and 10 in dispute, 15 both no: agreement 0.7, by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5."""
    first, second = flags("+" * 25 + "-" * 25), flags("+" * 20 + "-" * 5 + "+" * 10 + "-" * 15)
    ours = metrics.kappa(first, second, ids(50))
    assert ours.value == pytest.approx((0.7 - 0.5) / (1 - 0.5))
    assert ours.low < 0.4 < ours.high
    assert metrics.kappa(first, ~first, ids(50)).value == pytest.approx(-1)
    assert metrics.kappa(first, first, ids(50)).value == pytest.approx(1)


def test_kappa_without_the_rare_category_could_be_anything():
    """The one item of its kind is missing from 36 % of the resamples."""
    first = np.arange(40) == 7
    assert interval(metrics.kappa(first, first, ids(40))) == (-1, 1)


def test_kappa_takes_any_number_of_named_categories():
    """a b c against a b b: agreement 2 / 3, by chance 1/9 + 2/9 + 0 = 1/3."""
    ours = metrics.kappa(np.array(["a", "b", "c"]), np.array(["a", "b", "b"]), ids(3))
    assert ours.value == pytest.approx((2 / 3 - 1 / 3) / (1 - 1 / 3))


# What is refused --------------------------------------------------------------------------------------------

TWO = ids(2)
NONE = numbers()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("values", lambda bad: metrics.mean(bad, TWO)),
        ("values", lambda bad: metrics.rate(bad, TWO)),
        ("original", lambda bad: metrics.shift(bad, numbers(0, 1), TWO)),
        ("probed", lambda bad: metrics.shift(numbers(0, 1), bad, TWO)),
        ("difference", lambda bad: metrics.pair_accuracy(bad, numbers(0, 1), TWO, tie_threshold=0.0)),
        ("preference", lambda bad: metrics.pair_accuracy(numbers(0, 1), bad, TWO, tie_threshold=0.0)),
        ("difference", lambda bad: metrics.best_tie_threshold(bad, numbers(0, 1))),
        ("preferences", lambda bad: metrics.unanimous(bad[:, None])),
        ("train_preference", lambda bad: metrics.generator_only_difference(np.eye(2), bad, np.eye(2))),
        ("scores", lambda bad: metrics.auroc(bad, flags("+-"), TWO)),
        ("scores", lambda bad: metrics.threshold_at_recall(bad, flags("+-"), recall=0.9)),
        ("scores", lambda bad: metrics.confusion(bad, flags("+-"), 0.0)),
        ("threshold", lambda bad: metrics.confusion(numbers(0, 1), flags("+-"), float(bad[1]))),
        ("predicted", lambda bad: metrics.calibration(bad, numbers(0, 1), TWO)),
        ("observed", lambda bad: metrics.calibration(numbers(0, 1), bad, TWO)),
        ("first", lambda bad: metrics.kappa(bad, numbers(0, 1), TWO)),
        ("prompt_ids", lambda bad: metrics.mean(numbers(0, 1), bad)),
    ],
)
def test_numbers_that_are_none_are_named(name: str, call, value: float):
    with pytest.raises(ValueError, match=rf"finite {name}, got -?(nan|inf)"):
        call(numbers(0.5, value))


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.mean(NONE, NONE),
        lambda: metrics.rate(NONE, NONE),
        lambda: metrics.pair_accuracy(NONE, NONE, NONE, tie_threshold=0.0),
        lambda: metrics.best_tie_threshold(NONE, NONE),
        lambda: metrics.unanimous(np.zeros((0, 3))),
        lambda: metrics.generator_only_difference(np.zeros((0, 2)), NONE, np.eye(2)),
        lambda: metrics.generator_only_difference(np.eye(2), numbers(1, 0), np.zeros((0, 2))),
        lambda: metrics.auroc(NONE, flags(""), NONE),
        lambda: metrics.threshold_at_recall(NONE, flags(""), recall=0.9),
        lambda: metrics.confusion(NONE, flags(""), 0.0),
        lambda: metrics.calibration(NONE, NONE, NONE),
        lambda: metrics.kappa(NONE, NONE, NONE),
    ],
)
def test_an_empty_split_is_no_perfect_one(call):
    with pytest.raises(ValueError, match="at least one"):
        call()


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("two prompts", lambda: metrics.mean(numbers(0, 1), np.zeros(2))),
        ("none of 2", lambda: metrics.rate(numbers(0, 1), TWO, among=flags("--"))),
        ("values in", lambda: metrics.rate(numbers(0, 2), TWO)),
        ("scores that differ", lambda: metrics.shift(numbers(0.1, 0.1), numbers(0, 1), TWO)),
        ("ties", lambda: metrics.pair_accuracy(numbers(0, 1), numbers(0.5, 0.5), TWO, tie_threshold=0.0)),
        ("preference in", lambda: metrics.pair_accuracy(numbers(0, 1), numbers(-1, 1), TWO, tie_threshold=0.0)),
        ("tie_threshold", lambda: metrics.pair_accuracy(numbers(0, 1), numbers(0, 1), TWO, tie_threshold=-1.0)),
        ("tie_threshold", lambda: metrics.pair_accuracy(numbers(0, 1), numbers(0, 1), TWO, tie_threshold=NAN)),
        ("2 positives of 2", lambda: metrics.auroc(numbers(0, 1), flags("++"), TWO)),
        ("0 positives of 2", lambda: metrics.confusion(numbers(0, 1), flags("--"), 0.0)),
        ("none among 2", lambda: metrics.threshold_at_recall(numbers(0, 1), flags("--"), recall=0.9)),
        ("recall in", lambda: metrics.threshold_at_recall(numbers(0, 1), flags("+-"), recall=0.0)),
        ("recall in", lambda: metrics.threshold_at_recall(numbers(0, 1), flags("+-"), recall=95.0)),
        ("two categories", lambda: metrics.kappa(flags("--"), flags("--"), TWO)),
    ],
)
def test_input_that_decides_nothing_is_refused(message: str, call):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture
def _unchecked_shapes() -> Iterator[None]:
    """As in production, where nothing checks the shapes of the signatures."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("_unchecked_shapes")
@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.mean(numbers(1), TWO),
        lambda: metrics.rate(numbers(0, 1), TWO, among=flags("+")),
        lambda: metrics.pair_accuracy(numbers(1), numbers(0, 1), TWO, tie_threshold=0.0),
        lambda: metrics.auroc(numbers(0, 1), flags("+-"), ids(1)),
        lambda: metrics.calibration(numbers(0.5), flags("+-"), TWO),
        lambda: metrics.generator_only_difference(np.eye(2), numbers(1), np.eye(2)),
    ],
)
def test_arrays_of_unequal_lengths_are_not_stretched(call):
    with pytest.raises(ValueError, match="same number of items"):
        call()
