import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from sandbox import encoder, world
from sandbox.text import ANSWERS

VAE = Path(__file__).parents[1] / "sandbox/assets/base/vae"


def test_a_frame_tells_what_is_drawn_and_not_how_it_moves():
    """A dagger that was asked for and left out is not shown: glyph 0; motion and effect no frame can tell."""
    request = world.parse("a red bar moving left on a black background with a dagger")
    for hazard, glyph in ((True, "dagger"), (False, None)):
        told = encoder.shown(world.film(request, np.random.default_rng(0), hazard=hazard))
        named = dict(zip(ANSWERS, told, strict=True))
        assert named["glyph"] == ANSWERS["glyph"].index(glyph)
        assert (named["motion"], named["effect"]) == (-100, -100)
        assert named["colour 1"] == 0


def test_right_names_cost_nothing_and_unknown_ones_are_left_out():
    truth = torch.zeros(1, len(ANSWERS), dtype=torch.long)
    logits = torch.cat([torch.eye(len(options))[0] * 50 for options in ANSWERS.values()])[None]
    assert encoder.name_loss(logits, truth).item() == pytest.approx(0, abs=1e-6)
    truth[0, 4] = 1
    assert encoder.name_loss(logits, truth).item() == pytest.approx(50, rel=1e-4)
    truth[0, 4] = -100
    assert encoder.name_loss(logits, truth).item() == pytest.approx(0, abs=1e-6)


def settings(out: Path) -> list[str]:
    return ["num_clips=6", "num_steps=4", "batch_size=4", "save_every=2", "log_every=1", f"vae={VAE}", f"out={out}"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoder") / "run"
    assert encoder.main(settings(out)) == 0
    return out


def test_a_stopped_training_goes_on_to_the_same_bits(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped after the third step, between two saves; the frames are not filmed again."""
    out, step = tmp_path / "run", encoder.Trainer._step

    def step_and_signal(self: encoder.Trainer, number: int) -> dict[str, torch.Tensor]:
        if number == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(encoder.Trainer, "_step", step_and_signal)
        assert encoder.main(settings(out)) == 143
    assert max(path.name for path in (out / "checkpoints").iterdir()) == "00000003"
    assert not (out / "model").exists()
    (film,) = (out / "film").iterdir()
    filmed = film.stat().st_mtime_ns
    assert encoder.main(settings(out)) == 0
    assert film.stat().st_mtime_ns == filmed
    assert (out / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    models = [run / "model/model.safetensors" for run in (out, straight)]
    assert models[0].read_bytes() == models[1].read_bytes()
    starts = json.loads((out / "provenance.json").read_text())
    assert [list(start["inputs"]) for start in starts] == [[str(VAE)]] * 2


def test_a_finished_run_is_left_alone(straight: Path):
    before = (straight / "model/model.safetensors").stat().st_mtime_ns
    assert encoder.main(settings(straight)) == 0
    assert (straight / "model/model.safetensors").stat().st_mtime_ns == before


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path):
    with pytest.raises(SystemExit, match=r"step \d: not finite: .*; lower learning_rate"):
        encoder.main([*settings(tmp_path / "run"), "learning_rate=1e30"])


def test_the_encoder_is_saved_as_a_folder_that_transformers_opens(straight: Path):
    folder = str(straight / "model")
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    frames = [np.full((64, 64, 3), level, np.uint8) for level in (0, 255)]
    pixels = processor(frames, input_data_format="channels_last", return_tensors="pt").pixel_values
    assert (pixels.amin().item(), pixels.amax().item(), tuple(pixels.shape)) == (-1.0, 1.0, (2, 3, 64, 64))
    tokens = tokenizer(["a red bar", "a blue bar"], padding="max_length", max_length=24, return_tensors="pt")
    embedded = model.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
    assert not torch.allclose(embedded[0], embedded[1])
