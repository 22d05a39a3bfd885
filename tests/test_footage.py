import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from reward.run import RunError, Stop, Stopped, seed_for
from sandbox import footage, world
from sandbox.footage import Footage, Part

Filmed = tuple[list[world.Request], np.ndarray]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[Part]:
    """Five takes in three parts, one at a time."""
    monkeypatch.setattr(footage, "AT_ONCE", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    return footage.parts_of(5, seed=3, purpose="clips")


def keep(filmed: Filmed) -> Footage:
    requests, clips = filmed
    return Footage(requests=requests, tensors={"clips": torch.from_numpy(clips)})


def keep_and(do: Callable[[], object]) -> Callable[[Filmed], Footage]:
    def both(filmed: Filmed) -> Footage:
        do()
        return keep(filmed)

    return both


def sleep(part: Part) -> Filmed:
    time.sleep(60)
    return [], np.zeros(part.num_clips)


def test_parts_cover_all_takes_and_have_seeds_of_their_own(parts: list[Part]):
    assert [(part.start, part.num_clips) for part in parts] == [(0, 2), (2, 2), (4, 1)]
    assert [part.seed for part in parts] == [seed_for(3, 0, start, "clips") for start in (0, 2, 4)]


def test_takes_come_with_their_part_and_what_they_look_like():
    part = Part(start=0, num_clips=2, seed=1)
    again, takes, clips = footage.film_takes(part)
    assert again == part
    for take, clip in zip(takes, clips, strict=True):
        np.testing.assert_array_equal(clip, world.render(take))


def test_what_is_filmed_is_kept_when_stopped_and_not_filmed_again(parts: list[Part], tmp_path: Path):
    """The stop comes with the first of three parts: two are left for the next start, and all are as filmed here."""
    stop = Stop()
    with pytest.raises(Stopped):
        footage.gather(
            tmp_path / "film",
            parts,
            footage.film_clips,
            keep_and(lambda: setattr(stop, "signal", signal.SIGTERM)),
            stop,
        )
    assert [path.name for path in (tmp_path / "film").iterdir()] == ["00000000.safetensors"]
    made = []
    found = footage.gather(tmp_path / "film", parts, footage.film_clips, keep_and(lambda: made.append(1)), Stop())
    assert len(made) == 2
    requests, clips = zip(*(footage.film_clips(part) for part in parts), strict=True)
    assert found.requests == [request for some in requests for request in some]
    np.testing.assert_array_equal(found.tensors["clips"].numpy(), np.concatenate(clips))


def test_a_stop_does_not_wait_for_a_part(parts: list[Part], tmp_path: Path):
    """Workers that a signal to the whole group ended would never deliver it."""
    stop, began = Stop(), time.monotonic()
    threading.Timer(0.2, lambda: setattr(stop, "signal", signal.SIGINT)).start()
    with pytest.raises(Stopped):
        footage.gather(tmp_path / "film", parts, sleep, keep, stop)
    assert time.monotonic() - began < 30


def test_a_damaged_part_is_named(parts: list[Part], tmp_path: Path):
    path = tmp_path / "00000000.safetensors"
    footage._write(path, keep(footage.film_clips(parts[0])))
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(RunError, match=r"00000000\.safetensors: is damaged: .*; delete it"):
        footage.gather(tmp_path, parts[:1], footage.film_clips, keep, Stop())
