"""What a round sees: videos of the policy as it is, on new prompts and on fixed ones, and what follows from them.

The first round's videos are the reference's. They set the units of all scores, and all guards compare with them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from align import constraint as limits
from align import offline
from align.cache import LatentCache
from align.constraint import Dual, Measurement, MultiplierState
from align.folder import fingerprint
from align.guards import Footage, Reading, degenerate_excess, motion_ratio
from align.learning import Pool
from align.objectives.rwr import Rwr
from align.offline import Offline
from align.policy import Policy
from align.rollouts import Judges, Maker, Rollout, RolloutPlan, Round, Scores, read_rewrites
from align.settings import AlignConfig, load_prompts
from reward.files import DataError
from reward.records import Prompt, prompts_of
from reward.run import Stop, generator, seed_for


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """The videos before a round."""

    rollouts: Sequence[Rollout]
    """Of the round's own prompts, counterfactuals included."""
    fixed: Sequence[Rollout]
    """Of the validation prompts, at the same seeds each time."""

    @property
    def own(self) -> list[Rollout]:
        """The rollouts that answer what users asked for."""
        return [rollout for rollout in self.rollouts if not rollout.is_counterfactual]


class Rounds:
    """Makes each round's videos, and keeps them in the run's folder."""

    def __init__(self, config: AlignConfig, policy: Policy, judges: Judges, accelerator: Accelerator, stop: Stop):
        self.config, self.policy, self.judges, self.accelerator = config, policy, judges, accelerator
        self.stop = stop
        self.prompts, self.fixed = load_prompts(config)
        self.rewrites = read_rewrites(config.rewrites) if config.rewrites else {}
        self.pairs = offline.load(config.offline) if config.offline else []
        self.model_sha256 = fingerprint(config.model)
        self.cache = LatentCache(config.cache, policy, config.sampler)

    @property
    def texts(self) -> set[str]:
        """All that may have a part in training, the choice of a round or the multipliers: prompts, and their rewrites.

        A run that ends early did not come to all of them.
        """
        asked = {prompt.text for prompt in (*self.prompts, *self.fixed)}
        asked |= {prompt.text for pair in self.pairs for prompt in prompts_of(pair)}
        return asked | {self.rewrites[text] for text in asked & self.rewrites.keys()}

    def show(self, number: int) -> Seen:
        """Make what is missing of a round's videos, by turns with the other processes.

        Raises: Stopped: a process was asked to stop.
        """
        return Seen(
            rollouts=self._make(self.round(number), self._prompts_of(number), self.config.rollouts, seed=number + 1),
            fixed=self._make(self._round("validation", number), self.fixed, self._alone, seed=0),
        )

    def recall(self, number: int) -> Seen:
        """Read the videos of a round that was stopped half-way, which its policy could not make again.

        Raises: DataError: they are gone, or damaged.
        """
        return Seen(rollouts=self._read(self.round(number), self._num_chunks), fixed=[])

    def reference(self) -> Seen:
        """Read what the reference showed on the fixed prompts.

        Raises: DataError: it is gone, or damaged.
        """
        num_chunks = math.ceil(len(self.fixed) / self._alone.chunk_size)
        return Seen(rollouts=[], fixed=self._read(self._round("validation", 0), num_chunks))

    def pool(self, number: int, seen: Seen) -> Pool:
        """Give what a round may learn from: its videos and replayed ones, or, for the first, those that others made.

        The cache then has the embeddings of all captions, so that steps do without the text encoder.
        """
        settings = self.config.offline
        found = self._offline(settings) if number == 0 and settings else self._online(number, seen)
        self._fill([], list(dict.fromkeys(["", *(view.caption for view in found.views)])))
        return found

    def _online(self, number: int, seen: Seen) -> Pool:
        numbers = range(max(0, number - self.config.replay), number + 1)
        earlier = [rollout for old in numbers[:-1] for rollout in self.recall(old).rollouts]
        rollouts = [*earlier, *seen.rollouts]
        latents = [
            clip for old in numbers for chunk in range(self._num_chunks) for clip in self.round(old).latents(chunk)
        ]
        return pool_of(self.config, rollouts, latents)

    def forget(self, number: int) -> None:
        """Remove the latents that no round after this one learns from."""
        if number >= self.config.replay:
            self.round(number - self.config.replay).forget_latents()

    def _offline(self, settings: Offline) -> Pool:
        clips = offline.videos_of(self.pairs)
        self._fill([clip.path for clip in clips], [])
        by_people = settings.prefer == "people"
        scores = offline.judged(clips, self.judges) if self._needs_scores(settings) else []
        return Pool(
            prompts=tuple(clip.prompt.text for clip in clips),
            rewards=rewards_of(scores) if scores else np.zeros(len(clips)),
            cost=offline.labelled_costs(clips) if by_people else np.array([s.cost for s in scores]),
            limited_costs=costs_of(self.config, scores) if scores else np.zeros((len(clips), self._num_limits)),
            views=tuple(self.config.sampler.view(clip.prompt.text) for clip in clips),
            latents=lambda place: self.cache.latents(clips[place].path),
            comparisons=offline.compared(settings, self.pairs, clips) if by_people else None,
        )

    def _fill(self, paths: Sequence[Path], texts: Sequence[str]) -> None:
        """Make what the cache lacks, a share by each process.

        Raises: Stopped: a process was asked to stop.
        """
        rank, size = self.accelerator.process_index, self.accelerator.num_processes
        self.cache.fill(paths[rank::size], texts[rank::size], self.stop)
        self.stop.check()

    def _needs_scores(self, settings: Offline) -> bool:
        """Whether anything is made of the judge's scores: files may be of a size or rate that it does not know."""
        objective = self.config.objective
        return settings.prefer == "judge" or (isinstance(objective, Rwr) and objective.temperature is not None)

    @property
    def _num_limits(self) -> int:
        return len(self.config.constraint.limits)

    def round(self, number: int) -> Round:
        """Give the folder of a round."""
        return self._round("rounds", number)

    def _round(self, kind: str, number: int) -> Round:
        settings: dict[str, Any] = {"model": self.model_sha256, "judge": self.judges.sha256, "seed": self.config.seed}
        settings |= {"sampler": self.config.sampler.model_dump(mode="json")}
        return Round(self.config.out / kind / f"{number:04d}", json.dumps(settings, sort_keys=True))

    @property
    def _alone(self) -> RolloutPlan:
        """One video of each fixed prompt, as many at a time as of a round's own."""
        plan = self.config.rollouts
        return RolloutPlan(num_per_prompt=1, num_counterfactuals=0, chunk_size=plan.chunk_size * plan.num_per_prompt)

    @property
    def _num_chunks(self) -> int:
        return math.ceil(self.config.rollouts.num_prompts / self.config.rollouts.chunk_size)

    def _make(self, where: Round, prompts: Sequence[Prompt], plan: RolloutPlan, *, seed: int) -> list[Rollout]:
        seed = seed_for(self.config.seed, 0, seed, "rollouts") % 2**32
        maker = Maker(policy=self.policy, sampler=self.config.sampler, judges=self.judges, seed=seed)
        chunks = [prompts[i : i + plan.chunk_size] for i in range(0, len(prompts), plan.chunk_size)]
        rank, size = self.accelerator.process_index, self.accelerator.num_processes
        mine = tqdm(range(rank, len(chunks), size), desc=where.folder.parent.name, leave=False, disable=rank > 0)
        for number in mine:
            if self.stop:
                break
            where.make(number, chunks[number], plan, self.rewrites, maker)
        self.stop.check()
        return self._read(where, len(chunks))

    def _read(self, where: Round, num_chunks: int) -> list[Rollout]:
        return [rollout for number in range(num_chunks) for rollout in where.rollouts(number)]

    def _prompts_of(self, number: int) -> list[Prompt]:
        """Give the prompts of a round: all come up once before any comes up twice."""
        size, total = self.config.rollouts.num_prompts, len(self.prompts)
        places = range(number * size, (number + 1) * size)
        orders = {
            epoch: torch.randperm(total, generator=generator(self.config.seed, step=epoch, purpose="prompts")).tolist()
            for epoch in {place // total for place in places}
        }
        return [self.prompts[orders[place // total][place % total]] for place in places]


# What follows from them -------------------------------------------------------------------------------------


def rewards_of(clips: Sequence[Scores]) -> Float[np.ndarray, " n"]:
    """Give the judge's rewards."""
    return np.array([clip.reward for clip in clips])


def pool_of(config: AlignConfig, rollouts: Sequence[Rollout], latents: Sequence[Tensor]) -> Pool:
    """Give what rollouts have to teach, by what the judge and the pixels say of them."""
    return Pool(
        prompts=tuple(rollout.prompt for rollout in rollouts),
        rewards=rewards_of(rollouts),
        cost=raised(np.array([rollout.cost for rollout in rollouts]), rollouts),
        limited_costs=costs_of(config, rollouts),
        views=tuple(config.sampler.view(rollout.prompt) for rollout in rollouts),
        latents=latents.__getitem__,
    )


def costs_of(config: AlignConfig, clips: Sequence[Scores]) -> Float[np.ndarray, "n k"]:
    """Give the cost that each limit is about, a column for each; see `raised`."""
    cost, tags = np.array([clip.cost for clip in clips]), list(clips[0].tag_costs)
    of_tags = np.array([[clip.tag_costs[tag] for tag in tags] for clip in clips]).reshape(len(clips), -1)
    return raised(limits.select_costs(config.constraint.limits, cost, of_tags, tags), clips)


def raised(costs: Float[np.ndarray, "n ..."], clips: Sequence[Scores]) -> Float[np.ndarray, "n ..."]:
    """Give what shows nothing the highest cost of these clips, above 0 in any case: it is unsafe, whatever the harm."""
    found, nothing = costs.copy(), np.array([clip.shows_nothing for clip in clips])
    found[nothing] = np.maximum(costs.max(axis=0), np.finfo(np.float64).tiny)
    return found


def measurement_of(config: AlignConfig, seen: Seen) -> Measurement:
    """Give what the multipliers follow: the charges of what users asked for."""
    spreads = np.array([[rollout.cost_spread] * len(config.constraint.limits) for rollout in seen.own])
    return limits.measure(costs_of(config, seen.own), config.constraint, spreads)


def start(config: AlignConfig, seen: Seen) -> tuple[MultiplierState, Dual]:
    """Set the units by the reference's videos, and the multipliers by the one-shot dual.

    Raises: DataError: the limits cannot be met together; the message holds the table.
    """
    bounds = config.constraint.limits
    statistics = limits.reference_statistics(bounds, rewards_of(seen.own), costs_of(config, seen.own))
    prompts = np.array([rollout.prompt for rollout in seen.rollouts])
    scores = rewards_of(seen.rollouts), costs_of(config, seen.rollouts), prompts
    try:
        found = limits.solve_dual(bounds, statistics, *scores, config.divergence)
    except ValueError as error:
        raise DataError(f"{config.out}: {error}") from error
    cap = config.constraint.cap
    return MultiplierState(
        statistics=statistics, multipliers=tuple(min(row.multiplier, cap) for row in found.rows)
    ), found


def describe(config: AlignConfig, seen: Seen, state: MultiplierState) -> dict[str, float]:
    """Give what the log says of a round's videos; rewards in standard deviations of the reference's."""
    own, names = seen.own, [limit.name for limit in config.constraint.limits]
    estimates = limits.estimate([measurement_of(config, seen)], config.constraint).tolist()
    shown = {
        "rollout_reward": float(limits.normalised(rewards_of(own), state.statistics).mean()),
        "rollout_cost": float(np.mean([rollout.cost for rollout in own])),
        "rollout_unsafe": float(np.mean([rollout.unsafe for rollout in own])),
        "validation_reward": float(limits.normalised(rewards_of(seen.fixed), state.statistics).mean()),
        "validation_unsafe": float(np.mean([rollout.unsafe for rollout in seen.fixed])),
    }
    shown |= {f"multiplier_{name}": value for name, value in zip(names, state.multipliers, strict=True)}
    return shown | {f"limited_{name}": value for name, value in zip(names, estimates, strict=True)}


def reading_of(
    config: AlignConfig, step: int, seen: Seen, reference: Seen, state: MultiplierState, means: Mapping[str, float]
) -> Reading:
    """Give what the guards read: videos beside the reference's, and means of the last steps.

    Motion and reward are those of harmless prompts: to refuse harm may slow a video down, and costs what was asked for.

    Raises: DataError: the reference's videos hardly move.
    """
    calm = [i for i, clip in enumerate(reference.fixed) if clip.prompt_type != "safety_critical" and clip.cost <= 0]
    ours, theirs = ([clips.fixed[i] for i in calm] for clips in (seen, reference))
    measured: dict[str, Any] = {}
    if calm:
        rewards = [limits.normalised(rewards_of(clips), state.statistics).mean() for clips in (ours, theirs)]
        measured = {
            "motion": _motion(config, _footage(ours), _footage(theirs)),
            "benign_reward": float(rewards[0] - rewards[1]),
        }
    spreads = [np.mean([clip.cost_spread for clip in clips.fixed]) for clips in (seen, reference)]
    return Reading(
        step=step,
        chosen_gap=means["chosen_gap"] / means["reference_error"] if "chosen_gap" in means else None,
        rejected_dominant=means.get("rejected_dominant"),
        velocity_norm=means.get("velocity_norm"),
        disagreement=float(spreads[0] / spreads[1]) if spreads[1] else None,
        degenerate=degenerate_excess(_footage(seen.fixed), _footage(reference.fixed)),
        **measured,
    )


def _footage(clips: Sequence[Rollout]) -> Footage:
    return Footage.of([clip.motion for clip in clips], [clip.flaw for clip in clips])


def _motion(config: AlignConfig, ours: Footage, theirs: Footage) -> float | None:
    if config.guards.least_motion is None:
        return None
    try:
        return motion_ratio(ours, theirs)
    except ValueError as error:
        raise DataError(f"{config.out}: {error}") from error
