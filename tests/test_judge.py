import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from reward import flash
from reward import judge as program
from reward.config import ConfigError
from reward.features import BackboneError
from reward.judge import Judge, JudgeError, judge_file
from reward.model import ModelError, RewardModel
from reward.records import TAGS
from reward.rules import CostJudge, Flash
from reward.scores import SUB_DIMENSIONS, Scores
from reward.verdicts import Verdicts
from reward.video import read
from tests import tiny_encoders, tiny_safesora
from tests.tiny_encoders import video
from tests.tiny_judge import CALIBRATION, calibrate, flashing, refill, still, write_run, write_video

VIDEOS = [video(0), video(1, num_frames=3), video(2, num_frames=9, height=48), video(3, num_frames=1)]
PROMPTS = ["a red circle moves left", "", "a blue square", "under strobe lights"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def judge(run: Path) -> Judge:
    return Judge.load(run)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The run, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def bits(verdicts: Verdicts) -> torch.Tensor:
    """All numbers as one row a video, so that NaN is equal to NaN."""
    columns = [verdicts.reward[:, None], verdicts.sub, verdicts.cost[:, None], verdicts.tags]
    columns += [verdicts.spread.reward[:, None], verdicts.spread.cost[:, None]]
    return torch.cat(columns, dim=1).contiguous().view(torch.int32)


# Verdicts ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_verdicts_are_the_models_scores_in_units_of_the_calibration(judge: Judge, run: Path):
    """reward = (mean of 3 members - 0.5) / 2, cost = mean / 4, tag i: sigmoid(mean - i / 10); parts as they are."""
    model = RewardModel.load(run / "model")
    members = model(model.encode(VIDEOS, PROMPTS)).values
    raw, spread = Scores.split(members.mean(0)), Scores.split(members.std(0, correction=0))
    found = judge(PROMPTS, VIDEOS)
    torch.testing.assert_close(found.reward, (raw.reward - 0.5) / 2)
    torch.testing.assert_close(found.sub, raw.sub)
    torch.testing.assert_close(found.cost, raw.cost / 4)
    expected = 1 / (1 + torch.exp(torch.arange(12) / 10 - raw.tags))
    expected[:, TAGS.index("child_abuse")] = math.nan
    torch.testing.assert_close(found.tags, expected, equal_nan=True)
    torch.testing.assert_close(found.spread.reward, spread.reward / 2)
    torch.testing.assert_close(found.spread.cost, spread.cost / 4)
    assert (found.spread.cost > 0).all()


def test_a_clip_gets_the_same_bits_in_any_company(judge: Judge):
    alone = torch.cat([bits(judge([prompt], [clip])) for prompt, clip in zip(PROMPTS, VIDEOS, strict=True)])
    assert torch.equal(bits(judge(PROMPTS, VIDEOS)), alone)
    assert torch.equal(bits(judge(PROMPTS[::-1], VIDEOS[::-1])).flip(0), alone)
    again = bits(judge([*PROMPTS, *PROMPTS], [*VIDEOS, *VIDEOS]))
    assert torch.equal(again, torch.cat([alone, alone]))


def test_a_clip_gets_the_same_bits_from_any_process_state(judge: Judge, run: Path):
    expected = bits(judge(PROMPTS, VIDEOS))
    torch.manual_seed(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bits(judge(PROMPTS, VIDEOS)), expected)
    with torch.inference_mode():
        assert torch.equal(bits(Judge.load(run)(PROMPTS, VIDEOS)), expected)


def test_verdicts_may_weigh_a_loss(judge: Judge):
    weight = torch.ones(4, requires_grad=True)
    (weight * judge(PROMPTS, VIDEOS).reward).sum().backward()
    assert not judge(PROMPTS, VIDEOS).reward.requires_grad
    assert weight.grad is not None


def test_the_model_is_a_cost_judge(judge: Judge, copy: Path):
    one: CostJudge = judge
    assert one.name == "model"
    assert torch.equal(one.cost(PROMPTS, VIDEOS), judge(PROMPTS, VIDEOS).cost)
    calibrate(copy, cost_has_zero=False)
    assert Judge.load(copy).cost(PROMPTS, VIDEOS).isnan().all()
    calibrate(copy, trained=["helpfulness"])
    assert Judge.load(copy).cost(PROMPTS, VIDEOS).isnan().all()


def test_videos_unlike_those_of_the_training_are_refused(judge: Judge):
    with pytest.raises(BackboneError, match="fps"):
        judge(["red"], [video(0, fps=8)])
    with pytest.raises(BackboneError, match="height"):
        judge(PROMPTS[:2], [VIDEOS[0], video(0, height=56)])
    with pytest.raises(BackboneError, match="one text for each video"):
        judge(PROMPTS[:3], VIDEOS)
    with pytest.raises(JudgeError, match="one video at least"):
        judge([], [])


def test_a_score_that_is_not_finite_is_named(run: Path):
    judge = Judge.load(run)
    with torch.no_grad():
        dict(judge.model.named_parameters())["heads.1.bias"][5] = math.inf
    with pytest.raises(JudgeError, match="video 0: its cost is not finite"):
        judge(PROMPTS, VIDEOS)


# The run ----------------------------------------------------------------------------------------------------


def test_the_hash_tells_models_and_calibrations_apart(judge: Judge, copy: Path, tmp_path: Path):
    assert Judge.load(copy).sha256 == judge.sha256
    calibrate(copy, cost_scale=4.5)
    assert Judge.load(copy).sha256 != judge.sha256
    other = write_run(tmp_path / "other", num_members=1)
    assert (other / "calibration.json").read_bytes() == json.dumps(CALIBRATION).encode()
    assert Judge.load(other).sha256 != judge.sha256


def test_a_run_that_is_not_finished_is_refused(copy: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="calibration"):
        Judge.load(tmp_path / "no run")
    shutil.rmtree(copy / "model")
    with pytest.raises(ConfigError, match="config"):
        Judge.load(copy)


def test_an_encoder_that_has_moved_is_found(judge: Judge, run: Path, tmp_path: Path):
    moved = tiny_encoders.clip(tmp_path / "moved")
    assert torch.equal(bits(Judge.load(run, encoder=moved)(PROMPTS, VIDEOS)), bits(judge(PROMPTS, VIDEOS)))
    with pytest.raises(ModelError, match="is not the encoder"):
        Judge.load(run, encoder=tiny_encoders.clip(tmp_path / "other", seed=1))


# Files ------------------------------------------------------------------------------------------------------


def test_a_file_is_judged_as_its_frames_are(judge: Judge, tmp_path: Path):
    path = write_video(tmp_path / "clip.mp4", flashing())
    found, clip = judge_file(path, "a red circle", judge, [Flash()]), read(path)
    expected = judge(["a red circle"], [clip])
    assert (found.file, found.error) == (str(path), None)
    assert (found.reward, found.cost) == (expected.reward.item(), expected.cost.item())
    assert found.parts == dict(zip(SUB_DIMENSIONS, expected.sub[0].tolist(), strict=True))
    assert found.rules == {"flash": "fail"}
    assert found.rule_costs is not None
    assert found.rule_costs["flash"] == pytest.approx(flash.measure(clip.frames, clip.fps).cost)
    assert found.unsafe


@pytest.mark.parametrize(
    ("prepare", "problem"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b"no video"), "cannot be read as a video"),
        (lambda path: write_video(path, video(0, fps=8)), "fps: got 8, expected 16 to 16"),
        (lambda path: write_video(path, video(0, height=64)), "height"),
    ],
)
def test_a_file_that_cannot_be_judged_is_unsafe(prepare, problem: str, judge: Judge, tmp_path: Path):
    prepare(tmp_path / "clip.mp4")
    found = judge_file(tmp_path / "clip.mp4", "red", judge, [])
    assert found.error is not None
    assert problem in found.error
    assert found.unsafe
    assert (found.reward, found.cost, found.tags, found.rules) == (None, None, None, None)


# Command line: files ----------------------------------------------------------------------------------------


@pytest.fixture
def safe(copy: Path) -> Path:
    """A run that calls every video safe."""
    return refill(copy, cost=-1.0)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_one_line_a_file(safe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    paths = [write_video(tmp_path / "still.mp4", still()), write_video(tmp_path / "flashing.mp4", flashing())]
    assert program.main([str(safe), *map(str, paths), "prompt=a red circle"]) == 0
    first, second = lines(capsys)
    keys = ["file", "error", "unsafe", "reward", "parts", "cost", "spread", "tags", "rules", "rule_costs"]
    assert list(first) == list(second) == keys
    assert [first["file"], second["file"]] == list(map(str, paths))
    assert (first["cost"], first["unsafe"], first["rules"]) == (-1, False, {"flash": "pass"})
    assert (second["cost"], second["unsafe"], second["rules"]) == (-1, True, {"flash": "fail"})
    assert list(first["tags"]) == list(TAGS)
    assert first["tags"]["child_abuse"] is None
    assert all(0 < first["tags"][tag] < 1 for tag in TAGS if tag != "child_abuse")
    assert list(first["parts"]) == list(SUB_DIMENSIONS)
    assert first["spread"]["reward"] > 0 == first["spread"]["cost"]


def test_without_rules_only_the_model_speaks(safe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_video(tmp_path / "flashing.mp4", flashing())
    assert program.main([str(safe), str(path), "prompt=", "rules=[]"]) == 0
    (found,) = lines(capsys)
    assert (found["unsafe"], found["rules"], found["rule_costs"]) == (False, {}, {})


@pytest.mark.parametrize("change", [{"trained": ["helpfulness"]}, {"cost_has_zero": False}])
def test_a_model_that_does_not_know_what_is_safe_calls_nothing_safe(
    change: dict, safe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    calibrate(safe, **change)
    path = write_video(tmp_path / "still.mp4", still())
    program.main([str(safe), str(path), "prompt=red"])
    (found,) = lines(capsys)
    assert found["unsafe"] is True
    assert found["cost"] == (None if "trained" in change else -1)
    assert (found["tags"]["porn"] is None) == ("trained" in change)


def test_an_unsafe_cost_is_unsafe(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_video(tmp_path / "still.mp4", still())
    assert program.main([str(refill(copy, cost=0.25)), str(path), "prompt=red"]) == 0
    (found,) = lines(capsys)
    assert (found["cost"], found["unsafe"], found["rules"]) == (0.25, True, {"flash": "pass"})


def test_a_file_that_cannot_be_read_does_not_stop_the_others(
    safe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "broken.mp4").write_bytes(b"")
    paths = [str(tmp_path / "broken.mp4"), str(write_video(tmp_path / "still.mp4", still()))]
    assert program.main([str(safe), *paths, "prompt=red"]) == 1
    first, second = lines(capsys)
    assert "cannot be read" in first["error"]
    assert first["unsafe"]
    assert {value for key, value in first.items() if key not in ("file", "error", "unsafe")} == {None}
    assert (second["error"], second["unsafe"]) == (None, False)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["clip.mp4"], "give prompt= for video files, or out= for a data set"),
        (["clip.mp4", "prompt=red", "out=scores.parquet"], "give prompt= for video files, or out= for a data set"),
        (["one", "two", "out=scores.parquet"], "one data set, got 3 paths"),
        (["clip.mp4", "prompt=", "missing=drop"], "missing: only of a data set"),
        (["clip.mp4", "prompt=red", "rules=[flush]"], "rules"),
        (["prompt=red"], "paths"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(
    arguments: list[str], problem: str, run: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit, match="2"):
        program.main([str(run), *arguments])
    assert problem in capsys.readouterr().err


def test_a_run_that_cannot_be_used_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert program.main([str(tmp_path), "clip.mp4", "prompt=red"]) == 2
    assert "calibration.json" in capsys.readouterr().err


# Command line: data sets ------------------------------------------------------------------------------------


def write_data(root: Path) -> Path:
    """Two prompts with three videos: v0 is still, v1 is damaged for the second prompt; give the folder."""
    pairs = [tiny_safesora.pair_row("p0"), tiny_safesora.pair_row("p1")]
    tiny_safesora.write(root / "config-train.json", pairs)
    for name in ("p0/p0-v0", "p0/p0-v1", "p1/p1-v0"):
        write_video(root / "videos" / f"{name}.mp4", still())
    tiny_safesora.touch(root / "videos", "p1/p1-v1.mp4")
    return root


def test_a_data_set_becomes_a_table(safe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data, out = write_data(tmp_path / "data"), tmp_path / "scores.parquet"
    assert program.main([str(safe), str(data), f"out={out}", "chunk_size=3"]) == 1
    (printed,) = lines(capsys)
    counts = {"attempted": 4, "scored": 3, "failed": 1, "unsafe": 1, "excluded": {}}
    assert printed == {"out": str(out), **counts}
    table = pq.read_table(out)
    assert table["video_id"].to_pylist() == ["p0-v0", "p0-v1", "p1-v0", "p1-v1"]
    assert table["prompt_id"].to_pylist() == ["p0", "p0", "p1", "p1"]
    assert table["cost"].to_pylist() == [-1, -1, -1, None]
    expected = Judge.load(safe)(["a ball called p1"], [read(data / "videos/p1/p1-v0.mp4")])
    assert table["reward"][2].as_py() == expected.reward.item()
    assert table["rules.flash"].to_pylist() == ["pass", "pass", "pass", None]


def test_the_user_is_asked_and_not_the_refiner(safe: Path, tmp_path: Path):
    """The videos were made from 'a refined ball', the prompts say 'a ball': only the latter may count."""
    program.main([str(safe), str(write_data(tmp_path / "data")), f"out={tmp_path / 'scores.parquet'}"])
    judge, clip = Judge.load(safe), read(tmp_path / "data/videos/p0/p0-v0.mp4")
    asked, refined = judge(["a ball called p0", "a refined ball called p0"], [clip, clip]).reward.tolist()
    assert pq.read_table(tmp_path / "scores.parquet")["reward"][0].as_py() == asked != refined


def test_labels_screen_and_are_optional(safe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = write_data(tmp_path / "data")
    tags = {"video_labels": tiny_safesora.tags("child_abuse")}
    rows = [tiny_safesora.label_row(p, v, **(tags if p == "p1" else {})) for p in ("p0", "p1") for v in ("v0", "v1")]
    labels = tiny_safesora.write(tmp_path / "labels" / "config.json", rows)
    assert program.main([str(safe), str(data), f"out={tmp_path / 'some.parquet'}", f"labels={labels}"]) == 0
    (printed,) = lines(capsys)
    assert (printed["attempted"], printed["excluded"]) == (2, {"child_abuse": 1})


def test_another_judge_or_rule_does_not_go_on(safe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data, out = write_data(tmp_path / "data"), tmp_path / "scores.parquet"
    command = [str(safe), str(data), f"out={out}"]
    program.main(command)
    before, printed = out.read_bytes(), capsys.readouterr().out
    assert program.main([*command, "chunk_size=1"]) == 1
    assert (capsys.readouterr().out, out.read_bytes()) == (printed, before)
    assert program.main([*command, "rules=[]"]) == 2
    assert "made with another judge" in capsys.readouterr().err
    calibrate(safe, cost_scale=5.0)
    assert program.main(command) == 2
    assert "made with another judge" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_a_data_set_that_cannot_be_read_is_named(safe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert program.main([str(safe), str(tmp_path / "none"), f"out={tmp_path / 'scores.parquet'}"]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_a_killed_process_goes_on(safe: Path, tmp_path: Path):
    """Killed for real as soon as the first part is there; then the same command, and the same rows as without."""
    data = write_data(tmp_path / "data")
    program.main([str(safe), str(data), f"out={tmp_path / 'straight.parquet'}", "chunk_size=1"])
    out = tmp_path / "scores.parquet"
    command = [sys.executable, "-m", "reward.judge", str(safe), str(data), f"out={out}", "chunk_size=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(tmp_path.glob("scores.parquet.parts/0*.parquet")):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    program.main([*command[3:]])
    assert pq.read_table(out).equals(pq.read_table(tmp_path / "straight.parquet"))
    assert not list(tmp_path.glob("scores.parquet.parts"))
