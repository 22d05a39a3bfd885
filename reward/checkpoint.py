"""Checkpoints: named tensors (safetensors) and plain JSON, saved whole, checked when read. No pickle.

    checkpoints/00000200/tensors.safetensors
                         state.json
                         manifest.json         the step; size and SHA-256 of the other two; which settings made it

A checkpoint is written to a hidden folder, synced, and renamed, so a kill at any moment leaves either the
new one whole or the older ones alone.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or a state that cannot be saved: what, where, and how to go on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A state of a run after `step` steps; tensors are on the CPU."""

    step: int
    tensors: Mapping[str, Tensor]
    state: dict[str, Any]
    config_sha256: str = ""
    """Of the settings of its run; empty for a state without any."""


def save(folder: Path, checkpoint: Checkpoint, *, keep: int) -> None:
    """Add a checkpoint to the folder, then delete all but the newest `keep`.

    Saving the newest step again is allowed if the content is the same, as after a stop right behind a resume.

    Raises: CheckpointError: the state is not plain JSON, or the step would rewrite history.
    """
    folder.mkdir(exist_ok=True)
    remove_leftovers(folder)
    temporary = folder / f".{checkpoint.step:08d}.tmp"
    _write(temporary, checkpoint)
    final = folder / f"{checkpoint.step:08d}"
    newest = max(steps(folder), default=-1)
    if checkpoint.step > newest:
        os.rename(temporary, final)
        sync(folder)
    elif checkpoint.step < newest or sha256(temporary) != sha256(final):
        raise CheckpointError(f"{final}: step {newest} was saved before; a run cannot save another past")
    for step in steps(folder)[:-keep]:
        _delete(folder / f"{step:08d}")
    remove_leftovers(folder)


def load_newest(folder: Path) -> Checkpoint | None:
    """Read the newest checkpoint of a folder; None if there is none.

    Raises: CheckpointError: it is not what was saved. The message names the newest whole one.
    """
    paths = [folder / f"{step:08d}" for step in reversed(steps(folder))]
    if not paths:
        return None
    damage = find_damage(paths[0])
    if damage is None:
        return _read(paths[0])
    whole = next((path.name for path in paths[1:] if find_damage(path) is None), None)
    rest = f"the newest whole one is {whole}" if whole else "no whole one is left"
    raise CheckpointError(
        f"{paths[0]} is damaged: {damage}; {rest}. Delete the damaged folders, and the same command goes on "
        f"from {whole or 'the start'}"
    )


def steps(folder: Path) -> list[int]:
    """List the steps that have a checkpoint, whole or damaged, oldest first."""
    return sorted(int(path.name) for path in folder.glob("*") if re.fullmatch(r"\d{8,}", path.name))


def find_damage(path: Path) -> str | None:
    """Say how a checkpoint differs from its manifest; None if it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        for name in (TENSORS, STATE):
            expected = manifest["files"][name]
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, not {expected['bytes']}"
            if sha256(path / name) != expected["sha256"]:
                return f"{name} has another SHA-256 than when it was saved"
        return None if manifest["step"] == int(path.name) else f"{MANIFEST} is of step {manifest['step']}"
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is not readable"


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left half written or half deleted."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path)


def _write(path: Path, checkpoint: Checkpoint) -> None:
    path.mkdir()
    tensors = {name: _plain(tensor) for name, tensor in checkpoint.tensors.items()}
    save_file(tensors, path / TENSORS)
    (path / STATE).write_text(_to_json(checkpoint.state))
    files = {name: {"bytes": (path / name).stat().st_size, "sha256": sha256(path / name)} for name in (TENSORS, STATE)}
    manifest = {"step": checkpoint.step, "config_sha256": checkpoint.config_sha256, "files": files}
    (path / MANIFEST).write_text(json.dumps(manifest, indent=2))
    for name in (TENSORS, STATE, MANIFEST, "."):
        sync(path / name)


def _plain(tensor: Tensor) -> Tensor:
    # A copy, since safetensors refuses tensors that share memory, as tied weights do.
    return tensor.detach().to("cpu", copy=True).contiguous()


def _to_json(state: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(state, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"state cannot be saved as JSON: {error}") from error
    if json.loads(text) != state:
        raise CheckpointError("state would not come back equal from JSON: use text keys, and lists for tuples")
    return text


def _read(path: Path) -> Checkpoint:
    state = json.loads((path / STATE).read_bytes())
    made_by = json.loads((path / MANIFEST).read_bytes()).get("config_sha256", "")
    return Checkpoint(step=int(path.name), tensors=load_file(path / TENSORS), state=state, config_sha256=made_by)


def _delete(path: Path) -> None:
    # Renamed first, so that a kill half-way does not leave what looks like a damaged checkpoint.
    path.rename(path.with_name(f".{path.name}.tmp"))


# Bytes on the disk ------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Give the SHA-256 of a file, or of a folder's list of relative names and their files' SHA-256."""
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        lines = (f"{sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in inside)
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Optimizers -------------------------------------------------------------------------------------------------


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors, named `optimizer.<parameter>.<name>`, and plain JSON."""
    full = optimizer.state_dict()
    items = [
        (f"optimizer.{index}.{name}", value) for index, part in full["state"].items() for name, value in part.items()
    ]
    tensors = {name: value for name, value in items if isinstance(value, Tensor)}
    others = {name: value for name, value in items if not isinstance(value, Tensor)}
    groups = [{key: _as_list(value) for key, value in group.items()} for group in full["param_groups"]]
    return tensors, {"state": others, "param_groups": groups}


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Give the tensors whose names begin with the prefix, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Put back, bit for bit, what `flatten_optimizer` gave; tensors of other names are left alone.

    Raises: ValueError: the optimizer has other parameter groups than the saved one.
    """
    parts: dict[int, dict[str, Any]] = {}
    for full_name, value in {**tensors, **state["state"]}.items():
        if full_name.startswith("optimizer."):
            _, index, name = full_name.split(".", 2)
            parts.setdefault(int(index), {})[name] = value
    groups = [{key: _as_tuple(key, value) for key, value in group.items()} for group in state["param_groups"]]
    optimizer.load_state_dict({"state": parts, "param_groups": groups})


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _as_tuple(key: str, value: Any) -> Any:
    return tuple(value) if isinstance(value, list) and key != "params" else value
