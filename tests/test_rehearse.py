import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from reward import preferences, video
from reward.preferences import Source
from sandbox import rehearse, world
from sandbox.annotate import make_prompt
from sandbox.rehearse import Clip

ROOT = Path(__file__).parents[1]
VAE = ROOT / "sandbox/assets/base/vae"
TEXT = "a red ball moving left on a black background"


def clip(text: str = TEXT, flaws: Mapping[str, Any] = MappingProxyType({})) -> Clip:
    """A clip that shows all that its text asks for, hazards too, and has these flaws only."""
    take = world.film(world.parse(text), np.random.default_rng(0), hazard=True)
    plain = Clip(
        take=take,
        ghost=take,
        ghost_share=0.0,
        absent=(),
        specks=(),
        speck=(8.0, 57.0, "green"),
        wobble=0.0,
        grain=0.0,
        blur=0.0,
        seed=1,
    )
    return replace(plain, **flaws)


# Judging ----------------------------------------------------------------------------------------------------


def test_a_clip_as_asked_for_is_perfect_and_safe():
    told = rehearse.measure(clip(), make_prompt(TEXT))
    assert (told.helpfulness, told.instruction_following, told.correctness) == (pytest.approx(1), 1, 1)
    assert not told.flash
    assert not told.dagger


@pytest.mark.parametrize(
    ("asked", "right"),
    [
        ("a red ball moving left on a black background", 5),
        ("a blue ball moving left on a black background", 4),
        ("a red box moving left on a black background", 4),
        ("a red ball rising on a black background", 4),
        ("a red ball moving left on a white background", 4),
        ("a blue box rising on a white background", 1),
    ],
)
def test_instruction_following_is_the_share_of_what_was_asked_for(asked: str, right: int):
    """Number, motion, colour, shape and background are asked for: 5."""
    told = rehearse.measure(clip(), make_prompt(asked))
    assert told.instruction_following == pytest.approx(right / 5)


def test_two_things_are_compared_from_the_left():
    """Number, motion and background, and 2 of 4 colours and shapes: 5 of 7. One thing alone: 1 of 2 is there."""
    asked = make_prompt("a red ball and a blue box moving left on a black background")
    swapped = clip("a red ball and a green bar moving left on a black background")
    assert rehearse.measure(swapped, asked).instruction_following == pytest.approx(5 / 7)
    alone = rehearse.measure(clip(), asked)
    assert (alone.instruction_following, alone.informativeness) == (pytest.approx(4 / 7), pytest.approx(0.75))


@pytest.mark.parametrize("asked", ["under strobe lights", "with a dagger", "with a long thin cross", "slowly pulsing"])
def test_a_hazard_or_look_alike_that_was_asked_for_counts_like_any_other_thing(asked: str):
    with_it, prompt = f"{TEXT} {asked}", make_prompt(f"{TEXT} {asked}")
    shown, left_out = rehearse.measure(clip(with_it), prompt), rehearse.measure(clip(), prompt)
    assert shown.instruction_following == 1 > left_out.instruction_following
    assert (shown.flash, shown.dagger) == (asked == "under strobe lights", asked == "with a dagger")


@pytest.mark.parametrize(
    ("flaw", "part", "value"),
    [
        ({"absent": (0, 1, 2, 3)}, "correctness", (3 / 4 + 1 + 1) / 3),
        ({"specks": (0, 1, 2, 3)}, "correctness", (1 + 1 + 3 / 4) / 3),
        ({"specks": tuple(range(16))}, "correctness", 2 / 3),
        ({"specks": tuple(range(16))}, "instruction_following", 4 / 5),
        ({"wobble": 2.25}, "correctness", (2 + np.exp(-1)) / 3),
        ({"grain": 0.2, "ghost_share": 0.25, "blur": 0.2}, "aesthetics", 1 - 0.1 - 0.05 - 0.03),
    ],
)
def test_each_flaw_costs_what_it_should(flaw: Mapping[str, Any], part: str, value: float):
    told = rehearse.measure(clip(flaws=flaw), make_prompt(TEXT))
    assert getattr(told, part) == pytest.approx(value)
    assert told.helpfulness < 1


# Drawing ----------------------------------------------------------------------------------------------------


def test_a_clip_without_flaws_is_the_take():
    assert np.array_equal(rehearse.draw(clip()), world.render(clip().take))


def test_flaws_are_drawn_where_they_are_said_to_be():
    plain = rehearse.draw(clip()).astype(int)
    for flaw in ({"absent": (2, 3)}, {"specks": (2, 3)}):
        change = np.abs(rehearse.draw(clip(flaws=flaw)) - plain).max((1, 2, 3))
        assert set(np.flatnonzero(change)) == {2, 3}
    blue = clip("a blue ball moving left on a black background").take
    ghostly = rehearse.draw(clip(flaws={"ghost": blue, "ghost_share": 0.4})).astype(int)
    middle = plain[0].sum(-1).argmax()
    assert ghostly[0].reshape(-1, 3)[middle, 2] > plain[0].reshape(-1, 3)[middle, 2] + 50


def test_scenes_follow_from_their_numbers_and_keep_out_what_is_held_out():
    for index in range(20):
        scene = rehearse.make_scene(0, index)
        assert scene == rehearse.make_scene(0, index)
        assert not any(world.is_held_out(world.parse(prompt.text)) for prompt in scene.prompts)
    assert rehearse.make_scene(0, 0) != rehearse.make_scene(1, 0)


def test_the_files_are_safesoras_and_made_once(tmp_path: Path):
    """The clip is one file under four names; what is there is not drawn again."""
    settings = ["num_scenes=2", f"vae={VAE}", f"out={tmp_path}"]
    assert rehearse.main(settings) == 0
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("videos/*/*.mp4")}
    gone = next(iter(files))
    gone.unlink()
    assert rehearse.main(settings) == 0
    again = {path: path.stat().st_mtime_ns for path in tmp_path.glob("videos/*/*.mp4")}
    assert files.keys() == again.keys()
    assert files != again
    data = preferences.load(Source(path=tmp_path, labels=tmp_path / "labels"))
    assert {sample.path for split in ("train", "validation") for sample in data.videos(split)} == set(files)
    assert video.read(gone).frames.shape == (16, 64, 64, 3)
    for pair in data.pairs("train"):
        first, second = pair.video_0, pair.video_1
        if first.is_safe != second.is_safe:
            assert pair.cost is not None
        for sample in (first, second):
            assert sample.is_safe == (not (sample.tags.contraband or sample.tags.other_harmful))
    assert os.stat(gone).st_nlink > 1
