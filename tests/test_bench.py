import io
import itertools
import json
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from reward import preferences
from reward.config import load
from reward.settings import RewardConfig
from scripts import bench
from tests import tiny_encoders, tiny_wan

MEASURES = [
    "flash",
    "read",
    "judge",
    "features",
    "index_seconds",
    "index_bytes",
    "index_frames",
    "dpo_step",
    "dpo_kept",
    "dpo_outside",
    "dpo_memory",
    "latents",
    "render",
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_wan.build(root / "wan")
    tiny_encoders.clip(root / "clip")
    backbone = {"kind": "dual", "encoder": str(root / "clip"), "width": 128}
    (root / "reward.yaml").write_text(json.dumps({"data": {"path": "none"}, "model": {"backbone": backbone}}))
    sampler = {"steps": 2, "num_frames": tiny_wan.NUM_FRAMES, "height": tiny_wan.HEIGHT, "width": tiny_wan.WIDTH}
    return [
        *(f"sampler.{key}={value}" for key, value in sampler.items()),
        *(f"model={root / 'wan'}", f"reward={root / 'reward.yaml'}", "lora.rank=2"),
        *("width=16", "height=16", "num_frames=4", "num_repeats=1"),
        *("num_pairs=2", "num_judged=2", "num_rendered=2", "index_sizes=[6,40]"),
    ]


@pytest.fixture(scope="module")
def config(settings):
    return bench.parse(bench.BenchConfig, settings, prog="bench", positional="names")


@pytest.fixture(scope="module")
def lines(settings):
    """What the program prints, by the measure's name."""
    with redirect_stdout(io.StringIO()) as printed:
        bench.main(settings)
    return {line["name"]: line for line in map(json.loads, printed.getvalue().splitlines())}


@pytest.fixture
def counting_clock(monkeypatch):
    """A processor time that counts the passes of modules, and how often it was asked."""
    passed, asked = [], itertools.count()
    hook = register_module_forward_hook(lambda *_: passed.append(1))
    monkeypatch.setattr(time, "process_time", lambda: len(passed) + next(asked))
    yield
    hook.remove()


def test_each_measure_is_one_line_beside_what_it_must_reach(lines):
    assert list(lines) == MEASURES
    for name in ("flash", "read"):
        assert lines[name]["times_real_time"] > 0
        assert lines[name]["required"] > 0
    assert lines["flash"]["work"] == "4 frames of 16x16 at 16 fps"


@pytest.mark.parametrize("name", MEASURES[2:])
def test_a_ratio_is_that_of_its_sides(lines, name):
    line = lines[name]
    first, *_, last = line["sides"].values()
    assert line["ratio"] == pytest.approx(first / last, rel=0.01, abs=1e-4)
    assert first > 0
    assert line["better"] in ("lower", "higher")
    assert line["limit"] is not None or line["better"] == "higher"


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("judge", 5.9, 6.1),  # six models pass six times
        ("features", 10, 1e4),  # nothing passes where all is kept
        ("dpo", 1.5, 2.1),  # two passes, that of the reference without LoRA; this clock sees none backward
        ("latents", 10, 1e4),
        ("render", 1.2, 2.0),  # two videos pass the transformer together, and are decoded one by one
    ],
)
def test_the_sides_stand_the_right_way_round(config, counting_clock, name, least, most):
    line = next(bench.BENCHMARKS[name](config))
    assert isinstance(line, bench.Ratio)
    assert least < line.ratio < most


def test_limits_are_counted(lines):
    """Six models for helpfulness, four parts and cost: 6, of which 6 / 1.2 = 5 is enough.

    A step passes forward twice and backward once, with no gradients of weights: 3, and 1.2 * 3 = 3.6 is enough; then
    the passes are all but (3.6 - 3) / 3.6 = 1 - 1 / 1.2 of it. Where the reference's errors are kept, it passes forward
    once: 2, and 2.4 is enough. A set's size or its videos' length should change nothing: 1.
    """
    counted = {name: (line["limit"], line["target"]) for name, line in lines.items() if "limit" in line}
    assert counted["judge"] == (6, 5)
    assert counted["dpo_step"] == (3, 3.6)
    assert counted["dpo_kept"] == (2, 2.4)
    assert counted["dpo_outside"] == (0, 0.1667)
    assert counted["index_seconds"] == counted["index_bytes"] == counted["index_frames"] == (1, 1.2)
    assert [counted[name] for name in ("features", "latents", "render")] == [(None, 10), (None, 10), (None, 1)]


def test_a_second_reference_costs_its_weights_and_nothing_else(lines, config):
    copy = bench.num_bytes(bench.Policy.load(config.model).transformer)
    line = lines["dpo_memory"]
    one, two = line["sides"].values()
    assert copy == sum(p.numel() * 4 for p in bench.Policy.load(config.model).transformer.parameters())
    assert two - one == pytest.approx(copy, rel=0.01)
    assert one > copy
    assert line["limit"] == pytest.approx(1 - copy / two, abs=1e-4)


def test_memory_does_not_depend_on_the_length_of_videos(lines):
    assert lines["index_frames"]["ratio"] == pytest.approx(1, abs=0.01)
    assert list(lines["index_bytes"]["sides"]) == ["40_videos_bytes_each", "6_videos_bytes_each"]
    assert lines["index_bytes"]["ratio"] < 2  # not 40 / 6


def test_a_step_trains_the_lora_in_two_forward_passes_and_little_else(config, counting_clock):
    learner = bench.Learner.of(bench._policy(config), config)
    passed = []
    learner.policy.transformer.register_forward_hook(lambda *_: passed.append(torch.is_grad_enabled()))
    before = [weight.detach().clone() for weight in learner.policy.lora_parameters()]
    whole, outside = learner.timed_step()
    assert passed == [True, False]
    assert len(passed) == sum(bench.STEP_PASSES[name] for name in ("policy forward", "reference forward"))
    assert not all(torch.equal(*two) for two in zip(before, learner.policy.lora_parameters(), strict=True))
    assert 0 < outside < whole / 4


def test_a_step_with_kept_errors_has_one_forward_pass(config):
    learner = replace(bench.Learner.of(bench._policy(config), config), kept={})
    learner.step()
    passed = []
    learner.policy.transformer.register_forward_hook(lambda *_: passed.append(torch.is_grad_enabled()))
    learner.step()
    assert passed == [True]


def test_a_second_copy_stands_in_for_the_reference_inside_its_block_only(config):
    policy = bench.TwoCopies.load(config.model, lora=config.lora)
    own, policy.second = policy.transformer, torch.nn.Identity()
    with policy.as_reference():
        assert policy.transformer is policy.second
    assert policy.transformer is own


def test_the_judge_by_default_is_that_of_the_sandbox(monkeypatch):
    """And its encoder takes videos of the size that all are of."""
    monkeypatch.chdir(Path(__file__).parents[1])
    default = bench.BenchConfig()
    model = bench.reward_model(default)
    assert model.config == load(RewardConfig, Path("configs/reward/sandbox.yaml")).model
    (clip,) = bench._clips(default, 1)
    with torch.no_grad():
        assert model(model.encode([clip], [bench.PROMPT])).values.isfinite().all()


def test_a_judge_that_is_not_timed_is_named(tmp_path, capsys):
    settings = {"data": {"path": "none"}, "model": {"backbone": {"kind": "vlm", "encoder": "none"}}}
    (tmp_path / "vlm.yaml").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match="2"):
        bench.main(["judge", f"reward={tmp_path / 'vlm.yaml'}"])
    assert "kind=vlm: expected dual" in capsys.readouterr().err


def test_a_single_score_has_one_token_and_no_less_of_anything_else(config):
    whole, single = bench.reward_model(config), bench.single_score(bench.reward_model(config))
    counts = [sum(p.numel() for p in model.parameters()) for model in (whole, single)]
    assert counts[0] - counts[1] == 17 * 128


def test_a_data_set_is_as_large_as_asked(tmp_path):
    """6 videos of 2 prompts: 3 + 1 pairs; without video files, the same."""
    for content in (b"content", None):
        source = bench.write_data(tmp_path / str(content), 6, content).model_copy(update={"validation_share": 0.0})
        data = preferences.load(source)
        clips = data.videos("train")
        assert (len(data.pairs("train")), len(data.prompts("train")), len(clips)) == (4, 2, 6)
        assert {clip.path.read_bytes() if clip.path.exists() else None for clip in clips} == {content}


def test_the_peak_of_torch_is_what_was_held_at_once():
    """4000 bytes, then 8000 more, of which 8000 go before another 2000: the peak is 12000, and some for scalars."""

    def work():
        kept = torch.empty(1000)
        gone = torch.empty(2000)
        del gone
        return kept, torch.empty(500)

    assert 12_000 <= bench.allocated_peak(work) < 12_100


def test_the_peak_of_python_is_what_was_held_at_once():
    def work():
        kept, gone = bytearray(100_000), bytearray(200_000)
        del gone
        return kept, bytearray(50_000)

    assert 300_000 <= bench.traced_peak(work) < 320_000


def test_the_fastest_repeat_of_each_work_counts_and_works_take_turns():
    """The core is busy for 0.2, 0.02 and 0.2 s, and hardly at all in between."""
    busy_seconds, order = iter([0.2, 0.02, 0.2]), []

    def work():
        order.append("busy")
        until = time.process_time() + next(busy_seconds)
        while time.process_time() < until:
            pass

    busy, idle = bench._by_turns(bench.BenchConfig(), work, lambda: order.append("idle"))
    assert 0.02 <= busy < 0.1
    assert idle < 0.02
    assert order == ["busy", "idle"] * 3


def test_the_sample_strobes_on_its_left():
    frames = bench.sample_video(16, 16, 4).frames
    left, right = frames[..., :8, :].mean(axis=(1, 2, 3)), frames[..., 8:, :].mean(axis=(1, 2, 3))
    assert abs(left[0] - left[1]) > 100 > 20 > abs(right[0] - right[1])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["flush"], "flush"),
        (["render", "model=nowhere"], "nowhere: no such folder"),
        (["judge", "reward=nowhere.yaml"], "nowhere.yaml: "),
        (["read", "width=15"], "even width and height, got 15x480"),
        (["index_sizes=[40,6]"], "index_sizes=[40, 6]: expected rising sizes"),
        (["index_sizes=[1,6]"], "index_sizes=[1, 6]: expected rising sizes"),
    ],
)
def test_what_cannot_be_used_is_named(capsys, arguments, told):
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert told in capsys.readouterr().err
