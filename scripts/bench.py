"""Time the parts that must be fast, each beside the speed it must reach.

python scripts/bench.py [NAME ...] [num_repeats=3]

Prints one JSON line each, in seconds of video per second of one processor core, so that neither a busy
machine nor more cores change much. For looking at, not for failing.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from reward import flash, video
from reward.config import Config, parse

FPS = 16


class BenchConfig(Config):
    """Time the parts that must be fast."""

    names: tuple[Literal["flash", "read"], ...] = ("flash", "read")
    """Which parts: the flash meter, or reading every frame of a file."""
    width: int = 854
    height: int = 480
    num_frames: int = 32
    """At 16 fps."""
    num_repeats: int = 3
    """The fastest counts."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How many times faster than real time a part is, on one core."""

    name: str
    work: str
    times_real_time: float
    required: float


def sample_video(config: BenchConfig) -> video.Video:
    """Noise that drifts, its left half strobing: detail to encode, and changes to count."""
    random = np.random.default_rng(0)
    still = random.integers(0, 128, (config.height, config.width, 3), dtype=np.uint8)
    frames = np.stack([np.roll(still, 3 * number, axis=1) for number in range(config.num_frames)])
    frames[::2, :, : config.width // 2] += 127
    return video.Video(frames=frames, fps=FPS)


def time_flash(config: BenchConfig) -> Speed:
    """Give the speed of the flash meter."""
    clip = sample_video(config)
    return _speed("flash", lambda: flash.measure(clip.frames, clip.fps), 10, config)


def time_read(config: BenchConfig) -> Speed:
    """Give the speed of decoding every frame."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        video.write(path, sample_video(config))
        return _speed("read", lambda: video.read(path), 2, config)


BENCHMARKS = {"flash": time_flash, "read": time_read}


def _speed(name: str, work: Callable[[], object], required: float, config: BenchConfig) -> Speed:
    fastest = min(_core_seconds(work) for _ in range(config.num_repeats))
    return Speed(
        name=name,
        work=f"{config.num_frames} frames of {config.width}x{config.height} at {FPS} fps",
        times_real_time=round(config.num_frames / FPS / fastest, 1),
        required=required,
    )


def _core_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main(argv: Sequence[str]) -> None:
    """Print one JSON line for each part."""
    config = parse(BenchConfig, argv, prog="python scripts/bench.py", positional="names")
    for name in config.names:
        print(json.dumps(asdict(BENCHMARKS[name](config))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
