import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from torch import Tensor

from align.objectives.rwr import Rwr, Scored, effective_sample_size, rwr_loss, weights
from reward.config import ConfigError, load

FREE = Rwr(most=1e9)
rewards = st.lists(st.floats(-3, 3), min_size=6, max_size=6)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def flags(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


def scored(
    reward: Tensor,
    cost: Tensor | None = None,
    *,
    prompt: tuple[int, ...] | None = None,
    unsafe: Tensor | None = None,
    chosen: Tensor | None = None,
) -> Scored:
    """Videos of one prompt, unless prompts are given."""
    costs = torch.zeros_like(reward) if cost is None else cost
    prompts = torch.tensor(prompt or [0] * len(reward))
    return Scored(prompt=prompts, reward=reward, costs=costs[:, None], unsafe=unsafe, chosen=chosen)


def weigh(videos: Scored, settings: Rwr = FREE, multiplier: float = 0.0) -> list[float]:
    return weights(settings, videos, numbers(multiplier)).tolist()


# Weights ----------------------------------------------------------------------------------------------------


def test_weights_by_hand():
    """exp of 0, ln 2 and ln 5: 1, 2 and 5, with mean 8 / 3; weights 0.375, 0.75, 1.875."""
    assert weigh(scored(numbers(0, math.log(2), math.log(5)))) == pytest.approx([0.375, 0.75, 1.875])


def test_costs_weigh_against_rewards():
    """Rewards 1 and 1, costs 1 and -1, multiplier 0.5: exp(0.5) to exp(1.5), so 1 to e: 2 / (1 + e) = 0.537883."""
    found = weigh(scored(numbers(1, 1), numbers(1, -1)), multiplier=0.5)
    assert found == pytest.approx([0.537883, 1.462117], abs=1e-6)


def test_every_harm_has_its_own_multiplier():
    """Costs (1, 0) and (0, 1), multipliers 1 and 3: net -1 and -3, so e^2 to 1: 2 / (1 + e^-2) = 1.761594."""
    videos = Scored(prompt=torch.zeros(2, dtype=torch.long), reward=numbers(0, 0), costs=torch.eye(2).double())
    assert weights(FREE, videos, numbers(1, 3)).tolist() == pytest.approx([1.761594, 0.238406], abs=1e-6)


def test_the_temperature_divides():
    """Net rewards 0 and 1 at temperature 1/2: 1 to e^2, 2 / (1 + e^2) = 0.238406."""
    found = weigh(scored(numbers(0, 1)), Rwr(temperature=0.5))
    assert found == pytest.approx([0.238406, 1.761594], abs=1e-6)


@given(reward=rewards, temperature=st.floats(0.2, 5), multiplier=st.floats(0, 3))
def test_weights_are_a_softmax_in_each_prompt(reward: list[float], temperature: float, multiplier: float):
    prompt, cost = (4, 9, 4, 9, 9, 4), numbers(*reversed(reward))
    found = weights(
        Rwr(temperature=temperature, most=1e9), scored(numbers(*reward), cost, prompt=prompt), numbers(multiplier)
    )
    net = numbers(*reward) - multiplier * cost
    for members in (flags(1, 0, 1, 0, 0, 1), flags(0, 1, 0, 1, 1, 0)):
        expected = 3 * softmax((net[members] / temperature).numpy())
        torch.testing.assert_close(found[members], torch.from_numpy(expected))
        assert found[members].mean().item() == pytest.approx(1)


@given(reward=rewards, shift=st.floats(-50, 50))
def test_a_prompt_all_of_whose_rewards_are_higher_counts_no_more(reward: list[float], shift: float):
    easy = numbers(0, 0, 0, shift, shift, shift)
    prompt = (0, 0, 0, 1, 1, 1)
    plain, shifted = (weigh(scored(numbers(*reward) + extra, prompt=prompt)) for extra in (0, easy))
    assert shifted == pytest.approx(plain, rel=1e-9)


@given(reward=rewards, more=st.floats(0.01, 3))
def test_more_reward_is_more_weight_and_more_cost_is_less(reward: list[float], more: float):
    first = numbers(more, 0, 0, 0, 0, 0)
    base = weigh(scored(numbers(*reward)))[0]
    assert weigh(scored(numbers(*reward) + first))[0] > base
    assert weigh(scored(numbers(*reward), first), multiplier=1.0)[0] < base


def test_large_rewards_do_not_overflow():
    assert weigh(scored(numbers(1e6, 1e6, -1e6))) == pytest.approx([1.5, 1.5, 0])


def test_weights_are_cut_after_they_are_normalised():
    """1, 1, 98 of 100, times 3: 0.03, 0.03, 2.94, the last cut to 2."""
    found = weigh(scored(numbers(0, 0, math.log(98))), Rwr(most=2.0))
    assert found == pytest.approx([0.03, 0.03, 2.0])


# Which videos may be learnt ---------------------------------------------------------------------------------


def test_unsafe_videos_get_no_weight_whatever_their_reward():
    """The others are weighted among themselves: 1 to 3, with mean 1."""
    videos = scored(numbers(9, 0, math.log(3)), unsafe=flags(1, 0, 0))
    assert weigh(videos, Rwr(safe_only=True)) == pytest.approx([0, 0.5, 1.5])
    assert weigh(videos)[0] > 2.9


def test_a_prompt_with_unsafe_videos_only_is_left_out_and_is_not_nan():
    videos = scored(numbers(1, 2, 0, 0), prompt=(0, 0, 1, 1), unsafe=flags(1, 1, 0, 0))
    assert weigh(videos, Rwr(safe_only=True)) == [0, 0, 1, 1]


def test_without_temperature_on_chosen_it_is_supervised_fine_tuning():
    settings = Rwr(temperature=None, chosen_only=True)
    videos = scored(numbers(1, 2, 0, 5), prompt=(0, 0, 1, 1), chosen=flags(1, 0, 0, 1))
    weight = weights(settings, videos, numbers(0))
    error = numbers(0.2, 0.4, 0.6, 0.8)
    assert weight.tolist() == [1, 0, 0, 1]
    assert rwr_loss(error, weight).loss.sum() == error[[0, 3]].sum()


@given(reward=rewards)
def test_hotter_and_hotter_comes_to_no_temperature(reward: list[float]):
    videos = scored(numbers(*reward))
    assert weigh(videos, Rwr(temperature=1e9)) == pytest.approx(weigh(videos, Rwr(temperature=None)), abs=1e-6)


def test_what_a_setting_asks_for_must_be_known():
    videos = scored(numbers(0, 1))
    with pytest.raises(ValueError, match="safe_only: needs to know of every video whether it is unsafe"):
        weigh(videos, Rwr(safe_only=True))
    with pytest.raises(ValueError, match="chosen_only: needs to know of every video whether it is chosen"):
        weigh(videos, Rwr(chosen_only=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_named(bad: float):
    with pytest.raises(ValueError, match="reward: expected finite scores"):
        scored(numbers(0, bad))
    with pytest.raises(ValueError, match="costs: expected finite scores"):
        scored(numbers(0, 1), numbers(bad, 0))


# Effective sample size --------------------------------------------------------------------------------------


def test_effective_sample_size_by_hand():
    """Weights 1, 2, 5: 64 / 30 = 2.1333; four equal ones are four; one alone is one; none is none."""
    assert effective_sample_size(numbers(1, 2, 5)) == pytest.approx(2.1333, abs=1e-4)
    assert effective_sample_size(numbers(0.7, 0.7, 0.7, 0.7)) == pytest.approx(4)
    assert effective_sample_size(numbers(0, 3)) == 1
    assert effective_sample_size(numbers(0, 0)) == 0


@given(reward=rewards, cooler=st.floats(0.1, 0.9))
def test_a_lower_temperature_leaves_fewer_samples(reward: list[float], cooler: float):
    warm, cold = (weights(Rwr(temperature=t, most=1e9), scored(numbers(*reward)), numbers(0)) for t in (1.0, cooler))
    assert effective_sample_size(cold) <= effective_sample_size(warm) + 1e-9


# The loss ---------------------------------------------------------------------------------------------------


def test_a_loss_by_hand_and_its_gradient():
    """Weights 0.5 and 2, errors 0.2 and 0.3: 0.1 and 0.6; the gradients are the weights: it lowers every error."""
    error = numbers(0.2, 0.3).requires_grad_()
    result = rwr_loss(error, numbers(0.5, 2))
    assert result.loss.tolist() == pytest.approx([0.1, 0.6])
    (gradient,) = torch.autograd.grad(result.loss.sum(), error)
    assert gradient.tolist() == [0.5, 2]
    assert not result.error.requires_grad
    assert torch.autograd.gradcheck(lambda e: rwr_loss(e, numbers(0.5, 2)).loss, error)


def test_four_videos_at_once_are_four_accumulated():
    weight, values = numbers(0.5, 2, 1, 0), numbers(0.1, 0.2, 0.3, 0.4)
    together = rwr_loss(values, weight).loss.mean()
    accumulated = sum(rwr_loss(values[[i]], weight[[i]]).loss.mean() / 4 for i in range(4))
    torch.testing.assert_close(accumulated, together)


def test_an_error_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="error: expected finite errors"):
        rwr_loss(numbers(0.1, math.nan), numbers(1, 1))


@pytest.mark.parametrize("override", ["temperature=0", "temperature=-1", "most=0.5", "tau=1"])
def test_settings_that_cannot_be_are_refused(override: str):
    with pytest.raises(ConfigError):
        load(Rwr, None, [override])
