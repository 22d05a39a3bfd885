"""Preference records as numbers that losses take: for each prompt, its videos, its pairs and what is known of both."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reward.losses import as_labels
from reward.records import DIMENSIONS, TAGS, Dimension, Pair, VideoSample


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One prompt or several: `v` videos, each once, and `p` pairs of them. NaN is not known."""

    prompt_ids: tuple[str, ...]
    """Of each video."""
    texts: tuple[str, ...]
    """What the user asked for, of each video."""
    paths: tuple[Path, ...]
    pairs: Int[Tensor, "p 2"]
    """Places of the first and the second video."""
    preferences: Float[Tensor, "p 6"]
    """Probability that the first is preferred, in the order of DIMENSIONS; in `cost`, that it is the costlier."""
    unsafe: Float[Tensor, " v"]
    tags: Float[Tensor, "v 12"]

    def to(self, device: torch.device) -> "Example":
        """Give the same with its tensors on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("pairs", "preferences", "unsafe", "tags")}
        return replace(self, **moved)

    def preference(self, dimension: Dimension) -> Float[Tensor, " p"]:
        """Give the labels of one dimension."""
        return self.preferences[:, DIMENSIONS.index(dimension)]


def examples_of(pairs: Sequence[Pair]) -> list[Example]:
    """Give one example for each prompt, in the order in which prompts first appear."""
    of_prompt: dict[str, list[Pair]] = {}
    for pair in pairs:
        of_prompt.setdefault(pair.prompt.prompt_id, []).append(pair)
    return [_example(group) for group in of_prompt.values()]


def _example(pairs: Sequence[Pair]) -> Example:
    videos = list({v.video_id: v for pair in pairs for v in (pair.video_0, pair.video_1)}.values())
    place = {video.video_id: index for index, video in enumerate(videos)}
    return Example(
        prompt_ids=tuple(video.prompt.prompt_id for video in videos),
        texts=tuple(video.prompt.text for video in videos),
        paths=tuple(video.path for video in videos),
        pairs=torch.tensor([[place[pair.video_0.video_id], place[pair.video_1.video_id]] for pair in pairs]),
        preferences=torch.stack([_preferences(pair) for pair in pairs]),
        unsafe=as_labels([None if video.is_safe is None else not video.is_safe for video in videos]),
        tags=torch.stack([_tags(video) for video in videos]),
    )


def _preferences(pair: Pair) -> Float[Tensor, " 6"]:
    known = [pair.preference(dimension) for dimension in DIMENSIONS]
    return as_labels([None if preference is None else preference.probability for preference in known])


def _tags(video: VideoSample) -> Float[Tensor, " 12"]:
    return as_labels([getattr(video.tags, tag) for tag in TAGS])


def joined(examples: Sequence[Example]) -> Example:
    """Give several examples as one."""
    starts = torch.tensor([0, *(len(example.paths) for example in examples)]).cumsum(0).tolist()
    return Example(
        prompt_ids=tuple(i for example in examples for i in example.prompt_ids),
        texts=tuple(text for example in examples for text in example.texts),
        paths=tuple(path for example in examples for path in example.paths),
        pairs=torch.cat([example.pairs + start for example, start in zip(examples, starts, strict=False)]),
        preferences=torch.cat([example.preferences for example in examples]),
        unsafe=torch.cat([example.unsafe for example in examples]),
        tags=torch.cat([example.tags for example in examples]),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Swapped:
    """Videos of some prompts, each shown with the text of the next prompt, which it was not made for."""

    videos: Example
    """Labels are still about the right texts."""
    rivals: Int[Tensor, "r 2"]
    """Places of a video that was made for a text, among the joined prompts, and of one that was not, among these."""


def swapped(examples: Sequence[Example]) -> Swapped | None:
    """Give each prompt's videos with the next prompt's text; None if all have the same text."""
    starts = torch.tensor([0, *(len(example.paths) for example in examples)]).cumsum(0).tolist()
    videos, rivals, count = [], [], 0
    for place, own in enumerate(examples):
        following = (place + 1) % len(examples)
        text = examples[following].texts[0]
        if text == own.texts[0]:
            continue
        videos.append(replace(own, texts=(text,) * len(own.texts)))
        number = min(len(own.paths), len(examples[following].paths))
        rivals += [(starts[following] + index, count + index) for index in range(number)]
        count += len(own.paths)
    return Swapped(videos=joined(videos), rivals=torch.tensor(rivals)) if videos else None
