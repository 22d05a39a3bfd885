"""Tensors on disk by key, many in a file: safetensors shards that processes may share.

    3f0c....safetensors     named by the SHA-256 of its bytes; each tensor in it is named KEY.CHECKSUM

So a shard never changes, two processes cannot be in each other's way, and the headers alone say what is there.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reward.files import replacing

_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")


class Shards:
    """Tensors of a folder, by key; in memory are only the names. A damaged shard is removed, and counted."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.num_damaged = 0
        self._known: set[str] = set()
        self._places: dict[str, tuple[str, str]] = {}  # shard and name of each key
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def refresh(self) -> None:
        """Look for shards that came since, from whatever process; a truncated one is damaged."""
        present = {path.name for path in self.folder.iterdir() if _NAME.fullmatch(path.name)}
        for shard in sorted(present - self._known):
            names = _read_names(self.folder / shard)
            if names is None:
                self._set_aside(shard)
            else:
                self._known.add(shard)
                self._places |= {name.partition(".")[0]: (shard, name) for name in names}

    def get(self, key: str) -> Tensor | None:
        """Give a tensor of the reader's own, bit for bit; None where there is none, or it is damaged."""
        if key not in self._places:
            self.refresh()
        if key not in self._places:
            return None
        shard, name = self._places[key]
        tensor = _read(self.folder / shard, name)
        if tensor is None:
            self._set_aside(shard)
        return tensor

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors into one shard, whole or not at all; keys are single words without a dot."""
        data = safetensors.torch.save({f"{key}.{_checksum(key, tensor)}": tensor for key, tensor in tensors.items()})
        with replacing(self.folder / f"{hashlib.sha256(data).hexdigest()}.safetensors") as new:
            new.write_bytes(data)
        self.refresh()

    def _set_aside(self, shard: str) -> None:
        (self.folder / shard).unlink(missing_ok=True)
        self.num_damaged += 1
        self._known.discard(shard)
        self._places = {key: place for key, place in self._places.items() if place[0] != shard}


def _read_names(shard: Path) -> list[str] | None:
    """Read a shard's header; None if it is damaged."""
    try:
        with safe_open(shard, framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, FileNotFoundError):  # another process may have set it aside
        return None


def _read(shard: Path, name: str) -> Tensor | None:
    """Read one tensor of a shard through a memory map that is closed again; None if it is damaged."""
    try:
        with safe_open(shard, framework="pt") as tensors:
            tensor = tensors.get_tensor(name).clone()
    except (SafetensorError, FileNotFoundError):
        return None
    key, _, checksum = name.partition(".")
    return tensor if checksum == _checksum(key, tensor) else None


def _checksum(key: str, tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{key} {tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
