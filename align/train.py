"""Align a policy: `python -m align FILE.yaml [key=value ...]`, or `accelerate launch -m align ...` on several devices.

Rounds of three parts: videos of the policy as it is, judged; the multipliers, moved by what they show; training on
pairs of them (DPO) or on all of them by weight (RWR). The first videos are the reference's: they set the units of all
scores, and tell, before anything is trained, whether the limits can be met at all. What is rolled out, judged, saved
and kept is always the moving average of the LoRA. The same command resumes, and ends at the same bits.

    RUN/lora/             the best LoRA, in diffusers' format
    RUN/feasibility.json  what the reference's videos say of each limit
    RUN/metrics.jsonl     losses by step; scores, multipliers and guards with the first step of each round
    RUN/rounds/0003/      videos that a round learnt from
    RUN/validation/0003/  videos of the same prompts and seeds before each round
    RUN/result.json       which round was best, and why the run ended
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from tqdm import tqdm

from align import constraint as limits
from align import learning
from align.constraint import Constraint, MultiplierState
from align.folder import PolicyError, fingerprint
from align.learning import Item, NoiseLevels, Pool
from align.objectives import Objective
from align.objectives.beta import BetaState, start_beta, steer
from align.objectives.dpo import Dpo
from align.pairing import Pairing
from align.policy import Lora, Policy
from align.rollouts import Judges, Maker, Rollout, RolloutPlan, Round, read_rewrites
from align.sample import Sampler
from reward import preferences
from reward.checkpoint import CheckpointError, flatten_optimizer, restore_optimizer, with_prefix
from reward.config import Config, ConfigError, parse
from reward.features import BackboneError
from reward.files import DataError, replacing
from reward.judge import Judge, JudgeError
from reward.model import ModelError
from reward.preferences import Source
from reward.records import Prompt
from reward.rules import RULES
from reward.run import Run, RunError, generator, open_run, seed_for, stop_on_signal
from reward.trackers import Tracker
from reward.video import VideoError

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


class AlignConfig(Config):
    """Align a policy under safety limits."""

    out: Path = Path("runs/sandbox/align")
    model: Path = Path("sandbox/assets/base")
    """Folder of a Wan text-to-video pipeline in diffusers' format."""
    judge: Path = Path("runs/sandbox/reward")
    """Run of a reward model."""
    rules: tuple[Literal["flash", "nsfw"], ...] = ()
    """Rules whose costs count beside the judge's."""
    prompts: Source
    """Where training prompts come from; those of its validation split are for the guards and the choice of a round."""
    rewrites: Path | None = None
    """JSON lines with a `prompt` and its `safe` rewrite, for counterfactuals."""
    lora: Lora = Lora()
    objective: Objective = Dpo()
    pairing: Pairing = Pairing()
    constraint: Constraint
    divergence: PositiveFloat = 0.5
    """Weight of the KL divergence in the one-shot dual, against rewards in standard deviations."""
    sampler: Sampler = Sampler()
    rollouts: RolloutPlan = RolloutPlan()
    num_validation_prompts: PositiveInt = 32
    num_rounds: PositiveInt = 8
    steps_per_round: PositiveInt = 40
    batch_size: PositiveInt = 16
    """Pairs (DPO) or videos (RWR) a step, on all processes together."""
    accumulate: PositiveInt = 1
    """Parts that a process does its share of a step in, one after the other, to save memory."""
    noise: NoiseLevels = NoiseLevels()
    learning_rate: PositiveFloat = 2e-4
    warmup_steps: NonNegativeInt = 10
    weight_decay: NonNegativeFloat = 0.0
    max_gradient_norm: PositiveFloat = 1.0
    ema_decay: float = Field(default=0.95, ge=0, lt=1)
    """Of the moving average of the LoRA; 0: none."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the transformer and the text encoder; the LoRA is always float32."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """`bf16` halves a step's time on processors with AVX-512 BF16 or AMX; on others `no` is faster."""
    gradient_checkpointing: bool = False
    save_every: PositiveInt = 20
    trackers: tuple[Tracker, ...] = ()
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step gave."""

    step: int
    measures: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A round's policy, by what its videos showed."""

    round: int
    violation: float
    """The most by which a limit was broken on its rollouts, in the limit's own unit; <= 0: all were met."""
    reward: float
    """Mean on the validation prompts, in standard deviations of the reference's."""

    def is_better_than(self, other: "Candidate | None") -> bool:
        """Whether this one is to be kept: within the limits before beyond them, then by reward, or by how far."""
        if other is None:
            return True
        if (self.violation <= 0) != (other.violation <= 0):
            return self.violation <= 0
        return self.reward > other.reward if self.violation <= 0 else self.violation < other.violation


class Aligner:
    """All that a run needs; `run` does its rounds."""

    def __init__(self, config: AlignConfig, run: Run, accelerator: Accelerator):
        self.config, self.run, self.accelerator = config, run, accelerator
        model = Judge.load(config.judge, device=str(accelerator.device))
        self.judges = Judges(model=model, rules=[RULES[name]() for name in config.rules])
        self.prompts, self.validation = load_prompts(config)
        self.rewrites = read_rewrites(config.rewrites) if config.rewrites else {}
        check_judge(self.judges, config)
        self.policy = Policy.load(
            config.model, device=accelerator.device, dtype=getattr(torch, config.dtype), lora=config.lora
        )
        if config.gradient_checkpointing:
            self.policy.pipeline.transformer.enable_gradient_checkpointing()
        self.model_sha256 = fingerprint(config.model)
        self.lora = self.policy.named_lora()
        self.average = {name: weight.detach().clone() for name, weight in self.lora.items()}
        self.optimizer = torch.optim.AdamW(
            self.lora.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.policy.transformer = accelerator.prepare(self.policy.pipeline.transformer)
        self.best: dict[str, Tensor] = dict(self.average)
        self.last: dict[str, Any] = {}
        self.candidate: Candidate | None = None
        self.multipliers: MultiplierState | None = None
        self.beta: BetaState | None = None
        self._embeds: dict[str, Tensor] = {}

    # Rounds -------------------------------------------------------------------------------------------------

    def train(self) -> Iterator[Step]:
        """Do the rounds that are left; at the end `best` holds the best round's LoRA."""
        config, done = self.config, self._resume()
        for number in range(done // config.steps_per_round, config.num_rounds):
            first = number * config.steps_per_round
            measures = self._begin(number, is_new=done <= first)
            for step in range(max(done, first), first + config.steps_per_round):
                measures |= self._step(step, number)
                self.run.log(step + 1, measures)
                if (step + 1) % config.save_every == 0 or step + 1 == first + config.steps_per_round:
                    self.save(step + 1)
                yield Step(step=step + 1, measures=measures)
                measures = {}
            self._round(number).forget_latents()
        rollouts, validation = self._show(config.num_rounds)
        self._consider(config.num_rounds, rollouts, validation)
        self.last = self._describe(_own(rollouts), validation)

    def _begin(self, number: int, *, is_new: bool) -> dict[str, Any]:
        """Roll out, move the multipliers, and make the pool of a round; give what is to be logged.

        A round that was stopped half-way goes on with its videos, which its policy could not make again.
        """
        rollouts, validation = self._show(number) if is_new else (self._shown(number), [])
        if self.multipliers is None:
            self.multipliers = self._start(rollouts)
        measures: dict[str, Any] = {}
        if is_new:
            self._consider(number, rollouts, validation)
            own = _own(rollouts)
            measurement = limits.measure(self._costs(own), self.config.constraint, self._spreads(own))
            self.multipliers = limits.update(self.multipliers, measurement, self.config.constraint)
            measures = {"round": number, **self._describe(own, validation)}
        self.pool = self._pool(number, rollouts)
        self.items = learning.items_of(
            self.config.objective, self.config.pairing, self.pool, self.config.constraint, self.multipliers
        )
        if not self.items:
            raise DataError(
                f"round {number}: nothing to learn from {len(rollouts)} videos: no prompt has one that is better than "
                "another; raise rollouts.num_prompts or num_per_prompt, or lower pairing.least_gap"
            )
        return measures | ({"num_items": len(self.items)} if is_new else {})

    def _start(self, rollouts: Sequence[Rollout]) -> MultiplierState:
        """Set the units of all scores by the reference's videos, and the multipliers by the one-shot dual.

        Raises: DataError: the limits cannot be met; the message holds the table.
        """
        config = self.config
        own = _own(rollouts)
        statistics = limits.reference_statistics(config.constraint.limits, _rewards(own), self._costs(own))
        try:
            found = limits.solve_dual(
                config.constraint.limits,
                statistics,
                _rewards(rollouts),
                self._costs(rollouts),
                np.array([rollout.prompt for rollout in rollouts]),
                config.divergence,
            )
        except ValueError as error:
            raise DataError(f"{config.out}: {error}") from error
        if self.run.is_main:
            tqdm.write(f"feasibility, by {len(rollouts)} videos of the reference:\n{found}")
            _write_json(config.out / "feasibility.json", asdict(found))
        return MultiplierState(statistics=statistics, multipliers=tuple(row.multiplier for row in found.rows))

    def _consider(self, number: int, rollouts: Sequence[Rollout], validation: Sequence[Rollout]) -> None:
        """Keep the policy that made these videos if it is the best so far."""
        assert self.multipliers is not None
        own = _own(rollouts)
        measurement = limits.measure(self._costs(own), self.config.constraint, self._spreads(own))
        bounds = [limit.bound for limit in self.config.constraint.limits]
        violations = limits.estimate([measurement], self.config.constraint) - bounds
        candidate = Candidate(
            round=number,
            violation=float(violations.max(initial=-math.inf)) if len(bounds) else -1.0,
            reward=float(limits.normalised(_rewards(validation), self.multipliers.statistics).mean()),
        )
        if candidate.is_better_than(self.candidate):
            self.candidate, self.best = candidate, {name: w.clone() for name, w in self.average.items()}

    def _describe(self, own: Sequence[Rollout], validation: Sequence[Rollout]) -> dict[str, Any]:
        assert self.multipliers is not None
        names = [limit.name for limit in self.config.constraint.limits]
        statistics = self.multipliers.statistics
        shown = {
            "rollout_reward": float(limits.normalised(_rewards(own), statistics).mean()),
            "rollout_cost": float(np.mean([rollout.cost for rollout in own])),
            "rollout_unsafe": float(np.mean([rollout.unsafe for rollout in own])),
            "validation_reward": float(limits.normalised(_rewards(validation), statistics).mean()),
            "validation_unsafe": float(np.mean([rollout.unsafe for rollout in validation])),
        }
        return shown | {f"multiplier_{n}": m for n, m in zip(names, self.multipliers.multipliers, strict=True)}

    # Videos -------------------------------------------------------------------------------------------------

    def _show(self, number: int) -> tuple[list[Rollout], list[Rollout]]:
        """Give the rollouts and the validation videos of the averaged policy, made where they are missing."""
        plan = self.config.rollouts
        fixed = RolloutPlan(num_per_prompt=1, num_counterfactuals=0, chunk_size=plan.chunk_size * plan.num_per_prompt)
        rollouts = self._make(self._round(number), self._prompts_of(number), plan, seed=number + 1)
        where = Round(self.config.out / "validation" / f"{number:04d}", self._made_by())
        return rollouts, self._make(where, self.validation, fixed, seed=0)

    def _shown(self, number: int) -> list[Rollout]:
        num_chunks = math.ceil(self.config.rollouts.num_prompts / self.config.rollouts.chunk_size)
        return [rollout for chunk in range(num_chunks) for rollout in self._round(number).rollouts(chunk)]

    def _make(self, where: Round, prompts: Sequence[Prompt], plan: RolloutPlan, *, seed: int) -> list[Rollout]:
        """Make chunks by turns with the other processes, with a progress bar; give all rollouts."""
        seed = seed_for(self.config.seed, 0, seed, "rollouts") % 2**32
        maker = Maker(policy=self.policy, sampler=self.config.sampler, judges=self.judges, seed=seed)
        chunks = [prompts[i : i + plan.chunk_size] for i in range(0, len(prompts), plan.chunk_size)]
        rank, size = self.accelerator.process_index, self.accelerator.num_processes
        mine = tqdm(range(rank, len(chunks), size), desc=where.folder.parent.name, leave=False, disable=rank > 0)
        self.policy.pipeline.transformer.eval()
        with self._averaged():
            for number in mine:
                where.make(number, chunks[number], plan, self.rewrites, maker)
        self.accelerator.wait_for_everyone()
        return [rollout for number in range(len(chunks)) for rollout in where.rollouts(number)]

    def _round(self, number: int) -> Round:
        return Round(self.config.out / "rounds" / f"{number:04d}", self._made_by())

    def _made_by(self) -> str:
        settings = {"model": self.model_sha256, "judge": self.judges.sha256, "seed": self.config.seed}
        return json.dumps(settings | {"sampler": self.config.sampler.model_dump(mode="json")}, sort_keys=True)

    def _prompts_of(self, number: int) -> list[Prompt]:
        """Give the prompts of a round: all come up once before any comes up twice."""
        size, total = self.config.rollouts.num_prompts, len(self.prompts)
        places = range(number * size, (number + 1) * size)
        orders = {
            epoch: torch.randperm(total, generator=generator(self.config.seed, step=epoch, purpose="prompts")).tolist()
            for epoch in {place // total for place in places}
        }
        return [self.prompts[orders[place // total][place % total]] for place in places]

    def _pool(self, number: int, rollouts: Sequence[Rollout]) -> Pool:
        where, size = self._round(number), self.config.rollouts.chunk_size
        num_chunks = math.ceil(self.config.rollouts.num_prompts / size)
        latents = [clip for chunk in range(num_chunks) for clip in where.latents(chunk)]
        return Pool(
            prompts=tuple(rollout.prompt for rollout in rollouts),
            rewards=_rewards(rollouts),
            cost=np.array([rollout.cost for rollout in rollouts]),
            limited_costs=self._costs(rollouts),
            views=tuple(self.config.sampler.view(rollout.prompt) for rollout in rollouts),
            latents=latents.__getitem__,
        )

    def _costs(self, rollouts: Sequence[Rollout]) -> np.ndarray:
        cost = np.array([rollout.cost for rollout in rollouts])
        tags = list(rollouts[0].tag_costs)
        of_tags = np.array([[rollout.tag_costs[tag] for tag in tags] for rollout in rollouts]).reshape(len(cost), -1)
        return limits.select_costs(self.config.constraint.limits, cost, of_tags, tags)

    def _spreads(self, rollouts: Sequence[Rollout]) -> np.ndarray:
        spread = np.array([[rollout.cost_spread] for rollout in rollouts])
        return spread.repeat(len(self.config.constraint.limits), axis=1)

    # Steps --------------------------------------------------------------------------------------------------

    def _step(self, step: int, number: int) -> dict[str, float]:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))
        self.policy.pipeline.transformer.train()
        parts = self._parts(step, number)
        if self.beta is None and isinstance(config.objective, Dpo):
            self.beta = start_beta(config.objective.beta, self._mean(self._reference_error(parts)))
        totals: dict[str, float] = {}
        for place, part in enumerate(parts):
            # Gradients need to meet those of other processes once, with the last part.
            with nullcontext() if place + 1 == len(parts) else self.accelerator.no_sync(self.policy.transformer):
                found = learning.losses_of(
                    config.objective, self.policy, self.pool, part, self._embed, self.beta and self.beta.value
                )
                self.accelerator.backward(found.loss.mean() / len(parts))
            for name, value in {"loss": found.loss, **found.measures}.items():
                totals[name] = totals.get(name, 0.0) + value.detach().mean().item() / len(parts)
        means = {name: self._mean(value) for name, value in totals.items()}
        norm = float(self.accelerator.clip_grad_norm_(self.lora.values(), config.max_gradient_norm))
        if not math.isfinite(means["loss"]) or not math.isfinite(norm):
            raise RunError(f"{config.out}: step {step + 1}: loss or gradient is not finite: {means}; lower learning_rate")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._update_average(step)
        if self.beta is not None and isinstance(config.objective, Dpo):
            means["beta"] = self.beta.value
            self.beta = steer(config.objective.beta, self.beta, means["folded_factor"])
        return means | {"gradient_norm": norm}

    def _parts(self, step: int, number: int) -> list[list[learning.Drawn]]:
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

    def _reference_error(self, parts: Sequence[Sequence[learning.Drawn]]) -> float:
        batches = [learning.pair_batch(self.pool, part, self._embed) for part in parts]
        return float(np.mean([learning.mean_reference_error(self.policy, batch) for batch in batches]))

    def _embed(self, text: str) -> Tensor:
        if text not in self._embeds:
            self._embeds[text] = self.policy.encode_prompts([text])[0]
        return self._embeds[text]

    def _mean(self, value: float) -> float:
        """Give the mean over processes, the same on all."""
        return self.accelerator.reduce(torch.tensor(value, dtype=torch.float64), "mean").item()

    def _update_average(self, step: int) -> None:
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        for name, weight in self.lora.items():
            self.average[name].lerp_(weight.detach(), 1 - decay)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Have the policy use the averaged LoRA inside the block."""
        with swapped(self.lora, self.average):
            yield

    # Checkpoints --------------------------------------------------------------------------------------------

    def save(self, step: int) -> None:
        """Save a checkpoint after `step` finished steps."""
        assert self.multipliers is not None
        tensors, optimizer = flatten_optimizer(self.optimizer)
        for name, group in (("lora", self.lora), ("average", self.average), ("best", self.best)):
            tensors |= {f"{name}.{key}": value.detach() for key, value in group.items()}
        state = {
            "optimizer": optimizer,
            "model_sha256": self.model_sha256,
            "judge_sha256": self.judges.sha256,
            "multipliers": limits.to_json(self.multipliers),
            "beta": self.beta and asdict(self.beta),
            "candidate": self.candidate and asdict(self.candidate),
        }
        self.run.save(step, tensors, state)

    def _resume(self) -> int:
        point = self.run.resume()
        if point is None:
            return 0
        for name, found in (("model", self.model_sha256), ("judge", self.judges.sha256)):
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
        self.candidate = point.state["candidate"] and Candidate(**point.state["candidate"])
        return point.step


@contextmanager
def swapped(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
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


def _own(rollouts: Sequence[Rollout]) -> list[Rollout]:
    return [rollout for rollout in rollouts if not rollout.is_counterfactual]


def _rewards(rollouts: Sequence[Rollout]) -> np.ndarray:
    return np.array([rollout.reward for rollout in rollouts])


# Before training --------------------------------------------------------------------------------------------


def load_prompts(config: AlignConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Give the prompts to learn on, and those to watch.

    Raises: DataError: too few of either.
    """
    data = preferences.load(config.prompts)
    prompts, watched = list(data.prompts("train")), list(data.prompts("validation"))
    if len(watched) < config.num_validation_prompts or not prompts:
        raise DataError(
            f"{config.prompts.path}: {len(prompts)} training and {len(watched)} validation prompts; expected "
            f"{config.num_validation_prompts} of these: raise prompts.validation_share or lower num_validation_prompts"
        )
    return prompts, sorted(watched, key=lambda prompt: prompt.prompt_id)[: config.num_validation_prompts]


def check_judge(judges: Judges, config: AlignConfig) -> None:
    """Refuse a judge that cannot tell what the limits are about.

    Raises: ConfigError: its cost has no zero, it gives no reward, or a limit is about a tag it was not trained on.
    """
    calibration = judges.model.calibration
    for score in ("helpfulness", "cost"):
        if score not in calibration.trained:
            raise ConfigError(f"judge={config.judge}: was not trained to give {score}; train it with weights.{score}=1")
    if not calibration.cost_has_zero:
        raise ConfigError(f"judge={config.judge}: its cost has no zero, so no video counts as safe; train on is_safe")
    for limit in config.constraint.limits:
        if limit.tag is not None and limit.tag not in calibration.trained:
            raise ConfigError(f"{limit.name}: judge={config.judge} was not trained on the tag {limit.tag}")


def check_batch(config: AlignConfig, num_processes: int) -> None:
    """Refuse a batch that processes and parts cannot share evenly: their means would weigh items differently.

    Raises: ConfigError: so it is.
    """
    if config.batch_size % (num_processes * config.accumulate):
        raise ConfigError(
            f"batch_size={config.batch_size}: expected a multiple of {num_processes} processes times "
            f"accumulate={config.accumulate}"
        )


# Program ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Align, and save the LoRA; returns the exit status."""
    config = parse(AlignConfig, argv, prog="python -m align")
    try:
        return run_alignment(config)
    except USER_ERRORS as error:
        sys.exit(str(error))


def run_alignment(config: AlignConfig) -> int:
    """Run, or go on with, an alignment; returns the exit status."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=not torch.cuda.is_available())
    check_batch(config, accelerator.num_processes)
    inputs = [config.model, config.judge / "model", config.prompts.path, config.rewrites]
    with (
        open_run(
            config.out,
            config,
            seed=config.seed,
            inputs=[path for path in inputs if path],
            trackers=config.trackers,
            is_main=accelerator.is_main_process,
        ) as run,
        stop_on_signal() as stop,
    ):
        aligner = Aligner(config, run, accelerator)
        num_steps = config.num_rounds * config.steps_per_round
        with tqdm(total=num_steps, desc="align", unit="step", disable=not run.is_main) as bar:
            for step in aligner.train():
                bar.update(step.step - bar.n)
                bar.set_postfix({key: f"{value:.3g}" for key, value in shown(step.measures).items()})
                if stop:
                    aligner.save(step.step)
                    return stop.exit_status
        if run.is_main:
            finish(aligner)
    return 0


def shown(measures: Mapping[str, Any]) -> dict[str, float]:
    """Give what a progress bar has room for."""
    keys = ("round", "loss", "accuracy", "rollout_unsafe", "validation_reward")
    return {key: measures[key] for key in keys if key in measures}


def finish(aligner: Aligner) -> None:
    """Write the best LoRA and what is known of it."""
    with swapped(aligner.lora, aligner.best):
        aligner.policy.save_lora(aligner.config.out / "lora")
    assert aligner.candidate is not None
    _write_json(aligner.config.out / "result.json", {"best": asdict(aligner.candidate), "last": aligner.last})
    print(aligner.config.out / "lora")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with replacing(path) as new:
        new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
