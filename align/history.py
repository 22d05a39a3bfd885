"""What a run of `align.train` wrote down about itself, read back from its folder, whether it has ended or not."""

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.constraint import Dual, LimitRow
from align.guards import Best, Event
from align.rollouts import Rollout, Round
from align.settings import AlignConfig
from reward import config
from reward.files import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """What was measured when some steps were finished."""

    step: int
    measures: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How a run ended, and which policy it kept."""

    reason: str
    best: Best
    best_round: int


@dataclass(frozen=True, kw_only=True, eq=False)
class History:
    """A run, from its first step to its latest."""

    folder: Path
    config: AlignConfig
    rounds: tuple[Point, ...]
    """Of the policy before each round, by number; where the run has ended, the last is of the policy at its end."""
    steps: tuple[Point, ...]
    events: tuple[Event, ...]
    feasibility: Dual
    ending: Ending | None

    def validation(self) -> dict[int, list[Rollout]]:
        """Give the validation videos of each round that has all of them, in one order.

        Raises: DataError: a file is damaged.
        """
        folders = sorted((self.folder / "validation").glob("[0-9]*"))
        found = {int(folder.name): _rollouts(folder) for folder in folders}
        return {number: made for number, made in found.items() if len(made) == self.config.num_validation_prompts}


def read(folder: Path) -> History:
    """Read a run's folder.

    Raises: DataError, ConfigError: it is none, a file in it cannot be read, or no step is finished yet.
    """
    settings = config.load(AlignConfig, folder / "config.yaml")
    lines, result = _lines(folder / "metrics.jsonl"), _json(folder / "result.json")
    # A round's videos are made before its first step, and logged with it.
    of_steps = {key for line in lines if "round" not in line for key in line}
    rounds = [_point(line, line["step"] - 1, line.keys() - of_steps) for line in lines if "round" in line]
    last = result["last"] if result else {}
    if result:
        rounds.append(_point(last, lines[-1]["step"], last.keys()))
    return History(
        folder=folder,
        config=settings,
        rounds=tuple(rounds),
        steps=tuple(_point(line, line["step"], of_steps) for line in lines),
        events=tuple(Event(**event) for line in [*lines, last] for event in line.get("events", ())),
        feasibility=_feasibility(folder / "feasibility.json"),
        ending=_ending(result, settings) if result else None,
    )


def _point(line: Mapping[str, Any], step: int, keys: Set[str]) -> Point:
    numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
    return Point(step=step, measures={key: numbers[key] for key in numbers if key in keys - {"step", "round"}})


def _ending(result: Mapping[str, Any], settings: AlignConfig) -> Ending:
    best = Best(**result["best"])
    return Ending(reason=result["ended"], best=best, best_round=best.step // settings.steps_per_round)


def _feasibility(path: Path) -> Dual:
    found = _json(path)
    if found is None:
        raise DataError(f"{path}: is missing; expected the folder of an alignment")
    return Dual(**found | {"rows": tuple(LimitRow(*row) for row in found["rows"])})


def _rollouts(folder: Path) -> list[Rollout]:
    chunks = range(len(list(folder.glob("*.safetensors"))))
    return [rollout for chunk in chunks for rollout in Round(folder, made_by="").rollouts(chunk)]


# Files ------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> list[dict[str, Any]]:
    """Read the metrics; a last line that is still being written is left out."""
    try:
        *whole, _ = path.read_text(encoding="utf-8").split("\n")
        lines = [json.loads(line) for line in whole]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as metrics: {error}") from error
    if not lines:
        raise DataError(f"{path}: no step is finished yet; wait for the first")
    return lines


def _json(path: Path) -> Any:
    """Read a file; give None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
