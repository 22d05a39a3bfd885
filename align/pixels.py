"""What the pixels of a video tell without a model: how much moves, and whether it is blank, noise or frozen.

Motion is how fast contrasts move over the picture, in contrasts a second. With cells averaged, about 32 to the shorter
side, so that the size of a video hardly matters:

    picture = (cells - their mean) / max(their RMS contrast, FAINT)       of each frame, the colours together
    motion  = fps min over lags of mean |picture(f + lag) - picture(f)| / lag       lags of up to a third of a second

A strobe must not pass for motion, or an alignment that removes strobes would seem to freeze videos. Light on the whole
picture only shifts and stretches its levels, which `picture` undoes. Light on a part comes back: three times a second
or more, there is a lag at which it makes no difference, while that of a moving thing grows with the lag. The division
by the lag also makes a frame shown twice no loss.

Known limits: what repeats itself three times a second, such as a fast wheel, reads as flicker; what jumps by more than
its size reads as slow; noise reads as motion. A strobe on half a picture adds contrast, so what moves there reads a
third too slow.
"""

import math
from typing import Literal

import numpy as np
from jaxtyping import Float32, UInt8

Frames = UInt8[np.ndarray, "f h w 3"]
Pictures = Float32[np.ndarray, "f rows columns 3"]
Flaw = Literal["blank", "noise", "frozen"]

FAINT = 4.0
"""RMS contrast, in levels of 255, below which there is nothing to see. The sandbox draws 7 or more."""
FROZEN = 0.1
"""Contrasts a second below which nothing moves. Whatever moves in the sandbox has 0.13 or more."""
MAX_NOISE_CORRELATION = 0.25
"""Noise, white or decoded from latents, seldom has more; what the sandbox draws has 0.4 or more."""

FLICKER_SECONDS = 1 / 3
MIN_SIDE = 8
"""Pixels, and cells for noise."""


def find_flaw(frames: Frames, fps: float | int) -> Flaw | None:
    """Name what makes a video useless, the first that holds; a request to stand still is rightly frozen.

    Raises: ValueError: see `motion`.
    """
    if is_blank(frames):
        return "blank"
    if is_noise(frames):
        return "noise"
    return "frozen" if is_frozen(frames, fps) else None


def motion(frames: Frames, fps: float | int) -> float:
    """Give how much moves, >= 0, in contrasts a second: 0 where all frames are the same but for their light.

    Raises: ValueError: there are fewer than two frames, or under 8 pixels a side; fps is not positive and finite.
    """
    if len(frames) < 2 or not 0 < fps < math.inf:
        raise ValueError(f"motion: expected two frames or more and fps > 0, got {len(frames)} frames at fps={fps}")
    contrast = _contrast(frames, 32)
    picture = contrast / np.maximum(_rms(contrast), FAINT)[:, None, None, None]
    lags = range(1, min(math.ceil(fps * FLICKER_SECONDS), len(frames) - 1) + 1)
    return fps * min(np.abs(picture[lag:] - picture[:-lag]).mean().item() / lag for lag in lags)


def is_frozen(frames: Frames, fps: float | int) -> bool:
    """Tell whether nothing moves; light may change. Raises: ValueError: see `motion`."""
    return motion(frames, fps) < FROZEN


def is_blank(frames: Frames) -> bool:
    """Tell whether frames show nothing, on average: one colour each, whichever."""
    return _rms(_contrast(frames, 32)).mean().item() < FAINT


def is_noise(frames: Frames) -> bool:
    """Tell whether parts of the picture have nothing to do with their neighbours, in any direction.

    Eight cells to the shorter side, so that a cell holds whole blocks of an autoencoder: noise in its latents decodes
    to blocks, whose pixels are much alike. A regular pattern has cells that correlate one or two steps away.
    """
    contrast = _contrast(frames, MIN_SIDE)
    most = MAX_NOISE_CORRELATION * np.square(contrast).mean()
    return all(abs(_covariance(contrast, axis, lag)) < most for axis in (1, 2) for lag in (1, 2))


def _contrast(frames: Frames, num_cells: int) -> Pictures:
    """Give how far each cell is from the mean of its frame and colour; `num_cells` to the shorter side, or a few more.

    Pixels that fill no cell, at the right and the bottom, are left out.
    """
    height, width = frames.shape[1:3]
    if min(height, width) < MIN_SIDE:
        raise ValueError(f"frames: expected {MIN_SIDE} pixels a side or more, got {width}x{height}")
    cell = max(1, min(height, width) // num_cells)
    rows, columns = height // cell, width // cell
    blocks = frames[:, : rows * cell, : columns * cell].reshape(len(frames), rows, cell, columns, cell, 3)
    cells = blocks.mean(axis=(2, 4), dtype=np.float32)
    return cells - cells.mean(axis=(1, 2), keepdims=True)


def _rms(contrast: Pictures) -> Float32[np.ndarray, " f"]:
    return np.sqrt(np.square(contrast).mean(axis=(1, 2, 3)))


def _covariance(contrast: Pictures, axis: int, lag: int) -> float:
    """Give the mean product of cells that many steps apart."""
    along = np.moveaxis(contrast, axis, 0)
    return (along[lag:] * along[:-lag]).mean().item()
