import json
from pathlib import Path

import pytest
import torch

from align.policy import Policy
from reward.config import ConfigError, load
from scripts import measure_step
from scripts.measure_step import Bench, MeasureConfig, make_bench, timed
from tests import tiny_wan

SMALL = ("height=64", "width=64", "mixed_precision=no", "num_repeats=1", "lora.rank=2")


def measured(*settings: str, capsys: pytest.CaptureFixture[str]) -> dict:
    measure_step.main([*SMALL, *settings])
    return json.loads(capsys.readouterr().out)


def test_both_settings_in_one_object(capsys: pytest.CaptureFixture[str]):
    found = measured("size=tiny", "num_frames=9", "batch_size=2", "peak_tflops=0.001", capsys=capsys)
    assert (found["num_videos"], found["tokens_per_video"]) == (4, 3 * 4 * 4)
    assert [row["gradient_checkpointing"] for row in found["settings"]] == [True, False]
    for row in found["settings"]:
        assert not row["out_of_memory"]
        assert row["forwards_per_step"] == pytest.approx(row["seconds_step"] / row["seconds_forward"])
        assert row["utilisation"] == pytest.approx(row["needed_tflop"] / row["seconds_step"] / 0.001)
    again, once = found["settings"]
    assert again["needed_tflop"] == once["needed_tflop"] == once["executed_tflop"] < again["executed_tflop"]


def test_a_folder_is_measured_with_its_own_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tiny_wan.build(tmp_path, compression=4)
    found = measured(f"model={model}", "num_frames=13", "gradient_checkpointing=true", capsys=capsys)
    assert found["latent_shape"] == [4, 4, 8, 8]
    assert len(found["settings"]) == 1


def test_a_step_trains_the_lora_alone():
    bench = make_bench(MeasureConfig(size="tiny", num_frames=9, height=64, width=64, mixed_precision="no"))
    before = {name: p.clone() for name, p in bench.policy.pipeline.transformer.named_parameters()}
    bench.step()
    changed = {n for n, p in bench.policy.pipeline.transformer.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {name for name in bench.policy.named_lora() if ".lora_B." in name}, "A moves once B is not zero"


class Full(Bench):
    """A bench on a device whose memory is full after a step."""

    error: type[Exception] = torch.OutOfMemoryError

    def step(self) -> None:
        super().step()
        raise self.error("CUDA out of memory")


def test_a_setting_that_does_not_fit_says_so():
    config = MeasureConfig(size="tiny", num_frames=9, height=64, width=64, mixed_precision="no")
    full = Full(**vars(make_bench(config)))
    assert timed(full, checkpointing=False, num_repeats=1) is None
    assert all(parameter.grad is None for parameter in full.policy.lora_parameters())
    Full.error = RuntimeError
    with pytest.raises(RuntimeError, match="out of memory"):
        timed(full, checkpointing=False, num_repeats=1)


def test_weights_in_memory_have_the_types_of_loaded_ones(tmp_path: Path):
    loaded = Policy.load(tiny_wan.build(tmp_path), dtype=torch.bfloat16).pipeline.transformer
    made = type(loaded).from_config(loaded.config)
    measure_step.cast(made, torch.bfloat16)
    types = [{name: t.dtype for name, t in model.named_parameters()} for model in (loaded, made)]
    assert types[0] == types[1]
    assert {t.dtype for t in made.buffers()} == {t.dtype for t in loaded.buffers()}


def test_a_size_beside_a_folder_is_refused():
    with pytest.raises(ConfigError, match="model=wan would ignore size=tiny"):
        load(MeasureConfig, None, ["model=wan", "size=tiny"])


def test_a_size_of_video_that_the_model_cannot_make_ends_the_program():
    with pytest.raises(SystemExit, match="num_frames=10"):
        measure_step.main(["size=tiny", "num_frames=10", "mixed_precision=no"])
