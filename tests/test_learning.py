from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from align import learning
from align.constraint import Constraint, Limit, MultiplierState, Statistics
from align.learning import Drawn, Item, NoiseLevels, Pool, References, items_of
from align.objectives.dpo import Dpo
from align.objectives.pairs import View
from align.objectives.rwr import Rwr
from align.pairing import Comparison, Pairing
from align.policy import Lora, Policy
from tests import tiny_wan

SHAPE = (4, 6, 4, 4)
LIMITED = Constraint(limits=(Limit(name="unsafe", bound=0.1),))
UNIT = Statistics(reward_mean=0.0, reward_std=1.0, scales=(1.0,))


def pool(**changes: Any) -> Pool:
    """Two prompts with two videos each: of the first, the more useful one is unsafe."""
    clips = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    cost = np.array([1.0, -1.0, -2.0, -1.0])
    fields: dict[str, Any] = {
        "prompts": ("a red circle", "a red circle", "a blue square", "a blue square"),
        "rewards": np.array([2.0, 1.0, 0.0, 1.0]),
        "cost": cost,
        "limited_costs": cost[:, None],
        "views": tuple(View(caption=text, frame_seconds=(0.0,)) for text in "aabb"),
        "latents": clips.__getitem__,
    }
    return Pool(**(fields | changes))


def items(objective: Dpo | Rwr, multiplier: float, source: Pool | None = None) -> list[Item]:
    state = MultiplierState(statistics=UNIT, multipliers=(multiplier,))
    return items_of(objective, Pairing(), source or pool(), LIMITED, state)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = tiny_wan.build(tmp_path_factory.mktemp("learning") / "wan")
    found = Policy.load(folder, lora=Lora(rank=2, alpha=2))
    for name, parameter in found.named_lora().items():
        if "lora_B" in name:  # so that policy and reference differ
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
    return found


def embed(policy: Policy) -> Callable[[str], Tensor]:
    return lambda text: policy.encode_prompts([text])[0]


def drawn(source: Pool, found: list[Item], **levels: Any) -> list[Drawn]:
    settings = NoiseLevels(**levels)
    return [learning.draw(found, i, source, settings, seed=3, epoch=0, name="round 0") for i in range(len(found))]


# What there is to learn -------------------------------------------------------------------------------------


def test_the_multiplier_turns_a_pair_round():
    """Utilities of the first prompt: 2 - m and 1, both over 1 + m; they are equal at m = 1."""
    assert items(Dpo(), 0.5)[0] == Item(chosen=0, rejected=1)
    assert items(Dpo(), 1.5)[0] == Item(chosen=1, rejected=0)
    assert items(Dpo(), 1.5)[1] == Item(chosen=3, rejected=2)


def test_pairs_of_harm_get_their_share_of_the_loss():
    """Of two pairs the first is about harm: .8 of 2 for it, .2 of 2 for the other."""
    state = MultiplierState(statistics=UNIT, multipliers=(1.5,))
    found = items_of(Dpo(), Pairing(harm_share=0.8), pool(), LIMITED, state)
    assert [(item.chosen, item.weight) for item in found] == [(1, pytest.approx(1.6)), (3, pytest.approx(0.4))]
    state = MultiplierState(statistics=UNIT, multipliers=(0.001,))
    free = items_of(Dpo(), Pairing(harm_share=0.8), pool(), LIMITED, state)
    assert [item.weight for item in free] == [1.0, 1.0]


def test_peoples_comparisons_come_before_the_judges():
    said = (Comparison(chosen=2, rejected=3, preference=0.75),)
    assert items(Dpo(), 1.5, pool(comparisons=said)) == [Item(chosen=2, rejected=3, preference=0.75)]


def test_weights_are_those_of_the_net_reward():
    """Of the first prompt, net rewards at multiplier 2 are 0 and 1: weights 2 / (1 + e) and 2 e / (1 + e)."""
    found = {item.chosen: item.weight for item in items(Rwr(), 2.0)}
    assert found[0] == pytest.approx(2 / (1 + np.e))
    assert found[1] == pytest.approx(2 * np.e / (1 + np.e))


def test_fine_tuning_on_chosen_ones_is_regression_without_temperature():
    assert items(Rwr(temperature=None, chosen_only=True), 2.0) == [Item(chosen=1), Item(chosen=3)]


# Chance -----------------------------------------------------------------------------------------------------


def test_chance_is_a_function_of_item_and_epoch():
    source, found = pool(), items(Dpo(), 0.0)

    def again(index: int, epoch: int, name: str = "round 0") -> Drawn:
        return learning.draw(found, index, source, NoiseLevels(), seed=3, epoch=epoch, name=name)

    one = again(0, 0)
    assert torch.equal(one.noise, again(0, 0).noise)
    assert one.sigma == again(0, 0).sigma
    for other in (again(1, 0), again(0, 1), again(0, 0, "round 1")):
        assert other.sigma != one.sigma
        assert not torch.equal(other.noise, one.noise)


def test_draws_recur_after_so_many_epochs():
    """Of two draws, epochs 0 and 1 have those that they would have anyway, and epoch 3 has that of epoch 1."""
    source, found = pool(), items(Dpo(), 0.0)

    def at(epoch: int, draws: int | None) -> Drawn:
        return learning.draw(found, 1, source, NoiseLevels(draws=draws), seed=3, epoch=epoch, name="round 0")

    for epoch, same in ((0, 0), (1, 1), (2, 0), (3, 1)):
        ours, theirs = at(epoch, 2), at(same, None)
        assert torch.equal(ours.noise, theirs.noise)
        assert (ours.key, ours.sigma, ours.has_caption) == ((1, same), theirs.sigma, theirs.has_caption)


def test_a_shift_moves_sigmas_towards_noise():
    source, found = pool(), items(Dpo(), 0.0) * 50
    low, high = ([each.sigma for each in drawn(source, found, shift=shift)] for shift in (1.0, 5.0))
    assert np.mean(low) == pytest.approx(0.5, abs=0.07)
    assert np.mean(high) > np.mean(low) + 0.2
    assert 0 < min(low) < max(high) < 1


def test_dropout_takes_the_caption_of_both_videos():
    source, found = pool(), items(Dpo(), 0.0) * 50
    chances = drawn(source, found, text_dropout=0.3)
    assert 10 < sum(not each.has_caption for each in chances) < 50
    batch = learning.pair_batch(source, chances, lambda text: torch.zeros(2, 3))
    assert batch.chosen_views == batch.rejected_views
    assert {view.caption for view in batch.chosen_views} == {"", "a", "b"}


# Losses -----------------------------------------------------------------------------------------------------


def test_the_first_step_of_a_new_lora_has_ln_2_and_no_margin(tmp_path: Path):
    fresh = Policy.load(tiny_wan.build(tmp_path / "wan"), lora=Lora(rank=2, alpha=2))
    source, found = pool(), items(Dpo(), 1.5)
    got = learning.losses_of(Dpo(), fresh, source, drawn(source, found), embed(fresh), beta=500.0)
    assert got.measures["margin"].tolist() == [0.0, 0.0]
    assert got.loss.tolist() == pytest.approx([np.log(2)] * 2)
    assert got.measures["velocity_norm"].tolist() == pytest.approx([1.0, 1.0])
    assert got.measures["distance"].tolist() == [0.0, 0.0]


def test_a_pairs_loss_is_that_of_its_four_errors(policy: Policy):
    """Each error computed on its own: -log sigmoid(-beta / 2 (chosen gap - rejected gap))."""
    source, found = pool(), items(Dpo(), 1.5)[:1]
    (chance,) = drawn(source, found, text_dropout=0.0)
    embeds = policy.encode_prompts(["a"])
    sigma = torch.tensor([chance.sigma])

    def gap(place: int) -> Tensor:
        clean = source.latents(place)
        noisy = ((1 - chance.sigma) * clean + chance.sigma * chance.noise)[None]
        ours = (policy.velocity(noisy, sigma, embeds)[0] - (chance.noise - clean)).square().mean()
        with policy.as_reference():
            theirs = (policy.velocity(noisy, sigma, embeds)[0] - (chance.noise - clean)).square().mean()
        return ours - theirs

    margin = -(300.0 / 2) * (gap(1) - gap(0))
    got = learning.losses_of(Dpo(), policy, source, [chance], embed(policy), beta=300.0)
    assert got.measures["margin"].item() == pytest.approx(margin.item(), rel=1e-3)
    assert got.loss.item() == pytest.approx(-torch.nn.functional.logsigmoid(margin).item(), rel=1e-3)


def test_a_leash_holds_the_policy_to_its_reference(policy: Policy):
    """The distance is that of the predictions, on both videos, and a step of the leash alone shortens it."""
    source, found = pool(), items(Dpo(), 1.5)[:1]
    (chance,) = drawn(source, found, text_dropout=0.0)
    got = learning.losses_of(Dpo(leash=1e6), policy, source, [chance], embed(policy), beta=1e-6)
    sigma, embeds, far = torch.tensor([chance.sigma]), policy.encode_prompts(["a"]), []
    for place in (1, 0):
        noisy = ((1 - chance.sigma) * source.latents(place) + chance.sigma * chance.noise)[None]
        ours = policy.velocity(noisy, sigma, embeds)
        with policy.as_reference():
            far.append((ours - policy.velocity(noisy, sigma, embeds)).square().mean().item())
    assert got.measures["distance"].item() == pytest.approx(np.mean(far), rel=1e-3)
    assert got.loss.item() == pytest.approx(1e6 * np.mean(far), rel=1e-3)


def test_a_kept_reference_is_not_asked_again(policy: Policy):
    """A pass of the policy each time, and one of its reference for each pair that is not kept yet: both, one, none."""
    source, found = pool(), items(Dpo(), 1.5)
    chances, kept, passed = drawn(source, found), {}, []
    hook = policy.transformer.register_forward_hook(lambda *_: passed.append(torch.is_grad_enabled()))
    for batch, given in ((chances, {}), (chances[:1], kept), (chances, kept), (chances[::-1], kept)):
        learning.losses_of(Dpo(), policy, source, batch, embed(policy), 300.0, given)
    hook.remove()
    assert passed == [True, False, False, True, False, True, False, True]
    assert list(kept) == [(0, 0), (1, 0)]
    assert all(answer.velocity is None for answer in kept.values())


def test_losses_are_the_same_with_a_kept_reference(policy: Policy):
    """Of a pair by itself to the bit; of several, which are asked about one by one, to rounding."""
    source, found = pool(), items(Dpo(), 1.5)
    chances, kept, objective = drawn(source, found), {}, Dpo(chosen_reserve=0.5, anchor=1.0)

    def lose(batch: list[Drawn], *given: References) -> dict[str, Tensor]:
        got = learning.losses_of(objective, policy, source, batch, embed(policy), 300.0, *given)
        return {"loss": got.loss.detach(), **got.measures}

    for batch, tolerance in (chances[1:], 0), (chances, 1e-3), (chances[::-1], 1e-3):
        fresh, again = lose(batch), lose(batch, kept)
        assert fresh.keys() - again.keys() == {"distance"}
        for name, value in again.items():
            torch.testing.assert_close(value, fresh[name], rtol=tolerance, atol=tolerance / 10)


def test_what_is_kept_does_not_depend_on_the_batch(policy: Policy):
    source, found = pool(), items(Dpo(), 1.5) * 3
    chances, together, alone = drawn(source, found), {}, {}
    for batch, kept in ((chances, together), *(([chance], alone) for chance in chances[::-1])):
        learning.losses_of(Dpo(), policy, source, batch, embed(policy), 300.0, kept)
    for key, answer in together.items():
        assert torch.equal(answer.error, alone[key].error)
        assert torch.equal(answer.norm, alone[key].norm)


def test_a_step_down_the_gradient_prefers_chosen(policy: Policy):
    source, found = pool(), items(Dpo(), 1.5)
    chances = drawn(source, found)

    def margin() -> float:
        got = learning.losses_of(Dpo(), policy, source, chances, embed(policy), beta=300.0)
        gradients = torch.autograd.grad(got.loss.mean(), list(policy.named_lora().values()))
        with torch.no_grad():
            for parameter, gradient in zip(policy.named_lora().values(), gradients, strict=True):
                parameter -= 1e-3 * gradient
        return got.measures["margin"].mean().item()

    assert margin() < margin()


def test_regression_weighs_errors(policy: Policy):
    source = pool()
    chances = drawn(source, [Item(chosen=0, weight=1.0), Item(chosen=0, weight=3.0)])
    got = learning.losses_of(Rwr(), policy, source, chances, embed(policy), beta=None)
    assert got.loss.tolist() == pytest.approx((got.measures["chosen_error"] * torch.tensor([1.0, 3.0])).tolist())
