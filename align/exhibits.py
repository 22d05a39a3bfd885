"""Clips of an evaluation that a page shows: the same prompt and seed by each system, side by side.

A page plays clips in a loop. So each is measured as it will be played, and one that flashes harmfully is marked: it may
not play by itself. A clip that cannot be measured is not shown.
"""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from align import table
from align.findings import Evaluated
from align.table import Clip
from reward import flash, video
from reward.files import DataError, relative
from reward.video import VideoError

Outcome = Literal["safe", "unsafe", "shows nothing", "not judged"]
"""Only the first is a merit."""
Kind = Literal["red-team", "harmless", "look-alike", "of no type"]

_KINDS: Mapping[str | None, Kind] = {"safety_critical": "red-team", "safety_neutral": "harmless", None: "of no type"}


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """One clip."""

    system: str
    outcome: Outcome
    score: str
    """How helpful it is, in words, or why nobody could tell."""
    video: str | None
    """The file in base64; None: cannot be shown."""
    flashes: float
    """The most flashes in a second of looped playing that are harmful; 0: may play by itself."""
    width: int
    height: int
    """Pixels; 0 where there is nothing to show."""


@dataclass(frozen=True, kw_only=True)
class Exhibits:
    """One prompt and seed, by each system: the reference first."""

    prompt: str
    kind: Kind
    seed: int
    clips: tuple[Exhibit, ...]


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """What is shown."""

    rows: tuple[Exhibits, ...]
    num_left_out: int
    """Rows for which the page had no room."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One prompt and seed in the table."""

    prompt: str
    kind: Kind
    clips: tuple[Clip, ...]


def gather(evaluated: Evaluated, focus: str, max_bytes: float) -> Gallery:
    """Give as many rows as fit in so many bytes, by turns from each kind of prompt and each outcome of `focus`.

    Raises: DataError: the table cannot be read, or names a file outside the folder.
    """
    rows = _rows(evaluated, table.read(evaluated.folder / "table.parquet"))
    chosen = _within(_by_turns(rows, focus), evaluated.folder, max_bytes)
    shown = [_show(row, evaluated) for row in tqdm(chosen, desc="measuring flashes", unit="prompt")]
    return Gallery(rows=tuple(shown), num_left_out=len(rows) - len(chosen))


def outcome_of(clip: Clip) -> Outcome:
    """Say what became of a clip; one that shows nothing is not called safe."""
    if table.failure_of(clip) is not None:
        return "not judged"
    if clip.unsafe:
        return "unsafe"
    return "shows nothing" if clip.is_degenerate else "safe"


# Choosing ---------------------------------------------------------------------------------------------------


def _rows(evaluated: Evaluated, clips: Sequence[Clip]) -> list[_Row]:
    found: dict[tuple[str, int], list[Clip]] = {}
    for clip in sorted(clips, key=lambda clip: clip.system != evaluated.summary.reference):
        found.setdefault((clip.prompt_sha256, clip.seed), []).append(clip)
    return [_Row(prompt=_prompt(own[0]), kind=_kind(own[0], evaluated), clips=tuple(own)) for own in found.values()]


def _prompt(clip: Clip) -> str:
    """Give the prompt; of a table from elsewhere that does not tell, its id."""
    return clip.prompt_id if clip.prompt is None else clip.prompt


def _kind(clip: Clip, evaluated: Evaluated) -> Kind:
    """Tell the kind by the file's name, which begins with the set and the prompt's number."""
    name, alike = Path(clip.file or "").name, evaluated.look_alikes
    is_alike = alike is not None and re.match(rf"{re.escape(alike)}-\d{{4}}-", name)
    return "look-alike" if is_alike else _KINDS[clip.prompt_type]


def _by_turns(rows: Sequence[_Row], focus: str) -> Iterator[_Row]:
    """Give the first row of each kind and outcome, then the second of each."""
    groups: dict[tuple[str, ...], list[_Row]] = {}
    for row in rows:
        outcomes = [outcome_of(clip) for clip in row.clips if clip.system in (row.clips[0].system, focus)]
        groups.setdefault((row.kind, *outcomes), []).append(row)
    for turn in zip_longest(*groups.values()):
        yield from (row for row in turn if row is not None)


def _within(rows: Iterator[_Row], folder: Path, max_bytes: float) -> list[_Row]:
    chosen, room = [], max_bytes
    for row in rows:
        room -= sum(_size(clip, folder) for clip in row.clips)
        if room < 0:
            break
        chosen.append(row)
    return chosen


def _size(clip: Clip, folder: Path) -> int:
    """Give the bytes of a clip in base64."""
    path = _path(clip, folder)
    return 0 if path is None or not path.is_file() else -(-path.stat().st_size // 3) * 4


def _path(clip: Clip, folder: Path) -> Path | None:
    if clip.file is None:
        return None
    path = folder / relative(clip.file)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{path}: a link leads outside its folder; put the file itself there")
    return path


# Showing ----------------------------------------------------------------------------------------------------


def _show(row: _Row, evaluated: Evaluated) -> Exhibits:
    exhibits = tuple(_exhibit(clip, evaluated) for clip in row.clips)
    return Exhibits(prompt=row.prompt, kind=row.kind, seed=row.clips[0].seed, clips=exhibits)


def _exhibit(clip: Clip, evaluated: Evaluated) -> Exhibit:
    """Show a clip whose flashes can be measured, and else say why not."""
    score = clip.scores.get(evaluated.summary.helpfulness)
    words = clip.failure or ("helpfulness not known" if score is None else f"helpfulness {score:.2f}")
    path = _path(clip, evaluated.folder)
    told = {"system": clip.system, "outcome": outcome_of(clip)}
    nothing = Exhibit(**told, score=words, video=None, flashes=0.0, width=0, height=0)
    if path is None:
        return nothing
    try:
        shown = video.read(path)
    except VideoError as error:
        return replace(nothing, score=clip.failure or str(error))
    found = flash.measure(shown.frames, shown.fps, loop=True)
    return replace(
        nothing,
        video=base64.b64encode(path.read_bytes()).decode(),
        flashes=max(found.flashes, found.red_flashes) if found.verdict == "fail" else 0.0,
        width=shown.frames.shape[2],
        height=shown.frames.shape[1],
    )
