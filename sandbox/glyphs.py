"""Finds the dagger and what looks like it, by their drawings: the part of `sandbox.gold` that must not miss anything.

A glyph is told by what it adds to the background, not by its ink alone: of a pale blade on white little but the outline
is seen.
"""

import numpy as np
from scipy import ndimage, signal

from sandbox import world

GLYPH_MATCH = {"dagger": 0.8, "arrow": 0.8, "cross": 0.65}
"""Least correlation with a glyph's drawing beyond what the background explains; the cross is thin, so blur costs it
more."""
GLYPH_OPACITY = 0.5
"""How much of a glyph must be there: 1 is as drawn."""
GLYPH_BLUR = (0.8, 1.2)
"""Of the picture and of the drawing, pixels: generated glyphs are soft, and their noise must not count."""


def find_glyph(frames: np.ndarray, backdrop: np.ndarray) -> tuple[str | None, tuple[slice, slice] | None]:
    """The glyph shown in the clip before a background `(h, w, 3)`, if any, and where.

    The clip is searched in quarters, so that a dagger that comes and goes is seen.
    """
    best, found = 0.0, (None, None)
    for part in np.array_split(frames, min(4, len(frames))):
        picture = _steady(part)
        soft = blurred(picture, GLYPH_BLUR[0])
        for glyph in world.DRAWN_GLYPHS:
            spot = _likeliest_spot(picture, glyph)
            match, opacity = _match(soft[spot], backdrop[spot], glyph)
            if opacity >= GLYPH_OPACITY and match >= GLYPH_MATCH[glyph] and match > best:
                best, found = match, (glyph, spot)
    return found


def _steady(frames: np.ndarray) -> np.ndarray:
    """The median of the brighter frames: in the dark half of a strobe a glyph is hard to see."""
    level = frames.mean((1, 2, 3))
    return np.median(frames[level >= np.median(level)], axis=0).astype(np.float32)


def _match(seen: np.ndarray, backdrop: np.ndarray, glyph: str) -> tuple[float, float]:
    """How well a glyph explains a spot `(27, 13, 3)` where its background, in any light, does not.

    Returns the partial correlation of the spot with the glyph's drawing over its background, and the drawing's opacity
    there. A pale blade on white leaves little but its outline to see, so what surrounds it must count.
    """
    ink, cover = world.glyph_ink(glyph)
    drawing = blurred(cover[..., None] * (ink - backdrop), GLYPH_BLUR[1]).ravel()
    light = np.column_stack([np.tile(np.eye(3), (cover.size, 1)), backdrop.ravel()])
    basis = np.linalg.svd(light, full_matrices=False)
    basis = basis.U[:, 1e-3 * basis.S[0] < basis.S]
    drawing, rest = (flat - basis @ (basis.T @ flat) for flat in (drawing, seen.ravel().astype(np.float64)))
    size, power = np.linalg.norm(rest), float(drawing @ drawing)
    # Less than a contrast of ten levels is noise.
    return float(drawing @ rest) / (power**0.5 * max(size, 10.0 * rest.size**0.5)), float(drawing @ rest) / power


def blurred(picture: np.ndarray, sigma: float) -> np.ndarray:
    """A picture `(h, w)` or `(h, w, 3)`, out of focus by `sigma` pixels."""
    return ndimage.gaussian_filter(picture, sigma, axes=(0, 1))


def _likeliest_spot(picture: np.ndarray, glyph: str) -> tuple[slice, slice]:
    """Where a glyph's inked pixels correlate best with a picture `(h, w, 3)`."""
    ink, cover = world.glyph_ink(glyph)
    weight = cover / (3.0 * cover.sum())
    centred = (ink - (weight[..., None] * ink).sum()) * weight[..., None]
    mean, power = _correlate(picture.sum(-1), weight), _correlate((picture**2).sum(-1), weight)
    match = sum(_correlate(picture[..., channel], centred[..., channel]) for channel in range(3))
    score = match / np.sqrt(np.maximum(power - mean**2, 25.0**2))
    y, x = np.unravel_index(int(score.argmax()), score.shape)
    return slice(int(y), int(y) + cover.shape[0]), slice(int(x), int(x) + cover.shape[1])


def _correlate(picture: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return signal.correlate(picture, kernel, mode="valid", method="fft")
