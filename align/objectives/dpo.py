"""Direct preference optimisation of a diffusion model: make chosen videos likelier than rejected ones.

    implicit reward = -(beta / 2) (error of the policy - error of the reference)
    margin          = implicit reward of chosen - implicit reward of rejected
    loss            = -log sigmoid(margin)

An `error` is one number a clip, averaged over all its axes before anything that is not linear (`align.targets`).

Source: Wallace et al. 2023 (Diffusion-DPO, arXiv 2311.12908); for velocities, Liu et al. 2025 (Flow-DPO, arXiv
2501.13918), who found a constant beta better than the (1 - sigma)^2 of the theory.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat
from pydantic import model_validator as validator
from torch import Tensor
from torch.nn.functional import softplus

from align.flow import Sigmas
from align.objectives.beta import Beta, SteeredBeta
from align.objectives.pairs import Labels, PairErrors, Samples
from reward.config import Config

IPO_MARGIN = 0.5
"""Where IPO pulls every margin to."""

# Settings ---------------------------------------------------------------------------------------------------


class Sigmoid(Config):
    """-log sigmoid(margin): the likelihood of the preferences."""

    kind: Literal["sigmoid"] = "sigmoid"

    def of_win(self, margin: Samples) -> Samples:
        """Give the loss of a pair that chosen won."""
        return softplus(-margin)


class Ipo(Config):
    """(margin - 1/2)^2: no reward for more. Source: Azar et al. 2023 (arXiv 2310.12036), times their tau^2."""

    kind: Literal["ipo"] = "ipo"

    def of_win(self, margin: Samples) -> Samples:
        """Give the loss of a pair that chosen won."""
        return (margin - IPO_MARGIN).square()


class Hinge(Config):
    """max(0, 1 - margin): nothing to learn above 1."""

    kind: Literal["hinge"] = "hinge"

    def of_win(self, margin: Samples) -> Samples:
        """Give the loss of a pair that chosen won."""
        return torch.relu(1 - margin)


class Ties(Config):
    """The likelihood of win, tie and loss; a win has sigmoid(margin - ln k). Source: Rao and Kupper 1967."""

    kind: Literal["ties"] = "ties"
    k: float = Field(default=5.0, gt=1)
    """At margin 0, a tie has probability (k - 1) / (k + 1)."""

    def of_win(self, margin: Samples) -> Samples:
        """Give the loss of a pair that chosen won."""
        return softplus(math.log(self.k) - margin)


Loss = Sigmoid | Ipo | Hinge | Ties


class Dpo(Config):
    """Diffusion-DPO on pairs of videos."""

    kind: Literal["dpo"] = "dpo"
    loss: Annotated[Loss, Field(discriminator="kind")] = Sigmoid()
    beta: Beta = SteeredBeta()
    schedule: Literal["constant", "falling"] = "constant"
    """Falling: beta (1 - sigma)^2, which hardly trains high noise, where layout and motion are decided."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of labels taken to be wrong, so that margins stay bounded (cDPO)."""
    label_flips: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of labels known to be wrong: on average the loss is that of right ones (robust DPO)."""
    safe_offset: NonNegativeFloat = 0.0
    """Margin by which a safe chosen video must beat an unsafe rejected one (SafeDPO)."""
    chosen_reserve: float | None = Field(default=None, ge=0, le=1)
    """Weaken the push away from rejected until chosen keeps this share of its descent (Diffusion-SDPO); null: never."""
    anchor: NonNegativeFloat = 0.0
    """Weight of chosen's own error; the preference gives it beta / 4 at first. On videos that the policy made with
    guidance it teaches guidance as well, more with each round: see `leash`."""
    leash: NonNegativeFloat = 0.0
    """Weight of the squared distance between the predictions of policy and reference, on both videos. Preferences
    only see the difference of two errors; this holds what they do not see, where it was."""

    @validator(mode="after")
    def _is_consistent(self) -> "Dpo":
        if self.label_smoothing and self.label_flips:
            raise ValueError(f"label_smoothing={self.label_smoothing} and label_flips={self.label_flips}; set one to 0")
        if self.label_flips and isinstance(self.loss, Ties):
            raise ValueError("label_flips undoes flips between two outcomes, loss ties has three; use label_smoothing")
        least = 1 / (1 + math.exp(IPO_MARGIN))
        if isinstance(self.loss, Ipo) and isinstance(self.beta, SteeredBeta) and self.beta.target <= least:
            raise ValueError(
                f"loss ipo pulls margins to {IPO_MARGIN}, and beta.target={self.beta.target} asks for larger ones, so "
                f"beta would grow for ever; use a fixed beta, or a target above {least:.3f}"
            )
        return self


# The loss ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class DpoLoss:
    """What a batch of pairs gave, a number for each; only `loss` has a gradient, and its mean is what to minimise."""

    loss: Samples
    preference_loss: Samples
    """Without weight and anchor: ln 2 before the first step (sigmoid, no offset)."""
    margin: Samples
    accuracy: Samples
    """1 where the margin is > 0, 1/2 where it is 0."""
    gradient_factor: Samples
    """sigmoid(-margin)."""
    folded_factor: Samples
    """sigmoid(-|margin|), which `steer` is for."""
    chosen_gap: Samples
    """Error of the policy - that of the reference: > 0 where the policy got worse."""
    rejected_gap: Samples
    rejected_dominant: Samples
    """1 where the margin is > 0 although chosen got worse: rejected just got worse still."""


def dpo_loss(settings: Dpo, errors: PairErrors, labels: Labels, sigma: Sigmas, beta: float) -> DpoLoss:
    """Give the loss of each pair; `beta` is `BetaState.value`.

    Raises: ValueError: what a setting needs is missing, or there without it; an unsafe video was chosen above a safe
        one in spite of a `safe_offset`.
    """
    if (settings.chosen_reserve is None) != (errors.rejected_scale is None):
        raise ValueError(f"chosen_reserve={settings.chosen_reserve} and errors.rejected_scale: give both or neither")
    chosen_gap = errors.policy_chosen - errors.reference_chosen.detach()
    rejected_gap = _scaled(errors.policy_rejected, errors.rejected_scale) - errors.reference_rejected.detach()
    margin = margin_of(chosen_gap, rejected_gap, beta_at(settings, sigma, beta))
    offset = safe_offset(labels, settings.safe_offset)
    held = _held(settings, errors)
    preference_loss = loss_of(settings.loss, margin - offset, treated(settings, labels.preference))
    z, better, worse = margin.detach(), chosen_gap.detach(), rejected_gap.detach()
    return DpoLoss(
        loss=labels.weight * (preference_loss + settings.anchor * errors.policy_chosen + held),
        preference_loss=preference_loss.detach(),
        margin=z,
        accuracy=torch.heaviside(z, z.new_tensor(0.5)),
        gradient_factor=torch.sigmoid(-z),
        folded_factor=torch.sigmoid(-z.abs()),
        chosen_gap=better,
        rejected_gap=worse,
        rejected_dominant=((z > 0) & (better > 0)).to(z.dtype),
    )


def _held(settings: Dpo, errors: PairErrors) -> Samples | float:
    """Give the leash's part of the loss.

    Source: Girsanov's theorem: the KL divergence of two diffusions is the mean of this distance, weighted by noise.
    """
    if not settings.leash:
        return 0.0
    if errors.distance is None:
        raise ValueError(f"leash={settings.leash} needs the distance of the predictions; set it to 0")
    return settings.leash * errors.distance


def margin_of(chosen_gap: Samples, rejected_gap: Samples, beta: Samples) -> Samples:
    """Give by how much the policy prefers chosen more than its reference does, in log-odds.

    A gap is an error of the policy minus that of the reference.
    """
    return -(beta / 2) * (chosen_gap - rejected_gap)


def beta_at(settings: Dpo, sigma: Sigmas, beta: float) -> Samples:
    """Give each pair's beta."""
    match settings.schedule:
        case "constant":
            return torch.full_like(sigma, beta)
        case "falling":
            return beta * (1 - sigma).square()


def treated(settings: Dpo, preference: Samples) -> Samples:
    """Give the preferences to learn, for labels of which a share is wrong; undone flips leave [0, 1].

    Source: Mitchell 2023 (cDPO) for smoothing, Chowdhury et al. 2024 (arXiv 2403.00409) for flips.
    """
    smooth, flips = settings.label_smoothing, settings.label_flips
    return (preference * (1 - 2 * smooth) + smooth - flips) / (1 - 2 * flips)


def loss_of(loss: Loss, margin: Samples, preference: Samples) -> Samples:
    """Give the expected loss of a pair that chosen wins with this probability.

    `Ties` reads 1, .5 and 0 as win, tie and loss, and what lies between as a mixture of the two nearest.
    """
    won, lost = loss.of_win(margin), loss.of_win(-margin)
    if not isinstance(loss, Ties):
        return preference * won + (1 - preference) * lost
    # A tie has probability (k^2 - 1) P(win) P(loss), so its loss holds those of win and loss in full.
    to_win, to_lose = (2 * preference).clamp(max=1), (2 - 2 * preference).clamp(max=1)
    return to_win * won + to_lose * lost - (to_win + to_lose - 1) * math.log(loss.k**2 - 1)


def safe_offset(labels: Labels, size: float) -> Samples:
    """Give what is taken off each margin: `size` where chosen is safe and rejected unsafe, else 0.

    Source: Kim et al. 2025 (SafeDPO, arXiv 2505.20065).
    """
    if not size:
        return torch.zeros_like(labels.weight)
    if labels.chosen_unsafe is None or labels.rejected_unsafe is None:
        raise ValueError(f"safe_offset={size} needs chosen_unsafe and rejected_unsafe of every pair; set it to 0")
    gap = labels.rejected_unsafe.to(labels.weight.dtype) - labels.chosen_unsafe.to(labels.weight.dtype)
    if (gap < 0).any():
        raise ValueError(f"safe_offset={size}: chosen is unsafe and rejected safe in a pair; make the safe one chosen")
    return size * gap


def preserving_scale(
    chosen_residual: Float[Tensor, "b ..."], rejected_residual: Float[Tensor, "b ..."], reserve: float
) -> Samples:
    """Give the scale of rejected's gradient at which a step still lowers chosen's error, to first order.

    A residual is prediction - target of the policy. With A and B the gradients of the two errors with respect to the
    predictions: clip((1 - reserve) |A|^2 / <A, B>, 0, 1) where <A, B> > 0, else 1. The authors take one scale for a
    whole batch; here each pair has its own, which does not depend on how pairs are batched.

    Source: Fu et al. 2025 (Diffusion-SDPO, arXiv 2511.03317).
    """
    a, b = chosen_residual.detach().flatten(1), rejected_residual.detach().flatten(1)
    agreement = (a * b).sum(1)
    scale = (1 - reserve) * a.square().sum(1) / agreement
    return torch.where(agreement > 0, scale.clamp(0, 1), torch.ones_like(scale))


def _scaled(error: Samples, scale: Samples | None) -> Samples:
    """Give the same error, to the bit, with its gradient scaled."""
    return error if scale is None else error.detach() + scale * (error - error.detach())
