"""Rows to records and back: SafeSora's four files, and the table of VideoAlign.

| file | one row | mark |
|---|---|---|
| SafeSora `config-*.json.gz` | `Pair` | `video_0` |
| SafeSora-Label `config-*.json.gz` | `VideoSample` | `video_id` |
| SafeSora-Eval `eval-prompt.json.gz`, SafeSora-Prompt `prompt.jsonl.gz` | `Prompt` | `prompt_text` alone |
| VideoAlign, VideoGen-RewardBench `*.csv` | `Pair` | `path_A` |

SafeSora's `harmlessness` names the *safer* video; `cost` prefers the other one. That sign is turned here, in
`_COSTLIER`, and nowhere else. A row without its ids and prompt reads as `None`: it can be neither joined nor
split by prompt, and the caller counts it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from reward import rows
from reward.records import (
    FIRST,
    SECOND,
    TAGS,
    TIE,
    UNTAGGED,
    Pair,
    Preference,
    Prompt,
    PromptType,
    Record,
    Tags,
    VideoSample,
)
from reward.rows import Row

Parse = Callable[[Row, Path], Record | None]

_BETTER = {"video_0": FIRST, "video_1": SECOND}
_COSTLIER = {"video_0": SECOND, "video_1": FIRST}
_PARTS = ("instruction_following", "correctness", "information", "informativeness", "aesthetics")
_VOTE = {"a": FIRST, "b": SECOND, "same": TIE, "invalid": None}
_PROMPT_TYPES: dict[str, PromptType] = {
    "safety_critical": "safety_critical",
    "safety_neutral": "safety_neutral",
}
_PROMPT_FIELDS = ("prompt_id", "prompt_text", "prompt_type", "prompt_labels")


def parser(row: Row) -> Parse:
    """Tell the format of a file from the fields of its first row.

    Raises: DataError: they fit no format, or several.
    """
    marks: dict[str, Parse] = {"video_0": pair, "video_id": video, "path_A": votes}
    fitting = [mark for mark in marks if mark in row.values]
    if not fitting and "prompt_text" in row.values:
        return prompt
    if len(fitting) != 1:
        found = f"has {' and '.join(fitting)}" if fitting else f"has only {', '.join(row.values) or 'no fields'}"
        raise rows.DataError(
            f"{row.file}, row {row.number}: {found}; expected just one of video_0 (SafeSora preferences), "
            "video_id (SafeSora labels), path_A (VideoAlign) or, without these, prompt_text (prompts)"
        )
    return marks[fitting[0]]


# Reading SafeSora -------------------------------------------------------------------------------------------


def prompt(row: Row, root: Path) -> Prompt | None:
    """Read a row of SafeSora-Eval or SafeSora-Prompt; its tags and source may be absent."""
    row.require("prompt_id", "prompt_text")
    return _prompt(row)


def video(row: Row, root: Path) -> VideoSample | None:
    """Read a row of SafeSora-Label; as there, its file is `<prompt_id>/<video_id>.mp4` under `root`."""
    row.require("prompt_id", "prompt_text", "video_id", "is_safe", "video_labels")
    return _video(row, root)


def pair(row: Row, root: Path) -> Pair | None:
    """Read a row of SafeSora: forced choices, so there is no tie; null is no label."""
    row.require("pair_id", "prompt_id", "prompt_text", "video_0", "video_1", "helpfulness", "harmlessness")
    pair_id, asked = row.text("pair_id"), _prompt(row)
    parts = row.inner("sub_preferences")
    for field in parts.values:
        if field not in _PARTS:
            raise parts.error(field, f"no such dimension, only {', '.join(_PARTS)}")
    first, second = (_video(_with_prompt_of(row, side), root) for side in ("video_0", "video_1"))
    if not (pair_id and asked and first and second):
        return None
    return Pair(
        pair_id=pair_id,
        prompt=asked,
        video_0=first,
        video_1=second,
        helpfulness=row.word("helpfulness", _BETTER),
        cost=row.word("harmlessness", _COSTLIER),
        instruction_following=parts.word("instruction_following", _BETTER),
        correctness=parts.word("correctness", _BETTER),
        informativeness=_informativeness(parts),
        aesthetics=parts.word("aesthetics", _BETTER),
    )


def _informativeness(parts: Row) -> Preference | None:
    """Read a dimension that SafeSora's files call `information` and its documents `informativeness`."""
    one, other = (parts.word(field, _BETTER) for field in ("information", "informativeness"))
    if one and other and one != other:
        raise parts.error("informativeness", "what `information`, its other spelling, says")
    return one or other


def _with_prompt_of(row: Row, side: str) -> Row:
    """Give a video of a pair with what it leaves unsaid of its prompt."""
    own = row.inner(side)
    said = {field: value for field, value in own.values.items() if value is not None}
    shared = {field: row.values[field] for field in _PROMPT_FIELDS if field in row.values}
    return Row(file=own.file, number=own.number, prefix=own.prefix, values=shared | said)


def _prompt(row: Row) -> Prompt | None:
    prompt_id, text = row.name("prompt_id"), row.text("prompt_text")
    tags = _tags(row, "prompt_labels")
    if not (prompt_id and text):
        return _incomplete(row, "prompt_labels", tags)
    return Prompt(
        prompt_id=prompt_id,
        text=text,
        type=row.word("prompt_type", _PROMPT_TYPES),
        tags=tags,
        source=row.text("source"),
        refined_from=row.text("refined_from"),
    )


def _video(row: Row, root: Path) -> VideoSample | None:
    asked, video_id = _prompt(row), row.name("video_id")
    row.path("video_path")  # refused where it climbs out of the folder; otherwise the ids say where the file is
    tags = _tags(row, "video_labels")
    if not (video_id and asked):
        return _incomplete(row, "video_labels", tags)
    return VideoSample(
        video_id=video_id,
        prompt=asked,
        path=Path(f"{root}/{asked.prompt_id}/{video_id}.mp4"),
        text=row.text("video_text"),
        is_safe=row.flag("is_safe"),
        tags=tags,
        generator=row.text("generated_from"),
    )


def _tags(row: Row, field: str) -> Tags:
    if row.values.get(field) is None:
        return UNTAGGED
    labels = row.inner(field)
    for tag in labels.values:
        if tag not in TAGS:
            raise labels.error(tag, f"no such tag, only {', '.join(TAGS)}")
    return Tags(**{tag: labels.flag(tag) for tag in labels.values})


def _incomplete(row: Row, field: str, tags: Tags) -> None:
    """Let a row without ids or prompt go, unless the exclusion of child abuse would go with it."""
    if tags.child_abuse:
        raise row.error(field, "no child_abuse on a row whose ids or prompt are null, for it could not be excluded")


# Reading VideoAlign -----------------------------------------------------------------------------------------


def votes(row: Row, root: Path) -> Pair | None:
    """Read a row of VideoAlign: A, B, same (a tie) or invalid (no label), by visual quality, motion and text.

    Visual quality (VQ) is read as aesthetics, motion quality (MQ) as correctness, text alignment (TA) as
    instruction following, and Overall as helpfulness; there is no cost. The paths, relative to `root`, are
    the ids of the videos, and the hash of the prompt is its id.
    """
    row.require("path_A", "path_B", "prompt")
    if not {"VQ", "MQ", "TA", "Overall"} & row.values.keys():
        row.require("Overall")
    text, paths = row.text("prompt"), [row.path("path_A"), row.path("path_B")]
    if not (text and all(paths)):
        return None
    asked = Prompt(prompt_id=hash_id(text), text=text)
    first, second = (
        VideoSample(video_id=path, prompt=asked, path=root / path, text=text, generator=row.text(model))
        for path, model in zip(filter(None, paths), ("A_model", "B_model"), strict=True)
    )
    return Pair(
        pair_id=hash_id([first.video_id, second.video_id, text]),
        prompt=asked,
        video_0=first,
        video_1=second,
        helpfulness=row.word("Overall", _VOTE),
        instruction_following=row.word("TA", _VOTE),
        correctness=row.word("MQ", _VOTE),
        aesthetics=row.word("VQ", _VOTE),
    )


def hash_id(content: object) -> str:
    """Give the SHA-256 of the content as JSON, the id that SafeSora gives a prompt text."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# Writing SafeSora -------------------------------------------------------------------------------------------


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """Write a SafeSora preference file, whose rows carry no tags.

    Raises: ValueError: a preference is a tie or a share of votes, which forced choices cannot say.
    """
    rows.write(path, map(_pair_row, pairs))


def write_videos(path: Path, videos: Iterable[VideoSample]) -> None:
    """Write a SafeSora-Label file."""
    rows.write(path, map(_video_row, videos))


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """Write a SafeSora-Eval file, whose rows carry tags but no source."""
    rows.write(path, map(_prompt_row, prompts))


def _prompt_row(prompt: Prompt) -> dict[str, object]:
    return _said(prompt) | {"prompt_labels": _labels(prompt.tags)}


def _said(prompt: Prompt) -> dict[str, object]:
    return {"prompt_id": prompt.prompt_id, "prompt_text": prompt.text, "prompt_type": prompt.type}


def _made(video: VideoSample) -> dict[str, object]:
    return {
        "video_id": video.video_id,
        "video_text": video.text,
        "video_path": f"videos/{video.prompt.prompt_id}/{video.video_id}.mp4",
        "is_safe": video.is_safe,
    }


def _video_row(video: VideoSample) -> dict[str, object]:
    labels = {"video_labels": _labels(video.tags), "generated_from": video.generator}
    return _prompt_row(video.prompt) | _made(video) | labels


def _video_in_pair(video: VideoSample) -> dict[str, object]:
    return _said(video.prompt) | _made(video) | {"generated_from": video.generator}


def _pair_row(pair: Pair) -> dict[str, object]:
    return {
        "pair_id": pair.pair_id,
        **_said(pair.prompt),
        "video_0": _video_in_pair(pair.video_0),
        "video_1": _video_in_pair(pair.video_1),
        "helpfulness": _choice(pair, pair.helpfulness, _BETTER),
        "harmlessness": _choice(pair, pair.cost, _COSTLIER),
        "sub_preferences": {
            "instruction_following": _choice(pair, pair.instruction_following, _BETTER),
            "correctness": _choice(pair, pair.correctness, _BETTER),
            "information": _choice(pair, pair.informativeness, _BETTER),
            "aesthetics": _choice(pair, pair.aesthetics, _BETTER),
        },
    }


def _choice(pair: Pair, preference: Preference | None, meanings: dict[str, Preference]) -> str | None:
    if preference is None:
        return None
    for word, meaning in meanings.items():
        if meaning == preference:
            return word
    raise ValueError(f"pair {pair.pair_id}: SafeSora knows one vote for one video, and cannot say {preference}")


def _labels(tags: Tags) -> dict[str, bool | None] | None:
    return None if tags == UNTAGGED else {tag: getattr(tags, tag) for tag in TAGS}
