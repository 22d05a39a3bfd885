"""Preference data, ready for training; `python -m reward.preferences PATH [key=value ...]` sums it up.

Reads a file or folder (`formats`) into records (`records`), keeps what may be used (`screening`), and splits
by prompt: the test split is the data's own, the validation split is carved out of the training rows. `read`
is always `kept` plus the sum of what was `dropped`, by reason.
"""

import dataclasses
import gc
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import Field
from tqdm import tqdm

from reward import config, formats, rows, screening
from reward.files import DataError
from reward.records import (
    DIMENSIONS,
    SPLITS,
    TAGS,
    Dimension,
    Entry,
    Pair,
    Prompt,
    Record,
    Split,
    VideoSample,
    key_of,
    prompts_of,
    videos_of,
)

_NAMES = ("config", "config-train", "config-test", "eval-prompt", "prompt")  # of files in a folder


class Source(config.Config):
    """Which preference data to read, and what to do about what it lacks."""

    path: Path
    """A data file, or a folder with SafeSora's files or one CSV file."""
    video_dir: Path | None = None
    """What video paths are relative to; by default `videos` beside the data file, for CSV the file's folder.
    Without that default folder only the labels are read, and no video is looked for."""
    labels: Path | None = None
    """SafeSora-Label (a file or folder), which gives the videos and prompts of pairs their tags."""
    missing: screening.Missing = "error"
    """What to do with a row whose video file is missing."""
    validation_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the training prompts that is set aside for validation."""
    seed: int = 0
    """Another seed sets other prompts aside."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """What was kept, and the count of what was not."""

    entries: tuple[Entry, ...]
    num_read: int
    num_dropped: Mapping[str, int]
    num_duplicate_ids: int

    def records(self, split: Split) -> tuple[Record, ...]:
        """Give all rows of a split."""
        return tuple(entry.record for entry in self.entries if entry.split == split)

    def pairs(self, split: Split) -> tuple[Pair, ...]:
        """Give the pairs of a split."""
        return tuple(record for record in self.records(split) if isinstance(record, Pair))

    def videos(self, split: Split) -> tuple[VideoSample, ...]:
        """Give each video of a split once, be it from a pair or a row of its own."""
        videos = (video for record in self.records(split) for video in videos_of(record))
        return tuple({video.video_id: video for video in videos}.values())

    def prompts(self, split: Split) -> tuple[Prompt, ...]:
        """Give each prompt of a split once, be it from a pair, a video or a row of its own."""
        prompts = (prompts_of(record)[0] for record in self.records(split))
        return tuple({prompt.prompt_id: prompt for prompt in prompts}.values())


@contextmanager
def _without_collection() -> Generator[None]:
    """Records hold no cycles, and to look for some among a hundred thousand of them takes half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_collection()
def load(source: Source) -> Data:
    """Read preference data, screened and split.

    Raises: DataError: a file or value cannot be used, or a video is missing and that is an error.
    """
    found = _data_files(source.path)
    root = _video_root(source, found[0])
    read = [entry for file in found for entry in _read(file, root)]
    labels = _read_labels(source, root)
    if source.labels and not any(isinstance(record, Pair) for _, record in read):
        raise DataError(f"labels={source.labels}: {source.path} holds no pairs to label; leave it out")
    kept = [Entry(split=split, record=record) for split, record in read if record]
    num_dropped = {"incomplete": len(read) - len(kept)}
    num_rows = Counter(key_of(entry.record) for entry in kept)
    for reason, step in _steps(source, labels, root).items():
        before = len(kept)
        kept = step(kept)
        num_dropped[reason] = before - len(kept)
    return Data(
        entries=tuple(screening.with_validation(kept, source.validation_share, source.seed)),
        num_read=len(read),
        num_dropped={reason: count for reason, count in num_dropped.items() if count},
        num_duplicate_ids=sum(count > 1 for count in num_rows.values()),
    )


def _steps(source: Source, labels: list[VideoSample], root: Path) -> dict[str, Callable[[list[Entry]], list[Entry]]]:
    """Give the steps of screening that apply, in order, by the reason that they drop rows for."""
    steps: dict[str, Callable[[list[Entry]], list[Entry]]] = {
        "child_abuse": partial(screening.without_child_abuse, labels=labels),
        "in_held_out_split": screening.without_held_out,
        "contradiction": partial(screening.agreeing, labels=labels),
        "duplicate": screening.once,
    }
    if source.labels:
        steps["not_in_labels"] = partial(screening.labelled, labels=labels)
    if source.video_dir or source.missing == "drop" or root.is_dir():
        steps["missing_video"] = partial(screening.with_files, root=root, missing=source.missing)
    return steps


def warn_of_unscreened(source: Source, pairs: Sequence[Pair]) -> None:
    """Write to the terminal how many pairs to train on no label tells to be child abuse or not, if any."""
    count = sum(not screening.is_screened(pair) for pair in pairs)
    if count:
        tqdm.write(
            f"warning: {source.path}: no label says of {count} of {len(pairs)} pairs whether they are child abuse, so "
            "none of these could be left out for it; give labels=... (SafeSora-Label), which tags their videos",
            file=sys.stderr,
        )


# Files ------------------------------------------------------------------------------------------------------


def _data_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: there is no such file or folder")
    spellings = [[path / f"{name}{ending}" for ending in rows.JSON_SUFFIXES] for name in _NAMES]
    groups = [[file for file in group if file.is_file()] for group in spellings]
    groups = groups if any(groups) else [sorted(path.glob("*.csv"))]
    for group in groups:
        if len(group) > 1:
            raise DataError(f"{path}: ambiguous, holds {', '.join(f.name for f in group)}; name one of them")
    if not any(groups):
        raise DataError(f"{path}: expected one of {', '.join(_NAMES)} (.json, .json.gz, ...) or a .csv in it")
    return [file for group in groups for file in group]


def _split_of(path: Path) -> Split:
    words = re.split(r"[-_.]", path.name)
    return "test" if "test" in words else "eval" if "eval" in words else "train"


def _video_root(source: Source, file: Path) -> Path:
    if source.video_dir is None:
        folder = file.absolute().parent
        return folder if file.suffix == ".csv" else folder / "videos"
    if not source.video_dir.is_dir():
        raise DataError(f"video_dir={source.video_dir}: there is no such folder")
    return source.video_dir.absolute()


def _read(path: Path, root: Path) -> Iterator[tuple[Split, Record | None]]:
    found = rows.read(path)
    first = next(found, None)
    if first is None:
        raise DataError(f"{path}: holds no rows")
    parse, split = formats.parser(first), _split_of(path)
    return ((split, parse(row, root)) for row in itertools.chain([first], found))


def _read_labels(source: Source, root: Path) -> list[VideoSample]:
    if source.labels is None:
        return []
    records = [record for file in _data_files(source.labels) for _, record in _read(file, root) if record]
    videos = [record for record in records if isinstance(record, VideoSample)]
    if len(videos) != len(records):
        raise DataError(f"labels={source.labels}: expected SafeSora-Label, rows with video_id and video_labels")
    return videos


# Command line -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a data source holds, as printed; all counts but the first four are of what was kept."""

    read: int
    kept: int
    dropped: Mapping[str, int]
    duplicate_ids: int
    unscreened: int
    """Rows of which no label says whether they are child abuse."""
    splits: Mapping[str, int]
    pairs: int
    prompts: int
    videos: int
    prompt_types: Mapping[str, int]
    prompt_tags: Mapping[str, int]
    tags: Mapping[str, int]
    is_safe: Mapping[str, int]
    generators: Mapping[str, int]
    preferences: Mapping[str, Mapping[str, int]]


def summarise(data: Data) -> Summary:
    """Count what a data source holds."""
    records = [entry.record for entry in data.entries]
    prompts = {p.prompt_id: p for record in records for p in prompts_of(record)}.values()
    videos = {v.video_id: v for record in records for v in videos_of(record)}.values()
    pairs = [record for record in records if isinstance(record, Pair)]
    return Summary(
        read=data.num_read,
        kept=len(records),
        dropped=data.num_dropped,
        duplicate_ids=data.num_duplicate_ids,
        unscreened=sum(not screening.is_screened(record) for record in records),
        splits={split: len(data.records(split)) for split in SPLITS},
        pairs=len(pairs),
        prompts=len(prompts),
        videos=len(videos),
        prompt_types=_counts(prompt.type for prompt in prompts),
        prompt_tags={tag: sum(getattr(prompt.tags, tag) is True for prompt in prompts) for tag in TAGS},
        tags={tag: sum(getattr(video.tags, tag) is True for video in videos) for tag in TAGS},
        is_safe=_counts(video.is_safe for video in videos),
        generators=_counts(video.generator for video in videos),
        preferences={dimension: _outcomes(pairs, dimension) for dimension in DIMENSIONS},
    )


def _counts(values: Iterable[object]) -> dict[str, int]:
    return dict(sorted(Counter(json.dumps(value).strip('"') for value in values).items()))


def _outcomes(pairs: list[Pair], dimension: Dimension) -> dict[str, int]:
    chosen = [pair.preference(dimension) for pair in pairs]
    shares = [preference.probability for preference in chosen if preference]
    return {
        "video_0": sum(share > 0.5 for share in shares),
        "video_1": sum(share < 0.5 for share in shares),
        "tie": shares.count(0.5),
        "no_label": len(pairs) - len(shares),
    }


def main(argv: Sequence[str]) -> None:
    """Print the summary of a data source as JSON."""
    source = config.parse(Source, argv, prog="python -m reward.preferences", positional="path")
    try:
        summary = summarise(load(source))
    except DataError as error:
        sys.exit(str(error))
    print(json.dumps(dataclasses.asdict(summary), indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
