import json
from pathlib import Path

import pytest
import safetensors.torch
import tiny_wan
import torch
from diffusers import WanPipeline
from safetensors import safe_open
from torch import Tensor

from align.folder import LORA_FILE
from align.policy import Lora, Policy
from scripts.export_lora import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.build(tmp_path_factory.mktemp("wan"))


def trained(model: Path, *, feed_forward: bool) -> Policy:
    """A policy whose LoRA, of alpha / rank 2.5, does something in every layer, and in each something else."""
    policy = Policy.load(model, lora=Lora(rank=2, alpha=5, feed_forward=feed_forward))
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.lora_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return policy


@torch.no_grad()
def predict(transformer: torch.nn.Module) -> Tensor:
    noisy = torch.randn(2, 4, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    embeds = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    return transformer(noisy, torch.tensor([300.0, 900.0]), embeds, return_dict=False)[0]


def with_stock(model: Path, file: Path) -> WanPipeline:
    stock = WanPipeline.from_pretrained(model)
    stock.load_lora_weights(file.parent, weight_name=file.name)
    return stock


def export(lora: Path, out: Path, *more: str) -> Path:
    main([f"lora={lora}", f"out={out}", *more])
    return out


@pytest.fixture(scope="module")
def ours(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(model, feed_forward=True).save_lora(tmp_path_factory.mktemp("lora"))


@pytest.mark.parametrize("feed_forward", [False, True])
def test_the_stock_pipeline_reads_comfys_format_as_the_same_lora(model: Path, tmp_path: Path, feed_forward: bool):
    policy = trained(model, feed_forward=feed_forward)
    out = export(policy.save_lora(tmp_path / "lora").parent, tmp_path / "comfy.safetensors")
    assert len(safetensors.torch.load_file(out)) == 3 * 2 * (10 if feed_forward else 8)
    expected = predict(policy.pipeline.transformer)
    torch.testing.assert_close(predict(with_stock(model, out).transformer), expected)
    torch.testing.assert_close(predict(Policy.load(model, lora=out).pipeline.transformer), expected)
    with policy.as_reference():
        assert (predict(policy.pipeline.transformer) - expected).abs().max() > 0.01


def test_comfy_adds_the_same_to_the_weights(model: Path, ours: Path, tmp_path: Path):
    """ComfyUI adds alpha / rank * up @ down to the weight of the same name, here that of the original Wan."""
    comfy = safetensors.torch.load_file(export(ours, tmp_path / "comfy.safetensors"))
    blocks = Policy.load(model, lora=ours).pipeline.transformer.blocks
    expected = {
        "self_attn.q": blocks[1].attn1.to_q,
        "self_attn.o": blocks[1].attn1.to_out[0],
        "cross_attn.k": blocks[1].attn2.to_k,
        "cross_attn.v": blocks[1].attn2.to_v,
        "ffn.0": blocks[1].ffn.net[0].proj,
        "ffn.2": blocks[1].ffn.net[2],
    }
    for name, layer in expected.items():
        down, up, alpha = (comfy[f"diffusion_model.blocks.1.{name}.{part}"] for part in PARTS)
        assert alpha.item() == 5
        torch.testing.assert_close(2.5 * up @ down, layer.get_delta_weight("default"), msg=name)


PARTS = ("lora_down.weight", "lora_up.weight", "alpha")


def test_the_way_back_ends_at_the_same_bytes(ours: Path, tmp_path: Path):
    comfy = export(ours, tmp_path / "comfy.safetensors")
    assert export(comfy, tmp_path / "again.safetensors", "format=diffusers").read_bytes() == ours.read_bytes()


def changed(source: Path, out: Path, change: dict[str, Tensor | None], metadata: dict[str, str] | None = None) -> Path:
    tensors = safetensors.torch.load_file(source) | change
    safetensors.torch.save_file({key: value for key, value in tensors.items() if value is not None}, out, metadata)
    return out


def test_a_file_of_some_layers_without_alphas_is_converted_too(model: Path, ours: Path, tmp_path: Path):
    """Without an alpha, alpha is the rank, for ComfyUI as for diffusers."""
    comfy = export(ours, tmp_path / "comfy.safetensors")
    keys = safetensors.torch.load_file(comfy)
    fewer = changed(comfy, comfy, {key: None for key in keys if "alpha" in key or "blocks.0.cross" in key})
    back = export(fewer, tmp_path / LORA_FILE, "format=diffusers")
    expected = predict(with_stock(model, fewer).transformer)
    assert torch.equal(predict(with_stock(model, back).transformer), expected)
    bare = changed(back, tmp_path / "bare.safetensors", {})
    assert (
        export(bare, tmp_path / "c.safetensors").read_bytes() == export(back, tmp_path / "d.safetensors").read_bytes()
    )


def with_settings(ours: Path, out: Path, **settings: object) -> Path:
    with safe_open(ours, framework="pt") as file:
        found = json.loads(file.metadata()["lora_adapter_metadata"])
    named = {f"transformer.{key}": value for key, value in settings.items()}
    return changed(ours, out, {}, {"lora_adapter_metadata": json.dumps(found | named)})


A, DOWN = "transformer.blocks.0.attn1.to_q.lora_A.weight", "diffusion_model.blocks.0.ffn.2.lora_down.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"transformer.proj_out.lora_A.weight": torch.ones(2, 2)},
            "transformer.proj_out.lora_A.weight: has no counter",
        ),
        ({"transformer.blocks.0.attn2.add_k_proj.lora_A.weight": torch.ones(2, 2)}, "add_k_proj.lora_A.weight: has no"),
        ({"transformer.blocks.0.attn1.to_q.lora_B.bias": torch.ones(2)}, "to_q.lora_B.bias: has no counterpart"),
        ({A: None}, "block 0, attn1.to_q: expected two matrices of one rank"),
        ({A: torch.ones(3, 24)}, "block 0, attn1.to_q: expected two matrices of one rank"),
        ({A: torch.full((2, 24), torch.nan)}, f"{A} holds numbers that are not finite"),
    ],
)
def test_what_cannot_be_mapped_is_refused(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Tensor | None], message: str
):
    refuse(changed(ours, tmp_path / "lora.safetensors", change), tmp_path, capsys, message)


def refuse(lora: Path, folder: Path, capsys: pytest.CaptureFixture[str], message: str, *more: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        export(lora, folder / "out.safetensors", *more)
    assert message in capsys.readouterr().err
    assert not (folder / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"use_rslora": True}, "use_rslora in its metadata"), ({"alpha_pattern": {"to_q": 1}}, "alpha_pattern in its")],
)
def test_scales_that_the_keys_do_not_tell_are_refused(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, object], message: str
):
    refuse(with_settings(ours, tmp_path / "lora.safetensors", **settings), tmp_path, capsys, message)


def test_the_way_back_needs_one_alpha(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    comfy = export(ours, tmp_path / "comfy.safetensors")
    changed(comfy, comfy, {DOWN.replace("lora_down.weight", "alpha"): torch.tensor(7.0)})
    refuse(comfy, tmp_path, capsys, "its layers have (rank, alpha) [(2, 5.0), (2, 7.0)]", "format=diffusers")
    refuse(ours, tmp_path, capsys, "lora_A.weight: has no counterpart", "format=diffusers")


def test_a_lora_is_never_written_over_itself(ours: Path, capsys: pytest.CaptureFixture[str]):
    before = ours.read_bytes()
    with pytest.raises(SystemExit, match="2"):
        export(ours.parent, ours)
    assert "other than" in capsys.readouterr().err
    assert ours.read_bytes() == before
