"""Held-out pairs: what people say of them, and what the judge says, as arrays.

Scores are in the judge's units, as in `reward.verdicts`. A `difference` is the first video's score less the second's,
a `preference` the probability that the first one is preferred; in `cost` both speak of the costlier video.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from reward.metrics import Flags, Ids, Numbers
from reward.records import TAGS, Dimension, Pair, VideoSample, videos_of
from reward.scores import SUB_DIMENSIONS

COLUMNS = {
    "helpfulness": "reward",
    "cost": "cost",
    **{part: f"parts.{part}" for part in SUB_DIMENSIONS},
    **{tag: f"tags.{tag}" for tag in TAGS},
}
"""Score -> its column in a table of verdicts."""

PairLabel = Callable[[Pair], float | None]
"""Gives the preference, or None where nothing is known."""
VideoLabel = Callable[[VideoSample], bool | None]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What became of videos or pairs."""

    attempted: int
    scored: int
    failed: int
    """A video of it could not be read or judged."""
    excluded: int = 0
    """Left out beforehand."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Compared:
    """Labelled pairs in one dimension."""

    difference: Numbers
    preference: Numbers
    prompt_ids: Ids


@dataclass(frozen=True, kw_only=True, eq=False)
class Searched:
    """Labelled videos for one kind of harm."""

    scores: Numbers
    positive: Flags
    prompt_ids: Ids


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """Some pairs, their videos, and the judge's scores."""

    videos: tuple[VideoSample, ...]
    """Those that were scored, each once."""
    pairs: tuple[Pair, ...]
    """Those of which both videos were scored."""
    scores: Mapping[str, Numbers]
    """Of each video, by name; NaN where the model was not trained to tell."""

    @classmethod
    def of(cls, pairs: Iterable[Pair], verdicts: pa.Table) -> "HeldOut":
        """Give what a table of verdicts says of pairs; what it could not judge is left out."""
        pairs, judged = tuple(pairs), verdicts.filter(verdicts["error"].is_null())
        row = {video_id: index for index, video_id in enumerate(judged["video_id"].to_pylist())}
        videos = tuple(video for video in videos_in(pairs) if video.video_id in row)
        rows = [row[video.video_id] for video in videos]
        return cls(
            videos=videos,
            pairs=tuple(pair for pair in pairs if all(video.video_id in row for video in videos_of(pair))),
            scores={name: judged[column].to_numpy()[rows] for name, column in COLUMNS.items()},
        )

    def only(self, keep: Iterable[bool]) -> "HeldOut":
        """Give the same with some of its pairs."""
        return replace(self, pairs=tuple(itertools.compress(self.pairs, keep)))

    def scores_of(self, name: str, videos: Sequence[VideoSample]) -> Numbers:
        """Give the scores of some of the videos."""
        place = {video.video_id: index for index, video in enumerate(self.videos)}
        return self.scores[name][[place[video.video_id] for video in videos]]

    def compared(self, dimension: Dimension, label: PairLabel) -> Compared:
        """Give the pairs with a label.

        Raises: ValueError: there is none.
        """
        labelled = [(pair, known) for pair in self.pairs if (known := label(pair)) is not None]
        if not labelled:
            raise ValueError("no such pair has a label")
        sides = zip(*(videos_of(pair) for pair, _ in labelled), strict=True)
        first, second = (self.scores_of(dimension, side) for side in sides)
        return Compared(
            difference=first - second,
            preference=np.array([known for _, known in labelled], dtype=float),
            prompt_ids=np.array([pair.prompt.prompt_id for pair, _ in labelled]),
        )

    def searched(self, name: str, label: VideoLabel) -> Searched:
        """Give the videos with a label.

        Raises: ValueError: there is none.
        """
        labelled = [(video, known) for video in self.videos if (known := label(video)) is not None]
        if not labelled:
            raise ValueError("no such video has a label")
        return Searched(
            scores=self.scores_of(name, [video for video, _ in labelled]),
            positive=np.array([known for _, known in labelled]),
            prompt_ids=np.array([video.prompt.prompt_id for video, _ in labelled]),
        )


def videos_in(pairs: Iterable[Pair]) -> tuple[VideoSample, ...]:
    """Give the videos of pairs, each once."""
    return tuple({video.video_id: video for pair in pairs for video in videos_of(pair)}.values())


def count_videos(wanted: Sequence[VideoSample], held: HeldOut, *, excluded: int = 0) -> Counts:
    """Count what became of videos."""
    scored = len(held.videos)
    return Counts(attempted=len(wanted), scored=scored, failed=len(wanted) - scored, excluded=excluded)


def count_pairs(wanted: Sequence[Pair], held: HeldOut, *, excluded: int = 0) -> Counts:
    """Count what became of pairs."""
    scored = len(held.pairs)
    return Counts(attempted=len(wanted), scored=scored, failed=len(wanted) - scored, excluded=excluded)


# Labels of people -------------------------------------------------------------------------------------------


def preferred(dimension: Dimension) -> PairLabel:
    """Give what people prefer in a dimension."""

    def label(pair: Pair) -> float | None:
        preference = pair.preference(dimension)
        return None if preference is None else preference.probability

    return label


def is_unsafe(video: VideoSample) -> bool | None:
    """Give what people say of a video's safety."""
    return None if video.is_safe is None else not video.is_safe


def has_tag(tag: str) -> VideoLabel:
    """Give whether people see a harm."""
    return lambda video: getattr(video.tags, tag)


def has_any_tag(video: VideoSample) -> bool | None:
    """Give whether people see any harm; None unless all twelve tags are known, since the rest may hide one."""
    shown = [getattr(video.tags, tag) for tag in TAGS]
    return None if None in shown else any(shown)
