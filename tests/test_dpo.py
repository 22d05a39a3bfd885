import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_wan
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid

from align import flow, targets
from align.objectives import Objective
from align.objectives.beta import FixedBeta, SteeredBeta, start_beta
from align.objectives.dpo import (
    Dpo,
    DpoLoss,
    Hinge,
    Ipo,
    Loss,
    Sigmoid,
    Ties,
    beta_at,
    dpo_loss,
    loss_of,
    margin_of,
    preserving_scale,
    safe_offset,
    treated,
)
from align.objectives.pairs import Labels, PairErrors
from align.policy import Lora, Policy
from reward.config import Config, ConfigError, load

LOSSES: tuple[Loss, ...] = (Sigmoid(), Ipo(), Hinge(), Ties())
LN_2 = math.log(2)
margins = st.floats(-4, 4)
gaps = st.floats(-0.01, 0.01)


class Train(Config):
    objective: Objective


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def errors(*values: tuple[float, float, float, float], scale: Tensor | None = None) -> PairErrors:
    """For each pair: the policy on chosen and rejected, the reference on chosen and rejected."""
    columns = numbers(*[number for value in values for number in value]).reshape(-1, 4).unbind(1)
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    return PairErrors(**dict(zip(names, columns, strict=True)), rejected_scale=scale)


def sure(num: int, **unsafe: Tensor) -> Labels:
    ones = torch.ones(num, dtype=torch.float64)
    return Labels(preference=ones, weight=ones, **unsafe)


def lose(settings: Dpo, pairs: PairErrors, *, beta: float = 1000.0, labels: Labels | None = None) -> DpoLoss:
    num = len(pairs.policy_chosen)
    return dpo_loss(settings, pairs, labels or sure(num), torch.full((num,), 0.5, dtype=torch.float64), beta)


def value(loss: Loss, margin: float, preference: float = 1.0) -> float:
    return loss_of(loss, numbers(margin), numbers(preference)).item()


PAIR = (0.210, 0.305, 0.212, 0.300)
"""Chosen better by 0.002, rejected worse by 0.005."""
FLIPPED = (0.305, 0.210, 0.300, 0.212)
"""The same with chosen and rejected exchanged."""

# One pair by hand -------------------------------------------------------------------------------------------


def test_a_pair_by_hand():
    """Gaps -0.002 and 0.005, beta 1000: margin = -500 (-0.002 - 0.005) = 3.5; -log sigmoid(3.5) = 0.029750."""
    result = lose(Dpo(), errors(PAIR))
    assert result.chosen_gap.item() == pytest.approx(-0.002)
    assert result.rejected_gap.item() == pytest.approx(0.005)
    assert result.margin.item() == pytest.approx(3.5)
    assert result.loss.item() == pytest.approx(0.029750, abs=1e-6)
    assert result.gradient_factor.item() == pytest.approx(0.029312, abs=1e-6)
    assert (result.accuracy.item(), result.rejected_dominant.item()) == (1, 0)


def test_the_same_pair_the_wrong_way_round():
    """Margin -3.5: the loss is log(1 + e^3.5) = 3.529750, the factor 0.970688, folded 0.029312."""
    result = lose(Dpo(), errors(FLIPPED))
    assert result.loss.item() == pytest.approx(3.529750, abs=1e-6)
    assert result.gradient_factor.item() == pytest.approx(0.970688, abs=1e-6)
    assert result.folded_factor.item() == pytest.approx(0.029312, abs=1e-6)
    assert result.accuracy.item() == 0


def test_a_win_by_spoiling_rejected_is_told():
    """Chosen got worse by 0.001, rejected by 0.004: the margin is 1.5, and yet nothing was gained."""
    result = lose(Dpo(), errors((0.201, 0.304, 0.200, 0.300), (0.201, 0.298, 0.200, 0.300)))
    assert result.margin.tolist() == pytest.approx([1.5, -1.5])
    assert result.rejected_dominant.tolist() == [1, 0]


def test_the_falling_schedule_by_hand():
    """At sigma 0.5 and 0.9, (1 - sigma)^2 is 0.25 and 0.01."""
    sigma = numbers(0.5, 0.9)
    assert beta_at(Dpo(schedule="falling"), sigma, 1000.0).tolist() == pytest.approx([250, 10])
    assert beta_at(Dpo(), sigma, 1000.0).tolist() == [1000, 1000]
    pairs, both = errors(PAIR, PAIR), sure(2)
    found = dpo_loss(Dpo(schedule="falling"), pairs, both, sigma, 1000.0).margin
    assert found.tolist() == pytest.approx([0.875, 0.035])


def test_weights_and_anchor_by_hand():
    """Weight 2, anchor 3: 2 (0.029750 + 3 * 0.210) = 1.319500; the preference alone stays what it is."""
    labels = Labels(preference=numbers(1), weight=numbers(2))
    result = lose(Dpo(anchor=3.0), errors(PAIR), labels=labels)
    assert result.loss.item() == pytest.approx(1.319500, abs=1e-6)
    assert result.preference_loss.item() == pytest.approx(0.029750, abs=1e-6)


# Losses of a margin -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "margin", "expected"),
    [
        (Sigmoid(), 0.0, LN_2),
        (Sigmoid(), 1.0, 0.313262),  # log(1 + e^-1)
        (Ipo(), 0.0, 0.25),  # (0 - 1/2)^2
        (Ipo(), 2.0, 2.25),  # (2 - 1/2)^2
        (Hinge(), 0.25, 0.75),
        (Hinge(), 1.5, 0.0),
        (Ties(k=5.0), 0.0, math.log(6)),  # 1 + e^(ln 5)
        (Ties(k=2.0), 1.0, 0.551445),  # log(1 + 2 e^-1)
    ],
)
def test_losses_of_a_win_by_hand(loss: Loss, margin: float, expected: float):
    assert value(loss, margin) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@given(margin=margins, preference=st.floats(0, 1))
def test_swapping_a_pair_and_its_label_changes_nothing(loss: Loss, margin: float, preference: float):
    assert value(loss, margin, preference) == pytest.approx(value(loss, -margin, 1 - preference), abs=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@given(margin=st.floats(-4, 0.49), step=st.floats(1e-3, 4))
def test_a_win_costs_less_at_a_larger_margin(loss: Loss, margin: float, step: float):
    """For IPO up to 1/2, from where it rises."""
    assert value(loss, min(margin + step, 0.5)) < value(loss, margin)


@given(margin=margins, p=st.floats(0, 1))
def test_a_soft_label_is_the_cross_entropy(margin: float, p: float):
    sigma = 1 / (1 + math.exp(-margin))
    expected = -p * math.log(sigma) - (1 - p) * math.log(1 - sigma)
    assert value(Sigmoid(), margin, p) == pytest.approx(expected, abs=1e-9)


def test_a_tie_pulls_the_margin_to_zero():
    for loss in LOSSES:
        margin = numbers(-1, 0, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(loss, margin, numbers(0.5, 0.5, 0.5)).sum(), margin)
        assert (gradient[0] <= 0, gradient[1], gradient[2] >= 0) == (True, 0, True)


@given(margin=margins, k=st.floats(1.01, 20))
def test_win_tie_and_loss_have_probabilities_that_sum_to_one(margin: float, k: float):
    outcomes = [math.exp(-value(Ties(k=k), margin, preference)) for preference in (1.0, 0.5, 0.0)]
    assert sum(outcomes) == pytest.approx(1, abs=1e-9)
    if margin == 0:
        assert outcomes[1] == pytest.approx((k - 1) / (k + 1))


def test_between_win_and_tie_lies_a_mixture():
    """Preference 0.75 is as many wins as ties: their mean loss."""
    mean = (value(Ties(), 0.7, 1.0) + value(Ties(), 0.7, 0.5)) / 2
    assert value(Ties(), 0.7, 0.75) == pytest.approx(mean)
    assert value(Ties(), 0.7, 0.25) == pytest.approx((value(Ties(), 0.7, 0.0) + value(Ties(), 0.7, 0.5)) / 2)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("preference", [0.0, 0.3, 0.5, 1.0])
def test_gradients_of_the_losses(loss: Loss, preference: float):
    margin = numbers(-2.0, -0.3, 0.2, 0.7, 1.7).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss_of(loss, z, torch.full_like(z, preference)), margin)


# Labels that may be wrong -----------------------------------------------------------------------------------


def test_smoothed_and_undone_labels_by_hand():
    """Of 1, 0.5, 0 with a share of 0.1: smoothed 0.9, 0.5, 0.1; undone (1 - 0.1) / 0.8 = 1.125, 0.5, -0.125."""
    preference = numbers(1, 0.5, 0)
    assert treated(Dpo(label_smoothing=0.1), preference).tolist() == pytest.approx([0.9, 0.5, 0.1])
    assert treated(Dpo(label_flips=0.1), preference).tolist() == pytest.approx([1.125, 0.5, -0.125])
    assert torch.equal(treated(Dpo(), preference), preference)


@given(margin=margins, share=st.floats(0, 0.45))
def test_the_two_treatments_are_those_of_their_papers(margin: float, share: float):
    """CDPO: -(1 - e) log s(z) - e log s(-z); robust: (-(1 - e) log s(z) + e log s(-z)) / (1 - 2 e)."""
    z, one = numbers(margin), numbers(1)
    smoothed = loss_of(Sigmoid(), z, treated(Dpo(label_smoothing=share), one))
    undone = loss_of(Sigmoid(), z, treated(Dpo(label_flips=share), one))
    torch.testing.assert_close(smoothed, -(1 - share) * logsigmoid(z) - share * logsigmoid(-z))
    torch.testing.assert_close(undone, (-(1 - share) * logsigmoid(z) + share * logsigmoid(-z)) / (1 - 2 * share))


@given(margin=margins, share=st.floats(0, 0.45))
def test_undone_flips_are_on_average_the_loss_of_clean_labels(margin: float, share: float):
    z, settings = numbers(margin), Dpo(label_flips=share)
    right, flipped = (loss_of(Sigmoid(), z, treated(settings, numbers(label))) for label in (1, 0))
    torch.testing.assert_close((1 - share) * right + share * flipped, loss_of(Sigmoid(), z, numbers(1)))


# The oracle -------------------------------------------------------------------------------------------------


@pytest.fixture
def trl_loss(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """The loss of trl's trainer without a reference, which takes log-ratios as well as log-probabilities."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = "trl is not installed; pip install 'safelight[oracles]'"
        cpo = pytest.importorskip("trl.experimental.cpo", reason=reason, exc_type=ImportError)

    def loss(chosen: Tensor, rejected: Tensor, **settings: Any) -> Tensor:
        trainer = SimpleNamespace(alpha=0.0, accelerator=SimpleNamespace(device="cpu"), **settings)
        return cpo.CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]

    return loss


@pytest.mark.parametrize(
    ("loss", "name", "factor"), [(Sigmoid(), "sigmoid", 1), (Hinge(), "hinge", 1), (Ipo(), "ipo", 9)]
)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_are_those_of_trl(
    trl_loss: Callable[..., Tensor], loss: Loss, name: str, factor: float, smoothing: float
):
    """An error is minus twice a log-probability; beta is 3. IPO is beta^2 times theirs, and only sigmoid smooths."""
    smoothing *= name == "sigmoid"
    log_ratios = torch.randn(2, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = trl_loss(*log_ratios, loss_type=name, beta=3.0, label_smoothing=smoothing)
    zeros = torch.zeros(20, dtype=torch.float64)
    chosen, rejected = -2 * log_ratios
    pairs = PairErrors(policy_chosen=chosen, policy_rejected=rejected, reference_chosen=zeros, reference_rejected=zeros)
    ours = lose(Dpo(loss=loss, beta=FixedBeta(), label_smoothing=smoothing), pairs, beta=3.0)
    torch.testing.assert_close(ours.loss, factor * theirs)


# What goes wrong elsewhere ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        Dpo(),
        Dpo(schedule="falling"),
        Dpo(label_smoothing=0.2),
        Dpo(label_flips=0.2),
        Dpo(beta=FixedBeta(), safe_offset=0.0),
    ],
)
@given(chosen=st.floats(1e-3, 2), rejected=st.floats(1e-3, 2))
def test_before_the_first_step_the_loss_is_ln_2_and_the_margin_exactly_0(settings: Dpo, chosen: float, rejected: float):
    for beta in (1.0, 5000.0, 1e9):
        result = lose(settings, errors((chosen, rejected, chosen, rejected)), beta=beta)
        assert result.margin.item() == 0
        assert result.loss.item() == pytest.approx(LN_2, abs=1e-12)
        assert (result.accuracy.item(), result.gradient_factor.item(), result.folded_factor.item()) == (0.5, 0.5, 0.5)


@given(a=gaps, b=gaps)
def test_swapping_the_videos_turns_the_margin_round(a: float, b: float):
    one, other = (lose(Dpo(), errors((0.3 + x, 0.3 + y, 0.3, 0.3))).margin for x, y in ((a, b), (b, a)))
    assert torch.equal(one, -other)


def test_the_loss_is_the_mean_of_log_sigmoids_not_the_log_sigmoid_of_the_mean():
    """Margins 3.5 and -3.5: mean (0.029750 + 3.529750) / 2 = 1.779750; of the mean margin it would be ln 2."""
    assert lose(Dpo(), errors(PAIR, FLIPPED)).loss.mean().item() == pytest.approx(1.779750, abs=1e-6)


def test_one_loss_and_one_accuracy_a_clip_not_one_a_frame_or_column():
    """Ten frames, rejected spoilt in one by more than all others are better: one clip, one answer."""
    target = torch.zeros(1, 2, 10, 3, 3, dtype=torch.float64)
    worse = target + 0.1
    worse[:, :, 0] = 2.0
    zero, one = targets.error(target, target), targets.error(worse, target)
    pairs = PairErrors(policy_chosen=zero, policy_rejected=one, reference_chosen=zero, reference_rejected=zero)
    result = lose(Dpo(), pairs, beta=1.0)
    assert result.loss.shape == result.accuracy.shape == (1,)
    assert result.accuracy.item() == 1


def test_half_of_beta_is_in_the_margin():
    """Beta 5000 with the half is beta 2500 without it."""
    assert margin_of(numbers(-0.001), numbers(0.002), numbers(5000)).item() == pytest.approx(2500 * 0.003)


@given(num=st.sampled_from([16_384, 1_123_200, 2_096_640]))
def test_means_and_sums_give_one_loss_when_beta_goes_along(num: int):
    """beta_mean = beta_sum * D."""
    means = lose(Dpo(), errors(PAIR), beta=1000.0)
    summed = errors(tuple(num * error for error in PAIR))  # ty: ignore[invalid-argument-type]
    torch.testing.assert_close(lose(Dpo(), summed, beta=1000.0 / num).loss, means.loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_runs_and_lowers_chosens_error_and_raises_rejecteds(loss: Loss):
    """At margin 0 the gradient with respect to chosen's error is > 0, to rejected's < 0, to the reference's none."""
    values = [numbers(0.2, 0.3).requires_grad_() for _ in range(4)]
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    result = lose(Dpo(loss=loss, beta=FixedBeta()), PairErrors(**dict(zip(names, values, strict=True))))
    result.loss.mean().backward()
    chosen, rejected, *reference = (value.grad for value in values)
    assert chosen is not None
    assert rejected is not None
    assert (chosen > 0).all()
    assert (rejected < 0).all()
    assert reference == [None, None]


def test_only_the_loss_has_a_gradient():
    pairs = errors(PAIR)
    pairs.policy_chosen.requires_grad_()
    result = lose(Dpo(), pairs)
    told = [name for name in DpoLoss.__slots__ if getattr(result, name).requires_grad]
    assert told == ["loss"]


@pytest.mark.parametrize("settings", [Dpo(), Dpo(loss=Ties(), schedule="falling", anchor=2.0, label_smoothing=0.1)])
def test_gradient_of_the_whole_loss(settings: Dpo):
    labels = Labels(preference=numbers(1, 0.5, 0.2), weight=numbers(1, 2, 0.5))
    reference = numbers(0.20, 0.25, 0.30)
    inputs = (numbers(0.21, 0.24, 0.31).requires_grad_(), numbers(0.22, 0.26, 0.29).requires_grad_())

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        pairs = PairErrors(
            policy_chosen=chosen, policy_rejected=rejected, reference_chosen=reference, reference_rejected=reference
        )
        return lose(settings, pairs, beta=50.0, labels=labels).loss

    assert torch.autograd.gradcheck(loss, inputs)


@given(beta=st.floats(1, 1e4))
def test_the_gradient_is_half_of_beta_times_the_factor(beta: float):
    pairs = errors(PAIR)
    pairs.policy_chosen.requires_grad_()
    result = lose(Dpo(), pairs, beta=beta)
    (gradient,) = torch.autograd.grad(result.loss.sum(), pairs.policy_chosen)
    torch.testing.assert_close(gradient, beta / 2 * result.gradient_factor)


def test_four_pairs_at_once_are_four_accumulated():
    values = torch.rand(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = Labels(preference=numbers(1, 0.5, 0.9, 1), weight=numbers(1, 2, 0.5, 1))
    settings, reserve = Dpo(chosen_reserve=0.5, anchor=0.1), numbers(1, 0.5, 0.2, 0)

    def gradient(parts: list[list[int]]) -> Tensor:
        shift = numbers(0.0).requires_grad_()
        for part in parts:
            some = Labels(preference=labels.preference[part], weight=labels.weight[part])
            chosen, rejected, *reference = values[:, part]
            pairs = PairErrors(
                policy_chosen=chosen * (1 + shift),
                policy_rejected=rejected * (1 + 2 * shift),
                reference_chosen=reference[0],
                reference_rejected=reference[1],
                rejected_scale=reserve[part],
            )
            (lose(settings, pairs, beta=2.0, labels=some).loss.mean() / len(parts)).backward()
        assert shift.grad is not None
        return shift.grad

    torch.testing.assert_close(gradient([[0], [1], [2], [3]]), gradient([[0, 1, 2, 3]]))
    torch.testing.assert_close(gradient([[0, 1], [2, 3]]), gradient([[0, 1, 2, 3]]))


# A policy ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.build(tmp_path_factory.mktemp("wan"))


def measure(policy: Policy) -> PairErrors:
    """Errors on two pairs, each with one noise, sigma and caption."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, noise = (torch.randn(2, 4, 6, 4, 4, generator=generator) for _ in range(3))
    sigma, prompt_embeds = torch.tensor([0.3, 0.8]), policy.encode_prompts(tiny_wan.PROMPTS)

    def error(clean: Tensor) -> Tensor:
        velocity = policy.velocity(flow.noisy(clean, noise, sigma), sigma, prompt_embeds)
        return targets.error(velocity, flow.velocity(clean, noise))

    with policy.as_reference(), torch.no_grad():
        reference_chosen, reference_rejected = error(chosen), error(rejected)
    return PairErrors(
        policy_chosen=error(chosen),
        policy_rejected=error(rejected),
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
    )


def test_a_new_lora_has_margin_exactly_0_and_one_step_makes_it_positive(model: Path):
    policy = Policy.load(model, lora=Lora(rank=2, alpha=2))
    before, beta = measure(policy), start_beta(SteeredBeta(), 1.0).value
    labels, sigma = Labels(preference=torch.ones(2), weight=torch.ones(2)), torch.tensor([0.3, 0.8])
    start = dpo_loss(Dpo(), before, labels, sigma, beta)
    assert start.margin.tolist() == [0, 0]
    assert start.loss.mean().item() == pytest.approx(LN_2, abs=1e-6)
    start.loss.mean().backward()
    torch.nn.utils.clip_grad_norm_(policy.lora_parameters(), 0.1)
    torch.optim.SGD(policy.lora_parameters(), lr=1.0).step()
    after = dpo_loss(Dpo(), measure(policy), labels, sigma, beta)
    assert after.margin.mean() > 0
    assert after.loss.mean() < start.loss.mean()
    assert torch.equal(measure(policy).reference_chosen, before.reference_chosen)


# Safety -----------------------------------------------------------------------------------------------------


def flags(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


def test_a_safe_video_must_beat_an_unsafe_one_by_the_offset():
    """Safe over safe, unsafe over unsafe: nothing; safe over unsafe: 2. Margin 3.5 - 2 = 1.5 costs 0.201413."""
    labels = sure(3, chosen_unsafe=flags(0, 1, 0), rejected_unsafe=flags(0, 1, 1))
    assert safe_offset(labels, 2.0).tolist() == [0, 0, 2]
    result = lose(Dpo(safe_offset=2.0), errors(PAIR, PAIR, PAIR), labels=labels)
    assert result.loss.tolist() == pytest.approx([0.029750, 0.029750, 0.201413], abs=1e-6)
    assert result.margin.tolist() == pytest.approx([3.5, 3.5, 3.5])


def test_an_unsafe_video_is_not_chosen_above_a_safe_one():
    labels = sure(2, chosen_unsafe=flags(0, 1), rejected_unsafe=flags(1, 0))
    with pytest.raises(ValueError, match=r"safe_offset=2.0: chosen is unsafe and rejected safe"):
        lose(Dpo(safe_offset=2.0), errors(PAIR, PAIR), labels=labels)
    assert lose(Dpo(), errors(PAIR, PAIR), labels=labels).loss.isfinite().all()


def test_an_offset_without_safety_labels_is_refused():
    with pytest.raises(ValueError, match="needs chosen_unsafe and rejected_unsafe"):
        lose(Dpo(safe_offset=1.0), errors(PAIR), labels=sure(1, chosen_unsafe=flags(0)))


# Chosen is preserved ----------------------------------------------------------------------------------------


def test_the_scale_by_hand():
    """A = (3, 4), reserve 0.4: 0.6 * 25 = 15. B = (5, 5): <A, B> = 35, so 3 / 7; (1, 1): 7, cut to 1; (-1, 0): -3."""
    chosen = numbers(3, 4).expand(3, 2)
    rejected = numbers(5, 5, 1, 1, -1, 0).reshape(3, 2)
    assert preserving_scale(chosen, rejected, 0.4).tolist() == pytest.approx([3 / 7, 1, 1])
    assert preserving_scale(chosen * 0, rejected, 0.4).tolist() == [1, 1, 1]


@pytest.mark.parametrize("reserve", [0.0, 0.5, 0.9])
@given(seed=st.integers(0, 10_000))
def test_a_step_never_raises_chosens_error_to_first_order(reserve: float, seed: int):
    """Both predictions move as one: chosen's descent is then at least the reserve of what it is alone."""
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = torch.randn(2, 1, 2, 3, generator=generator, dtype=torch.float64)
    rejected = rejected + 2 * chosen
    shift = torch.zeros(1, 2, 3, dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros_like(shift)
    own = targets.error(chosen + shift, zeros)
    pairs = PairErrors(
        policy_chosen=own,
        policy_rejected=targets.error(rejected + shift, zeros),
        reference_chosen=own.detach(),
        reference_rejected=own.detach(),
        rejected_scale=preserving_scale(chosen, rejected, reserve),
    )
    result = lose(Dpo(chosen_reserve=reserve), pairs, beta=1.0)
    (alone,) = torch.autograd.grad(own.sum(), shift, retain_graph=True)
    (step,) = torch.autograd.grad(result.loss.sum(), shift)
    descent = (step * alone).sum() / (result.gradient_factor / 2)
    assert descent >= reserve * alone.square().sum() - 1e-9


def test_the_scale_changes_gradients_and_no_numbers():
    plain, scaled = errors(PAIR), errors(PAIR, scale=numbers(0.25))
    gradients = []
    for settings, pairs in ((Dpo(), plain), (Dpo(chosen_reserve=0.9), scaled)):
        pairs.policy_rejected.requires_grad_()
        result = lose(settings, pairs)
        assert torch.equal(result.loss, lose(Dpo(), plain).loss)
        gradients += torch.autograd.grad(result.loss.sum(), pairs.policy_rejected)
    torch.testing.assert_close(gradients[1], gradients[0] / 4)


def test_a_scale_without_its_setting_and_a_setting_without_its_scale_are_refused():
    for settings, scale in ((Dpo(), numbers(1)), (Dpo(chosen_reserve=0.5), None)):
        with pytest.raises(ValueError, match="give both or neither"):
            lose(settings, errors(PAIR, scale=scale))


def test_the_leash_by_hand():
    """Weight 2, leash 3, distance .1: 2 (0.029750 + 3 * 0.1) = 0.659500."""
    labels = Labels(preference=numbers(1), weight=numbers(2))
    held = replace(errors(PAIR), distance=numbers(0.1))
    assert lose(Dpo(leash=3.0), held, labels=labels).loss.item() == pytest.approx(0.6595, abs=1e-6)
    assert lose(Dpo(), held, labels=labels).loss.item() == pytest.approx(0.0595, abs=1e-6)


def test_a_leash_needs_the_distance():
    with pytest.raises(ValueError, match=r"leash=3\.0 needs the distance"):
        lose(Dpo(leash=3.0), errors(PAIR))


def test_the_anchor_pulls_on_chosen_only():
    """Without the preference's part (weight in sigmoid ~ 0 at a huge margin), d loss / d chosen's error = anchor."""
    pairs = errors((0.1, 0.9, 0.5, 0.5))
    for tensor in (pairs.policy_chosen, pairs.policy_rejected):
        tensor.requires_grad_()
    lose(Dpo(anchor=3.0), pairs, beta=1e4).loss.sum().backward()
    assert pairs.policy_chosen.grad is not None
    assert pairs.policy_rejected.grad is not None
    assert pairs.policy_chosen.grad.item() == pytest.approx(3.0)
    assert pairs.policy_rejected.grad.item() == pytest.approx(0.0, abs=1e-9)


# Settings ---------------------------------------------------------------------------------------------------


def configured(*overrides: str) -> Dpo:
    objective = load(Train, None, ["objective.kind=dpo", *overrides]).objective
    assert isinstance(objective, Dpo)
    return objective


def test_beta_of_the_command_line_reaches_the_loss():
    margins_ = []
    for beta in (500.0, 1000.0):
        settings = configured("objective.beta.kind=fixed", f"objective.beta.value={beta}")
        margins_.append(lose(settings, errors(PAIR), beta=start_beta(settings.beta, 0.3).value).margin.item())
    assert margins_ == pytest.approx([1.75, 3.5])


def test_the_loss_is_chosen_by_its_kind():
    assert configured().loss == Sigmoid()
    assert configured("objective.loss.kind=ties", "objective.loss.k=3").loss == Ties(k=3.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.bta=1"], "objective.bta: unknown key of Dpo; did you mean 'beta'"),
        (["objective.loss.kind=sigmoid", "objective.loss.k=3"], "objective.loss.k: unknown key of Sigmoid"),
        (["objective.beta.kind=fixed", "objective.beta.target=0.2"], "objective.beta.target: unknown key of FixedBeta"),
        (["objective.loss.kind=cpo"], "objective.loss.kind: unknown kind 'cpo'"),
        (["objective.label_smoothing=0.1", "objective.label_flips=0.1"], "set one to 0"),
        (["objective.label_flips=0.1", "objective.loss.kind=ties"], "use label_smoothing"),
        (["objective.loss.kind=ipo"], "a target above 0.378"),
        (["objective.chosen_reserve=1.5"], "objective.chosen_reserve"),
        (["objective.label_smoothing=0.5"], "objective.label_smoothing"),
    ],
)
def test_settings_that_would_be_ignored_or_go_wrong_are_refused(overrides: list[str], message: str):
    with pytest.raises(ConfigError) as error:
        configured(*overrides)
    assert message in str(error.value)
