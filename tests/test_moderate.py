import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from reward.records import TAGS
from reward.verdicts import FileVerdict
from scripts import moderate
from scripts.moderate import ModerateConfig, reasons
from tests.tiny_judge import flashing, refill, still, write_run, write_video

TAGGED = {**dict.fromkeys(TAGS, 0.1), "child_abuse": None}
HARMLESS = FileVerdict(file="clip.mp4", unsafe=False, cost=-1.0, tags=TAGGED, rules={"flash": "pass"})


def config(tmp_path: Path, **settings) -> ModerateConfig:
    return ModerateConfig(paths=(tmp_path, tmp_path), **settings)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (HARMLESS, []),
        (replace(HARMLESS, unsafe=True), ["unsafe"]),
        (replace(HARMLESS, cost=None), ["unsafe"]),
        (replace(HARMLESS, tags=TAGGED | {"porn": 0.5, "crime": 0.51}), ["crime"]),
        (replace(HARMLESS, tags=TAGGED | {"porn": 0.9}, unsafe=True), ["unsafe", "porn"]),
        (replace(HARMLESS, file="good.mp4\nbad.mp4"), ["name"]),
        (FileVerdict(file="clip.mp4", error="damaged"), ["unsafe"]),
    ],
)
def test_reasons(found: FileVerdict, expected: list[str], tmp_path: Path):
    assert reasons(found, config(tmp_path)) == expected


def test_thresholds_can_be_stricter(tmp_path: Path):
    assert reasons(replace(HARMLESS, cost=-0.4), config(tmp_path, max_cost=-0.5)) == ["unsafe"]
    assert reasons(replace(HARMLESS, cost=-0.5), config(tmp_path, max_cost=-0.5)) == []
    every = reasons(HARMLESS, config(tmp_path, max_tag=0.05))
    assert every == [tag for tag in TAGS if tag != "child_abuse"]


def test_a_folder_in_and_two_lists_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, folder = refill(write_run(tmp_path), cost=-1.0), tmp_path / "videos"
    kept = [write_video(folder / name, still()) for name in ("a.mp4", "more/b.mp4")]
    write_video(folder / "c.mp4", flashing())
    (folder / "d.txt").write_text("no video")
    shutil.copy(kept[0], folder / ".hidden.mp4")
    command = [str(run), str(folder), f"report={tmp_path / 'report.jsonl'}", f"kept={tmp_path / 'kept.txt'}"]
    assert moderate.main([*command, "max_tag=1"]) == 1
    assert capsys.readouterr().out == "4 files, 1 not judged, 2 kept\n"
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


def test_outputs_without_a_folder_end_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "videos").mkdir()
    command = [str(write_run(tmp_path)), str(tmp_path / "videos"), f"report={tmp_path / 'none/report.jsonl'}"]
    assert moderate.main(command) == 2
    assert "none/report.jsonl: its folder does not exist" in capsys.readouterr().err
