import json
from pathlib import Path

import pytest
import torch

from align import estimate, train
from align.policy import Policy
from align.settings import AlignConfig, check_batch
from reward.config import load
from tests import tiny_alignment, tiny_wan
from tests.test_reward_configs import repeated

WAN = Path(__file__).parents[1] / "configs/align/wan2.1-1.3b.yaml"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("estimate")
    tiny_alignment.settings(home)
    return home


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_take_what_loaded_ones_take(dtype: str, home: Path):
    config = tiny_alignment.settings(home, dtype=dtype)
    work, memory = estimate.measure(config)
    policy = Policy.load(config.model, dtype=getattr(torch, dtype), lora=config.lora)
    pipeline = policy.pipeline
    assert memory.text_encoder == sum(p.nbytes for p in pipeline.text_encoder.parameters())
    assert memory.vae == sum(p.nbytes for p in pipeline.vae.parameters())
    assert memory.lora == 6 * sum(p.nbytes for p in policy.lora_parameters())
    assert memory.transformer == sum(p.nbytes for p in pipeline.transformer.parameters() if not p.requires_grad)
    others = memory.text_encoder + memory.vae
    assert memory.peak == memory.transformer + memory.lora + others + max(memory.step, memory.rollouts)
    alone = estimate.measure(config.model_copy(update={"offload": True}))[1]
    assert alone.peak == memory.transformer + memory.lora + max(memory.step, memory.rollouts + others)
    assert work.num_tokens == 3 * 2 * 2, "6 frames in twos, 4 x 4 latents in patches of 2 x 2"


def test_forwards_of_a_round(home: Path):
    """Rollouts: 4 prompts, 2 videos each, 2 steps with guidance, 8 x 2 x 2 = 32; validation: 2 x 2 x 2 = 8.

    A step of 2 pairs trains on 4 videos, a round on 8; each is one forward, one of the reference and a backward.
    """
    config = tiny_alignment.settings(home)
    work, memory = estimate.measure(config)
    found = estimate.forwards_of(config, work)
    assert (found.rollouts, found.validation) == (32, 8)
    assert found.training == pytest.approx(8 * work.step_flop / work.forward_flop)
    assert found.total == found.rollouts + found.validation + found.training
    halves = tiny_alignment.settings(home, accumulate=2)
    assert estimate.forwards_of(halves, work) == found
    assert estimate.measure(halves)[1].step == memory.step // 2
    again = estimate.forwards_of(tiny_alignment.settings(home, gradient_checkpointing=True), work)
    assert again.training - found.training == pytest.approx(8 * work.recomputed_flop / work.forward_flop)
    alone = estimate.forwards_of(tiny_alignment.settings(home, objective={"kind": "rwr"}), work)
    assert alone.training == pytest.approx(4 * (work.forward_flop + work.backward_flop) / work.forward_flop)
    kept = [
        estimate.forwards_of(tiny_alignment.settings(home, steps_per_round=6, noise={"draws": draws}), work).training
        for draws in (None, 9, 2, 1)
    ]
    saved = [(kept[0] - each) * work.forward_flop / work.reference_flop for each in kept]
    assert saved == pytest.approx([0, 0, 24 - 16, 24 - 8]), "6 steps of 4 videos; 4 prompts have 4 pairs, or 8 videos"
    unguided = tiny_alignment.settings(home, sampler=config.sampler.model_dump(mode="json") | {"guidance_scale": 1.0})
    assert estimate.forwards_of(unguided, work).rollouts == 16


def test_a_dry_run_is_settings_and_an_estimate(home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    config = tiny_alignment.settings(home)
    with pytest.raises(SystemExit, match="0"):
        train.main([str(home / "align.json"), "--dry-run"])
    printed = capsys.readouterr().out
    assert "#   memory, GiB" in printed
    assert "videos at a time" in printed
    (tmp_path / "resolved.yaml").write_text(printed)
    assert load(AlignConfig, tmp_path / "resolved.yaml") == config, "the estimate is a comment"


def test_a_model_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        train.main([str(WAN), "model=nowhere", "--dry-run"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("# no estimate of memory and time: nowhere: no such folder")


def test_a_size_that_the_model_cannot_make_is_one_line(home: Path):
    size = {"num_frames": tiny_wan.NUM_FRAMES, "height": 40, "width": 32}
    assert "height=40" in estimate.describe(tiny_alignment.settings(home, sampler=size))


def test_the_shipped_file_fits_its_gpu(home: Path, tmp_path: Path):
    """Wan 2.1 1.3B in bfloat16 takes 2.6 GiB, and a pair of two seconds about 6 with checkpointing."""
    config = load(AlignConfig, WAN)
    check_batch(config, num_processes=1)
    assert list(repeated(config)) == []
    model = tiny_wan.build(tmp_path, compression=4)
    real = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096}
    (model / "transformer/config.json").write_text(json.dumps(real | {"in_channels": 16, "patch_size": [1, 2, 2]}))
    work, memory = estimate.measure(config.model_copy(update={"model": model}))
    assert work.num_parameters == 1_418_996_800
    assert memory.transformer / 2**30 == pytest.approx(2.65, abs=0.01)
    assert 5 < memory.step / 2**30 < 8
    assert memory.peak < 60 * 2**30
