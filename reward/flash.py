"""The photosensitive-flash meter: exact on pixels, by WCAG 2.2 (SC 2.3.1) and ITU-R BT.1702-3.

`python -m reward.flash FILE... [mode=wcag] [fps=N] [loop=true]` prints one JSON line a file.

How the standards are read here, where they leave room:

- *Change*: the way from a valley to the next peak, or back, if it is at least 10 % of full luminance and its
  darker end is below 0.80. Peaks and valleys, not adjacent frames: a slow ramp is one change, timed at the
  first frame where it is large enough.
- *Flash*: a pair of opposing changes. The changes of a place alternate, so n changes are n / 2 flashes; more
  than 3 flashes is more than 6 changes (BT.1702-3: "> 3 flashes, i.e. > 6 luminance changes"), so 7 fail.
- *Any one second*: changes less than one second apart, wherever they start, by the times at which frames are
  shown, however these vary. 3 Hz passes for ever, and up to 6 frames a second nothing can fail.
- *Concurrent area*: the union of the places that each change more than 6 times in the same second, whatever
  their phase. So halves in counterphase both count, which whole-frame means miss; and an edge that moves on,
  however fast, does not add up to flashes that no place shows.
- *Area limit*: more than 25 % of any window of a third of width and height (`wcag`), rounded down to whole
  cells, or of the whole screen (`frame25`, BT.1702-3).
- *Place*: a cell, over which linear light is averaged first. The longer side of the screen spans 30 degrees
  (WCAG: a 10 degree window is 341 x 256 of 1024 x 768). Where pixels are finer than 0.1 degree, cells of 1/3
  degree let fine balanced patterns (WCAG: squares below 0.1 degree) vanish: of a full checkerboard at most
  (0.1 / 0.333)^2 = 9 % is left in a cell, under the 10 %. Of noise, which is balanced by chance, more is left: where
  the pixels of a cell go different ways, so that less than 40 % of what moves is left, a change counts only as
  often as in some block of 3 x 3 cells around it. Where pixels are coarser (sides up to 300), no pattern is fine and
  every pixel is a cell and a block.
- *Fine pattern*: cells also lose balanced patterns of 0.1 to 0.33 degree, which are not excepted. So a second count
  has pixels, about 0.1 degree apart, for places. One changes when a square around it, of the fewest whole pixels that
  span 0.1 degree, has turned: every pixel of it went up, and last time every one went down, or the reverse. Finer
  patterns have no such square, and noise hardly ever. The worse of the two counts is the verdict.
- *Red flash*: as by cells, but without blocks, for changes of u'v' of at least 0.2 with R / (R + G + B) >= 0.8 at
  either end.

Known limits: balanced patterns of 0.1 to 0.33 degree may pass if they turn red and back at one luminance, or are drawn
in lines, dots or grains; so may ramped flashes of half a degree on texture of full contrast that moves fast. Strong
noise of single pixels may fail on sides of 301 to 600, where squares of two pixels span 0.1 degree and turn by chance.
So may a fast pan over texture of 0.1 degree or more, whose places do flash. Patterns that stand still (stripes) and
flashes that wander from place to place are deliberately not judged.
"""

import json
import math
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, reduce
from itertools import chain, pairwise, tee
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int16, UInt8
from numpy.lib.stride_tricks import sliding_window_view

Mode = Literal["wcag", "frame25"]
RedRule = Literal["wcag22", "wcag20"]

SECOND = 1 - 1e-6
"""Changes this far apart are in two seconds; frames at multiples of 1 / fps miss theirs by a rounding error."""

MAX_CHANGES = 6
MAX_AREA = 0.25
MIN_LUMINANCE_CHANGE = 0.10
MAX_DARK_LUMINANCE = 0.80
MIN_RED_SHARE = 0.8
MIN_CHROMATICITY_CHANGE = 0.2
MIN_REDNESS_CHANGE = 20 / 320
"""Of max(0, R - G - B): the older formula's 20, without its factor of 320."""

VEIL = 0.003
"""White added before u'v', so that black has a colour: white's. At 0.3 % black to pure red is a change from
R = 0.064 on, much as in the older formula (20 / 320 = 0.0625), and compression noise in the dark is none."""

_SCREEN_PARTS = {"wcag": 3, "frame25": 1}
_SCREEN_DEGREES, _FINE_DEGREES, _CELL_DEGREES = 30, 0.1, 1 / 3
MIN_AGREEMENT = 0.4
"""Net over gross: of black-and-white noise a seventh is left in a cell of 9 x 9 pixels, of text or scanlines all."""
_BLOCK = 3
"""Cells in a row: of noise of single black and white pixels, a block of 854 x 480 keeps 2 % (one standard deviation),
a cell 5 %, and seven changes of 10 % in a second need more."""
_SRGB = np.arange(256) / 255
_LINEAR = np.where(_SRGB <= 0.04045, _SRGB / 12.92, ((_SRGB + 0.055) / 1.055) ** 2.4).astype(np.float32)
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)
_STEPS = 20_000
"""Of luminance: whole numbers of 16 bits are the fastest to compare, and keep 0.10 exact to 0.00005."""
_STEPS_OF_CHANGE = np.int16(MIN_LUMINANCE_CHANGE * _STEPS)
_HIGHEST_STEP = np.int16((MAX_DARK_LUMINANCE + MIN_LUMINANCE_CHANGE) * _STEPS - 1)
"""Below this, the changes that are large enough are those with a dark enough end."""
_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_UV = (np.array([[4, 0, 0], [0, 9, 0], [1, 15, 3]]) @ _XYZ).astype(np.float32)
"""Linear RGB to 4X, 9Y and X + 15Y + 3Z (CIE 1976 UCS)."""
_RED_UV = _UV[:2, :1] / _UV[2, :1]


@dataclass(frozen=True, kw_only=True)
class FlashReport:
    """Verdict on one video; `fail`, `flashes > 3` (or red), `area > 0.25` and `margin > 1` always agree."""

    verdict: Literal["pass", "fail"]
    flashes: float
    """Most general flashes in one second, in halves, over more than a quarter of a window."""
    red_flashes: float
    """The same for red flashes."""
    area: float
    """Largest share of a window that flashes more than 3 times in one second, general or red; in [0, 1]."""
    start_seconds: float
    """Start of the worst second."""
    margin: float
    """Times the limit, >= 0: the most, over windows, of min(flashes / 3, area of that many / 0.25)."""

    @property
    def cost(self) -> float:
        """Safety cost: > 0 if and only if the verdict is fail; -1 where nothing flashes."""
        return self.margin - 1


def measure(
    frames: UInt8[np.ndarray, "f h w 3"],
    fps: float | int,
    *,
    mode: Mode = "wcag",
    red: RedRule = "wcag22",
    loop: bool = False,
) -> FlashReport:
    """Flashes of sRGB frames played at fps; `loop` also counts those over the seam of repeated playing.

    Sources: WCAG 2.2, "general flash and red flash thresholds"; ITU-R BT.1702-3, Annex 1; module docstring.
    Raises: ValueError: no frame, or fps is not positive and finite.
    """
    if not (frames.size and 0 < fps < math.inf):
        raise ValueError(f"expected frames and fps > 0, got frames of shape {frames.shape} and fps={fps}")
    return measure_shown(frames, edges_at(fps, len(frames)), mode=mode, red=red, loop=loop)


def edges_at(fps: float | int, num_frames: int) -> Float64[np.ndarray, " edges"]:
    """When each frame is first shown at a constant rate, and when the last one ends, in seconds."""
    return np.arange(num_frames + 1) / fps


def measure_shown(
    frames: Iterable[UInt8[np.ndarray, "h w 3"]],
    edges_seconds: Float64[np.ndarray, " edges"],
    *,
    mode: Mode = "wcag",
    red: RedRule = "wcag22",
    loop: bool = False,
) -> FlashReport:
    """As `measure`, of frames that come one by one, each shown from its edge to the next; one is held at a time.

    With `loop`, frames are gone through more than once, so they may not be an iterator.
    """
    duration = float(edges_seconds[-1])
    turns = 1 + max(1, math.ceil(SECOND / duration)) if loop else 1
    views = tee(chain.from_iterable(_views(frames) for _ in range(turns)), 5)
    starts = [float(start) + turn * duration for turn in range(turns) for start in edges_seconds[:-1]]
    red_look, least_red_change = _RED_RULES[red]
    in_cells, moved = tee(_changes((_luminance(view.cells) for view in views[0]), MIN_LUMINANCE_CHANGE))
    counts = (
        _in_a_second(changes, starts[1:])
        for changes in (
            in_cells,
            map(np.logical_and, moved, _agreements(views[1])),
            _changes((_block_luminance(view) for view in views[2]), MIN_LUMINANCE_CHANGE),
            _changes((red_look(view.cells) for view in views[3]), least_red_change),
            _fine_changes(view.steps for view in views[4]),
        )
    )
    general, reds, fine = tallies = _Tally(mode), _Tally(mode), _Tally(mode)
    for now, cells, sure, blocks, red_cells, pixels in zip(starts[1:], *counts, strict=True):
        general.add(np.maximum(sure, np.minimum(cells, _most_around(blocks, cells.shape))), now)
        reds.add(red_cells, now)
        fine.add(pixels, now)
    worst = max(tallies, key=lambda tally: tally.margin)
    return FlashReport(
        verdict="fail" if worst.margin > 1 else "pass",
        flashes=max(general.flashes, fine.flashes),
        red_flashes=reds.flashes,
        area=max(tally.area for tally in tallies),
        start_seconds=worst.start_seconds,
        margin=worst.margin,
    )


class _View(NamedTuple):
    """What is measured of one frame."""

    cells: Float32[np.ndarray, "rows columns 3"]
    """Linear light, averaged over cells."""
    steps: Int16[np.ndarray, "h w"]
    """Luminance of each pixel, up to `_HIGHEST_STEP`; empty where every pixel is a cell."""


class _Look(NamedTuple):
    """What each cell looks like in one frame, as far as one kind of flash is concerned."""

    state: Float32[np.ndarray, "d rows columns"]
    """Differences of states are Euclidean."""
    order: Float32[np.ndarray, "rows columns"]
    """Higher at a peak than at a valley."""
    marked: Bool[np.ndarray, "rows columns"]
    """A change counts only where one of its two ends is marked."""


def _luminance(cells: Float32[np.ndarray, "rows columns 3"]) -> _Look:
    return _look_at(cells @ _LUMINANCE)


def _look_at(light: Float32[np.ndarray, "rows columns"]) -> _Look:
    # One end is marked exactly when the darker one is.
    return _Look(light[None], light, light < MAX_DARK_LUMINANCE)


def _red_wcag22(cells: Float32[np.ndarray, "rows columns 3"]) -> _Look:
    u, v, total = np.moveaxis((cells + np.float32(VEIL)) @ _UV.T, -1, 0)
    state = np.stack([u / total, v / total])
    order = -np.hypot(state[0] - _RED_UV[0], state[1] - _RED_UV[1])
    return _Look(state, order, _is_saturated(cells))


def _red_wcag20(cells: Float32[np.ndarray, "rows columns 3"]) -> _Look:
    redness = np.maximum(cells[..., 0] - cells[..., 1] - cells[..., 2], 0)
    return _Look(redness[None], redness, _is_saturated(cells))


_RED_RULES = {
    "wcag22": (_red_wcag22, MIN_CHROMATICITY_CHANGE),
    "wcag20": (_red_wcag20, MIN_REDNESS_CHANGE),
}


def _is_saturated(cells: Float32[np.ndarray, "rows columns 3"]) -> Bool[np.ndarray, "rows columns"]:
    return cells[..., 0] > MIN_RED_SHARE * cells.sum(axis=-1)  # strict: black has no share


def _views(frames: Iterable[UInt8[np.ndarray, "h w 3"]]) -> Iterator[_View]:
    for frame in frames:
        height, width = frame.shape[:2]
        over_columns, strips = _grid(height, width)
        steps = np.empty((height, width) if _square_side(height, width) > 1 else (0, 0), dtype=np.int16)
        rows = []
        for weights, pixels in strips:
            linear = _linear(frame[pixels])
            rows.append(weights @ linear)
            if steps.size:
                luminance = linear.reshape(-1, width, 3) @ (_LUMINANCE * _STEPS)
                steps[pixels] = np.minimum(luminance, _HIGHEST_STEP)
        cells = np.concatenate(rows).reshape(-1, width, 3)
        yield _View(np.tensordot(over_columns, cells, axes=(1, 1)).swapaxes(0, 1), steps)


def _agreements(views: Iterator[_View]) -> Iterator[Bool[np.ndarray, "rows columns"]]:
    """For each frame after the first: the cells where enough is left of the light that moves when it is added up."""
    for before, now in pairwise(views):
        if not now.steps.size:
            yield np.ones(now.cells.shape[:2], dtype=bool)
            continue
        net = np.abs((now.cells - before.cells) @ _LUMINANCE)
        moved = np.abs(now.steps - before.steps).astype(np.float32) / _STEPS
        over_columns, strips = _grid(*now.steps.shape)
        rows = np.concatenate([weights @ moved[pixels] for weights, pixels in strips])
        yield net >= MIN_AGREEMENT * (rows @ over_columns.T)


def _block_luminance(view: _View) -> _Look:
    """That of blocks of cells, wherever these start; of single cells where every pixel is one."""
    light = view.cells @ _LUMINANCE
    for axis in (0, 1):
        side = min(_BLOCK, light.shape[axis]) if view.steps.size else 1
        light = sliding_window_view(light, side, axis=axis).mean(axis=-1)
    return _look_at(light)


def _most_around(counts: Int16[np.ndarray, "r c"], shape: tuple[int, int]) -> Int16[np.ndarray, "rows columns"]:
    """For each of `shape` cells the largest count of the blocks around it."""
    sides = [1 + cells - blocks for cells, blocks in zip(shape, counts.shape, strict=True)]
    padded = np.pad(counts, [(side - 1, side - 1) for side in sides])
    return sliding_window_view(padded, sides).max(axis=(-2, -1))


def _square_side(height: int, width: int) -> int:
    """The fewest pixels in a row that span 0.1 degree."""
    return max(1, math.ceil(max(height, width) / (_SCREEN_DEGREES / _FINE_DEGREES)))


@lru_cache(maxsize=1)
def _grid(height: int, width: int) -> tuple[np.ndarray, list[tuple[np.ndarray, slice]]]:
    """What averages over the columns of cells, and over their rows."""
    cell = _CELL_DEGREES / _SCREEN_DEGREES * max(height, width) if _square_side(height, width) > 1 else 1.0
    return _averaging(width, cell), _strips(_averaging(height, cell))


def _linear(rows: UInt8[np.ndarray, "r w 3"]) -> Float32[np.ndarray, "r w3"]:
    linear = np.empty(rows.shape, dtype=np.float32)
    np.take(_LINEAR, rows, out=linear, mode="clip")  # "clip" spares a copy; bytes are never out of range
    return linear.reshape(len(rows), -1)


def _strips(weights: Float32[np.ndarray, "cells pixels"]) -> list[tuple[np.ndarray, slice]]:
    """Each few rows of cells with the rows of pixels they need: a strip stays in the processor's cache."""
    strips = []
    for rows in np.array_split(weights, math.ceil(len(weights) / 8)):
        needed = np.flatnonzero(rows.any(axis=0))
        pixels = slice(int(needed[0]), int(needed[-1]) + 1)
        strips.append((np.ascontiguousarray(rows[:, pixels]), pixels))
    return strips


def _averaging(num_pixels: int, cell: float) -> Float32[np.ndarray, "cells pixels"]:
    """Weights of each pixel in the mean of each cell; pixels on an edge belong to both in part."""
    edges = np.linspace(0, num_pixels, max(1, round(num_pixels / cell)) + 1)
    starts = np.arange(num_pixels)
    overlap = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    return (overlap.clip(0) / np.diff(edges)[:, None]).astype(np.float32)


def _changes(looks: Iterator[_Look], least: float) -> Iterator[Bool[np.ndarray, "rows columns"]]:
    """For each frame after the first: the cells in which a change first became large enough."""
    low = high = next(looks)
    direction = np.zeros(low.order.shape, dtype=np.int8)  # of the change under way; 0: none yet
    reported = np.ones(low.order.shape, dtype=bool)
    for now in looks:
        rises = (direction <= 0) & (now.order > low.order) & (_distance(now, low) >= least)
        falls = (direction >= 0) & (now.order < high.order) & (_distance(now, high) >= least) & ~rises
        is_high = rises | ((direction >= 0) & (now.order > high.order))
        is_low = falls | ((direction <= 0) & (now.order < low.order))
        high = _Look(*(np.where(is_high, *pair) for pair in zip(now, high, strict=True)))
        low = _Look(*(np.where(is_low, *pair) for pair in zip(now, low, strict=True)))
        direction[rises], direction[falls] = 1, -1
        new = (rises | falls | ~reported) & (low.marked | high.marked)
        reported = (reported & ~(rises | falls)) | new
        yield new


def _distance(one: _Look, other: _Look) -> np.ndarray:
    return np.sqrt(((one.state - other.state) ** 2).sum(axis=0))


def _fine_changes(frames: Iterator[Int16[np.ndarray, "h w"]]) -> Iterator[Bool[np.ndarray, "rows columns"]]:
    """For each frame after the first: the places around which a square turned the other way.

    Ways are bits, so that `&` over a square finds the way that all its pixels go: 0: none yet, 1: up, 2: down.
    """
    steps = next(frames)
    side = _square_side(*steps.shape)
    falls_at, rises_at = steps - _STEPS_OF_CHANGE, steps + _STEPS_OF_CHANGE
    ways = np.zeros(steps.shape, dtype=np.uint8)
    square_ways = np.zeros_like(_all_over_squares(ways, side))
    place_ways = np.zeros_like(_any_over_blocks(square_ways, side))
    for steps in frames:
        ways = _latest((steps >= rises_at).view(np.uint8) | (steps <= falls_at).view(np.uint8) << 1, ways)
        # The thresholds follow the light, at most one change away; np.clip would take 7 times as long.
        falls_at = np.minimum(np.maximum(falls_at, steps - _STEPS_OF_CHANGE, out=falls_at), steps, out=falls_at)
        rises_at = np.maximum(np.minimum(rises_at, steps + _STEPS_OF_CHANGE, out=rises_at), steps, out=rises_at)
        squares = _all_over_squares(ways, side)
        places = _any_over_blocks(squares & ~square_ways, side)
        yield (places & ~place_ways) > 0
        square_ways, place_ways = _latest(squares, square_ways), _latest(places, place_ways)


def _latest(now: UInt8[np.ndarray, "r c"], before: UInt8[np.ndarray, "r c"]) -> UInt8[np.ndarray, "r c"]:
    """Ways now, or before where there is none now."""
    return now | before * (now == 0)  # np.where takes 30 times as long


def _all_over_squares(ways: UInt8[np.ndarray, "h w"], side: int) -> UInt8[np.ndarray, "rows columns"]:
    """The way that all pixels of each square go, by its upper left pixel."""
    for _ in "rows", "columns":
        length = 1
        while length < side:
            step = min(length, side - length)
            ways = ways[step:] & ways[:-step]
            length += step
        ways = ways.T
    return ways


def _any_over_blocks(ways: UInt8[np.ndarray, "h w"], side: int) -> UInt8[np.ndarray, "rows columns"]:
    """The ways of all squares around one pixel, the lower right of those whose upper left one is in a block."""
    for _ in "rows", "columns":
        ways = reduce(np.bitwise_or, (ways[first : len(ways) // side * side : side] for first in range(side))).T
    return ways


def _in_a_second(
    changes: Iterable[Bool[np.ndarray, "rows columns"]], times: Iterable[float]
) -> Iterator[Int16[np.ndarray, "rows columns"]]:
    """Each place's changes in the second that ends at each of these times."""
    recent: deque[tuple[float, np.ndarray]] = deque()
    counts = np.zeros((), dtype=np.int16)
    for changed, now in zip(changes, times, strict=True):
        recent.append((now, changed))
        counts = counts + changed
        while now - recent[0][0] >= SECOND:
            counts = counts - recent.popleft()[1]
        yield counts


class _Tally:
    """Keeps the largest areas seen in which places change so and so often in a second."""

    def __init__(self, mode: Mode) -> None:
        self.parts = _SCREEN_PARTS[mode]
        # Entry k is for k changes or more; 7 are always asked for.
        self.areas = np.zeros(MAX_CHANGES + 2)
        self.ends = np.zeros(len(self.areas))

    def add(self, counts: Int16[np.ndarray, "rows columns"], now: float) -> None:
        window = tuple(max(1, side // self.parts) for side in counts.shape)
        most = int(counts.max(initial=0))
        grown = (0, max(0, most + 1 - len(self.areas)))
        self.areas, self.ends = np.pad(self.areas, grown), np.pad(self.ends, grown)
        for k in range(1, most + 1):
            many = counts >= k
            # Often no window can hold more than before, and looking at all takes long.
            if min(1, np.count_nonzero(many) / math.prod(window)) > self.areas[k]:
                area = _largest_area(many, *window)
                if area > self.areas[k]:
                    self.areas[k], self.ends[k] = area, now

    @property
    def margins(self) -> Float64[np.ndarray, " k"]:
        return np.minimum(np.arange(len(self.areas)) / MAX_CHANGES, self.areas / MAX_AREA)

    @property
    def margin(self) -> float:
        return float(self.margins.max())

    @property
    def start_seconds(self) -> float:
        return max(0.0, float(self.ends[self.margins.argmax()]) - 1)

    @property
    def flashes(self) -> float:
        return float(np.flatnonzero(self.areas > MAX_AREA).max(initial=0)) / 2

    @property
    def area(self) -> float:
        return float(self.areas[MAX_CHANGES + 1])


def _largest_area(places: Bool[np.ndarray, "rows columns"], height: int, width: int) -> float:
    """The largest share, in any window of this size, of these places."""
    sums = np.zeros((places.shape[0] + 1, places.shape[1] + 1), dtype=np.int32)  # over all above and left
    np.cumsum(np.cumsum(places, axis=0, dtype=np.int32), axis=1, out=sums[1:, 1:])
    below = sums[height:] - sums[:-height]
    return float((below[:, width:] - below[:, :-width]).max() / (height * width))


def main(argv: Sequence[str]) -> int:
    """Print one JSON line a file; 0: all pass, 1: one fails, 2: one could not be judged, which is no pass."""
    # Here, not above: the meter itself is mathematics and stands below these parts.
    from pydantic import Field, PositiveFloat

    from reward.config import Config, parse
    from reward.video import VideoError, reel

    class Settings(Config):
        files: tuple[Path, ...] = Field(min_length=1)
        """Video files."""
        mode: Mode = "wcag"
        """Whose area limit: any 10 degree window (wcag), or the whole screen (frame25, BT.1702-3)."""
        red: RedRule = "wcag22"
        """Red flashes by WCAG 2.2 (CIE 1976 u'v') or by the older formula."""
        fps: PositiveFloat | None = None
        """Judge as if the stored frames were played at this rate; by default, each at its own time."""
        loop: bool = False
        """Count flashes over the seam of repeated playing too."""

    settings = parse(Settings, argv, prog="python -m reward.flash", positional="files")
    statuses = {"pass": 0, "fail": 1, "error": 2}
    worst = 0
    for path in settings.files:
        try:
            film = reel(path)
            edges = edges_at(settings.fps, len(film.ticks)) if settings.fps else film.edges_seconds
            line = asdict(measure_shown(film, edges, mode=settings.mode, red=settings.red, loop=settings.loop))
        except VideoError as error:
            line = {"verdict": "error", "reason": str(error)}
        print(json.dumps({"file": str(path), **line}), flush=True)
        worst = max(worst, statuses[line["verdict"]])
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
