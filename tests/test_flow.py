import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from align import flow

SHAPE = (3, 4, 2, 2, 2)
between = st.floats(0.01, 0.99)
shifts = st.floats(0.2, 8.0)


def latents(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sigmas(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def filled(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1, 1), value, dtype=torch.float64)


# The path ---------------------------------------------------------------------------------------------------


def test_a_quarter_of_the_way_to_noise():
    """clean 8, noise -4, sigma 1/4: noisy = 3/4 * 8 + 1/4 * -4 = 5; velocity = -4 - 8 = -12."""
    assert flow.noisy(filled(8.0), filled(-4.0), sigmas(0.25)).item() == 5.0
    assert flow.velocity(filled(8.0), filled(-4.0)).item() == -12.0


def test_sigma_zero_is_the_clean_video_and_one_is_the_noise():
    clean, noise = latents(0), latents(1)
    torch.testing.assert_close(flow.noisy(clean, noise, sigmas(0, 0, 0)), clean, rtol=0, atol=0)
    torch.testing.assert_close(flow.noisy(clean, noise, sigmas(1, 1, 1)), noise, rtol=0, atol=0)


def test_each_sample_has_its_own_sigma():
    clean, noise = latents(0), latents(1)
    mixed = flow.noisy(clean, noise, sigmas(0.0, 0.5, 1.0))
    torch.testing.assert_close(mixed, torch.stack([clean[0], (clean[1] + noise[1]) / 2, noise[2]]))


def test_noisy_is_diffusers_scale_noise():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    timesteps = scheduler.timesteps[[10, 500, 900]]
    theirs = scheduler.scale_noise(latents(0).float(), timesteps, latents(1).float())
    ours = flow.noisy(latents(0).float(), latents(1).float(), timesteps / 1000)
    torch.testing.assert_close(ours, theirs)


@given(a=between, b=between, c=between)
def test_velocity_leads_back_to_both_ends(a: float, b: float, c: float):
    clean, noise, sigma = latents(0), latents(1), sigmas(a, b, c)
    noisy, velocity = flow.noisy(clean, noise, sigma), flow.velocity(clean, noise)
    torch.testing.assert_close(flow.clean_from_velocity(noisy, velocity, sigma), clean)
    torch.testing.assert_close(flow.noise_from_velocity(noisy, velocity, sigma), noise)


@given(sigma=between)
def test_errors_of_clean_and_noise_are_scaled_errors_of_velocity(sigma: float):
    """|clean - guess|^2 = sigma^2 |v - v'|^2 and |noise - guess|^2 = (1 - sigma)^2 |v - v'|^2."""
    s, clean, noise, wrong = sigmas(sigma, sigma, sigma), latents(0), latents(1), latents(2)
    noisy = flow.noisy(clean, noise, s)
    velocity_error = (wrong - flow.velocity(clean, noise)).square().sum()
    clean_error = (flow.clean_from_velocity(noisy, wrong, s) - clean).square().sum()
    noise_error = (flow.noise_from_velocity(noisy, wrong, s) - noise).square().sum()
    torch.testing.assert_close(clean_error, sigma**2 * velocity_error)
    torch.testing.assert_close(noise_error, (1 - sigma) ** 2 * velocity_error)


def test_velocity_is_the_derivative_of_noisy():
    step = 1e-6
    clean, noise, sigma = latents(0), latents(1), sigmas(0.2, 0.5, 0.8)
    slope = (flow.noisy(clean, noise, sigma + step) - flow.noisy(clean, noise, sigma)) / step
    torch.testing.assert_close(slope, flow.velocity(clean, noise), rtol=1e-6, atol=1e-6)


def test_a_shape_without_frames_is_refused():
    with pytest.raises(Exception, match="clean"):
        flow.velocity(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))


# Sigmas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_schedule_is_that_of_diffusers(num_steps: int, shift: float):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    torch.testing.assert_close(flow.schedule(num_steps, shift), scheduler.sigmas, rtol=1e-6, atol=0)


@given(num_steps=st.integers(1, 60), shift=shifts)
def test_schedule_falls_from_one_to_zero(num_steps: int, shift: float):
    ours = flow.schedule(num_steps, shift)
    assert (ours[0].item(), ours[-1].item()) == (1.0, 0.0)
    assert (ours.diff() < 0).all()


def test_shift_three_turns_a_half_into_three_quarters():
    """3 * 0.5 / (1 + 2 * 0.5) = 0.75."""
    torch.testing.assert_close(flow.shifted(sigmas(0.0, 0.5, 1.0), 3.0), sigmas(0.0, 0.75, 1.0))


@given(sigma=between, first=shifts, second=shifts)
def test_shifts_multiply_and_have_inverses(sigma: float, first: float, second: float):
    once = flow.shifted(flow.shifted(sigmas(sigma), first), second)
    torch.testing.assert_close(once, flow.shifted(sigmas(sigma), first * second))
    torch.testing.assert_close(
        flow.shifted(flow.shifted(sigmas(sigma), first), 1 / first), sigmas(sigma), rtol=1e-9, atol=0
    )


# Steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_steps_are_those_of_diffusers(shift: float):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(6)
    ours = theirs = latents(0).float()
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = torch.tanh(theirs) + index
        theirs = scheduler.step(velocity, timestep, theirs, return_dict=False)[0]
        ours = flow.euler_step(ours, velocity, scheduler.sigmas[index].expand(3), scheduler.sigmas[index + 1].expand(3))
        torch.testing.assert_close(ours, theirs)


@given(sigma=between, share=st.floats(0.0, 0.99))
def test_the_true_velocity_needs_one_step_only(sigma: float, share: float):
    clean, noise = latents(0), latents(1)
    start, end = sigmas(sigma, sigma, sigma), sigmas(*[sigma * share] * 3)
    stepped = flow.euler_step(flow.noisy(clean, noise, start), flow.velocity(clean, noise), start, end)
    torch.testing.assert_close(stepped, flow.noisy(clean, noise, end))


def test_a_random_step_by_hand():
    """t = 0.5, dt = -0.1, eta = 0.5, noisy 2, velocity 3.

    g^2 = 0.25 * 0.5 / 0.5 = 0.25; g^2 / (2 t) = 0.25; its product with 1 - t is 0.125.
    mean = 2 (1 - 0.025) + 3 * 1.125 * -0.1 = 1.95 - 0.3375 = 1.6125; std = sqrt(0.25 * 0.1) = 0.158114.
    """
    mean, std = flow.sde_step(filled(2.0), filled(3.0), sigmas(0.5), sigmas(0.4), 0.5)
    assert mean.item() == pytest.approx(1.6125, abs=1e-12)
    assert std.item() == pytest.approx(0.158114, abs=1e-6)


def test_the_first_random_step_from_pure_noise():
    """t = 1, next 0.9, eta = 1, noisy 2, velocity 3: 1 - t is replaced by 0.1 in g^2 only.

    g^2 = 1 / 0.1 = 10; mean = 2 (1 - 10 / 2 * 0.1) + 3 (1 + 0) * -0.1 = 1 - 0.3 = 0.7; std = sqrt(10 * 0.1).
    """
    mean, std = flow.sde_step(filled(2.0), filled(3.0), sigmas(1.0), sigmas(0.9), 1.0)
    assert mean.item() == pytest.approx(0.7, abs=1e-12)
    assert std.item() == pytest.approx(1.0, abs=1e-12)


@given(sigma=st.floats(0.05, 1.0), share=st.floats(0.0, 0.99))
def test_without_randomness_the_random_step_is_the_euler_step(sigma: float, share: float):
    start, end = sigmas(*[sigma] * 3), sigmas(*[sigma * share] * 3)
    mean, std = flow.sde_step(latents(0), latents(1), start, end, 0.0)
    torch.testing.assert_close(mean, flow.euler_step(latents(0), latents(1), start, end))
    assert std.abs().max().item() == 0


@pytest.mark.parametrize("sigma", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_the_random_step_keeps_the_spread_of_the_flow(sigma: float, spread: float):
    """Clean ~ N(0, spread^2): the noisy variance is V(t) = (1 - t)^2 spread^2 + t^2 and the true velocity is
    (t - (1 - t) spread^2) / V(t) times noisy. A step of dt must turn V(t) into V(t + dt), to first order.
    """
    dt = -1e-5

    def variance(t: float) -> float:
        return (1 - t) ** 2 * spread**2 + t**2

    slope = (sigma - (1 - sigma) * spread**2) / variance(sigma)
    mean, std = flow.sde_step(filled(1.0), filled(slope), sigmas(sigma), sigmas(sigma + dt), 0.7)
    stepped = mean.item() ** 2 * variance(sigma) + std.item() ** 2
    assert (stepped - variance(sigma)) / dt == pytest.approx((variance(sigma + dt) - variance(sigma)) / dt, abs=1e-3)


def test_gradients_of_the_steps():
    noisy, velocity = latents(0).requires_grad_(), latents(1).requires_grad_()
    start, end = sigmas(0.9, 0.6, 0.3), sigmas(0.6, 0.3, 0.0)
    assert torch.autograd.gradcheck(lambda x, v: flow.euler_step(x, v, start, end), (noisy, velocity))
    assert torch.autograd.gradcheck(lambda x, v: flow.sde_step(x, v, start, end, 0.7)[0], (noisy, velocity))
    assert torch.autograd.gradcheck(lambda x, v: flow.clean_from_velocity(x, v, start), (noisy, velocity))
