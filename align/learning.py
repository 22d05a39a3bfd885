"""What a step learns from, and what the objectives make of it.

Noise, sigma and caption dropout of an item are a function of (seed, round, item, epoch): they depend neither on the
batch that the item is in nor on the number of processes, and the two videos of a pair always share them. Where draws
recur after some epochs, so do the reference's errors, and its forward pass can be saved.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from align import constraint as limits
from align import flow
from align.constraint import Constraint, MultiplierState
from align.flow import Latents, Sigmas
from align.objectives import Objective
from align.objectives.dpo import Dpo, dpo_loss, preserving_scale
from align.objectives.pairs import Labels, PairBatch, PairErrors, View
from align.objectives.rwr import Rwr, Scored, rwr_loss, weights
from align.pairing import Comparison, Pairing, compare, weigh
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
    draws: PositiveInt | None = None
    """Epochs of a round after which an item's noise, sigma and dropout recur; what the reference says of them is kept,
    by each process for itself, which saves one of a DPO step's three passes. Null: new ones in every epoch."""


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
    key: tuple[int, int]
    """Place of the item, and number of its draw: the same in a round only where all that is below is."""
    noise: Float[Tensor, "c lf lh lw"]
    sigma: float
    has_caption: bool


# What there is to learn -------------------------------------------------------------------------------------


_LEAST_PRICE = 0.01
"""Sum of multipliers below which harm has no price to speak of: a rule that multiplies brings none of them to 0."""


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
            each = weigh(pairing, pairs, pool.unsafe, has_price=sum(state.multipliers) >= _LEAST_PRICE)
            return [
                Item(chosen=pair.chosen, rejected=pair.rejected, preference=pair.preference, weight=weight)
                for pair, weight in zip(pairs, each, strict=True)
            ]
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
    number = epoch if levels.draws is None else epoch % levels.draws
    chance = generator(seed, step=number, purpose=f"noise of {name}, item {index}")
    logit = levels.mean + levels.std * torch.randn(1, generator=chance)
    sigma = flow.shifted(torch.sigmoid(logit), levels.shift).item()
    has_caption = torch.rand(1, generator=chance).item() >= levels.text_dropout
    noise = torch.randn(pool.latents(items[index].chosen).shape, generator=chance)
    return Drawn(item=items[index], key=(index, number), noise=noise, sigma=sigma, has_caption=has_caption)


# Losses -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Losses:
    """What a batch gave, a number for each item; the mean of `loss` is what to minimise."""

    loss: Float[Tensor, " b"]
    measures: Mapping[str, Float[Tensor, " b"]]
    """To be shown, without gradient."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What the reference says of the videos of some pairs, all chosen ones before all rejected ones."""

    error: Float[Tensor, " n"]
    norm: Float[Tensor, " n"]
    """Of the velocity."""
    velocity: Latents | None
    """None: not kept."""


References = dict[tuple[int, int], Reference]
"""What it says of each pair that was drawn in a round, by `Drawn.key`."""


def losses_of(
    objective: Objective,
    policy: Policy,
    pool: Pool,
    batch: Sequence[Drawn],
    embed: "Embed",
    beta: float | None,
    kept: References | None = None,
) -> Losses:
    """Give the losses of some items; DPO needs `beta`, and with `kept` asks its reference only what that lacks."""
    match objective:
        case Dpo():
            assert beta is not None, "DPO needs its beta"
            return _dpo_losses(objective, policy, pool, batch, embed, beta, kept)
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


def _dpo_losses(
    objective: Dpo,
    policy: Policy,
    pool: Pool,
    drawn: Sequence[Drawn],
    embed: Embed,
    beta: float,
    kept: References | None,
) -> Losses:
    batch = pair_batch(pool, drawn, embed)
    inputs = _pair_inputs(policy, batch)
    prediction = inputs.velocity(policy)
    reference = _ask(policy, inputs) if kept is None else _recall(policy, inputs, [each.key for each in drawn], kept)
    errors = pair_errors(prediction, reference, inputs.target, objective.chosen_reserve)
    labels, sigma = _to(batch.labels, policy.device), batch.sigma.to(policy.device)
    found = dpo_loss(objective, errors, labels, sigma, beta)
    shown = {name: getattr(found, name) for name in found.__slots__ if name != "loss"}
    norms = prediction.detach().flatten(1).norm(dim=1) / reference.norm
    shown |= {"velocity_norm": sum(norms.chunk(2)) / 2, "reference_error": errors.reference_chosen}
    if errors.distance is not None:
        shown["distance"] = errors.distance.detach()
    return Losses(loss=found.loss, measures=shown)


def _to(labels: Labels, device: torch.device) -> Labels:
    moved = {name: getattr(labels, name) for name in labels.__slots__}
    return Labels(**{name: value if value is None else value.to(device) for name, value in moved.items()})


def pair_errors(prediction: Latents, reference: Reference, target: Latents, reserve: float | None) -> PairErrors:
    """Give the errors of policy and reference on pairs, of which all chosen videos come first."""
    chosen, rejected = error(prediction, target).chunk(2)
    reference_chosen, reference_rejected = reference.error.chunk(2)
    scale = None if reserve is None else preserving_scale(*(prediction - target).chunk(2), reserve)
    apart = None if reference.velocity is None else error(prediction, reference.velocity)
    return PairErrors(
        policy_chosen=chosen,
        policy_rejected=rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        rejected_scale=scale,
        distance=None if apart is None else torch.stack(apart.chunk(2)).mean(0),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Inputs:
    """What the network sees of videos, and should say of them."""

    noisy: Latents
    sigma: Sigmas
    embeds: Float[Tensor, "b tokens d"]
    target: Latents

    def velocity(self, policy: Policy) -> Latents:
        return policy.velocity(self.noisy, self.sigma, self.embeds)

    def at(self, places: list[int]) -> "_Inputs":
        return _Inputs(**{name: value[places] for name, value in vars(self).items()})


def _inputs(
    policy: Policy, *clips: Latents, noise: Latents, sigma: Sigmas, embeds: Float[Tensor, "b tokens d"]
) -> _Inputs:
    """Give the inputs of several videos that share noise, sigma and caption."""
    clean, noises = torch.cat(clips).to(policy.device), noise.repeat(len(clips), 1, 1, 1, 1).to(policy.device)
    sigmas = sigma.repeat(len(clips)).to(policy.device)
    return _Inputs(
        noisy=flow.noisy(clean, noises, sigmas),
        sigma=sigmas,
        embeds=embeds.to(policy.device).repeat(len(clips), 1, 1),
        target=flow.velocity(clean, noises),
    )


def _pair_inputs(policy: Policy, batch: PairBatch) -> _Inputs:
    both = batch.chosen, batch.rejected
    return _inputs(policy, *both, noise=batch.noise, sigma=batch.sigma, embeds=batch.prompt_embeds)


def _ask(policy: Policy, inputs: _Inputs) -> Reference:
    with torch.no_grad(), policy.as_reference():
        velocity = inputs.velocity(policy)
    return Reference(error=error(velocity, inputs.target), norm=velocity.flatten(1).norm(dim=1), velocity=velocity)


def _recall(policy: Policy, inputs: _Inputs, keys: Sequence[tuple[int, int]], kept: References) -> Reference:
    """Give what the reference says of pairs, asked only about those that are not kept, which then are."""
    for place, key in enumerate(keys):
        if key not in kept:
            # Each pair by itself: in its last bits an answer depends on what else is in the batch. So after a resume,
            # when nothing is kept, and on any process, it is the same as before.
            kept[key] = replace(_ask(policy, inputs.at([place, place + len(keys)])), velocity=None)
    answers = [kept[key] for key in keys]
    return Reference(
        error=torch.stack([answer.error for answer in answers], dim=1).flatten(),
        norm=torch.stack([answer.norm for answer in answers], dim=1).flatten(),
        velocity=None,
    )


def _rwr_losses(policy: Policy, pool: Pool, batch: Sequence[Drawn], embed: Embed) -> Losses:
    captions = [_view(pool, drawn.item.chosen, drawn.has_caption).caption for drawn in batch]
    inputs = _inputs(
        policy,
        torch.stack([pool.latents(drawn.item.chosen) for drawn in batch]),
        noise=torch.stack([drawn.noise for drawn in batch]),
        sigma=torch.tensor([drawn.sigma for drawn in batch]),
        embeds=torch.stack([embed(caption) for caption in captions]),
    )
    weight = torch.tensor([drawn.item.weight for drawn in batch], device=policy.device)
    found = rwr_loss(error(inputs.velocity(policy), inputs.target), weight)
    return Losses(loss=found.loss, measures={"weight": found.weight, "chosen_error": found.error})


def mean_reference_error(policy: Policy, batch: PairBatch) -> float:
    """Give the reference's mean error on a batch of pairs, by which the first beta is set."""
    return _ask(policy, _pair_inputs(policy, batch)).error.mean().item()
