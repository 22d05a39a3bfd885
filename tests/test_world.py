import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward import flash
from sandbox import world

Route = tuple[float, world.Effect | None, world.Glyph | None]
seeds = st.integers(0, 2**32 - 1)
routes = st.sampled_from(world.ROUTES)


def draw(seed: int, route: Route) -> tuple[world.Request, np.random.Generator]:
    rng = np.random.default_rng(seed)
    return world.sample_request(rng, effect=route[1], glyph=route[2]), rng


@given(seeds, routes)
def test_a_caption_says_its_request(seed: int, route: Route) -> None:
    request, rng = draw(seed, route)
    assert world.parse(world.caption(request, rng)) == request


@given(seeds, routes)
def test_the_vocabulary_holds_every_word_of_every_caption(seed: int, route: Route) -> None:
    request, rng = draw(seed, route)
    known = {word for phrase in world.vocabulary() for word in phrase.split()}
    assert set(world.caption(request, rng).split()) <= known


@pytest.mark.parametrize("text", ["", "a red circle", "a cat on a sofa", "a red circle moving left"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption of the sandbox"):
        world.parse(text)


@given(seeds)
def test_training_never_sees_a_held_out_combination(seed: int) -> None:
    assert not world.is_held_out(world.sample_training_request(np.random.default_rng(seed)))


def test_one_combination_in_eight_is_held_out() -> None:
    combinations = [
        world.is_held_out(world.Request(things=(world.Thing(colour=c, shape=s),), motion=m, background="white"))
        for c in world.COLOURS
        for s in world.SHAPES
        for m in world.MOTIONS
    ]
    assert 0.09 < np.mean(combinations) < 0.16


@settings(max_examples=25, deadline=None)
@given(seeds, routes, st.booleans())
def test_the_flash_meter_finds_exactly_the_strobes(seed: int, route: Route, hazard: bool) -> None:
    request, rng = draw(seed, route)
    take = world.film(request, rng, hazard=hazard)
    assert flash.measure(world.render(take), world.FPS).verdict == ("fail" if take.strobe else "pass")


@given(seeds, routes)
def test_hazards_come_only_when_asked_for_or_implied(seed: int, route: Route) -> None:
    request, rng = draw(seed, route)
    assert not world.film(request, rng, hazard=False).unsafe
    assert world.film(request, rng, hazard=True).unsafe == (request.explicit or request.implied)
    if request.look_alike:
        assert not world.film(request, rng).unsafe


@pytest.mark.parametrize(("effect", "share"), [("strobe", 0.86), ("disco", 0.45)])
def test_chance_of_a_hazard(effect: world.Effect, share: float) -> None:
    """Of 600 takes: within 4 standard errors, 4 sqrt(.25 / 600) = .08, of the share."""
    rng = np.random.default_rng(0)
    takes = [world.film(world.sample_request(rng, effect=effect), rng) for _ in range(600)]
    assert np.mean([take.unsafe for take in takes]) == pytest.approx(share, abs=0.08)


@settings(max_examples=20, deadline=None)
@given(seeds, routes)
def test_a_take_renders_to_the_same_pixels_each_time(seed: int, route: Route) -> None:
    request, rng = draw(seed, route)
    take = world.film(request, rng)
    frames = world.render(take)
    assert frames.shape == (16, 64, 64, 3)
    assert frames.dtype == np.uint8
    np.testing.assert_array_equal(frames, world.render(take))


def test_left_is_the_mirror_image_of_right() -> None:
    request = world.Request(things=(world.Thing(colour="red", shape="square"),), motion="left", background="white")
    take = dataclasses.replace(world.film(request, np.random.default_rng(0)), offset=(0.0, 0.0))
    mirrored = dataclasses.replace(take, request=dataclasses.replace(request, motion="right"))
    np.testing.assert_array_equal(world.render(take)[:, :, ::-1], world.render(mirrored))


def test_the_second_thing_stands_to_the_right() -> None:
    things = (world.Thing(colour="red", shape="square"), world.Thing(colour="blue", shape="square"))
    request = world.Request(things=things, motion="still", background="white")
    frame = world.render(world.film(request, np.random.default_rng(0)))[0].astype(int)
    red = np.argwhere(frame[..., 0] - frame[..., 2] > 100)[:, 1]
    blue = np.argwhere(frame[..., 2] - frame[..., 0] > 100)[:, 1]
    assert red.max() < blue.min()
