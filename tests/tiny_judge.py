"""A finished run of a reward model in small: a random CLIP, random heads, and a calibration written by hand."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reward import video
from reward.backbone import Dual
from reward.features import Limits
from reward.model import ModelConfig, RewardModel
from reward.records import TAGS
from reward.scores import SUB_DIMENSIONS
from reward.video import Video
from tests import tiny_encoders

LIMITS = Limits(fps=(16, 16), height=(32, 48), width=(32, 64))
TRAINED = ("helpfulness", *SUB_DIMENSIONS, "cost", *(tag for tag in TAGS if tag != "child_abuse"))
CALIBRATION = {
    "reward_mean": 0.5,
    "reward_scale": 2.0,
    "cost_scale": 4.0,
    "cost_has_zero": True,
    "tag_offsets": [number / 10 for number in range(12)],
    "trained": list(TRAINED),
}


def write_run(root: Path, *, num_members: int = 3, **calibration: Any) -> Path:
    """Write ROOT/run and its encoder; give the run."""
    encoder = root / "clip"
    if not encoder.exists():
        tiny_encoders.clip(encoder)
    backbone = Dual(encoder=encoder, num_frames=8, width=32)
    # Of its random heads, these call some of the random videos unsafe, and others not.
    model = RewardModel.build(ModelConfig(backbone=backbone, num_members=num_members, limits=LIMITS), seed=2)
    model.save(root / "run" / "model")
    calibrate(root / "run", **calibration)
    return root / "run"


def calibrate(run: Path, **changes: Any) -> None:
    """Write the calibration of a run anew."""
    (run / "calibration.json").write_text(json.dumps({**CALIBRATION, **changes}))


def refill(run: Path, *, cost: float) -> Path:
    """Have a run say this cost of every video."""
    model = RewardModel.load(run / "model")
    with torch.no_grad():
        for name, parameter in model.trained().items():
            if name.startswith("heads.") and name.endswith((".weight", ".bias")) and len(parameter) == 18:
                parameter[5] = 4 * cost if name.endswith("bias") else 0.0
    shutil.rmtree(run / "model")
    model.save(run / "model")
    return run


def flashing(*, fps: float = 16.0) -> Video:
    """Two seconds of black and white by turns: 8 flashes a second."""
    frames = np.zeros((32, 40, 64, 3), dtype=np.uint8)
    frames[1::2] = 255
    return Video(frames=frames, fps=fps)


def still() -> Video:
    """Two seconds of grey."""
    return Video(frames=np.full((32, 40, 64, 3), 128, dtype=np.uint8), fps=16.0)


def write_video(path: Path, content: Video) -> Path:
    """Write a video file; give its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    video.write(path, content)
    return path
