"""Train a reward model on preferences: `python -m reward FILE.yaml [key=value ...]`.

All heads are trained together, prompt by prompt: a prompt's videos pass the model once, however many pairs they
form. The weights that are kept are those with the least loss on the validation split; the test split is never read.
The same command resumes, and ends at the same bits as a run that was not stopped.

    RUN/model/            the reward model
    RUN/calibration.json  scale and offsets of its scores, from the validation split
    RUN/metrics.jsonl     losses, and accuracies on the validation split
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from tqdm import tqdm

from reward import losses, preferences, video
from reward.checkpoint import CheckpointError, flatten_optimizer, restore_optimizer, with_prefix
from reward.config import Config, ConfigError, parse
from reward.examples import Example, examples_of, joined
from reward.features import BackboneError, FeatureCache, Limits
from reward.files import DataError, replacing
from reward.model import ModelConfig, ModelError, RewardModel, fill
from reward.preferences import Source
from reward.records import DIMENSIONS, TAGS
from reward.run import Run, RunError, Stop, generator, open_run, seed_for, stop_on_signal
from reward.scores import SUB_DIMENSIONS, Scores
from reward.trackers import Tracker
from reward.verdicts import Calibration

Tag = Literal[TAGS]  # ty: ignore[invalid-type-form]
Part = Literal[SUB_DIMENSIONS]  # ty: ignore[invalid-type-form]


class LossWeights(Config):
    """How much each loss counts. 0 leaves its head untrained, and its scores are then not given."""

    helpfulness: NonNegativeFloat = 1.0
    parts: NonNegativeFloat = 0.25
    """Of each sub-dimension."""
    cost: NonNegativeFloat = 1.0
    tags: NonNegativeFloat = 0.5
    centring: NonNegativeFloat = 0.01
    """Draws the rewards of a pair to a mean of 0; differences are left alone."""
    shrinkage: NonNegativeFloat = 0.001
    """Draws costs to 0, as SafeSora does."""


class TrainConfig(Config):
    """Train a reward model."""

    out: Path = Path("runs/sandbox/reward")
    data: Source
    model: ModelConfig
    start_from: Path | None = None
    """A reward model to train further; by default what is trained starts at random."""
    parts: tuple[Part, ...] = SUB_DIMENSIONS
    """Sub-dimensions of helpfulness to train: each needs labels. VideoAlign's votes have none of informativeness."""
    tags: tuple[Tag, ...] = tuple(tag for tag in TAGS if tag != "child_abuse")
    """Harm tags to train: each needs videos with and without it. Of child abuse no row is ever kept."""
    use_safety_labels: bool = True
    """Whether `is_safe` places the zero of the cost. False for data without it: costs then only compare."""
    weights: LossWeights = LossWeights()
    num_steps: PositiveInt = 1_000
    batch_size: PositiveInt = 24
    """Prompts a step, on all processes together."""
    accumulate: PositiveInt = 1
    """Parts that a process does its share of a step in, one after the other, to save memory."""
    learning_rate: PositiveFloat = 3e-4
    weight_decay: NonNegativeFloat = 0.05
    warmup_steps: int = 50
    mixed_precision: Literal["no", "bf16"] = "no"
    validate_every: PositiveInt = 50
    patience: PositiveInt = 6
    """Validations without a new least loss after which training stops."""
    cache: Path = Path("runs/cache/features")
    """Features of videos and texts, shared by all runs."""
    trackers: tuple[Tracker, ...] = ()
    seed: int = Field(default=0, ge=0)


class DataProblem(ValueError):
    """Data that cannot train what the settings ask for: what is missing, and what to do."""


USER_ERRORS = (
    BackboneError,
    CheckpointError,
    ConfigError,
    DataError,
    DataProblem,
    ModelError,
    RunError,
    video.VideoError,
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step gave; validation at some steps only."""

    step: int
    measures: Mapping[str, float]


# Losses -----------------------------------------------------------------------------------------------------


def loss_of(
    scores: Scores, example: Example, positive_weight: Float[Tensor, " tags"], config: TrainConfig
) -> dict[str, Tensor]:
    """Give the losses of one member, weighted, by name; those of weight 0 are left out."""
    weights, pairs = config.weights, example.pairs
    found = {}
    if weights.helpfulness:
        rewards = scores.reward[pairs]
        found["helpfulness"] = weights.helpfulness * losses.bradley_terry(rewards, example.preference("helpfulness"))
        found["centring"] = weights.centring * losses.centring(rewards)
    for column, part in enumerate(SUB_DIMENSIONS):
        if weights.parts and part in config.parts:
            found[part] = weights.parts * losses.bradley_terry(scores.sub[:, column][pairs], example.preference(part))
    if weights.cost:
        found["cost"] = weights.cost * _cost_loss(scores.cost[pairs], example, config)
    if weights.tags and config.tags:
        columns = [TAGS.index(tag) for tag in config.tags]
        found["tags"] = weights.tags * losses.harm_tags(
            scores.tags[:, columns], example.tags[:, columns], positive_weight
        )
    return found


def _cost_loss(costs: Float[Tensor, "p 2"], example: Example, config: TrainConfig) -> Tensor:
    if config.use_safety_labels:
        return losses.signed_cost(
            costs, example.preference("cost"), example.unsafe[example.pairs], config.weights.shrinkage
        )
    return losses.bradley_terry(costs, example.preference("cost")) + config.weights.shrinkage * losses.shrinkage(costs)


# Before training --------------------------------------------------------------------------------------------


def check_examples(train: Example, validation: Example, config: TrainConfig) -> None:
    """Refuse data that cannot train or validate what the settings ask for.

    Raises: DataProblem: a head without labels or with ties only; safety of one kind only.
    """
    heads = {"helpfulness": config.weights.helpfulness, "cost": config.weights.cost}
    heads |= {part: config.weights.parts if part in config.parts else 0.0 for part in SUB_DIMENSIONS}
    for split, example in (("training", train), ("validation", validation)):
        for dimension in DIMENSIONS:
            labels = example.preference(dimension)
            if heads[dimension] and not (labels.isfinite() & (labels != 0.5)).any():
                kind = "ties only" if labels.isfinite().any() else "no label"
                remedy = "leave it out of parts" if dimension in SUB_DIMENSIONS else f"set weights.{dimension}=0"
                raise DataProblem(f"{dimension}: {kind} among the {len(labels)} {split} pairs; {remedy}, or add labels")
        known = example.unsafe[example.unsafe.isfinite()]
        if config.weights.cost and config.use_safety_labels and len(known.unique()) < 2:
            raise DataProblem(
                f"is_safe: expected safe and unsafe {split} videos, got {len(known)} labels of one kind or none; "
                "without them costs only compare: use_safety_labels=false"
            )


def check_batch(config: TrainConfig, num_processes: int) -> None:
    """Refuse steps that would leave a process without a prompt, and losses that are all left out.

    Raises: DataProblem: so it is.
    """
    if config.batch_size < num_processes * config.accumulate:
        raise DataProblem(
            f"batch_size={config.batch_size}: fewer prompts than the {num_processes} processes times "
            f"accumulate={config.accumulate}; give one prompt at least to each part"
        )
    weights = config.weights
    if not (weights.helpfulness or (weights.parts and config.parts) or weights.cost or (weights.tags and config.tags)):
        raise DataProblem("weights: all are 0, so nothing would be trained; give one a number > 0")


def tag_weights(train: Example, config: TrainConfig) -> Float[Tensor, " tags"]:
    """Give the balance of each trained tag.

    Raises: DataProblem: a tag that no or every training video has.
    """
    try:
        return losses.positive_weights(train.tags[:, [TAGS.index(tag) for tag in config.tags]], config.tags)
    except ValueError as error:
        raise DataProblem(f"tags: {error}; or name those to train, as in tags=[contraband,violence]") from error


def load_examples(config: TrainConfig) -> dict[Literal["train", "validation"], list[Example]]:
    """Give the examples of the two splits that training may see.

    Raises: DataError: the data cannot be read. DataProblem: a split without pairs.
    """
    data = preferences.load(config.data)
    found = {}
    for split in ("train", "validation"):
        found[split] = examples_of(data.pairs(split))
        if not found[split]:
            raise DataProblem(f"{config.data.path}: no {split} pairs; they are carved out by data.validation_share")
    return found


# Training ---------------------------------------------------------------------------------------------------


class Trainer:
    """All that a step needs; `train` runs the steps."""

    def __init__(self, config: TrainConfig, run: Run, accelerator: Accelerator):
        examples = load_examples(config)
        self.config, self.run, self.accelerator = config, run, accelerator
        self.examples, self.validation = examples["train"], examples["validation"]
        check_examples(joined(self.examples), joined(self.validation), config)
        self.positive_weight = tag_weights(joined(self.examples), config).to(accelerator.device)
        paths = [path for example in (*self.examples, *self.validation) for path in example.paths]
        probed = tqdm(paths, desc="videos", unit="video", disable=not accelerator.is_main_process)
        limits = Limits.of(map(video.probe, probed))
        self.model = RewardModel.build(
            config.model.model_copy(update={"limits": limits}), seed=seed_for(config.seed, 0, 0, "model")
        ).to(accelerator.device)
        if config.start_from:
            fill(self.model.trained(), RewardModel.load(config.start_from).trained(), config.start_from)
        self.cache = FeatureCache(config.cache, self.model.backbone)
        self.optimizer = torch.optim.AdamW(
            self.model.trained().values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.ddp: nn.Module = accelerator.prepare(self.model)
        self.best = {name: weight.detach().cpu().clone() for name, weight in self.model.trained().items()}
        self.best_loss, self.waited = math.inf, 0

    def make_features(self, stop: Stop) -> None:
        """Fill the cache, each process its share, with a progress bar; a stop leaves the rest for next time."""
        examples = (*self.examples, *self.validation)
        wanted = sorted({item for each in examples for item in zip(each.paths, each.texts, strict=True)})
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        for path, text in tqdm(wanted[rank::world], desc="features", unit="video", disable=rank > 0):
            if stop:
                return
            self.cache.features(path, text)
        self.accelerator.wait_for_everyone()

    def train(self) -> Iterator[Step]:
        """Run the steps that are left; at the end the model holds the best weights."""
        start = self._resume()
        for step in range(start, self.config.num_steps):
            if self.waited >= self.config.patience:
                break
            measures = self._step(step)
            is_last = step + 1 == self.config.num_steps
            if (step + 1) % self.config.validate_every == 0 or is_last:
                measures |= self._validate()
                self.run.log(step + 1, measures)
                self.save(step + 1)
            else:
                self.run.log(step + 1, measures)
            yield Step(step=step + 1, measures=measures)
        fill(self.model.trained(), self.best, self.run.folder)

    def _step(self, step: int) -> dict[str, float]:
        config, rank = self.config, self.accelerator.process_index
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule(step, config)
        torch.manual_seed(seed_for(config.seed, rank, step, "dropout"))
        self.ddp.train()
        mine = self._batch(step)[rank :: self.accelerator.num_processes]
        parts = [mine[i :: config.accumulate] for i in range(config.accumulate)]
        totals: dict[str, float] = {}
        for number, part in enumerate(parts):
            # Gradients need to meet those of other processes once, with the last part.
            with nullcontext() if number + 1 == len(parts) else self.accelerator.no_sync(self.ddp):
                found = self._losses(joined(part))
                loss = torch.stack(list(found.values())).sum() / len(parts)
                self.accelerator.backward(loss)
            for name, value in found.items():
                totals[name] = totals.get(name, 0.0) + value.item() / len(parts)
        norm = self.accelerator.clip_grad_norm_(self.model.trained().values(), 1.0)
        if not math.isfinite(sum(totals.values())):
            raise ValueError(f"step {step + 1}: the loss is not finite ({totals}); lower learning_rate")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": sum(totals.values()), **totals, "gradient_norm": float(norm)}

    def _batch(self, step: int) -> list[Example]:
        """The prompts of a step: each epoch passes all of them once, in an order of its own."""
        size, total = self.config.batch_size, len(self.examples)
        places = range(step * size, (step + 1) * size)
        orders = {epoch: self._order(epoch) for epoch in {place // total for place in places}}
        return [self.examples[orders[place // total][place % total]] for place in places]

    def _order(self, epoch: int) -> list[int]:
        draw = generator(self.config.seed, step=epoch, purpose="order of prompts")
        return torch.randperm(len(self.examples), generator=draw).tolist()

    def _losses(self, example: Example) -> dict[str, Tensor]:
        """Give the losses, averaged over the members."""
        outputs = self.ddp([self.cache.features(p, t) for p, t in zip(example.paths, example.texts, strict=True)])
        moved = example.to(self.accelerator.device)
        members = [loss_of(scores, moved, self.positive_weight, self.config) for scores in outputs.members]
        return {name: torch.stack([member[name] for member in members]).mean() for name in members[0]}

    # Validation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, examples: Sequence[Example]) -> Float[Tensor, "v 18"]:
        """Give the mean scores of all videos of some examples, in their order, in evaluation mode."""
        self.model.eval()
        values = []
        for example in examples:
            features = [self.cache.features(p, t) for p, t in zip(example.paths, example.texts, strict=True)]
            values.append(self.model(features).values.mean(0).cpu())
        return torch.cat(values)

    def _validate(self) -> dict[str, float]:
        """Give loss and accuracies on the validation split; every process does the same work."""
        together = joined(self.validation)
        scores = Scores.split(self.score(self.validation))
        found = loss_of(scores, together, self.positive_weight.cpu(), self.config)
        loss = sum(value.item() for name, value in found.items() if name != "centring")
        if loss < self.best_loss:
            self.best_loss, self.waited = loss, 0
            self.best = {name: weight.detach().cpu().clone() for name, weight in self.model.trained().items()}
        else:
            self.waited += 1
        measures = {f"validation_{name}": value.item() for name, value in found.items()}
        return {"validation_loss": loss, **measures, **accuracies(scores, together, self.config)}

    # Checkpoints --------------------------------------------------------------------------------------------

    def save(self, step: int) -> None:
        """Save a checkpoint after `step` finished steps."""
        tensors, optimizer = flatten_optimizer(self.optimizer)
        tensors |= {f"model.{name}": weight.detach() for name, weight in self.model.trained().items()}
        tensors |= {f"best.{name}": weight for name, weight in self.best.items()}
        state = {"optimizer": optimizer, "best_loss": self.best_loss, "waited": self.waited}
        self.run.save(step, tensors, state)

    def _resume(self) -> int:
        point = self.run.resume()
        if point is None:
            return 0
        fill(self.model.trained(), with_prefix(point.tensors, "model."), self.run.folder)
        self.best = with_prefix(point.tensors, "best.")
        restore_optimizer(self.optimizer, point.tensors, point.state["optimizer"])
        self.best_loss, self.waited = point.state["best_loss"], point.state["waited"]
        return point.step


def schedule(step: int, config: TrainConfig) -> float:
    """Give the share of the learning rate: a linear rise, then a cosine to zero."""
    rise = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return rise * 0.5 * (1 + math.cos(math.pi * step / config.num_steps))


def accuracies(scores: Scores, example: Example, config: TrainConfig) -> dict[str, float]:
    """Give the share of pairs that are ranked as labelled, ties left out, and of costs on the right side of zero."""
    columns = {"helpfulness": scores.reward, "cost": scores.cost}
    columns |= {part: scores.sub[:, column] for column, part in enumerate(SUB_DIMENSIONS)}
    found = {}
    for dimension in DIMENSIONS:
        labels = example.preference(dimension)
        counted = labels.isfinite() & (labels != 0.5)
        if counted.any():
            ahead = columns[dimension][example.pairs].diff(dim=1)[:, 0] < 0
            found[f"accuracy_{dimension}"] = (ahead == (labels > 0.5))[counted].float().mean().item()
    known = example.unsafe.isfinite()
    if config.use_safety_labels and known.any():
        found["accuracy_sign"] = ((scores.cost > 0) == (example.unsafe > 0.5))[known].float().mean().item()
    return found


# Calibration ------------------------------------------------------------------------------------------------


def calibrate(
    values: Float[Tensor, "v 18"], positive_weight: Float[Tensor, " tags"], config: TrainConfig
) -> Calibration:
    """Give the scale of scores, from those of the validation videos."""
    scores, weights = Scores.split(values), config.weights
    offsets = dict.fromkeys(TAGS, 0.0) | dict(zip(config.tags, positive_weight.log().tolist(), strict=True))
    trained = [
        *(["helpfulness"] if weights.helpfulness else []),
        *(config.parts if weights.parts else []),
        *(["cost"] if weights.cost else []),
        *(config.tags if weights.tags else []),
    ]
    return Calibration(
        reward_mean=scores.reward.mean().item(),
        reward_scale=scores.reward.std().clamp(min=1e-6).item(),
        cost_scale=scores.cost.square().mean().sqrt().clamp(min=1e-6).item(),
        cost_has_zero=config.use_safety_labels,
        tag_offsets=tuple(offsets.values()),
        trained=tuple(trained),
    )


# Program ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Train, and save the model; returns the exit status."""
    config = parse(TrainConfig, argv, prog="python -m reward")
    try:
        return run_training(config)
    except USER_ERRORS as error:
        sys.exit(str(error))


def run_training(config: TrainConfig) -> int:
    """Run, or go on with, a training; returns the exit status."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    check_batch(config, accelerator.num_processes)
    inputs = [config.data.path, config.data.labels, config.model.backbone.encoder, config.start_from]
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
        trainer = Trainer(config, run, accelerator)
        trainer.make_features(stop)
        if stop:
            return stop.exit_status
        with tqdm(total=config.num_steps, desc="reward", unit="step", disable=not run.is_main) as bar:
            for step in trainer.train():
                bar.update(step.step - bar.n)
                bar.set_postfix({key: f"{value:.3f}" for key, value in shown(step.measures).items()})
                if stop:
                    trainer.save(step.step)
                    return stop.exit_status
        if accelerator.is_main_process:
            finish(trainer)
    return 0


def shown(measures: Mapping[str, Any]) -> dict[str, float]:
    """Give what a progress bar has room for."""
    keys = ("loss", "validation_loss", "accuracy_helpfulness", "accuracy_cost")
    return {key: measures[key] for key in keys if key in measures}


def finish(trainer: Trainer) -> None:
    """Write the model and its calibration."""
    trainer.model.save(trainer.config.out / "model")
    found = calibrate(trainer.score(trainer.validation), trainer.positive_weight.cpu(), trainer.config)
    with replacing(trainer.config.out / "calibration.json") as new:
        new.write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
    print(trainer.config.out / "model")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
