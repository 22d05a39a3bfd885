from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_history
import torch

from align import rounds
from align.constraint import Constraint, MultiplierState, Statistics
from align.pairing import Pairing, compare
from align.rollouts import Rollout, Scores
from align.rounds import Seen
from align.settings import AlignConfig
from reward.preferences import Source

LIMITS = tiny_history.LIMITS
STATE = MultiplierState(
    statistics=Statistics(reward_mean=0.0, reward_std=1.0, scales=(1.0, 1.0)), multipliers=(1.0, 0.0)
)


@pytest.fixture
def config() -> AlignConfig:
    """Limits for the share of unsafe videos, and for the mean cost of violence."""
    return AlignConfig(prompts=Source(path=Path("prompts.json")), constraint=Constraint(limits=LIMITS))


def rollout(**changes: Any) -> Rollout:
    """A video that the judge finds safe, of cost -1."""
    told: dict[str, Any] = {
        "prompt": "a",
        "prompt_type": "safety_critical",
        "text": "a",
        "seed": 0,
        "file": "a.mp4",
        "motion": 1.0,
    }
    told |= {
        "reward": 0.0,
        "cost": -1.0,
        "tag_costs": {"violence": -2.0},
        "reward_spread": 0.0,
        "cost_spread": 0.0,
        "flaw": None,
    }
    return Rollout(**told | changes)


BLANK = rollout(flaw="blank", reward=2.0, cost=-9.0, tag_costs={"violence": -9.0})
SHOWN = [rollout(), rollout(tag_costs={"violence": -5.0}), rollout(cost=0.5, tag_costs={"violence": 3.0})]


@pytest.mark.parametrize(("flaw", "unsafe"), [("blank", True), ("noise", True), ("frozen", False), (None, False)])
def test_what_shows_nothing_is_unsafe_and_what_stands_still_may_be_right(flaw: str | None, unsafe: bool):
    made = rollout(flaw=flaw)
    assert (made.unsafe, made.cost) == (unsafe, -1.0)
    assert rollout(flaw=flaw, cost=0.5).unsafe


def test_what_shows_nothing_breaks_every_limit(config: AlignConfig):
    """Of 4 videos 2 are unsafe; violence costs -2 - 5 + 3, and the blank one as much as the worst, 3."""
    found = rounds.measurement_of(config, Seen(rollouts=[*SHOWN, BLANK], fixed=[]))
    assert (found.num_videos, found.totals) == (4, (2.0, -1.0))
    safe = rounds.measurement_of(config, Seen(rollouts=[*SHOWN[:2], BLANK], fixed=[]))
    assert safe.totals == (1.0, pytest.approx(-7.0)), "at least 0, though all costs that were seen are lower"


def test_scores_of_files_that_nobody_looked_at_stay_as_they_are(config: AlignConfig):
    scores = Scores(reward=0.0, cost=-9.0, tag_costs={"violence": -9.0}, reward_spread=0.0, cost_spread=0.0)
    assert rounds.costs_of(config, [scores]).tolist() == [[-9.0, -9.0]]


def test_the_log_counts_what_shows_nothing_as_unsafe_at_the_judges_cost(config: AlignConfig):
    """Of the rollouts 2 of 4, of the validation videos 1 of 2; the mean cost is (-1 - 1 + .5 - 9) / 4."""
    shown = rounds.describe(config, Seen(rollouts=[*SHOWN, BLANK], fixed=[BLANK, SHOWN[0]]), STATE)
    assert (shown["rollout_unsafe"], shown["validation_unsafe"], shown["limited_harm"]) == (0.5, 0.5, 0.5)
    assert shown["rollout_cost"] == -2.625


def test_guards_see_what_shows_nothing_wherever_harm_was_asked_for(config: AlignConfig):
    """Of four fixed videos one, of a red-team prompt, became blank; motion is that of harmless ones: a half."""
    calm = [rollout(prompt_type="safety_neutral", motion=2.0)] * 2
    before, after = [*calm, *SHOWN[:2]], [*(replace(clip, motion=1.0) for clip in calm), SHOWN[0], BLANK]
    seen, reference = Seen(rollouts=[], fixed=after), Seen(rollouts=[], fixed=before)
    reading = rounds.reading_of(config, 0, seen, reference, STATE, {})
    assert (reading.degenerate, reading.motion) == (0.25, 0.5)


def test_nothing_is_learnt_from_what_shows_nothing(config: AlignConfig):
    """Its costs are the highest, so neither by utility nor by cost is it better than an unsafe one; a safe one wins."""
    pool = rounds.pool_of(config, [SHOWN[2], BLANK], list(torch.zeros(2, 1)))
    assert (pool.unsafe.tolist(), pool.cost.tolist()) == ([True, True], [0.5, 0.5])
    assert pool.limited_costs.tolist() == [[0.5, 3.0], [0.5, 3.0]]
    pool = rounds.pool_of(config, [SHOWN[0], replace(BLANK, reward=0.0)], list(torch.zeros(2, 1)))
    (pair,) = compare(Pairing(safe_first=True), *_scored(pool))
    assert (pair.chosen, pair.rejected) == (0, 1)


def _scored(pool: rounds.Pool) -> tuple[Any, ...]:
    return torch.zeros(2).numpy(), pool.rewards, pool.cost, pool.unsafe
