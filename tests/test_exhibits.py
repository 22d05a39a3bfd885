import base64
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_report

from align import exhibits, table
from align.exhibits import Exhibit, Gallery
from align.findings import Evaluated
from reward.files import DataError

PLENTY = 1e9


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tiny_report.write(tmp_path_factory.mktemp("run"))
    return run


@pytest.fixture(scope="module")
def gallery(run: Path) -> Gallery:
    return exhibits.gather(Evaluated.read(run / "evaluation"), "aligned", PLENTY)


def shown(gallery: Gallery, prompt: str) -> dict[str, Exhibit]:
    (row,) = [row for row in gallery.rows if row.prompt == prompt]
    return {clip.system: clip for clip in row.clips}


def test_all_systems_stand_side_by_side_the_reference_first(gallery: Gallery):
    assert {tuple(clip.system for clip in row.clips) for row in gallery.rows} == {("base", "aligned", "frozen")}
    assert Counter(row.kind for row in gallery.rows) == {"red-team": 12, "harmless": 12, "look-alike": 4}
    assert gallery.num_left_out == 0
    assert tiny_report.EVIL in {row.prompt for row in gallery.rows}


def test_what_shows_nothing_is_not_called_safe(gallery: Gallery):
    found = shown(gallery, "a crime, number 0")
    assert {name: clip.outcome for name, clip in found.items()} == {
        "base": "unsafe", "aligned": "safe", "frozen": "shows nothing",
    }  # fmt: skip
    assert found["aligned"].score == "helpfulness 0.60"
    row = tiny_report.clips()[0]
    assert exhibits.outcome_of(tiny_report.failed(row)) == "not judged"
    assert exhibits.outcome_of(replace(row, scores={"degenerate": 1.0})) == "unsafe"
    assert exhibits.outcome_of(replace(row, unsafe=False, scores={"degenerate": 1.0})) == "shows nothing"


def test_a_clip_that_flashes_only_when_repeated_is_marked(run: Path, gallery: Gallery):
    """Half a second with 4 changes, so 8 a second, which are 4 flashes: 3 are allowed."""
    found = shown(gallery, "a crime, number 0")
    assert (found["base"].flashes, found["aligned"].flashes) == (4.0, 0.0)
    assert (found["base"].width, found["base"].height) == (16, 16)
    file = run / "evaluation" / "videos" / "base" / "eval-prompt-0000-words-0.mp4"
    assert base64.b64decode(found["base"].video or "") == file.read_bytes()


def test_rows_that_do_not_fit_are_left_out_by_turns(run: Path):
    """The first of each kind and outcome: red-team made safe, red-team safe before, harmless, look-alike."""
    evaluated = Evaluated.read(run / "evaluation")
    sizes = [path.stat().st_size for path in (run / "evaluation" / "videos").rglob("*.mp4")]
    few = exhibits.gather(evaluated, "aligned", 4 * 3 * max(sizes) * 4 / 3 + 48)
    assert {row.prompt for row in few.rows} >= {
        "a crime, number 0", "a crime, number 10", tiny_report.EVIL, "a slow pulse 0",
    }  # fmt: skip
    assert len(few.rows) + few.num_left_out == 28
    assert len(few.rows) in (4, 5)
    assert exhibits.gather(evaluated, "aligned", 1).rows == ()


def test_what_cannot_be_measured_is_not_shown(tmp_path: Path):
    """Files are missing: of one clip there never was any, and one is known to have failed."""
    rows = [row for row in tiny_report.clips() if row.prompt_id == "n1"]
    rows = [rows[0], tiny_report.failed(rows[1]), replace(rows[2], file=None)]
    run = tiny_report.write(tmp_path, rows)
    shutil.rmtree(run / "evaluation" / "videos")
    found = shown(exhibits.gather(Evaluated.read(run / "evaluation"), "aligned", PLENTY), "a ball 1")
    assert all(clip.video is None for clip in found.values())
    assert "eval-prompt-0013-words-0.mp4" in found["base"].score
    assert (found["aligned"].score, found["frozen"].score) == ("damaged", "helpfulness 0.90")


@pytest.mark.parametrize("file", ["../secret.mp4", "/etc/passwd"])
def test_a_table_names_no_file_outside_its_folder(tmp_path: Path, file: str):
    run = tiny_report.write(tmp_path)
    path = run / "evaluation" / "table.parquet"
    table.write(path, [replace(row, file=file) for row in table.read(path)])
    with pytest.raises(DataError, match="inside its folder"):
        exhibits.gather(Evaluated.read(run / "evaluation"), "aligned", PLENTY)
