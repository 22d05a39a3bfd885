from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reward import verdict_table
from reward.files import DataError
from reward.records import TAGS, Prompt, VideoSample
from reward.scores import SUB_DIMENSIONS
from reward.verdicts import FileVerdict

PROMPT = Prompt(prompt_id="p", text="a red circle")
VIDEOS = [VideoSample(video_id=f"v{i}", prompt=PROMPT, path=Path(f"videos/v{i}.mp4")) for i in range(10)]


def verdict(sample: VideoSample) -> FileVerdict:
    """Video i has reward i, cost i - 5 and tags i / 100; the fourth cannot be judged."""
    number = int(sample.video_id[1:])
    if number == 3:
        return FileVerdict(file=str(sample.path), error="damaged")
    return FileVerdict(
        file=str(sample.path),
        unsafe=number > 5,
        reward=float(number),
        parts=dict.fromkeys(SUB_DIMENSIONS, 0.5),
        cost=number - 5.0,
        spread={"reward": 0.0, "cost": None},
        tags=dict.fromkeys(TAGS, number / 100) | {"child_abuse": None},
        rules={"flash": "pass"},
        rule_costs={"flash": -1.0},
    )


def write(
    out: Path,
    videos: list[VideoSample] = VIDEOS,
    judge: Callable[[VideoSample], FileVerdict] = verdict,
    *,
    judge_sha256: str = "one",
    chunk_size: int = 4,
) -> pa.Table:
    return verdict_table.write(out, videos, judge, judge_sha256=judge_sha256, rules=["flash"], chunk_size=chunk_size)


class Killed(BaseException):
    """Ends a job as a signal would."""


def judge_until(number: int, seen: list[str]) -> Callable[[VideoSample], FileVerdict]:
    """A judge that writes down what it sees, and is killed at its video of this number."""

    def judge(sample: VideoSample) -> FileVerdict:
        if len(seen) == number:
            raise Killed
        seen.append(sample.video_id)
        return verdict(sample)

    return judge


# What it holds ----------------------------------------------------------------------------------------------


def test_a_row_a_video_in_order(tmp_path: Path):
    table = write(tmp_path / "scores.parquet")
    assert table.equals(pq.read_table(tmp_path / "scores.parquet"))
    assert table["video_id"].to_pylist() == [f"v{i}" for i in range(10)]
    assert table["reward"].to_pylist() == [None if i == 3 else float(i) for i in range(10)]
    assert table["unsafe"].to_pylist() == [i == 3 or i > 5 for i in range(10)]
    assert table["error"].to_pylist() == [None] * 3 + ["damaged"] + [None] * 6
    assert table["tags.crime"].to_pylist()[2:5] == [0.02, None, 0.04]
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]


def test_columns_have_their_types_where_all_is_null(tmp_path: Path):
    of_one = [VIDEOS[3]]
    whole = write(tmp_path / "whole.parquet").schema.remove_metadata()
    assert write(tmp_path / "one.parquet", of_one).schema.remove_metadata() == whole
    names = ["prompt_id", "video_id", "file", "error", "unsafe", "reward"]
    names += [f"parts.{name}" for name in SUB_DIMENSIONS] + ["cost", "spread.reward", "spread.cost"]
    assert whole.names == [*names, *(f"tags.{name}" for name in TAGS), "rules.flash", "rule_costs.flash"]


def test_without_rules_there_are_no_columns_of_them(tmp_path: Path):
    table = verdict_table.write(
        tmp_path / "scores.parquet", VIDEOS[3:4], verdict, judge_sha256="one", rules=[], chunk_size=4
    )
    assert not [name for name in table.column_names if name.startswith("rule")]


# Going on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed_at", range(10))
def test_a_job_that_was_killed_goes_on_and_ends_in_the_same_bytes(killed_at: int, tmp_path: Path):
    """Parts of 4: what was killed at video k has k // 4 * 4 of 10 behind it."""
    write(tmp_path / "straight.parquet")
    out, seen, again = tmp_path / "scores.parquet", [], []
    with pytest.raises(Killed):
        write(out, judge=judge_until(killed_at, seen))
    assert not out.exists()
    write(out, judge=judge_until(99, again))
    assert again == [f"v{i}" for i in range(killed_at // 4 * 4, 10)]
    assert out.read_bytes() == (tmp_path / "straight.parquet").read_bytes()


def test_a_finished_job_judges_nothing(tmp_path: Path):
    first = write(tmp_path / "scores.parquet")
    (tmp_path / "scores.parquet.parts").mkdir()  # of a process that was killed at its end
    assert write(tmp_path / "scores.parquet", judge=judge_until(0, []), chunk_size=3).equals(first)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]


def test_the_folder_is_made(tmp_path: Path):
    assert len(write(tmp_path / "new" / "scores.parquet")) == 10


def changed(**changes: object) -> list[VideoSample]:
    fields = {"video_id": "v0", "prompt": PROMPT, "path": Path("videos/v0.mp4"), **changes}
    return [VideoSample(**fields), *VIDEOS[1:]]  # ty: ignore[invalid-argument-type]


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize(
    ("videos", "judge_sha256", "what"),
    [
        (VIDEOS, "two", "judge"),
        (VIDEOS[:9], "one", "videos"),
        (VIDEOS[::-1], "one", "videos"),
        (changed(prompt=Prompt(prompt_id="p", text="a blue circle")), "one", "videos"),
        (changed(path=Path("other/v0.mp4")), "one", "videos"),
    ],
)
def test_another_job_does_not_go_on_with_it(
    is_finished: bool, videos: list[VideoSample], judge_sha256: str, what: str, tmp_path: Path
):
    out = tmp_path / "scores.parquet"
    if is_finished:
        write(out)
    else:
        with pytest.raises(Killed):
            write(out, judge=judge_until(8, []))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}
    with pytest.raises(DataError, match=f"was made with another {what}"):
        write(out, videos, judge_sha256=judge_sha256)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")} == before


def test_a_file_that_is_no_table_of_ours_is_refused(tmp_path: Path):
    out = tmp_path / "scores.parquet"
    out.write_bytes(b"not Parquet")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        write(out)
    pq.write_table(pa.table({"reward": [1.0]}), out)
    with pytest.raises(DataError, match="another judge"):
        write(out)


def test_no_video_is_no_table(tmp_path: Path):
    with pytest.raises(DataError, match="no video"):
        write(tmp_path / "scores.parquet", [])
