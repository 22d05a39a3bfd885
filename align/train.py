"""Align a policy: `python -m align FILE.yaml [key=value ...]`, or `accelerate launch -m align ...` on several devices.

Rounds of three parts: videos of the policy as it is, judged; the multipliers, moved by what they show; training on
pairs of them (DPO) or on all of them by weight (RWR). The first videos are the reference's: they set the units of all
scores, and tell, before anything is trained, whether the limits can be met at all. What is shown, judged, saved and
kept is always the moving average of the LoRA. The same command resumes, and ends at the same bits.

    RUN/lora/             the best LoRA, in diffusers' format, its model card, and hashes of its prompts
    RUN/feasibility.json  what the reference's videos say of each limit
    RUN/metrics.jsonl     losses by step; scores, multipliers and guards with the first step of each round
    RUN/rounds/0003/      videos that a round learnt from
    RUN/validation/0003/  videos of the same prompts and seeds before each round
    RUN/curves.png        all that was measured, by step
    RUN/validation.png    a few validation prompts, round by round
    RUN/result.json       which round was best, and why the run ended
"""

import json
import math
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from align import card, estimate, guards, learning, pictures, rounds, table
from align import constraint as limits
from align.constraint import MultiplierState
from align.folder import LORA_FILE, PolicyError, prompts_file
from align.guards import Best, GuardState
from align.learning import Drawn, Item, Pool, References
from align.objectives.beta import BetaState, start_beta, steer
from align.objectives.dpo import Dpo
from align.policy import Policy
from align.rollouts import Judges
from align.rounds import Rounds, Seen
from align.settings import AlignConfig, check_batch, check_judge, check_window
from reward.checkpoint import CheckpointError, flatten_optimizer, restore_optimizer, with_prefix
from reward.config import ConfigError, parse
from reward.features import BackboneError
from reward.files import DataError, replacing
from reward.judge import Judge, JudgeError
from reward.model import ModelError
from reward.rules import RULES
from reward.run import Run, RunError, Step, Stop, Stopped, follow, generator, open_run, ramp, stop_on_signal
from reward.video import VideoError

SHOWN = ("round", "loss", "accuracy", "rollout_unsafe", "validation_reward")
"""What the progress bar has room for."""
USER_ERRORS = (
    BackboneError,
    CheckpointError,
    ConfigError,
    DataError,
    JudgeError,
    ModelError,
    PolicyError,
    RunError,
    VideoError,
)


class Aligner:
    """All that a run needs; `train` does its rounds."""

    pool: Pool
    items: Sequence[Item]
    references: References | None
    """Of the round's draws so far, on this process; None: they do not recur."""

    def __init__(self, config: AlignConfig, run: Run, accelerator: Accelerator, stop: Stop):
        self.config, self.run, self.accelerator = config, run, accelerator
        model = Judge.load(config.judge, device=str(accelerator.device))
        judges = Judges(model=model, rules=[RULES[name]() for name in config.rules])
        check_judge(judges, config)
        self.policy = Policy.load(
            config.model, device=accelerator.device, dtype=getattr(torch, config.dtype), lora=config.lora
        )
        if config.gradient_checkpointing:
            self.policy.pipeline.transformer.enable_gradient_checkpointing()
        self.rounds = Rounds(config, self.policy, judges, accelerator, stop)
        self.lora = self.policy.named_lora()
        self.optimizer = torch.optim.AdamW(
            self.lora.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.policy.transformer = accelerator.prepare(self.policy.pipeline.transformer)
        if isinstance(self.policy.transformer, DistributedDataParallel):
            # Buffers are constants here; sent round, they would have processes wait in passes that not all of them do.
            self.policy.transformer.broadcast_buffers = False
        self.average = {name: weight.detach().clone() for name, weight in self.lora.items()}
        self.best = dict(self.average)
        self.guards = GuardState()
        self.multipliers: MultiplierState | None = None
        self.beta: BetaState | None = None
        self.sums: dict[str, float] = {}
        """Of the measures of a round's steps so far."""
        self.result: dict[str, Any] = {}

    # Rounds -------------------------------------------------------------------------------------------------

    def train(self) -> Iterator[Step]:
        """Do the rounds that are left; at the end `best` holds the best round's LoRA."""
        config, done = self.config, self._resume()
        for number in range(done // config.steps_per_round, config.num_rounds):
            first = number * config.steps_per_round
            measures = self._begin(number) if done <= first else self._go_on(number)
            if self.result:
                return
            for step in range(max(done, first), first + config.steps_per_round):
                measures |= self._step(step, number)
                self.run.log(step + 1, measures)
                if (step + 1) % config.save_every == 0 or step + 1 == first + config.steps_per_round:
                    self.save(step + 1)
                yield Step(step=step + 1, measures=measures)
                measures = {}
            self.accelerator.wait_for_everyone()
            if self.run.is_main:
                self.rounds.forget(number)
        seen = self._show(config.num_rounds)
        _, events = self._guard(config.num_rounds, seen)
        self._consider(config.num_rounds, seen, events)
        self.result = {"ended": "all rounds done", "last": self._describe(seen)}

    def _begin(self, number: int) -> dict[str, Any]:
        """Look at the policy, move the multipliers, and make what a round learns from; give what is to be logged."""
        seen, config = self._show(number), self.config
        readings, events = self._guard(number, seen) if number else ({}, ())
        self._consider(number, seen, events)
        assert self.multipliers is not None
        self.multipliers = limits.update(self.multipliers, rounds.measurement_of(config, seen), config.constraint)
        self.sums = {}
        logged = {"round": number, **self._describe(seen), **readings, "events": [asdict(event) for event in events]}
        if stops := [event for event in events if event.level == "stop"]:
            self.result = {"ended": str(stops[0]), "last": logged}
            return logged
        self._learn_from(number, seen)
        return logged | {"num_items": len(self.items)}

    def _go_on(self, number: int) -> dict[str, Any]:
        self._learn_from(number, self.rounds.recall(number))
        return {}

    def _show(self, number: int) -> Seen:
        """Give the videos of the averaged policy; the first ones set the units and the multipliers."""
        self.policy.pipeline.transformer.eval()
        if self.config.offload:
            self.policy.pipeline.to(self.accelerator.device)
        with swapped(self.lora, self.average):
            seen = self.rounds.show(number)
        if self.multipliers is None:
            self.multipliers, found = rounds.start(self.config, seen)
            if self.run.is_main:
                rewritten = len(seen.rollouts) - len(seen.own)
                made_by = f"{len(seen.rollouts)} videos of the reference, {rewritten} of them of safe rewrites"
                tqdm.write(f"feasibility, by {made_by}:\n{found}")
                _write_json(self.config.out / "feasibility.json", asdict(found))
        return seen

    def _consider(self, number: int, seen: Seen, events: Sequence[guards.Event]) -> None:
        """Keep the policy that made these videos if it breaks no guard and is the best so far."""
        assert self.multipliers is not None
        estimates = limits.estimate([rounds.measurement_of(self.config, seen)], self.config.constraint)
        new = Best(
            step=number * self.config.steps_per_round,
            reward=self._describe(seen)["validation_reward"],
            violation=guards.violation_of(estimates, self.config.constraint.limits, self.multipliers.statistics),
        )
        if not events and guards.is_better(new, self.guards.best):
            self.guards = replace(self.guards, best=new)
            self.best = {name: weight.clone() for name, weight in self.average.items()}

    def _guard(self, number: int, seen: Seen) -> tuple[dict[str, float], Sequence[guards.Event]]:
        """Give what the guards read of the videos, and what they say."""
        assert self.multipliers is not None
        step = number * self.config.steps_per_round
        means = {name: total / self.config.steps_per_round for name, total in self.sums.items()}
        reading = rounds.reading_of(self.config, step, seen, self.rounds.reference(), self.multipliers, means)
        self.guards, events = guards.check(self.config.guards, reading, self.guards)
        for event in events:
            if self.run.is_main:
                tqdm.write(str(event))
        read = {"motion_ratio": reading.motion, "degenerate": reading.degenerate}
        read |= {"benign_reward": reading.benign_reward, "disagreement": reading.disagreement}
        return {name: value for name, value in read.items() if value is not None}, events

    def _describe(self, seen: Seen) -> dict[str, float]:
        assert self.multipliers is not None
        return rounds.describe(self.config, seen, self.multipliers)

    def _learn_from(self, number: int, seen: Seen) -> None:
        """Make the items of a round.

        Raises: DataError: there is none.
        """
        config = self.config
        assert self.multipliers is not None
        self.pool = self.rounds.pool(number, seen)
        self.references = None if config.noise.draws is None else {}
        self.items = learning.items_of(config.objective, config.pairing, self.pool, config.constraint, self.multipliers)
        if not self.items:
            raise DataError(
                f"round {number}: nothing to learn from {len(self.pool.prompts)} videos: none is better than another "
                "of its prompt; raise rollouts.num_prompts or num_per_prompt, or lower pairing.least_gap"
            )
        if config.offload:
            self.policy.offload()

    # Steps --------------------------------------------------------------------------------------------------

    def _step(self, step: int, number: int) -> dict[str, float]:
        config, embed = self.config, self.rounds.cache.prompt_embeds
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(config, step)
        self.policy.pipeline.transformer.train()
        parts = self._parts(step, number)
        if self.beta is None and isinstance(config.objective, Dpo):
            self.beta = start_beta(config.objective.beta, self._mean(self._reference_error(parts)))
        beta = None if self.beta is None else self.beta.value
        totals: dict[str, float] = {}
        for place, part in enumerate(parts):
            # Gradients need to meet those of other processes once, with the last part.
            with nullcontext() if place + 1 == len(parts) else self.accelerator.no_sync(self.policy.transformer):
                found = learning.losses_of(config.objective, self.policy, self.pool, part, embed, beta, self.references)
                self.accelerator.backward(found.loss.mean() / len(parts))
            for name, value in {"loss": found.loss, **found.measures}.items():
                totals[name] = totals.get(name, 0.0) + value.detach().mean().item() / len(parts)
        means = {name: self._mean(value) for name, value in totals.items()}
        norm = float(self.accelerator.clip_grad_norm_(self.lora.values(), config.max_gradient_norm))
        if not math.isfinite(means["loss"]) or not math.isfinite(norm):
            raise RunError(
                f"{config.out}: step {step + 1}: loss or gradient is not finite: {means}; lower learning_rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._update_average(step)
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in means.items()}
        if self.beta is not None and isinstance(config.objective, Dpo):
            means["beta"] = self.beta.value
            self.beta = steer(config.objective.beta, self.beta, means["folded_factor"])
        return means | {"gradient_norm": norm}

    def _parts(self, step: int, number: int) -> list[list[Drawn]]:
        """Give this process's share of a step, in the parts that are done one after the other."""
        config, total = self.config, len(self.items)
        first = (step - number * config.steps_per_round) * config.batch_size
        orders: dict[int, list[int]] = {}
        drawn = []
        rank, size = self.accelerator.process_index, self.accelerator.num_processes
        for place in range(first + rank, first + config.batch_size, size):
            epoch, index = divmod(place, total)
            if epoch not in orders:
                order = generator(config.seed, step=epoch, purpose=f"items of round {number}")
                orders[epoch] = torch.randperm(total, generator=order).tolist()
            name = f"round {number}"
            drawn.append(
                learning.draw(
                    self.items, orders[epoch][index], self.pool, config.noise, seed=config.seed, epoch=epoch, name=name
                )
            )
        return [drawn[part :: config.accumulate] for part in range(config.accumulate)]

    def _reference_error(self, parts: Sequence[Sequence[Drawn]]) -> float:
        batches = [learning.pair_batch(self.pool, part, self.rounds.cache.prompt_embeds) for part in parts]
        return float(np.mean([learning.mean_reference_error(self.policy, batch) for batch in batches]))

    def _mean(self, value: float) -> float:
        """Give the mean over processes, the same on all."""
        # On the device: a group of GPUs shares no numbers that lie on processors.
        return self.accelerator.reduce(
            torch.tensor(value, dtype=torch.float64, device=self.accelerator.device), "mean"
        ).item()

    def _update_average(self, step: int) -> None:
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        for name, weight in self.lora.items():
            self.average[name].lerp_(weight.detach(), 1 - decay)

    # Checkpoints --------------------------------------------------------------------------------------------

    def save(self, step: int) -> None:
        """Save a checkpoint after `step` finished steps."""
        assert self.multipliers is not None
        tensors, optimizer = flatten_optimizer(self.optimizer)
        for name, group in (("lora", self.lora), ("average", self.average), ("best", self.best)):
            tensors |= {f"{name}.{key}": value.detach() for key, value in group.items()}
        state = {
            "optimizer": optimizer,
            "model_sha256": self.rounds.model_sha256,
            "judge_sha256": self.rounds.judges.sha256,
            "multipliers": limits.to_json(self.multipliers),
            "guards": guards.to_json(self.guards),
            "beta": self.beta and asdict(self.beta),
            "sums": self.sums,
        }
        self.run.save(step, tensors, state)

    def _resume(self) -> int:
        point = self.run.resume()
        if point is None:
            return 0
        for name, found in (("model", self.rounds.model_sha256), ("judge", self.rounds.judges.sha256)):
            if (expected := point.state[f"{name}_sha256"]) != found:
                raise RunError(
                    f"{self.config.out}: its checkpoint was made with another {name}: SHA-256 {expected}, now {found}; "
                    "bring back the old one, or name another folder"
                )
        with torch.no_grad():
            for name, group in (("lora", self.lora), ("average", self.average)):
                for key, value in with_prefix(point.tensors, f"{name}.").items():
                    group[key].copy_(value)
        self.best = with_prefix(point.tensors, "best.")
        restore_optimizer(self.optimizer, point.tensors, point.state["optimizer"])
        self.multipliers = limits.from_json(point.state["multipliers"])
        self.beta = point.state["beta"] and BetaState(**point.state["beta"])
        self.guards = guards.from_json(point.state["guards"])
        self.sums = point.state["sums"]
        return point.step


def learning_rate_at(config: AlignConfig, step: int) -> float:
    """Give the learning rate of a step: it rises, stays, and falls, on straight lines."""
    total = config.num_rounds * config.steps_per_round
    return config.learning_rate * ramp(step, total=total, rise=config.warmup_steps, fall=config.cooldown * total)


@contextmanager
def swapped(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Generator[None]:
    """Give parameters other values inside the block."""
    own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
        try:
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.copy_(own[name])


# Program ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Align, and save the LoRA; returns the exit status."""
    config = parse(AlignConfig, argv, prog="python -m align", preview=estimate.describe)
    try:
        return run_alignment(config)
    except USER_ERRORS as error:
        sys.exit(str(error))


def run_alignment(config: AlignConfig) -> int:
    """Run, or go on with, an alignment; returns the exit status."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=not torch.cuda.is_available())
    check_batch(config, accelerator.num_processes)
    check_window(config)
    offline = config.offline.data.path if config.offline else None
    inputs = [config.model, config.judge / "model", config.prompts.path, config.rewrites, offline]
    with (
        open_run(
            config.out,
            config,
            seed=config.seed,
            inputs=inputs,
            trackers=config.trackers,
            is_main=accelerator.is_main_process,
        ) as run,
        stop_on_signal(accelerator) as stop,
    ):
        if (config.out / "validation.png").exists():  # what `finish` makes last
            print(f"{config.out}: is finished; name another folder to align again")
            return 0
        aligner = Aligner(config, run, accelerator, stop)
        try:
            num_steps = config.num_rounds * config.steps_per_round
            follow(aligner.train(), stop, aligner.save, num_steps=num_steps, shown=SHOWN, is_main=run.is_main)
        except Stopped:
            return stop.exit_status
        if run.is_main:
            finish(aligner)
    return 0


def finish(aligner: Aligner) -> None:
    """Write the best LoRA and what is known of it."""
    with swapped(aligner.lora, aligner.best):
        aligner.policy.save_lora(aligner.config.out / "lora")
    table.write_hashes(prompts_file(aligner.config.out / "lora" / LORA_FILE), aligner.rounds.texts)
    assert aligner.guards.best is not None
    result = {"best": asdict(aligner.guards.best), **aligner.result}
    _write_json(aligner.config.out / "result.json", result)
    card.write(aligner.config.out, num_prompts=len(aligner.rounds.prompts))
    pictures.draw(aligner.config.out)
    for number in range(aligner.config.num_rounds + 1):
        aligner.rounds.round(number).forget_latents()
    print(f"{result['ended']}; the best policy is that of step {aligner.guards.best.step}")
    print(aligner.config.out / "lora")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with replacing(path) as new:
        new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
