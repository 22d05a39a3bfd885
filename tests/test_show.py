from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from align.sample import Sampler
from align.show import crop_of, show
from reward.video import Video, VideoError, VideoInfo, probe, read, write

SAMPLER = Sampler()  # 16 frames of 64 x 64 at 16 fps


def store(path: Path, *, num_frames: int, height: int = 64, width: int = 64, fps: float = 16.0) -> VideoInfo:
    """Write a video of coarse noise, every frame of its own."""
    coarse = np.random.default_rng(0).integers(0, 256, (num_frames, height // 8, width // 8, 3), dtype=np.uint8)
    write(path, Video(frames=coarse.repeat(8, axis=1).repeat(8, axis=2), fps=fps))
    return probe(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "v.mp4"


# Frames -----------------------------------------------------------------------------------------------------


def test_a_video_of_the_samplers_size_and_rate_is_shown_as_it_is(path: Path):
    info = store(path, num_frames=16)
    assert np.array_equal(show(info, SAMPLER), read(path).frames)


def test_frames_are_those_on_screen_at_the_samplers_times(path: Path):
    """A file of 24 fps shown at 16: times k / 16, of which 24 k / 16 = 0, 1.5, 3, 4.5, 6 and 7.5 frames have begun."""
    info, sampler = store(path, num_frames=12, fps=24), Sampler(num_frames=6)
    assert sampler.view("").frame_seconds == (0, 0.0625, 0.125, 0.1875, 0.25, 0.3125)
    assert np.array_equal(show(info, sampler), read(path).frames[[0, 1, 3, 4, 6, 7]])


@pytest.mark.parametrize("duration_seconds", [0.937, 0.9375, 0.938])
def test_a_video_may_end_at_the_time_of_its_last_frame(path: Path, duration_seconds: float):
    """15 frames at 16 fps end at 15 / 16 s, when the 16th is due: the 15th is shown again. Headers may be rounded."""
    info = replace(store(path, num_frames=15), duration_seconds=duration_seconds)
    assert np.array_equal(show(info, SAMPLER), read(path).frames[[*range(15), 14]])


@pytest.mark.parametrize("duration_seconds", [0.0625, 0.875, 0.936])
def test_a_video_that_ends_earlier_is_refused(path: Path, duration_seconds: float):
    info = replace(store(path, num_frames=1), duration_seconds=duration_seconds)
    with pytest.raises(VideoError, match=rf"v\.mp4: too short: .* need 0\.9375 s, it has {duration_seconds:g} s"):
        show(info, SAMPLER)


def test_where_the_header_gives_no_duration_the_file_does(path: Path):
    info = replace(store(path, num_frames=16), duration_seconds=None)
    assert np.array_equal(show(info, SAMPLER), read(path).frames)
    with pytest.raises(VideoError, match=r"v\.mp4: times_seconds"):
        show(info, Sampler(num_frames=18))


# Crop and size ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "shown", "crop"),
    [
        ((48, 96), (64, 64), (0, 24, 48, 48)),  # landscape: (96 - 48) / 2 off each side
        ((96, 48), (64, 64), (24, 0, 48, 48)),  # portrait
        ((45, 82), (64, 64), (0, 18, 45, 45)),  # odd: 37 columns too many, 18 left and 19 right
        ((720, 1280), (480, 832), (0, 16, 720, 1248)),  # 720 * 832 / 480 = 1248
        ((64, 64), (32, 64), (16, 0, 32, 64)),  # a square shown in landscape
        ((33, 100), (32, 96), (0, 0, 33, 99)),  # 33 * 96 / 32 = 99; of one column too many, the right one goes
    ],
)
def test_the_largest_part_of_the_right_shape_in_the_middle(
    stored: tuple[int, int], shown: tuple[int, int], crop: tuple[int, int, int, int]
):
    assert crop_of(*stored, Sampler(height=shown[0], width=shown[1])) == crop


def test_videos_are_cropped_before_they_are_resized(path: Path):
    info = store(path, num_frames=2, height=64, width=128)
    assert np.array_equal(show(info, Sampler(num_frames=2)), read(path).frames[:, :, 32:96])


def test_shrinking_averages_an_area(path: Path):
    """At half the size, the triangle is 4 pixels wide: (1, 3, 3, 1) / 8, up and down as well as across."""
    info = store(path, num_frames=2, height=128, width=128)
    weights = np.array([1, 3, 3, 1]) / 8
    wide = read(path).frames.astype(float)
    across = sum(weight * wide[:, :, 1 + k : 125 + k : 2] for k, weight in enumerate(weights))
    both = sum(weight * across[:, 1 + k : 125 + k : 2] for k, weight in enumerate(weights))
    inner = show(info, Sampler(num_frames=2))[:, 1:-1, 1:-1]
    assert np.abs(inner - both).max() <= 1


def test_every_size_is_given(path: Path):
    info = store(path, num_frames=2, height=40, width=72)
    for height, width in ((16, 16), (32, 48), (96, 64)):
        shown = show(info, Sampler(num_frames=2, height=height, width=width))
        assert (shown.dtype, shown.shape) == (np.uint8, (2, height, width, 3))
