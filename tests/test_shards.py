import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from align.shards import Shards

ROOT = Path(__file__).parents[1]
GENERATOR = torch.Generator().manual_seed(0)
ENTRIES = {
    "a": torch.randn(2, 3, generator=GENERATOR),
    "b": torch.randn(4, generator=GENERATOR).to(torch.bfloat16),
    "c": torch.tensor(7),
}


def same(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and found.dtype == expected.dtype and torch.equal(found, expected)


def is_whole(shards: Shards) -> bool:
    return all(same(shards.get(key), tensor) for key, tensor in ENTRIES.items())


def test_what_comes_back_is_what_was_put_in(tmp_path: Path):
    shards, early = Shards(tmp_path / "new" / "folder"), Shards(tmp_path / "new" / "folder")
    shards.add(ENTRIES)
    for reader in (shards, Shards(shards.folder), early):  # the last one looks again when asked
        assert is_whole(reader)
        assert "a" in reader
        assert "d" not in reader
        assert reader.get("d") is None


def test_equal_entries_make_one_shard(tmp_path: Path):
    for tensors in (ENTRIES, dict(reversed(ENTRIES.items()))):
        Shards(tmp_path).add(tensors)
    assert len(list(tmp_path.iterdir())) == 1


# Damage -----------------------------------------------------------------------------------------------------


def test_no_flipped_byte_goes_unnoticed(tmp_path: Path):
    """Wherever it is: in the length of the header, in the header, or in a tensor."""
    Shards(tmp_path).add(ENTRIES)
    [shard] = tmp_path.iterdir()
    data = shard.read_bytes()
    header = len(data) - sum(tensor.nbytes for tensor in ENTRIES.values())
    for place in range(len(data)):
        shard.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        shards = Shards(tmp_path)
        found = {key: shards.get(key) for key in ENTRIES}
        assert all(tensor is None or same(tensor, ENTRIES[key]) for key, tensor in found.items())
        assert place < header or None in found.values()
        assert shards.num_damaged == (not shard.exists())


@pytest.mark.parametrize("num_bytes", [0, 7, 100, -1])
def test_a_truncated_shard_is_removed_and_counted(tmp_path: Path, num_bytes: int):
    before = Shards(tmp_path)
    before.add({"z": torch.ones(3)})
    [other] = tmp_path.iterdir()
    before.add(ENTRIES)
    [cut] = set(tmp_path.iterdir()) - {other}
    data = cut.read_bytes()
    cut.write_bytes(data[:num_bytes])
    after = Shards(tmp_path)
    assert list(tmp_path.iterdir()) == [other]
    for shards in (after, before):
        assert shards.get("a") is None
        assert shards.num_damaged == 1
        assert same(shards.get("z"), torch.ones(3))
    before.add(ENTRIES)
    assert cut.read_bytes() == data
    assert is_whole(before)
    assert is_whole(after)


def test_files_of_others_are_left_alone(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    assert Shards(tmp_path).num_damaged == 0
    assert (tmp_path / "model.safetensors").exists()


# Many entries, many processes -------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the memory in use from Linux's /proc")
def test_memory_does_not_grow_with_what_is_read(tmp_path: Path):
    """24 entries of 4 MB, 8 to a shard, are 96 MB, of which a few are in memory at a time, and no file stays mapped."""
    shards = Shards(tmp_path)
    for start in range(0, 24, 8):
        shards.add({f"{start + k}": torch.full((2**20,), float(start + k)) for k in range(8)})
    before = resident_megabytes()
    for key in range(24):
        found = shards.get(f"{key}")
        assert found is not None
        assert found[-1] == key
        assert resident_megabytes() - before < 40
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def resident_megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def test_two_processes_can_fill_one_folder(tmp_path: Path):
    """Both add 40 entries in other orders and shards, while each reads what the other may have added."""
    program = """
import sys
from pathlib import Path
import torch
from align.shards import Shards
shards = Shards(Path(sys.argv[1]))
for key in range(40)[:: int(sys.argv[2])]:
    for wanted in (key, 39 - key):
        found = shards.get(str(wanted))
        assert found is None or torch.equal(found, torch.full((1000,), wanted))
    shards.add({str(key): torch.full((1000,), key), f"{key}x{sys.argv[2]}": torch.zeros(1)})
assert shards.num_damaged == 0
"""
    commands = [[sys.executable, "-c", program, str(tmp_path), order] for order in ("1", "-1")]
    both = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [process.wait() for process in both] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 80
    shards = Shards(tmp_path)
    assert all(same(shards.get(str(key)), torch.full((1000,), key)) for key in range(40))
