"""What a policy may be made of: a pipeline folder and a LoRA, checked before any weight is loaded.

Only folders on disk and safetensors are read: nothing is downloaded, unpickled, or run as remote code.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

LORA_FILE = "pytorch_lora_weights.safetensors"
NUM_TIMESTEPS = 1000
"""The network's timestep is 1000 sigma."""

_CLASSES = {
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
_FINGERPRINTED = {".json", ".safetensors", ".model", ".txt"}


class PolicyError(ValueError):
    """A model folder, LoRA or video size that cannot be used: which, why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How a model's latents stand to the pixels of its videos."""

    num_channels: int
    frames_per_latent: int
    """Each latent frame but the first holds this many video frames."""
    pixels_per_latent: int
    patch: tuple[int, int, int]
    """Latent frames, rows and columns that the transformer reads as one token."""

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Give the shape (c, f, h, w) of a video's latents.

        Raises: PolicyError: the model cannot make videos of this size.
        """
        frame_step = self.frames_per_latent * self.patch[0]
        smallest = frame_step - self.frames_per_latent + 1
        if num_frames < 1 or (num_frames - smallest) % frame_step:
            sizes = ", ".join(str(smallest + i * frame_step) for i in range(4))
            raise PolicyError(f"num_frames={num_frames}: this model makes {sizes}, ... frames")
        for name, size, patch in (("height", height, self.patch[1]), ("width", width, self.patch[2])):
            if size < 1 or size % (self.pixels_per_latent * patch):
                multiple = self.pixels_per_latent * patch
                raise PolicyError(f"{name}={size}: this model needs a multiple of {multiple} pixels")
        return (
            self.num_channels,
            (num_frames - 1) // self.frames_per_latent + 1,
            height // self.pixels_per_latent,
            width // self.pixels_per_latent,
        )


# Pipelines --------------------------------------------------------------------------------------------------


def read_geometry(model: Path) -> Geometry:
    """Check a pipeline folder and give its geometry; a second's work, whatever the model's size.

    Raises: PolicyError: no Wan 2.1 text-to-video pipeline with safetensors weights and a flow scheduler.
    """
    if not model.is_dir():
        raise PolicyError(f"{model}: no such folder; expected a text-to-video pipeline saved by diffusers")
    _require_wan(model, _read_json(model / "model_index.json"))
    for name in (*_CLASSES, "text_encoder"):
        if not any((model / name).glob("*.safetensors")):
            raise PolicyError(
                f"{model / name}: holds no .safetensors file; pickled weights (.bin, .pt) are never loaded: "
                "convert them with the pipeline's save_pretrained"
            )
    _require_flow(model / "scheduler" / "scheduler_config.json")
    vae, transformer = (_read_json(model / name / "config.json") for name in ("vae", "transformer"))
    frames, rows, columns = transformer["patch_size"]
    return Geometry(
        num_channels=transformer["in_channels"],
        # Folders saved before diffusers 0.35 do not say; all of them are 4 and 8.
        frames_per_latent=vae.get("scale_factor_temporal", 4),
        pixels_per_latent=vae.get("scale_factor_spatial", 8),
        patch=(frames, rows, columns),
    )


def _require_wan(model: Path, index: dict[str, Any]) -> None:
    if index.get("_class_name") != "WanPipeline":
        raise PolicyError(f"{model}: holds a {index.get('_class_name')}; expected a WanPipeline")
    if index.get("boundary_ratio") is not None or index.get("expand_timesteps"):
        raise PolicyError(f"{model}: is of Wan 2.2; expected one transformer with one timestep, as in Wan 2.1")
    for name, component in index.items():
        wanted = _CLASSES.get(name, component)
        if component != wanted:
            raise PolicyError(f"{model}: its {name} is {component}; expected {wanted}")
        if isinstance(component, list) and component[0] not in (None, "diffusers", "transformers"):
            raise PolicyError(f"{model}: its {name} is {component}, code from the folder, which is never run")


def _require_flow(file: Path) -> None:
    config = _read_json(file)
    kind = config.get("_class_name")
    is_flow = kind == "FlowMatchEulerDiscreteScheduler" or (
        kind == "UniPCMultistepScheduler" and config.get("use_flow_sigmas")
    )
    is_plain = not (config.get("use_dynamic_shifting") or config.get("stochastic_sampling"))
    if not (is_flow and is_plain and config.get("num_train_timesteps") == NUM_TIMESTEPS):
        raise PolicyError(
            f"{file}: cannot sample with this {kind}; expected FlowMatchEulerDiscreteScheduler, or "
            f"UniPCMultistepScheduler with use_flow_sigmas, of {NUM_TIMESTEPS} timesteps, without dynamic "
            "shifting and stochastic sampling"
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PolicyError(
            f"{file}: cannot be read, {error}; expected a text-to-video pipeline saved by diffusers"
        ) from error


# LoRAs ------------------------------------------------------------------------------------------------------


def find_lora(path: Path) -> Path:
    """Find the weights of a LoRA, given as a file or as the folder that holds it, and look into them.

    Raises: PolicyError: no such file, several of them, not safetensors, damaged, or not finite numbers.
    """
    names = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    named = [file for file in names if file.name == LORA_FILE]
    found = named or [file for file in names if file.suffix == ".safetensors"]
    if len(found) != 1:
        raise PolicyError(
            f"{path}: expected a LoRA, a .safetensors file or a folder with one (the folder's "
            f"{LORA_FILE} is preferred), found {', '.join(file.name for file in found) or 'none'}"
        )
    _require_finite(found[0])
    return found[0]


def prompts_file(lora: Path) -> Path:
    """Give where the hashes of all prompts that a LoRA's file comes from stand: beside it, under its name."""
    return lora.with_suffix(".prompts.sha256")


def _require_finite(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as tensors:
            broken = [key for key in tensors.keys() if not tensors.get_tensor(key).isfinite().all()]  # noqa: SIM118  a safetensors file is no mapping
    except SafetensorError as error:
        raise PolicyError(f"{file}: is damaged, or no safetensors file: {error}") from error
    if broken:
        raise PolicyError(f"{file}: {broken[0]} holds numbers that are not finite; take an earlier checkpoint")


# Fingerprints -----------------------------------------------------------------------------------------------


def fingerprint(path: Path) -> str:
    """Give the SHA-256 of a LoRA's file, or of all weights and settings in a pipeline folder.

    The folder's is the SHA-256 of what `sha256sum` prints for these files, sorted by name.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    names = (file.relative_to(path) for file in path.rglob("*") if file.suffix in _FINGERPRINTED)
    visible = sorted(name.as_posix() for name in names if not any(part[0] == "." for part in name.parts))
    listing = "".join(f"{fingerprint(path / name)}  {name}\n" for name in visible)
    return hashlib.sha256(listing.encode()).hexdigest()
