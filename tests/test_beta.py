import json
import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align.objectives.beta import BetaState, FixedBeta, SteeredBeta, start_beta, steer
from align.objectives.dpo import margin_of
from reward.config import ConfigError, load

STATE = BetaState(strength=100.0, unit=2.0)
factors = st.floats(0.0, 0.5)


def folded(margin: Tensor) -> float:
    return torch.sigmoid(-margin.abs()).mean().item()


def fraction_right(num: int, seed: int) -> Tensor:
    """Gaps between errors as a policy in training has them: right about more than half of the pairs."""
    gaps = torch.randn(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 1e-3 * (gaps - 0.2)


def run(settings: SteeredBeta, *, scale: float, steps: int, pairs: int = 4) -> list[tuple[float, float]]:
    """Betas and factors of a run whose errors are all multiplied by `scale`."""
    state, trace = start_beta(settings, 0.2 * scale), []
    for step in range(steps):
        gaps = scale * fraction_right(pairs, step)
        factor = folded(margin_of(gaps, torch.zeros_like(gaps), torch.full_like(gaps, state.value)))
        trace.append((state.value, factor))
        state = steer(settings, state, factor)
    return trace


# A step of the steering -------------------------------------------------------------------------------------


def test_a_step_by_hand():
    """Factor 0.4, target 0.2, rate 0.5: strength 100 * exp(0.5 * 0.2) = 110.5171, beta 221.0342."""
    state = steer(SteeredBeta(target=0.2, rate=0.5), STATE, 0.4)
    assert state.strength == pytest.approx(110.5171, abs=1e-4)
    assert (state.value, state.num_steps) == (pytest.approx(221.0342, abs=1e-4), 1)


def test_the_first_beta_is_in_units_of_the_references_error():
    """400 / 0.25 = 1600; a fixed beta is what it is."""
    assert start_beta(SteeredBeta(), 0.25).value == 1600
    assert start_beta(FixedBeta(value=500.0), 0.25).value == 500


@given(factor=factors)
def test_beta_rises_above_the_target_and_falls_below(factor: float):
    moved = steer(SteeredBeta(target=0.2), STATE, factor).value - STATE.value
    assert math.copysign(1, moved) == math.copysign(1, factor - 0.2) or abs(factor - 0.2) < 1e-12


@given(many=st.lists(factors, max_size=60))
def test_beta_stays_within_its_limits(many: list[float]):
    settings = SteeredBeta(start=100.0, least=50.0, most=200.0, rate=5.0)
    state = start_beta(settings, 0.5)
    for factor in many:
        state = steer(settings, state, factor)
        assert 100 <= state.value <= 400


def test_a_fixed_beta_never_moves():
    state = start_beta(FixedBeta(value=500.0), 0.1)
    assert steer(FixedBeta(value=500.0), state, 0.5).value == 500


def test_beta_stays_once_its_steps_are_over():
    settings, state, betas = SteeredBeta(num_steps=2), start_beta(SteeredBeta(), 0.2), []
    for _ in range(4):
        state = steer(settings, state, 0.5)
        betas.append(state.value)
    assert betas[0] < betas[1] == betas[2] == betas[3]
    assert state.num_steps == 4


# What steering is for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.1, 0.2, 0.4])
@pytest.mark.parametrize("pairs", [1, 4])
def test_the_factor_comes_to_its_target_and_stays(target: float, pairs: int):
    trace = run(SteeredBeta(target=target), scale=1.0, steps=1000, pairs=pairs)
    late = [factor for _, factor in trace[200:]]
    assert sum(late) / len(late) == pytest.approx(target, abs=0.01)


@pytest.mark.parametrize("num_elements", [16_384, 2_096_640])
def test_sums_and_means_give_the_same_run(num_elements: int):
    """Errors summed over D numbers are D times their mean: beta is 1 / D of it, and no margin changes."""
    means = run(SteeredBeta(), scale=1.0, steps=100)
    sums = run(SteeredBeta(), scale=float(num_elements), steps=100)
    for (beta, factor), (summed_beta, summed_factor) in zip(means, sums, strict=True):
        assert summed_beta * num_elements == pytest.approx(beta, rel=1e-9)
        assert summed_factor == pytest.approx(factor, rel=1e-9)


def test_the_unfolded_factor_could_not_be_steered():
    """Right about 58 % of pairs, the mean of sigmoid(-margin) is above 0.4 for every beta: 0.2 is out of reach."""
    gaps = fraction_right(10_000, 0)
    means = [torch.sigmoid(beta / 2 * gaps).mean().item() for beta in (1e2, 1e4, 1e6, 1e8)]
    assert min(means) > 0.4


# Processes and resume ---------------------------------------------------------------------------------------


def test_processes_agree_on_beta_when_fed_with_the_mean_of_all():
    """Two processes with two pairs each, and one with all four, take the same step; their own means differ."""
    margins = torch.tensor([0.1, -3.0, 2.0, 0.5], dtype=torch.float64)
    mine, other = folded(margins[:2]), folded(margins[2:])
    together = steer(SteeredBeta(), STATE, (mine + other) / 2)
    assert together.value == pytest.approx(steer(SteeredBeta(), STATE, folded(margins)).value, rel=1e-12)
    assert steer(SteeredBeta(), STATE, mine).value != steer(SteeredBeta(), STATE, other).value


@given(before=st.lists(factors, max_size=10), after=st.lists(factors, max_size=10))
def test_beta_goes_on_after_a_resume_as_if_it_had_not_stopped(before: list[float], after: list[float]):
    settings, straight = SteeredBeta(num_steps=12), start_beta(SteeredBeta(), 0.3)
    for factor in before:
        straight = steer(settings, straight, factor)
    resumed = BetaState(**json.loads(json.dumps(asdict(straight))))
    assert resumed == straight
    for factor in after:
        straight, resumed = steer(settings, straight, factor), steer(settings, resumed, factor)
    assert resumed == straight


# Refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [math.nan, -0.01, 0.51])
def test_a_factor_that_cannot_be_is_refused(factor: float):
    with pytest.raises(ValueError, match="factor: expected"):
        steer(SteeredBeta(), STATE, factor)


@pytest.mark.parametrize("error", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize("settings", [FixedBeta(), SteeredBeta()])
def test_an_error_of_the_reference_that_cannot_be_is_refused(settings: FixedBeta | SteeredBeta, error: float):
    with pytest.raises(ValueError, match="mean error of the reference"):
        start_beta(settings, error)


@pytest.mark.parametrize(("strength", "unit"), [(math.nan, 1.0), (1.0, 0.0), (math.inf, 1.0)])
def test_a_damaged_state_is_refused(strength: float, unit: float):
    with pytest.raises(ValueError, match="of beta: expected a positive finite"):
        BetaState(strength=strength, unit=unit)


@pytest.mark.parametrize("override", ["start=1", "least=1e6", "most=1", "target=0.5", "target=0", "rate=0"])
def test_settings_that_cannot_be_are_refused(override: str):
    with pytest.raises(ConfigError):
        load(SteeredBeta, None, [override])
