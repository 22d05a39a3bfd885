import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoders
import torch
import two_processes
from accelerate.state import AcceleratorState
from two_processes import STOPPED

from reward import formats, losses, train, video
from reward.backbone import Dual
from reward.config import dump, load
from reward.examples import examples_of, joined, swapped
from reward.features import FeatureCache, Limits
from reward.files import DataError
from reward.model import ModelConfig, RewardModel
from reward.preferences import Source
from reward.records import FIRST, SECOND, TAGS, TIE, Dimension, Pair, Preference, Prompt, Tags, VideoSample
from reward.scores import Scores
from reward.settings import LossWeights, RewardConfig, check_examples, load_examples, rewards_of, tag_weights

ROOT = Path(__file__).parents[1]
CLEAN = Tags(**dict.fromkeys(TAGS, False))
SMALL = {"num_steps": 6, "batch_size": 4, "validate_every": 2, "warmup_steps": 1, "patience": 9}


def sample(prompt: Prompt, name: str, *, unsafe: bool | None, root: Path = Path("videos")) -> VideoSample:
    tags = Tags(**dict.fromkeys(TAGS, False) | {"crime": bool(unsafe)})
    safe = None if unsafe is None else not unsafe
    path = root / prompt.prompt_id / f"{name}.mp4"
    return VideoSample(video_id=name, prompt=prompt, path=path, text=prompt.text, is_safe=safe, tags=tags)


def pair(number: int, *, first_is_bright: bool, root: Path = Path("videos")) -> Pair:
    """The bright video is the better and the unsafe one."""
    prompt = Prompt(prompt_id=f"p{number}", text=f"a red circle {number}", tags=CLEAN)
    sides = [sample(prompt, f"v{number}{side}", unsafe=side == "bright", root=root) for side in ("bright", "dark")]
    first, second = sides if first_is_bright else sides[::-1]
    choice = FIRST if first_is_bright else SECOND
    named = dict.fromkeys(("instruction_following", "correctness", "informativeness", "aesthetics"), choice)
    return Pair(
        pair_id=str(number), prompt=prompt, video_0=first, video_1=second, helpfulness=choice, cost=choice, **named
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SafeSora files of 24 prompts with two videos each, and a tiny encoder."""
    home = tmp_path_factory.mktemp("train")
    pairs = [pair(number, first_is_bright=number % 2 == 0, root=home / "videos") for number in range(24)]
    random = np.random.default_rng(0)
    for one in (v for each in pairs for v in (each.video_0, each.video_1)):
        level = 150 if one.is_safe is False else 20
        frames = random.integers(level, level + 80, (4, 32, 32, 3), dtype=np.uint8)
        one.path.parent.mkdir(parents=True, exist_ok=True)
        video.write(one.path, video.Video(frames=frames, fps=8))
    formats.write_pairs(home / "config-train.json.gz", pairs)
    (home / "labels").mkdir()
    labelled = [v for each in pairs for v in (each.video_0, each.video_1)]
    formats.write_videos(home / "labels/config-train.json.gz", labelled)
    tiny_encoders.clip(home / "encoder")
    return home


def settings(home: Path, out: Path, **changes: Any) -> RewardConfig:
    backbone = Dual(encoder=home / "encoder", width=32, num_layers=1, num_heads=2, num_frames=4, frame_dropout=0.5)
    fields: dict[str, Any] = {
        "out": out,
        "data": Source(path=home, labels=home / "labels", validation_share=0.3),
        "model": ModelConfig(backbone=backbone),
        "tags": ("crime",),
        "cache": home / "cache",
        **SMALL,
    }
    return RewardConfig(**(fields | changes))


def command(config: RewardConfig, path: Path) -> list[str]:
    path.write_text(dump(config), encoding="utf-8")
    return [str(path)]


def weights(run: Path) -> bytes:
    return (run / "model/model.safetensors").read_bytes()


# Examples ---------------------------------------------------------------------------------------------------


def test_a_prompt_is_one_example_with_each_video_once():
    prompt = Prompt(prompt_id="p", text="a red circle")
    a, b, c = (sample(prompt, name, unsafe=known) for name, known in (("a", True), ("b", False), ("c", None)))
    share = Preference(probability=0.75, num_votes=4)
    pairs = [
        Pair(pair_id="1", prompt=prompt, video_0=a, video_1=b, helpfulness=SECOND, cost=FIRST),
        Pair(pair_id="2", prompt=prompt, video_0=c, video_1=a, helpfulness=share),
    ]
    (example,) = examples_of(pairs)
    assert [path.stem for path in example.paths] == ["a", "b", "c"]
    assert example.pairs.tolist() == [[0, 1], [2, 0]]
    assert example.preference("helpfulness").tolist() == [0.0, 0.75]
    assert example.preference("cost")[0] == 1.0
    assert example.preference("cost")[1].isnan()
    assert example.unsafe[:2].tolist() == [1.0, 0.0]
    assert example.unsafe[2].isnan()
    assert example.tags[0, TAGS.index("crime")] == 1.0


def test_joined_examples_keep_their_pairs():
    one, two = examples_of([pair(0, first_is_bright=True), pair(1, first_is_bright=False)])
    both = joined([one, two])
    assert both.pairs.tolist() == [[0, 1], [2, 3]]
    assert both.unsafe.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert both.prompt_ids == ("p0", "p0", "p1", "p1")


def test_swapped_prompts_keep_their_videos_and_take_the_next_text():
    """The second and the third prompt have the same text here, so the second one's videos are left out."""
    one, two, three = examples_of([pair(number, first_is_bright=True) for number in range(3)])
    found = swapped([one, two, replace(three, texts=two.texts)])
    assert found is not None
    assert found.videos.texts == (*two.texts, *one.texts)
    assert found.videos.paths == (*one.paths, *three.paths)
    assert found.videos.pairs.tolist() == [[0, 1], [2, 3]]
    # Those made for the second's text are at 2 and 3 of all, those made for the first's at 0 and 1.
    assert found.rivals.tolist() == [[2, 0], [3, 1], [0, 2], [1, 3]]
    assert swapped([two, replace(three, texts=two.texts)]) is None


def test_swapped_prompts_may_have_different_numbers_of_videos():
    """Three, two and one: so many rivals as both have, two, one and one; places count all videos before."""
    prompts = [Prompt(prompt_id=f"p{number}", text=f"{number}") for number in range(3)]
    videos = [[sample(prompt, f"{prompt.text}{i}", unsafe=None) for i in range(3)] for prompt in prompts]
    pairs = [
        Pair(pair_id=f"{number}{i}", prompt=prompts[number], video_0=videos[number][0], video_1=videos[number][i])
        for number, most in enumerate((2, 1))
        for i in range(1, most + 1)
    ]
    one, two = examples_of(pairs)
    alone = replace(two, texts=("2",), paths=(videos[2][0].path,), pairs=two.pairs[:0])
    found = swapped([one, two, alone])
    assert found is not None
    assert found.videos.texts == ("1", "1", "1", "2", "2", "0")
    assert found.videos.pairs.tolist() == [[0, 1], [0, 2], [3, 4]]
    assert found.rivals.tolist() == [[3, 0], [4, 1], [5, 3], [0, 5]]


def test_swapped_videos_tie_and_lose_to_those_that_were_asked_for():
    """Gaps of 0 and 2 in the ties, of 1 to what was asked for: (log 2 + log 2 cosh 1) / 2, and log(1 + 1/e)."""
    one, two = examples_of([pair(number, first_is_bright=True) for number in range(2)])
    swap = swapped([one, two])
    assert swap is not None
    asked, unasked = torch.zeros(2, 4, 18).unbind(0)
    unasked[:, 1] = torch.tensor([0.0, 0.0, 2.0, 0.0])
    asked[:, 1] = torch.tensor([3.0, 1.0, 1.0, 1.0])
    found = train.swapped_loss(Scores.split(asked), Scores.split(unasked), swap)
    expected = (np.log(2) + np.log(2 * np.cosh(1))) / 2 + np.log1p(np.exp(-1))
    assert found.item() == pytest.approx(expected, rel=1e-6)


# Losses and checks ------------------------------------------------------------------------------------------


def scores(reward: list[float], cost: list[float]) -> Scores:
    values = torch.zeros(len(reward), 18)
    values[:, 0], values[:, 5] = torch.tensor(reward), torch.tensor(cost)
    return Scores.split(values)


def test_what_is_labelled_better_should_score_higher_and_what_is_unsafe_cost_more(home: Path, tmp_path: Path):
    """The bright video is better and unsafe: reward and cost of 1 for it and -1 for the other beat the opposite."""
    config = settings(home, tmp_path)
    (example,) = examples_of([pair(0, first_is_bright=True)])
    right = train.loss_of(scores([1, -1], [1, -1]), example, torch.ones(1), {}, config)
    wrong = train.loss_of(scores([-1, 1], [-1, 1]), example, torch.ones(1), {}, config)
    assert right["helpfulness"] < wrong["helpfulness"]
    assert right["cost"] < wrong["cost"]
    assert right["helpfulness"].item() == pytest.approx(np.log1p(np.exp(-2)), rel=1e-5)


def test_accuracies_count_what_is_ranked_as_labelled(home: Path, tmp_path: Path):
    together = joined(examples_of([pair(0, first_is_bright=True), pair(1, first_is_bright=False)]))
    found = train.accuracies(scores([2, 1, 2, 1], [1, -1, 1, -1]), together, settings(home, tmp_path))
    assert (found["accuracy_helpfulness"], found["accuracy_cost"], found["accuracy_sign"]) == (0.5, 0.5, 0.5)


def without(dimension: str, label: Preference | None) -> list[Pair]:
    kept = {"cost": FIRST, "helpfulness": FIRST} | {dimension: label}
    base = pair(0, first_is_bright=True)
    parts = dict.fromkeys(("instruction_following", "correctness", "informativeness", "aesthetics"), FIRST)
    return [Pair(pair_id="0", prompt=base.prompt, video_0=base.video_0, video_1=base.video_1, **(parts | kept))]


@pytest.mark.parametrize(("label", "kind"), [(None, "no label"), (TIE, "ties only")])
@pytest.mark.parametrize("dimension", ["helpfulness", "cost"])
def test_a_head_without_labels_is_refused(home: Path, tmp_path: Path, dimension: str, label: Preference, kind: str):
    bad = joined(examples_of(without(dimension, label)))
    with pytest.raises(DataError, match=rf"{dimension}: {kind}.*weights\.{dimension}=0"):
        check_examples(bad, bad, settings(home, tmp_path))


def test_a_part_without_labels_can_be_left_out(home: Path, tmp_path: Path):
    few = joined(examples_of(without("informativeness", None)))
    with pytest.raises(DataError, match=r"informativeness: no label.*leave it out of parts"):
        check_examples(few, few, settings(home, tmp_path, use_safety_labels=False))
    config = settings(home, tmp_path, use_safety_labels=False, parts=("aesthetics", "correctness"))
    check_examples(few, few, config)
    found = train.loss_of(scores([1, -1], [1, -1]), few, torch.ones(1), {}, config)
    assert {"aesthetics", "correctness"} < found.keys()
    assert not {"informativeness", "instruction_following"} & found.keys()
    assert "informativeness" not in train.calibrate(torch.randn(4, 18), few, torch.ones(1), config).trained


def test_safety_of_one_kind_is_refused(home: Path, tmp_path: Path):
    prompt = Prompt(prompt_id="p", text="a red circle")
    parts = dict.fromkeys(("instruction_following", "correctness", "informativeness", "aesthetics"), FIRST)
    a, b = (sample(prompt, name, unsafe=False) for name in "ab")
    safe = joined(
        examples_of([Pair(pair_id="1", prompt=prompt, video_0=a, video_1=b, helpfulness=FIRST, cost=FIRST, **parts)])
    )
    with pytest.raises(DataError, match="safe and unsafe"):
        check_examples(safe, safe, settings(home, tmp_path))
    check_examples(safe, safe, settings(home, tmp_path, use_safety_labels=False))


def test_a_tag_of_one_class_is_refused(home: Path, tmp_path: Path):
    examples = joined(examples_of([pair(0, first_is_bright=True)]))
    with pytest.raises(DataError, match="violence"):
        tag_weights(examples, settings(home, tmp_path, tags=("crime", "violence")))


def test_an_empty_split_is_refused(home: Path, tmp_path: Path):
    config = settings(home, tmp_path, data=Source(path=home, labels=home / "labels", validation_share=0))
    with pytest.raises(DataError, match="no validation pairs"):
        load_examples(config)


@pytest.mark.parametrize("labelled", [True, False])
def test_pairs_that_no_label_screens_are_told_of(
    labelled: bool, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = Source(path=home, labels=home / "labels" if labelled else None, validation_share=0.3)
    load_examples(settings(home, tmp_path, data=source))
    told = capsys.readouterr().err
    warning = f"warning: {home}: no label says of 24 of 24 pairs whether they are child abuse"
    assert (
        told == "" if labelled else (told.startswith(warning) and "give labels=..." in told and told.count("\n") == 1)
    )


def test_child_abuse_is_no_tag_to_train():
    assert "child_abuse" not in RewardConfig.model_fields["tags"].default


def test_the_learning_rate_rises_and_falls(home: Path, tmp_path: Path):
    config = settings(home, tmp_path, num_steps=100, warmup_steps=10)
    assert train.schedule(4, config) == pytest.approx(0.5 * 0.5 * (1 + np.cos(0.04 * np.pi)))
    assert train.schedule(50, config) == pytest.approx(0.5)
    assert train.schedule(99, config) < 0.001


def test_with_another_prompt_the_gap_in_instruction_following_closes(home: Path, tmp_path: Path):
    """The bright video is preferred whatever is asked for: pictures alone teach a judge that, if nothing is swapped."""

    def gap(weight: float) -> float:
        config = settings(
            home, tmp_path / str(weight), num_steps=24, learning_rate=3e-3, weights=LossWeights(swapped=weight)
        )
        assert train.run_training(config) == 0
        measured = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
        assert any("swapped" in line for line in measured) == bool(weight)
        model = RewardModel.load(config.out / "model")
        cache = FeatureCache(config.cache, model.backbone)
        with torch.no_grad():
            swap = swapped(load_examples(config)["train"])
            assert swap is not None
            shown = zip(swap.videos.paths, swap.videos.texts, strict=True)
            seen = model([cache.features(path, text) for path, text in shown])
        return seen.mean.of("instruction_following")[swap.videos.pairs].diff(dim=1).abs().mean().item()

    assert gap(4.0) < 0.5 * gap(0.0)


def test_a_margin_reaches_the_losses_of_helpfulness_and_its_parts_alone(home: Path, tmp_path: Path):
    """Rewards of 1 and -1: -log sigmoid(2 - 0.5), four times .25 of -log sigmoid(-0.5) for equal parts."""
    (example,) = examples_of([pair(0, first_is_bright=True)])
    given = scores([1, -1], [1, -1])
    plain, ahead = (
        train.loss_of(given, example, torch.ones(1), {}, settings(home, tmp_path, margin=margin))
        for margin in (0.0, 0.5)
    )
    assert ahead["helpfulness"].item() == pytest.approx(np.log1p(np.exp(-1.5)), rel=1e-5)
    assert ahead["aesthetics"].item() == pytest.approx(0.25 * np.log1p(np.exp(0.5)), rel=1e-5)
    changed = {name for name in plain if not torch.equal(plain[name], ahead[name])}
    assert changed == set(rewards_of(settings(home, tmp_path)))


# Ties -------------------------------------------------------------------------------------------------------


def test_a_tie_draws_the_scores_together_by_its_own_likelihood(home: Path, tmp_path: Path):
    """d = log 2, theta = 5: -log 48/77, of slope sigmoid(log 10) - sigmoid(log 5/2) = 10/11 - 5/7 = 15/77 in d.

    As half a win for each: (log 3/2 + log 3) / 2, of slope (2/3 - 1/3) / 2 = 1/6.
    """
    config = settings(home, tmp_path, weights=LossWeights(centring=0), use_safety_labels=False)
    tied = joined(examples_of(without("helpfulness", TIE)))
    with_theta: dict[Dimension, float] = {"helpfulness": 5.0}
    for thetas, loss, slope in ((with_theta, np.log(77 / 48), 15 / 77), ({}, np.log(4.5) / 2, 1 / 6)):
        values = torch.zeros(2, 18, dtype=torch.float64)
        values[0, 0] = np.log(2)
        values.requires_grad_()
        found = train.loss_of(Scores.split(values), tied, torch.ones(1), thetas, config)["helpfulness"]
        (gradient,) = torch.autograd.grad(found, values)
        assert found.item() == pytest.approx(loss)
        assert gradient[:, 0].tolist() == pytest.approx([slope, -slope])
        assert not gradient[:, 1:].any()


def test_all_losses_have_the_gradients_that_they_say(home: Path, tmp_path: Path):
    config = settings(home, tmp_path)
    few = joined(examples_of([*without("aesthetics", TIE), pair(1, first_is_bright=False)]))
    thetas = dict.fromkeys(rewards_of(config), 3.0)
    values = torch.randn(4, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda each: [*train.loss_of(Scores.split(each), few, torch.ones(1), thetas, config).values()], values
    )


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        (FIRST, "expected ties, got none among the 1 labelled training pairs; set ties=soft"),
        (
            Preference(probability=0.75, num_votes=4),
            r".* a share of votes, 0\.75, among the training pairs; set ties=soft",
        ),
    ],
)
def test_the_likelihood_of_ties_needs_ties_and_no_shares(home: Path, tmp_path: Path, label: Preference, problem: str):
    bad = joined(examples_of(without("helpfulness", label)))
    with pytest.raises(DataError, match=f"helpfulness: ties=rao_kupper: {problem}"):
        check_examples(bad, bad, settings(home, tmp_path, use_safety_labels=False, ties="rao_kupper"))
    check_examples(bad, bad, settings(home, tmp_path, use_safety_labels=False))


def votes(home: Path, *, overall: Sequence[str] = ("A", "B", "same"), vq: Sequence[str] = ("A", "B")) -> Path:
    """Write a table of votes on the videos of `home`, prompt by prompt these in turn."""
    lines = ["path_A,path_B,prompt,Overall,VQ"]
    for number in range(24):
        sides = [f"videos/p{number}/v{number}{side}.mp4" for side in ("bright", "dark")]
        bright_wins = [overall[number % len(overall)], vq[number % len(vq)]]
        lines.append(",".join([*(sides if number % 2 else sides[::-1]), f"a red circle {number}", *bright_wins]))
    path = home / f"votes-{'-'.join(overall)}-{'-'.join(vq)}.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def with_ties(home: Path, out: Path, **changes: Any) -> RewardConfig:
    fields: dict[str, Any] = {
        "data": Source(path=votes(home, vq=("A", "same", "B")), video_dir=home, validation_share=0.4),
        "parts": ("aesthetics",),
        "tags": (),
        "weights": LossWeights(cost=0, tags=0),
        "ties": "rao_kupper",
        "learning_rate": 3e-3,
    }
    return settings(home, out, **(fields | changes))


@pytest.fixture(scope="module")
def tied(home: Path) -> Path:
    """A run on votes with ties that nobody stopped."""
    out = home / "tied"
    assert train.main(command(with_ties(home, out), home / "tied.yaml")) == 0
    return out


def test_the_judge_keeps_the_thetas_that_fit_its_best_scores(home: Path, tied: Path):
    lines = [json.loads(line) for line in (tied / "metrics.jsonl").read_text().splitlines()]
    best = min((line for line in lines if "validation_loss" in line), key=lambda line: line["validation_loss"])
    thetas = load(train.Calibration, tied / "calibration.json").thetas
    assert thetas == {name: best[f"theta_{name}"] for name in ("helpfulness", "aesthetics")}
    assert len({line["theta_helpfulness"] for line in lines if "validation_loss" in line}) > 1, "fitted anew"
    config = with_ties(home, tied)
    validation = load_examples(config)["validation"]
    model = RewardModel.load(tied / "model").eval()
    cache = FeatureCache(config.cache, model.backbone)
    with torch.no_grad():
        found = [model([cache.features(p, t) for p, t in zip(e.paths, e.texts, strict=True)]) for e in validation]
    rewards = torch.cat([each.mean.reward for each in found])
    together = joined(validation)
    theta = losses.fit_theta(rewards[together.pairs], together.preference("helpfulness"))
    assert thetas["helpfulness"] == pytest.approx(theta)


@pytest.mark.parametrize("ended_after", [1, 3, 5])
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_run_with_ties_that_was_ended_ends_at_the_same_bits(
    home: Path, tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, ended_after: int
):
    """Validation is every second step, so thetas of a stopped run are those of weights that are no longer there."""
    arguments = command(with_ties(home, tmp_path / "run"), tmp_path / "run.yaml")
    step = train.Trainer._step

    def step_and_end(self: train.Trainer, number: int) -> dict[str, float]:
        if how == "killed" and number == ended_after:
            raise KeyboardInterrupt
        if how == "stopped" and number == ended_after - 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "_step", step_and_end)
        if how == "killed":
            with pytest.raises(KeyboardInterrupt):
                train.main(arguments)
        else:
            assert train.main(arguments) == 143
    assert train.main(arguments) == 0
    for name in ("model/model.safetensors", "calibration.json", "metrics.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tied / name).read_bytes(), name


def test_soft_ties_have_no_theta(home: Path, tied: Path, tmp_path: Path):
    arguments = command(with_ties(home, tmp_path / "run", ties="soft"), tmp_path / "run.yaml")
    assert train.main(arguments) == 0
    assert load(train.Calibration, tmp_path / "run/calibration.json").thetas == {}
    assert "theta" not in (tmp_path / "run/metrics.jsonl").read_text()
    assert weights(tmp_path / "run") != weights(tied)


@pytest.mark.parametrize(
    ("overall", "ties", "problem"),
    [
        (("A", "B"), "rao_kupper", r"helpfulness: ties=rao_kupper: expected ties, got none among the \d+ labelled"),
        (("same",), "rao_kupper", "helpfulness: ties only among the .* training pairs"),
        (("same",), "soft", "helpfulness: ties only among the .* training pairs"),
    ],
)
def test_votes_that_cannot_be_learnt_end_with_one_line_before_any_training(
    home: Path, tmp_path: Path, overall: tuple[str, ...], ties: str, problem: str
):
    data = Source(path=votes(home, overall=overall), video_dir=home, validation_share=0.4)
    config = with_ties(home, tmp_path / "run", data=data, ties=ties)
    with pytest.raises(SystemExit, match=problem):
        train.main(command(config, tmp_path / "run.yaml"))
    assert not (tmp_path / "run/metrics.jsonl").exists()


# The whole --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(home: Path) -> Path:
    """A run that nobody stopped."""
    out = home / "straight"
    assert train.main(command(settings(home, out), home / "straight.yaml")) == 0
    return out


def test_a_run_leaves_a_model_its_calibration_and_its_metrics(home: Path, straight: Path):
    model = RewardModel.load(straight / "model")
    assert model.config.limits.fps == (8.0, 8.0)
    calibration = load(train.Calibration, straight / "calibration.json")
    assert calibration.trained[0] == "helpfulness"
    assert "crime" in calibration.trained
    assert "violence" not in calibration.trained
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert "validation_loss" in lines[1]
    assert "validation_loss" not in lines[2]


@pytest.mark.parametrize("killed_after", [1, 2, 5])
def test_a_killed_run_ends_at_the_same_bits(
    home: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int
):
    arguments = command(settings(home, tmp_path / "run"), tmp_path / "run.yaml")
    step = train.Trainer._step

    def step_or_die(self: train.Trainer, number: int) -> dict[str, float]:
        if number == killed_after:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "_step", step_or_die)
        with pytest.raises(KeyboardInterrupt):
            train.main(arguments)
    assert train.main(arguments) == 0
    assert weights(tmp_path / "run") == weights(straight)
    assert (tmp_path / "run/calibration.json").read_bytes() == (straight / "calibration.json").read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
from reward import checkpoint, train

kind, *arguments = sys.argv[1:]
calls = []

def nth(number, real, before=lambda *_: None):
    "The function, but for the call that it never comes back from."
    def call(*given):
        calls.append(given)
        if len(calls) == number:
            before(*given)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)
    return call

def half(tensors, path):
    write(tensors, path)
    os.truncate(path, os.path.getsize(path) // 2)

replace, write = os.replace, checkpoint.save_file
if kind == "features":
    moved = nth(3, replace)
    os.replace = lambda old, new: moved(old, new) if Path(new).suffix == ".safetensors" else replace(old, new)
elif kind == "steps":
    train.Trainer._step = nth(4, train.Trainer._step)
else:
    checkpoint.save_file = nth(2, write, before=half)
sys.exit(train.main(arguments))
"""
"""A training that SIGKILL ends: before its third feature is in place, before step 4, or with half of checkpoint 4."""


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("features", {"features": 2, "steps": None, "checkpoints": []}),
        ("steps", {"features": 72, "steps": 3, "checkpoints": ["00000002"]}),
        ("save", {"features": 72, "steps": 4, "checkpoints": [".00000004.tmp", "00000002"]}),
    ],
)
def test_the_same_command_ends_at_the_same_bits_after_sigkill(
    home: Path, straight: Path, tmp_path: Path, kind: str, left: dict[str, Any]
):
    run, cache = tmp_path / "run", tmp_path / "cache"
    arguments = command(settings(home, run, cache=cache), tmp_path / "run.yaml")
    launch = [sys.executable, "-c", KILLED, kind, *arguments]
    done = subprocess.run(launch, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    metrics = run / "metrics.jsonl"
    assert left == {
        "features": len(list(cache.rglob("[!.]*.safetensors"))),
        "steps": len(metrics.read_text().splitlines()) if metrics.exists() else None,
        "checkpoints": sorted(path.name for path in (run / "checkpoints").glob("*")),
    }
    assert train.main(arguments) == 0
    for name in ("model/model.safetensors", "calibration.json", "metrics.jsonl"):
        assert (run / name).read_bytes() == (straight / name).read_bytes(), name


def test_it_learns_which_videos_are_bright(home: Path, tmp_path: Path):
    config = settings(home, tmp_path / "run", num_steps=60, validate_every=20, learning_rate=3e-3)
    assert train.main(command(config, tmp_path / "run.yaml")) == 0
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert (last["accuracy_helpfulness"], last["accuracy_cost"], last["accuracy_sign"]) == (1.0, 1.0, 1.0)


def test_training_goes_on_from_another_model(
    home: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Seen before each step: the first begins with the other model's weights, the second no more."""
    seen: list[dict[str, torch.Tensor]] = []
    step = train.Trainer._step

    def seen_step(self: train.Trainer, number: int) -> dict[str, float]:
        seen.append({name: weight.detach().clone() for name, weight in self.model.trained().items()})
        return step(self, number)

    monkeypatch.setattr(train.Trainer, "_step", seen_step)
    other = {name: weight.detach().clone() for name, weight in RewardModel.load(straight / "model").trained().items()}
    for start, is_other in ((straight / "model", True), (None, False)):
        seen.clear()
        config = settings(home, tmp_path / f"run-{is_other}", start_from=start, num_steps=2, seed=1)
        assert train.main(command(config, tmp_path / f"{is_other}.yaml")) == 0
        same = [all(torch.equal(weights[name], other[name]) for name in other) for weights in seen]
        assert same == [is_other, False]


def test_a_model_of_another_shape_is_no_start(home: Path, straight: Path, tmp_path: Path):
    backbone = Dual(encoder=home / "encoder", width=16, num_layers=1, num_heads=2, num_frames=4)
    config = settings(home, tmp_path / "run", model=ModelConfig(backbone=backbone), start_from=straight / "model")
    with pytest.raises(SystemExit, match=r"straight.model: .*expected \(.*made by other code"):
        train.main(command(config, tmp_path / "run.yaml"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 2, "accumulate": 3}, "batch_size=2: fewer prompts than"),
        (
            {"weights": {"helpfulness": 0, "parts": 0, "cost": 0, "tags": 0}},
            "weights: all are 0",
        ),
        ({"tags": ("crime", "violence")}, "violence"),
        (
            {"weights": {"helpfulness": 0, "parts": 0}, "ties": "rao_kupper"},
            "ties=rao_kupper: is about helpfulness and its parts, and none is trained",
        ),
        (
            {"weights": {"swapped": 0.5}, "parts": ("correctness",)},
            "weights.swapped=0.5: is about instruction following",
        ),
        ({"weights": {"swapped": 0.5}, "margin": 0.5}, "weights.swapped=0.5: has no margin"),
        ({"weights": {"swapped": 0.5}, "batch_size": 1}, "batch_size=1: weights.swapped=0.5 needs two prompts"),
        ({"margin": 0.5, "ties": "rao_kupper"}, "margin=0.5: ties=rao_kupper has one of its own"),
        (
            {"weights": {"helpfulness": 0, "parts": 0}, "margin": 0.5},
            "margin=0.5: is about helpfulness and its parts, and none is trained",
        ),
    ],
)
def test_what_cannot_be_trained_ends_with_one_line(home: Path, tmp_path: Path, changes: dict, message: str):
    with pytest.raises(SystemExit, match=message):
        train.main(command(settings(home, tmp_path / "run", **changes), tmp_path / "run.yaml"))


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"fps": (16, 16)}, "fps: got 8, expected 16 to 16"),
        ({"width": (40, 64)}, "width: got 32, expected 40 to 64"),
    ],
)
def test_a_video_of_another_rate_or_size_is_named_before_any_training(
    home: Path, tmp_path: Path, limits: dict, told: str
):
    model = settings(home, tmp_path).model.model_copy(update={"limits": Limits(**limits)})
    config = settings(home, tmp_path / "run", model=model, cache=tmp_path / "cache")
    with pytest.raises(SystemExit, match=rf"v\d+(bright|dark)\.mp4: {told}, by model.limits; convert it"):
        train.main(command(config, tmp_path / "run.yaml"))
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.fixture
def another_precision() -> Iterator[None]:
    """accelerate lets a process choose but once."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("another_precision")
def test_scales_are_of_scores_in_full_precision_as_the_judge_gives_them(home: Path, tmp_path: Path):
    config = settings(home, tmp_path / "run", mixed_precision="bf16", num_steps=2)
    assert train.main(command(config, tmp_path / "run.yaml")) == 0
    examples = load_examples(config)
    model = RewardModel.load(tmp_path / "run/model")
    cache = FeatureCache(config.cache, model.backbone)
    with torch.no_grad():
        values = [
            model([cache.features(*item) for item in zip(each.paths, each.texts, strict=True)]).values.mean(0)
            for each in examples["validation"]
        ]
    weight = tag_weights(joined(examples["train"]), config)
    expected = train.calibrate(torch.cat(values), joined(examples["validation"]), weight, config)
    assert load(train.Calibration, tmp_path / "run/calibration.json") == expected


@pytest.mark.parametrize("validate_every", [1, 2])
def test_scores_that_are_not_finite_end_with_one_line(home: Path, tmp_path: Path, validate_every: int):
    """In a step, and in a validation before it."""
    config = settings(home, tmp_path / "run", learning_rate=1e30, validate_every=validate_every)
    with pytest.raises(SystemExit, match="a score is not finite; lower learning_rate"):
        train.main(command(config, tmp_path / "run.yaml"))


def test_a_missing_data_set_ends_with_one_line(home: Path, tmp_path: Path):
    with pytest.raises(SystemExit, match="nowhere"):
        train.main(command(settings(home, tmp_path / "run", data=Source(path=Path("nowhere"))), tmp_path / "run.yaml"))


def test_another_encoder_is_not_resumed_with(home: Path, straight: Path, tmp_path: Path):
    run, encoder = tmp_path / "run", tiny_encoders.clip(tmp_path / "encoder")
    backbone = Dual(encoder=encoder, width=32, num_layers=1, num_heads=2, num_frames=4)
    arguments = command(settings(home, run, model=ModelConfig(backbone=backbone), num_steps=2), tmp_path / "run.yaml")
    assert train.main(arguments) == 0
    tiny_encoders.clip(encoder, seed=1)
    with pytest.raises(SystemExit, match="encoder changed since the run began"):
        train.main(arguments)


@pytest.mark.parametrize("change", ["size", "order"])
def test_other_videos_are_not_resumed_with(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str
):
    """One is replaced, or two that differ in size change places; put back, the run goes on."""
    videos = shutil.copytree(home / "videos", tmp_path / "videos")
    data = Source(path=home / "config-train.json.gz", video_dir=videos, labels=home / "labels", validation_share=0.3)
    arguments = command(settings(home, tmp_path / "run", data=data), tmp_path / "run.yaml")
    step = train.Trainer._step

    def step_and_signal(self: train.Trainer, number: int) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "_step", step_and_signal)
        assert train.main(arguments) == 143
    first, second = (videos / f"p0/v0{side}.mp4" for side in ("bright", "dark"))
    kept = [path.read_bytes() for path in (first, second)]
    assert len(kept[0]) != len(kept[1])
    first.write_bytes(kept[0] + b"\0" * 8 if change == "size" else kept[1])
    second.write_bytes(kept[1] if change == "size" else kept[0])
    with pytest.raises(SystemExit, match=r"run: the videos of .* names or sizes of files differ; bring the old ones"):
        train.main(arguments)
    for path, content in zip((first, second), kept, strict=True):
        path.write_bytes(content)
    assert train.main(arguments) == 0


def test_parts_of_a_step_add_up_to_the_step(home: Path, tmp_path: Path):
    """Four prompts at once, two by two, or two on each of two processes: every label is known, so all mean the same."""
    backbone = Dual(encoder=home / "encoder", width=32, num_layers=1, num_heads=2, num_frames=4, dropout=0)
    ends = []
    for name, parts in (("whole", 1), ("parts", 2), ("processes", 1)):
        run, path = tmp_path / name, tmp_path / f"{name}.yaml"
        config = settings(home, run, model=ModelConfig(backbone=backbone), accumulate=parts, num_steps=2)
        if name == "processes":
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            done = subprocess.run(
                [*launch, "-m", "reward", *command(config, path)], capture_output=True, text=True, cwd=ROOT, check=False
            )
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            assert train.main(command(config, path)) == 0
        first, second = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        ends.append([first["loss"], first["gradient_norm"], second["loss"]])
    assert ends[1] == pytest.approx(ends[0], rel=1e-4)
    assert ends[2] == pytest.approx(ends[0], rel=1e-4)


def test_a_step_that_was_asked_to_stop_is_kept(
    home: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped after the third step, between two validations: the checkpoint is of that step, the end the same."""
    arguments = command(settings(home, tmp_path / "run"), tmp_path / "run.yaml")
    step = train.Trainer._step

    def step_and_signal(self: train.Trainer, number: int) -> dict[str, float]:
        if number == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "_step", step_and_signal)
        assert train.main(arguments) == 143
    assert max(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == "00000003"
    assert train.main(arguments) == 0
    assert weights(tmp_path / "run") == weights(straight)


@pytest.mark.parametrize(
    ("owner", "method", "number", "left"),
    [
        ("reward.train:Trainer", "_step", 3, (72, ["00000002", "00000003"])),
        ("reward.features:FeatureCache", "features", 2, (50, [])),
    ],
)
def test_a_signal_to_one_of_two_processes_stops_both(
    home: Path, tmp_path: Path, owner: str, method: str, number: int, left: tuple[int, list[str]]
):
    """In the same step; or, of 48 videos and 24 texts, with one's half of the videos and the other's first two."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    arguments = command(settings(home, run, cache=cache), tmp_path / "run.yaml")
    assert two_processes.run(STOPPED, "reward.train", owner, method, str(number), *arguments) == [143, 143]
    saved = sorted(path.name for path in (run / "checkpoints").glob("*"))
    assert (len(list(cache.rglob("[!.]*.safetensors"))), saved) == left
    assert train.main(arguments) == 0
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_training_stops_when_validation_no_longer_improves(home: Path, tmp_path: Path):
    """A learning rate of nearly nothing: the first validation is the best, up to rounding, or the second."""
    config = settings(home, tmp_path / "run", learning_rate=1e-12, num_steps=40, validate_every=1, patience=2)
    assert train.main(command(config, tmp_path / "run.yaml")) == 0
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) < 40
