import json
import math
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_video import encode

from reward import flash, video

few = settings(max_examples=10)


def grey(luminance):
    """The sRGB byte of a relative luminance in [0, 1]."""
    luminance = np.asarray(luminance, dtype=np.float64)
    srgb = np.where(luminance <= 0.0031308, 12.92 * luminance, 1.055 * luminance ** (1 / 2.4) - 0.055)
    return np.rint(255 * srgb).astype(np.uint8)


def square(hz, num_frames, fps):
    """0 and 1 in turn; exact whole numbers, so that a period of whole frames has no drift."""
    return (2 * hz * np.arange(num_frames) // fps % 2).astype(int)


def cosine(hz, num_frames, fps):
    return 0.5 + 0.5 * np.cos(2 * np.pi * hz * np.arange(num_frames) / fps)


def film(luminances, size=(16, 16)):
    """Whole grey frames of these luminances."""
    return np.broadcast_to(grey(luminances)[:, None, None, None], (len(luminances), *size, 3)).copy()


def strobe(hz=4, fps=16, num_frames=17, dark=(0, 0, 0), bright=(255, 255, 255), size=(16, 16)):
    colours = np.array([dark, bright], dtype=np.uint8)[square(hz, num_frames, fps)]
    return np.broadcast_to(colours[:, None, None], (num_frames, *size, 3)).copy()


def inside(frames, num_rows, num_columns):
    """The film in the upper left corner only; elsewhere its first frame stands still."""
    still = np.broadcast_to(frames[:1], frames.shape).copy()
    still[:, :num_rows, :num_columns] = frames[:, :num_rows, :num_columns]
    return still


# What the standard says of whole-screen flashes


GREY = [
    ((dark,) * 3, (dark + amplitude,) * 3, amplitude >= 0.1 and dark < 0.8)
    for amplitude, dark in [(0.09, 0), (0.11, 0), (0.8, 0), (0.09, 0.5), (0.3, 0.5), (0.11, 0.78), (0.15, 0.82)]
]
"""Linear colours of two ends, and whether a change between them counts."""
RED = [
    ((0, 0, 1), (0.34, 0, 0), True),
    ((0, 0, 0), (0.09, 0, 0), True),
    ((0, 0, 0), (0.05, 0, 0), False),  # u'v' 0.16 from black's, under 0.2
    ((0, 0, 1), (0.2, 0.06, 0.06), False),  # share 0.63 < 0.8
    ((0.3, 0.06, 0), (0.3, 0, 0), False),  # both saturated, u'v' 0.13 apart
]
"""The same for red; luminances differ by less than 0.10."""
SIZES = {"frame25": (1, 20), "wcag": (3, 60)}
"""Screens on which the area is one row of 20 pixels: the whole one, or its upper left window."""


@pytest.mark.parametrize("kind", ["grey", "red"])
@pytest.mark.parametrize("mode", ["wcag", "frame25"])
@pytest.mark.parametrize("wave", [square, cosine])
@pytest.mark.parametrize("hz", [1, 3, 4, 6])
@pytest.mark.parametrize("share", [0.25, 0.3])
def test_square_and_cosine_flashes_by_rate_colours_and_area(kind, mode, wave, hz, share):
    """Fail: more than 3 Hz, a change that counts, and more than a quarter of the window."""
    for dark, bright, counts in {"grey": GREY, "red": RED}[kind]:
        colours = grey(np.outer(1 - wave(hz, 25, 24), dark) + np.outer(wave(hz, 25, 24), bright))
        frames = inside(np.tile(colours[:, None, None], (1, *SIZES[mode], 1)), 1, round(20 * share))
        report = flash.measure(frames, 24, mode=mode)
        fails = counts and hz > 3 and share > 0.25
        assert report.verdict == ("fail" if fails else "pass"), (dark, bright)
        flashes = {"grey": report.flashes, "red": report.red_flashes}
        assert (flashes.pop(kind) > 3) == fails, (dark, bright)
        assert set(flashes.values()) == {0}, "of the other kind"


def test_golden_count_of_the_fastest_strobe_in_one_second():
    """16 frames at 16 fps, black and white in turn: 15 changes, 7.5 flashes; margin 15 / 6 = 2.5."""
    report = flash.measure(strobe(hz=8, num_frames=16), 16)
    assert report == flash.FlashReport(
        verdict="fail", flashes=7.5, red_flashes=0.0, area=1.0, start_seconds=0.0, margin=2.5
    )
    assert report.cost == 1.5


def test_three_flashes_a_second_pass_for_ever_and_a_little_more_does_not():
    """At 3 Hz any 7 changes span 6 / 6 = 1 second, which is not inside one second; at 3.2 Hz 0.94 s."""
    assert flash.measure(strobe(3, fps=60, num_frames=180), 60).margin == 1
    assert flash.measure(strobe(3.2, fps=60, num_frames=180), 60).verdict == "fail"


@pytest.mark.parametrize("num_frames", [16, 17])
@pytest.mark.parametrize(("hz", "verdict"), [(1, "pass"), (2, "pass"), *((hz, "fail") for hz in range(4, 9))])
@pytest.mark.parametrize("part", [(64, 64), (20, 20)])
def test_one_second_clips_of_64_pixels(num_frames, hz, verdict, part):
    """4 Hz on 16 frames at 16 fps: 8 half-periods, 7 changes between them: more than 6, so it fails."""
    frames = inside(strobe(hz, num_frames=num_frames, size=(64, 64)), *part)
    assert flash.measure(frames, 16).verdict == verdict


def test_a_pulse_of_2_hertz_passes_with_two_thirds_of_the_limit():
    assert flash.measure(film(cosine(2, 33, 16)), 16).margin == pytest.approx(4 / 6)


def test_a_fade_in_is_one_change():
    report = flash.measure(film(np.linspace(0, 1, 60)), 30)
    assert (report.verdict, report.flashes, report.margin) == ("pass", 0.5, pytest.approx(1 / 6))


def test_slow_ramps_count_from_peak_to_valley():
    """4 Hz triangle at 60 fps: steps of 0.5 / 7.5 = 0.067 < 0.10, yet 8 changes of 0.5 a second."""
    ramp = 0.5 * np.abs(2 * (np.arange(121) / 15 % 1) - 1)
    assert np.abs(np.diff(ramp)).max() < 0.1
    assert flash.measure(film(ramp), 60).flashes == 4
    assert flash.measure(film(ramp * 0.18), 60).margin == 0  # peak to valley 0.09


def test_a_rise_with_a_small_dip_is_one_change():
    assert flash.measure(film([0, 0.2, 0.4, 0.33, 0.5, 0.8]), 30).flashes == 0.5


@pytest.mark.parametrize(("seconds", "verdict"), [(0.3, "pass"), (0.1, "fail")])
def test_cuts_between_a_dark_and_a_bright_scene(seconds, verdict):
    """Each 0.3 s: 3.3 changes a second, under 6; each 0.1 s: 10."""
    scenes = np.arange(120) // round(30 * seconds) % 2
    assert flash.measure(film(0.05 + 0.6 * scenes), 30).verdict == verdict


def test_a_still_clip_has_margin_0():
    assert flash.measure(np.full((20, 8, 8, 3), 77, np.uint8), 16).margin == 0


def test_a_change_between_two_very_bright_states_is_none():
    assert flash.measure(film(0.82 + 0.18 * square(8, 17, 16)), 16).margin == 0


# Where on the screen


def test_the_least_area_in_a_10_degree_window_to_the_pixel():
    """64 / 3 rounds down to windows of 21 x 21 = 441 pixels; a quarter is 110.25: 110 pass, 111 fail."""
    frames = inside(strobe(size=(64, 64)), 11, 10)
    assert flash.measure(frames, 16).verdict == "pass"
    frames[:, 11, 0] = frames[:, 0, 0]
    report = flash.measure(frames, 16)
    assert (report.verdict, report.area) == ("fail", 111 / 441)
    assert flash.measure(frames, 16, mode="frame25").verdict == "pass"


def test_scattered_flashes_count_where_they_are_dense():
    frames = strobe(size=(60, 60))
    frames[:, :, ::5] = frames[:1, :, ::5]  # four fifths flash, everywhere
    assert flash.measure(frames, 16).area == pytest.approx(0.8)


@pytest.mark.parametrize("mode", ["wcag", "frame25"])
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_in_opposite_phase_do_not_cancel(mode, parts):
    """The mean of the whole frame stands still; tools that look at it see nothing."""
    frames = strobe(size=(48, 48))
    for part in range(1, parts, 2):
        columns = slice(48 * part // parts, 48 * (part + 1) // parts)
        frames[:, :, columns] = 255 - frames[:, :, columns]
    assert np.ptp(frames.mean(axis=(1, 2, 3))) == 0
    assert flash.measure(frames, 16, mode=mode).flashes == 4


def test_a_third_of_the_screen_by_a_third_of_the_contrast():
    """30 % x 0.3: the mean of the whole frame moves by 0.09, less than 0.10."""
    frames = inside(film(0.3 * square(4, 17, 16), size=(40, 40)), 40, 12)
    assert flash.measure(frames, 16, mode="frame25").verdict == "fail"


def test_an_edge_that_moves_on_is_no_flash():
    frames = np.zeros((32, 32, 32, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[:, number : number + 8] = 255
    assert flash.measure(frames, 32).flashes == 1


def board(side, size=(480, 854), lights=(0, 1) * 8):
    """A checkerboard in counterphase: these luminances in half of its squares, 1 less them in the others."""
    odd = (np.indices(size) // side).sum(axis=0) % 2
    lights = np.asarray(lights)[:, None, None]
    return np.where(odd, grey(1 - lights), grey(lights))[..., None].repeat(3, axis=3)


@pytest.mark.parametrize("side", [1, 2])
def test_a_fine_checkerboard_is_excepted(side):
    """854 pixels span 30 degrees: 2 pixels are 0.07 degree, under 0.1."""
    assert flash.measure(board(side), 16).margin < 1


@pytest.mark.parametrize("side", [3, 4, 5, 6])
def test_a_checkerboard_that_is_hardly_fine_is_not_excepted(side):
    """3 to 6 pixels of 854 are 0.105 to 0.211 degree, above 0.1; the cells of 1/3 degree hardly see them."""
    assert flash.measure(board(side), 16).flashes == 7.5


@settings(max_examples=30)
@given(st.sampled_from([301, 480, 640, 854, 900, 1280]), st.data())
def test_a_checkerboard_is_excepted_below_a_tenth_of_a_degree_only(width, data):
    """Wherever it begins, and with a contrast of 0.11; pixels are 30 / width degrees wide, so 3 of 900 are 0.1."""
    side = data.draw(st.integers(1, width * 4 // 300))
    top, left = (data.draw(st.integers(0, 2 * side - 1)) for _ in "yx")
    frames = board(side, (60 + top, width + left), (0.445, 0.555) * 4)[:, top:, left:]
    assert flash.measure(frames, 16).verdict == ("fail" if side * 30 >= 0.1 * width else "pass")


@pytest.mark.parametrize(("hz", "margin"), [(2, 4 / 6), (3, 1), (4, 8 / 6)])
def test_fine_squares_change_once_though_noise_spreads_their_pixels_over_frames(hz, margin):
    """4 pixels of 854 in a cosine at 60 fps: 2 hz changes a second, as of any place."""
    frames = board(4, (60, 854), cosine(hz, 120, 60)).astype(np.int16)
    noise = np.random.default_rng(0).normal(0, 3, frames.shape).round().astype(np.int16)
    report = flash.measure((frames + noise).clip(0, 255).astype(np.uint8), 60)
    assert report.margin == pytest.approx(margin)


def test_fine_squares_change_from_their_first_frame():
    """7 changes in 8 frames fail, 6 do not; up or down first is the same: the board has both."""
    assert flash.measure(board(4, (60, 854), (0, 1) * 4), 16).verdict == "fail"
    assert flash.measure(board(4, (60, 854), (0, 1) * 4)[:7], 16).margin == 1


@pytest.mark.parametrize("lights", [(0.455, 0.545), (0.81, 1.0)])
def test_fine_squares_change_by_the_same_rules(lights):
    """By 0.09, or between bright ends only (whose other squares, of 0.19 and 0, are painted over)."""
    frames = board(4, (60, 854), lights * 8)
    frames[:, frames[0, ..., 0] < grey(0.3)] = 255
    assert flash.measure(frames, 16).margin == 0


def test_an_area_of_fine_squares():
    """19 x 284 places of 3 x 3 pixels of 60 x 854: windows of 6 x 94, a quarter is 141; 6 x 23 are 138, 6 x 24 144."""
    frames = board(3, (60, 854))
    report = flash.measure(inside(frames, 18, 69), 16)
    assert (report.verdict, report.area) == ("pass", 138 / 564)
    assert flash.measure(inside(frames, 18, 72), 16).verdict == "fail"


@pytest.mark.parametrize("size", [(2, 854), (4, 640), (854, 1)])
def test_a_screen_too_narrow_for_a_square_is_judged_by_cells(size):
    assert flash.measure(strobe(size=size), 16).flashes == 4


@pytest.mark.parametrize(("width", "fps"), [(854, 60), (480, 30)])
def test_heavy_grain_is_excepted(width, fps):
    """Deviation 0.1 of full luminance in every pixel and frame, where a change is 0.1; squares of 3 and of 2 pixels."""
    grain = np.random.default_rng(0).normal(0.4, 0.1, (fps + 1, 120, width, 1))
    assert flash.measure(grey(grain.clip(0, 1)).repeat(3, axis=3), fps).verdict == "pass"


def test_a_coarse_checkerboard_is_not_excepted():
    """64 pixels span 30 degrees: one is 0.47 degree."""
    assert flash.measure(board(1, (64, 64)), 16).flashes == 7.5


def test_white_noise_is_excepted_where_its_grain_is_fine_only():
    random = np.random.default_rng(0)
    fine = random.integers(0, 256, (24, 480, 854, 3), dtype=np.uint8)
    assert flash.measure(fine, 16).margin < 1
    assert flash.measure(np.ascontiguousarray(fine[:, :64, :64]), 16).verdict == "fail"


@pytest.mark.parametrize(("size", "fps"), [((480, 854), 60), ((640, 640), 30), ((360, 640), 60), ((720, 1280), 60)])
def test_fine_black_and_white_noise_is_excepted(size, fps):
    """The mean of a cell of 9 x 9 pixels moves by 0.10 often enough, that of a block of 28 x 28 does not."""
    grains = np.random.default_rng(0).integers(0, 2, (fps + 1, *size, 1), dtype=np.uint8) * np.uint8(255)
    assert flash.measure(grains.repeat(3, axis=3), fps).verdict == "pass"


def test_noise_does_not_hide_a_strobe():
    """Grains of half of the light at random, under a strobe: no pixel tells, the means of blocks do."""
    rng = np.random.default_rng(0)
    frames = strobe(size=(480, 854)).astype(np.float32)
    light = np.linspace(0.3, 1, 2)[(frames[:, :1, :1, :1] > 0).astype(int)]
    grains = rng.integers(0, 2, (len(frames), 480, 854, 1)) * 255 * light
    noisy = grains.astype(np.uint8).repeat(3, axis=3)
    assert flash.measure(noisy, 16).flashes == 4
    assert flash.measure(inside(noisy, 120, 120), 16).verdict == "fail"
    assert flash.measure(inside(noisy, 70, 70), 16).verdict == "pass"


def test_blocks_see_a_strobe_where_most_pixels_disagree():
    """Of black and white grains, drawn anew in each frame, 42 % and 58 % are white in turn: .16 of .51 is left."""
    rng, white = np.random.default_rng(0), np.where(square(4, 17, 16), 0.58, 0.42)
    grains = (rng.random((17, 480, 854, 1)) < white[:, None, None, None]).astype(float)
    assert flash.measure(in_grey(grains), 16).verdict == "fail"


def counterphase(degrees, size, *, num_frames=17):
    """0 and 1: a board of such squares that changes places with every second frame, `(f, h, w, 1)`."""
    rows, columns = np.indices(size) // round(degrees / 30 * max(size))
    return ((square(4, num_frames, 16)[:, None, None] + rows + columns) % 2)[..., None]


def in_grey(luminances):
    return grey(luminances).repeat(3, axis=3)


@pytest.mark.parametrize("size", [(360, 640), (480, 854), (720, 1280)])
@pytest.mark.parametrize("degrees", [0.35, 0.5, 0.67, 1.2])
def test_boards_in_counterphase_fail_on_whatever_they_are_drawn(degrees, size):
    """Blocks of cells lose them, and no square of 0.1 degree turns as a whole; but the pixels of a cell go one way."""
    board, rng = counterphase(degrees, size), np.random.default_rng(0)
    scanlines = (np.arange(size[0]) % 2)[:, None, None]
    grains = (rng.random((len(board), *size, 1)) < np.where(board, 0.8, 0.2)).astype(float)
    faint = 0.2 + 0.2 * board + rng.normal(0, 0.04, (len(board), *size, 1))
    for pattern in (board * scanlines, grains, faint.clip(0, 1)):
        assert flash.measure(in_grey(pattern), 16).verdict == "fail"


def test_lines_of_text_in_counterphase_fail():
    """Lines half a degree high, of letters of some pixels: of those, every third column is lit."""
    lines, letters = np.arange(480) // 14 % 2, (np.arange(854) % 3 == 0) & (np.arange(854) % 24 > 5)
    lit = ((square(4, 17, 16)[:, None, None] + lines[:, None]) % 2 * letters)[..., None]
    assert flash.measure(in_grey(lit), 16).verdict == "fail"


def test_narrow_bars_that_flash_faintly_under_noise_fail():
    """Of two cells in four, so 50 % of the window."""
    bars = (np.arange(854) // 19 % 2)[:, None]
    noise = np.random.default_rng(0).normal(0, 0.05, (17, 480, 854, 1))
    light = 0.3 + 0.13 * square(4, 17, 16)[:, None, None, None] * bars + noise
    assert flash.measure(in_grey(light.clip(0, 1)), 16).verdict == "fail"


@pytest.mark.parametrize("size", [(480, 854), (854, 480), (301, 400), (300, 300), (1, 1), (2, 5)])
def test_whole_strobes_fail_at_every_size(size):
    assert flash.measure(strobe(size=size), 16).flashes == 4


def test_averaging_over_cells_keeps_a_local_flash_local():
    """480 x 854: cells of 9.49 pixels, windows of 17 x 30 cells; 80 x 80 pixels are 71 cells, of 127.5."""
    frames = strobe(size=(480, 854))
    assert flash.measure(inside(frames, 80, 80), 16).verdict == "pass"
    assert flash.measure(inside(frames, 120, 120), 16).verdict == "fail"


# Red


@pytest.mark.parametrize("red", ["wcag22", "wcag20"])
def test_red_and_blue_of_equal_luminance(red):
    """Red of linear 0.34 has 0.2126 x 0.34 = 0.0722, as has full blue: no general flash, yet a red one."""
    report = flash.measure(strobe(dark=(0, 0, 255), bright=(grey(0.34), 0, 0)), 16, red=red)
    assert (report.verdict, report.flashes, report.red_flashes) == ("fail", 0, 4)


@pytest.mark.parametrize("red", ["wcag22", "wcag20"])
def test_red_and_black_is_both_kinds(red):
    report = flash.measure(strobe(bright=(255, 0, 0)), 16, red=red)
    assert (report.flashes, report.red_flashes) == (4, 4)


@pytest.mark.parametrize("colour", [(255,) * 3, (255, 255, 0), (255, 0, 255), (0, 255, 0), (0, 255, 255)])
def test_full_red_and_each_other_full_colour(colour):
    """Distances in u'v' from red: 0.259, 0.249, 0.242, 0.328, 0.320: all above 0.2."""
    assert flash.measure(strobe(dark=colour, bright=(255, 0, 0)), 16).red_flashes == 4


def test_red_and_orange_are_too_near():
    """Linear (1, 0.2, 0): share 0.83, u'v' 0.13 from red: both ends saturated, the change small."""
    orange = (255, int(grey(0.2)), 0)
    assert flash.measure(strobe(dark=orange, bright=(255, 0, 0)), 16).red_flashes == 0


def test_pink_is_not_saturated():
    """Linear (1, 0.3, 0.3): share 0.63 < 0.8."""
    pink = (255, int(grey(0.3)), int(grey(0.3)))
    assert flash.measure(strobe(dark=(0, 0, 255), bright=pink), 16).red_flashes == 0


@pytest.mark.parametrize("red", ["wcag22", "wcag20"])
def test_noise_in_the_dark_is_no_red_flash(red):
    noise = np.random.default_rng(0).integers(0, 16, (17, 16, 16, 3), dtype=np.uint8)
    noise[..., 1:] = 0
    assert flash.measure(noise, 16, red=red).margin == 0


def test_a_red_ramp_counts_from_end_to_end():
    """Blue to red and back in steps too small to count alone: 2 Hz is 4 changes a second."""
    way = np.abs(2 * (np.arange(121) / 30 % 1) - 1)
    frames = np.zeros((121, 8, 8, 3), np.uint8)
    frames[..., 0], frames[..., 2] = (grey(part)[:, None, None] for part in (way, 1 - way))
    assert flash.measure(frames, 60).red_flashes == 2


# When


def test_a_burst_across_a_whole_second_counts_in_the_window_that_slides():
    """8 changes at frames 12 to 19 of 16 a second; the windows 0-15 and 16-31 hold only 4 each."""
    light = np.zeros(48)
    light[12:19:2] = 1
    report = flash.measure(film(light), 16)
    assert (report.verdict, report.flashes) == ("fail", 4)
    assert report.start_seconds <= 12 / 16 <= report.start_seconds + 1


@pytest.mark.parametrize(("last", "verdict"), [(15, "fail"), (16, "pass")])
def test_seven_changes_must_be_less_than_a_second_apart(last, verdict):
    """Changes at frames 1, 3, 5, 7, 9, 11 and 1 + last: 15 / 16 s apart is within a second, 1 s is not."""
    changed = np.isin(np.arange(40), [1, 3, 5, 7, 9, 11, 1 + last])
    assert flash.measure(film(np.cumsum(changed) % 2), 16).verdict == verdict


def test_the_seam_of_a_loop():
    """4 changes at the start of 2 seconds, 3 at the end, and the seam: 8. Played once, at most 4 in one."""
    light = np.zeros(32)
    light[[1, 3, 28, 30, 31]] = 1
    light[2] = 0
    frames = film(light)
    assert flash.measure(frames, 16).verdict == "pass"
    assert flash.measure(frames, 16, loop=True).verdict == "fail"


def test_a_clip_shorter_than_a_second_loops_for_a_whole_one():
    """4 frames at 16 fps, 1 change each second frame: 8 a second when looped, 1 when played once."""
    frames = strobe(num_frames=4)
    assert flash.measure(frames, 16).flashes == 0.5
    assert flash.measure(frames, 16, loop=True).flashes == 4


@few
@given(st.data())
def test_a_loop_is_the_clip_twice(data):
    frames = data.draw(clips(num_frames=20))
    assert flash.measure(frames, 16, loop=True) == flash.measure(np.concatenate([frames] * 2), 16)


@few
@given(st.data(), st.booleans())
def test_frames_shown_for_varying_times_are_as_if_repeated(data, loop):
    frames = data.draw(clips(num_frames=24))
    gaps = data.draw(st.lists(st.integers(1, 6), min_size=24, max_size=24))
    edges = np.append(0, np.cumsum(gaps)) / 60
    repeated = frames.repeat(gaps, axis=0)
    assert flash.measure_shown(frames, edges, loop=loop) == flash.measure(repeated, 60, loop=loop)


# Properties


@st.composite
def clips(draw, num_frames=20, side=6, levels=256):
    """Clips of large grains that change at random frames, so that many are near the limit."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    changes = random.random((num_frames, side, side)) < draw(st.sampled_from([0.2, 0.4, 0.6]))
    palette = random.integers(0, levels, (num_frames, side, side), dtype=np.uint8)
    if levels == 2:
        palette = (np.cumsum(changes, axis=0) % 2 * 255).astype(np.uint8)
    latest = np.maximum.accumulate(np.where(changes, np.arange(num_frames)[:, None, None], 0), axis=0)
    return np.take_along_axis(palette, latest, axis=0)[..., None].repeat(3, axis=3)


def slow_changes(light):
    """Frames at which one pixel changes: an independent reading of the standard, in plain Python."""
    found, start, extreme, direction, reported = [], light[0], light[0], 0, True
    low = high = light[0]
    for number, value in enumerate(light):
        if direction == 0:
            low, high = min(low, value), max(high, value)
            if high - low >= 0.1:
                direction = 1 if value == high else -1
                start, extreme, reported = (low, value, False) if direction == 1 else (high, value, False)
        elif (extreme - value) * direction >= 0.1:
            direction, start, extreme, reported = -direction, extreme, value, False
        else:
            extreme = max(extreme, value) if direction == 1 else min(extreme, value)
        if not reported and min(start, extreme) < 0.8:
            reported = True
            found.append(number)
    return found


@few
@given(clips())
def test_agrees_with_a_slow_reading_of_the_standard(frames):
    """Oracle: every pixel, window and region in turn."""
    srgb = np.arange(256) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4).astype(np.float32)
    light = linear[frames[..., 0]]
    times = [[slow_changes(light[:, y, x].tolist()) for x in range(6)] for y in range(6)]
    margin = 0.0
    for begin in range(1, 20):
        counts = np.array([[sum(begin <= t < begin + 16 for t in cell) for cell in row] for row in times])
        for top in range(5):
            for left in range(5):
                region = counts[top : top + 2, left : left + 2]
                for k in range(1, 17):
                    margin = max(margin, min(k / 6, (region >= k).mean() / 0.25))
    assert flash.measure(frames, 16).margin == pytest.approx(margin)


@few
@given(clips(), st.sampled_from(["wcag", "frame25"]), st.sampled_from([7.5, 16, 29.97]))
def test_verdict_flashes_area_margin_and_cost_agree(frames, mode, fps):
    report = flash.measure(frames, fps, mode=mode)
    failed = report.verdict == "fail"
    assert failed == (max(report.flashes, report.red_flashes) > 3) == (report.area > 0.25)
    assert failed == (report.margin > 1) == (report.cost > 0)


@few
@given(clips(num_frames=40), st.floats(0.1, 6))
def test_nothing_fails_at_six_frames_a_second(frames, fps):
    assert flash.measure(frames, fps, loop=True).verdict == "pass"


@few
@given(clips(side=8))
def test_mirrored_upturned_and_transposed_clips_are_the_same(frames):
    reports = {
        flash.measure(np.ascontiguousarray(view), 16)
        for view in (frames, frames[:, ::-1], frames[:, :, ::-1], frames.swapaxes(1, 2))
    }
    assert len(reports) == 1


@few
@given(clips(num_frames=24, levels=2))
def test_backwards_is_the_same_where_changes_take_one_frame(frames):
    backwards = flash.measure(np.ascontiguousarray(frames[::-1]), 16)
    assert backwards.margin == flash.measure(frames, 16).margin


@few
@given(clips(), st.integers(1, 20), st.integers(1, 20))
def test_still_frames_before_and_after_never_lower_the_margin(frames, before, after):
    longer = np.concatenate([frames[:1].repeat(before, 0), frames, frames[-1:].repeat(after, 0)])
    assert flash.measure(longer, 16).margin >= flash.measure(frames, 16).margin


@few
@given(clips(side=6), st.sampled_from([2, 3, 4]))
def test_whole_enlargement_keeps_the_report(frames, factor):
    """Sides of 6 x factor divide by 3, so that the windows stay the same part of the screen."""
    larger = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    small, large = flash.measure(frames, 16, mode="frame25"), flash.measure(larger, 16, mode="frame25")
    assert large == small
    # A window may now stand between two old pixels, and find more there.
    assert flash.measure(larger, 16).margin >= flash.measure(frames, 16).margin


@few
@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=6), st.sampled_from([4, 8]))
def test_more_contrast_over_the_same_dark_never_lowers_the_margin(amplitudes, hz):
    margins = [flash.measure(film(amplitude * cosine(hz, 20, 16)), 16).margin for amplitude in sorted(amplitudes)]
    assert all(lower <= higher for lower, higher in pairwise(margins))


@few
@given(clips(side=9), st.integers(1, 9))
def test_more_flashing_area_never_lowers_the_margin(frames, side):
    assert flash.measure(inside(frames, side, side), 16).margin <= flash.measure(frames, 16).margin


# Wrong input and the command line


@pytest.mark.parametrize("fps", [0, -1, math.nan, math.inf])
def test_a_wrong_rate_is_refused(fps):
    with pytest.raises(ValueError, match="fps"):
        flash.measure(strobe(), fps)


def test_no_frame_is_refused():
    with pytest.raises(ValueError, match="frames"):
        flash.measure(np.zeros((0, 4, 4, 3), np.uint8), 16)


def run(capsys, *argv):
    status = flash.main([str(word) for word in argv])
    return status, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def files(tmp_path):
    for name, hz in (("calm", 2), ("wild", 8)):
        frames = strobe(hz, num_frames=16, size=(32, 32))
        video.write(tmp_path / f"{name}.mp4", video.Video(frames=frames, fps=16))
    (tmp_path / "torn.mp4").write_bytes((tmp_path / "calm.mp4").read_bytes()[:-40])
    return tmp_path


def test_command_line_prints_a_line_a_file_and_the_worst_status(files, capsys):
    status, [calm] = run(capsys, files / "calm.mp4")
    assert status == 0
    assert set(calm) == {"file", "verdict", "flashes", "red_flashes", "area", "start_seconds", "margin"}
    status, lines = run(capsys, files / "wild.mp4", files / "calm.mp4")
    assert (status, [line["verdict"] for line in lines]) == (1, ["fail", "pass"])
    status, lines = run(capsys, files / "torn.mp4", files / "wild.mp4", files / "none.mp4")
    assert (status, [line["verdict"] for line in lines]) == (2, ["error", "fail", "error"])
    assert "torn.mp4" in lines[0]["reason"]


def test_command_line_rate_is_that_of_playing(files, capsys):
    """8 Hz at 16 fps, played at 6 fps, is 3 Hz."""
    status, [line] = run(capsys, files / "wild.mp4", "fps=6")
    assert (status, line["flashes"]) == (0, 3)


def test_command_line_counts_the_seam_of_a_loop(files, capsys):
    """2 Hz in 16 frames at 16 fps: 3 changes, and one over the seam; 4 / 6 of the limit."""
    assert run(capsys, files / "calm.mp4")[1][0]["margin"] == 0.5
    assert run(capsys, files / "calm.mp4", "loop=true")[1][0]["margin"] == pytest.approx(4 / 6)


def test_command_line_judges_a_variable_rate_by_its_own_times(tmp_path, capsys):
    """Changes 0.1 and 0.3 s apart in turn: 6 within a second; each 0.05 s: 7 in 0.35, then 0.5 s apart.

    At 6 fps these would be 3 flashes.
    """
    calm, wild = np.cumsum([0, *[10, 30] * 6]), np.cumsum([0, *[5] * 7, *[50] * 4])
    for name, ticks in (("calm", calm), ("wild", wild)):
        frames = strobe(8, num_frames=len(ticks))
        encode(tmp_path / f"{name}.mkv", frames, ticks.tolist())
        with pytest.raises(video.VideoError, match="variable frame rate"):
            video.read(tmp_path / f"{name}.mkv")
    status, lines = run(capsys, tmp_path / "calm.mkv", tmp_path / "wild.mkv")
    assert (status, [line["verdict"] for line in lines]) == (1, ["pass", "fail"])
    assert (lines[0]["flashes"], lines[1]["flashes"], lines[1]["start_seconds"]) == (3, 4, 0)
    assert run(capsys, tmp_path / "wild.mkv", "fps=6")[1][0]["flashes"] == 3


def test_command_line_holds_few_frames_of_a_long_file(tmp_path):
    """60 frames of 1280 x 720 take 166 MB; the peak stays far under that."""
    for name, num_frames in (("short.mp4", 2), ("long.mp4", 60)):
        clip = np.broadcast_to(np.uint8(90), (num_frames, 720, 1280, 3))
        video.write(tmp_path / name, video.Video(frames=clip, fps=30))
    program = (
        "import resource, sys; from reward import flash;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "flash.main(sys.argv[1:2]); start = peak();"
        "status = flash.main(sys.argv[2:]); print((peak() - start) / 1024); sys.exit(status)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "short.mp4"), str(tmp_path / "long.mp4")]
    result = subprocess.run(command, capture_output=True, check=True, text=True)
    assert float(result.stdout.splitlines()[-1]) < 60


@pytest.mark.parametrize("argv", [[], ["a.mp4", "mode=strict"], ["a.mp4", "fps=0"], ["a.mp4", "rate=3"]])
def test_command_line_refuses_wrong_settings(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        flash.main(argv)
    assert stop.value.code == 2
    assert "python -m reward.flash" in capsys.readouterr().err
