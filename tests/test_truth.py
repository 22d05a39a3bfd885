import json
from pathlib import Path
from typing import Any

import pytest

from reward.files import DataError
from reward.truth import Gold, read_ceilings, read_gold
from tests.tiny_held_out import Case, pair

SANDBOX = Path(__file__).parents[1] / "sandbox/assets/data"
PAIR = pair(0, Case())
FIRST = {"video_id": "p0-a", "helpfulness": 0.9, "cost": 0.1, "aesthetics": 1, "seed": 7, "flash": True, "dagger": True}
SECOND = {
    "video_id": "p0-b",
    "helpfulness": 0.6,
    "cost": 0.9,
    "aesthetics": 1,
    "seed": 8,
    "flash": False,
    "dagger": True,
}


def gold(path: Path, *rows: dict[str, Any]) -> Gold:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_gold(path)


def test_gold_prefers_the_larger_value_and_in_cost_the_more_hazards(tmp_path: Path):
    """Helpfulness .9 to .6; two hazards to one, which overrule the costs; aesthetics equal; correctness unknown."""
    found = gold(tmp_path / "gold.jsonl", FIRST, SECOND)
    assert found.preferred("helpfulness")(PAIR) == 1.0
    assert found.preferred("cost")(PAIR) == 1.0
    assert found.preferred("aesthetics")(PAIR) is None
    assert found.preferred("correctness")(PAIR) is None
    swapped = gold(tmp_path / "gold.jsonl", {**FIRST, "video_id": "p0-b"}, {**SECOND, "video_id": "p0-a"})
    assert (swapped.preferred("helpfulness")(PAIR), swapped.preferred("cost")(PAIR)) == (0.0, 0.0)


def test_a_margin_leaves_out_what_differs_by_no_more(tmp_path: Path):
    found = gold(tmp_path / "gold.jsonl", FIRST, SECOND)
    assert found.preferred("helpfulness", 0.29)(PAIR) == 1.0
    assert found.preferred("helpfulness", 0.31)(PAIR) is None
    assert found.preferred("cost", 1.0)(PAIR) is None


def test_any_hazard_is_unsafe_and_what_was_not_measured_is_unknown(tmp_path: Path):
    found = gold(tmp_path / "gold.jsonl", {**FIRST, "dagger": False}, {**SECOND, "dagger": False})
    assert (found.is_unsafe(PAIR.video_0), found.is_unsafe(PAIR.video_1)) == (True, False)
    assert (found.shows("flash")(PAIR.video_0), found.shows("dagger")(PAIR.video_0)) == (True, False)
    assert found.hazard_names == ("flash", "dagger")
    other = pair(1, Case())
    assert (found.is_unsafe(other.video_0), found.shows("flash")(other.video_0)) == (None, None)
    assert found.preferred("helpfulness")(other) is None
    without = gold(tmp_path / "gold.jsonl", {"video_id": "p0-a", "helpfulness": 1.0})
    assert (without.is_unsafe(PAIR.video_0), without.hazard_names) == (None, ())


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"helpfulness": 1.0}], "no field video_id"),
        ([FIRST, FIRST], "row 2, video_id: expected an id that no other row has"),
        ([{**FIRST, "helpfulness": "good"}], "row 1, helpfulness: expected a number, got 'good'"),
        ([FIRST, {**SECOND, "dagger": None}], "row 2, video_id: expected true or false in the same fields"),
    ],
)
def test_gold_that_cannot_be_used(rows: list[dict[str, Any]], problem: str, tmp_path: Path):
    with pytest.raises(DataError, match=problem):
        gold(tmp_path / "gold.jsonl", *rows)


def test_the_ceilings_of_the_sandbox():
    found = read_ceilings(SANDBOX / "annotators.json")
    assert found["helpfulness"] == pytest.approx(0.7236, abs=1e-4)
    assert len(found) == 6


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected an object with best_accuracy, got list"),
        ('{"best_accuracy": {"train": {"helpfulness": 0.8}}}', "best_accuracy.test: expected some of helpfulness"),
        ('{"best_accuracy": {"test": {"cost": 80}}}', r"best_accuracy.test.cost: expected an accuracy in \[0.5, 1\]"),
        ('{"best_accuracy": {"test": {"cost": true}}}', "best_accuracy.test.cost: expected a number"),
    ],
)
def test_ceilings_that_cannot_be_used(content: str, problem: str, tmp_path: Path):
    path = tmp_path / "annotators.json"
    path.write_text(content)
    with pytest.raises(DataError, match=problem):
        read_ceilings(path)
