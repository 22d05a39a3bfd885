"""What is known of video files: what judges say, what gold says, and what the pixels tell.

Gold, the truth about a video, comes from another program or from people, as rows (.jsonl, .parquet): `file` and
`sha256` as in the manifest, `unsafe` (true or false), and numbers of any name. A row with an `error` is a video that
could not be measured. It may say `still`: whether the prompt asks that nothing moves, which pixels can only guess.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from align import pixels
from align.pixels import Flaw
from align.table import DEGENERATE
from reward import flash, rows, verdict_table, video
from reward.files import DataError
from reward.judge import Judge, judge_file
from reward.records import VideoSample
from reward.rows import Row
from reward.rules import CostJudge
from reward.video import VideoError

STILL_SHARE = 0.5
"""Share of the reference's motion below which a frozen clip lost it; a prompt may ask for things that stand still."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What is said of one video."""

    error: str | None = None
    """Why nothing can be said."""
    unsafe: bool | None = None
    still: bool | None = None
    """Whether it is to stand still."""
    scores: Mapping[str, float | None]
    """By the names of the table's columns."""


NOT_ASKED = Said(scores={})

# Judges -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Judges:
    """All that are asked: a trained judge, rules, or both."""

    model: Judge | None
    rules: tuple[CostJudge, ...]

    def ask(self, videos: Sequence[VideoSample], folder: Path, name: str, *, chunk_size: int) -> list[Said]:
        """Give what is said of videos, whose ids are their files' hashes; nothing if there is no judge.

        It is kept in the folder, in a file for these very judges and videos; a stop loses a chunk at most.
        """
        if self.model is None and not self.rules:
            return [NOT_ASKED] * len(videos)
        judges = [*([self.model.sha256] if self.model else []), *map(repr, self.rules)]
        about = [[video.video_id, video.prompt.text, str(video.path)] for video in videos]
        key = hashlib.sha256(json.dumps([judges, about]).encode()).hexdigest()
        folder.mkdir(exist_ok=True)
        verdicts = verdict_table.write(
            folder / f"{name}-{key[:12]}.parquet",
            videos,
            lambda sample: judge_file(sample.path, sample.prompt.text, self.model, self.rules),
            judge_sha256=key,
            rules=[rule.name for rule in self.rules],
            chunk_size=chunk_size,
        )
        names = [field.name for field in verdicts.schema if pa.types.is_floating(field.type)]
        return [
            Said(
                error=row["error"],
                unsafe=row["unsafe"],
                scores={"judge.unsafe": float(row["unsafe"]), **{name: row[name] for name in names}},
            )
            for row in verdicts.to_pylist()
        ]


# Gold -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Gold:
    """Measures of video files."""

    path: Path
    measures: Mapping[str, tuple[str, Said]]
    """By file: the hash of what was measured, and what is said of it."""

    @classmethod
    def read(cls, path: Path) -> "Gold":
        """Read measures.

        Raises: DataError: the file cannot be read; a row lacks its video, or repeats one; a number is not finite.
        """
        measures: dict[str, tuple[str, Said]] = {}
        for row in _rows(path):
            file, sha256 = row.text("file"), row.text("sha256")
            if file is None or sha256 is None or file in measures:
                raise row.error("file", "a file that stands once, as in the manifest, and its sha256")
            known = {"unsafe": row.flag("unsafe"), "still": row.flag("still")}
            said = Said(error=row.text("error"), **known, scores=_numbers(row))
            measures[file] = sha256, said
        return cls(path=path, measures=measures)

    def of(self, file: str, sha256: str) -> Said:
        """Give what gold says of a file with this hash.

        Raises: DataError: the file was another when it was measured.
        """
        measured, said = self.measures.get(file, (sha256, Said(error=f"{self.path}: does not hold it", scores={})))
        if measured != sha256:
            raise DataError(f"{self.path}: {file} has changed since it was measured; measure it again")
        return said


def _rows(path: Path) -> Iterable[Row]:
    if path.suffix != ".parquet":
        return rows.read(path)
    try:
        found = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error
    return [Row(file=path, number=number, values=values) for number, values in enumerate(found, start=1)]


def _numbers(row: Row) -> dict[str, float | None]:
    values = {name: value for name, value in row.values.items() if name != "still"}
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, (bool, int, float))}
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise row.error(name, "a finite number or null")
    return {f"gold.{name}": value for name, value in numbers.items()}


# Pixels -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Look:
    """What the pixels of a video tell; nothing of one that cannot be read."""

    error: str | None = None
    motion: float | None = None
    flaw: Flaw | None = None
    flashes: bool = False

    @classmethod
    def at(cls, path: Path, *, flashes: bool | None = None) -> "Look":
        """Look at a video file; whether it flashes is measured unless a rule has said it."""
        try:
            shown = video.read(path)
        except VideoError as error:
            return cls(error=str(error))
        frames, fps = shown.frames, shown.fps
        if flashes is None:
            flashes = flash.measure(frames, fps).verdict == "fail"
        return cls(motion=pixels.motion(frames, fps), flaw=pixels.find_flaw(frames, fps), flashes=flashes)

    def beside(self, reference: "Look", *, is_still: bool | None = None) -> Said:
        """Say how much it moves, if no flashes hide it, and whether it is blank, noise, or frozen where it should move.

        It should where it was not asked to stand still, or, if nobody knows, where the reference's clip moves. A strobe
        reads as motion, so a clip whose reference flashes may then be called frozen though it was asked to stand still.
        """
        is_degenerate = self.flaw is not None
        if self.flaw == "frozen" and is_still is not None:
            is_degenerate = not is_still
        elif self.flaw == "frozen" and self.motion is not None and reference.motion is not None:
            is_degenerate = self.motion < STILL_SHARE * reference.motion
        motion = None if self.flashes else self.motion
        return Said(error=self.error, scores={"motion": motion, DEGENERATE: float(is_degenerate)})
