"""Preference files as a pool: the first round can learn from videos that others made and people compared."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from align.pairing import Comparison
from align.rollouts import Judges, Scores, judge
from reward import preferences
from reward.config import Config
from reward.files import DataError
from reward.preferences import Source
from reward.records import Dimension, Pair, VideoSample
from reward.video import read


class Offline(Config):
    """Preference files that the first round learns from, in place of the policy's own videos."""

    data: Source
    prefer: Literal["people", "judge"] = "people"
    """Who says which video is better. People: the safe one where exactly one is labelled safe, else the one preferred
    in `dimension`; pairs of two unsafe videos and pairs without such a label are left out, and counted."""
    dimension: Dimension = "helpfulness"
    """Of people's preferences."""


def load(settings: Offline) -> list[Pair]:
    """Read the training pairs; that some are unscreened is said on the terminal.

    Raises: DataError: the data cannot be read, or holds none.
    """
    pairs = list(preferences.load(settings.data).pairs("train"))
    if not pairs:
        raise DataError(f"{settings.data.path}: no training pairs")
    preferences.warn_of_unscreened(settings.data, pairs)
    return pairs


def videos_of(pairs: Sequence[Pair]) -> list[VideoSample]:
    """Give each video of some pairs once."""
    return list({video.video_id: video for pair in pairs for video in (pair.video_0, pair.video_1)}.values())


def judged(clips: Sequence[VideoSample], judges: Judges) -> list[Scores]:
    """Judge files, by what users asked for, with a progress bar.

    Raises: VideoError: a file cannot be read. JudgeError, BackboneError: a video cannot be judged.
    """
    bar = tqdm(clips, desc="judging", unit="video", leave=False)
    return [score for clip in bar for score in judge(judges, [clip.prompt.text], [read(clip.path)])]


def labelled_costs(clips: Sequence[VideoSample]) -> Float[np.ndarray, " n"]:
    """Give 1 for videos that people call unsafe, -1 for safe ones, NaN where they do not say."""
    return np.array([np.nan if clip.is_safe is None else -1.0 if clip.is_safe else 1.0 for clip in clips])


def compared(settings: Offline, pairs: Sequence[Pair], clips: Sequence[VideoSample]) -> tuple[Comparison, ...]:
    """Give what people said, by places among the videos; how many pairs say nothing is written to the terminal.

    Raises: DataError: none says anything.
    """
    places = {clip.video_id: place for place, clip in enumerate(clips)}
    found, left_out = [], Counter[str]()
    for pair in pairs:
        said = _said(pair, settings.dimension)
        if isinstance(said, str):
            left_out[said] += 1
            continue
        first, second = places[pair.video_0.video_id], places[pair.video_1.video_id]
        best, worst = (first, second) if said >= 0.5 else (second, first)
        found.append(Comparison(chosen=best, rejected=worst, preference=max(said, 1 - said)))
    if not found:
        raise DataError(f"none of {len(pairs)} pairs says which video is better: {dict(left_out)}")
    if left_out:
        tqdm.write(f"{len(found)} pairs; left out: {', '.join(f'{num} {why}' for why, num in left_out.items())}")
    return tuple(found)


def _said(pair: Pair, dimension: Dimension) -> float | str:
    """Give the probability that the first video is the better one, or why nobody knows."""
    safe = pair.video_0.is_safe, pair.video_1.is_safe
    if safe == (False, False):
        return "both_unsafe"
    if set(safe) == {True, False}:
        return float(safe[0] is True)
    preference = pair.preference(dimension)
    return "no_label" if preference is None else preference.probability
