"""The verdicts on a preference data set: a Parquet file with a row for each video, written part by part.

    OUT          `prompt_id`, `video_id`, and `FileVerdict` with its mappings spread out: `tags.porn`, `tags.violence`
    OUT.parts/   what is finished, until all is; the same job goes on from there

Each file carries the hashes of the judge and of the list of videos, so that no other job goes on with it.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from reward.files import DataError, replacing
from reward.records import TAGS, VideoSample
from reward.scores import SUB_DIMENSIONS
from reward.verdicts import FileVerdict


def write(
    out: Path,
    videos: Sequence[VideoSample],
    judge: Callable[[VideoSample], FileVerdict],
    *,
    judge_sha256: str,
    rules: Sequence[str],
    chunk_size: int,
) -> pa.Table:
    """Judge videos into a table, in their order, with a progress bar; give the table.

    Args:
        out: the table; if it is there and of this job, it is given as it is.
        videos: what to judge.
        judge: gives the verdict on one video.
        judge_sha256: tells judges apart.
        rules: names of the rules that the verdicts speak of.
        chunk_size: number of videos in a part, which are lost together if the process is killed.

    Raises: DataError: no video; `out` or a part is by another judge, about other videos, or damaged.
    """
    if not videos:
        raise DataError(f"{out}: there is no video to judge")
    made_by = {"judge": judge_sha256, "videos": _hash_videos(videos)}
    if not _is_done(out, made_by):
        parts = _write_parts(out.with_name(f"{out.name}.parts"), videos, judge, made_by, rules, chunk_size)
        _write(out, pa.concat_tables([pq.read_table(part) for part in parts]), made_by)
    shutil.rmtree(out.with_name(f"{out.name}.parts"), ignore_errors=True)
    return pq.read_table(out)


def _hash_videos(videos: Sequence[VideoSample]) -> str:
    listing = [[video.prompt.prompt_id, video.video_id, video.prompt.text, str(video.path)] for video in videos]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _write_parts(
    folder: Path,
    videos: Sequence[VideoSample],
    judge: Callable[[VideoSample], FileVerdict],
    made_by: Mapping[str, str],
    rules: Sequence[str],
    chunk_size: int,
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        folder / f"{i:08d}-{chunk_size}.parquet": videos[i : i + chunk_size] for i in range(0, len(videos), chunk_size)
    }
    missing = {part: chunk for part, chunk in parts.items() if not _is_done(part, made_by)}
    num_done = len(videos) - sum(map(len, missing.values()))
    with tqdm(total=len(videos), initial=num_done, desc="judging", unit="video") as bar:
        for part, chunk in missing.items():
            rows = []
            for video in chunk:
                rows.append({"prompt_id": video.prompt.prompt_id, "video_id": video.video_id, **asdict(judge(video))})
                bar.update()
            _write(part, pa.Table.from_pylist(rows, schema=_schema(rules)).flatten(), made_by)
    return list(parts)


def _schema(rules: Sequence[str]) -> pa.Schema:
    text, number = pa.string(), pa.float64()
    return pa.schema(
        {
            "prompt_id": text,
            "video_id": text,
            "file": text,
            "error": text,
            "unsafe": pa.bool_(),
            "reward": number,
            "parts": pa.struct(dict.fromkeys(SUB_DIMENSIONS, number)),
            "cost": number,
            "spread": pa.struct({"reward": number, "cost": number}),
            "tags": pa.struct(dict.fromkeys(TAGS, number)),
            "rules": pa.struct(dict.fromkeys(rules, text)),
            "rule_costs": pa.struct(dict.fromkeys(rules, number)),
        }
    )


def _write(path: Path, table: pa.Table, made_by: Mapping[str, str]) -> None:
    with replacing(path) as new:
        pq.write_table(table.replace_schema_metadata(dict(made_by)), new)


def _is_done(path: Path, made_by: Mapping[str, str]) -> bool:
    """Whether a file of this job is there.

    Raises: DataError: it is of another job, or damaged.
    """
    if not path.exists():
        return False
    try:
        found = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}; remove it") from error
    for what, expected in made_by.items():
        if found.get(what.encode()) != expected.encode():
            raise DataError(f"{path}: was made with another {what}; remove it, or name another file")
    return True
