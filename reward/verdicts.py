"""What a judge says of videos: raw scores, brought to the scale of the validation split.

Only the reward is shifted. The cost is divided alone, so that its zero stays the boundary of safety.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, PositiveFloat
from torch import Tensor

from reward import checkpoint
from reward.config import Config
from reward.records import DIMENSIONS, TAGS, Dimension
from reward.scores import SUB_DIMENSIONS, Outputs

NAMES = ("helpfulness", *SUB_DIMENSIONS, "cost", *TAGS)
"""Of a model's 18 columns."""
ScoreName = Literal[(*DIMENSIONS, *TAGS)]  # ty: ignore[invalid-type-form]


class Calibration(Config):
    """How raw scores become the judge's: from the validation split."""

    reward_mean: float
    reward_scale: PositiveFloat
    cost_scale: PositiveFloat
    """The cost is divided by it and not shifted, so its zero stays."""
    cost_has_zero: bool
    """Whether safety labels placed the zero of the cost. If not, costs only compare, and nothing counts as safe."""
    tag_offsets: Annotated[tuple[float, ...], Field(min_length=len(TAGS), max_length=len(TAGS))]
    """Taken off the twelve logits: what class balance added."""
    trained: tuple[ScoreName, ...]
    """Names of the scores that were trained: others say nothing."""
    thetas: dict[Dimension, Annotated[float, Field(gt=1)]] = Field(default_factory=dict)
    """Of the dimensions that were trained with a likelihood of ties: its theta, for differences of raw scores."""

    def unit(self, dimension: Dimension) -> float:
        """Give the raw difference that a difference of 1 between verdicts stands for."""
        return {"helpfulness": self.reward_scale, "cost": self.cost_scale}.get(dimension, 1.0)


def judge_files(run: Path) -> tuple[Path, Path]:
    """Give all of a run that a judge is made of: the folder of the model, with its encoder's hash; its calibration."""
    return run / "model", run / "calibration.json"


def hash_judge(run: Path) -> str:
    """Give the SHA-256 that tells judges apart, whatever else their runs hold."""
    return hashlib.sha256(json.dumps([checkpoint.sha256(path) for path in judge_files(run)]).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Spread:
    """Standard deviations over the members of an ensemble, in the units of what they are about."""

    reward: Float[Tensor, " b"]
    cost: Float[Tensor, " b"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdicts:
    """What the model says of each video of a batch; NaN where it was not trained to."""

    reward: Float[Tensor, " b"]
    """Higher is more helpful; mean 0 and standard deviation 1 on the validation split."""
    sub: Float[Tensor, "b 4"]
    """Its parts, in the order of `SUB_DIMENSIONS`; differences are log-odds."""
    cost: Float[Tensor, " b"]
    """> 0 unsafe; of mean square 1 on the validation split."""
    cost_has_zero: bool
    tags: Float[Tensor, "b 12"]
    """Probabilities, in the order of `TAGS`."""
    spread: Spread

    @property
    def unsafe(self) -> Bool[Tensor, " b"]:
        """Whether a video is not known to be safe."""
        return ~(self.cost <= 0) | (not self.cost_has_zero)


def calibrated(outputs: Outputs, scales: Calibration) -> Verdicts:
    """Turn raw scores into verdicts: the mean over members, and how far they differ."""
    trained = torch.tensor([name in scales.trained for name in NAMES])
    known = Outputs(values=torch.where(trained, outputs.values, torch.nan))
    mean, spread = known.mean, known.spread
    return Verdicts(
        reward=(mean.reward - scales.reward_mean) / scales.reward_scale,
        sub=mean.sub,
        cost=mean.cost / scales.cost_scale,
        cost_has_zero=scales.cost_has_zero,
        tags=(mean.tags - torch.tensor(scales.tag_offsets)).sigmoid(),
        spread=Spread(reward=spread.reward / scales.reward_scale, cost=spread.cost / scales.cost_scale),
    )


def joined(verdicts: Sequence[Verdicts]) -> Verdicts:
    """Give several verdicts of one judge as one."""
    return Verdicts(
        reward=torch.cat([each.reward for each in verdicts]),
        sub=torch.cat([each.sub for each in verdicts]),
        cost=torch.cat([each.cost for each in verdicts]),
        cost_has_zero=verdicts[0].cost_has_zero,
        tags=torch.cat([each.tags for each in verdicts]),
        spread=Spread(
            reward=torch.cat([each.spread.reward for each in verdicts]),
            cost=torch.cat([each.spread.cost for each in verdicts]),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class FileVerdict:
    """What is said of a file; null: the model was not trained to tell, or the file could not be judged."""

    file: str
    error: str | None = None
    unsafe: bool = True
    """By the model or a rule: whatever is not known to be safe."""
    reward: float | None = None
    parts: Mapping[str, float | None] | None = None
    cost: float | None = None
    spread: Mapping[str, float | None] | None = None
    tags: Mapping[str, float | None] | None = None
    rules: Mapping[str, Literal["pass", "fail"]] | None = None
    rule_costs: Mapping[str, float | None] | None = None

    @classmethod
    def of(cls, file: str, verdicts: Verdicts | None, costs: Mapping[str, float]) -> "FileVerdict":
        """Give what is said of the one video of a batch, by the model if any and, in `costs`, by rules."""
        by_rules = cls(
            file=file,
            unsafe=not costs or any(not cost <= 0 for cost in costs.values()),
            rules={name: "pass" if cost <= 0 else "fail" for name, cost in costs.items()},
            rule_costs={name: _known(cost) for name, cost in costs.items()},
        )
        if verdicts is None:
            return by_rules
        return replace(
            by_rules,
            unsafe=bool(verdicts.unsafe.item()) or (bool(costs) and by_rules.unsafe),
            reward=_known(verdicts.reward.item()),
            parts=_named(SUB_DIMENSIONS, verdicts.sub),
            cost=_known(verdicts.cost.item()),
            spread={name: _known(value.item()) for name, value in vars(verdicts.spread).items()},
            tags=_named(TAGS, verdicts.tags),
        )


def _named(names: Sequence[str], row: Float[Tensor, "1 n"]) -> dict[str, float | None]:
    return dict(zip(names, map(_known, row[0].tolist()), strict=True))


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
