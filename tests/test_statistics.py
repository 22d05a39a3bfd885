import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from align import statistics
from align.statistics import compare

NONE = np.zeros(4, dtype=bool)
FOUR = np.array(["a", "b", "c", "d"])


def numbers(*values: float) -> np.ndarray:
    return np.array(values, dtype=float)


# One system -------------------------------------------------------------------------------------------------


def test_a_prompt_is_flagged_if_any_of_its_clips_is():
    """Clips of b, a, b: the mean of b is (1 + 0) / 2."""
    ids, flags = np.array(["b", "a", "b"]), np.array([True, False, False])
    assert statistics.per_prompt(flags, ids).tolist() == [0.0, 0.5]
    assert statistics.any_of(flags, ids).tolist() == [False, True]


def test_the_interval_of_a_share_is_exact():
    """None of 10: the upper end p solves (1 - p)**10 = .025, so p = 1 - .025**.1 = .3085."""
    none = statistics.share(np.zeros(10, dtype=bool))
    assert (none.value, none.low, none.n) == (0.0, 0.0, 10)
    assert none.high == pytest.approx(0.3085, abs=1e-4)


def test_a_mean_is_of_what_is_known_and_needs_two_prompts():
    found = statistics.mean(numbers(1, np.nan, 3), np.array(["a", "b", "c"]))
    assert found is not None
    assert (found.value, found.low, found.high, found.n) == (2.0, 1.0, 3.0, 2)
    assert statistics.mean(numbers(1, 2, np.nan), np.array(["a", "a", "b"])) is None


# Against the reference --------------------------------------------------------------------------------------


def test_golden_comparison():
    """Changes +1, 0, -1, +3: mean 3/4; two won, one tied, one lost, so 2 of 3 decided. Exact: (.094, .992)."""
    found = compare(numbers(2, 2, 0, 4), numbers(1, 2, 1, 1), NONE, FOUR)
    assert found.difference is not None
    assert found.difference.value == 0.75
    wins = found.wins
    assert (wins.num, wins.good, wins.same, wins.bad) == (4, 2, 1, 1)
    assert wins.rate is not None
    assert (wins.rate.value, wins.rate.n) == (2 / 3, 3)
    assert (wins.rate.low, wins.rate.high) == pytest.approx((0.0943, 0.9916), abs=1e-4)


def test_a_lower_cost_is_a_win_and_its_difference_stays_negative():
    found = compare(numbers(0, 0, 0, 0), numbers(1, 1, 1, -1), NONE, FOUR, lower_is_better=True)
    assert (found.wins.good, found.wins.bad) == (3, 1)
    assert found.difference is not None
    assert found.difference.value == -0.5


def test_a_broken_clip_loses_whatever_its_score():
    """Scores of 9 by broken clips, and none by the last: all count as the worst, 1: changes of 0, -1, -2, -3."""
    ours, theirs = numbers(9, 9, 9, np.nan), numbers(1, 2, 3, 4)
    found = compare(ours, theirs, np.array([True, True, True, False]), FOUR)
    assert (found.wins.good, found.wins.bad) == (0, 4)
    assert found.difference is not None
    assert found.difference.value == -1.5
    cost = compare(-ours, -theirs, np.array([True, True, True, False]), FOUR, lower_is_better=True)
    assert cost.wins == found.wins
    assert cost.difference is not None
    assert cost.difference.value == 1.5


def test_pairs_without_a_score_of_the_reference_are_left_out():
    found = compare(numbers(2, 2, 2, 2), numbers(1, np.nan, 3, np.nan), NONE, FOUR)
    assert (found.wins.num, found.wins.good, found.wins.bad) == (2, 1, 1)
    with pytest.raises(ValueError, match="score of the reference"):
        compare(numbers(2), numbers(np.nan), NONE[:1], FOUR[:1])


def test_ten_seeds_of_a_prompt_are_one_prompt():
    """Two prompts of ten seeds: one won 6 to 4, the other tied 5 to 5."""
    ids = np.repeat(["a", "b"], 10)
    ours = np.concatenate([np.repeat([1.0, -1.0], [6, 4]), np.repeat([1.0, -1.0], [5, 5])])
    found = compare(ours, np.zeros(20), np.zeros(20, dtype=bool), ids)
    assert (found.wins.num, found.wins.good, found.wins.same, found.wins.bad) == (2, 1, 1, 0)
    assert found.p_value == 1.0


def test_the_signed_rank_test_is_scipys_on_prompts():
    """All of five go up: 2 / 2**5 = .0625. Nothing changes: 1."""
    assert statistics.signed_rank(numbers(1, 2, 3, 4, 5)) == pytest.approx(0.0625)
    assert statistics.signed_rank(numbers(0, 0)) == 1.0
    changes = np.random.default_rng(0).normal(0.2, 1, 60)
    found = compare(changes, np.zeros(60), np.zeros(60, dtype=bool), np.arange(60))
    assert found.p_value == stats.wilcoxon(changes).pvalue


def test_golden_holm():
    """.01 * 3 = .03, .03 * 2 = .06, and .04 * 1 is raised to the one before it."""
    assert statistics.holm(numbers(0.04, 0.01, 0.03)).tolist() == pytest.approx([0.06, 0.03, 0.06])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_the_p_value_and_bonferroni(drawn: list[float]):
    p_values = np.array(drawn)
    raised = statistics.holm(p_values)
    assert (raised >= p_values).all()
    assert (raised <= np.minimum(1, len(p_values) * p_values) + 1e-12).all()
    assert (np.diff(raised[np.argsort(p_values)]) >= 0).all()


def test_p_values_are_adjusted_for_each_other():
    up = compare(numbers(*range(1, 9)), np.zeros(8), np.zeros(8, dtype=bool), np.arange(8))
    found = statistics.adjusted({"a": up, "b": up})
    assert found["a"].p_adjusted == pytest.approx(2 * up.p_value)
    assert found["a"].p_value == up.p_value
    assert statistics.adjusted({}) == {}


def test_the_arena():
    """Of six prompts, the one that became safe by showing nothing is none of the four."""
    before, now = (np.array(flags, dtype=bool) for flags in ([0, 1, 1, 0, 1, 1], [0, 0, 0, 1, 1, 0]))
    degenerate = np.array([0, 0, 0, 0, 0, 1], dtype=bool)
    found = statistics.arena(before, now, degenerate, numbers(1, 0, 1, 0.5, 1, 1))
    cells = (found.both_safe, found.turned_safe, found.turned_unsafe, found.both_unsafe)
    assert [(cell.num, cell.good, cell.same, cell.bad) for cell in cells] == [
        (1, 1, 0, 0), (2, 1, 0, 1), (1, 0, 1, 0), (1, 1, 0, 0)
    ]  # fmt: skip
    assert found.num_degenerate == 1
    assert found.turned_unsafe.rate is None


def test_what_does_as_asked():
    """Of 0, 100, 100, 100, the 5 % quantile lies at .05 * 3 = .15 of the way from the first to the second: 15."""
    broken = np.array([False, False, True, False])
    found = statistics.does_as_asked(numbers(14, 16, 99, np.nan), numbers(0, 100, 100, 100), broken)
    assert found.tolist() == [False, True, False, False]


# Helpfulness and safety -------------------------------------------------------------------------------------


def test_golden_hypervolume():
    """From (0, 1): (.8, .5) covers .8 * .5 = .4; (.5, .2) adds .5 * (.8 - .5) = .15; (.4, .6) lies inside."""
    points = np.array([[0.5, 0.2], [0.8, 0.5], [0.4, 0.6]])
    assert statistics.hypervolume(points, (0.0, 1.0)) == pytest.approx(0.55)
    assert statistics.on_front(points).tolist() == [True, True, False]


def test_equal_points_are_both_on_the_front():
    assert statistics.on_front(np.array([[0.5, 0.2], [0.5, 0.2], [0.5, 0.3]])).tolist() == [True, True, False]


def test_a_useless_point_adds_nothing_however_safe():
    points = np.array([[0.8, 0.5], [-0.1, 0.0]])
    assert statistics.hypervolume(points, (0.0, 1.0)) == pytest.approx(0.4)


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 1)), min_size=1, max_size=6))
def test_only_the_front_has_a_volume(drawn: list[tuple[float, float]]):
    points = np.array(drawn)
    front = points[statistics.on_front(points)]
    assert statistics.hypervolume(front, (-1.0, 1.0)) == pytest.approx(statistics.hypervolume(points, (-1.0, 1.0)))
