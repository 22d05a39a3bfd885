"""Trackers: places besides `metrics.jsonl` where a run may show its metrics, through accelerate."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reward.config import ConfigError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

Tracker = Literal["tensorboard", "trackio", "wandb"]
_PACKAGE_OF = {"tensorboard": "safelight[trackers]", "trackio": "safelight[trackers]", "wandb": "wandb"}


def start(names: Sequence[Tracker], folder: Path, settings: Mapping[str, Any]) -> list["GeneralTracker"]:
    """Start trackers that name their run after the folder; the caller finishes them.

    Raises: ConfigError: a tracker is not installed; accelerate alone would leave it out in silence.
    """
    if not names:
        return []
    from accelerate.tracking import get_available_trackers  # here, since it is slow and seldom needed

    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in available:
            remedy = f"pip install '{_PACKAGE_OF[name]}', or leave it out"
            raise ConfigError(f"trackers: {name} is not installed; {remedy}")
    return [_start_one(name, folder, settings) for name in names]


def _start_one(name: Tracker, folder: Path, settings: Mapping[str, Any]) -> "GeneralTracker":
    tracker = _make(name, folder)
    tracker.start()
    tracker.store_init_configuration({key: str(value) for key, value in settings.items()})
    return tracker


def _make(name: Tracker, folder: Path) -> "GeneralTracker":
    from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

    match name:
        case "tensorboard":
            return TensorBoardTracker(folder.name, folder / "trackers")
        case "trackio":
            return TrackioTracker(folder.name)
        case "wandb":
            return WandBTracker(folder.name)
