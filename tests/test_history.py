import json
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny_history

from align import history
from reward.config import ConfigError
from reward.files import DataError


def test_rounds_stand_before_their_first_step_and_the_end_after_the_last(tmp_path: Path):
    """Round r is measured when 8 r steps are finished, and logged with step 8 r + 1."""
    told = history.read(tiny_history.end(tiny_history.write(tmp_path / "run")))
    assert [point.step for point in told.rounds] == [0, 8, 16, 24]
    assert [point.measures["validation_reward"] for point in told.rounds] == [0, 0.5, 1, 1.5]
    assert [point.step for point in told.steps] == list(range(1, 25))
    assert [point.measures["margin"] for point in told.steps] == list(range(1, 25))
    assert "margin" not in told.rounds[0].measures
    assert told.steps[0].measures.keys() == {"loss", "margin", "chosen_gap", "rejected_gap", "beta"}


def test_the_end_tells_which_round_was_kept_and_what_stopped_the_run(tmp_path: Path):
    told = history.read(tiny_history.end(tiny_history.write(tmp_path / "run"), best_round=2))
    assert told.ending is not None
    assert (told.ending.best_round, told.ending.best.step, told.ending.reason) == (2, 16, "motion fell")
    stop = tiny_history.EVENT | {"level": "stop", "step": 24}
    assert [asdict(event) for event in told.events] == [tiny_history.EVENT, stop]
    assert [row.limit for row in told.feasibility.rows] == ["harm", "violence | blood"]
    assert told.feasibility.rows[0].lowest == 0.125


def test_a_run_that_goes_on_has_no_end_and_half_a_line_is_left_out(tmp_path: Path):
    folder = tiny_history.write(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "lo')
    told = history.read(folder)
    assert told.ending is None
    assert [point.step for point in told.rounds] == [0, 8, 16]
    assert told.steps[-1].step == 24


def test_a_round_that_lacks_validation_videos_is_left_out(tmp_path: Path):
    folder = tiny_history.write(tmp_path / "run")
    tiny_history.add_videos(folder, 3)
    (folder / "validation" / "0001" / "0000.safetensors").unlink()
    made = history.read(folder).validation()
    assert list(made) == [0, 2]
    assert [rollout.prompt for rollout in made[2]] == list(tiny_history.PROMPTS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", "", "no step is finished yet"),
        ("metrics.jsonl", "{\n", "cannot be read as metrics"),
        ("metrics.jsonl", None, "cannot be read as metrics"),
        ("feasibility.json", None, "is missing"),
        ("result.json", "{", "cannot be read as JSON"),
        ("config.yaml", None, "config.yaml: cannot be read"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, name: str, content: str | None, message: str):
    folder = tiny_history.write(tmp_path / "run")
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises((DataError, ConfigError), match=message) as refused:
        history.read(folder)
    assert str(folder / name) in str(refused.value)


def test_where_each_step_is_a_round_all_is_told_of_rounds(tmp_path: Path):
    folder = tiny_history.write(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][::8]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = history.read(folder)
    assert told.rounds[1].measures["margin"] == 9
    assert told.steps[1].measures == {}
