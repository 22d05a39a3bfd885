from typing import get_args

import numpy as np
import pytest
from tiny_encoders import video

from reward.probes import PROBES, ProbeName, altered, asked
from reward.video import Video

CLIP = video(0, num_frames=8)


def frames(probe: ProbeName, *, seed: int = 0, blur: float = 0.05, clip: Video = CLIP) -> np.ndarray:
    shown = altered(probe, clip, seed=seed, blur=blur)
    assert (shown.frames.shape, shown.frames.dtype, shown.fps) == (clip.frames.shape, np.uint8, clip.fps)
    return shown.frames


def test_every_probe_is_described_once():
    assert tuple(probe.name for probe in PROBES) == get_args(ProbeName)
    assert {probe.reads for probe in PROBES} == {"instruction_following", "helpfulness"}


def test_the_middle_frame_stays():
    assert all((frame == CLIP.frames[4]).all() for frame in frames("frozen_frame"))


def test_shuffled_frames_are_the_same_in_another_order():
    before, after = CLIP.frames.reshape(8, -1), frames("frame_shuffle").reshape(8, -1)
    assert not np.array_equal(after, before)
    assert sorted(map(bytes, after)) == sorted(map(bytes, before))
    assert np.array_equal(frames("frame_shuffle"), frames("frame_shuffle"))
    assert not np.array_equal(frames("frame_shuffle"), frames("frame_shuffle", seed=1))


def test_a_blurred_edge_is_a_normal_distribution():
    """40 pixels high, blur 0.05: sigma is 2. Half a pixel to the white side of the edge, 255 Phi(.25) = 153."""
    edge = np.zeros((2, 40, 64, 3), np.uint8)
    edge[:, :, 32:] = 255
    row = frames("blur", clip=Video(frames=edge, fps=8))[0, 20, :, 0].astype(int)
    assert row[31:33].tolist() == [102, 153]
    assert (row[:20].max(), row[44:].min()) == (0, 255)


def test_blur_makes_no_frame_darker_nor_mixes_frames_or_colours():
    blurred = frames("blur")
    means = [clip.astype(float).mean(axis=(1, 2)) for clip in (CLIP.frames, blurred)]
    assert means[0] == pytest.approx(means[1], abs=3)
    plain = np.broadcast_to(np.array([200, 7, 90], np.uint8), (3, 40, 64, 3)).copy()
    assert np.array_equal(frames("blur", clip=Video(frames=plain, fps=8)), plain)


@pytest.mark.parametrize("probe", ["prompt_shuffle", "empty_prompt"])
def test_probes_of_the_prompt_leave_the_video(probe: ProbeName):
    assert np.array_equal(frames(probe), CLIP.frames)


def test_every_prompt_gets_another_one_and_each_is_asked_once():
    texts = [f"a ball called {number // 2}" for number in range(12)]
    for seed in range(20):
        found = asked("prompt_shuffle", texts, seed)
        assert sorted(found) == sorted(found.values()) == sorted(set(texts))
        assert all(text != other for text, other in found.items())
    assert asked("prompt_shuffle", texts, 0) == asked("prompt_shuffle", texts[::-1], 0)
    assert asked("prompt_shuffle", texts, 0) != asked("prompt_shuffle", texts, 1)


def test_other_prompts():
    assert asked("empty_prompt", ["a", "b"], 0) == {"a": "", "b": ""}
    assert asked("blur", ["a", "b"], 0) == {"a": "a", "b": "b"}
    with pytest.raises(ValueError, match="at least two different prompts"):
        asked("prompt_shuffle", ["a", "a"], 0)
