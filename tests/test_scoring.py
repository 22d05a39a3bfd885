import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.folder import fingerprint
from align.scoring import NOT_ASKED, Gold, Judges, Look
from reward.files import DataError
from reward.judge import Judge
from reward.records import Prompt, VideoSample
from reward.rules import Flash
from reward.video import Video
from tests.tiny_judge import flashing, refill, still, write_run, write_video

FLASH = Judges(model=None, rules=(Flash(),))

# Judges -----------------------------------------------------------------------------------------------------


@pytest.fixture
def videos(tmp_path: Path) -> list[VideoSample]:
    """A still video, a flashing one, and a file that is none."""
    paths = [write_video(tmp_path / "a.mp4", still()), write_video(tmp_path / "b.mp4", flashing()), tmp_path / "c.mp4"]
    paths[2].write_text("no video")
    prompt = Prompt(prompt_id="p", text="a red circle")
    return [VideoSample(video_id=fingerprint(path), prompt=prompt, path=path) for path in paths]


def test_rules_alone_can_judge(videos: list[VideoSample], tmp_path: Path):
    calm, strobe, broken = FLASH.ask(videos, tmp_path / "verdicts", "base", chunk_size=2)
    assert (calm.unsafe, strobe.unsafe, broken.unsafe) == (False, True, True)
    assert (calm.error, strobe.scores["judge.unsafe"], strobe.scores["reward"]) == (None, 1.0, None)
    cost = strobe.scores["rule_costs.flash"]
    assert cost is not None
    assert cost > 0
    assert "c.mp4" in (broken.error or "")


def test_a_trained_judge_scores_what_it_was_trained_on(videos: list[VideoSample], tmp_path: Path):
    model = Judge.load(refill(write_run(tmp_path), cost=-1.0))
    said = Judges(model=model, rules=(Flash(),)).ask(videos[:2], tmp_path / "verdicts", "base", chunk_size=2)
    assert [(each.unsafe, each.scores["cost"]) for each in said] == [(False, -1.0), (True, -1.0)]
    assert {"reward", "parts.correctness", "tags.crime", "spread.cost", "rule_costs.flash"} <= said[0].scores.keys()
    assert "rules.flash" not in said[0].scores


def test_nobody_is_asked_twice_about_the_same_videos(videos: list[VideoSample], tmp_path: Path):
    first = FLASH.ask(videos, tmp_path / "verdicts", "base", chunk_size=2)
    for sample in videos:
        sample.path.unlink()
    assert FLASH.ask(videos, tmp_path / "verdicts", "base", chunk_size=2) == first
    assert FLASH.ask(videos[:1], tmp_path / "verdicts", "base", chunk_size=2)[0].error is not None


def test_without_a_judge_nothing_is_said(videos: list[VideoSample], tmp_path: Path):
    assert Judges(model=None, rules=()).ask(videos, tmp_path / "verdicts", "base", chunk_size=2) == [NOT_ASKED] * 3


# Gold -------------------------------------------------------------------------------------------------------

ROW = {"file": "a.mp4", "sha256": "abc", "unsafe": True, "helpfulness": 0.5, "kept": None, "note": "by hand"}


def written(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_gold_of_json_lines_and_parquet(tmp_path: Path):
    lines = [ROW, {**ROW, "file": "b.mp4", "unsafe": None, "error": "torn"}]
    pq.write_table(pa.Table.from_pylist([{"error": None, **line} for line in lines]), tmp_path / "gold.parquet")
    for path in (written(tmp_path / "gold.jsonl", *lines), tmp_path / "gold.parquet"):
        gold = Gold.read(path)
        assert gold.of("a.mp4", "abc").scores == {"gold.unsafe": 1.0, "gold.helpfulness": 0.5}
        assert (gold.of("a.mp4", "abc").unsafe, gold.of("a.mp4", "abc").error) == (True, None)
        assert (gold.of("b.mp4", "abc").unsafe, gold.of("b.mp4", "abc").error) == (None, "torn")


def test_gold_that_lacks_a_video_or_is_of_another(tmp_path: Path):
    gold = Gold.read(written(tmp_path / "gold.jsonl", ROW))
    assert gold.of("b.mp4", "abc").error == f"{tmp_path / 'gold.jsonl'}: does not hold it"
    with pytest.raises(DataError, match=r"a\.mp4 has changed since it was measured; measure it again"):
        gold.of("a.mp4", "abd")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([ROW, ROW], "row 2, file: expected a file that stands once"),
        ([{**ROW, "sha256": None}], "row 1, file"),
        ([{**ROW, "unsafe": 1}], "row 1, unsafe: expected true, false or null"),
        ([{**ROW, "helpfulness": float("nan")}], "row 1, helpfulness: expected a finite number or null, got nan"),
    ],
)
def test_gold_that_cannot_be_used_is_named(tmp_path: Path, lines: list[dict[str, Any]], message: str):
    with pytest.raises(DataError, match=message):
        Gold.read(written(tmp_path / "gold.jsonl", *lines))


def test_gold_that_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "gold.parquet").write_text("no table")
    for name in ("gold.parquet", "absent.parquet", "absent.jsonl"):
        with pytest.raises(DataError, match=name):
            Gold.read(tmp_path / name)


# Pixels -----------------------------------------------------------------------------------------------------


def moving(step: int) -> Video:
    """A white square of 20 pixels that moves by so many pixels a frame."""
    frames = np.zeros((8, 64, 64, 3), dtype=np.uint8)
    for index, frame in enumerate(frames):
        frame[20:40, 10 + step * index : 30 + step * index] = 255
    return Video(frames=frames, fps=16.0)


def noise() -> Video:
    return Video(frames=np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8), fps=16.0)


@pytest.mark.parametrize(
    ("own", "reference", "expected"),
    [
        (moving(2), moving(2), 0.0),
        (moving(0), moving(2), 1.0),
        (moving(0), moving(0), 0.0),
        (still(), still(), 1.0),
        (noise(), noise(), 1.0),
    ],
    ids=["moves", "frozen", "asked to stand still", "blank", "noise"],
)
def test_what_is_degenerate(tmp_path: Path, own: Video, reference: Video, expected: float):
    ours, theirs = (Look.at(write_video(tmp_path / f"{i}.mp4", made)) for i, made in enumerate((own, reference)))
    said = ours.beside(theirs)
    assert (said.scores["degenerate"], said.error) == (expected, None)


@pytest.mark.parametrize(
    ("own", "is_still", "expected"),
    [
        (moving(0), True, 0.0),
        (moving(0), False, 1.0),
        (moving(2), False, 0.0),
        (still(), True, 1.0),
        (noise(), True, 1.0),
    ],
    ids=["stands still, as asked", "frozen", "moves, as asked", "blank all the same", "noise all the same"],
)
@pytest.mark.parametrize("reference", [moving(0), moving(2)], ids=["still", "moving"])
def test_gold_knows_what_is_to_stand_still(
    tmp_path: Path, own: Video, reference: Video, is_still: bool, expected: float
):
    ours, theirs = (Look.at(write_video(tmp_path / f"{i}.mp4", made)) for i, made in enumerate((own, reference)))
    assert ours.beside(theirs, is_still=is_still).scores["degenerate"] == expected


def test_flashes_hide_motion(tmp_path: Path):
    """Eight changes a second between black and white are no motion, and no measure of it."""
    frames = np.zeros((16, 64, 64, 3), dtype=np.uint8)
    frames[::4] = frames[1::4] = 255
    strobe = Look.at(write_video(tmp_path / "a.mp4", Video(frames=frames, fps=16.0)))
    assert strobe.flashes
    assert strobe.motion is not None
    assert strobe.beside(strobe).scores["motion"] is None
    calm = Look.at(tmp_path / "a.mp4", flashes=False)
    assert calm.beside(strobe).scores["motion"] == strobe.motion


def test_frozen_beside_what_cannot_be_seen_is_degenerate(tmp_path: Path):
    lost = Look.at(tmp_path / "absent.mp4")
    frozen = Look.at(write_video(tmp_path / "a.mp4", moving(0)))
    assert frozen.beside(lost).scores["degenerate"] == 1.0
    assert "absent.mp4" in (lost.beside(frozen).error or "")
