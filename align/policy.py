"""The policy: a text-to-video pipeline in diffusers' Wan format, and a LoRA that can be switched off.

The pipeline's own weights are never changed: with its LoRA off, the policy is its reference, bit for bit.
Deliberately absent: full fine-tuning, a second copy of any weights, and Wan 2.2's pair of transformers.
"""

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors.torch
import torch
from diffusers import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from jaxtyping import Float, UInt8
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import PositiveInt
from torch import Tensor, nn

from align.folder import LORA_FILE, NUM_TIMESTEPS, Geometry, PolicyError, find_lora, read_geometry
from reward.config import Config
from reward.files import replacing

MAX_TOKENS = 512
"""Longest prompt, as in `WanPipeline.__call__`; a tokenizer whose texts are shorter says so (`model_max_length`)."""

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ffn.net.0.proj", "ffn.net.2")


class Lora(Config):
    """A new LoRA on the video transformer; it changes nothing until it is trained."""

    rank: PositiveInt = 32
    alpha: PositiveInt = 32
    """What the LoRA adds is scaled by alpha / rank."""
    feed_forward: bool = False
    """Whether the feed-forward layers are adapted too, beside those of the attention."""
    seed: int = 0
    """Of the random half of each pair of matrices; the other half starts at zero."""

    @property
    def targets(self) -> list[str]:
        """How the names of the adapted layers end."""
        return [*_ATTENTION, *(_FEED_FORWARD if self.feed_forward else ())]


class Policy:
    """A frozen text-to-video pipeline with at most one LoRA, the only thing that can be trained.

    `transformer` is what `velocity` calls; it may be replaced by a wrapper of itself, such as DDP's.
    """

    def __init__(self, pipeline: WanPipeline, geometry: Geometry, folder: Path):
        self.pipeline = pipeline
        self.folder = folder
        self.geometry = geometry
        self.transformer: nn.Module = pipeline.transformer
        self.dtype: torch.dtype = pipeline.transformer.dtype
        for model in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
            model.requires_grad_(False).eval()
        pipeline.vae.enable_slicing()  # one video at a time: less memory, and none depends on its neighbours

    @classmethod
    def load(
        cls,
        model: Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        lora: Lora | Path | None = None,
        lora_scale: float = 1.0,
    ) -> Self:
        """Load a pipeline folder, with a new LoRA or one from a file or folder in diffusers' format.

        `dtype` is that of transformer and text encoder; the VAE and the LoRA are always kept in float32.

        Raises: PolicyError: no usable pipeline; a LoRA that does not fit it; a scale without a LoRA file.
        """
        geometry = read_geometry(model)
        file = find_lora(lora) if isinstance(lora, Path) else None
        if file is None and lora_scale != 1:
            raise PolicyError(f"lora_scale={lora_scale}: scales a LoRA from a file; none is given")
        pipeline = WanPipeline.from_pretrained(
            str(model),
            dtype={"default": dtype, "vae": torch.float32},
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        policy = cls(pipeline, geometry, model)
        if isinstance(lora, Lora):
            policy.attach(lora)
        if file is not None:
            policy._load_lora(file, lora_scale)
        pipeline.to(device)
        return policy

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.pipeline.transformer.device

    def offload(self) -> None:
        """Move VAE and text encoder to the CPU: training from a filled `align.cache` does not need them.

        They work there too, but slowly; `pipeline.to(device)` brings them back.
        """
        self.pipeline.vae.to("cpu")
        self.pipeline.text_encoder.to("cpu")

    # The network --------------------------------------------------------------------------------------------

    def velocity(
        self,
        noisy: Float[Tensor, "b c lf lh lw"],
        sigma: Float[Tensor, " b"],
        prompt_embeds: Float[Tensor, "b tokens d"],
    ) -> Float[Tensor, "b c lf lh lw"]:
        """Predict noise - clean, in float32."""
        (prediction,) = self.transformer(
            hidden_states=noisy.to(self.dtype),
            timestep=(NUM_TIMESTEPS * sigma).float(),
            encoder_hidden_states=prompt_embeds.to(self.dtype),
            return_dict=False,
        )
        return prediction.float()

    @contextmanager
    def as_reference(self) -> Generator[None]:
        """Switch the LoRA off inside the block; blocks can be nested."""
        layers = [layer for layer in self.pipeline.transformer.modules() if isinstance(layer, BaseTunerLayer)]
        switched = [layer for layer in layers if not layer.disable_adapters]
        for layer in switched:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in switched:
                layer.enable_adapters(True)

    # Text and pixels ----------------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Length of all prompt embeddings."""
        return min(MAX_TOKENS, self.pipeline.tokenizer.model_max_length)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Float[Tensor, "b tokens d"]:
        """Embed prompts, padded or cut to one length; the places of the padding are zero.

        The transformer attends to the padding too, so the length belongs to the model.
        """
        prompt_embeds, _ = self.pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.num_tokens,
            device=self.pipeline.text_encoder.device,
        )
        return prompt_embeds.to(self.device)

    @torch.no_grad()
    def encode(self, frames: UInt8[np.ndarray, "b f h w 3"]) -> Float[Tensor, "b c lf lh lw"]:
        """Give the most likely latents of videos, normalised for the transformer.

        Raises: PolicyError: the model cannot represent this size.
        """
        _, num_frames, height, width, _ = frames.shape
        _, latent_frames, _, _ = self.geometry.latent_shape(num_frames, height, width)
        # diffusers encodes the first frame and then groups of four, and drops an incomplete group. Copies of
        # the last frame complete it; the encoder is causal, so they do not change the latents before them.
        copies = (1 - num_frames) % 4
        complete = np.concatenate([frames, np.repeat(frames[:, -1:], copies, axis=1)], axis=1)
        pixels = torch.from_numpy(complete).to(self.pipeline.vae.device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        latents = self.pipeline.vae.encode(pixels).latent_dist.mode()[:, :, :latent_frames]
        mean, inverse_std = self._latent_statistics()
        return ((latents - mean) * inverse_std).to(self.device)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c lf lh lw"]) -> UInt8[np.ndarray, "b f h w 3"]:
        """Give the videos of normalised latents, rounded to the nearest level."""
        mean, inverse_std = self._latent_statistics()
        raw = latents.to(mean.device).float() / inverse_std + mean
        pixels = self.pipeline.vae.decode(raw, return_dict=False)[0]
        levels = ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return levels.permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()

    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and inverse standard deviation of latents; inverted, to round as `WanPipeline` does."""
        vae = self.pipeline.vae
        mean, std = (torch.tensor(values) for values in (vae.config.latents_mean, vae.config.latents_std))
        return mean.view(1, -1, 1, 1, 1).to(vae.device), (1.0 / std).view(1, -1, 1, 1, 1).to(vae.device)

    # LoRA ---------------------------------------------------------------------------------------------------

    def attach(self, lora: Lora) -> None:
        """Add a new LoRA to a policy that has none."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(lora.seed)
            self.pipeline.transformer.add_adapter(
                LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets)
            )
        self._keep_lora_in_float32()

    def named_lora(self) -> dict[str, nn.Parameter]:
        """Name the parameters that can be trained; none without a LoRA."""
        return {name: p for name, p in self.pipeline.transformer.named_parameters() if ".lora_" in name}

    def lora_parameters(self) -> list[nn.Parameter]:
        """List the parameters that can be trained; none without a LoRA."""
        return list(self.named_lora().values())

    def save_lora(self, folder: Path) -> Path:
        """Write the LoRA for `WanPipeline.load_lora_weights`, whole or not at all; give its file.

        Equal LoRAs make equal files. The scale a LoRA was loaded with is not part of it.
        """
        transformer = self.pipeline.transformer
        assert self.lora_parameters(), "there is no LoRA to save"
        state = get_peft_model_state_dict(transformer)
        tensors = {f"transformer.{name}": tensor.contiguous() for name, tensor in state.items()}
        # safetensors shuffles its metadata: with a single key, the file is a function of the LoRA.
        settings = transformer.peft_config["default"].to_dict()
        named = {f"transformer.{key}": value for key, value in settings.items()}
        metadata = {"lora_adapter_metadata": json.dumps(named, sort_keys=True, default=sorted)}
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / LORA_FILE) as new:
            safetensors.torch.save_file(tensors, new, metadata)
        return folder / LORA_FILE

    def _load_lora(self, file: Path, scale: float) -> None:
        state, metadata = _read_lora(file)
        transformer = self.pipeline.transformer
        _require_fit(state, transformer, file)
        WanPipeline.load_lora_into_transformer(state, transformer, adapter_name="default", metadata=metadata)
        transformer.set_adapters("default", scale)
        self._keep_lora_in_float32()

    def _keep_lora_in_float32(self) -> None:
        for parameter in self.lora_parameters():
            parameter.data = parameter.data.float()


def require_lora(model: Path, lora: Path) -> None:
    """Check that a LoRA belongs to a pipeline folder, which takes none of its weights.

    Raises: PolicyError: it does not, or cannot be read.
    """
    file = find_lora(lora)
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(str(model / "transformer")))
    _require_fit(_read_lora(file)[0], transformer, file)


def _read_lora(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Give the tensors of a LoRA's file, and its settings."""
    return WanPipeline.lora_state_dict(
        str(file.parent),
        weight_name=file.name,
        use_safetensors=True,
        local_files_only=True,
        return_lora_metadata=True,
    )


def _require_fit(state: dict[str, Tensor], transformer: nn.Module, file: Path) -> None:
    """Check every matrix of a LoRA: diffusers would leave out what does not fit, with a mere warning."""
    layers = dict(transformer.named_modules())
    for key, matrix in state.items():
        name, _, half = key.removeprefix("transformer.").partition(".lora_")
        layer = layers.get(name)
        if not isinstance(layer, nn.Linear) or half not in ("A.weight", "B.weight"):
            raise PolicyError(f"{file}: {key}: no such place in this model; was it made for another one?")
        sizes = (layer.in_features, matrix.shape[-1]) if half[0] == "A" else (layer.out_features, len(matrix))
        if sizes[0] != sizes[1]:
            raise PolicyError(
                f"{file}: {key}: {sizes[1]} channels, this model has {sizes[0]}; was it made for another one?"
            )
        other = key.removesuffix(half) + {"A": "B.weight", "B": "A.weight"}[half[0]]
        if other not in state:
            raise PolicyError(f"{file}: {key}: its other half, {other}, is missing")
    if not state:
        raise PolicyError(f"{file}: holds no LoRA")
