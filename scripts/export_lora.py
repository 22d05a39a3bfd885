"""Convert a LoRA to ComfyUI's keys, or back: `python scripts/export_lora.py lora=DIR out=FILE [format=...]`.

    diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight            alpha is in the file's metadata
    comfy       diffusion_model.blocks.0.self_attn.q.lora_down.weight    alpha is a tensor beside each pair of matrices

Either adds alpha / rank * up @ down to a weight, without an alpha up @ down. The matrices are copied as they are, so
the way there and back ends at the same bytes. diffusers reads both formats.

Source: diffusers 0.42, `_convert_non_diffusers_wan_lora_to_diffusers`; ComfyUI, `comfy/lora.py`.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor

from align.folder import PolicyError, find_lora, fingerprint
from reward.config import Config, parse
from reward.files import DataError, replacing

_PROJECTIONS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
_COMFY_LAYERS = {
    **{f"attn1.{ours}": f"self_attn.{theirs}" for ours, theirs in _PROJECTIONS.items()},
    **{f"attn2.{ours}": f"cross_attn.{theirs}" for ours, theirs in _PROJECTIONS.items()},
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
"""Layers of a block by their names in diffusers, and in the original Wan, which ComfyUI keeps."""
_LAYERS = {theirs: ours for ours, theirs in _COMFY_LAYERS.items()}
_PARTS = {"lora_A.weight": "down", "lora_B.weight": "up", "lora_down.weight": "down", "lora_up.weight": "up"}
_METADATA = "lora_adapter_metadata"

Format = Literal["comfy", "diffusers"]


class ExportConfig(Config):
    """Convert a LoRA of a Wan transformer to the keys that ComfyUI reads, or back to those of diffusers."""

    lora: Path
    """In the other format: a .safetensors file, or its folder."""
    out: Path
    """The .safetensors file to write."""
    format: Format = "comfy"
    """Of `out`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """What a LoRA adds to one layer: alpha / rank * up @ down."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Number of rows of `down`."""
        return len(self.down)


Layers = Mapping[tuple[int, str], Layer]
"""By block and name in diffusers."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program; an error of the user's ends it with status 2."""
    prog = "python scripts/export_lora.py"
    config = parse(ExportConfig, sys.argv[1:] if argv is None else argv, prog=prog)
    try:
        export(config)
    except (PolicyError, DataError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def export(config: ExportConfig) -> None:
    """Convert a LoRA, all of it or nothing.

    Raises: PolicyError: a key without a counterpart, a half that is missing, or settings that cannot be written down.
    """
    file = find_lora(config.lora)
    if config.out.suffix != ".safetensors" or config.out.resolve() == file.resolve():
        raise PolicyError(f"out={config.out}: expected a .safetensors file other than {file}")
    if config.format == "comfy":
        tensors, metadata = to_comfy(read_diffusers(file)), None
    else:
        layers = read_comfy(file)
        tensors, metadata = to_diffusers(layers), _metadata_of(layers, file)
    with replacing(config.out) as new:
        safetensors.torch.save_file(tensors, new, metadata)
    print(f"{config.out}: {len(tensors)} tensors, SHA-256 {fingerprint(config.out)}")


# Reading ----------------------------------------------------------------------------------------------------


def read_diffusers(file: Path) -> Layers:
    """Read a LoRA in diffusers' format.

    Raises: PolicyError: see `export`.
    """
    with safe_open(file, framework="pt") as opened:
        settings = json.loads((opened.metadata() or {}).get(_METADATA, "{}"))
    for name in ("alpha_pattern", "use_rslora", "use_dora"):
        if settings.get(f"transformer.{name}"):
            raise PolicyError(f"{file}: {name} in its metadata: cannot be exported; train without it")
    found = _by_layer(
        file, r"transformer\.blocks\.(\d+)\.(.+)\.(lora_[AB]\.weight)", {name: name for name in _COMFY_LAYERS}
    )
    return _joined(file, found, settings.get("transformer.lora_alpha"))


def read_comfy(file: Path) -> Layers:
    """Read a LoRA in ComfyUI's format.

    Raises: PolicyError: see `export`.
    """
    pattern = r"diffusion_model\.blocks\.(\d+)\.(.+)\.(lora_down\.weight|lora_up\.weight|alpha)"
    return _joined(file, _by_layer(file, pattern, _LAYERS), None)


def _by_layer(file: Path, pattern: str, names: Mapping[str, str]) -> dict[tuple[int, str], dict[str, Tensor]]:
    """Group tensors by the block and layer that a pattern finds in their keys."""
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    for key, tensor in sorted(safetensors.torch.load_file(file).items()):
        match = re.fullmatch(pattern, key)
        if match is None or match[2] not in names:
            raise PolicyError(
                f"{file}: {key}: has no counterpart in the other format; expected matrices of "
                f"{', '.join(names)} in the blocks of a Wan transformer"
            )
        found.setdefault((int(match[1]), names[match[2]]), {})[_PARTS.get(match[3], match[3])] = tensor
    return found


def _joined(file: Path, found: Mapping[tuple[int, str], Mapping[str, Tensor]], alpha: float | None) -> Layers:
    """Check that each layer is complete; `alpha` is that of layers without their own."""
    layers = {}
    for (block, name), parts in found.items():
        if not {"down", "up"} <= parts.keys() or len(parts["down"]) != parts["up"].shape[1]:
            shapes = {part: list(tensor.shape) for part, tensor in parts.items()}
            raise PolicyError(f"{file}: block {block}, {name}: expected two matrices of one rank, got {shapes}")
        own = parts["alpha"].item() if "alpha" in parts else alpha
        rank = len(parts["down"])
        layers[block, name] = Layer(down=parts["down"], up=parts["up"], alpha=rank if own is None else own)
    if not layers:
        raise PolicyError(f"{file}: holds no LoRA")
    return layers


# Writing ----------------------------------------------------------------------------------------------------


def to_comfy(layers: Layers) -> dict[str, Tensor]:
    """Give the tensors of ComfyUI's format."""
    tensors = {}
    for (block, name), layer in layers.items():
        key = f"diffusion_model.blocks.{block}.{_COMFY_LAYERS[name]}"
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = layer.down, layer.up
        tensors[f"{key}.alpha"] = torch.tensor(float(layer.alpha))
    return tensors


def to_diffusers(layers: Layers) -> dict[str, Tensor]:
    """Give the tensors of diffusers' format, which lacks alpha."""
    halves = ((f"transformer.blocks.{block}.{name}", layer) for (block, name), layer in layers.items())
    return {
        f"{key}.lora_{half}.weight": matrix
        for key, layer in halves
        for half, matrix in (("A", layer.down), ("B", layer.up))
    }


def _metadata_of(layers: Layers, file: Path) -> dict[str, str]:
    """Give the metadata of diffusers' format, as `Policy.save_lora` writes it."""
    kinds = sorted({(layer.rank, layer.alpha) for layer in layers.values()})
    rank, alpha = kinds[0]
    if len(kinds) > 1 or alpha != int(alpha):
        raise PolicyError(
            f"{file}: its layers have (rank, alpha) {kinds}; expected one, of whole numbers; diffusers can read this "
            "file as it is"
        )
    settings = LoraConfig(r=rank, lora_alpha=int(alpha), target_modules=_targets(layers)).to_dict()
    named = {f"transformer.{key}": value for key, value in settings.items()}
    return {_METADATA: json.dumps(named, sort_keys=True, default=sorted)}


def _targets(layers: Layers) -> list[str]:
    """Name what is adapted: all layers of one name together, as `Policy` does, or each where some are left out."""
    names = {_last_name(name) for _, name in layers}
    whole = [name for name in _COMFY_LAYERS if _last_name(name) in names]
    is_whole = len(layers) == len({block for block, _ in layers}) * len(whole)
    return sorted(names) if is_whole else [f"blocks.{block}.{name}" for block, name in layers]


def _last_name(name: str) -> str:
    return name.removeprefix("attn1.").removeprefix("attn2.")


if __name__ == "__main__":
    main()
