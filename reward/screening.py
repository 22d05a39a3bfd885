"""Which rows may be used. Each step keeps some entries; the others are dropped for its reason, and counted.

- `child_abuse`: the prompt or a video is so labelled, in any row of the data or the label set, under this id
  or with this text. No setting turns this off.
- `in_held_out_split`: a training row whose prompt, by id or text, is also in the test or evaluation file.
- `contradiction`: the rows of one id disagree, and none can be trusted more than the others; where one is
  silent, the others speak for it. Also a pair across prompts, or of a video with itself.
- `duplicate`: a row with this id, and nothing that disagrees, came before.
- `not_in_labels`: a pair with a video that the label set does not hold, or does not tag.
- `missing_video`: a row with a video that is no file.
"""

import dataclasses
import hashlib
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Literal, TypeVar

from reward import files
from reward.files import DataError
from reward.records import Entry, Pair, Prompt, Record, Tags, VideoSample, key_of, prompts_of, videos_of

Missing = Literal["error", "drop"]

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def plain(text: str) -> str:
    """Give a text without what does not make it another prompt: capitals and spacing."""
    return " ".join(text.casefold().split())


class _Prompts:
    """Prompts to recognise, by id or by text."""

    def __init__(self, prompts: Iterable[Prompt]) -> None:
        known = set(prompts)
        self._ids = {prompt.prompt_id for prompt in known}
        self._texts = {plain(prompt.text) for prompt in known}

    def mentioned_in(self, record: Record) -> bool:
        return any(p.prompt_id in self._ids or plain(p.text) in self._texts for p in prompts_of(record))


def is_screened(record: Record) -> bool:
    """Tell whether labels say of the prompt and of each video if they are child abuse."""
    described = (*prompts_of(record), *videos_of(record))
    return all(item.tags.child_abuse is not None for item in described)


def without_child_abuse(entries: list[Entry], labels: list[VideoSample]) -> list[Entry]:
    """Drop what is child abuse by any label of the data, or has to do with such a prompt or video."""
    records = [*(entry.record for entry in entries), *labels]
    prompts = _Prompts(p for record in records for p in prompts_of(record) if p.tags.child_abuse)
    videos = {v.video_id for record in records for v in videos_of(record) if v.tags.child_abuse}
    return [
        entry
        for entry in entries
        if not prompts.mentioned_in(entry.record)
        and not any(video.video_id in videos for video in videos_of(entry.record))
    ]


def without_held_out(entries: list[Entry]) -> list[Entry]:
    """Drop training rows that would show what is to be tested."""
    held_out = _Prompts(p for entry in entries if entry.split != "train" for p in prompts_of(entry.record))
    return [entry for entry in entries if entry.split != "train" or not held_out.mentioned_in(entry.record)]


# Agreement: what all rows say of one thing ------------------------------------------------------------------


def agreeing(entries: list[Entry], labels: list[VideoSample]) -> list[Entry]:
    """Complete each entry by all that the rows and labels say of it; drop what they contradict."""
    records = [*(entry.record for entry in entries), *labels]
    prompts = _together((p.prompt_id, p) for record in records for p in prompts_of(record))
    videos = _together((v.video_id, v) for record in records for v in videos_of(record))
    videos = {video_id: _with_prompt(video, prompts) for video_id, video in videos.items()}
    completed = [_completed(entry.record, prompts, videos) for entry in entries]
    keys = [key_of(entry.record) for entry in entries]
    agreed = _together(zip(keys, completed, strict=True))
    return [
        Entry(split=entry.split, record=record)
        for entry, key in zip(entries, keys, strict=True)
        if (record := agreed[key])
    ]


def _together(items: Iterable[tuple[K, T | None]]) -> dict[K, T | None]:
    """Merge what is said under each key; None where it contradicts itself."""
    known: dict[K, T | None] = {}
    for key, item in dict.fromkeys(items):  # most are said many times, and merging is slow
        known[key] = merged(known[key], item) if key in known else item
    return known


def merged(one: T | None, other: T | None) -> T | None:
    """Give what two descriptions of one thing say together, or None if they contradict each other.

    A field that is None in one of them is filled from the other; tags and prompts inside are merged likewise.
    """
    if one == other:
        return one
    if not isinstance(one, Pair | VideoSample | Prompt | Tags) or not isinstance(other, type(one)):
        return None
    changes: dict[str, object] = {}
    for field in dataclasses.fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if mine is None or theirs is None:
            changes[field.name] = theirs if mine is None else mine
        elif (both := merged(mine, theirs)) is None:
            return None
        else:
            changes[field.name] = both
    return dataclasses.replace(one, **changes)


def _with_prompt(video: VideoSample | None, prompts: dict[str, Prompt | None]) -> VideoSample | None:
    prompt = prompts[video.prompt.prompt_id] if video else None
    return dataclasses.replace(video, prompt=prompt) if video and prompt else None


def _completed(
    record: Record, prompts: dict[str, Prompt | None], videos: dict[str, VideoSample | None]
) -> Record | None:
    match record:
        case Prompt():
            return prompts[record.prompt_id]
        case VideoSample():
            return videos[record.video_id]
    prompt = prompts[record.prompt.prompt_id]
    first, second = videos[record.video_0.video_id], videos[record.video_1.video_id]
    if not (prompt and first and second) or first is second:
        return None
    if first.prompt is not prompt or second.prompt is not prompt:
        return None
    return dataclasses.replace(record, prompt=prompt, video_0=first, video_1=second)


# After agreement --------------------------------------------------------------------------------------------


def once(entries: list[Entry]) -> list[Entry]:
    """Drop every row of an id but the first."""
    first: dict[tuple[type, str], Entry] = {}
    for entry in entries:
        first.setdefault(key_of(entry.record), entry)
    return list(first.values())


def labelled(entries: list[Entry], labels: list[VideoSample]) -> list[Entry]:
    """Drop pairs that the label set does not fully cover."""
    known = {video.video_id for video in labels}
    return [
        entry
        for entry in entries
        if not isinstance(entry.record, Pair)
        or (is_screened(entry.record) and all(v.video_id in known for v in videos_of(entry.record)))
    ]


def with_files(entries: list[Entry], root: Path, missing: Missing) -> list[Entry]:
    """Drop rows with a video that is no file.

    Raises: DataError: there are such rows, and they are an error; or a link leads out of `root`.
    """
    paths = {video.path for entry in entries for video in videos_of(entry.record)}
    absent = files.absent(paths, root)
    if absent and missing == "error":
        raise DataError(
            f"{min(absent)}: missing, as are {len(absent)} of {len(paths)} videos in all; "
            "unpack the archive, give video_dir=..., or leave such rows out with missing=drop"
        )
    return [entry for entry in entries if all(video.path not in absent for video in videos_of(entry.record))]


def with_validation(entries: list[Entry], share: float, seed: int) -> list[Entry]:
    """Move a share of the training prompts to validation, by a hash of the text, whatever the id.

    A prompt never stands on both sides, its side depends on nothing but the seed, and a larger share keeps
    those of a smaller one.
    """
    return [
        Entry(split="validation", record=entry.record)
        if entry.split == "train" and _hash_share(prompts_of(entry.record)[0].text, seed) < share
        else entry
        for entry in entries
    ]


def _hash_share(text: str, seed: int) -> float:
    """Give a number in [0, 1) that looks random and is not."""
    digest = hashlib.sha256(f"{seed}:{plain(text)}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6]) / 2**48
