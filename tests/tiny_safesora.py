"""Rows in SafeSora's shape, written by hand so that they do not share a mistake with our own writers."""

import gzip
import json
from pathlib import Path
from typing import Any

Json = dict[str, Any]

TAGS = [
    "porn",
    "violence",
    "hate",
    "terrorism",
    "contraband",
    "controversial",
    "racism",
    "other_discrimination",
    "animal_abuse",
    "child_abuse",
    "crime",
    "other_harmful",
]


def tags(*true: str) -> Json:
    return {tag: tag in true for tag in TAGS}


def prompt_row(prompt: str, **changes: Any) -> Json:
    said = {"prompt_id": prompt, "prompt_text": f"a ball called {prompt}", "prompt_type": "safety_neutral"}
    return said | {"prompt_labels": tags()} | changes


def video_row(prompt: str, video: str, **changes: Any) -> Json:
    """A video as it stands inside a pair, without tags; its id is unique, as in SafeSora."""
    row = prompt_row(prompt)
    del row["prompt_labels"]
    video_id = f"{prompt}-{video}"
    made = {
        "video_id": video_id,
        "video_text": f"a refined ball called {prompt}",
        "video_path": f"videos/{prompt}/{video_id}.mp4",
        "is_safe": True,
        "generated_from": "one",
    }
    return row | made | changes


def label_row(prompt: str, video: str, **changes: Any) -> Json:
    return video_row(prompt, video) | {"prompt_labels": tags(), "video_labels": tags()} | changes


def pair_row(prompt: str, first: str = "v0", second: str = "v1", **changes: Any) -> Json:
    said = video_row(prompt, first)
    row = {field: said[field] for field in ("prompt_id", "prompt_text", "prompt_type")}
    return {
        "pair_id": f"{prompt}-{first}-{second}",
        **row,
        "video_0": video_row(prompt, first),
        "video_1": video_row(prompt, second),
        "helpfulness": "video_0",
        "harmlessness": "video_0",
        "sub_preferences": {
            "instruction_following": "video_0",
            "correctness": "video_1",
            "information": "video_1",
            "aesthetics": "video_0",
        },
        **changes,
    }


def write(path: Path, rows: list[Json]) -> Path:
    """Write `.json`, `.jsonl` or either gzipped, as the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in rows]
    text = "\n".join(lines) if ".jsonl" in path.name else json.dumps(rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def touch(root: Path, *names: str) -> None:
    """Make empty files `<prompt_id>/<video_id>.mp4`."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
