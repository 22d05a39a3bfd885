"""The evaluation as a program, with a random model; `test_measures.py` checks the numbers."""

import contextlib
import io
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from reward import evaluate, preferences
from reward.backbone import Dual
from reward.config import dump, parse
from reward.judge import Judge
from reward.model import ModelConfig
from reward.preferences import Source
from reward.records import DIMENSIONS, TAGS
from reward.settings import RewardConfig
from reward.video import read
from tests import tiny_judge, tiny_safesora
from tests.tiny_encoders import video

# Words that the tiny tokenizer knows, so that prompts differ.
PROMPTS = {"train": [*"123456789"], "test": ["red", "blue", "circle", "square", "strobe"]}
BROKEN = "strobe-v1"
GOLD = [
    {"video_id": f"{prompt}-v{side}", "helpfulness": side + number / 10, "flash": side == 1}
    for number, prompt in enumerate(PROMPTS["test"])
    for side in (0, 1)
]


def write_data(root: Path) -> Path:
    """A pair a prompt, all of whose first videos are preferred; every second one is unsafe and shows crime."""
    (root / "labels").mkdir(parents=True)
    unsafe = {"is_safe": False}
    for split, prompts in PROMPTS.items():
        pairs = [tiny_safesora.pair_row(p, video_1=tiny_safesora.video_row(p, "v1", **unsafe)) for p in prompts]
        tiny_safesora.write(root / f"config-{split}.json", pairs)
        labels = [tiny_safesora.label_row(p, "v0") for p in prompts]
        shown = {"video_labels": tiny_safesora.tags("crime")}
        labels += [tiny_safesora.label_row(p, "v1", **unsafe, **shown) for p in prompts]
        tiny_safesora.write(root / f"labels/config-{split}.json", labels)
        for number, name in enumerate(f"{p}/{p}-v{side}" for p in prompts for side in (0, 1)):
            tiny_judge.write_video(root / "videos" / f"{name}.mp4", video(number + 100 * (split == "test")))
    (root / "videos/strobe/strobe-v1.mp4").write_bytes(b"no video")
    tiny_safesora.write(root / "gold.jsonl", GOLD)
    (root / "ceilings.json").write_text(json.dumps({"best_accuracy": {"test": {"helpfulness": 0.9}}}))
    return root


def write_config(run: Path, **data: Any) -> None:
    source = Source(path=run.parent / "data", labels=run.parent / "data/labels", validation_share=0.4)
    model = ModelConfig(backbone=Dual(encoder=run.parent / "clip"))
    config = RewardConfig(out=run, data=source.model_copy(update=data), model=model)
    (run / "config.yaml").write_text(dump(config))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run and its data, and an evaluation with all that can be named."""
    home = tmp_path_factory.mktemp("evaluate")
    write_data(home / "data")
    write_config(tiny_judge.write_run(home))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert evaluate.main(command(home)) == 0
    said = json.loads(printed.getvalue())
    assert (said["out"], said["test_pairs"]["failed"]) == (str(home / "run/evaluation.md"), 1)
    return home


def command(home: Path) -> list[str]:
    truth = [f"ceilings={home / 'data/ceilings.json'}", f"gold={home / 'data/gold.jsonl'}", "gold_tags={crime: flash}"]
    return [str(home / "run"), *truth, "num_probed=3", "num_shuffled=4"]


@pytest.fixture(scope="module")
def found(home: Path) -> dict[str, Any]:
    return json.loads((home / "run/evaluation.json").read_text())


def rewards(home: Path, name: str) -> dict[str, float]:
    """What a table says."""
    (path,) = (home / "run/evaluation").glob(f"{name}-*.parquet")
    table = pq.read_table(path)
    return dict(zip(table["video_id"].to_pylist(), table["reward"].to_pylist(), strict=True))


def test_the_files_that_are_promised(home: Path):
    run = home / "run"
    plots = sorted(path.name for path in (run / "evaluation").glob("*.png"))
    assert plots == ["accuracy.png", "probes.png", "reliability.png"]
    page = (run / "evaluation.md").read_text()
    assert all(f"(evaluation/{name})" in page for name in plots)
    assert not list((run / "evaluation").glob("*.parts"))


def test_the_keys_that_are_promised(found: dict[str, Any]):
    assert list(found["ranking"]) == list(DIMENSIONS)
    assert list(found["harm"]) == ["cost", *TAGS]
    assert list(found["calibration"]) == ["helpfulness", "cost", *TAGS]
    assert set(found["ranking"]["helpfulness"]["accuracy"]["ties_dropped"]) == {"value", "low", "high", "n"}
    assert set(found["probes"]["blur"]["shifts"]) == {"helpfulness", "instruction_following", "cost"}
    assert found["label_agreement"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 9}
    assert found["harm"]["child_abuse"] == {"not_measured": "the model was not trained to tell"}
    assert found["ranking"]["helpfulness"]["ceiling"] == 0.9
    assert found["gold"]["harm"].keys() == {"cost", "crime"}


def test_more_prompts_are_exchanged_than_otherwise_probed(found: dict[str, Any]):
    """All four of which both videos could be judged, and three of them."""
    num = {name: probe["counts"]["attempted"] for name, probe in found["probes"].items()}
    assert num == {"prompt_shuffle": 8, **dict.fromkeys(("empty_prompt", "frozen_frame", "frame_shuffle", "blur"), 6)}


def test_a_broken_video_is_counted_and_named_and_takes_its_pair_along(home: Path, found: dict[str, Any]):
    assert found["counts"]["test_videos"] == {"attempted": 10, "scored": 9, "failed": 1, "excluded": 0}
    assert found["counts"]["test_pairs"] == {"attempted": 5, "scored": 4, "failed": 1, "excluded": 0}
    ((file, problem),) = found["failures"].items()
    assert Path(file).stem == BROKEN
    assert "cannot be read" in problem
    assert f"  - `{file}`: " in (home / "run/evaluation.md").read_text()
    assert found["ranking"]["cost"]["accuracy"]["strict"]["n"] == 4
    assert found["harm"]["crime"]["num"] == 9


def test_accuracy_is_that_of_the_judge_on_what_the_user_asked(home: Path, found: dict[str, Any]):
    judge, data = Judge.load(home / "run"), home / "data/videos"
    right = []
    for prompt in PROMPTS["test"][:4]:
        clips = [read(data / prompt / f"{prompt}-v{side}.mp4") for side in (0, 1)]
        said = judge([f"a ball called {prompt}"] * 2, clips)
        right.append((said.reward[0] > said.reward[1]).item())
        assert rewards(home, "test")[f"{prompt}-v0"] == pytest.approx(said.reward[0].item())
    assert found["ranking"]["helpfulness"]["accuracy"]["strict"]["value"] == sum(right) / 4
    gold = found["gold"]["accuracy"]["helpfulness"]  # of gold, the second is always the better
    assert (gold["value"], gold["n"]) == (1 - sum(right) / 4, 4)


def test_thresholds_are_those_of_the_validation_split(home: Path, found: dict[str, Any]):
    source = Source(path=home / "data", labels=home / "data/labels", validation_share=0.4)
    validation = [pair.prompt.prompt_id for pair in preferences.load(source).pairs("validation")]
    (path,) = (home / "run/evaluation").glob("validation-*.parquet")
    rows = pq.read_table(path).to_pylist()
    assert {row["prompt_id"] for row in rows} == set(validation) < set(PROMPTS["train"])
    lowest = min(row["cost"] for row in rows if row["video_id"].endswith("v1"))  # of few, recall .95 takes all
    assert found["harm"]["cost"]["high_recall"]["threshold"] == lowest


def test_probes_are_tried_on_some_prompts_with_other_prompts_or_frames(home: Path, found: dict[str, Any]):
    assert found["probes"]["blur"]["counts"] == {"attempted": 6, "scored": 6, "failed": 0, "excluded": 3}
    judge, before = Judge.load(home / "run"), rewards(home, "test")
    empty = rewards(home, "empty_prompt")
    chosen = sorted({video_id.split("-")[0] for video_id in empty})
    assert len(chosen) == 3
    for name in ("prompt_shuffle", "frozen_frame", "frame_shuffle", "blur"):
        assert all(value != before[video_id] for video_id, value in rewards(home, name).items()), name
    shuffled, asked = rewards(home, "prompt_shuffle"), PROMPTS["test"][:4]
    for prompt in chosen:
        clip = read(home / f"data/videos/{prompt}/{prompt}-v0.mp4")
        assert judge([""], [clip]).reward.item() == pytest.approx(empty[f"{prompt}-v0"])
        others = [judge([f"a ball called {other}"], [clip]).reward.item() for other in asked if other != prompt]
        assert shuffled[f"{prompt}-v0"] in [pytest.approx(other) for other in others]


def test_the_same_command_judges_nothing_again_and_says_the_same(home: Path, found: dict[str, Any]):
    tables = {path: path.stat().st_mtime_ns for path in (home / "run/evaluation").glob("*.parquet")}
    again = evaluate.evaluate(parse(evaluate.Settings, command(home), prog="", positional="run"))
    assert json.loads(json.dumps(asdict(again))) == found
    assert {path: path.stat().st_mtime_ns for path in (home / "run/evaluation").glob("*.parquet")} == tables


# Other data, and what is refused ----------------------------------------------------------------------------


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Path:
    """The run before its evaluation, to be changed, beside the same data and encoder."""
    for name in ("data", "clip"):
        (tmp_path / name).symlink_to(home / name)
    return shutil.copytree(home / "run", tmp_path / "run", ignore=shutil.ignore_patterns("evaluation*"))


def test_other_data_are_tested_on_without_the_prompts_of_the_training(home: Path, copy: Path):
    """Nine training rows without a test split, of which the run trained on some and validated on the others."""
    write_config(copy, path=home / "data/config-train.json", labels=None)
    rows = json.loads((home / "data/config-test.json").read_text())[:3]
    rows += json.loads((home / "data/config-train.json").read_text())[:2]
    other = tiny_safesora.write(copy.parent / "other.json", rows)
    found = evaluate.evaluate(
        evaluate.Settings(run=copy, test=Source(path=other, video_dir=home / "data/videos"), num_probed=2)
    )
    assert (found.counts["test_pairs"].scored, found.counts["test_pairs"].excluded) == (3, 2)
    assert found.data[str(other)].read == 5
    assert found.gold is None


def test_a_run_with_theta_is_measured_by_its_likelihood_too(home: Path, copy: Path):
    """theta = 4 and rewards divided by 2: ties up to log 3.5 / 2."""
    tiny_judge.calibrate(copy, thetas={"helpfulness": 4.0})
    assert evaluate.main([str(copy), "num_probed=2"]) == 0
    ranking = json.loads((copy / "evaluation.json").read_text())["ranking"]
    own = ranking["helpfulness"]["outcomes"]
    assert (own["theta"], own["tie_threshold"]) == (4.0, pytest.approx(math.log(3.5) / 2))
    assert own["accuracy"]["n"] == own["log_likelihood"]["n"] == 4
    assert own["log_likelihood"]["value"] < 0
    assert ranking["aesthetics"]["outcomes"] is None
    assert "| helpfulness | 4.00 | 0.626 |" in (copy / "evaluation.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["gold=GOLD", "gold_tags={crime: flush}"], r"gold_tags.crime=flush: no such hazard .* it knows flash"),
        (["ceilings=nowhere.json"], "nowhere.json: cannot be read as JSON"),
        (["test.path=TRAIN"], "none of its 9 pairs has a prompt new to the model"),
        (["encoder=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_used_ends_with_one_line(arguments: list[str], problem: str, home: Path, copy: Path):
    names = {"GOLD": str(home / "data/gold.jsonl"), "TRAIN": str(home / "data/config-train.json")}
    for name, path in names.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    with pytest.raises(SystemExit, match=problem):
        evaluate.main([str(copy), *arguments])


def test_a_run_that_is_none_or_not_finished_or_without_a_test_split(home: Path, copy: Path, tmp_path: Path):
    with pytest.raises(SystemExit, match=r"nowhere.config.yaml: cannot be read"):
        evaluate.main([str(tmp_path / "nowhere")])
    write_config(copy, path=home / "data/config-train.json")
    with pytest.raises(SystemExit, match="has no test split; name other data"):
        evaluate.main([str(copy)])
    (copy / "calibration.json").unlink()
    write_config(copy)
    with pytest.raises(SystemExit, match=r"calibration.json: cannot be read"):
        evaluate.main([str(copy)])


def test_settings_that_would_be_ignored(copy: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([str(copy), "gold_tags={crime: flash}", "gold_margin=0.1"])
    assert "gold_margin, gold_tags: only with gold=" in capsys.readouterr().err


def test_videos_none_of_which_can_be_judged(home: Path, copy: Path):
    tiny_safesora.touch(copy.parent / "empty", *(f"{p}/{p}-v{side}.mp4" for p in PROMPTS["test"] for side in (0, 1)))
    test = [f"test.path={home / 'data/config-test.json'}", f"test.video_dir={copy.parent / 'empty'}"]
    with pytest.raises(SystemExit, match=r"5 pairs, of which 0 could be judged; first failure: .*cannot be read"):
        evaluate.main([str(copy), *test])
