import math
from collections.abc import Callable
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_expit, logit
from torch import Tensor
from torch.nn import functional as F

from reward import losses

NAN, INF = math.nan, math.inf
LOG2, LOG3, LOG5 = math.log(2), math.log(3), math.log(5)
score = st.floats(-6, 6)
share = st.floats(0.02, 0.98)
thetas = st.floats(1.05, 20)


def numbers(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slope(loss: Tensor, at: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, at)
    return gradient


SCORES = normal(4, 2)
SHARES, OUTCOMES = numbers(1, 0, 0.3, NAN), numbers(1, 0, 0.5, NAN)
UNSAFE = numbers([1, 0], [0, 0], [1, NAN], [NAN, NAN])
TAGS, WEIGHTS = numbers([1, NAN], [0, 1], [1, 0], [NAN, NAN]), numbers(3.0, 0.5)

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "bradley_terry": lambda scores: losses.bradley_terry(scores, SHARES),
    "with one margin": lambda scores: losses.bradley_terry(scores, SHARES, 0.7),
    "with margins": lambda scores: losses.bradley_terry(scores, SHARES, numbers(0.2, 1, 0, 3)),
    "bradley_terry_ties": lambda scores: losses.bradley_terry_ties(scores, OUTCOMES, 3.0),
    "signed_cost": lambda scores: losses.signed_cost(scores, SHARES, UNSAFE, shrink=0.1),
    "safety_sign": lambda scores: losses.safety_sign(scores.flatten(), UNSAFE.flatten()),
    "harm_tags": lambda scores: losses.harm_tags(scores, TAGS, WEIGHTS),
    "centring": losses.centring,
    "shrinkage": losses.shrinkage,
}
of_pairs = pytest.mark.parametrize("name", ["bradley_terry", "with margins", "bradley_terry_ties", "signed_cost"])
unlabelled = ("centring", "shrinkage", "signed_cost")  # wholly, or for the shrinkage in it


# Labels -----------------------------------------------------------------------------------------------------


def test_labels_are_probabilities_and_none_is_not_known():
    labels = losses.as_labels([True, False, None, 0.25, 1])
    torch.testing.assert_close(labels, torch.tensor([1, 0, NAN, 0.25, 1]), equal_nan=True)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in unlabelled])
def test_what_is_not_known_gets_no_gradient(name: str):
    """Of every label above, the last row is not known."""
    scores = SCORES.clone().requires_grad_()
    assert slope(LOSSES[name](scores), scores)[3].tolist() == [0, 0]


@pytest.mark.parametrize("num_unknown", [1, 5])
def test_a_mean_divides_by_what_was_counted(num_unknown: int):
    unknown = torch.full((num_unknown,), NAN, dtype=torch.float64)
    scores, labels = torch.cat([SCORES[:3], normal(num_unknown, 2, seed=1)]), torch.cat([OUTCOMES[:3], unknown])
    for loss in (losses.bradley_terry, lambda s, p: losses.bradley_terry_ties(s, p, 2.0)):
        torch.testing.assert_close(loss(scores, labels), loss(SCORES[:3], OUTCOMES[:3]))
        torch.testing.assert_close(
            loss(scores, labels), torch.stack([loss(SCORES[i : i + 1], OUTCOMES[i : i + 1]) for i in range(3)]).mean()
        )
    tags = torch.cat([TAGS[1:3], torch.full((num_unknown, 2), NAN, dtype=torch.float64)])
    logits = torch.cat([SCORES[1:3], normal(num_unknown, 2, seed=1)])
    torch.testing.assert_close(
        losses.harm_tags(logits, tags, WEIGHTS), losses.harm_tags(SCORES[1:3], TAGS[1:3], WEIGHTS)
    )


@pytest.mark.parametrize("num", [0, 3])
def test_with_no_known_label_loss_and_gradients_are_zero(num: int):
    scores = torch.ones(num, 2, requires_grad=True)
    none = torch.full((num, 2), NAN)
    loss = losses.bradley_terry(scores, none[:, 0]) + losses.bradley_terry_ties(scores, none[:, 0], 2.0)
    loss = loss + losses.signed_cost(scores, none[:, 0], none, shrink=0.0)
    loss = loss + losses.harm_tags(scores, none, torch.ones(2)) + 0 * losses.centring(scores)
    assert loss.item() == 0
    assert slope(loss, scores).tolist() == [[0, 0]] * num


# Preferences ------------------------------------------------------------------------------------------------


def test_bradley_terry_by_hand():
    """d = log 3: sigmoid(d) = 3/4, sigmoid(-d) = 1/4. Preferred by 3 of 4: -3/4 log 3/4 - 1/4 log 1/4 = 0.562335.

    With a margin of log 6: sigmoid(log 3/6) = 1/3, and the other way round sigmoid(-log 18) = 1/19.
    """
    scores, margin = numbers([1 + LOG3, 1]), math.log(6)
    assert losses.bradley_terry(scores, numbers(1)).item() == pytest.approx(-math.log(3 / 4))
    assert losses.bradley_terry(scores, numbers(0)).item() == pytest.approx(-math.log(1 / 4))
    assert losses.bradley_terry(scores, numbers(0.75)).item() == pytest.approx(0.562335, abs=1e-6)
    assert losses.bradley_terry(scores, numbers(1), margin).item() == pytest.approx(math.log(3))
    assert losses.bradley_terry(scores, numbers(0), numbers(margin)).item() == pytest.approx(math.log(19))


def test_ties_by_hand():
    """d = log 2, theta = 5: sigmoid(log 2/5) = 2/7, sigmoid(-log 10) = 1/11, tie 24 * 2/7 * 1/11 = 48/77; sum 1."""
    scores = numbers([LOG2, 0])
    first, tie, second = (losses.bradley_terry_ties(scores, numbers(label), 5.0).item() for label in (1, 0.5, 0))
    assert (first, tie, second) == pytest.approx((-math.log(2 / 7), -math.log(48 / 77), -math.log(1 / 11)))
    torch.testing.assert_close(losses.outcome_probabilities(scores, 5.0), numbers([2 / 7, 48 / 77, 1 / 11]))


@given(a=score, b=score, theta=thetas)
def test_outcomes_have_probabilities_that_the_loss_is_the_logarithm_of(a: float, b: float, theta: float):
    probabilities = losses.outcome_probabilities(numbers([a, b]), theta)
    assert probabilities.sum().item() == pytest.approx(1)
    nats = [losses.bradley_terry_ties(numbers([a, b]), numbers(label), theta) for label in (1, 0.5, 0)]
    torch.testing.assert_close(-probabilities.log()[0], torch.stack(nats))


@given(a=score, b=score)
def test_at_theta_one_choices_are_those_of_bradley_terry(a: float, b: float):
    scores, choice = numbers([a, b]), numbers(1)
    nearly = losses.bradley_terry_ties(scores, choice, 1 + 1e-9)
    torch.testing.assert_close(nearly, losses.bradley_terry(scores, choice), rtol=1e-6, atol=1e-8)
    assert losses.outcome_probabilities(scores, 1 + 1e-9)[0, 1].item() < 1e-8


@of_pairs
def test_a_pair_told_the_other_way_round_costs_the_same(name: str):
    scores = SCORES.flip(1)
    flipped = {
        "bradley_terry": lambda: losses.bradley_terry(scores, 1 - SHARES),
        "with margins": lambda: losses.bradley_terry(scores, 1 - SHARES, numbers(0.2, 1, 0, 3)),
        "bradley_terry_ties": lambda: losses.bradley_terry_ties(scores, 1 - OUTCOMES, 3.0),
        "signed_cost": lambda: losses.signed_cost(scores, 1 - SHARES, UNSAFE.flip(1), shrink=0.1),
    }
    torch.testing.assert_close(flipped[name](), LOSSES[name](SCORES))


@given(shift=score)
def test_preferences_know_no_zero(shift: float):
    for name in ("bradley_terry", "with margins", "bradley_terry_ties"):
        torch.testing.assert_close(LOSSES[name](SCORES + shift), LOSSES[name](SCORES))


@given(a=score, b=score, step=st.floats(0.01, 5), margin=st.floats(0, 3), theta=thetas)
def test_loss_falls_as_the_chosen_video_moves_ahead(a: float, b: float, step: float, margin: float, theta: float):
    for loss in (
        lambda s: losses.bradley_terry(s, numbers(1), margin),
        lambda s: losses.bradley_terry_ties(s, numbers(1), theta),
    ):
        assert loss(numbers([a + step, b])) < loss(numbers([a, b])) < loss(numbers([a, b + step]))


@given(p=share)
def test_shares_are_best_told_by_their_logit(p: float):
    """The loss of a share p has its least at sigmoid(d) = p, and is there the entropy of p."""
    scores = numbers([float(logit(p)), 0]).requires_grad_()
    loss = losses.bradley_terry(scores, numbers(p))
    assert slope(loss, scores).abs().max().item() < 1e-12
    assert loss.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))


@given(a=score, b=score, p=share, margin=st.floats(0, 3))
def test_bradley_terry_is_scipys_log_expit(a: float, b: float, p: float, margin: float):
    theirs = -p * log_expit(a - b - margin) - (1 - p) * log_expit(b - a - margin)
    assert losses.bradley_terry(numbers([a, b]), numbers(p), margin).item() == pytest.approx(theirs)


@pytest.mark.parametrize("margin", [None, numbers(0.0, 0.5, 1.0, 2.0)])
@pytest.mark.parametrize("coefficient", [None, 0.01])
def test_bradley_terry_and_centring_are_those_of_trl(margin: Tensor | None, coefficient: float | None):
    trl = pytest.importorskip("trl", reason="trl comes with the extra `oracles`")
    inputs = {"attention_mask": torch.ones(8, 1)} | ({} if margin is None else {"margin": margin})

    def model(**_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=SCORES.T.reshape(-1, 1))  # all chosen, then all rejected

    trainer = MagicMock(args=SimpleNamespace(center_rewards_coefficient=coefficient))
    theirs = trl.RewardTrainer.compute_loss(trainer, model, inputs)
    ours = losses.bradley_terry(SCORES, torch.ones(4), 0.0 if margin is None else margin)
    torch.testing.assert_close(ours + (coefficient or 0) * losses.centring(SCORES), theirs)


def test_centring_and_shrinkage_by_hand():
    """(2, -1), (3, 1): sums 1 and 4, (1 + 16) / 2 = 8.5; squares 4, 1, 9, 1, mean 3.75."""
    scores = numbers([2, -1], [3, 1])
    assert losses.centring(scores).item() == 8.5
    assert losses.shrinkage(scores).item() == 3.75
    assert losses.shrinkage(scores[0, 0]).item() == 4


def test_shrinkage_is_centring_and_the_squared_differences():
    """a^2 + b^2 = ((a + b)^2 + (a - b)^2) / 2, and the mean is over twice as many."""
    differences = (SCORES[:, 0] - SCORES[:, 1]).square().mean()
    torch.testing.assert_close(losses.shrinkage(SCORES), (losses.centring(SCORES) + differences) / 4)


# Theta ------------------------------------------------------------------------------------------------------


def test_theta_of_equal_scores_is_told_by_the_counts():
    """P(tie) = (theta - 1) / (theta + 1) at d = 0; 2 ties and 1 choice: 2/3, so theta = 5."""
    assert losses.fit_theta(torch.zeros(4, 2), numbers(0.5, 1, 0.5, NAN).float()) == pytest.approx(5)


@settings(max_examples=20)
@given(spread=st.floats(0, 8), seed=st.integers(0, 99), num_ties=st.integers(1, 29))
def test_fitted_theta_is_the_least_that_scipy_finds_in_the_loss(spread: float, seed: int, num_ties: int):
    scores = spread * normal(30, 2, seed=seed)
    outcomes = torch.cat([torch.full((num_ties,), 0.5), torch.arange(30 - num_ties) % 2]).double()

    def loss(log_theta: float) -> float:
        return losses.bradley_terry_ties(scores, outcomes, math.exp(log_theta)).item()

    ours = math.log(losses.fit_theta(scores, outcomes))
    theirs = minimize_scalar(loss, bounds=(1e-4, 60), method="bounded", options={"xatol": 1e-6})
    assert loss(ours) <= theirs.fun + 1e-12
    assert ours == pytest.approx(theirs.x, abs=1e-4)


def test_fitted_theta_is_the_one_that_made_the_outcomes():
    """20,000 draws with theta = 3: the error of log theta is about 1 / sqrt(20,000 * .4), 5 of them 0.06."""
    scores = normal(20_000, 2)
    drawn = torch.multinomial(
        losses.outcome_probabilities(scores, 3.0), 1, generator=torch.Generator().manual_seed(1)
    ).squeeze(1)
    assert math.log(losses.fit_theta(scores, 1 - drawn / 2)) == pytest.approx(LOG3, abs=0.06)


@pytest.mark.parametrize("num_ties", [1, 10, 99])
@pytest.mark.parametrize("gap", [-8.0, 0.0, 8.0])
@pytest.mark.parametrize("tied_gap", [0.0, 8.0])
def test_theta_is_found_however_right_or_wrong_the_scores_are(gap: float, tied_gap: float, num_ties: int):
    gaps = torch.cat([torch.full((num_ties,), tied_gap), torch.full((100 - num_ties,), gap)]).double()
    scores = torch.stack([gaps, torch.zeros(100, dtype=torch.float64)], dim=1)
    outcomes = 1 - (torch.arange(100) < num_ties).double() / 2
    theta = losses.fit_theta(scores, outcomes)
    least, *others = (losses.bradley_terry_ties(scores, outcomes, 1 + (theta - 1) * k) for k in (1, 0.99, 1.01))
    assert least < min(others)


def test_the_tie_threshold_by_hand():
    """theta = 4: 4 - 2/4 = 7/2. At d = log 7/2 the first has 7/2 / (7/2 + 4) = 7/15, a tie 15 * 7/15 * 1/15 = 7/15."""
    threshold = losses.tie_threshold(4.0)
    assert threshold == pytest.approx(math.log(3.5))
    torch.testing.assert_close(losses.outcome_probabilities(numbers([threshold, 0]), 4.0), numbers([7, 7, 1]) / 15)
    assert [losses.tie_threshold(theta) for theta in (1.1, 1.5, 2.0)] == [0, 0, 0]


@given(theta=thetas, difference=score)
def test_a_tie_is_the_likeliest_outcome_up_to_the_threshold(theta: float, difference: float):
    assume(abs(abs(difference) - losses.tie_threshold(theta)) > 1e-6)
    first, tie, second = losses.outcome_probabilities(numbers([difference, 0]), theta)[0].tolist()
    assert (tie > max(first, second)) == (abs(difference) < losses.tie_threshold(theta))


@pytest.mark.parametrize("outcome", [0.5, 1.0, 0.0])
def test_theta_needs_ties_and_choices(outcome: float):
    with pytest.raises(ValueError, match="ties and choices to fit theta, got"):
        losses.fit_theta(SCORES, numbers(outcome, outcome, NAN, NAN))


# Costs ------------------------------------------------------------------------------------------------------


def test_signed_cost_by_hand():
    """Costs log 3 (unsafe, the costlier) and -log 2 (safe): sigmoids 6/7, 3/4, 2/3, product 3/7.

    With 1/10 of the mean square: log 7/3 + 0.1 (log^2 3 + log^2 2) / 2.
    """
    loss = losses.signed_cost(numbers([LOG3, -LOG2]), numbers(1), numbers([1, 0]), shrink=0.1)
    assert loss.item() == pytest.approx(math.log(7 / 3) + 0.05 * (LOG3**2 + LOG2**2))


def test_where_safety_is_not_known_the_pairs_are_left():
    unknown = torch.full((4, 2), NAN, dtype=torch.float64)
    pairs = losses.bradley_terry(SCORES, SHARES)
    torch.testing.assert_close(losses.signed_cost(SCORES, SHARES, unknown, shrink=0.0), pairs)
    torch.testing.assert_close(
        losses.signed_cost(SCORES, SHARES, unknown), pairs + 0.001 * losses.shrinkage(SCORES), rtol=0, atol=0
    )


@given(cost=st.floats(-9, 9), step=st.floats(0.01, 5))
def test_unsafe_is_above_zero_and_safe_below(cost: float, step: float):
    here, above = numbers(cost), numbers(cost + step)
    assert losses.safety_sign(above, numbers(1)) < losses.safety_sign(here, numbers(1))
    assert losses.safety_sign(above, numbers(0)) > losses.safety_sign(here, numbers(0))
    right_side = losses.safety_sign(here, (here > 0).double())
    assert right_side.item() <= LOG2 <= losses.safety_sign(here, (here <= 0).double()).item()


# Harm tags --------------------------------------------------------------------------------------------------


def test_harm_tags_by_hand():
    """Logits log 3, 0 and -log 2, labels 1, unknown and 0: -2 log 3/4 and -log 2/3, by 2."""
    loss = losses.harm_tags(numbers([LOG3, 0.0, -LOG2]), numbers([1, NAN, 0]), numbers(2, 7, 9))
    assert loss.item() == pytest.approx(-(2 * math.log(3 / 4) + math.log(2 / 3)) / 2)


def test_harm_tags_and_safety_sign_are_torchs_binary_cross_entropy():
    logits, labels, weights = normal(6, 3), torch.sigmoid(normal(6, 3, seed=1)), numbers(0.5, 1, 4)
    theirs = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights)
    torch.testing.assert_close(losses.harm_tags(logits, labels, weights), theirs)
    theirs = F.binary_cross_entropy_with_logits(logits[:, 0], labels[:, 0])
    torch.testing.assert_close(losses.safety_sign(logits[:, 0], labels[:, 0]), theirs)


def test_positive_weights_by_hand():
    """1 of 4 known: 3 / 1; 2 of 3 known: 1 / 2."""
    tags = torch.tensor([[1, 1], [0, 1], [0, 0], [0, NAN], [NAN, NAN]])
    assert losses.positive_weights(tags, ["crime", "hate"]).tolist() == [3, 0.5]


@given(positives=st.integers(1, 19))
def test_a_weighted_head_says_its_logit_and_the_log_of_the_weight(positives: int):
    tags = (torch.arange(20) < positives).double()[:, None]
    weight = losses.positive_weights(tags, ["crime"])
    level = torch.full((1,), float(logit(positives / 20)) + math.log(weight.item()), dtype=torch.float64)
    level.requires_grad_()
    loss = losses.harm_tags(level.expand(20, 1), tags, weight)
    assert slope(loss, level).item() == pytest.approx(0, abs=1e-12)


def test_tags_with_one_class_are_refused_by_name():
    tags = torch.tensor([[1, 0, 1, NAN], [0, 0, 1, NAN], [1, NAN, 1, NAN]])
    with pytest.raises(ValueError, match=r"got .* hate \(0 of 2\), crime \(3 of 3\), racism \(0 of 0\); leave"):
        losses.positive_weights(tags, ["porn", "hate", "crime", "racism"])


# All --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name: str):
    assert torch.autograd.gradcheck(LOSSES[name], (SCORES.clone().requires_grad_(),))


def test_gradients_of_the_outcome_probabilities():
    scores = SCORES.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: losses.outcome_probabilities(s, 3.0), (scores,))


@pytest.mark.parametrize("name", LOSSES)
def test_large_scores_stay_finite(name: str):
    scores = (1e4 * SCORES).float().requires_grad_()
    loss = LOSSES[name](scores)
    assert loss.isfinite()
    assert slope(loss, scores).isfinite().all()


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
@pytest.mark.parametrize("name", LOSSES)
def test_scores_that_are_not_finite_are_refused_even_where_no_label_is(name: str, wrong: float):
    scores = SCORES.clone()
    scores[3, 1] = wrong
    with pytest.raises(ValueError, match=r"(scores|costs|logits)\[.*\]: expected finite numbers, got -?(nan|inf)"):
        LOSSES[name](scores)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, INF])
def test_labels_that_are_no_probabilities_are_refused(wrong: float):
    label, labels = numbers(1, wrong), numbers([1, 0], [0, wrong])
    for call in (
        lambda: losses.bradley_terry(SCORES[:2], label),
        lambda: losses.bradley_terry_ties(SCORES[:2], label, 2.0),
        lambda: losses.fit_theta(SCORES[:2], label),
        lambda: losses.safety_sign(SCORES[:2, 0], label),
        lambda: losses.harm_tags(SCORES[:2], labels, WEIGHTS),
        lambda: losses.positive_weights(labels, ["hate", "crime"]),
    ):
        with pytest.raises(ValueError, match=rf"\[1.*\]: expected probabilities, or NaN .* got {wrong}"):
            call()


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"margin: expected a number >= 0, got -1"):
        losses.bradley_terry(SCORES, SHARES, -1.0)
    with pytest.raises(ValueError, match=r"margin\[2\]: expected a number >= 0, got nan"):
        losses.bradley_terry(SCORES, SHARES, numbers(0, 1, NAN, 1))
    with pytest.raises(ValueError, match=r"positive_weight\[1\]: expected a number > 0, got 0"):
        losses.harm_tags(SCORES, TAGS, numbers(1, 0))
    with pytest.raises(ValueError, match=r"preference\[2\]: expected 1, 0, or 0.5 for a tie; .* got 0.3"):
        losses.bradley_terry_ties(SCORES, SHARES, 2.0)


@pytest.mark.parametrize("theta", [1.0, 0.5, INF, NAN])
def test_theta_must_be_above_one(theta: float):
    for call in (
        lambda: losses.bradley_terry_ties(SCORES, OUTCOMES, theta),
        lambda: losses.outcome_probabilities(SCORES, theta),
        lambda: losses.tie_threshold(theta),
    ):
        with pytest.raises(ValueError, match=r"theta: expected a finite number > 1"):
            call()
