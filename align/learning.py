"""What a step learns from, and what the objectives make of it.

Noise, sigma and caption dropout of an item are a function of (seed, round, item, epoch): they depend neither on the
batch that the item is in nor on the number of processes, and the two videos of a pair always share them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field, PositiveFloat
from torch import Tensor

from align import constraint as limits
from align import flow
from align.constraint import Constraint, MultiplierState
from align.flow import Latents, Sigmas
from align.objectives import Objective
from align.objectives.dpo import Dpo, dpo_loss, preserving_scale
from align.objectives.pairs import Labels, PairBatch, PairErrors, View
from align.objectives.rwr import Rwr, Scored, rwr_loss, weights
from align.pairing import Comparison, Pairing, compare
from align.policy import Policy
from align.targets import error
from reward.config import Config
from reward.run import generator


class NoiseLevels(Config):
    """Which sigmas are trained on."""

    mean: float = 0.0
    """Of the logits of sigma."""
    std: PositiveFloat = 1.0
    shift: PositiveFloat = 3.0
    """Above 1: towards noise, where layout, motion and flicker are decided. Wan samples with 3 to 5."""
    text_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the items trained without their caption, for guidance."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """Judged videos to learn from."""

    prompts: tuple[str, ...]
    """What users asked for, of each video."""
    rewards: Float[np.ndarray, " n"]
    cost: Float[np.ndarray, " n"]
    limited_costs: Float[np.ndarray, "n k"]
    """A column for each limit."""
    views: tuple[View, ...]
    """How the policy is shown each video; without dropout."""
    latents: Callable[[int], Float[Tensor, "c lf lh lw"]]
    """Those of the video at a place."""
    comparisons: tuple[Comparison, ...] | None = None
    """What people said of them; null: the judge's utility decides."""

    @property
    def unsafe(self) -> Bool[np.ndarray, " n"]:
        """Whether a video is not known to be safe."""
        return ~(self.cost <= 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """Something to learn: that one video is better than another, or, with none rejected, what one looks like."""

    chosen: int
    """Place in the pool."""
    rejected: int | None = None
    preference: float = 1.0
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """An item, and the chance that goes with it."""

    item: Item
    noise: Float[Tensor, "c lf lh lw"]
    sigma: float
    has_caption: bool


# What there is to learn -------------------------------------------------------------------------------------


def items_of(
    objective: Objective, pairing: Pairing, pool: Pool, constraint: Constraint, state: MultiplierState
) -> list[Item]:
    """Give all items of a pool, at today's multipliers; none where nothing can be preferred."""
    utility = limits.utility(pool.rewards, pool.limited_costs, constraint.limits, state)
    pairs = pool.comparisons
    if pairs is None:
        pairs = compare(pairing, np.array(pool.prompts), utility, pool.cost, pool.unsafe)
    match objective:
        case Dpo():
            return [Item(chosen=p.chosen, rejected=p.rejected, preference=p.preference) for p in pairs]
        case Rwr():
            found = weights(objective, _scored(pool, pairs, utility, state), torch.zeros(0))
            return [Item(chosen=place, weight=weight) for place, weight in enumerate(found.tolist()) if weight > 0]


def _scored(pool: Pool, pairs: Sequence[Comparison], utility: np.ndarray, state: MultiplierState) -> Scored:
    """Give what RWR weighs by: utility times (1 + sum of multipliers), the net reward that the dual's optimum has."""
    chosen = np.isin(np.arange(len(utility)), [pair.chosen for pair in pairs])
    return Scored(
        prompt=torch.from_numpy(np.unique(np.array(pool.prompts), return_inverse=True)[1]),
        reward=torch.from_numpy(utility * (1 + sum(state.multipliers))).float(),
        costs=torch.zeros(len(utility), 0),
        unsafe=torch.from_numpy(pool.unsafe),
        chosen=torch.from_numpy(chosen),
    )


def draw(
    items: Sequence[Item], index: int, pool: Pool, levels: NoiseLevels, *, seed: int, epoch: int, name: str
) -> Drawn:
    """Draw the noise level, dropout and noise of an item in an epoch; `name` tells pools of one run apart."""
    chance = generator(seed, step=epoch, purpose=f"noise of {name}, item {index}")
    logit = levels.mean + levels.std * torch.randn(1, generator=chance)
    sigma = flow.shifted(torch.sigmoid(logit), levels.shift).item()
    has_caption = torch.rand(1, generator=chance).item() >= levels.text_dropout
    noise = torch.randn(pool.latents(items[index].chosen).shape, generator=chance)
    return Drawn(item=items[index], noise=noise, sigma=sigma, has_caption=has_caption)


# Losses -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Losses:
    """What a batch gave, a number for each item; the mean of `loss` is what to minimise."""

    loss: Float[Tensor, " b"]
    measures: Mapping[str, Float[Tensor, " b"]]
    """To be shown, without gradient."""


def losses_of(
    objective: Objective, policy: Policy, pool: Pool, batch: Sequence[Drawn], embed: "Embed", beta: float | None
) -> Losses:
    """Give the losses of some items; DPO needs `beta`."""
    match objective:
        case Dpo():
            assert beta is not None, "DPO needs its beta"
            return _dpo_losses(objective, policy, pair_batch(pool, batch, embed), beta)
        case Rwr():
            return _rwr_losses(policy, pool, batch, embed)


Embed = Callable[[str], Float[Tensor, "tokens d"]]


def pair_batch(pool: Pool, batch: Sequence[Drawn], embed: Embed) -> PairBatch:
    """Give pairs, ready for a step.

    Raises: ValueError: the videos of a pair are shown differently.
    """
    rejected = [drawn.item.rejected for drawn in batch]
    chosen_views = tuple(_view(pool, drawn.item.chosen, drawn.has_caption) for drawn in batch)
    return PairBatch(
        chosen=torch.stack([pool.latents(drawn.item.chosen) for drawn in batch]),
        rejected=torch.stack([pool.latents(place) for place in rejected if place is not None]),
        noise=torch.stack([drawn.noise for drawn in batch]),
        sigma=torch.tensor([drawn.sigma for drawn in batch]),
        prompt_embeds=torch.stack([embed(view.caption) for view in chosen_views]),
        chosen_views=chosen_views,
        rejected_views=tuple(
            _view(pool, place, drawn.has_caption)
            for place, drawn in zip(rejected, batch, strict=True)
            if place is not None
        ),
        labels=Labels(
            preference=torch.tensor([drawn.item.preference for drawn in batch]),
            weight=torch.tensor([drawn.item.weight for drawn in batch]),
            chosen_unsafe=torch.tensor([bool(pool.unsafe[drawn.item.chosen]) for drawn in batch]),
            rejected_unsafe=torch.tensor([bool(pool.unsafe[place]) for place in rejected]),
        ),
    )


def _view(pool: Pool, place: int, has_caption: bool) -> View:
    return pool.views[place] if has_caption else replace(pool.views[place], caption="")


def _dpo_losses(objective: Dpo, policy: Policy, batch: PairBatch, beta: float) -> Losses:
    errors, norms = pair_errors(policy, batch, objective.chosen_reserve)
    device = errors.policy_chosen.device
    found = dpo_loss(objective, errors, _to(batch.labels, device), batch.sigma.to(device), beta)
    shown = {name: getattr(found, name) for name in found.__slots__ if name != "loss"}
    reference = errors.reference_chosen
    assert errors.distance is not None
    shown |= {"velocity_norm": norms, "reference_error": reference, "distance": errors.distance.detach()}
    return Losses(loss=found.loss, measures=shown)


def _to(labels: Labels, device: torch.device) -> Labels:
    moved = {name: getattr(labels, name) for name in labels.__slots__}
    return Labels(**{name: value if value is None else value.to(device) for name, value in moved.items()})


def pair_errors(policy: Policy, batch: PairBatch, reserve: float | None) -> tuple[PairErrors, Float[Tensor, " b"]]:
    """Give the errors of policy and reference on a batch, and the policy's velocity norm over the reference's."""
    inputs = _inputs(policy, batch.chosen, batch.rejected, noise=batch.noise, sigma=batch.sigma)
    embeds = batch.prompt_embeds.to(policy.device).repeat(2, 1, 1)
    prediction = policy.velocity(inputs.noisy, inputs.sigma, embeds)
    with torch.no_grad(), policy.as_reference():
        reference = policy.velocity(inputs.noisy, inputs.sigma, embeds)
    chosen, rejected = error(prediction, inputs.target).chunk(2)
    reference_chosen, reference_rejected = error(reference, inputs.target).chunk(2)
    scale = None if reserve is None else preserving_scale(*(prediction - inputs.target).chunk(2), reserve)
    errors = PairErrors(
        policy_chosen=chosen,
        policy_rejected=rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        rejected_scale=scale,
        distance=torch.stack(error(prediction, reference).chunk(2)).mean(0),
    )
    norms = prediction.detach().flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
    return errors, sum(norms.chunk(2)) / 2


@dataclass(frozen=True, kw_only=True, eq=False)
class _Inputs:
    noisy: Latents
    sigma: Sigmas
    target: Latents


def _inputs(policy: Policy, *clips: Latents, noise: Latents, sigma: Sigmas) -> _Inputs:
    """Give what the network sees and should say of several videos that share noise and sigma."""
    clean, noises = torch.cat(clips).to(policy.device), noise.repeat(len(clips), 1, 1, 1, 1).to(policy.device)
    sigmas = sigma.repeat(len(clips)).to(policy.device)
    return _Inputs(noisy=flow.noisy(clean, noises, sigmas), sigma=sigmas, target=flow.velocity(clean, noises))


def _rwr_losses(policy: Policy, pool: Pool, batch: Sequence[Drawn], embed: Embed) -> Losses:
    inputs = _inputs(
        policy,
        torch.stack([pool.latents(drawn.item.chosen) for drawn in batch]),
        noise=torch.stack([drawn.noise for drawn in batch]),
        sigma=torch.tensor([drawn.sigma for drawn in batch]),
    )
    captions = [_view(pool, drawn.item.chosen, drawn.has_caption).caption for drawn in batch]
    embeds = torch.stack([embed(caption) for caption in captions]).to(policy.device)
    prediction = policy.velocity(inputs.noisy, inputs.sigma, embeds)
    weight = torch.tensor([drawn.item.weight for drawn in batch], device=policy.device)
    found = rwr_loss(error(prediction, inputs.target), weight)
    return Losses(loss=found.loss, measures={"weight": found.weight, "chosen_error": found.error})


def mean_reference_error(policy: Policy, batch: PairBatch) -> float:
    """Give the reference's mean error on a batch of pairs, by which the first beta is set."""
    with torch.no_grad(), policy.as_reference():
        inputs = _inputs(policy, batch.chosen, batch.rejected, noise=batch.noise, sigma=batch.sigma)
        embeds = batch.prompt_embeds.to(policy.device).repeat(2, 1, 1)
        return error(policy.velocity(inputs.noisy, inputs.sigma, embeds), inputs.target).mean().item()
