import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align import offline
from align.offline import Offline
from align.pairing import Comparison
from align.train import run_alignment
from reward import formats
from reward.files import DataError
from reward.preferences import Source
from reward.records import FIRST, SECOND, TIE, Pair, Preference, Prompt, VideoSample
from tests import tiny_alignment, tiny_judge, tiny_wan

EXAMPLE = Path(__file__).parents[2] / "shared/data/videoalign-example"
PROMPT = Prompt(prompt_id="0" * 64, text="a red circle", type="safety_neutral")


def pair(first: bool | None, second: bool | None, helpfulness: Preference | None = FIRST, **fields: Any) -> Pair:
    """A pair of two videos of which people say whether they are safe."""
    videos = [
        VideoSample(video_id=f"v{number}", prompt=PROMPT, path=Path(f"v{number}.mp4"), is_safe=safe)
        for number, safe in enumerate((first, second))
    ]
    return Pair(pair_id="p", prompt=PROMPT, video_0=videos[0], video_1=videos[1], helpfulness=helpfulness, **fields)


def said(one: Pair, **settings: Any) -> list[Comparison]:
    source = Offline(data=Source(path=Path("x")), **settings)
    return list(offline.compared(source, [one], offline.videos_of([one])))


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (pair(True, True), (0, 1, 1.0)),
        (pair(True, True, SECOND), (1, 0, 1.0)),
        (pair(False, True, FIRST), (1, 0, 1.0)),  # safety comes first
        (pair(True, False, SECOND), (0, 1, 1.0)),
        (pair(None, None, Preference(probability=0.25, num_votes=4)), (1, 0, 0.75)),
        (pair(True, True, TIE), (0, 1, 0.5)),
    ],
)
def test_what_people_said(one: Pair, expected: tuple[int, int, float]):
    (found,) = said(one)
    assert (found.chosen, found.rejected, found.preference) == expected


def test_another_dimension_can_be_asked_for():
    one = pair(None, None, None, instruction_following=SECOND)
    assert said(one, dimension="instruction_following") == [Comparison(chosen=1, rejected=0, preference=1.0)]


@pytest.mark.parametrize(("one", "why"), [(pair(False, False), "both_unsafe"), (pair(True, True, None), "no_label")])
def test_pairs_that_say_nothing_are_counted(one: Pair, why: str):
    with pytest.raises(DataError, match=f"none of 1 pairs says which video is better: .*{why}': 1"):
        said(one)


def test_costs_are_peoples_labels():
    clips = offline.videos_of([pair(True, False), pair(True, False)])
    assert offline.labelled_costs(clips).tolist() == [-1.0, 1.0]
    assert np.isnan(offline.labelled_costs(offline.videos_of([pair(None, None)]))).all()


@pytest.mark.parametrize(
    ("prefer", "objective"),
    [("people", {"kind": "dpo"}), ("judge", {"kind": "dpo"}), ("people", {"kind": "rwr"})],
)
def test_a_first_round_learns_from_files(
    prefer: str, objective: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    home = tmp_path / "data"
    one = pair(True, True)
    for sample, content in zip((one.video_0, one.video_1), (tiny_judge.flashing(), tiny_judge.still()), strict=True):
        tiny_judge.write_video(moved(sample, home).path, content)
    pairs = [replace(one, video_0=moved(one.video_0, home), video_1=moved(one.video_1, home))]
    formats.write_pairs(home / "config-train.json", pairs)
    settings = tiny_alignment.settings(
        tmp_path,
        offline={
            "data": {"path": str(home / "config-train.json"), "validation_share": 0.0},
            "prefer": prefer,
        },
        objective=objective,
        num_rounds=1,
    )
    assert run_alignment(settings) == 0
    (first, *_) = (json.loads(line) for line in (settings.out / "metrics.jsonl").read_text().splitlines())
    assert first["num_items"] == {"dpo": 1, "rwr": 2}[objective["kind"]]
    assert "no label says of 1 of 1 pairs whether they are child abuse" in capsys.readouterr().err


def moved(sample: VideoSample, home: Path) -> VideoSample:
    return replace(sample, path=home / "videos" / PROMPT.prompt_id / sample.path)


@pytest.mark.skipif(not EXAMPLE.is_dir(), reason=f"VideoAlign's example pairs are not at {EXAMPLE}")
@pytest.mark.parametrize("objective", [{"kind": "dpo"}, {"kind": "rwr", "temperature": None, "chosen_only": True}])
def test_real_pairs_take_steps(objective: dict[str, Any], tmp_path: Path):
    """Two pairs of 720p; sizes differ within a pair. A third has no files, which the reader counts."""
    assert tiny_wan.HEIGHT == 32
    settings = tiny_alignment.settings(
        tmp_path,
        offline={
            "data": {"path": str(EXAMPLE / "example.csv"), "missing": "drop", "validation_share": 0.0},
            "dimension": "instruction_following",
        },
        objective=objective,
        num_rounds=1,
    )
    assert run_alignment(settings) == 0
    (first, *_) = (json.loads(line) for line in (settings.out / "metrics.jsonl").read_text().splitlines())
    assert first["num_items"] == 2
