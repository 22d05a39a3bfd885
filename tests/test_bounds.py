import itertools
import math
from functools import partial

import bound_coverage
import numpy as np
import pytest
from bound_coverage import Setting
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from align import bounds

deltas = st.floats(0.001, 0.4)
shares = st.floats(0.0, 1.0)
samples = st.lists(shares, min_size=2, max_size=40).map(lambda values: np.array(values, dtype=np.float64))


@st.composite
def counts(draw: st.DrawFn, largest: int = 400) -> tuple[int, int]:
    num = draw(st.integers(1, largest))
    return draw(st.integers(0, num)), num


# Rates ------------------------------------------------------------------------------------------------------


def test_none_of_300_proves_one_percent():
    """(1 - p)^300 = 0.05 at p = 1 - 0.05^(1/300) = 0.009936, near the rule of three, 3 / 300."""
    assert bounds.rate_upper(0, 300, 0.05) == pytest.approx(0.009936, abs=5e-7)
    assert bounds.rate_upper(0, 300, 0.05) == pytest.approx(1 - 0.05 ** (1 / 300), rel=1e-12)


@pytest.mark.parametrize(
    ("num_unsafe", "num", "percent"),
    [(0, 100, 2.95), (1, 100, 4.66), (3, 100, 7.57), (3, 300, 2.56), (10, 300, 5.59), (3, 600, 1.29), (10, 1000, 1.69)],
)
def test_upper_bounds_of_a_published_table(num_unsafe: int, num: int, percent: float):
    assert 100 * bounds.rate_upper(num_unsafe, num, 0.05) == pytest.approx(percent, abs=0.0051)


@given(counts=counts(), delta=deltas)
def test_rates_are_bounded_as_scipy_does(counts: tuple[int, int], delta: float):
    test = {side: stats.binomtest(*counts, alternative=side) for side in ("less", "greater")}
    theirs = {side: test[side].proportion_ci(1 - delta, method="exact") for side in test}
    assert bounds.rate_upper(*counts, delta) == pytest.approx(theirs["less"].high, abs=1e-9)
    assert bounds.rate_lower(*counts, delta) == pytest.approx(theirs["greater"].low, abs=1e-9)


@given(num=st.integers(1, 60), truth=st.floats(0.001, 0.999), delta=deltas)
def test_rates_are_bounded_wrongly_with_probability_delta_at_most(num: int, truth: float, delta: float):
    """No simulation: the probabilities of all counts whose bound is wrong are added."""
    likely = stats.binom.pmf(np.arange(num + 1), num, truth)
    too_low = [bounds.rate_upper(count, num, delta) < truth for count in range(num + 1)]
    too_high = [bounds.rate_lower(count, num, delta) > truth for count in range(num + 1)]
    assert likely[too_low].sum() <= delta + 1e-12
    assert likely[too_high].sum() <= delta + 1e-12


@given(counts=counts(), delta=deltas)
def test_the_rate_of_the_sample_lies_between_its_bounds(counts: tuple[int, int], delta: float):
    num_unsafe, num = counts
    assert bounds.rate_lower(num_unsafe, num, delta) <= num_unsafe / num <= bounds.rate_upper(num_unsafe, num, delta)


@given(counts=counts(), delta=deltas)
def test_safe_ones_are_bounded_as_unsafe_ones_are(counts: tuple[int, int], delta: float):
    num_unsafe, num = counts
    lower = bounds.rate_lower(num - num_unsafe, num, delta)
    assert bounds.rate_upper(num_unsafe, num, delta) == pytest.approx(1 - lower, abs=1e-12)


@given(counts=counts(), delta=deltas)
def test_bounds_rise_with_each_unsafe_one_and_fall_with_each_safe_one(counts: tuple[int, int], delta: float):
    num_unsafe, num = counts
    for bound in (bounds.rate_upper, bounds.rate_lower):
        with_safe, with_unsafe = bound(num_unsafe, num + 1, delta), bound(num_unsafe + 1, num + 1, delta)
        assert with_safe <= bound(num_unsafe, num, delta) <= with_unsafe


@given(counts=counts(), delta=deltas, share=st.floats(0.1, 0.9))
def test_more_confidence_moves_bounds_apart(counts: tuple[int, int], delta: float, share: float):
    assert bounds.rate_upper(*counts, delta * share) >= bounds.rate_upper(*counts, delta)
    assert bounds.rate_lower(*counts, delta * share) <= bounds.rate_lower(*counts, delta)


def test_no_prompts_prove_nothing():
    assert (bounds.rate_lower(0, 0, 0.05), bounds.rate_upper(0, 0, 0.05)) == (0.0, 1.0)


@pytest.mark.parametrize("bound", [bounds.rate_upper, bounds.rate_lower])
@pytest.mark.parametrize("wrong", [(-1, 3), (4, 3), (0, -1)])
def test_impossible_counts_are_refused(bound, wrong: tuple[int, int]):
    with pytest.raises(ValueError, match=f"{wrong[0]} of {wrong[1]}"):
        bound(*wrong, 0.05)


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, math.nan])
def test_impossible_deltas_are_refused(delta: float):
    for bound in (partial(bounds.rate_upper, 1, 3), partial(bounds.betting_upper, np.array([0.1, 0.2]))):
        with pytest.raises(ValueError, match="delta"):
            bound(delta)


@pytest.mark.parametrize(("limit", "num"), [(0.05, 59), (0.02, 149), (0.01, 299), (0.001, 2995)])
def test_smallest_samples_of_a_published_table(limit: float, num: int):
    assert bounds.smallest_sample(limit, 0.05) == num


@given(limit=st.floats(0.001, 0.9), delta=deltas)
def test_the_smallest_sample_passes_and_one_less_does_not(limit: float, delta: float):
    num = bounds.smallest_sample(limit, delta)
    assert bounds.rate_upper(0, num, delta) <= limit + 1e-12
    assert num == 1 or bounds.rate_upper(0, num - 1, delta) > limit - 1e-12


# Rates behind a judge ---------------------------------------------------------------------------------------


def test_none_flagged_by_a_judge_that_finds_all_of_100():
    """Half of 0.05 each: (1 - 0.025^(1/300)) / 0.025^(1/100) = 0.012221 / 0.963783 = 0.012680."""
    assert bounds.judged_rate_upper(0, 300, 100, 100, 0.05) == pytest.approx(0.012680, abs=1e-6)


@given(counts=counts(), recall=counts(), delta=deltas)
def test_a_judge_that_may_miss_some_raises_the_bound(counts: tuple[int, int], recall: tuple[int, int], delta: float):
    judged = bounds.judged_rate_upper(*counts, *recall, delta)
    assert bounds.rate_upper(*counts, delta) < judged <= 1.0 or judged == 1.0


@given(counts=counts(), recall=counts(), delta=deltas)
def test_a_better_judge_and_fewer_flags_lower_the_bound(counts: tuple[int, int], recall: tuple[int, int], delta: float):
    (flagged, num), (found, labelled) = counts, recall
    judged = bounds.judged_rate_upper(flagged, num, found, labelled, delta)
    assert bounds.judged_rate_upper(flagged, num, found + 1, labelled + 1, delta) <= judged
    assert bounds.judged_rate_upper(flagged, num + 1, found, labelled, delta) <= judged
    assert bounds.judged_rate_upper(flagged, num, found, labelled, delta / 2) >= judged


def test_a_judge_that_found_nothing_or_was_not_tested_proves_nothing():
    assert bounds.judged_rate_upper(0, 10_000, 0, 50, 0.05) == 1.0
    assert bounds.judged_rate_upper(0, 10_000, 0, 0, 0.05) == 1.0


# Bounded means ----------------------------------------------------------------------------------------------


def test_the_empirical_bernstein_bound_by_hand():
    """100 costs, half 0 and half 0.2: mean 0.1, variance 100 / 99 * 0.01 = 0.010101; ln(2 / 0.05) = 3.688879.

    sqrt(2 * 0.010101 * 3.688879 / 100) = 0.027299; 7 * 3.688879 / (3 * 99) = 0.086944; sum with 0.1: 0.214243.
    """
    costs = np.array([0.0, 0.2] * 50)
    assert bounds.bernstein_upper(costs, 0.05) == pytest.approx(0.214243, abs=1e-6)


def capital(costs: np.ndarray, mean: float) -> float:
    """The most that bets on a mean below `mean` ever made of 1, step by step as the paper tells it."""
    num, largest, money = len(costs), 0.0, 1.0
    for index, cost in enumerate(costs):
        before = costs[:index]
        means = [(0.5 + costs[:i].sum()) / (i + 1) for i in range(1, index + 1)]
        variance = (0.25 + sum((x - m) ** 2 for x, m in zip(before, means, strict=True))) / (index + 1)
        bet = math.sqrt(2 * math.log(1 / 0.05) / (num * variance))
        cap = 0.5 / (1 - mean) if mean < 1 else math.inf
        money *= 1 + min(bet, cap) * (mean - cost)
        largest = max(largest, money)
    return largest


@given(costs=samples, delta=deltas)
def test_the_betting_bound_is_where_the_bets_make_one_over_delta(costs: np.ndarray, delta: float):
    if capital(costs, 1.0) <= 1 / delta:
        assert bounds.betting_upper(costs, delta) == 1.0
    else:
        edge = optimize.brentq(lambda mean: math.log(capital(costs, mean) * delta), 0, 1)
        assert bounds.betting_upper(costs, delta) == pytest.approx(max(edge, costs.mean()), abs=1e-6)


@pytest.mark.parametrize("bound", [bounds.bernstein_upper, bounds.betting_upper])
@given(costs=samples, delta=deltas, low=st.floats(-5, 5), width=st.floats(0.1, 10))
def test_mean_bounds_move_and_stretch_with_the_costs(bound, costs: np.ndarray, delta: float, low: float, width: float):
    moved = np.clip(low + width * costs, low, low + width)
    expected = low + width * bound(costs, delta)
    assert bound(moved, delta, low=low, high=low + width) == pytest.approx(expected, abs=1e-5 * width)


@pytest.mark.parametrize("bound", [bounds.bernstein_upper, bounds.betting_upper])
@given(costs=samples, delta=deltas, share=st.floats(0.1, 0.9))
def test_more_confidence_raises_mean_bounds(bound, costs: np.ndarray, delta: float, share: float):
    assert bound(costs, delta * share) >= bound(costs, delta) - 1e-12


@given(costs=samples, delta=deltas, index=st.integers(0, 39), rise=shares)
def test_the_last_cost_can_only_raise_the_betting_bound(costs: np.ndarray, delta: float, index: int, rise: float):
    """Earlier costs also change the bets that follow, the last one changes only its own outcome."""
    worse = costs.copy()
    worse[-1] += rise * (1 - worse[-1])
    assert bounds.betting_upper(worse, delta) >= bounds.betting_upper(costs, delta) - 1e-12


@given(values=samples, delta=deltas)
def test_the_lower_bound_mirrors_the_upper_one(values: np.ndarray, delta: float):
    mirrored = bounds.betting_upper(10 - values * 10, delta, low=0.0, high=10.0)
    assert bounds.betting_lower(values, delta) == pytest.approx(1 - mirrored / 10, abs=1e-6)


def test_betting_is_tighter_than_bernstein_and_both_close_in_on_the_mean():
    rng = np.random.default_rng(0)
    margins = []
    for num in (100, 1_000, 10_000):
        costs = rng.beta(1, 9, num)
        betting, bernstein = bounds.betting_upper(costs, 0.05), bounds.bernstein_upper(costs, 0.05)
        assert costs.mean() < betting < bernstein
        margins.append(betting - costs.mean())
    assert margins[2] < margins[1] < margins[0]
    assert margins[2] < 0.003


@given(values=samples, delta=deltas)
def test_the_mean_of_the_sample_lies_between_its_bounds(values: np.ndarray, delta: float):
    lower, upper = bounds.betting_lower(values, delta), bounds.betting_upper(values, delta)
    assert 0 <= lower <= values.mean() + 1e-12
    assert values.mean() <= upper <= 1
    assert values.mean() <= bounds.bernstein_upper(values, delta) <= 1


def test_a_good_start_cannot_lift_a_bound_above_the_mean():
    """60 wins before 40 losses: the bets have made their fortune by then, though only 60 % were won."""
    wins = np.repeat([1.0, 0.0], [60, 40])
    assert bounds.betting_lower(wins, 0.05) == pytest.approx(0.6)
    assert bounds.betting_lower(wins[::-1], 0.05) < 0.6


def test_a_win_rate_by_order_of_magnitude():
    """Of 400 games 320 won: the exact bound of 0.8 is 0.764; betting knows less, but not much."""
    exact = bounds.rate_lower(320, 400, 0.05)
    assert exact == pytest.approx(0.764, abs=1e-3)
    assert exact - 0.02 < bounds.betting_lower(np.tile([1.0, 1.0, 0.0, 1.0, 1.0], 80), 0.05) < 0.8


@pytest.mark.parametrize("bound", [bounds.bernstein_upper, bounds.betting_upper, bounds.betting_lower])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1.01, -0.01])
def test_values_outside_their_range_are_refused(bound, wrong: float):
    with pytest.raises(ValueError, match=str(wrong)):
        bound(np.array([0.5, wrong, 0.5]), 0.05)


def test_too_few_costs_are_refused():
    with pytest.raises(ValueError, match="none"):
        bounds.betting_upper(np.array([], dtype=np.float64), 0.05)
    with pytest.raises(ValueError, match="two costs"):
        bounds.bernstein_upper(np.array([0.1]), 0.05)


# Verdicts ---------------------------------------------------------------------------------------------------


def judge(num_unsafe: int, num: int) -> bounds.Verdict:
    return bounds.verdict(num_unsafe / num, bounds.rate_upper(num_unsafe, num, 0.05), 0.05)


def test_verdicts_on_300_prompts_under_a_limit_of_five_percent():
    """8 of 300 are bounded by 4.8 %, 9 by 5.2 %; 15 of 300 are exactly 5 %."""
    verdicts = [judge(num_unsafe, 300) for num_unsafe in range(301)]
    assert verdicts == ["PASS"] * 9 + ["INSUFFICIENT-DATA"] * 7 + ["FAIL"] * 285


def test_few_prompts_cannot_pass_but_can_fail():
    assert [judge(0, 58), judge(0, 59), judge(1, 10)] == ["INSUFFICIENT-DATA", "PASS", "FAIL"]


def test_what_is_exactly_the_limit_keeps_it():
    assert bounds.verdict(0.05, 0.05, 0.05) == "PASS"
    assert bounds.verdict(0.05, math.nextafter(0.05, 1), 0.05) == "INSUFFICIENT-DATA"
    assert bounds.verdict(math.nextafter(0.05, 1), 0.0, 0.05) == "FAIL"


# Several claims at once -------------------------------------------------------------------------------------


def uppers_of(found: list[tuple[int, int]]) -> list[bounds.Upper]:
    return [partial(bounds.rate_upper, *each) for each in found]


def test_bonferroni_shares_delta_evenly():
    expected = [bounds.rate_upper(0, 100, 0.025), bounds.rate_upper(3, 100, 0.025)]
    assert bounds.bonferroni(uppers_of([(0, 100), (3, 100)]), 0.05) == expected


def test_holm_by_hand():
    """Limit 0.05. None of 80: 0.0451 at 0.025, so it passes and leaves its share; none of 62: 0.0578 at 0.025, but
    0.0472 at 0.05. 3 of 100, 0.0757 at 0.05, does not pass, and 0 of 80 has then proven its limit only.
    """
    assert bounds.bonferroni(uppers_of([(0, 80), (0, 62)]), 0.05) == pytest.approx([0.0451, 0.0578], abs=1e-4)
    assert bounds.holm(uppers_of([(0, 80), (0, 62)]), [0.05, 0.05], 0.05) == pytest.approx([0.0451, 0.05], abs=1e-4)
    expected = [0.05, bounds.rate_upper(3, 100, 0.05)]
    assert bounds.holm(uppers_of([(0, 80), (3, 100)]), [0.05, 0.05], 0.05) == expected


def closed_test(found: list[tuple[int, int]], limits: list[float], delta: float) -> list[bool]:
    """Holm's procedure by its definition: a claim passes if every set of claims with it has one that passes."""
    ps = [float(stats.binom.cdf(*each, limit)) for each, limit in zip(found, limits, strict=True)]
    sets = [s for size in range(1, len(ps) + 1) for s in itertools.combinations(range(len(ps)), size)]
    refuted = {s: min(ps[i] for i in s) <= delta / len(s) for s in sets}
    return [all(refuted[s] for s in sets if i in s) for i in range(len(ps))]


limited = st.tuples(st.integers(0, 3), st.integers(20, 400), st.floats(0.01, 0.1))


@given(drawn=st.lists(limited, min_size=1, max_size=5), delta=deltas)
def test_holm_passes_what_the_closed_test_passes(drawn: list[tuple[int, int, float]], delta: float):
    found, limits = [(unsafe, num) for unsafe, num, _ in drawn], [limit for _, _, limit in drawn]
    upper = bounds.holm(uppers_of(found), limits, delta)
    passes = [bound <= limit for bound, limit in zip(upper, limits, strict=True)]
    assert passes == closed_test(found, limits, delta)


@given(drawn=st.lists(limited, min_size=1, max_size=5), delta=deltas)
def test_holm_bounds_lie_between_the_shared_and_the_whole_delta(drawn: list[tuple[int, int, float]], delta: float):
    uppers, limits = uppers_of([(unsafe, num) for unsafe, num, _ in drawn]), [limit for _, _, limit in drawn]
    shared, upper = bounds.bonferroni(uppers, delta), bounds.holm(uppers, limits, delta)
    for i, bound in enumerate(upper):
        assert uppers[i](delta) <= bound <= max(shared[i], limits[i])
        assert bound <= limits[i] or shared[i] > limits[i]


def test_one_claim_needs_no_correction():
    (upper,) = uppers_of([(2, 300)])
    assert bounds.bonferroni([upper], 0.05) == bounds.holm([upper], [0.05], 0.05) == [upper(0.05)]


def test_the_fixed_sequence_ends_at_the_first_failure():
    passing, failing = (0, 100), (3, 100)
    for found, expected in [
        ([passing, passing, failing, passing], 2),
        ([failing, passing, passing], 0),
        ([passing, passing], 2),
        ([], 0),
    ]:
        assert bounds.fixed_sequence(uppers_of(found), 0.05, 0.05) == expected


def test_the_fixed_sequence_spends_no_delta():
    """None of 59 passes 5 % only with all of delta; it does so in every place of the sequence."""
    assert bounds.fixed_sequence(uppers_of([(0, 59)] * 10), 0.05, 0.05) == 10


# Promises ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", bound_coverage.SETTINGS, ids=lambda setting: setting.name)
def test_failures_in_2000_samples(setting: Setting):
    """A bound fails in a share of delta at most, as far as its exact 99 % interval tells; the others do not."""
    low, _ = bound_coverage.simulate(setting, 2000).interval
    assert (low <= bound_coverage.DELTA) == setting.is_bound
