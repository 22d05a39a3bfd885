"""What the reward model's heads are trained on: preferences, a cost with a zero, harm tags. Tensors in, one number out.

A label is the probability that something holds: 1 yes, 0 no, a share where annotators were divided, NaN where
nobody was asked. `preference` is that of the first video of a pair being preferred, or, of two costs, being
the higher one. Every mean divides by the number of known labels; with none, loss and gradients are 0.

All raise ValueError for scores that are not finite, for labels outside [0, 1], and for settings out of range.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from scipy.optimize import brentq
from torch import Tensor
from torch.nn import functional as F

Pairs = Float[Tensor, "b 2"]
"""Scores of the first and of the second video of each pair."""
Labels = Float[Tensor, " b"]
Scalar = Float[Tensor, ""]


def as_labels(values: Sequence[float | int | None]) -> Labels:
    """Give labels as numbers: True and False are 1 and 0, None is NaN, a probability stays."""
    return torch.tensor([math.nan if value is None else float(value) for value in values])


# Preferences ------------------------------------------------------------------------------------------------


def bradley_terry(scores: Pairs, preference: Labels, margin: float | Labels = 0.0) -> Scalar:
    """Give the mean of -log sigmoid(chosen - rejected - margin), divided as the annotators were.

    With d = first - second and p = preference: -p log sigmoid(d - margin) - (1 - p) log sigmoid(-d - margin).
    A margin >= 0 is how far ahead the chosen score should be: one for all pairs, or one each.

    Source: Bradley and Terry 1952; the margin as in trl's `RewardTrainer`.
    """
    known, preference = _known(preference, "preference")
    _require(torch.as_tensor(margin) >= 0, torch.as_tensor(margin), "margin", "a number >= 0")
    return _mean(_choice(_difference(scores), preference, margin), known)


def bradley_terry_ties(scores: Pairs, preference: Labels, theta: float) -> Scalar:
    """Give the mean of -log P(outcome): 1 the first is chosen, 0 the second, 1/2 a tie; no shares.

    With d = first - second: -log sigmoid(d - log theta), -log sigmoid(-d - log theta), or, for a tie, both and
    -log(theta^2 - 1). theta > 1; close scores tie the likelier the larger it is, and at 1 nothing would.

    Source: Rao and Kupper 1967, with log theta as in Liu et al. 2025 (VideoAlign, arXiv 2501.13918).
    """
    known, outcome = _known_outcomes(preference)
    choice = _choice(_difference(scores), outcome, _log_theta(theta))
    tie = 2 * choice - math.log((theta - 1) * (theta + 1))  # choice is half of both, where outcome is 1/2
    return _mean(torch.where(outcome == 0.5, tie, choice), known)


def outcome_probabilities(scores: Pairs, theta: float) -> Float[Tensor, "b 3"]:
    """Give P(first is chosen), P(tie), P(second is chosen), the model behind `bradley_terry_ties`."""
    log_theta, difference = _log_theta(theta), _difference(scores)
    first, second = torch.sigmoid(difference - log_theta), torch.sigmoid(-difference - log_theta)
    return torch.stack([first, (theta - 1) * (theta + 1) * first * second, second], dim=-1)


def tie_threshold(theta: float) -> float:
    """Give the |difference| up to which a tie is the likeliest outcome: log(theta - 2 / theta), and 0 up to theta = 2.

    With d >= 0 the second is never likelier than the first, and a tie is likelier than the first where
    (theta^2 - 1) sigmoid(-d - log theta) > 1, so where e^d < theta - 2 / theta; up to theta = 2 that is below 1.
    """
    _log_theta(theta)
    return math.log(max(1.0, theta - 2 / theta))


def fit_theta(scores: Pairs, preference: Labels) -> float:
    """Give the theta for which `bradley_terry_ties` is least on these scores, which should be validation's.

    Raises: ValueError: no tie among the known outcomes, or nothing but ties; neither has a least.
    """
    known, outcome = _known_outcomes(preference)
    difference, outcome = _difference(scores).detach().double()[known], outcome[known]
    tied, chosen = difference[outcome == 0.5], ((2 * outcome - 1) * difference)[outcome != 0.5]
    if not (len(tied) and len(chosen)):
        raise ValueError(
            f"expected ties and choices to fit theta, got {len(tied)} and {len(chosen)}; "
            "without ties use bradley_terry, with ties only there is nothing to learn"
        )

    def slope(log_theta: float) -> float:
        pull = [torch.sigmoid(log_theta + d).sum().item() for d in (-chosen, -tied, tied)]
        return sum(pull) + 2 * len(tied) / math.expm1(-2 * log_theta)

    # The loss is convex in log theta. Below `low` the ties outweigh the sigmoids, as each is under 1; above `high`
    # they cannot, as each is at least that of the widest gap.
    low = len(tied) / (len(chosen) + 2 * len(tied)) / 2
    high = difference.abs().max().item() + math.log1p(2 * len(tied) / len(chosen)) + 1
    return math.exp(brentq(slope, low, high))


def centring(scores: Pairs) -> Scalar:
    """Give the mean of (first + second)^2: draws scores to a mean of 0, and leaves differences alone.

    Source: Eisenstein et al. 2023 (arXiv 2312.09244), Eq. 2, as in trl's `RewardTrainer`.
    """
    return shrinkage(scores.sum(dim=-1))


def shrinkage(scores: Float[Tensor, "..."]) -> Scalar:
    """Give the mean of squared scores: draws each to 0, so differences too; SafeSora adds .001 of it."""
    _require(scores.isfinite(), scores, "scores", "finite numbers")
    return scores.square().sum() / max(1, scores.numel())


# Costs: > 0 is unsafe ---------------------------------------------------------------------------------------


def signed_cost(costs: Pairs, preference: Labels, unsafe: Float[Tensor, "b 2"], shrink: float = 1e-3) -> Scalar:
    """Give the loss of a cost that ranks videos by harm, and is above 0 for the unsafe ones only.

    Per pair: -log sigmoid(costlier - other) - log sigmoid(s costlier) - log sigmoid(s other), with s = 1 for an
    unsafe video and -1 for a safe one, and `shrink` times the mean of both squares. Where no safety is known, the
    pairs and the shrinkage are left, and 0 means nothing; `bradley_terry` is the pairs alone.

    Source: Dai et al. 2023 (Safe RLHF, arXiv 2310.12773), the cost model's loss and its code's regulariser.
    """
    signs = 2 * safety_sign(costs.flatten(), unsafe.flatten())
    return bradley_terry(costs, preference) + signs + shrink * shrinkage(costs)


def safety_sign(costs: Labels, unsafe: Labels) -> Scalar:
    """Give the mean of -log sigmoid(s cost), s = 1 for an unsafe video and -1 for a safe one."""
    known, unsafe = _known(unsafe, "unsafe")
    _require(costs.isfinite(), costs, "costs", "finite numbers")
    return _mean(_choice(costs, unsafe, margin=0.0), known)


# Harm tags --------------------------------------------------------------------------------------------------


def harm_tags(
    logits: Float[Tensor, "b tags"], tags: Float[Tensor, "b tags"], positive_weight: Float[Tensor, " tags"]
) -> Scalar:
    """Give the mean over known tags of -weight y log sigmoid(logit) - (1 - y) log sigmoid(-logit)."""
    known, tags = _known(tags, "tags")
    _require(logits.isfinite(), logits, "logits", "finite numbers")
    _require(positive_weight > 0, positive_weight, "positive_weight", "a number > 0")
    return _mean(positive_weight * tags * F.softplus(-logits) + (1 - tags) * F.softplus(logits), known)


def positive_weights(tags: Float[Tensor, "n tags"], names: Sequence[str]) -> Float[Tensor, " tags"]:
    """Give negatives / positives of each tag, so that both weigh the same in `harm_tags`.

    A head trained with a weight says logit + log(weight); take log(weight) off for probabilities.

    Raises: ValueError: a tag that is known to be there always or never, or not known at all; all are named.
    """
    known, labels = _known(tags, "tags")
    num_known, positives = known.sum(dim=0), labels.sum(dim=0)
    negatives = num_known - positives
    counts = zip(names, positives.tolist(), num_known.tolist(), strict=True)
    if alike := [f"{name} ({yes:g} of {num})" for name, yes, num in counts if yes in (0, num)]:
        raise ValueError(
            f"expected videos with and without each tag, got (with it, of known) {', '.join(alike)}; "
            "leave these tags out or add examples"
        )
    return negatives / positives


# What they share --------------------------------------------------------------------------------------------


def _choice(difference: Labels, preference: Labels, margin: float | Labels) -> Labels:
    """Give -log sigmoid(d - margin) where the first is preferred, and of -d where the second is, in shares."""
    return preference * F.softplus(margin - difference) + (1 - preference) * F.softplus(margin + difference)


def _difference(scores: Pairs) -> Labels:
    _require(scores.isfinite(), scores, "scores", "finite numbers")
    return scores[:, 0] - scores[:, 1]


def _log_theta(theta: float) -> float:
    if not 1 < theta < math.inf:
        raise ValueError(f"theta: expected a finite number > 1, got {theta}; without ties use bradley_terry")
    return math.log(theta)


def _known(labels: Float[Tensor, "..."], name: str) -> tuple[Bool[Tensor, "..."], Float[Tensor, "..."]]:
    """Give which labels are known, and the labels with 0 for the others: NaN times 0 would still be NaN."""
    known = ~labels.isnan()
    _require(~known | ((labels >= 0) & (labels <= 1)), labels, name, "probabilities, or NaN where not known")
    return known, labels.where(known, 0)


def _known_outcomes(preference: Labels) -> tuple[Bool[Tensor, " b"], Labels]:
    known, outcome = _known(preference, "preference")
    _require((outcome * 2).frac() == 0, outcome, "preference", "1, 0, or 0.5 for a tie; shares are for bradley_terry")
    return known, outcome


def _mean(losses: Float[Tensor, "..."], known: Bool[Tensor, "..."]) -> Scalar:
    return losses.where(known, 0).sum() / known.sum().clamp(min=1)


def _require(fine: Bool[Tensor, "..."], values: Float[Tensor, "..."], name: str, expected: str) -> None:
    """Raise a ValueError that names the first value that is not fine."""
    if not fine.all():
        place = (~fine).nonzero()[0].tolist()
        raise ValueError(f"{name}{place or ''}: expected {expected}, got {values[tuple(place)].item()}")
