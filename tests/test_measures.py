import math
from dataclasses import replace

import pytest
from scipy.special import expit

from reward import measures
from reward.held_out import HeldOut
from reward.measures import Detection, GoldResult, NotMeasured, Outcomes, Ranking
from reward.metrics import Calibration, Confusion, Estimate, PairAccuracy
from reward.records import DIMENSIONS, TAGS, Tags
from reward.truth import Gold
from tests.tiny_held_out import Case, held_out, pair, splits

PARTS = ("instruction_following", "correctness", "informativeness", "aesthetics")
ALL_FIRST = dict.fromkeys(DIMENSIONS, 1.0) | {"cost": 0.0}
"""Every dimension finds the first video better, so cost finds the second one worse."""


def better(first: float, second: float, share: float = 1.0, **more) -> Case:
    """People prefer the first video, the scores are as given."""
    return Case(preferred={"helpfulness": share}, scores={"helpfulness": (first, second)}, **more)


def ranking(test: list[Case], validation: list[Case], train: list[Case] | None = None, **ceilings: float) -> Ranking:
    found = measures.rankings(splits(test, validation, train or []), ceilings)["helpfulness"]  # ty: ignore[invalid-argument-type]
    assert isinstance(found, Ranking)
    return found


def value(estimate: object) -> float:
    assert isinstance(estimate, Estimate), estimate
    return estimate.value


def dropped(accuracy: object) -> tuple[float, int]:
    assert isinstance(accuracy, PairAccuracy), accuracy
    return accuracy.ties_dropped.value, accuracy.ties_dropped.n


# Pairs ------------------------------------------------------------------------------------------------------


def test_accuracy_its_ceiling_and_the_gap():
    """Three of four as people say: 75 %, 5 points below a ceiling of 80 %."""
    test = [better(2, 1), better(1, 0), better(0, 3), better(0, 1, share=0.0)]
    found = ranking(test, test, helpfulness=0.8)
    assert dropped(found.accuracy) == (0.75, 4)
    assert found.ceiling == 0.8
    assert found.gap_points == pytest.approx(-5)
    assert ranking(test, test).gap_points is None


def test_the_tie_threshold_is_that_of_validation():
    """On validation, differences up to 1 are best called ties; the test pairs would have preferred 0."""
    validation = [better(1, 0, share=0.5), better(0, 1, share=0.5), better(5, 0)]
    found = ranking([better(1, 0), better(3, 0)], validation).accuracy
    assert isinstance(found, PairAccuracy)
    assert found.tie_threshold == 1
    assert (found.tie_aware.value, found.strict.value) == (0.5, 1.0)


def test_a_dimension_without_labels_or_training_has_no_number_but_a_reason():
    found = measures.rankings(splits([better(1, 0)] * 2, [better(1, 0)], trained=("helpfulness", "cost")), {})
    untrained, unlabelled = found["aesthetics"], found["cost"]
    assert untrained == NotMeasured(not_measured="the model was not trained to tell")
    assert isinstance(unlabelled, Ranking)
    assert unlabelled.accuracy == NotMeasured(not_measured="no such pair has a label")


def test_unanimous_pairs_prefer_the_less_costly_video_too():
    assert measures.is_unanimous(pair(0, Case(preferred=ALL_FIRST)))
    assert measures.is_unanimous(pair(0, Case(preferred={name: 1 - share for name, share in ALL_FIRST.items()})))
    for change in ({"cost": 1.0}, {"correctness": 0.0}, {"aesthetics": 0.5}):
        assert not measures.is_unanimous(pair(0, Case(preferred=ALL_FIRST | change)))
    assert not measures.is_unanimous(pair(0, Case(preferred=dict.fromkeys(PARTS, 1.0))))


def test_the_unanimous_and_those_of_one_generator_are_measured_apart():
    right = better(1, 0)
    unanimous = replace(right, preferred=ALL_FIRST, scores={"helpfulness": (0, 1)})
    same = replace(right, generators=("one", "one"), scores={"helpfulness": (0, 1)})
    test = [right, right, unanimous, unanimous, same, same, replace(right, generators=("one", "two"))]
    found = ranking(test, [right])
    assert dropped(found.accuracy) == (pytest.approx(3 / 7), 7)
    assert dropped(found.unanimous) == (0, 2)
    assert dropped(found.within_generator) == (0, 2)


def test_the_rule_that_knows_only_generators():
    """In training `good` always wins. In test it wins 2 of 3, and a pair of one generator counts half: 2.5 of 4."""
    good, bad, same = ("good", "bad"), ("bad", "good"), ("bad", "bad")
    train = [better(0, 0, generators=good), better(0, 0, share=0.0, generators=bad), better(0, 0)]
    test = [better(0, 0, generators=names) for names in (good, good, bad, same)]
    found = ranking([*test, better(0, 0)], test, train).generator_only
    assert (value(found), found.n if isinstance(found, Estimate) else None) == (0.625, 4)
    nothing = ranking(test, test).generator_only
    assert nothing == NotMeasured(not_measured="no labelled pair whose generators are known, in training or in test")


# Ties with a likelihood of their own ------------------------------------------------------------------------

LOG2, LOG20 = math.log(2), math.log(20)


def test_outcomes_are_foretold_by_theta():
    """theta = 5 calls a tie up to a raw difference of log 4.6, here log 4.6 / 2, as rewards were divided by 2.

    At d = log 2 a tie has 48/77 and the first 2/7, so a tie is called: right once, wrong once. At log 20 the first has
    sigmoid(log 4) = 4/5, and so has the second the other way round: right twice.
    """
    test = [better(LOG2 / 2, 0, share=0.5), better(LOG2 / 2, 0), better(LOG20 / 2, 0), better(0, LOG20 / 2, share=0)]
    found = measures.rankings(splits(test, test, reward_scale=2.0, thetas={"helpfulness": 5.0}), {})["helpfulness"]
    assert isinstance(found, Ranking)
    assert isinstance(found.outcomes, Outcomes)
    assert (found.outcomes.theta, found.outcomes.tie_threshold) == (5.0, pytest.approx(math.log(4.6) / 2))
    assert value(found.outcomes.accuracy) == 0.75
    nats = (math.log(48 / 77) + math.log(2 / 7) + 2 * math.log(4 / 5)) / 4
    assert value(found.outcomes.log_likelihood) == pytest.approx(nats)


def test_parts_are_in_units_of_their_own():
    case = Case(preferred={"aesthetics": 1.0}, scores={"aesthetics": (LOG2, 0)})
    found = measures.rankings(splits([case] * 2, [case], reward_scale=2.0, thetas={"aesthetics": 5.0}), {})[
        "aesthetics"
    ]
    assert isinstance(found, Ranking)
    assert isinstance(found.outcomes, Outcomes)
    assert found.outcomes.tie_threshold == pytest.approx(math.log(4.6))
    assert value(found.outcomes.log_likelihood) == pytest.approx(math.log(2 / 7))


def test_no_theta_no_outcomes_and_no_outcomes_of_shares():
    test = [better(1, 0), better(1, 0, share=0.75)]
    assert ranking(test, test).outcomes is None
    found = measures.rankings(splits(test, test, thetas={"helpfulness": 5.0}), {})["helpfulness"]
    assert isinstance(found, Ranking)
    assert found.outcomes == NotMeasured(not_measured="expected wins, losses and ties, got shares of votes")


def test_a_probability_of_preference_counts_ties_half():
    """theta = 5, d = log 2: 2/7 + 48/77 / 2 = 46/77."""
    test = splits([better(LOG2 / 2, 0)] * 2, reward_scale=2.0, thetas={"helpfulness": 5.0})
    found = measures.calibrations(test)["helpfulness"]
    assert isinstance(found, Calibration)
    assert found.bins[0].predicted == pytest.approx(46 / 77)


# Harm -------------------------------------------------------------------------------------------------------


def cost(first: float, second: float, unsafe: tuple[bool, bool] = (True, False)) -> Case:
    return Case(unsafe=unsafe, scores={"cost": (first, second)})


def detection(found: object) -> Detection:
    assert isinstance(found, Detection), found
    return found


def test_the_sign_of_the_cost_and_the_threshold_of_the_validation_split():
    """Sign: of the unsafe 3, -1 and of the safe -2, 1, two are right. On validation the lowest unsafe cost is -1.5:
    from there on, all unsafe test videos are flagged, and one safe of two. AUROC: 3 of 4 pairs are in order."""
    test, validation = [cost(3, -2), cost(-1, 1)], [cost(4, -9), cost(-1.5, -8)]
    found = detection(measures.harms(splits(test, validation), recall=0.95)["cost"])
    assert (found.num, found.num_positive, found.auroc.value) == (4, 2, 0.75)
    sign, high = found.natural, found.high_recall
    assert isinstance(sign, Confusion)
    assert (sign.threshold, sign.accuracy.value, sign.recall.value, sign.false_positive_rate.value) == (
        0,
        0.5,
        0.5,
        0.5,
    )
    assert isinstance(high, Confusion)
    assert (high.threshold, high.recall.value, high.false_positive_rate.value) == (-1.5, 1.0, 0.5)
    assert (high.true_positives, high.false_positives, high.true_negatives, high.false_negatives) == (2, 1, 1, 0)


def test_intervals_of_rates_know_that_videos_share_prompts():
    """Two prompts, each with one unsafe video flagged: as wide as two independent trials, not four videos."""
    found = detection(measures.harms(splits([cost(1, -1)] * 2, [cost(1, -1)]), recall=0.95)["cost"])
    assert isinstance(found.natural, Confusion)
    assert found.natural.accuracy.low == pytest.approx(0.025**0.5)


def test_a_cost_without_zero_has_no_sign():
    test = splits([cost(1, -1), cost(2, -2)], [cost(1, -1)], cost_has_zero=False)
    found = detection(measures.harms(test, recall=0.95)["cost"])
    assert found.natural == NotMeasured(not_measured="no safety labels placed the zero of the cost")
    assert isinstance(found.high_recall, Confusion)
    assert isinstance(measures.calibrations(test)["cost"], NotMeasured)


def test_tags_are_flagged_from_one_half_and_those_of_one_kind_are_not_measured():
    case = Case(crime=(True, False), scores={"crime": (0.9, 0.5), "porn": (0.1, 0.2)})
    found = measures.harms(splits([case, case], [case]), recall=0.95)
    crime, porn = detection(found["crime"]), found["porn"]
    assert isinstance(crime.natural, Confusion)
    assert (crime.auroc.value, crime.natural.recall.value, crime.natural.false_positive_rate.value) == (1, 1, 1)
    assert porn == NotMeasured(not_measured="no such video has a label")
    one_kind = measures.harms(splits([replace(case, crime=(True, True))] * 2, [case]), recall=0.95)["crime"]
    assert isinstance(one_kind, NotMeasured)
    assert "4 positives of 4" in one_kind.not_measured


def labelled(unsafe: str, tagged: str) -> HeldOut:
    """Test videos, two of each prompt: + harmful, - harmless, ? not known, by `is_safe` and by the tag crime."""
    sign = {"+": True, "-": False, "?": None}
    held = held_out([Case()] * (len(unsafe) // 2))
    videos = tuple(
        replace(
            video,
            is_safe=None if sign[first] is None else not sign[first],
            tags=Tags(**dict.fromkeys(TAGS, False) | {"crime": sign[second]}),
        )
        for video, first, second in zip(held.videos, unsafe, tagged, strict=True)
    )
    return replace(held, videos=videos)


def test_the_agreement_of_labels_by_hand():
    """4 videos of 8 have both harms, 1 each has one, 2 none: agreement 6/8, by chance (5/8)^2 + (3/8)^2 = 34/64.

    Two more that lack a label do not count.
    """
    found = measures.label_agreement(labelled("+++++---?+", "++++-+--+?"))
    assert (found.value, found.n) == (pytest.approx((6 / 8 - 34 / 64) / (1 - 34 / 64)), 8)
    assert found.low < found.value < found.high
    assert measures.label_agreement(labelled("+-+-", "-+-+")).value == -1


@pytest.mark.parametrize(
    ("unsafe", "tagged", "reason"),
    [
        ("++++", "+-+-", "got harm by is_safe in each of 4 videos"),
        ("+-+-", "----", "got no harm by tags in each of 4 videos"),
        ("+-??", "??+-", "no video has both is_safe and all tags"),
        ("+-??", "+-+-", "two prompts"),
    ],
)
def test_labels_that_cannot_agree_or_differ_have_a_reason(unsafe: str, tagged: str, reason: str):
    with pytest.raises(ValueError, match=reason):
        measures.label_agreement(labelled(unsafe, tagged))


# Probabilities ----------------------------------------------------------------------------------------------


def test_probabilities_are_those_of_the_raw_scores():
    """Scales 3 and 2 undone: rewards differ by 3 x .5, costs are 2 x 1 and 2 x -1; the Brier scores follow."""
    case = better(0.5, 0.0, unsafe=(True, False), crime=(False, True))
    case = replace(case, scores=case.scores | {"cost": (1.0, -1.0), "crime": (0.2, 0.7)})
    found = measures.calibrations(splits([case, case], reward_scale=3.0, cost_scale=2.0))
    expected = {"helpfulness": (1 - expit(1.5)) ** 2, "cost": (1 - expit(2.0)) ** 2, "crime": (0.2**2 + 0.3**2) / 2}
    for name, brier in expected.items():
        result = found[name]
        assert isinstance(result, Calibration), name
        assert result.brier == pytest.approx(brier)
    assert isinstance(found["porn"], NotMeasured)


# Probes and gold --------------------------------------------------------------------------------------------


def test_a_shift_is_in_standard_deviations_and_accuracy_is_told_before_and_after():
    """Scores 1, -1, 1, -1 have deviation 1. They change by -2, 0, -1, 1: mean -.5, mean size 1. Right before: both;
    after: -1 to -1 counts half, 0 to 0 too."""
    test, probed = held_out([better(1, -1), better(1, -1)]), held_out([better(-1, -1), better(0, 0)])
    found = measures.shift_of("helpfulness", test, probed)
    assert (value(found.shift), value(found.size)) == (-0.5, 1.0)
    assert (value(found.accuracy_before), value(found.accuracy)) == (1.0, 0.5)


def test_a_probe_that_failed_on_a_pair_is_compared_on_the_others():
    test = held_out([better(1, -1), better(1, -1), better(-9, 9)])
    probed = held_out([better(0, -2), better(0, -2)])
    found = measures.shift_of("helpfulness", test, probed)
    assert (value(found.shift), value(found.accuracy_before)) == (-1.0, 1.0)


def test_against_gold():
    """Helpfulness: gold differs by .1, .02 and 0, so two pairs count, and one above .05; the judge has the first only.
    Cost: hazards differ in the first pair alone. Video p2-b has no gold."""
    gold = Gold(
        values={
            "p0-a": {"helpfulness": 0.5, "cost": 2.0},
            "p0-b": {"helpfulness": 0.4, "cost": 0.0},
            "p1-a": {"helpfulness": 0.5, "cost": 1.0},
            "p1-b": {"helpfulness": 0.48, "cost": 1.0},
            "p2-a": {"helpfulness": 0.5, "cost": 0.0},
        },
        hazards={
            "p0-a": {"flash": True, "dagger": True},
            "p0-b": {"flash": False, "dagger": False},
            "p1-a": {"flash": True, "dagger": False},
            "p1-b": {"flash": False, "dagger": True},
            "p2-a": {"flash": False, "dagger": False},
        },
    )
    cases = [better(1, 0), better(0, 1), better(1, 0)]
    test = [replace(c, scores=c.scores | {"cost": (1, -1), "crime": (0.9, 0.1)}, crime=(False, True)) for c in cases]
    found = measures.against_gold(splits(test, test[:1]), gold, {"crime": "flash"}, margin=0.05, recall=0.95)
    assert isinstance(found, GoldResult)
    assert (found.counts.scored, found.counts.excluded) == (5, 1)
    assert (value(found.accuracy["helpfulness"]), found.margin) == (0.5, 0.05)
    assert isinstance(found.accuracy_above_margin["helpfulness"], NotMeasured)  # one prompt has no interval
    assert isinstance(found.accuracy["correctness"], NotMeasured)
    unsafe, crime = detection(found.harm["cost"]), detection(found.harm["crime"])
    assert isinstance(unsafe.natural, Confusion)
    assert (unsafe.num, unsafe.num_positive, unsafe.natural.accuracy.value) == (5, 3, pytest.approx(3 / 5))
    assert crime.auroc.value == pytest.approx(5 / 6)
    assert isinstance(crime.high_recall, Confusion)
    assert crime.high_recall.threshold == 0.1, "chosen on what people say, who see a crime in the second video"
