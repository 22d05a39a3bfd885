"""Takes of the world, filmed in parts on all processors; what is kept of a part is on disk as soon as it is filmed.

    film/00000500.safetensors    of the part that begins with take 500; the captions are its metadata

Parts that are there are not filmed again.
"""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from reward.files import replacing
from reward.run import RunError, Stop, seed_for
from sandbox import world

AT_ONCE = 500
"""Takes of a part."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Takes that are filmed together."""

    start: int
    """How many takes come before."""
    num_clips: int
    seed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Footage:
    """What is kept of takes."""

    requests: list[world.Request]
    tensors: Mapping[str, Tensor]
    """Each has a row for each take."""


def parts_of(num_clips: int, *, seed: int, purpose: str) -> list[Part]:
    """Divide takes into parts, each with a seed of its own."""
    return [
        Part(start=start, num_clips=min(AT_ONCE, num_clips - start), seed=seed_for(seed, 0, start, purpose))
        for start in range(0, num_clips, AT_ONCE)
    ]


def film_clips(part: Part) -> tuple[list[world.Request], UInt8[np.ndarray, "n f h w 3"]]:
    """Requests of the training distribution, and a take of each."""
    rng = np.random.default_rng(part.seed)
    requests = [world.sample_training_request(rng) for _ in range(part.num_clips)]
    return requests, np.stack([world.render(world.film(request, rng)) for request in requests])


def film_takes(part: Part) -> tuple[Part, list[world.Take], UInt8[np.ndarray, "n f h w 3"]]:
    """Takes of requests of the training distribution, and what they look like."""
    rng = np.random.default_rng(part.seed)
    takes = [world.film(world.sample_training_request(rng), rng) for _ in range(part.num_clips)]
    return part, takes, np.stack([world.render(take) for take in takes])


def gather(
    folder: Path, parts: Sequence[Part], film: Callable[[Part], T], keep: Callable[[T], Footage], stop: Stop
) -> Footage:
    """Film what the folder lacks, and give all that it then holds, in order.

    `film` runs on all processors, `keep` here; no more parts are held at a time than there are processors.

    Raises: Stopped: the process was asked to stop. RunError: a part is damaged.
    """
    folder.mkdir(exist_ok=True)
    missing = [part for part in parts if not _path(folder, part).exists()]
    with tqdm(total=len(parts), initial=len(parts) - len(missing), desc="filming", unit="part") as bar:
        for part, filmed in _filmed(missing, film, stop):
            _write(_path(folder, part), keep(filmed))
            bar.update()
    found = [_read(_path(folder, part)) for part in parts]
    return Footage(
        requests=[request for one in found for request in one.requests],
        tensors={name: torch.cat([one.tensors[name] for one in found]) for name in found[0].tensors},
    )


def _filmed(parts: Sequence[Part], film: Callable[[Part], T], stop: Stop) -> Iterator[tuple[Part, T]]:
    if not parts:
        return
    number = min(len(parts), len(os.sched_getaffinity(0)))
    # Spawned: torch's threads do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(number, _leave_interrupts_to_the_parent) as pool:
        for start in range(0, len(parts), number):
            some = parts[start : start + number]
            filming = pool.map_async(film, some)
            # A signal to the whole group may have ended the workers, and then nothing would ever come.
            while not filming.ready():
                stop.check()
                filming.wait(0.5)
            yield from zip(some, filming.get(), strict=True)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _path(folder: Path, part: Part) -> Path:
    return folder / f"{part.start:08d}.safetensors"


def _write(path: Path, footage: Footage) -> None:
    rng = np.random.default_rng(0)  # of the wording, which `_read` does not keep
    captions = [world.caption(request, rng) for request in footage.requests]
    with replacing(path) as new:
        save_file(dict(footage.tensors), new, metadata={"captions": json.dumps(captions)})


def _read(path: Path) -> Footage:
    try:
        with safe_open(path, framework="pt") as file:
            captions = json.loads(file.metadata()["captions"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  a safetensors file is no mapping
    except SafetensorError as error:
        raise RunError(f"{path}: is damaged: {error}; delete it, and the same command films it again") from error
    return Footage(requests=[world.parse(text) for text in captions], tensors=tensors)
