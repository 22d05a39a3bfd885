import json
import math
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from reward.config import ConfigError
from reward.judge import Judge
from reward.measures import Detection, NotMeasured
from reward.metrics import Confusion
from reward.records import TAGS
from reward.verdicts import FileVerdict
from scripts import moderate
from scripts.moderate import ModerateConfig, reasons
from tests.test_page import evaluation
from tests.tiny_judge import flashing, refill, still, write_run, write_video

TAGGED = {**dict.fromkeys(TAGS, 0.1), "child_abuse": None}
HIGHEST = {tag: 0.5 for tag in TAGS if tag != "child_abuse"}
HARMLESS = FileVerdict(file="clip.mp4", unsafe=False, cost=-1.0, tags=TAGGED, rules={"flash": "pass"})


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (HARMLESS, []),
        (replace(HARMLESS, unsafe=True), ["unsafe"]),
        (replace(HARMLESS, cost=None), ["unsafe"]),
        (replace(HARMLESS, tags=TAGGED | {"porn": 0.5, "crime": 0.51}), ["crime"]),
        (replace(HARMLESS, tags=TAGGED | {"porn": 0.9}, unsafe=True), ["unsafe", "porn"]),
        (replace(HARMLESS, file="good.mp4\nbad.mp4"), ["name"]),
        (replace(HARMLESS, tags=TAGGED | {"crime": None}), ["crime"]),
        (FileVerdict(file="clip.mp4", error="damaged"), ["unsafe"]),
    ],
)
def test_reasons(found: FileVerdict, expected: list[str]):
    assert reasons(found, 0.0, HIGHEST) == expected


def test_thresholds_can_be_stricter():
    assert reasons(replace(HARMLESS, cost=-0.4), -0.5, HIGHEST) == ["unsafe"]
    assert reasons(replace(HARMLESS, cost=-0.5), -0.5, HIGHEST) == []
    assert reasons(HARMLESS, 0.0, HIGHEST | {"crime": 0.05}) == ["crime"]


def at(threshold: float | NotMeasured) -> Detection:
    detection = evaluation().harm["crime"]
    assert isinstance(detection, Detection)
    if isinstance(threshold, NotMeasured):
        return replace(detection, high_recall=threshold)
    assert isinstance(detection.high_recall, Confusion)
    return replace(detection, high_recall=replace(detection.high_recall, threshold=threshold))


def evaluated(run: Path, crime: Detection | NotMeasured | None, *, sha256: str | None = None) -> Path:
    """A run whose evaluation gives each harm that it was trained to tell a threshold of .3; of crime, what is given."""
    judge = Judge.load(run)
    found = {name: crime if name == "crime" else at(0.3) for name in judge.calibration.trained if name in TAGS}
    harm = {name: detection for name, detection in found.items() if detection is not None}
    record = replace(evaluation(), judge_sha256=sha256 or judge.sha256, harm=harm)
    (run / "evaluation.json").write_text(json.dumps(asdict(record)))
    return run


@pytest.mark.parametrize("threshold", [0.7, 1.0, 0.0])
def test_each_harm_counts_from_the_threshold_of_its_recall_on(
    tmp_path: Path, threshold: float, capsys: pytest.CaptureFixture[str]
):
    run = evaluated(write_run(tmp_path), at(threshold))
    highest = moderate.highest_kept(ModerateConfig(paths=(run, run)), Judge.load(run))
    assert highest["crime"] == np.nextafter(threshold, -1)
    assert f"crime: shown from {threshold:g} on; against the labels" in capsys.readouterr().err
    assert highest["porn"] == np.nextafter(0.3, 0)
    for probability, expected in ((threshold, ["crime"]), (np.nextafter(threshold, -1), [])):
        found = replace(HARMLESS, tags=dict.fromkeys(TAGS, 0.1) | {"crime": probability})
        assert reasons(found, 0.0, highest) == expected


NONE = NotMeasured(not_measured="no label")


@pytest.mark.parametrize(
    ("crime", "told"),
    [
        (NONE, "harm.crime has no threshold: no label; or give max_tag"),
        (at(NONE), "harm.crime has no threshold: no label; or give max_tag"),
        (None, "harm.crime has no threshold: the file does not name it; or give max_tag"),
        (at(math.nan), "harm.crime: expected a threshold in [0, 1], got nan; or give max_tag"),
        (at(1.5), "harm.crime: expected a threshold in [0, 1], got 1.5; or give max_tag"),
    ],
)
def test_a_harm_without_a_threshold_is_named(tmp_path: Path, crime: Detection | NotMeasured | None, told: str):
    run = evaluated(write_run(tmp_path), crime)
    with pytest.raises(ConfigError, match=re.escape(told)):
        moderate.highest_kept(ModerateConfig(paths=(run, run)), Judge.load(run))


@pytest.mark.parametrize(
    ("sha256", "told"), [(None, "evaluate RUN makes it; or give max_tag"), ("other", "is about another judge")]
)
def test_without_an_evaluation_of_this_judge_nothing_is_judged(
    tmp_path: Path, sha256: str | None, told: str, capsys: pytest.CaptureFixture[str]
):
    run, kept = write_run(tmp_path), tmp_path / "kept.txt"
    if sha256:
        evaluated(run, at(0.3), sha256=sha256)
    write_video(tmp_path / "videos/a.mp4", still())
    command = [str(run), str(tmp_path / "videos"), f"report={tmp_path / 'report.jsonl'}", f"kept={kept}"]
    assert moderate.main(command) == 2
    assert told in capsys.readouterr().err.replace(str(run), "RUN")
    assert not kept.exists()


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_damaged_evaluation_ends_with_one_line(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path)
    (run / "evaluation.json").write_text(content)
    (tmp_path / "videos").mkdir()
    assert (
        moderate.main([str(run), str(tmp_path / "videos"), f"report={tmp_path / 'r'}", f"kept={tmp_path / 'k'}"]) == 2
    )
    assert "evaluation.json: cannot be read as Evaluation" in capsys.readouterr().err


def test_by_default_thresholds_are_those_of_the_evaluation(tmp_path: Path):
    """The random judge says of each harm something between 0 and 1: from 0 on it is shown, from 1 on it is not."""
    for crime, expected in ((0.0, ["crime"]), (1.0, [])):
        home = tmp_path / str(crime)
        run = evaluated(refill(write_run(home), cost=-1.0), at(crime))
        write_video(home / "videos/a.mp4", still())
        report = home / "report.jsonl"
        assert moderate.main([str(run), str(home / "videos"), f"report={report}", f"kept={home / 'kept.txt'}"]) == 0
        (line,) = map(json.loads, report.read_text().splitlines())
        assert [reason for reason in line["reasons"] if reason == "crime"] == expected


def test_a_folder_in_and_two_lists_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, folder = refill(write_run(tmp_path), cost=-1.0), tmp_path / "videos"
    kept = [write_video(folder / name, still()) for name in ("a.mp4", "more/b.mp4")]
    write_video(folder / "c.mp4", flashing())
    (folder / "d.txt").write_text("no video")
    shutil.copy(kept[0], folder / ".hidden.mp4")
    command = [str(run), str(folder), f"report={tmp_path / 'report.jsonl'}", f"kept={tmp_path / 'kept.txt'}"]
    assert moderate.main([*command, "max_tag=1"]) == 1
    said = capsys.readouterr()
    assert said.out == "4 files, 1 not judged, 2 kept\n"
    assert f"not looked for, as {run} was not trained to tell: child_abuse" in said.err
    assert (tmp_path / "kept.txt").read_text().splitlines() == list(map(str, kept))
    lines = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    found = {Path(line["file"]).name: line["reasons"] for line in lines}
    assert found == {"a.mp4": [], "c.mp4": ["unsafe"], "d.txt": ["unsafe"], "b.mp4": []}
    (folder / "d.txt").unlink()
    assert moderate.main([*command, "max_tag=0"]) == 0
    assert (tmp_path / "kept.txt").read_text() == ""


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        moderate.main([str(tmp_path), str(tmp_path / "none")])
    assert "not point to a directory" in capsys.readouterr().err


def test_a_run_that_cannot_be_used_ends_with_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """No run at all; and one whose encoder was cut off while it was copied."""
    folder, outputs = tmp_path / "videos", [f"report={tmp_path / 'report.jsonl'}", f"kept={tmp_path / 'kept.txt'}"]
    write_video(folder / "a.mp4", still())
    run, weights = write_run(tmp_path), tmp_path / "clip/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    capsys.readouterr()  # what making the run said
    for bad, problem in ((folder, "calibration.json"), (run, "clip")):
        assert moderate.main([str(bad), str(folder), *outputs]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert said[0].startswith("python scripts/moderate.py: ")
        assert problem in said[0]
    assert not (tmp_path / "report.jsonl").exists()
    assert not (tmp_path / "kept.txt").exists()


def test_outputs_without_a_folder_end_with_one_line_before_anything_is_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "videos").mkdir()
    command = [str(write_run(tmp_path)), str(tmp_path / "videos"), f"report={tmp_path / 'none/report.jsonl'}"]
    assert moderate.main(command) == 2
    assert "none/report.jsonl: its folder does not exist" in capsys.readouterr().err
