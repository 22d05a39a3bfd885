"""The reward model: one backbone, 18 numbers in one pass, and optionally several opinions on each.

    MODEL/config.yaml         the settings, and the hashes of the weights and of the encoder
          model.safetensors   what was trained; the encoder stays where it is

A prompt enters only as the text that the user wrote, never as a refined one.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reward.backbone import Dual
from reward.checkpoint import sha256, sync
from reward.config import Config, dump, load
from reward.features import Backbone, Features, Limits
from reward.scores import NUM_SCORES, Outputs
from reward.video import Video
from reward.vlm import Vlm

_CONFIG, _WEIGHTS = "config.yaml", "model.safetensors"


class ModelError(ValueError):
    """A saved reward model that cannot be used: which, why, and what to do."""


class ModelConfig(Config):
    """A reward model."""

    backbone: Annotated[Dual | Vlm, Field(discriminator="kind")]
    num_members: PositiveInt = 1
    """Heads that are trained side by side on one backbone; how far they differ is the `spread`."""
    limits: Limits = Limits()
    """Frame rates and sizes that training videos must have; of a saved model, those that they had."""


class _Saved(Config):
    """A reward model on disk."""

    model: ModelConfig
    encoder_sha256: str
    weights_sha256: str


class RewardModel(nn.Module):
    """A backbone and its heads: `model(model.encode(videos, texts))`, or features from a `FeatureCache`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.backbone: Backbone[Any, Any] = config.backbone.build()
        self.heads = nn.ModuleList(_Head(self.backbone.width) for _ in range(config.num_members))

    @classmethod
    def build(cls, config: ModelConfig, *, seed: int) -> "RewardModel":
        """Load the encoder and make all that is trained, as the seed says.

        Raises: BackboneError: the encoder's folder cannot be used.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return cls(config)

    def encode(self, videos: Sequence[Video], texts: Sequence[str]) -> list[Features[Any, Any]]:
        """Give the features of videos and of the texts that users wrote, without gradient.

        Raises: BackboneError: a video unlike those of the training; not one text for each.
        """
        for video in videos:
            height, width = video.frames.shape[1:3]
            self.config.limits.require(fps=video.fps, height=height, width=width)
        return self.backbone.encode(videos, texts)

    def forward(self, batch: Sequence[Features[Any, Any]]) -> Outputs:
        """Score in one pass of the backbone; in float32, whatever the precision of the backbone."""
        states = self.backbone(batch)
        with torch.autocast(states.device.type, enabled=False):
            return Outputs(values=torch.stack([head(states.float()) for head in self.heads]))

    def trained(self) -> dict[str, nn.Parameter]:
        """Name all that is trained, and saved."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    # On disk ------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write a folder, whole or not at all. Saving the same again changes nothing.

        Raises: ModelError: the folder holds something else.
        """
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        self._write(temporary)
        if not folder.exists():
            temporary.rename(folder)
            return
        is_same = sha256(temporary) == sha256(folder)
        shutil.rmtree(temporary)
        if not is_same:
            raise ModelError(f"{folder}: exists and is not this model; remove it, or save elsewhere")

    def _write(self, folder: Path) -> None:
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in self.trained().items()}
        save_file(tensors, folder / _WEIGHTS)
        hashes = {"encoder_sha256": self.backbone.encoder_sha256, "weights_sha256": sha256(folder / _WEIGHTS)}
        (folder / _CONFIG).write_text(dump(_Saved(model=self.config, **hashes)), encoding="utf-8")
        for name in (_WEIGHTS, _CONFIG, "."):
            sync(folder / name)

    @classmethod
    def load(cls, folder: Path, *, encoder: Path | None = None) -> "RewardModel":
        """Load what `save` wrote, in evaluation mode; `encoder` says where the encoder has moved to.

        Raises: ConfigError, BackboneError, ModelError: damaged, or not the encoder that it was trained on.
        """
        saved = load(_Saved, folder / _CONFIG)
        backbone = saved.model.backbone
        if encoder is not None:
            backbone = backbone.model_copy(update={"encoder": encoder})
        model = cls.build(saved.model.model_copy(update={"backbone": backbone}), seed=0)
        if model.backbone.encoder_sha256 != saved.encoder_sha256:
            raise ModelError(f"{backbone.encoder}: is not the encoder that {folder} was trained on")
        file = folder / _WEIGHTS
        if not file.is_file() or sha256(file) != saved.weights_sha256:
            raise ModelError(f"{file}: is missing, or not what was saved; fetch it again")
        fill(model.trained(), load_file(file), file)
        return model.eval()


class _Head(nn.Module):
    """One member: 18 numbers from 18 states."""

    def __init__(self, width: int):
        super().__init__()
        self.stem = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.weight = nn.Parameter(torch.randn(NUM_SCORES, width) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(NUM_SCORES))

    def forward(self, states: Float[Tensor, "b 18 width"]) -> Float[Tensor, "b 18"]:
        return (self.stem(states) * self.weight).sum(-1) + self.bias


@torch.no_grad()
def fill(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], file: Path) -> None:
    """Put saved weights in their places, every one of them.

    Raises: ModelError: a name or shape differs, or a weight is not finite; `file` says whose they are.
    """
    shapes, found = ({name: tuple(w.shape) for name, w in group.items()} for group in (parameters, tensors))
    for name in sorted(shapes.keys() | found.keys()):
        if shapes.get(name) != found.get(name):
            raise ModelError(f"{file}: {name}: expected {shapes.get(name)}, got {found.get(name)}; made by other code?")
        if not tensors[name].isfinite().all():
            raise ModelError(f"{file}: {name} is not finite; take an earlier checkpoint")
        parameters[name].copy_(tensors[name])
