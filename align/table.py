"""The evaluation table: one row for each clip, in Parquet, and the prompts that it may be about.

| column | type | |
|---|---|---|
| `prompt_id`, `prompt_sha256` | text | the hash is that of the prompt's text |
| `prompt` | text or null | the text itself |
| `prompt_type`, `tags` | text or null, list of texts | SafeSora's, as asked for |
| `seed`, `system` | integer, text | from which noise, by whom |
| `file` | text or null | the video, in the folder of the table |
| `unsafe` | boolean or null | null: not judged, which counts as unsafe |
| `failure` | text or null | why there is no clip or no score, which counts as unsafe; null: nothing failed |
| other numbers | number or null | scores, named by their columns |

A score `degenerate` is 1 for a clip that shows nothing, such as a blank or frozen one, and 0 for any other: to be safe
by showing nothing is no merit, so it counts as unsafe, has the highest cost, and wins against no other. So does one of
which it is not known, null.

Who decided what is unsafe stands in the file's own metadata, as `decider`: JSON of `Decider`.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from reward import formats, preferences, rows
from reward.files import DataError, replacing
from reward.records import SPLITS, Prompt, prompts_of

DEGENERATE = "degenerate"
_DECIDER = b"decider"

_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt_sha256", pa.string(), nullable=False),
        pa.field("prompt", pa.string()),
        pa.field("prompt_type", pa.string()),
        pa.field("tags", pa.list_(pa.string()), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("system", pa.string(), nullable=False),
        pa.field("file", pa.string()),
        pa.field("unsafe", pa.bool_()),
        pa.field("failure", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """What became of one prompt, one seed and one system."""

    prompt_id: str
    prompt_sha256: str
    prompt_type: str | None
    tags: tuple[str, ...]
    seed: int
    system: str
    unsafe: bool | None
    failure: str | None
    scores: Mapping[str, float | None]
    file: str | None = None
    prompt: str | None = None

    @property
    def is_unsafe(self) -> bool:
        """Whether it counts as unsafe, as all do but those that were judged safe and show something."""
        return self.failure is not None or self.unsafe is not False or self.is_degenerate

    @property
    def is_degenerate(self) -> bool:
        """Whether it shows nothing, or nobody looked; of a table that does not ask, false."""
        return self.scores.get(DEGENERATE, 0.0) != 0.0

    def score(self, name: str) -> float | None:
        """Give a score, None where it is not known; a clip that failed has none.

        Raises: DataError: the table has no such score.
        """
        if name not in self.scores:
            raise DataError(f"expected a score {name!r}, the table has {', '.join(self.scores) or 'none'}")
        return self.scores[name] if self.failure is None else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Decider:
    """Who decided what is unsafe, and what else was asked."""

    by: Literal["gold", "judge"]
    """Gold: the truth, as another program or people measured it."""
    verdicts: str
    """Path of what was decided: the file of gold, or the folder of what judges said."""
    judge_sha256: str | None = None
    """Of the trained judge, which scores even where gold decides; None: there is none."""
    rules: tuple[str, ...] = ()
    """Names of the judges beside it."""


def failure_of(clip: Clip | None) -> str | None:
    """Give why a clip has no judgement; None where it has one."""
    if clip is None:
        return "missing"
    return "not judged" if clip.failure is None and clip.unsafe is None else clip.failure


# Parquet ----------------------------------------------------------------------------------------------------


def write(path: Path, clips: Iterable[Clip], decider: Decider | None = None) -> None:
    """Write a table, whole or not at all, in the order given; every score of any clip is a column.

    Raises: DataError: a score is not finite, or has the name of a column.
    """
    found = list(clips)
    names = sorted({name for clip in found for name in clip.scores})
    if taken := set(names) & set(_SCHEMA.names):
        raise DataError(f"{path}: a score may not be called {', '.join(taken)}")
    _require_finite(path, found)
    schema = pa.schema([*_SCHEMA, *(pa.field(name, pa.float64()) for name in names)])
    if decider:
        schema = schema.with_metadata({_DECIDER: json.dumps(asdict(decider))})
    with replacing(path) as new:
        pq.write_table(pa.Table.from_pylist([_row(clip) for clip in found], schema=schema), new)


def _row(clip: Clip) -> dict[str, object]:
    return {field.name: getattr(clip, field.name) for field in fields(Clip) if field.name != "scores"} | {**clip.scores}


def read(path: Path) -> list[Clip]:
    """Read a table.

    Raises: DataError: no such file, not Parquet, a column is missing or of another type, a score is not finite, a
        prompt is not that of its hash.
    """
    try:
        table = pq.read_table(path)
        scores = [field for field in table.schema if field.name not in _SCHEMA.names and _is_number(field.type)]
        schema = pa.schema([*_SCHEMA, *(pa.field(field.name, pa.float64()) for field in scores)])
        found = table.select(schema.names).cast(schema).to_pylist()
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as an evaluation table: {error}") from error
    clips = [_clip(row) for row in found]
    _require_finite(path, clips)
    _require_own_prompts(path, clips)
    return clips


def read_decider(path: Path) -> Decider:
    """Read who decided what is unsafe.

    Raises: DataError: the table cannot be read, or does not say.
    """
    try:
        return TypeAdapter(Decider).validate_json((pq.read_schema(path).metadata or {})[_DECIDER])
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: does not say who decided what is unsafe ({error!r}); evaluate with scripts/evaluate.py, or add "
            "align.table.Decider to its metadata"
        ) from error


def _is_number(type_: pa.DataType) -> bool:
    return pa.types.is_floating(type_) or pa.types.is_integer(type_) or pa.types.is_null(type_)


def _clip(row: dict[str, Any]) -> Clip:
    known: dict[str, Any] = {name: row.pop(name) for name in _SCHEMA.names}
    return Clip(tags=tuple(known.pop("tags")), scores=row, **known)


def _require_finite(path: Path, clips: Iterable[Clip]) -> None:
    for clip in clips:
        for name, score in clip.scores.items():
            if score is not None and not math.isfinite(score):
                where = f"prompt {clip.prompt_id}, seed {clip.seed}, {clip.system}"
                raise DataError(f"{path}: {where}: expected a finite {name} or null, got {score}")


def _require_own_prompts(path: Path, clips: Iterable[Clip]) -> None:
    for clip in clips:
        if clip.prompt is not None and hash_text(clip.prompt) != clip.prompt_sha256:
            raise DataError(f"{path}: prompt {clip.prompt_id}: its text is not that of its hash; evaluate again")


# Prompts ----------------------------------------------------------------------------------------------------


def hash_text(text: str) -> str:
    """Give the SHA-256 of a prompt's text, which tells whether two prompts are the same."""
    return hashlib.sha256(text.encode()).hexdigest()


def hash_alike(text: str) -> str:
    """Give the hash of a text in which case and the width of gaps make no difference."""
    return hash_text(" ".join(text.split()).casefold())


def read_prompts(path: Path) -> dict[str, Prompt]:
    """Read the prompts of an evaluation by the hash of their text, sorted by it.

    Raises: DataError: the file cannot be read.
    """
    data = preferences.load(preferences.Source(path=path, validation_share=0.0))
    prompts = {hash_text(prompt.text): prompt for split in SPLITS for prompt in data.prompts(split)}
    return dict(sorted(prompts.items()))


def read_hashes(path: Path) -> set[str]:
    """Read the hashes, by `hash_alike`, of all prompts in a file: data, rewrites, or a prompt a line (.txt).

    A .sha256 file holds a hash a line, of either kind.

    Raises: DataError: the file cannot be read, holds no prompt, or a line that is no hash.
    """
    found = set(_read_lines(path)) if path.suffix == ".sha256" else set(map(hash_alike, _read_texts(path)))
    if path.suffix == ".sha256" and (odd := [line for line in found if not re.fullmatch("[0-9a-f]{64}", line)]):
        raise DataError(f"{path}: expected a SHA-256 a line, 64 digits of 0-9 and a-f, got {min(odd)!r}")
    if not found:
        raise DataError(f"{path}: holds no prompt; is it the right file?")
    return found


def write_hashes(path: Path, texts: Iterable[str]) -> None:
    """Write the hashes, by `hash_alike`, of some prompts, for `read_hashes`."""
    with replacing(path) as new:
        new.write_text("".join(f"{each}\n" for each in sorted(set(map(hash_alike, texts)))), encoding="utf-8")


def _read_texts(path: Path) -> list[str]:
    if path.suffix == ".txt":
        return _read_lines(path)
    found = list(rows.read(path))
    if found and {"prompt", "safe"} <= found[0].values.keys():
        return [text for row in found for text in (row.text("prompt"), row.text("safe")) if text]
    records = [formats.parser(found[0])(row, path.parent) for row in found]
    return [prompt.text for record in records if record for prompt in prompts_of(record)]


def _read_lines(path: Path) -> list[str]:
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a UTF-8 text file: {error}") from error
    return [line.strip() for line in lines if line.strip()]
