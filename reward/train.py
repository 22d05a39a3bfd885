"""Train a reward model on preferences: `python -m reward FILE.yaml [key=value ...]`.

All heads are trained together, prompt by prompt: a prompt's videos pass the model once, however many pairs they
form. The weights that are kept are those with the least loss on the validation split; the test split is never read.
The same command resumes, and ends at the same bits as a run that was not stopped.

    RUN/model/            the reward model
    RUN/calibration.json  scale and offsets of its scores, and theta of ties, from the validation split
    RUN/metrics.jsonl     losses, and accuracies on the validation split
"""

import hashlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from reward import estimate, losses, video
from reward.checkpoint import CheckpointError, flatten_optimizer, restore_optimizer, with_prefix
from reward.config import ConfigError, parse
from reward.examples import Example, Swapped, joined, swapped
from reward.features import BackboneError, FeatureCache, Features, Limits
from reward.files import DataError, replacing
from reward.model import ModelError, RewardModel, fill
from reward.records import DIMENSIONS, TAGS, Dimension
from reward.run import Run, RunError, Step, Stop, Stopped, follow, generator, leave, open_run, seed_for, stop_on_signal
from reward.scores import SUB_DIMENSIONS, Outputs, Scores
from reward.settings import RewardConfig, check_batch, check_examples, load_examples, rewards_of, tag_weights
from reward.verdicts import Calibration

SHOWN = ("loss", "validation_loss", "accuracy_helpfulness", "accuracy_cost")
"""What the progress bar has room for."""
USER_ERRORS = (BackboneError, CheckpointError, ConfigError, DataError, ModelError, RunError, video.VideoError)


# Losses -----------------------------------------------------------------------------------------------------


def loss_of(
    scores: Scores,
    example: Example,
    positive_weight: Float[Tensor, " tags"],
    thetas: Mapping[Dimension, float],
    config: RewardConfig,
) -> dict[str, Tensor]:
    """Give the losses of one member, weighted, by name; those of weight 0 are left out.

    `thetas` are those of `fit_thetas`.
    """
    weights, pairs = config.weights, example.pairs
    found = {}
    if weights.helpfulness:
        found["helpfulness"] = weights.helpfulness * _reward_loss("helpfulness", scores, example, thetas, config)
        found["centring"] = weights.centring * losses.centring(scores.reward[pairs])
    for part in SUB_DIMENSIONS:
        if weights.parts and part in config.parts:
            found[part] = weights.parts * _reward_loss(part, scores, example, thetas, config)
    if weights.cost:
        found["cost"] = weights.cost * _cost_loss(scores.cost[pairs], example, config)
    if weights.tags and config.tags:
        columns = [TAGS.index(tag) for tag in config.tags]
        found["tags"] = weights.tags * losses.harm_tags(
            scores.tags[:, columns], example.tags[:, columns], positive_weight
        )
    return found


def _reward_loss(
    dimension: Dimension, scores: Scores, example: Example, thetas: Mapping[Dimension, float], config: RewardConfig
) -> Tensor:
    pairs, labels = scores.of(dimension)[example.pairs], example.preference(dimension)
    if dimension in thetas:
        return losses.bradley_terry_ties(pairs, labels, thetas[dimension])
    return losses.bradley_terry(pairs, labels, config.margin)


def swapped_loss(asked: Scores, unasked: Scores, swap: Swapped) -> Tensor:
    """Give what instruction following errs by on videos that are shown with another prompt's text.

    Two of them tie, and one that was made for the text beats one that was not, as in Liu et al. 2024 (RRM, arXiv
    2409.13156), who do the same with answers.
    """
    right, wrong = (scores.of("instruction_following") for scores in (asked, unasked))
    ties, wins = wrong[swap.videos.pairs], torch.stack([right[swap.rivals[:, 0]], wrong[swap.rivals[:, 1]]], dim=1)
    half, one = (torch.full_like(pairs[:, 0], label) for pairs, label in ((ties, 0.5), (wins, 1.0)))
    return losses.bradley_terry(ties, half) + losses.bradley_terry(wins, one)


def _cost_loss(costs: Float[Tensor, "p 2"], example: Example, config: RewardConfig) -> Tensor:
    if config.use_safety_labels:
        return losses.signed_cost(
            costs, example.preference("cost"), example.unsafe[example.pairs], config.weights.shrinkage
        )
    return losses.bradley_terry(costs, example.preference("cost")) + config.weights.shrinkage * losses.shrinkage(costs)


def fit_thetas(scores: Scores, validation: Example, config: RewardConfig) -> dict[Dimension, float]:
    """Give the theta of each dimension whose ties have a likelihood of their own, from the validation split."""
    if config.ties == "soft":
        return {}
    return {
        dimension: losses.fit_theta(scores.of(dimension)[validation.pairs], validation.preference(dimension))
        for dimension in rewards_of(config)
    }


# Training ---------------------------------------------------------------------------------------------------


class Trainer:
    """All that a step needs; `train` runs the steps."""

    def __init__(self, config: RewardConfig, run: Run, accelerator: Accelerator):
        examples = load_examples(config)
        self.config, self.run, self.accelerator = config, run, accelerator
        self.examples, self.validation = examples["train"], examples["validation"]
        check_examples(joined(self.examples), joined(self.validation), config)
        self.positive_weight = tag_weights(joined(self.examples), config).to(accelerator.device)
        paths = [path for example in (*self.examples, *self.validation) for path in example.paths]
        probed = tqdm(paths, desc="videos", unit="video", disable=not accelerator.is_main_process)
        infos = [video.probe(path) for path in probed]
        check_videos(infos, config.model.limits)
        limits = Limits.of(infos)
        self.videos_sha256 = sizes_sha256(paths)
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
        self.best_loss: float | None = None
        self.waited = 0
        self.thetas: dict[Dimension, float] = {}

    def make_features(self, stop: Stop) -> None:
        """Fill the cache, each process its share, with a progress bar.

        Raises: Stopped: a process was asked to stop; the rest of its share is left for next time.
        """
        examples = (*self.examples, *self.validation)
        wanted = sorted({item for each in examples for item in zip(each.paths, each.texts, strict=True)})
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        for path, text in tqdm(wanted[rank::world], desc="features", unit="video", disable=rank > 0):
            if stop:
                break
            self.cache.features(path, text)
        stop.check()

    def train(self) -> Iterator[Step]:
        """Run the steps that are left; at the end the model holds the best weights."""
        start = self._resume()
        if start == 0 and self.config.ties == "rao_kupper":
            self.thetas = fit_thetas(Scores.split(self.score(self.validation)), joined(self.validation), self.config)
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
                found = self._losses(part)
                loss = torch.stack(list(found.values())).sum() / len(parts)
                self.accelerator.backward(loss)
            for name, value in found.items():
                totals[name] = totals.get(name, 0.0) + value.item() / len(parts)
        means = self._means(totals)
        norm = float(self.accelerator.clip_grad_norm_(self.model.trained().values(), 1.0))
        if not math.isfinite(sum(means.values())) or not math.isfinite(norm):
            raise RunError(
                f"{config.out}: step {step + 1}: loss or gradient is not finite: {means}; lower learning_rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": sum(means.values()), **means, "gradient_norm": norm}

    def _means(self, values: Mapping[str, float]) -> dict[str, float]:
        """Give the means over processes, the same on all."""
        found = torch.tensor(list(values.values()), dtype=torch.float64, device=self.accelerator.device)
        return dict(zip(values, self.accelerator.reduce(found, "mean").tolist(), strict=True))

    def _batch(self, step: int) -> list[Example]:
        """The prompts of a step: each epoch passes all of them once, in an order of its own."""
        size, total = self.config.batch_size, len(self.examples)
        places = range(step * size, (step + 1) * size)
        orders = {epoch: self._order(epoch) for epoch in {place // total for place in places}}
        return [self.examples[orders[place // total][place % total]] for place in places]

    def _order(self, epoch: int) -> list[int]:
        draw = generator(self.config.seed, step=epoch, purpose="order of prompts")
        return torch.randperm(len(self.examples), generator=draw).tolist()

    def _losses(self, part: Sequence[Example]) -> dict[str, Tensor]:
        """Give the losses, averaged over the members."""
        own, weight = joined(part), self.config.weights.swapped
        swap = swapped(part) if weight else None
        shown = [own, swap.videos] if swap else [own]
        values = self.ddp([item for example in shown for item in self._features(example)]).values
        if not values.isfinite().all():
            raise RunError(f"{self.config.out}: a score is not finite; lower learning_rate")
        right, wrong = (Outputs(values=scores) for scores in values.tensor_split([len(own.paths)], dim=1))
        moved = own.to(self.accelerator.device)
        members = [loss_of(one, moved, self.positive_weight, self.thetas, self.config) for one in right.members]
        if weight:
            for found, asked, unasked in zip(members, right.members, wrong.members, strict=True):
                # All processes must name the same losses.
                found["swapped"] = weight * swapped_loss(asked, unasked, swap) if swap else 0 * asked.reward.sum()
        return {name: torch.stack([member[name] for member in members]).mean() for name in members[0]}

    def _features(self, example: Example) -> list[Features[Any, Any]]:
        return [self.cache.features(path, text) for path, text in zip(example.paths, example.texts, strict=True)]

    # Validation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, examples: Sequence[Example]) -> Float[Tensor, "v 18"]:
        """Give the mean scores of all videos of some examples, in their order, in evaluation mode.

        Raises: RunError: one is not finite.
        """
        self.model.eval()
        values = []
        for example in examples:
            values.append(self.model(self._features(example)).values.mean(0).cpu())
        if not (found := torch.cat(values)).isfinite().all():
            raise RunError(f"{self.config.out}: a score is not finite; lower learning_rate")
        return found

    def _validate(self) -> dict[str, float]:
        """Fit the thetas anew; give loss and accuracies on the validation split. Every process does the same work."""
        together = joined(self.validation)
        scores = Scores.split(self.score(self.validation))
        self.thetas = fit_thetas(scores, together, self.config)
        found = loss_of(scores, together, self.positive_weight.cpu(), self.thetas, self.config)
        loss = sum(value.item() for name, value in found.items() if name != "centring")
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.waited = loss, 0
            self.best = {name: weight.detach().cpu().clone() for name, weight in self.model.trained().items()}
        else:
            self.waited += 1
        measures = {f"validation_{name}": value.item() for name, value in found.items()}
        measures |= {f"theta_{dimension}": theta for dimension, theta in self.thetas.items()}
        return {"validation_loss": loss, **measures, **accuracies(scores, together, self.config)}

    # Checkpoints --------------------------------------------------------------------------------------------

    def save(self, step: int) -> None:
        """Save a checkpoint after `step` finished steps."""
        tensors, optimizer = flatten_optimizer(self.optimizer)
        tensors |= {f"model.{name}": weight.detach() for name, weight in self.model.trained().items()}
        tensors |= {f"best.{name}": weight for name, weight in self.best.items()}
        state = {
            "optimizer": optimizer,
            "best_loss": self.best_loss,
            "waited": self.waited,
            "thetas": self.thetas,
            "videos_sha256": self.videos_sha256,
        }
        self.run.save(step, tensors, state)

    def _resume(self) -> int:
        point = self.run.resume()
        if point is None:
            return 0
        if point.state["videos_sha256"] != self.videos_sha256:
            raise RunError(
                f"{self.run.folder}: the videos of {self.config.data.path} are not those that its checkpoint was "
                "trained on: names or sizes of files differ; bring the old ones back, or name another folder"
            )
        fill(self.model.trained(), with_prefix(point.tensors, "model."), self.run.folder)
        self.best = with_prefix(point.tensors, "best.")
        restore_optimizer(self.optimizer, point.tensors, point.state["optimizer"])
        self.best_loss, self.waited = point.state["best_loss"], point.state["waited"]
        self.thetas = point.state["thetas"]
        return point.step


def check_videos(videos: Sequence[video.VideoInfo], limits: Limits) -> None:
    """Refuse videos of another frame rate or size than the settings ask for.

    Raises: DataError: one lies outside of the limits.
    """
    for info in videos:
        if wrong := limits.outside(fps=info.fps, height=info.height, width=info.width):
            raise DataError(
                f"{info.path}: {wrong}, by model.limits; convert it, leave its pairs out, or give other limits, and "
                "another out"
            )


def sizes_sha256(paths: Sequence[Path]) -> str:
    """Give the SHA-256 of the sizes and names of files, which tell most exchanged ones; contents would take minutes."""
    listing = "".join(f"{path.stat().st_size}  {path.name}\n" for path in paths)
    return hashlib.sha256(listing.encode()).hexdigest()


def schedule(step: int, config: RewardConfig) -> float:
    """Give the share of the learning rate: a linear rise, then a cosine to zero."""
    rise = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return rise * 0.5 * (1 + math.cos(math.pi * step / config.num_steps))


def accuracies(scores: Scores, example: Example, config: RewardConfig) -> dict[str, float]:
    """Give the share of pairs that are ranked as labelled, ties left out, and of costs on the right side of zero."""
    found = {}
    for dimension in DIMENSIONS:
        labels = example.preference(dimension)
        counted = labels.isfinite() & (labels != 0.5)
        if counted.any():
            ahead = scores.of(dimension)[example.pairs].diff(dim=1)[:, 0] < 0
            found[f"accuracy_{dimension}"] = (ahead == (labels > 0.5))[counted].float().mean().item()
    known = example.unsafe.isfinite()
    if config.use_safety_labels and known.any():
        found["accuracy_sign"] = ((scores.cost > 0) == (example.unsafe > 0.5))[known].float().mean().item()
    return found


# Calibration ------------------------------------------------------------------------------------------------


def calibrate(
    values: Float[Tensor, "v 18"], validation: Example, positive_weight: Float[Tensor, " tags"], config: RewardConfig
) -> Calibration:
    """Give the scale of scores, and the thetas, from those of the validation videos."""
    scores, weights = Scores.split(values), config.weights
    offsets = dict.fromkeys(TAGS, 0.0) | dict(zip(config.tags, positive_weight.log().tolist(), strict=True))
    trained = [
        *rewards_of(config),
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
        thetas=fit_thetas(scores, validation, config),
    )


# Program ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Train, and save the model; returns the exit status."""
    config = parse(RewardConfig, argv, prog="python -m reward", preview=estimate.describe)
    try:
        return run_training(config)
    except USER_ERRORS as error:
        sys.exit(str(error))


def run_training(config: RewardConfig) -> int:
    """Run, or go on with, a training; returns the exit status."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=not torch.cuda.is_available())
    check_batch(config, accelerator.num_processes)
    inputs = [config.data.path, config.data.labels, config.model.backbone.encoder, config.start_from]
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
        trainer = Trainer(config, run, accelerator)
        try:
            trainer.make_features(stop)
            follow(trainer.train(), stop, trainer.save, num_steps=config.num_steps, shown=SHOWN, is_main=run.is_main)
        except Stopped:
            return stop.exit_status
        if run.is_main:
            finish(trainer)
    return 0


def finish(trainer: Trainer) -> None:
    """Write the model and its calibration."""
    trainer.model.save(trainer.config.out / "model")
    # Takes autocast off the forward pass: a judge computes in full precision, and the scales are those of its scores.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    values, validation = trainer.score(trainer.validation), joined(trainer.validation)
    found = calibrate(values, validation, trainer.positive_weight.cpu(), trainer.config)
    with replacing(trainer.config.out / "calibration.json") as new:
        new.write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
    print(trainer.config.out / "model")


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
