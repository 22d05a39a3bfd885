from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from reward.backbone import Dual, DualBackbone
from reward.checkpoint import sha256
from reward.config import ConfigError
from reward.features import BackboneError, Limits
from reward.model import ModelConfig, ModelError, RewardModel
from reward.video import Video
from reward.vlm import Vlm
from tests import tiny_encoders
from tests.tiny_encoders import video

VIDEOS = [video(0), video(1, num_frames=3), video(2, num_frames=9), video(3, num_frames=1)]
TEXTS = ["a red circle moves left", "", "a blue square", "under strobe lights"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return tiny_encoders.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return tiny_encoders.qwen2_vl(tmp_path_factory.mktemp("qwen"))


def dual(encoder: Path, *, num_members: int = 1, limits: Limits | None = None, **settings) -> ModelConfig:
    backbone = Dual(encoder=encoder, num_frames=8, width=32).model_copy(update=settings)
    return ModelConfig(backbone=backbone, num_members=num_members, limits=limits or Limits())


def vlm(encoder: Path) -> ModelConfig:
    return ModelConfig(backbone=Vlm(encoder=encoder, num_frames=4, dtype="float32", rank=2, alpha=4))


@torch.no_grad()
def values(model: RewardModel) -> torch.Tensor:
    return model.eval()(model.encode(VIDEOS, TEXTS)).values


def jolt(model: RewardModel) -> None:
    """Move all that is trained, the half of a LoRA that starts at zero too."""
    with torch.no_grad():
        for parameter in model.trained().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


# Scores -----------------------------------------------------------------------------------------------------


def test_one_pass_gives_all_eighteen_numbers(clip: Path):
    model = RewardModel.build(dual(clip), seed=0).eval()
    passes = {"encoder": 0, "transformer": 0}

    def count(name: str):
        return lambda *_: passes.update({name: passes[name] + 1})

    assert isinstance(model.backbone, DualBackbone)
    model.backbone.encoder.vision_model.register_forward_hook(count("encoder"))
    model.backbone.mixer.register_forward_hook(count("transformer"))
    scores = model(model.encode(VIDEOS[:1], TEXTS[:1])).mean
    assert passes == {"encoder": 1, "transformer": 1}
    assert (scores.reward.shape, scores.sub.shape, scores.cost.shape, scores.tags.shape) == (
        (1,),
        (1, 4),
        (1,),
        (1, 12),
    )
    assert len({round(value, 6) for part in vars(scores).values() for value in part.flatten().tolist()}) == 18


def test_members_differ_and_one_alone_has_no_spread(clip: Path):
    model = RewardModel.build(dual(clip, num_members=3), seed=0)
    outputs = model.eval()(model.encode(VIDEOS, TEXTS))
    assert outputs.values.shape == (3, 4, 18)
    assert all((part > 0).all() for part in vars(outputs.spread).values())
    alone = RewardModel.build(dual(clip), seed=0)
    assert not alone.eval()(alone.encode(VIDEOS, TEXTS)).spread.cost.any()


def test_everything_trained_gets_a_gradient_from_its_own_member(clip: Path):
    model = RewardModel.build(dual(clip, num_members=2), seed=0)
    first, _ = model(model.encode(VIDEOS, TEXTS)).members
    sum(part.square().sum() for part in vars(first).values()).backward()
    for name, parameter in model.trained().items():
        assert (parameter.grad is None or not parameter.grad.any()) == name.startswith("heads.1."), name


def test_scores_are_float32_in_a_lower_precision_too(clip: Path):
    model = RewardModel.build(dual(clip), seed=0).eval()
    batch = model.encode(VIDEOS, TEXTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, states = model(batch).values, model.backbone(batch)
    assert rough.dtype == torch.float32
    assert torch.equal(rough[0], model.heads[0](states.float()))
    torch.testing.assert_close(rough, values(model), rtol=0, atol=0.1)


def test_videos_unlike_those_of_the_training_are_refused(clip: Path):
    model = RewardModel.build(dual(clip, limits=Limits(fps=(16, 16), height=(40, 40))), seed=0)
    model.encode(VIDEOS, TEXTS)
    with pytest.raises(BackboneError, match="fps: got 8, expected 16 to 16, as this model was trained on"):
        model.encode([video(0, fps=8)], ["red"])
    with pytest.raises(BackboneError, match="height"):
        model.encode([video(0, height=48)], ["red"])
    with pytest.raises(BackboneError, match="one text for each video"):
        model.encode(VIDEOS, TEXTS[:3])


def test_the_seed_decides_and_leaves_other_randomness_alone(clip: Path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    models = [RewardModel.build(dual(clip), seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(1), expected)
    first, again, other = map(values, models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# On disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dual", "vlm"])
def test_a_saved_model_scores_the_same_bits(kind: str, clip: Path, qwen: Path, tmp_path: Path):
    model = RewardModel.build(dual(clip, num_members=2) if kind == "dual" else vlm(qwen), seed=3)
    jolt(model)
    model.save(tmp_path / "model")
    loaded = RewardModel.load(tmp_path / "model")
    assert loaded.config == model.config
    assert not loaded.training
    assert torch.equal(values(loaded), values(model))
    assert not torch.equal(values(loaded), values(RewardModel.build(model.config, seed=0)))


def test_the_encoder_is_not_copied(clip: Path, tmp_path: Path):
    model = RewardModel.build(dual(clip), seed=0)
    model.save(tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert saved.keys() == model.trained().keys()
    assert not any("encoder" in name for name in saved)
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["config.yaml", "model.safetensors"]


def test_saving_twice_changes_nothing_and_overwrites_nothing(clip: Path, tmp_path: Path):
    model = RewardModel.build(dual(clip), seed=0)
    (tmp_path / ".model.tmp").mkdir()  # left by a killed process
    (tmp_path / ".model.tmp" / "rest").write_text("half")
    model.save(tmp_path / "model")
    before = sha256(tmp_path / "model")
    model.save(tmp_path / "model")
    jolt(model)
    with pytest.raises(ModelError, match="is not this model"):
        model.save(tmp_path / "model")
    assert sha256(tmp_path / "model") == before
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_another_encoder_is_refused_and_a_moved_one_is_found(clip: Path, tmp_path: Path):
    model = RewardModel.build(dual(clip), seed=0)
    model.save(tmp_path / "model")
    with pytest.raises(ModelError, match="is not the encoder that"):
        RewardModel.load(tmp_path / "model", encoder=tiny_encoders.clip(tmp_path / "other", seed=1))
    moved = RewardModel.load(tmp_path / "model", encoder=tiny_encoders.clip(tmp_path / "moved"))
    assert torch.equal(values(moved), values(model))


@pytest.fixture
def saved(clip: Path, tmp_path: Path) -> Path:
    RewardModel.build(dual(clip), seed=0).save(tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, old: str, new: str) -> None:
    text = (folder / "config.yaml").read_text()
    assert old in text
    (folder / "config.yaml").write_text(text.replace(old, new))


def rewrite(folder: Path, **changes: torch.Tensor) -> None:
    """Change weights, as someone would who also knows of the hash."""
    before = sha256(folder / "model.safetensors")
    save_file({**load_file(folder / "model.safetensors"), **changes}, folder / "model.safetensors")
    edit(folder, before, sha256(folder / "model.safetensors"))


def test_a_config_that_does_not_fit_the_weights_is_refused(saved: Path):
    edit(saved, "width: 32", "width: 64")
    with pytest.raises(ModelError, match=r"expected \(.*\), got \(.*\)"):
        RewardModel.load(saved)


def test_an_unknown_setting_is_refused(saved: Path):
    edit(saved, "num_members:", "num_membrs:")
    with pytest.raises(ConfigError, match="num_members"):
        RewardModel.load(saved)


def test_a_setting_that_fits_no_transformer_is_refused(saved: Path):
    edit(saved, "width: 32", "width: 33")
    with pytest.raises(ConfigError, match="width=33: expected a multiple of num_heads=4"):
        RewardModel.load(saved)


def test_damaged_weights_are_refused(saved: Path):
    data = bytearray((saved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (saved / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="not what was saved"):
        RewardModel.load(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="is missing"):
        RewardModel.load(saved)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"extra": torch.ones(1)}, r"extra: expected None, got \(1,\)"),
        ({"heads.0.bias": torch.ones(17)}, r"heads\.0\.bias: expected \(18,\), got \(17,\)"),
        ({"heads.0.bias": torch.full((18,), torch.nan)}, r"heads\.0\.bias is not finite"),
    ],
)
def test_weights_of_another_kind_are_refused(saved: Path, changes: dict[str, torch.Tensor], problem: str):
    rewrite(saved, **changes)
    with pytest.raises(ModelError, match=problem):
        RewardModel.load(saved)


# Learning ---------------------------------------------------------------------------------------------------


def grey(seed: int, *, flashing: bool) -> Video:
    """Eight dark and eight bright frames, of some pattern: by turns, or first the ones and then the others."""
    rng = np.random.default_rng(seed)
    dark, bright = rng.integers(30, 100), rng.integers(150, 220)
    levels = np.array([dark, bright] * 8 if flashing else [dark] * 8 + [bright] * 8)
    levels = levels[::-1] if rng.random() < 0.5 else levels
    pattern = rng.integers(-20, 20, (8, 8)).repeat(4, axis=0).repeat(4, axis=1)
    frames = (levels[:, None, None] + pattern)[..., None].repeat(3, axis=-1)
    return Video(frames=frames.astype(np.uint8), fps=16)


def test_it_learns_what_flashes_though_the_encoder_sees_two_frames(clip: Path):
    """Held-out clips whose frames, out of order, are the same: cost > 0 where they flash, < 0 where not."""
    model = RewardModel.build(dual(clip, num_frames=2, dropout=0.0), seed=0)
    sign = torch.tensor([1.0, -1.0] * 12)
    learned, held_out = (
        model.encode([grey(start + i // 2, flashing=i % 2 == 0) for i in range(24)], ["a red circle"] * 24)
        for start in (0, 100)
    )
    optimizer = torch.optim.AdamW(model.trained().values(), lr=3e-3)
    for _ in range(30):
        loss = F.softplus(-sign * model(learned).mean.cost).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        cost = model.eval()(held_out).mean.cost
    assert (cost.sign() == sign).all(), cost
