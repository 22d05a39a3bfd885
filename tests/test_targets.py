import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align import flow, targets
from align.targets import Kind

SHAPE = (3, 4, 2, 2, 2)
KINDS: tuple[Kind, ...] = ("velocity", "epsilon", "v")
between = st.floats(0.02, 0.98)


def latents(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def filled(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1, 1), value, dtype=torch.float64)


# Errors -----------------------------------------------------------------------------------------------------


def test_an_error_is_a_mean_of_squares():
    """Differences 1, 3, 0 and -2: (1 + 9 + 0 + 4) / 4 = 3.5."""
    prediction, target = numbers(2, 5, 1, 0).reshape(1, 4), numbers(1, 2, 1, 2).reshape(1, 4)
    assert targets.error(prediction, target).tolist() == [3.5]


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2, 2), (3, 4, 2, 2, 2)])
def test_any_number_of_axes_gives_one_error_a_clip_not_one_a_column(shape: tuple[int, ...]):
    errors = targets.error(latents(0, shape), latents(1, shape))
    assert errors.shape == (3,)
    expected = [(a - b).square().mean() for a, b in zip(latents(0, shape), latents(1, shape), strict=True)]
    torch.testing.assert_close(errors, torch.stack(expected))


def test_small_gaps_survive_half_precision():
    """1 + 1/128 is the next number after 1 in bfloat16; its square, 1.015686, is none. In float32 nothing is lost."""
    near = torch.full((1, 4), 1 + 1 / 128, dtype=torch.bfloat16)
    error = targets.error(near, torch.zeros_like(near))
    assert error.dtype == torch.float32
    assert error.item() == pytest.approx((129 / 128) ** 2, rel=1e-6)


def test_gradient_of_the_error():
    """d error / d prediction = 2 (prediction - target) / number."""
    prediction, target = latents(0).requires_grad_(), latents(1)
    assert torch.autograd.gradcheck(targets.error, (prediction, target))
    (gradient,) = torch.autograd.grad(targets.error(prediction, target).sum(), prediction)
    torch.testing.assert_close(gradient, 2 * (prediction - target) / 32)


# Schedules --------------------------------------------------------------------------------------------------


def test_a_schedule_by_hand():
    """sigma 3/7 mixes 4 parts of clean with 3 of noise: alpha_bar = 16 / (16 + 9) = 0.64, roots 0.8 and 0.6."""
    torch.testing.assert_close(targets.alpha_bar(numbers(3 / 7)), numbers(0.64))
    torch.testing.assert_close(targets.sigma_from(numbers(0.64)), numbers(3 / 7))
    assert targets.alpha_bar(numbers(0, 1)).tolist() == [1, 0]


@given(sigma=between)
def test_sigma_and_alpha_bar_lead_back_to_each_other(sigma: float):
    torch.testing.assert_close(targets.sigma_from(targets.alpha_bar(numbers(sigma))), numbers(sigma))


def test_preserving_variance_is_what_ddpm_adds():
    scheduler, steps = DDPMScheduler(), torch.tensor([5, 400, 990])
    share = scheduler.alphas_cumprod.double()[steps]
    sigma = targets.sigma_from(share)
    ours = targets.preserving_variance(flow.noisy(latents(0), latents(1), sigma), sigma)
    theirs = scheduler.add_noise(latents(0), latents(1), steps)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# Targets ----------------------------------------------------------------------------------------------------


def test_targets_by_hand():
    """clean 5, noise 10, sigma 3/7: velocity 10 - 5 = 5, epsilon 10, v = 0.8 * 10 - 0.6 * 5 = 5."""
    given_ = (filled(5.0), filled(10.0), numbers(3 / 7))
    found = [targets.target_for(kind, *given_).item() for kind in KINDS]
    assert found == pytest.approx([5.0, 10.0, 5.0])


def test_v_is_that_of_diffusers():
    scheduler, steps = DDPMScheduler(), torch.tensor([5, 400, 990])
    sigma = targets.sigma_from(scheduler.alphas_cumprod.double()[steps])
    theirs = scheduler.get_velocity(latents(0), latents(1), steps)
    torch.testing.assert_close(targets.target_for("v", latents(0), latents(1), sigma), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@given(sigma=between)
def test_the_true_answer_of_every_kind_is_the_true_velocity(kind: Kind, sigma: float):
    clean, noise, sigmas = latents(0), latents(1), numbers(sigma, sigma, sigma)
    target = targets.target_for(kind, clean, noise, sigmas)
    found = targets.velocity_from(kind, target, flow.noisy(clean, noise, sigmas), sigmas)
    torch.testing.assert_close(found, flow.velocity(clean, noise), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@given(sigma=between)
def test_errors_of_every_kind_are_scaled_errors_of_velocity(kind: Kind, sigma: float):
    """|epsilon error|^2 = (1 - sigma)^2 |velocity error|^2; for v the factor is (1 - sigma)^2 + sigma^2."""
    clean, noise, wrong, sigmas = latents(0), latents(1), latents(2), numbers(sigma, sigma, sigma)
    factors = {"velocity": 1, "epsilon": (1 - sigma) ** 2, "v": (1 - sigma) ** 2 + sigma**2}
    velocity = targets.velocity_from(kind, wrong, flow.noisy(clean, noise, sigmas), sigmas)
    of_velocity = targets.error(velocity, flow.velocity(clean, noise))
    own = targets.error(wrong, targets.target_for(kind, clean, noise, sigmas))
    torch.testing.assert_close(own, factors[kind] * of_velocity, rtol=1e-6, atol=1e-9)
