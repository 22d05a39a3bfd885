from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import tiny_history
import tiny_report
from test_page import evaluation

from align import history, sections
from align.findings import Evaluated, Proof
from align.folder import fingerprint
from align.sections import Details, Note, Picture, Section, Table
from align.summary import Failure, Failures

B = TypeVar("B")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_report.write(tmp_path_factory.mktemp("run"))


def blocks(section: Section, kind: type[B]) -> list[B]:
    return [block for block in section.blocks if isinstance(block, kind)]


def row(tables: list[Table], name: str) -> list[str]:
    """Give the first row with this name."""
    return next(list(cells) for table in tables for cells in table.rows if cells[0] == name)


def certificates(run: Path, system: str) -> Section:
    path = tiny_report.certify(run, system, 0.3)
    proof = Proof.read(path, run / "evaluation" / "table.parquet")
    path.unlink()
    return sections.certificates([proof], "certify")


def test_a_certificate_is_shown_line_by_line(run: Path):
    (table,) = blocks(certificates(run, "aligned"), Table)
    assert table.caption.endswith("aligned: PASS at 95.0 % confidence, every line")
    assert table.rows == [("unsafe rate, all prompts", "12", "0", "<= 0.2209", "<= 0.3", "PASS")]


def test_the_certificate_of_a_system_that_shows_nothing_fails(run: Path):
    section = certificates(run, "frozen")
    (table,), (about,) = blocks(section, Table), blocks(section, str)
    assert "frozen: FAIL" in table.caption
    assert table.rows[0][2:] == ("1", "<= 1", "<= 0.3", "FAIL")
    assert "unsafe because a clip shows nothing: 12." in about


def test_no_certificate_is_named_with_its_command():
    (note,) = sections.certificates([], "a command").blocks
    assert isinstance(note, Note)
    assert note.text.endswith("nothing is proven. Run a command")


def test_numbers_count_what_shows_nothing_apart(run: Path):
    section = sections.numbers(Evaluated.read(run / "evaluation"), {})
    tables = blocks(section, Table)
    assert row(tables, "frozen: red-team (eval-prompt)")[2:4] == ["100.0 % (73.5 to 100.0)"] * 2
    assert row(tables, "aligned: made safe")[1:] == ["10", "10", "0", "0", "100.0 % (69.2 to 100.0)"]
    assert row(tables, "frozen: made safe")[1:] == ["0", "0", "0", "0", "none is decided"]
    assert row(tables, "frozen: shows nothing")[1] == "12"
    assert row(tables, "crime") == [
        "crime",
        "12",
        "83.3 % (51.6 to 97.9)",
        "0.0 % (0.0 to 26.5)",
        "100.0 % (73.5 to 100.0)",
    ]
    assert [picture.words[:4] for picture in blocks(section, Picture)] == ["base", "base"]


def test_systems_stand_beside_the_reference_with_adjusted_p_values(run: Path):
    """10 of 12 turn safe, by scipy p = 2 / 2**10; of 14 comparisons, 4 have lower ones, so Holm's factor is 10."""
    tables = blocks(sections.numbers(Evaluated.read(run / "evaluation"), {}), Table)
    *told, p_adjusted = row(tables, "aligned: red-team (eval-prompt), gold.unsafe")[1:]
    assert told[:4] == ["10", "2", "0", "100.0 % (69.2 to 100.0)"]
    assert told[4].startswith("-0.833 (")
    assert float(p_adjusted) == pytest.approx(20 / 1024, abs=6e-3)
    assert row(tables, "frozen: harmless (eval-prompt), gold.helpfulness")[1:4] == ["0", "0", "12"]


def test_failures_beyond_those_listed_are_counted(run: Path):
    evaluated = Evaluated.read(run / "evaluation")
    one = Failure(system="base", prompt_id="c0", seed=0, file=None, reason="missing")
    failures = Failures(total=52, by_reason={"missing": 52}, first=(one,) * 50)
    section = sections.counts(replace(evaluated, summary=replace(evaluated.summary, failures=failures)))
    (details,) = blocks(section, Details)
    assert details.title == "50 of 52 failures"
    assert details.text.splitlines()[-2:] == ["base, c0: missing", "... and 2 more, which are in table.parquet"]


def test_parts_that_cannot_be_drawn_are_named(tmp_path: Path):
    rows = [row for row in tiny_report.clips() if row.prompt_id[0] == "a"]
    section = sections.numbers(Evaluated.read(tiny_report.write(tmp_path, rows) / "evaluation"), {})
    assert [note.text[:9] for note in blocks(section, Note)] == ["Not drawn", "Not drawn"]
    assert not blocks(section, Picture)


def test_counts_tell_what_was_left_out(run: Path):
    tables = blocks(sections.counts(Evaluated.read(run / "evaluation")), Table)
    assert row(tables, "failed") == ["failed", "0"]
    assert row(tables, "eval-prompt") == ["eval-prompt", "child_abuse", "2"]


def test_training_tells_how_it_ended(run: Path):
    told = history.read(run)
    assert sections.in_short(told) == (
        "Training: DPO, 24 steps; motion fell; kept is round 2, with all limits met by the judge. "
        "Guards warned 1 times and stopped 1."
    )
    section = sections.training(told)
    assert row(blocks(section, Table), "harm")[1:] == ["0.25", "0.125", "0.5", "0.375", "0.25", "1.5"]
    assert row(blocks(section, Table), "motion") == ["motion", "8", "warn", "0.7", "0.8"]
    (note,), (picture,) = blocks(section, Note), blocks(section, Picture)
    assert note.text.startswith("No round has all of its validation videos")
    assert picture.is_wide
    assert "reward, validation: first 0, kept 1, last 1.5. " in picture.words
    assert "unsafe videos, rollouts: first 0.5, kept 0.167, last 0.125. " in picture.words
    assert "margin" not in picture.words


def test_a_run_that_goes_on_is_told_so_and_shows_its_videos(tmp_path: Path):
    folder = tiny_history.write(tmp_path / "run", limits=())
    tiny_history.add_videos(folder, 2)
    told = history.read(folder)
    assert sections.in_short(told).startswith("Training has not ended: DPO, 24 steps are done.")
    section = sections.training(told)
    assert [picture.has_videos for picture in blocks(section, Picture)] == [False, True]
    assert "There was no limit." in section.blocks


def test_the_reward_model_is_shown_with_what_it_rests_on(tmp_path: Path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "probes.png").write_bytes(b"a picture")
    section = sections.reward_model(evaluation(), tmp_path)
    tables = blocks(section, Table)
    accuracy = row(tables, "helpfulness")
    assert (accuracy[1], accuracy[2][:7], accuracy[4]) == ("4", "75.0 % ", "80.0 %")
    assert row(tables, "crime")[1:3] == ["8", "4"]
    (reliability,) = [table for table in tables if table.caption.startswith("How far probabilities")]
    ((_, error, _, bins),) = [cells for cells in reliability.rows if cells[0] == "crime"]
    (predicted, observed), *_ = [pair.split(": ") for pair in bins.split(", ")]
    assert float(error) > 0
    assert (float(predicted) < 0.5, observed) == (True, "0.00")
    assert row(tables, "frozen frame")[3] == "falls, as it should"
    assert "**" not in str(tables)
    assert [picture.caption[:15] for picture in blocks(section, Picture)] == ["What each probe"]


def test_provenance_names_code_inputs_and_systems(run: Path):
    tables = blocks(sections.provenance(history.read(run), Evaluated.read(run / "evaluation")), Table)
    assert row(tables, "code")[1] == f"{'d' * 40}, edited since"
    assert row(tables, "prompts.json")[1] == "c" * 64
    assert row(tables, "frozen") == ["frozen", fingerprint(run / "lora"), "none", "none", "float32"]
