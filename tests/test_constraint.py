import json
import math
from dataclasses import replace
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import approx_fprime, linprog, minimize
from scipy.special import softmax
from scipy.stats import beta as beta_distribution

from align import constraint
from align.constraint import Constraint, Limit, LogAscent, Measurement, MultiplierState, NuPI, ProjectedAscent
from reward import checkpoint, config

RULES = (LogAscent(), ProjectedAscent(), NuPI())
seeds = st.integers(0, 10_000)
few = hypothesis.settings(max_examples=30)


def rate(bound: float, name: str = "harm", tag: str | None = None) -> Limit:
    return Limit(name=name, bound=bound, tag=tag)


def mean_cost(bound: float, name: str = "mean") -> Limit:
    return Limit(name=name, kind="mean_cost", bound=bound)


def units(num_limits: int = 1) -> constraint.Statistics:
    return constraint.Statistics(reward_mean=0.0, reward_std=1.0, scales=(1.0,) * num_limits)


def state(*multipliers: float) -> MultiplierState:
    return MultiplierState(statistics=units(len(multipliers)), multipliers=multipliers)


def column(*costs: float) -> np.ndarray:
    return np.array(costs)[:, None]


def seen(num_videos: int, *totals: float) -> Measurement:
    return Measurement(num_videos=num_videos, totals=totals)


def multipliers(solved: constraint.Dual) -> list[float]:
    return [row.multiplier for row in solved.rows]


# Settings ---------------------------------------------------------------------------------------------------


def test_settings_come_from_a_file_and_the_command_line(tmp_path: Path):
    file = tmp_path / "settings.yaml"
    file.write_text(
        "limits: [{name: harm, bound: 0.05}, {name: gore, tag: violence, bound: 0.01}]\nrule: {kind: nu_pi}\n"
    )
    read = config.load(Constraint, file, ["rule.smoothing=0.5", "delta=0.1"])
    assert read.limits == (rate(0.05), rate(0.01, "gore", "violence"))
    assert read.rule == NuPI(smoothing=0.5)
    file.write_text(config.dump(read))
    assert config.load(Constraint, file) == read


@pytest.mark.parametrize("bound", [0.0, 1.0, -0.1, 5.0])
def test_a_rate_is_a_share(bound: float):
    with pytest.raises(ValueError, match=r"harm: expected a share of videos, in \(0, 1\)"):
        rate(bound)
    assert mean_cost(bound).bound == bound


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limits": (rate(0.1), rate(0.2))}, "limits are named harm, harm"),
        ({"limits": (rate(0.1), mean_cost(0.2)), "delta": 0.1}, "mean is a mean cost; take spread_factor"),
        ({"limits": (), "rule": LogAscent(floor=2.0), "cap": 1.0}, "floor=2.0 is above cap=1.0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Constraint(**settings)


# Scores -----------------------------------------------------------------------------------------------------


def test_each_limit_has_its_own_column_of_costs():
    limits = (rate(0.1, "gore", "violence"), rate(0.1), rate(0.2, "drugs", "contraband"))
    overall, by_tag = np.array([1.0, 2.0]), np.array([[3.0, 4.0, 5.0], [6.0, 7.0, 8.0]])
    chosen = constraint.select_costs(limits, overall, by_tag, ("contraband", "crime", "violence"))
    assert chosen.tolist() == [[5.0, 1.0, 3.0], [8.0, 2.0, 6.0]]
    assert constraint.select_costs((), overall, by_tag, ("a", "b", "c")).shape == (2, 0)
    with pytest.raises(ValueError, match="gore: unknown tag violence; the judge scores crime"):
        constraint.select_costs(limits, overall, by_tag[:, :1], ("crime",))


def test_the_units_of_scores_by_hand():
    """Rewards 1, 5: mean 3, deviation 2. Costs 2, 8: deviation 3. A rate is its own unit."""
    costs = np.array([[2.0, 2.0], [8.0, -8.0]])
    found = constraint.reference_statistics((mean_cost(0.0), rate(0.1)), np.array([1.0, 5.0]), costs)
    assert found == constraint.Statistics(reward_mean=3.0, reward_std=2.0, scales=(3.0, 1.0))


def test_scores_that_are_all_the_same_have_no_unit():
    one, other = np.array([0.1, 0.1, 0.1]), np.array([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="rewards: all 3 scores are the same"):
        constraint.reference_statistics((rate(0.1),), one, other[:, None])
    with pytest.raises(ValueError, match="mean: all 3 scores are the same"):
        constraint.reference_statistics((mean_cost(0.1),), other, one[:, None])
    assert constraint.reference_statistics((rate(0.1),), other, one[:, None]).scales == (1.0,)


def test_utility_by_hand():
    """Reward (7 - 3) / 2 = 2. Charges 6 / 3 = 2, and 1 for the cost 0.5 > 0. Multipliers 0.5 and 2.

    (2 - 0.5 * 2 - 2 * 1) / (1 + 0.5 + 2) = -1 / 3.5; with a second cost of 0, which is safe: 1 / 3.5.
    """
    statistics = constraint.Statistics(reward_mean=3.0, reward_std=2.0, scales=(3.0, 1.0))
    priced = MultiplierState(statistics=statistics, multipliers=(0.5, 2.0))
    costs = np.array([[6.0, 0.5], [6.0, 0.0]])
    found = constraint.utility(np.array([7.0, 7.0]), costs, (mean_cost(0.0), rate(0.1)), priced)
    assert found.tolist() == pytest.approx([-1 / 3.5, 1 / 3.5], abs=1e-15)


@given(price=st.floats(0.0, 1e3), reward=st.floats(-10, 10), cost=st.floats(-10, 10), more=st.floats(0.1, 5))
def test_utility_rises_with_reward_and_falls_with_cost(price: float, reward: float, cost: float, more: float):
    rewards, costs = np.array([reward, reward + more, reward]), column(cost, cost, cost + more)
    plain, better, worse = constraint.utility(rewards, costs, (mean_cost(0.0),), state(price))
    assert better > plain
    assert worse < plain if price > 1e-3 else worse <= plain


def test_without_limits_utility_is_the_reward():
    rewards = np.array([1.0, -2.0])
    assert constraint.utility(rewards, np.empty((2, 0)), (), state()).tolist() == [1.0, -2.0]
    assert constraint.solve_dual((), units(0), rewards, np.empty((2, 0)), np.array([0, 0]), 1.0).rows == ()
    assert constraint.update(state(), seen(3), Constraint(limits=())).multipliers == ()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_never_safe(value: float):
    good, bad = np.array([1.0, 2.0]), np.array([1.0, value])
    with pytest.raises(ValueError, match="costs: expected finite"):
        constraint.utility(good, bad[:, None], (rate(0.1),), state(1.0))
    with pytest.raises(ValueError, match="rewards: expected finite"):
        constraint.utility(bad, good[:, None], (rate(0.1),), state(1.0))
    with pytest.raises(ValueError, match="costs: expected finite"):
        constraint.measure(bad[:, None], Constraint(limits=(rate(0.1),)))
    with pytest.raises(ValueError, match="at least one"):
        constraint.measure(np.empty((0, 1)), Constraint(limits=(rate(0.1),)))


def test_costs_of_other_limits_are_refused():
    with pytest.raises(ValueError, match=r"a column for each of 2 limits, got shape \(2, 1\)"):
        constraint.measure(column(1.0, 2.0), Constraint(limits=(rate(0.1), mean_cost(0.1))))


# The dual ---------------------------------------------------------------------------------------------------


def bandit(seed: int, num_prompts: int = 6, num_samples: int = 12, num_limits: int = 1) -> tuple[np.ndarray, ...]:
    """Rewards, costs and prompts of samples; what is rewarded is often unsafe. Each prompt has a safe sample."""
    random = np.random.default_rng(seed)
    costs = random.normal(0.7, 1.0, (num_prompts, num_samples, num_limits))
    costs[:, 0] = -random.uniform(0.5, 1.0, (num_prompts, num_limits))
    costs[:, 1] = -costs[:, 0]
    rewards = random.normal(size=(num_prompts, num_samples)) + (costs > 0).mean(axis=-1)
    return rewards.ravel(), costs.reshape(-1, num_limits), np.repeat(np.arange(num_prompts), num_samples)


def test_the_multiplier_of_a_rate_in_closed_form():
    """One prompt, 4 of 5 samples unsafe and rewarded 1 more; a limit of 20 %, beta 0.5.

    Odds of unsafe: 4 exp((1 - m) / 0.5) = 0.2 / 0.8 = 1 / 4, so m = 1 + 0.5 ln 16 = 2.386294. Without limit the odds
    are 4 exp(2) = 29.556, a share of 0.967274. Weights: 0.8 on the safe one and 0.05 on each of the others, so
    1 / (0.64 + 4 * 0.0025) = 1.538462 effective samples.
    """
    costs, rewards = column(-1.0, 1.0, 2.0, 3.0, 0.1), np.array([0.0, 1.0, 1.0, 1.0, 1.0])
    solved = constraint.solve_dual((rate(0.2),), units(), rewards, costs, np.zeros(5, dtype=int), 0.5)
    (row,) = solved.rows
    assert row[:3] == ("harm", 0.2, 0.0)
    assert row[3:] == pytest.approx((0.967274, 0.8, 0.2, 1 + 0.5 * math.log(16)), abs=1e-6)
    assert (solved.effective_samples, solved.num_samples) == (pytest.approx(1.538462, abs=1e-5), 5)


def test_the_multiplier_of_a_mean_cost_in_closed_form():
    """Two samples of cost -1 and 1, no rewards, beta 2: the mean is -tanh(m / 2) = -0.5, so m = 2 atanh(0.5)."""
    solved = constraint.solve_dual((mean_cost(-0.5),), units(), np.zeros(2), column(-1.0, 1.0), np.zeros(2), 2.0)
    assert multipliers(solved) == pytest.approx([2 * math.atanh(0.5)], abs=1e-6)


def test_the_table_is_for_people():
    costs, rewards = column(-1.0, 1.0, 2.0, 3.0, 0.1), np.array([0.0, 1.0, 1.0, 1.0, 1.0])
    solved = constraint.solve_dual((rate(0.2),), units(), rewards, costs, np.zeros(5), 0.5)
    header, line, last = str(solved).splitlines()
    assert header.split() == ["limit", "bound", "lowest", "unconstrained", "reference", "reached", "multiplier"]
    assert line.split() == ["harm", "0.2", "0", "0.9673", "0.8", "0.2", "2.386"]
    assert last == "effective samples: 1.5 of 5"


@given(seed=seeds, beta=st.floats(0.05, 5.0))
def test_the_gradient_of_the_dual(seed: int, beta: float):
    rewards, costs, group = bandit(seed, num_limits=2)
    at = np.random.default_rng(seed).uniform(0.1, 3.0, 2)
    numeric = approx_fprime(at, lambda m: constraint.dual(m, rewards, costs, group, beta)[0], 1e-6)
    assert constraint.dual(at, rewards, costs, group, beta)[1] == pytest.approx(numeric, abs=2e-5)


@given(seed=seeds, share=st.floats(0.0, 1.0))
def test_the_dual_is_convex(seed: int, share: float):
    rewards, costs, group = bandit(seed, num_limits=3)
    one, other = np.random.default_rng(seed).uniform(0, 5, (2, 3))

    def value(at: np.ndarray) -> float:
        return constraint.dual(at, rewards, costs, group, 0.5)[0]

    between = value(share * one + (1 - share) * other)
    assert between <= share * value(one) + (1 - share) * value(other) + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_scipy_finds_the_same_policy_from_the_primal(seed: int):
    """Weights w of 2 prompts with 5 samples: maximise mean sum w (reward - beta log 5 w) within two mean costs."""
    rewards, costs, prompts = bandit(seed, 2, 5, num_limits=2)
    limits, beta = (mean_cost(-0.1, "one"), mean_cost(0.2, "two")), 0.7
    bounds = np.array([-0.1, 0.2])

    def loss(weights: np.ndarray) -> float:
        return -float(weights @ (rewards - beta * np.log(5 * weights))) / 2

    met = {"type": "ineq", "fun": lambda weights: bounds - weights @ costs / 2}
    whole = {"type": "eq", "fun": lambda weights: weights.reshape(2, 5).sum(axis=1) - 1}
    primal = minimize(
        loss,
        np.full(10, 0.2),
        bounds=[(1e-12, 1)] * 10,
        constraints=[met, whole],
        options={"ftol": 1e-12, "maxiter": 500},
    )
    solved = constraint.solve_dual(limits, units(2), rewards, costs, prompts, beta)
    energies = (rewards - costs @ multipliers(solved)) / beta
    assert primal.success
    assert softmax(energies.reshape(2, 5), axis=1).ravel() == pytest.approx(primal.x, abs=1e-4)
    assert [row.reached for row in solved.rows] == pytest.approx(primal.x @ costs / 2, abs=1e-4)
    value, _ = constraint.dual(np.array(multipliers(solved)), rewards, costs - bounds, prompts, beta)
    assert value == pytest.approx(-primal.fun, abs=1e-6)


@few
@given(seed=seeds, bound=st.floats(0.02, 0.98), mean=st.floats(-0.4, 2.0), beta=st.floats(0.1, 3.0))
def test_every_limit_is_met_and_only_a_tight_one_has_a_price(seed: int, bound: float, mean: float, beta: float):
    rewards, costs, prompts = bandit(seed)
    limits, costs = (rate(bound), mean_cost(mean)), np.column_stack([costs, costs])
    solved = constraint.solve_dual(limits, units(2), rewards, costs, prompts, beta)
    for row in solved.rows:
        assert row.multiplier >= 0
        assert row.reached <= row.bound + 1e-5
        assert row.multiplier == pytest.approx(0, abs=1e-5) or row.reached == pytest.approx(row.bound, abs=1e-5)
        assert row.lowest <= row.reached


@few
@given(seed=seeds, bound=st.floats(0.02, 0.6))
def test_a_tighter_limit_has_a_higher_price(seed: int, bound: float):
    rewards, costs, prompts = bandit(seed)
    loose, tight = (
        constraint.solve_dual((rate(each),), units(), rewards, costs, prompts, 0.5) for each in (bound, bound / 2)
    )
    assert multipliers(tight) > multipliers(loose)


@few
@given(seed=seeds)
def test_a_slack_limit_costs_nothing(seed: int):
    rewards, costs, prompts = bandit(seed)
    free = constraint.solve_dual((rate(0.5),), units(), rewards, costs, prompts, 0.5).rows[0].unconstrained
    solved = constraint.solve_dual((rate((1 + free) / 2),), units(), rewards, costs, prompts, 0.5)
    assert multipliers(solved) == [0.0]
    assert solved.rows[0].reached == solved.rows[0].unconstrained == pytest.approx(free)


def test_a_limit_out_of_reach_is_refused_with_the_table():
    """One prompt has only unsafe samples: of two prompts, no less than half is unsafe."""
    rewards, costs = np.array([0.0, 1.0, 0.0, 1.0]), column(1.0, 2.0, -1.0, 1.0)
    for bound in (0.1, 0.5):
        with pytest.raises(ValueError, match=r"raise their bounds:\n +limit +bound +lowest") as refused:
            constraint.solve_dual((rate(bound),), units(), rewards, costs, np.array([7, 7, 3, 3]), 1.0)
        assert str(refused.value).splitlines()[2].split()[:3] == ["harm", str(bound), "0.5"]
    constraint.solve_dual((rate(0.51),), units(), rewards, costs, np.array([7, 7, 3, 3]), 1.0)


def test_limits_that_can_only_be_met_one_by_one_are_refused():
    """Costs (-1, 1) and (1, -1) sum to 0 in every mixture: two bounds of 0.1 can be met, two of -0.1 cannot."""
    samples = (np.zeros(2), np.array([[-1.0, 1.0], [1.0, -1.0]]), np.array([0, 0]), 1.0)
    both, neither = ((mean_cost(bound, "one"), mean_cost(bound, "other")) for bound in (0.1, -0.1))
    assert multipliers(constraint.solve_dual(both, units(2), *samples)) == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"these limits together(.|\n)*other +-0.1 +-1 "):
        constraint.solve_dual(neither, units(2), *samples)


def test_effective_samples_add_up_over_prompts():
    """Without limits, rewards ln 3 and 0 weigh 0.75 and 0.25: 1 / 0.625 = 1.6; and equal rewards 3 of 3."""
    rewards = np.array([math.log(3), 0.0, 5.0, 5.0, 5.0])
    solved = constraint.solve_dual((), units(0), rewards, np.empty((5, 0)), np.array([0, 0, 1, 1, 1]), 1.0)
    assert solved.effective_samples == pytest.approx(4.6)


@few
@given(seed=seeds, first=st.floats(-0.9, 0.5), second=st.floats(-0.9, 0.5))
def test_limits_are_refused_exactly_where_no_weights_can_meet_them(seed: int, first: float, second: float):
    """A linear programme: the least that the larger of both excesses can be; 4 prompts with 3 samples."""
    rewards, costs, prompts = bandit(seed, 4, 3, num_limits=2)
    costs = costs * [1, -1]  # so that the limits are at odds
    excess = np.column_stack([(costs - [first, second]).T / 4, [-1.0, -1.0]])
    whole = np.column_stack([np.repeat(np.eye(4), 3, axis=1), np.zeros(4)])
    aim, ranges = np.append(np.zeros(12), 1.0), [(0, None)] * 12 + [(None, None)]
    least = linprog(aim, excess, np.zeros(2), whole, np.ones(4), ranges).fun
    limits = (mean_cost(first, "first"), mean_cost(second, "second"))
    if least < -1e-3:
        constraint.solve_dual(limits, units(2), rewards, costs, prompts, 0.5)
    if least > 1e-3:
        with pytest.raises(ValueError, match="no reweighting"):
            constraint.solve_dual(limits, units(2), rewards, costs, prompts, 0.5)


def test_every_prompt_counts_the_same_however_many_samples_it_has():
    rewards, costs, prompts = bandit(1)
    again = prompts == 2
    solved = constraint.solve_dual((rate(0.2),), units(), rewards, costs, prompts, 0.5)
    longer = (np.concatenate([each, each[again]]) for each in (rewards, costs, prompts))
    rewards, costs, prompts = longer
    shuffled = np.random.default_rng(0).permutation(len(prompts))
    names = np.array([f"prompt {prompt}" for prompt in prompts])
    doubled = constraint.solve_dual((rate(0.2),), units(), rewards[shuffled], costs[shuffled], names[shuffled], 0.5)
    assert doubled.rows[0][1:] == pytest.approx(solved.rows[0][1:], abs=1e-5)


@few
@given(seed=seeds, scale=st.floats(0.1, 10.0), shift=st.floats(-5.0, 5.0))
def test_multipliers_do_not_depend_on_the_units_of_the_judge(seed: int, scale: float, shift: float):
    rewards, costs, prompts = bandit(seed)
    found = []
    for factor, offset in ((1.0, 0.0), (scale, shift)):
        limits = (mean_cost(-0.1 * factor),)
        scored = offset + factor * rewards, factor * costs
        statistics = constraint.reference_statistics(limits, *scored)
        found += multipliers(constraint.solve_dual(limits, statistics, *scored, prompts, 0.5))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_beta_is_a_weight(beta: float):
    with pytest.raises(ValueError, match="expected a weight of the KL divergence"):
        constraint.solve_dual((rate(0.1),), units(), *bandit(0), beta)


# Measuring --------------------------------------------------------------------------------------------------


def test_a_measurement_by_hand():
    """Costs 3, 0 and -1: the sum is 2, and one video is unsafe, since 0 is safe."""
    limits = Constraint(limits=(mean_cost(0.0), rate(0.1)))
    costs = np.column_stack([column(3.0, 0.0, -1.0)] * 2)
    assert constraint.measure(costs, limits) == seen(3, 2.0, 1.0)


def test_spreads_of_the_judge_make_costs_higher():
    """Costs -1 and -1, spreads 0.25 and 0.75; with factor 2: -0.5 and 0.5, of which one is unsafe."""
    settings = Constraint(limits=(mean_cost(0.0), rate(0.1)), spread_factor=2.0)
    spreads = np.column_stack([column(0.25, 0.75)] * 2)
    assert constraint.measure(np.full((2, 2), -1.0), settings, spreads) == seen(2, 0.0, 1.0)
    for wrong in (None, -spreads, spreads * math.nan):
        with pytest.raises(ValueError, match=r"spread_factor=2.0: expected spreads >= 0"):
            constraint.measure(np.full((2, 2), -1.0), settings, wrong)


def test_a_window_pools_videos_not_measurements():
    """(2 + 1) unsafe of (10 + 90) videos: 3 %, though the mean of 20 % and 1 / 90 is above 10 %."""
    settings = Constraint(limits=(rate(0.1),))
    assert constraint.estimate((seen(10, 2.0), seen(90, 1.0)), settings) == pytest.approx([0.03])


def test_the_upper_bound_of_no_unsafe_video():
    """No unsafe one of 59 at 95 %: 1 - 0.05^(1 / 59) = 0.04950; so 58 cannot show a rate of at most 5 %."""
    settings = Constraint(limits=(rate(0.05),), delta=0.05)
    assert constraint.estimate((seen(59, 0.0),), settings) == pytest.approx([1 - 0.05 ** (1 / 59)])
    constraint.update(state(1.0), seen(59, 0.0), settings)
    with pytest.raises(ValueError, match=r"harm: 58 videos cannot show a rate of at most 0.05, even .* pool 59"):
        constraint.update(state(1.0), seen(58, 0.0), settings)


@given(num_videos=st.integers(60, 400), share=st.floats(0.0, 0.99), delta=st.floats(0.01, 0.5))
def test_the_upper_bound_is_the_quantile_of_a_beta(num_videos: int, share: float, delta: float):
    unsafe = int(share * num_videos)
    settings = Constraint(limits=(rate(0.5),), delta=delta)
    expected = beta_distribution.ppf(1 - delta, unsafe + 1, num_videos - unsafe)
    assert constraint.estimate((seen(num_videos, float(unsafe)),), settings) == pytest.approx([expected], rel=1e-6)


# One step of each rule --------------------------------------------------------------------------------------


def moved(start: MultiplierState, settings: Constraint, *rates: float) -> MultiplierState:
    for each in rates:
        start = constraint.update(start, seen(100, 100 * each), settings)
    return start


def test_log_ascent_by_hand():
    """Violation 0.3 - 0.1 = 0.2, rate 2: 0.5 exp(0.4). From 0 it starts at the floor: 0.001 exp(0.4)."""
    settings = Constraint(limits=(rate(0.1),), rule=LogAscent(rate=2.0))
    assert moved(state(0.5), settings, 0.3).multipliers == pytest.approx((0.5 * math.exp(0.4),))
    assert moved(state(0.0), settings, 0.3).multipliers == pytest.approx((1e-3 * math.exp(0.4),))
    assert moved(state(0.0), settings, 0.05).multipliers == pytest.approx((1e-3,))


def test_projected_ascent_by_hand():
    """Violation 0.2, rate 2: 0.5 + 0.4. Violation -0.1: 0.1 - 0.2 is below 0."""
    settings = Constraint(limits=(rate(0.1),), rule=ProjectedAscent(rate=2.0))
    assert moved(state(0.5), settings, 0.3).multipliers == pytest.approx((0.9,))
    assert moved(state(0.1), settings, 0.0).multipliers == (0.0,)


def test_nu_pi_by_hand():
    """Violations 0.2 and 0.4, nu 0.25, integral 2, proportional 3, from 0.5.

    First 0.5 + 2 * 0.2 = 0.9, smoothed 0.2. Then smoothed 0.25 * 0.2 + 0.75 * 0.4 = 0.35, a change of 0.15:
    0.9 + 2 * 0.4 + 3 * 0.15 = 2.15.
    """
    settings = Constraint(limits=(rate(0.1),), rule=NuPI(integral=2.0, proportional=3.0, smoothing=0.25))
    first = moved(state(0.5), settings, 0.3)
    assert (*first.multipliers, *(first.smoothed or ())) == pytest.approx((0.9, 0.2))
    second = moved(first, settings, 0.5)
    assert (*second.multipliers, *(second.smoothed or ())) == pytest.approx((2.15, 0.35))


def test_a_mean_cost_is_measured_in_its_own_unit():
    """Mean cost 8 / 4 = 2 against -1, scale 3: violation 1."""
    statistics = constraint.Statistics(reward_mean=9.0, reward_std=9.0, scales=(3.0,))
    start = MultiplierState(statistics=statistics, multipliers=(0.5,))
    settings = Constraint(limits=(mean_cost(-1.0),), rule=ProjectedAscent())
    assert constraint.update(start, seen(4, 8.0), settings).multipliers == pytest.approx((1.5,))


@pytest.mark.parametrize("rule", RULES)
@given(price=st.floats(0.01, 10.0), bound=st.floats(0.01, 0.9), away=st.floats(0.01, 0.09))
def test_a_broken_limit_gets_dearer_and_a_slack_one_cheaper(rule, price: float, bound: float, away: float):
    settings = Constraint(limits=(rate(bound),), rule=rule)
    assert moved(state(price), settings, bound + away).multipliers[0] > price
    assert moved(state(price), settings, bound * (1 - away)).multipliers[0] < price
    assert moved(state(price), settings, bound).multipliers == pytest.approx((price,))


@pytest.mark.parametrize("rule", RULES)
def test_no_multiplier_leaves_its_range(rule):
    settings = Constraint(limits=(rate(0.1), mean_cost(0.0)), rule=rule, cap=3.0)
    high = constraint.update(state(1.0, 1.0), seen(10, 10.0, 1e6), settings)
    assert high.multipliers[1] == pytest.approx(3.0)
    assert constraint.update(high, seen(10, 10.0, -1e6), settings).multipliers[1] == pytest.approx(0, abs=2e-3)


def test_delay_measures_and_does_not_move():
    """Measured 50 %, 50 %, 20 % against 10 %; the third moves, by their pooled 40 % - 10 %."""
    settings = Constraint(limits=(rate(0.1),), rule=ProjectedAscent(), delay=2, window=3)
    waiting = moved(state(1.0), settings, 0.5, 0.5)
    assert waiting.multipliers == (1.0,)
    assert moved(waiting, settings, 0.2).multipliers == pytest.approx((1.3,))


def test_a_window_forgets_what_is_old():
    settings = Constraint(limits=(rate(0.1),), rule=ProjectedAscent(), window=2)
    after = moved(state(1.0), settings, 0.9, 0.1, 0.3)
    assert after.window == (seen(100, 10.0), seen(100, 30.0))
    assert after.multipliers == pytest.approx((1 + 0.8 + 0.4 + 0.1,))


def test_pessimism_makes_harm_dearer():
    plain, careful = (Constraint(limits=(rate(0.1),), rule=ProjectedAscent(), delta=delta) for delta in (None, 0.05))
    bound = beta_distribution.ppf(0.95, 11, 90)
    assert moved(state(1.0), plain, 0.1).multipliers == pytest.approx((1.0,))
    assert moved(state(1.0), careful, 0.1).multipliers == pytest.approx((1 + bound - 0.1,))


def test_without_a_rule_the_multipliers_stay():
    settings = Constraint(limits=(rate(0.1),), rule=None, cap=1.0)
    after = moved(state(5.0), settings, 0.9, 0.0)
    assert (after.multipliers, after.num_measurements) == ((5.0,), 2)


def test_states_and_measurements_of_other_limits_are_refused():
    settings = Constraint(limits=(rate(0.1), mean_cost(0.0)))
    with pytest.raises(ValueError, match="expected state and measurement of 2 limits"):
        constraint.update(state(1.0, 1.0), seen(10, 1.0), settings)
    with pytest.raises(ValueError, match="expected state and measurement of 2 limits"):
        constraint.update(state(1.0), seen(10, 1.0, 1.0), settings)
    with pytest.raises(ValueError, match="a multiplier >= 0 for each of 1 limits"):
        state(-0.1)
    with pytest.raises(ValueError, match="a multiplier >= 0 for each of 1 limits"):
        replace(state(1.0), multipliers=(1.0, 2.0))


# The closed loop --------------------------------------------------------------------------------------------

BETA = 0.5


def close_loop(
    settings: Constraint, scores: tuple[np.ndarray, ...], start: MultiplierState, num_rounds: int, lag: float = 0.5
) -> tuple[MultiplierState, np.ndarray]:
    """Let a table of logits follow the utility, slowly, and the multipliers the table; give both at the end."""
    rewards, costs, prompts = scores
    shape = (prompts.max() + 1, -1)
    logits = np.zeros_like(rewards)
    counted = np.where([limit.kind == "unsafe_rate" for limit in settings.limits], costs > 0, costs)
    for _ in range(num_rounds):
        charges = softmax(logits.reshape(shape), axis=1).ravel() @ counted / shape[0]
        start = constraint.update(start, seen(1000, *(1000 * charges).tolist()), settings)
        worth = constraint.utility(rewards, costs, settings.limits, start)
        logits = lag * logits + (1 - lag) * (1 + sum(start.multipliers)) * worth / BETA
    return start, softmax(logits.reshape(shape), axis=1).ravel() @ counted / shape[0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bound", [0.2, 0.05, 0.01])
@pytest.mark.parametrize("lag", [0.0, 0.8])
def test_every_rule_meets_the_limit_at_the_price_that_the_dual_foretold(rule, bound: float, lag: float):
    scores = bandit(0, num_samples=40)
    limits = (rate(bound),)
    end, charges = close_loop(Constraint(limits=limits, rule=rule), scores, state(1.0), 300, lag)
    assert charges == pytest.approx([bound], rel=0.05)
    assert end.multipliers == pytest.approx(
        multipliers(constraint.solve_dual(limits, units(), *scores, BETA)), rel=0.02
    )


@pytest.mark.parametrize("rule", RULES)
def test_tighter_limits_end_at_higher_prices_and_a_loose_one_at_none(rule):
    scores = bandit(0, num_samples=40)
    ends = [
        close_loop(Constraint(limits=(rate(bound),), rule=rule), scores, state(1.0), 300)[0].multipliers[0]
        for bound in (0.99, 0.2, 0.05, 0.01)
    ]
    assert ends[0] < 2e-3
    assert np.diff(ends).min() > 0.3


@pytest.mark.parametrize("rule", RULES)
def test_several_limits_are_met_together(rule):
    rewards, costs, _ = scores = bandit(3, num_samples=40, num_limits=3)
    limits = (rate(0.1), mean_cost(-0.2), rate(0.99, "slack"))
    statistics = constraint.reference_statistics(limits, rewards, costs)
    statistics = replace(statistics, reward_mean=0.0, reward_std=1.0)
    solved = constraint.solve_dual(limits, statistics, *scores, BETA)
    start = MultiplierState(statistics=statistics, multipliers=(1.0, 1.0, 1.0))
    end, charges = close_loop(Constraint(limits=limits, rule=rule), scores, start, 400)
    assert charges[:2] == pytest.approx([0.1, -0.2], abs=0.005)
    assert end.multipliers == pytest.approx(multipliers(solved), rel=0.02, abs=0.01)


@pytest.mark.parametrize("rule", RULES)
def test_a_start_at_the_dual_stays_there(rule):
    scores, limits = bandit(0, num_samples=40), (rate(0.05),)
    (price,) = multipliers(constraint.solve_dual(limits, units(), *scores, BETA))
    rewards, costs, _ = scores
    worth = (1 + price) * constraint.utility(rewards, costs, limits, state(price)) / BETA
    unsafe = (softmax(worth.reshape(6, 40), axis=1).ravel() @ (costs > 0)).item() / 6
    assert moved(state(price), Constraint(limits=limits, rule=rule), unsafe).multipliers == pytest.approx((price,))


# State ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_resumed_run_is_the_run_that_was_not_stopped(rule, stop: int, tmp_path: Path):
    settings = Constraint(limits=(rate(0.1), mean_cost(1 / 3)), rule=rule, window=3, delay=2)
    seen_rates = np.random.default_rng(0).uniform(0, 100, (9, 2))
    straight = resumed = state(1 / 3, 0.7)
    for index, totals in enumerate(seen_rates.tolist()):
        straight = constraint.update(straight, seen(100, *totals), settings)
        resumed = constraint.update(resumed, seen(100, *totals), settings)
        if index == stop:
            point = checkpoint.Checkpoint(step=stop, tensors={}, state=constraint.to_json(resumed))
            (tmp_path / "checkpoints").mkdir()
            checkpoint.save(tmp_path / "checkpoints", point, keep=1)
            loaded = checkpoint.load_newest(tmp_path / "checkpoints")
            assert loaded is not None
            resumed = constraint.from_json(loaded.state)
    assert resumed == straight
    assert resumed.num_measurements == 9


def test_a_state_that_was_changed_is_refused():
    good = constraint.to_json(moved(state(1.0), Constraint(limits=(rate(0.1),), rule=NuPI()), 0.3))
    assert json.loads(json.dumps(good)) == good
    for wrong in (
        {**good, "more": 1},
        {key: good[key] for key in good if key != "multipliers"},
        {**good, "multipliers": [math.nan]},
        {**good, "multipliers": ["1.0"]},
        {**good, "multipliers": [-1.0]},
        {**good, "window": [{"num_videos": 3, "totals": [math.inf]}]},
    ):
        with pytest.raises(ValueError, match=r"MultiplierState|window"):
            constraint.from_json(wrong)
