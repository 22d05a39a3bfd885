"""A run: one folder that tells what was done, with what, how it went, and from where to go on.

    config.yaml        the settings, all of them; the same command resumes, other settings are refused
    provenance.json    one record for each start: code, machine, packages, seed, fingerprints of the inputs
    metrics.jsonl      one JSON object a line, with its step
    checkpoints/       see reward/checkpoint.py

Randomness is a function of (seed, rank, step, purpose), so there is no generator state to save. `step` counts
finished steps everywhere: the checkpoint of step 10 continues with what the eleventh step does.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from reward import checkpoint, files
from reward import trackers as tracking
from reward.checkpoint import Checkpoint, CheckpointError, sha256, sync
from reward.config import Config, dump, load
from reward.trackers import Tracker

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

_SOURCE = Path(__file__).resolve().parent.parent
_NUM_CHECKPOINTS = 2
"""The newest ones, which a run folder keeps."""


class RunError(ValueError):
    """A run folder that cannot be used as asked: which, why, and how to go on."""


# The folder -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """An open run folder. Only the main process writes; elsewhere `log` and `save` do nothing."""

    folder: Path
    is_main: bool = True
    config_sha256: str = ""
    """Of the settings, which a checkpoint must share to be resumed from."""
    trackers: Sequence["GeneralTracker"] = ()

    @property
    def metrics(self) -> Path:
        """The log: one JSON object a line."""
        return self.folder / "metrics.jsonl"

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line to the metrics, and send it to the trackers.

        Raises: RunError: a value is not finite, or not JSON.
        """
        if not self.is_main:
            return
        try:
            line = json.dumps({"step": step, **values}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RunError(f"{self.metrics}: step {step}: {error}: {dict(values)}") from error
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        for tracker in self.trackers:
            tracker.log(dict(values), step=step)

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Save a checkpoint after `step` finished steps; log that step before.

        Raises: CheckpointError: see `reward.checkpoint.save`.
        """
        if self.is_main:
            if self.metrics.exists():
                sync(self.metrics)  # so that no checkpoint is newer than the metrics that lead to it
            point = Checkpoint(step=step, tensors=tensors, state=dict(state), config_sha256=self.config_sha256)
            checkpoint.save(self.folder / "checkpoints", point, keep=_NUM_CHECKPOINTS)

    def resume(self) -> Checkpoint | None:
        """Give the newest checkpoint, or None at the start; metrics of later steps are dropped.

        Raises: CheckpointError: the newest checkpoint is damaged, or was made with other settings.
        """
        point = checkpoint.load_newest(self.folder / "checkpoints")
        if point and point.config_sha256 != self.config_sha256:
            raise CheckpointError(
                f"{self.folder}: checkpoint {point.step:08d} was made with other settings than config.yaml says: their "
                f"SHA-256 is {point.config_sha256 or 'not given'}, not {self.config_sha256}. Take it out of the "
                "folder, if it was copied from another run, or name another folder"
            )
        if self.is_main and self.metrics.exists():
            _drop_metrics(self.metrics, after=point.step if point else -1)
        return point


@contextmanager
def open_run(
    folder: Path,
    config: Config,
    *,
    seed: int,
    inputs: Sequence[Path | None] = (),
    trackers: Sequence[Tracker] = (),
    is_main: bool = True,
) -> Generator[Run]:
    """Make a run folder, or open the one that the same settings made, and hold it alone while the block runs.

    Args:
        folder: the run folder.
        config: all settings of the run; written to `config.yaml`, or compared with it.
        seed: the seed, for the record.
        inputs: files and folders of data and weights, fingerprinted, that may not change between starts; None is none.
        trackers: where to send the metrics besides `metrics.jsonl`.
        is_main: whether this process writes; with several processes, only one may.

    Raises:
        RunError: the folder is in use, is no run folder, or was made with other settings or other inputs.
        ConfigError: a tracker is not installed.
    """
    if not is_main:
        yield Run(folder=folder, is_main=False, config_sha256=_config_sha256(folder, config))
        return
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        _settle_config(folder, config)
        _add_provenance(folder, seed, [path for path in inputs if path])
        started = tracking.start(trackers, folder, _flatten(config.model_dump(mode="json")))
        try:
            yield Run(folder=folder, config_sha256=_config_sha256(folder, config), trackers=started)
        finally:
            for tracker in started:
                tracker.finish()


@contextmanager
def _lock(folder: Path) -> Generator[None]:
    """Hold the folder for this process; the system lets go when the process ends, however it ends."""
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise RunError(f"{folder}: in use by process {file.read()}; wait for it, or stop it") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _settle_config(folder: Path, config: Config) -> None:
    path = folder / "config.yaml"
    if not path.exists():
        if others := [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]:
            raise RunError(f"{folder}: holds {others[0]} but no config.yaml, so is no run folder; name another folder")
        _write_whole(path, dump(config))
    elif changes := _list_changes(load(type(config), path), config):
        raise RunError(
            f"{folder}: was made with other settings: {'; '.join(changes)}. "
            f"Resume it with its own {path}, or name another folder"
        )


def _config_sha256(folder: Path, config: Config) -> str:
    """Tell settings apart, but not runs of the same settings in two folders: these have the same checkpoints."""
    settings = _flatten(config.model_dump(mode="json"))
    text = json.dumps({key: value for key, value in settings.items() if value != str(folder)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _write_whole(path: Path, text: str) -> None:
    with files.replacing(path) as new:
        new.write_text(text, encoding="utf-8", newline="")


def _list_changes(old: Config, new: Config) -> list[str]:
    before, after = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    keys = [key for key in {**before, **after} if before.get(key, "absent") != after.get(key, "absent")]
    return [f"{key} was {before.get(key, 'absent')!r}, is {after.get(key, 'absent')!r}" for key in keys]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _drop_metrics(path: Path, *, after: int) -> None:
    """Keep the lines up to a step; a last line that a kill cut off is dropped too."""
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    try:
        kept = [line for line in lines if json.loads(line)["step"] <= after]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: a line is not a JSON object with a step: {error}; mend or delete the file") from error
    _write_whole(path, "".join(f"{line}\n" for line in kept))


# Provenance -------------------------------------------------------------------------------------------------


def _add_provenance(folder: Path, seed: int, inputs: Sequence[Path]) -> None:
    path = folder / "provenance.json"
    records = json.loads(path.read_bytes()) if path.exists() else []
    fingerprints = {str(item): _fingerprint(item) for item in inputs}
    for name, found in fingerprints.items():
        expected = records[0]["inputs"].get(name) if records else found
        if found != expected:
            raise RunError(f"{folder}: {name} changed since the run began: SHA-256 was {expected}, is {found}")
    record = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.orig_argv,
        "seed": seed,
        "inputs": fingerprints,
        "git": git_state(_SOURCE),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "packages": {item.name: item.version for item in importlib.metadata.distributions()},
    }
    _write_whole(path, json.dumps([*records, record], indent=2) + "\n")


def _fingerprint(path: Path) -> str:
    if not path.exists():
        raise RunError(f"{path}: named as an input, but there is no such file or folder")
    return sha256(path)


def git_state(source: Path) -> dict[str, Any] | None:
    """Give the revision of a repository and whether it was edited since; None for a folder that is not one."""
    if not (source / ".git").exists():
        return None
    try:
        return {
            "revision": _git(source, "rev-parse", "HEAD"),
            "dirty": bool(_git(source, "status", "--porcelain")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None  # no git on this machine, a repository of someone else, or nothing committed yet


def _git(source: Path, *command: str) -> str:
    full = ["git", "-C", str(source), *command]
    return subprocess.run(full, capture_output=True, text=True, check=True).stdout.strip()


# Stopping ---------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Long work was left half-way because the process was asked to stop; what is on disk is whole."""


@dataclass(kw_only=True)
class Stop:
    """True once the process was asked to stop; of several processes, others may be asked later, or never."""

    accelerator: "Accelerator | None" = None
    """Of the processes that work together; None: there is but one."""
    signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def agreed(self) -> bool:
        """Whether any process was asked; all must call this at the same place, wait for each other, and then know."""
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return bool(self)
        mine = torch.tensor([self.signal or 0], device=self.accelerator.device)
        found = int(self.accelerator.gather(mine).max())
        # A signal that comes in between stays this process's own until all are asked again.
        if found:
            self.signal = found
        return found > 0

    def check(self) -> None:
        """Leave long work, all processes at the same place. Raises: Stopped: one of them was asked to stop."""
        if self.agreed():
            raise Stopped

    @property
    def exit_status(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM, 0 if nobody asked."""
        return 128 + self.signal if self.signal is not None else 0


@contextmanager
def stop_on_signal(accelerator: "Accelerator | None" = None) -> Generator[Stop]:
    """Turn Ctrl-C and SIGTERM into a flag to read between steps; a second one ends the process at once."""
    stop = Stop(accelerator=accelerator)

    def ask(number: int, _: object) -> None:
        stop.signal = number
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step; once more stops at once\n")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(status: int) -> NoReturn:
    """End the process with an exit status; one of several without the interpreter's last steps.

    DDP keeps gloo's threads alive even after its group is destroyed, and they may abort a process that winds up
    (pytorch/pytorch#179291, a pull request, tells how).
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


# Steps ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step gave."""

    step: int
    """Number of finished steps."""
    measures: Mapping[str, Any]


def follow(
    steps: Iterable[Step],
    stop: Stop,
    save: Callable[[int], None],
    *,
    num_steps: int,
    shown: Sequence[str],
    is_main: bool,
) -> None:
    """Run steps; the main process shows a progress bar with some of their measures.

    Raises: Stopped: a process was asked to stop; all finished steps are saved.
    """
    with tqdm(total=num_steps, unit="step", disable=not is_main) as bar:
        for step in steps:
            bar.update(step.step - bar.n)
            bar.set_postfix({key: f"{step.measures[key]:.3g}" for key in shown if key in step.measures})
            if stop.agreed():
                save(step.step)
                stop.check()  # waits for the process that writes: where one ends, a launcher ends the others


# Randomness -------------------------------------------------------------------------------------------------


def seed_for(seed: int, rank: int, step: int, purpose: str) -> int:
    """Give a seed in [0, 2**63) that is the same on every machine and in every version of this program."""
    text = f"{seed}/{rank}/{step}/{purpose}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def ramp(step: int, *, total: int, rise: float, fall: float) -> float:
    """Give the share in (0, 1] of a learning rate that rises for so many steps, stays, and falls for the last ones.

    Both on straight lines; `step` counts from 0, and the rate would be 0 at `total`.
    """
    return min(1.0, (step + 1) / max(1.0, rise), (total - step) / max(1.0, fall))


def generator(
    seed: int, *, rank: int = 0, step: int, purpose: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Give a fresh generator for one purpose in one step; on a CPU, torch reads the low 32 bits of a seed."""
    return torch.Generator(device).manual_seed(seed_for(seed, rank, step, purpose))
