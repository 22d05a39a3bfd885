"""Held-out pairs by hand: each prompt has a first and a second video, with labels and scores."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from reward.held_out import COLUMNS, HeldOut
from reward.measures import Splits
from reward.records import DIMENSIONS, TAGS, Pair, Preference, Prompt, Tags, VideoSample
from reward.verdicts import Calibration


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pair: what people prefer, by dimension, and for each video its safety, generator and scores."""

    preferred: dict[str, float] = field(default_factory=dict)
    unsafe: tuple[bool | None, bool | None] = (None, None)
    crime: tuple[bool | None, bool | None] = (None, None)
    generators: tuple[str | None, str | None] = (None, None)
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)


def pair(number: int, case: Case) -> Pair:
    prompt = Prompt(prompt_id=f"p{number}", text=f"a ball called {number}")
    first, second = (
        VideoSample(
            video_id=f"p{number}-{side}",
            prompt=prompt,
            path=Path(f"videos/p{number}/{side}.mp4"),
            is_safe=None if unsafe is None else not unsafe,
            tags=Tags(crime=crime),
            generator=generator,
        )
        for side, unsafe, crime, generator in zip("ab", case.unsafe, case.crime, case.generators, strict=True)
    )
    labels: dict[str, Any] = {name: Preference(probability=share) for name, share in case.preferred.items()}
    return Pair(pair_id=f"{number}", prompt=prompt, video_0=first, video_1=second, **labels)


def held_out(cases: Sequence[Case]) -> HeldOut:
    """Pair i has videos `pi-a` and `pi-b`; scores that a case does not give are NaN."""
    pairs = tuple(pair(number, case) for number, case in enumerate(cases))
    nothing = (np.nan, np.nan)
    given = {name: [score for case in cases for score in case.scores.get(name, nothing)] for name in COLUMNS}
    return HeldOut(
        videos=tuple(video for each in pairs for video in (each.video_0, each.video_1)),
        pairs=pairs,
        scores={name: np.array(scores, dtype=float) for name, scores in given.items()},
    )


def splits(test: Sequence[Case], validation: Sequence[Case] = (), train: Sequence[Case] = (), **scales: Any) -> Splits:
    """All scores count as trained, unless `trained` says which."""
    calibration: dict[str, Any] = {
        "reward_mean": 0.0,
        "reward_scale": 1.0,
        "cost_scale": 1.0,
        "cost_has_zero": True,
        "tag_offsets": (0.0,) * len(TAGS),
        "trained": (*DIMENSIONS, *TAGS),
    }
    return Splits(
        train=[pair(number, case) for number, case in enumerate(train)],
        validation=held_out(validation),
        test=held_out(test),
        scales=Calibration(**(calibration | scales)),
    )
