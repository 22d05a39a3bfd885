import json
from pathlib import Path

import numpy as np
import pytest
import tiny_history

from align import history, proxy, sections
from align.proxy import Track, Turn
from align.sections import Note, Picture
from reward.files import DataError
from scripts.proxy import main

NUM_PROMPTS = len(tiny_history.PROMPTS)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three rounds, of which the judge calls the second unsafe and rewards none."""
    folder = tiny_history.write(tmp_path / "run")
    tiny_history.add_videos(folder, 3)
    return folder


def measure(run: Path, helpfulness: list[float | None], num_rounds: int = 3, **changes: object) -> None:
    """Do what `sandbox.measure` does: of each round all clips alike, and safe."""
    lines = map(json.loads, (run / "validation" / "manifest.jsonl").read_text().splitlines())
    gold = [
        {"file": line["file"], "sha256": line["sha256"], "unsafe": False, "helpfulness": helpfulness[line["round"]]}
        | changes
        for line in lines
        if line["round"] < num_rounds
    ]
    (run / "validation" / "gold.jsonl").write_text("".join(json.dumps(line) + "\n" for line in gold))


# The rule ---------------------------------------------------------------------------------------------------


def track(judge: list[float], gold: list[float]) -> Track:
    """Prompts differ by up to .1 around each mean, the same in each round."""
    spread = np.linspace(-0.1, 0.1, 9)
    return Track(name="helpfulness", judge=np.add.outer(judge, spread), gold=np.add.outer(gold, spread))


def test_it_begins_where_gold_is_best_and_is_seen_where_the_judge_goes_on_alone():
    """Gold peaks at row 1. At row 2 the judge fell too; at row 3 it is up by .3 while gold is down by .2."""
    found = proxy.turn(track([0.0, 0.5, 0.4, 0.8], [0.0, 0.6, 0.3, 0.4]))
    assert found is not None
    assert (found.begins, found.seen) == (1, 3)
    assert (found.judge.value, found.gold.value) == (pytest.approx(0.3), pytest.approx(-0.2))


@pytest.mark.parametrize(
    ("judge", "gold"),
    [
        ([0.0, 0.5, 0.8], [0.0, 0.3, 0.6]),
        ([0.0, 0.5, 0.4], [0.0, 0.6, 0.3]),
        ([0.0, 0.5, 0.8], [0.0, 0.6, 0.6]),
    ],
)
def test_it_does_not_begin_where_both_rise_or_both_fall_or_gold_stays(judge: list[float], gold: list[float]):
    assert proxy.turn(track(judge, gold)) is None


def test_chance_does_not_make_it_begin():
    """One of both falls by .1 in the mean, up for 4 prompts and down for 5, by about 1 each; then by 2 more."""
    gold = np.array([[0.0] * 9, [1, -1, 1, -1, 1, -1, 1, -1, -0.9]])
    judge = np.array([[0.0] * 9, [1.0] * 9])
    assert proxy.turn(Track(name="helpfulness", judge=judge, gold=gold)) is None
    assert proxy.turn(Track(name="helpfulness", judge=-gold, gold=-judge)) is None
    assert isinstance(proxy.turn(Track(name="helpfulness", judge=judge, gold=gold - [[0], [2]])), Turn)


# The files --------------------------------------------------------------------------------------------------


def test_clips_are_listed_measured_and_compared(run: Path, capsys: pytest.CaptureFixture[str]):
    """Where all clips of the first round are equal, changes are not divided by their deviation, which is 0."""
    main([str(run)])
    assert capsys.readouterr().out.splitlines() == [
        f"{run}/validation/manifest.jsonl: {3 * NUM_PROMPTS} clips",
        f"not measured yet: let gold measure them into {run}/validation/gold.jsonl",
    ]
    measure(run, [0.5, 1.5, 0.0])
    main([str(run)])
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"Over-optimisation, {name}: none was found in rounds 0 to 2."
        for name in ("share of safe clips", "helpfulness")
    ]
    watched = proxy.read(history.read(run))
    assert watched is not None
    safe, helpful = watched.tracks
    assert (safe.judge.mean(axis=1).tolist(), safe.gold.mean(axis=1).tolist()) == ([1, 0, 1], [1, 1, 1])
    assert (helpful.judge.mean(axis=1).tolist(), helpful.gold.mean(axis=1).tolist()) == ([0, 0, 0], [0, 1, -0.5])


def test_what_gold_cannot_measure_or_shows_nothing_is_the_worst(tmp_path: Path):
    """The first prompt's clip of round 1 is blank, of round 2 damaged: neither is safe, nor worth more than .25."""
    run = tiny_history.write(tmp_path / "run")
    tiny_history.add_videos(run, 3, blank=(1,))
    proxy.list_clips(history.read(run))
    measure(run, [0.25, 0.5, 0.5])
    path = run / "validation" / "gold.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2 * NUM_PROMPTS] = {key: lines[2 * NUM_PROMPTS][key] for key in ("file", "sha256")} | {"error": "damaged"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    watched = proxy.read(history.read(run))
    assert watched is not None
    safe, helpful = watched.tracks
    assert safe.gold[:, 0].tolist() == [1, 0, 0]
    assert helpful.gold.tolist() == [[0] * 4, [0, 0.25, 0.25, 0.25], [0, 0.25, 0.25, 0.25]]


def test_rounds_that_were_not_measured_are_left_out_and_named(run: Path):
    told = history.read(run)
    (note,) = sections.over_optimisation(told).blocks
    assert isinstance(note, Note)
    assert f"run python scripts/proxy.py {run}," in note.text
    proxy.list_clips(told)
    measure(run, [0.5, 0.25, 0.0], num_rounds=2)
    blocks = sections.over_optimisation(told).blocks
    assert blocks[-2] == Note(text="Not measured by gold, and left out: rounds 2.")
    assert isinstance(blocks[-1], Picture)
    assert "helpfulness by round: judge 0.000 0.000; gold 0.000 -0.250." in blocks[-1].words


def test_gold_without_helpfulness_tells_of_safety_alone(run: Path):
    proxy.list_clips(history.read(run))
    measure(run, [None] * 3)
    watched = proxy.read(history.read(run))
    assert watched is not None
    assert [each.name for each in watched.tracks] == ["share of safe clips"]


def test_where_it_begins_is_marked(run: Path):
    judge, gold = [0.0, 0.5, 0.8], [0.0, 0.6, 0.3]
    watched = proxy.Watched(rounds=(0, 1, 3), unmeasured=(), tracks=(track(judge, gold),))
    (place,) = proxy.chart(watched).figure.axes
    (line,) = [each for each in place.lines if str(each.get_label()).startswith("over-optimisation begins")]
    assert np.asarray(line.get_xdata()).tolist() == [1, 1]
    assert line.get_label() == "over-optimisation begins: round 1"
    assert "begins at round 1. By round 3 the judge's mean changes by +0.300 (" in proxy.chart(watched).words


def test_gold_of_other_clips_is_refused(run: Path, capsys: pytest.CaptureFixture[str]):
    proxy.list_clips(history.read(run))
    measure(run, [0.0] * 3, sha256="f" * 64)
    with pytest.raises(DataError, match="has changed since it was measured"):
        proxy.read(history.read(run))
    with pytest.raises(SystemExit):
        main([str(run)])
    assert "has changed since it was measured" in capsys.readouterr().err
