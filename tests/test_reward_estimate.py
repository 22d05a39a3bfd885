import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_encoders
import torch

from reward import estimate, formats, train, video
from reward.config import load
from reward.estimate import Known
from reward.features import FeatureCache
from reward.model import RewardModel
from reward.preferences import Source
from reward.settings import RewardConfig, load_examples
from tests.test_train import command, pair, settings


@pytest.fixture
def config(tmp_path: Path) -> RewardConfig:
    """6 prompts with a pair of videos each, no two alike."""
    pairs = [pair(number, first_is_bright=True, root=tmp_path / "videos") for number in range(6)]
    for level, one in enumerate(each for both in pairs for each in (both.video_0, both.video_1)):
        one.path.parent.mkdir(parents=True, exist_ok=True)
        video.write(one.path, video.Video(frames=np.full((4, 32, 32, 3), 20 * level, dtype=np.uint8), fps=8))
    formats.write_pairs(tmp_path / "config-train.json", pairs)
    tiny_encoders.clip(tmp_path / "encoder")
    return settings(tmp_path, tmp_path / "run", data=Source(path=tmp_path / "config-train.json", validation_share=0.3))


def test_features_that_are_known_are_counted_and_none_is_made(config: RewardConfig):
    model = RewardModel.build(config.model, seed=0)
    examples = [each for found in load_examples(config).values() for each in found]
    cache = FeatureCache(config.cache, model.backbone)
    for path in examples[0].paths:
        cache.features(path, "a text of its own, which is no video")
    files = sorted(config.cache.rglob("*"))
    new = tuple(path for example in examples[1:] for path in example.paths)
    assert estimate.count_known(config, model, examples) == Known(cached=2, new=new, absent=0)
    examples[0].paths[0].unlink()
    assert estimate.count_known(config, model, examples) == Known(cached=1, new=new, absent=1)
    assert sorted(config.cache.rglob("*")) == files


def test_features_take_what_their_files_take_but_for_names_and_a_checksum(config: RewardConfig):
    model = RewardModel.build(config.model, seed=0)
    path = load_examples(config)["train"][0].paths[0]
    FeatureCache(config.cache, model.backbone).video(path)
    (file,) = config.cache.rglob("*.safetensors")
    assert 0 < file.stat().st_size - estimate.features_bytes(model, path) < 1000


def test_free_space_is_that_of_the_disk_that_a_folder_will_be_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Here each folder has a disk of its own."""
    disks = {tmp_path: SimpleNamespace(free=7), Path("/"): SimpleNamespace(free=8)}
    monkeypatch.setattr(shutil, "disk_usage", disks.__getitem__)
    assert estimate.free_bytes(tmp_path / "not/yet") == estimate.free_bytes(tmp_path) == 7


def test_weights_take_what_loaded_and_trained_ones_take(config: RewardConfig):
    model = RewardModel.build(config.model, seed=0)
    found, trained = estimate.weigh(model), list(model.trained().values())
    optimizer = torch.optim.AdamW(trained)
    torch.stack([weight.sum() for weight in trained]).sum().backward()
    optimizer.step()
    moments = [state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    gradients = [weight.grad.nbytes for weight in trained if weight.grad is not None]
    assert found.trained_bytes == sum(weight.nbytes for weight in trained) + sum(gradients) + sum(moments)
    assert found.frozen_bytes == sum(weight.nbytes for weight in model.parameters() if not weight.requires_grad)
    assert found.num_trained == found.trained_bytes / 16


def test_a_dry_run_is_settings_and_an_estimate(
    config: RewardConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """6 steps of 4 prompts are 24 prompts."""
    with pytest.raises(SystemExit, match="0"):
        train.main([*command(config, tmp_path / "run.yaml"), "--dry-run"])
    printed = capsys.readouterr().out
    model, first = RewardModel.build(config.model, seed=0), load_examples(config)["train"][0].paths[0]
    each = estimate.features_bytes(model, first)
    num = {split: len(found) for split, found in load_examples(config).items()}
    assert num["train"] + num["validation"] == 6
    for line in (
        *(f"#   {split:<11}  {count} prompts, {2 * count} videos, {count} pairs" for split, count in num.items()),
        "#   features     of 0 videos in the cache, of 12 to be made",
        f"#   disk, GiB    {each * 12 / 2**30:,.3f} for the new videos' features, if all are as large as the first;",
        f"#   steps        6 at most, {24 / num['train']:.3g} times through the training prompts",
        "#   memory, GiB, without activations",
    ):
        assert line in printed.splitlines()
    (tmp_path / "resolved.yaml").write_text(printed)
    assert load(RewardConfig, tmp_path / "resolved.yaml") == config, "the estimate is a comment"
    assert not (tmp_path / "run").exists()


def test_a_video_that_cannot_be_read_is_one_line(config: RewardConfig):
    path = load_examples(config)["train"][0].paths[0]
    path.write_bytes(b"no video")
    (line,) = estimate.describe(config).splitlines()
    assert line.startswith(f"no estimate: {path}: ")


def test_data_or_an_encoder_that_is_not_there_is_one_line(config: RewardConfig, tmp_path: Path):
    without = config.model_copy(update={"data": Source(path=tmp_path / "absent")})
    assert estimate.describe(without) == f"no estimate: {tmp_path}/absent: there is no such file or folder"
    (tmp_path / "encoder/config.json").unlink()
    (line,) = estimate.describe(config).splitlines()
    assert line.startswith(f"no estimate: {tmp_path}/encoder: expected a model saved by transformers")
