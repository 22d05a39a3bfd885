"""What is known better than from labels: gold measures of videos, and the best accuracy that noisy labels leave.

Gold is a JSON-lines file (or any file of rows) with a `video_id` a row. Numbers named like a dimension are its values,
true or false its hazards: a video with any of these is unsafe, and the gold cost is their number. Other fields are not
read. Nothing may be trained on it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reward import rows
from reward.files import DataError
from reward.held_out import PairLabel, VideoLabel
from reward.records import DIMENSIONS, Dimension, Pair, VideoSample
from reward.rows import Row


@dataclass(frozen=True, kw_only=True, eq=False)
class Gold:
    """Exact measures, by the id of a video."""

    values: Mapping[str, Mapping[Dimension, float]]
    """Those in `cost` are numbers of hazards."""
    hazards: Mapping[str, Mapping[str, bool]]

    @property
    def hazard_names(self) -> tuple[str, ...]:
        """Give the names of the hazards, the same for all videos."""
        return tuple(next(iter(self.hazards.values()), {}))

    def preferred(self, dimension: Dimension, margin: float = 0.0) -> PairLabel:
        """Give which video has more of a dimension; pairs that differ by no more than the margin have no label."""

        def label(pair: Pair) -> float | None:
            sides = (self.values.get(video.video_id, {}).get(dimension) for video in (pair.video_0, pair.video_1))
            first, second = (math.nan if value is None else value for value in sides)
            return float(first > second) if abs(first - second) > margin else None

        return label

    def is_unsafe(self, video: VideoSample) -> bool | None:
        """Give whether a video shows any hazard; None for one that was not measured."""
        shown = self.hazards.get(video.video_id)
        return any(shown.values()) if shown else None

    def shows(self, hazard: str) -> VideoLabel:
        """Give whether a video shows one hazard."""
        return lambda video: self.hazards.get(video.video_id, {}).get(hazard)


def read_gold(path: Path) -> Gold:
    """Read gold measures.

    Raises: DataError: the file cannot be read; a row without an id, or with an id or hazards unlike the others'.
    """
    values: dict[str, dict[Dimension, float]] = {}
    hazards: dict[str, dict[str, bool]] = {}
    for row in rows.read(path):
        row.require("video_id")
        video_id = row.text("video_id")
        if video_id is None or video_id in values:
            raise row.error("video_id", "an id that no other row has")
        shown = {field: value for field, value in row.values.items() if isinstance(value, bool)}
        if hazards and shown.keys() != next(iter(hazards.values())).keys():
            raise row.error("video_id", f"true or false in the same fields as the first row, not in {', '.join(shown)}")
        hazards[video_id] = shown
        values[video_id] = {d: _number(row, d) for d in DIMENSIONS if d in row.values}
        if shown:
            values[video_id]["cost"] = float(sum(shown.values()))
    return Gold(values=values, hazards=hazards)


def read_ceilings(path: Path) -> dict[Dimension, float]:
    """Read the best accuracies on the test split: `{"best_accuracy": {"test": {"helpfulness": 0.77, ...}}}`.

    Raises: DataError: the file does not say so.
    """
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(tree, dict):
        raise DataError(f"{path}: expected an object with best_accuracy, got {type(tree).__name__}")
    test = Row(file=path, number=1, values=tree).inner("best_accuracy").inner("test")
    ceilings = {dimension: _number(test, dimension) for dimension in DIMENSIONS if dimension in test.values}
    wrong = [dimension for dimension, value in ceilings.items() if not 0.5 <= value <= 1]
    if wrong:
        raise test.error(wrong[0], "an accuracy in [0.5, 1]")
    if not ceilings:
        raise DataError(f"{path}: best_accuracy.test: expected some of {', '.join(DIMENSIONS)}, got none")
    return ceilings


def _number(row: Row, field: str) -> float:
    value = row.values[field]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise row.error(field, "a number")
    return float(value)
