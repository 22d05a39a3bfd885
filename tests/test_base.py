import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline

from reward.checkpoint import sha256
from reward.config import load
from sandbox import base, footage, vae, world
from sandbox.footage import Part, film_clips
from sandbox.text import answers, encode_texts, make_text_encoder, make_tokenizer, train_text_encoder

ASSETS = Path(__file__).parents[1] / "sandbox/assets"
TINY = ("num_clips=24", "text_steps=3", "num_steps=4", "batch_size=2", "save_every=2", "warmup_steps=1")
TINY += ("young_step=3", "mixed_precision=no", "log_every=1", "dim=64", "num_layers=2")


@pytest.fixture(scope="module")
def clips() -> np.ndarray:
    return film_clips(Part(start=0, num_clips=40, seed=0))[1]


@pytest.fixture(scope="module")
def model(clips: np.ndarray) -> AutoencoderKLWan:
    return vae.make_vae(clips[:, ::4].reshape(-1, 64, 64, 3))


def pixels(clips: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


@torch.no_grad()
def test_the_stock_vae_reconstructs_unseen_clips(model: AutoencoderKLWan) -> None:
    """At least 27 dB: mean squared error below 4 / 10**2.7 on pixels in [-1, 1]."""
    fresh = pixels(film_clips(Part(start=0, num_clips=4, seed=1))[1])
    # AutoencoderKLWan reads 1 + 4k frames.
    latents = model.encode(fresh[:, :, :13]).latent_dist.mode()
    error = (model.decode(latents).sample - fresh[:, :, :13]).square().mean((1, 3, 4))
    assert float((10 * torch.log10(4 / error)).mean()) >= 27


@torch.no_grad()
def test_frames_are_coded_one_by_one(model: AutoencoderKLWan, clips: np.ndarray) -> None:
    std = torch.tensor(model.config.latents_std).view(1, -1, 1, 1, 1)
    whole = model.encode(pixels(clips[:2, :13])).latent_dist.mode() / std
    torch.testing.assert_close(vae.encode_frames(model, clips[:2, :13]), whole, atol=1e-3, rtol=1e-3)


def test_latents_have_unit_variance_overall(model: AutoencoderKLWan, clips: np.ndarray) -> None:
    assert float(vae.encode_frames(model, clips).var((0, 2, 3, 4)).mean()) == pytest.approx(1.0, rel=0.2)


def test_every_caption_fits_and_has_no_unknown_word() -> None:
    tokenizer, rng = make_tokenizer(), np.random.default_rng(0)
    texts = [world.caption(world.sample_training_request(rng), rng) for _ in range(300)]
    tokens = tokenizer(texts).input_ids
    assert max(map(len, tokens)) <= tokenizer.model_max_length
    assert not any(tokenizer.unk_token_id in row for row in tokens)


def test_the_text_encoder_learns_what_captions_ask_for() -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    losses = list(train_text_encoder(make_text_encoder(tokenizer), tokenizer, seed=0, num_steps=25, batch_size=32))
    assert np.mean(losses[-3:]) < 0.75 * losses[0]


def test_answers_of_one_thing() -> None:
    """red is colour 0, bar shape 5; nothing beside it; left is 0, black 1; no size, effect strobe is 1, no glyph."""
    request = world.parse("a red bar moving left on a black background flickering wildly")
    assert answers(request) == [0, 5, 0, 0, 0, 1, 0, 1, 0]


def test_noise_levels_lean_towards_noise() -> None:
    draws = {shift: base.sigmas_for(4000, shift=shift, generator=torch.Generator().manual_seed(0)) for shift in (1, 3)}
    assert float(draws[1].median()) == pytest.approx(0.5, abs=0.03)
    assert float(draws[3].median()) == pytest.approx(0.75, abs=0.03)  # 3 * .5 / (1 + 2 * .5)


def test_the_learning_rate_warms_up_holds_and_falls() -> None:
    config = load(base.BaseConfig, None, ["num_steps=100", "warmup_steps=10", "cooldown=0.5"])
    rates = [base._schedule(step, config) for step in (0, 9, 40, 75, 99)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.02])


def stopping(function: Callable) -> Callable:
    """The same function, in a process that is asked to stop."""

    def stop(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return function(*arguments)

    return stop


@pytest.mark.filterwarnings("ignore::UserWarning:diffusers")
def test_training_resumes_to_the_same_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after half of the filming, and again after the first step, between two saves."""
    monkeypatch.setattr(footage, "AT_ONCE", 12)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert base.main([*TINY, f"out={tmp_path / 'straight'}"]) == 0
    stopped = tmp_path / "resumed"
    for place, name in ((base, "encode_frames"), (base.Trainer, "_step")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, stopping(getattr(place, name)))
            assert base.main([*TINY, f"out={stopped}"]) == 143
        assert len(list((stopped / "film").iterdir())) == (1 if place is base else 2)
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["00000001"]
    assert base.main([*TINY, f"out={stopped}"]) == 0
    weights = [
        (tmp_path / name / "pipeline/transformer/diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("straight", "resumed")
    ]
    assert weights[0] == weights[1]
    young = [tmp_path / name / "young/diffusion_pytorch_model.safetensors" for name in ("straight", "resumed")]
    assert young[0].read_bytes() == young[1].read_bytes() != weights[0]
    lines = [json.loads(line)["step"] for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4]
    pipeline = DiffusionPipeline.from_pretrained(stopped / "pipeline")
    tokens = encode_texts(pipeline.text_encoder, pipeline.tokenizer, ["a red bar"])
    torch.testing.assert_close(pipeline.encode_prompt("a red bar", max_sequence_length=24)[0], tokens)


def test_the_shipped_base_is_what_its_recipe_tells_of() -> None:
    recipe, files = ASSETS / "recipe", [path for path in (ASSETS / "base").rglob("*") if path.is_file()]
    sums = "".join(f"{sha256(path)}  {path.relative_to(ASSETS / 'base').as_posix()}\n" for path in sorted(files))
    assert (recipe / "SHA256SUMS").read_text() == sums
    transformer = json.loads((ASSETS / "base/transformer/config.json").read_text())
    config = load(base.BaseConfig, recipe / "config.yaml")
    assert config == base.BaseConfig(log_every=config.log_every), "what `make sandbox` trains"
    assert json.loads((recipe / "metrics.jsonl").read_text().splitlines()[-1])["step"] == config.num_steps
    assert (list(config.patch), config.num_layers) == (transformer["patch_size"], transformer["num_layers"])
