"""How a video file is shown to a policy: which frames, which part of them, and at what size.

Nothing is drawn at random, and a video that already has the sampler's size and rate is shown bit for bit.
"""

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from align.sample import Sampler
from reward.video import VideoError, VideoInfo, read_at

RECIPE = "show 1"
"""To be counted up when the same file would be shown differently."""

_ROUNDING_SECONDS = 1e-3  # of durations in headers


def show(info: VideoInfo, sampler: Sampler) -> UInt8[np.ndarray, "f h w 3"]:
    """Give the frames that a policy is shown: those on screen at `Sampler.view`'s times, cropped and resized.

    A file may end at the very time of the last frame, as one of 5 s does for 81 frames at 16 fps; then that is the
    file's last one.

    Raises: VideoError: unreadable, damaged, or shorter than that.
    """
    times = sampler.view("").frame_seconds
    top, left, height, width = crop_of(info.height, info.width, sampler)
    stored = read_at(info.path, _on_screen(times, info, sampler))
    part = stored[:, top : top + height, left : left + width]
    return np.stack([_resized(frame, sampler) for frame in part])


def crop_of(height: int, width: int, sampler: Sampler) -> tuple[int, int, int, int]:
    """Give the largest part of the sampler's shape, in the middle: top, left, height and width, in pixels."""
    crop_height = min(height, round(width * sampler.height / sampler.width))
    crop_width = min(width, round(height * sampler.width / sampler.height))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _on_screen(times: tuple[float, ...], info: VideoInfo, sampler: Sampler) -> list[float]:
    """Move the last time into the file's last frame where the file ends at it."""
    found, needed = info.duration_seconds, times[-1]
    if found is None or needed < found - _ROUNDING_SECONDS:  # where the header does not say, `read_at` does
        return list(times)
    if needed > found + _ROUNDING_SECONDS:
        raise VideoError(
            f"{info.path}: too short: {sampler.num_frames} frames at {sampler.fps:g} fps need {needed:g} s, it has "
            f"{found:g} s; leave it out, lower num_frames, or raise fps"
        )
    return [*times[:-1], found - 0.5 / info.fps]


def _resized(frame: UInt8[np.ndarray, "h w 3"], sampler: Sampler) -> UInt8[np.ndarray, "h w 3"]:
    # Pillow widens the filter when it shrinks, and so averages over an area. Its BOX would tear where sizes are no
    # multiples of each other.
    image = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize((sampler.width, sampler.height), Image.Resampling.BILINEAR))
