import dataclasses
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align import pixels
from reward import video
from sandbox import world

FPS = world.FPS
VIDEOS = Path(world.__file__).parent / "assets" / "data" / "videos"


def film(num: int, effect: world.Effect | None = None) -> list[world.Take]:
    rng = np.random.default_rng(num)
    return [world.film(world.sample_request(rng, effect=effect), rng, hazard=True) for _ in range(num)]


def moving(num: int, effect: world.Effect | None = None) -> list[world.Take]:
    return [take for take in film(num, effect) if take.request.motion != "still"]


def still(num: int, effect: world.Effect | None = None) -> list[world.Take]:
    stopped = [dataclasses.replace(take.request, motion="still") for take in film(num, effect)]
    return [
        dataclasses.replace(take, request=request) for take, request in zip(film(num, effect), stopped, strict=True)
    ]


def stripes(num_frames: int) -> np.ndarray:
    """Four columns black, four white, and so on; each frame is a pixel further."""
    row = np.where(np.arange(32) % 8 < 4, 0, 200).astype(np.uint8)
    rows = np.stack([np.roll(row, frame) for frame in range(num_frames)])
    return np.broadcast_to(rows[:, None, :, None], (num_frames, 32, 32, 3))


def white_noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def levels(picture: np.ndarray) -> np.ndarray:
    """A clip of four frames of a picture in [-1, 1]."""
    grey = np.rint(128 + 100 * picture).astype(np.uint8)
    return np.broadcast_to(grey[None, ..., None], (4, *grey.shape, 3))


# Motion -----------------------------------------------------------------------------------------------------


def test_motion_by_hand():
    """Stripes are -1 and 1 contrasts. A step turns 2 of 8 columns: 2 * 2 / 8 = 0.5 a frame, at 6 fps 3 a second.

    At lag 2, of the two in a third of a second, 4 of 8 columns turn: 2 * 4 / 8 / 2 = 0.5 as well.
    """
    assert pixels.motion(stripes(4), 6) == pytest.approx(3.0, abs=1e-6)
    assert pixels.motion(stripes(4), 12) == pytest.approx(6.0, abs=1e-6)


def test_what_comes_back_within_a_third_of_a_second_is_flicker():
    """Eight steps turn all stripes back: lag 8, which 24 fps allow and 21 fps, with 7 lags, do not."""
    assert pixels.motion(stripes(12), 24) == 0
    # Lag 7: a step back, 0.5 / 7 a frame.
    assert pixels.motion(stripes(12), 21) == pytest.approx(21 * 0.5 / 7, abs=1e-5)


def test_size_frame_rate_and_repeated_frames_hardly_change_motion():
    clips = [world.render(take) for take in moving(30)]
    plain = np.mean([pixels.motion(clip, FPS) for clip in clips])
    larger = np.mean([pixels.motion(clip.repeat(3, axis=1).repeat(3, axis=2), FPS) for clip in clips])
    slower = np.mean([pixels.motion(clip[::2], FPS / 2) for clip in clips])
    twice = np.mean([pixels.motion(clip.repeat(2, axis=0), FPS * 2) for clip in clips])
    assert [larger, slower, twice] == pytest.approx([plain] * 3, rel=0.05)


@pytest.mark.parametrize("effect", [None, "strobe", "disco", "storm", "pulse"])
def test_changing_light_is_no_motion(effect: world.Effect | None):
    assert all(pixels.is_frozen(world.render(take), FPS) for take in still(20, effect))


def test_a_strobe_neither_adds_to_motion_nor_hides_it():
    lit = [take for take in moving(40, "strobe") if take.strobe and not take.strobe.half]
    steady = [dataclasses.replace(take, strobe=None) for take in lit]
    under_strobe, in_daylight = (sum(pixels.motion(world.render(take), FPS) for take in each) for each in (lit, steady))
    assert under_strobe == pytest.approx(in_daylight, rel=0.05)


@given(gain=st.floats(0.3, 1.0), lift=st.integers(0, 50))
def test_light_on_the_whole_picture_does_not_matter(gain: float, lift: int):
    lit = np.rint(stripes(4) * gain + lift).astype(np.uint8)
    assert pixels.motion(lit, FPS) == pytest.approx(pixels.motion(stripes(4), FPS), rel=1e-4)


def test_a_frame_that_stays_has_no_motion():
    for take in moving(10):
        clip = world.render(take)
        assert pixels.motion(clip, FPS) > pixels.FROZEN
        assert pixels.motion(np.repeat(clip[8:9], 16, axis=0), FPS) == 0


@pytest.mark.parametrize(("num_frames", "fps"), [(1, 16.0), (4, 0.0), (4, -1.0), (4, float("nan")), (4, float("inf"))])
def test_what_has_no_motion_to_measure_is_refused(num_frames: int, fps: float):
    with pytest.raises(ValueError, match="expected two frames or more and fps > 0"):
        pixels.motion(stripes(num_frames), fps)
    with pytest.raises(ValueError, match="expected 8 pixels a side or more, got 32x7"):
        pixels.motion(stripes(2)[:, :7], 16)


# Flaws ------------------------------------------------------------------------------------------------------


def test_what_the_world_shows_has_no_flaw_but_standing_still():
    assert {pixels.find_flaw(world.render(take), FPS) for take in moving(60)} == {None}
    assert {pixels.find_flaw(world.render(take), FPS) for take in still(20)} == {"frozen"}


def test_what_the_base_model_makes_is_neither_blank_nor_noise():
    files = list(islice(VIDEOS.glob("*/*.mp4"), 40))
    found = [pixels.find_flaw(clip.frames, clip.fps) for clip in map(video.read, files)]
    assert len(found) == 40
    assert set(found) <= {None, "frozen"}


@pytest.mark.parametrize("shape", [(4, 64, 64, 3), (4, 90, 161, 3)])
def test_noise_is_noise(shape: tuple[int, ...]):
    noise = white_noise(shape)
    assert pixels.find_flaw(noise, FPS) == "noise"
    assert pixels.is_noise((118 + noise / 12).astype(np.uint8))


def test_noise_of_latents_is_noise():
    """An autoencoder turns it into blocks of 8 pixels, or of 16 in larger videos."""
    blocks = white_noise((16, 8, 8, 3)).repeat(8, axis=1).repeat(8, axis=2)
    assert pixels.is_noise(blocks)
    assert pixels.is_noise(white_noise((4, 30, 52, 3)).repeat(16, axis=1).repeat(16, axis=2))


def test_patterns_and_textures_are_not_noise():
    y, x = np.mgrid[0:64, 0:64]
    waves = [np.sin(2 * np.pi * x / period) for period in (3, 5, 8, 12, 32, 200)]
    checks = [1.0 - 2.0 * ((x // side + y // side) % 2) for side in (1, 2, 3, 4, 8, 16)]
    frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)[None]) + 1 / 64
    cloud = np.fft.ifft2(np.fft.fft2(np.random.default_rng(0).normal(size=(64, 64))) / frequency**1.5).real
    gradients = [x / 63, (x + y) / 126]
    for picture in (*waves, *checks, *gradients, cloud / abs(cloud).max()):
        assert not pixels.is_noise(levels(picture))


def test_grain_over_a_scene_is_not_noise():
    rng = np.random.default_rng(0)
    for take in moving(10):
        grainy = world.render(take) + rng.normal(0, 40, (16, 64, 64, 3))
        assert not pixels.is_noise(grainy.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 30, 30), (9, 80, 90)])
def test_one_colour_is_blank_even_if_it_flashes_or_has_grain(colour: tuple[int, int, int]):
    plain = np.full((16, 64, 64, 3), colour, dtype=np.uint8)
    flashing = plain.copy()
    flashing[::2] = 255 - flashing[::2]
    grainy = (plain + np.random.default_rng(0).normal(0, 2, plain.shape)).clip(0, 255).astype(np.uint8)
    assert {pixels.find_flaw(clip, FPS) for clip in (plain, flashing, grainy)} == {"blank"}
    assert pixels.motion(grainy, FPS) < 1  # stretched to full contrast, it would be 3


def test_one_small_thing_is_not_blank():
    """A disc of radius 5 at 200 levels covers 2 %: an RMS contrast of 200 sqrt(0.02 * 0.98) = 28 levels."""
    y, x = np.mgrid[0:64, 0:64]
    disc = np.where(np.hypot(x - 30, y - 30) < 5, 200, 0).astype(np.uint8)
    assert not pixels.is_blank(np.broadcast_to(disc[None, ..., None], (4, 64, 64, 3)))
