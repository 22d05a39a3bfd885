"""What all backbones share: the check of a model folder, the choice of frames, features, and their cache.

A backbone has two parts. The frozen one turns a video, and a text, into features, which can be kept on disk; the
trained one turns features into states. Only folders on disk and safetensors are read: nothing is downloaded,
unpickled, or run as remote code.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, Int64
from pydantic import PositiveFloat, PositiveInt, model_validator
from safetensors import SafetensorError
from torch import Tensor, nn

from reward.checkpoint import sha256
from reward.config import Config
from reward.files import replacing
from reward.video import Video, VideoInfo, read

_FINGERPRINTED = {".json", ".safetensors", ".model", ".txt"}
_CHECKSUM = "sha256"
_FPS_TOLERANCE = 0.01

V = TypeVar("V")
T = TypeVar("T")
R = TypeVar("R")


class BackboneError(ValueError):
    """A model folder, video or setting that a backbone cannot use: which, why, and what to do."""


# The interface ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Features(Generic[V, T]):
    """What a backbone's frozen part makes of one video and one text: dataclasses of tensors, on the CPU."""

    video: V
    text: T


class Backbone(nn.Module, ABC, Generic[V, T]):
    """Videos and texts to features, frozen; features to one state for each score, trained.

    A video's features depend on nothing but the video, so they are the same bits alone and in any company.
    """

    width: int
    """Channels of a state."""
    encoder_sha256: str
    """The `fingerprint` of the encoder's folder."""
    recipe: str
    """All that features depend on besides their video or text."""
    video_type: type[V]
    text_type: type[T]

    @abstractmethod
    def encode_video(self, video: Video) -> V:
        """Give the features of a video, without gradient.

        Raises: BackboneError: the features are not finite.
        """

    @abstractmethod
    def encode_text(self, text: str) -> T:
        """Give the features of what a user asked for, without gradient; marks of the model in it are mere text."""

    @abstractmethod
    def forward(self, batch: Sequence[Features[V, T]]) -> Float[Tensor, "b 18 width"]:
        """Give the states, with gradient; in evaluation mode they do not depend on the rest of the batch."""

    def encode(self, videos: Sequence[Video], texts: Sequence[str]) -> list[Features[V, T]]:
        """Give the features of videos and, in the same order, of the texts that they were made for.

        Raises: BackboneError: not one text for each video; features that are not finite.
        """
        if len(videos) != len(texts):
            raise BackboneError(f"expected one text for each video, got {len(videos)} videos and {len(texts)} texts")
        of_text = {text: self.encode_text(text) for text in dict.fromkeys(texts)}
        pairs = zip(videos, texts, strict=True)
        return [Features(video=self.encode_video(video), text=of_text[text]) for video, text in pairs]

    @contextmanager
    def frozen(self) -> Generator[None]:
        """Work without gradient and in the encoder's own precision, whatever is set around."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            yield

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


def require_finite(features: R, what: str) -> R:
    """Give the features back if all their numbers are finite.

    Raises: BackboneError: they are not.
    """
    for name, tensor in vars(features).items():
        if not tensor.isfinite().all():
            raise BackboneError(f"{name} of {what} is not finite; is the encoder's folder damaged?")
    return features


# Frames -----------------------------------------------------------------------------------------------------


def choose_frames(num_frames: int, most: int, *, exactly: bool = False) -> Int64[np.ndarray, " f"]:
    """Give the frames shown in the middle of `most` equal parts of a video; all, if there are no more than that.

    With `exactly`, frames of a short video repeat instead, as they do on a screen.
    """
    if num_frames <= most and not exactly:
        return np.arange(num_frames)
    return (2 * np.arange(most) + 1) * num_frames // (2 * most)


class Limits(Config):
    """The smallest and largest of what a model was trained on; null: anything. Scores of others would be guesses."""

    fps: tuple[PositiveFloat, PositiveFloat] | None = None
    height: tuple[PositiveInt, PositiveInt] | None = None
    width: tuple[PositiveInt, PositiveInt] | None = None

    @model_validator(mode="after")
    def _rise(self) -> "Limits":
        for name, limits in (("fps", self.fps), ("height", self.height), ("width", self.width)):
            if limits and limits[0] > limits[1]:
                raise ValueError(f"{name}={list(limits)}: expected the smallest, then the largest")
        return self

    @classmethod
    def of(cls, videos: Iterable[VideoInfo]) -> "Limits":
        """Give the limits of some videos.

        Raises: BackboneError: there is none.
        """
        measured = np.array([(video.fps, video.height, video.width) for video in videos])
        if not measured.size:
            raise BackboneError("limits need one video at least, got none")
        (fps, height, width), (top_fps, top_height, top_width) = measured.min(0).tolist(), measured.max(0).tolist()
        return cls(fps=(fps, top_fps), height=(int(height), int(top_height)), width=(int(width), int(top_width)))

    def require(self, *, fps: float, height: int, width: int) -> None:
        """Check what a model is shown.

        Raises: BackboneError: it lies outside.
        """
        if wrong := self.outside(fps=fps, height=height, width=width):
            raise BackboneError(f"{wrong}, as this model was trained on; convert the video, or train on such videos")

    def outside(self, *, fps: float, height: int, width: int) -> str | None:
        """Say what lies outside, if anything does; a frame rate may be 1 % off, as 29.97 is of 30."""
        checks = (
            ("fps", fps, self.fps, _FPS_TOLERANCE),
            ("height", height, self.height, 0),
            ("width", width, self.width, 0),
        )
        for name, value, limits, tolerance in checks:
            if limits and not limits[0] * (1 - tolerance) <= value <= limits[1] * (1 + tolerance):
                return f"{name}: got {value:g}, expected {limits[0]:g} to {limits[1]:g}"
        return None


# Model folders ----------------------------------------------------------------------------------------------


def check_folder(folder: Path, kinds: Sequence[str]) -> str:
    """Look into a transformers folder before any weight is read; give its kind of model.

    Raises: BackboneError: no such folder, another kind, its own code, or no safetensors weights.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(f"{folder}: expected a model saved by transformers' save_pretrained: {error}") from error
    kind = str(config.get("model_type")) if isinstance(config, dict) else "none"
    if kind not in kinds:
        raise BackboneError(f"{folder}: holds a model of type {kind}; expected one of {', '.join(kinds)}")
    if "auto_map" in config:
        raise BackboneError(f"{folder}: brings code of its own (auto_map), which is never run")
    if not any(folder.glob("*.safetensors")):
        raise BackboneError(
            f"{folder}: holds no .safetensors file; pickled weights (.bin, .pt) are never loaded: convert them with "
            "the model's save_pretrained"
        )
    return kind


def load_pretrained(auto_class: Any, folder: Path, **options: Any) -> Any:
    """Load a checked folder with one of transformers' Auto classes, offline, in evaluation mode.

    Raises: BackboneError: a file is missing or damaged; a weight has another shape, or is missing, which transformers
        alone would fill with noise.
    """
    try:
        loaded = auto_class.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **options)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise BackboneError(f"{folder}: cannot be loaded by {auto_class.__name__}: {error}") from error
    if not isinstance(loaded, tuple):
        return loaded
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise BackboneError(f"{folder}: {len(missing)} weights are missing, {missing[0]} first; fetch it again")
    return model.eval().requires_grad_(False)


def fingerprint(folder: Path) -> str:
    """Give the SHA-256 of what `sha256sum` prints for the weights and settings in a model folder, by name."""
    files = sorted(file for file in folder.iterdir() if file.suffix in _FINGERPRINTED and file.name[0] != ".")
    listing = "".join(f"{sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


# The cache --------------------------------------------------------------------------------------------------


class FeatureCache(Generic[V, T]):
    """Features of video files and texts on disk, found by content: encoder, recipe, and the file's bytes.

    One safetensors file an entry, written whole, so that many processes may share a folder. An entry that is
    damaged is made again, and counted. In memory stay only the hashes of files, by time and size.
    """

    def __init__(self, folder: Path, backbone: Backbone[V, T]):
        self.folder = folder
        self.backbone = backbone
        self.num_found = self.num_made = self.num_damaged = 0
        self._hashes: dict[tuple[Path, int, int], str] = {}

    def features(self, path: Path, text: str) -> Features[V, T]:
        """Give what `backbone.encode` gives for the video of a file and a text, bit for bit.

        Raises: VideoError: the file is not in the cache and cannot be read.
        """
        return Features(video=self.video(path), text=self.text(text))

    def video(self, path: Path) -> V:
        """Give the features of a video file; where they are known, it is not decoded."""
        backbone = self.backbone
        return self._get(self._content(path), backbone.video_type, lambda: backbone.encode_video(read(path)))

    def has_video(self, path: Path) -> bool:
        """Whether there is an entry for a video file, be it damaged."""
        return self._place(self._content(path)).exists()

    def text(self, text: str) -> T:
        """Give the features of a text."""
        backbone = self.backbone
        return self._get(f"text {text}", backbone.text_type, lambda: backbone.encode_text(text))

    def _content(self, path: Path) -> str:
        state = path.stat()
        seen = (path, state.st_mtime_ns, state.st_size)
        if seen not in self._hashes:
            self._hashes[seen] = sha256(path)
        return f"video {self._hashes[seen]}"

    def _place(self, content: str) -> Path:
        key = hashlib.sha256(f"{self.backbone.encoder_sha256} {self.backbone.recipe} {content}".encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def _get(self, content: str, kind: type[R], make: Callable[[], R]) -> R:
        path = self._place(content)
        if path.exists():
            found = _read_entry(path, kind)
            if found is not None:
                self.num_found += 1
                return found
            self.num_damaged += 1
        made = make()
        _write_entry(path, vars(made))
        self.num_made += 1
        return made


def _write_entry(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new:
        new.write_bytes(safetensors.torch.save({**tensors, _CHECKSUM: _checksum(tensors)}))


def _read_entry(path: Path, kind: type[R]) -> R | None:
    """Read an entry; None if it is damaged."""
    try:
        tensors = safetensors.torch.load(path.read_bytes())
    except SafetensorError:
        return None
    checksum = tensors.pop(_CHECKSUM, None)
    return kind(**tensors) if checksum is not None and torch.equal(checksum, _checksum(tensors)) else None


def _checksum(tensors: dict[str, Tensor]) -> Tensor:
    digest = hashlib.sha256(safetensors.torch.save(tensors)).digest()
    return torch.tensor(list(digest), dtype=torch.uint8)
