import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from align.shards import Shards

ROOT = Path(__file__).parents[1]


def entries() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(2, 3, generator=generator),
        "b": torch.randn(4, generator=generator).to(torch.bfloat16),
        "c": torch.tensor(7),
    }


def same(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def test_what_comes_back_is_what_was_put_in(tmp_path: Path):
    shards = Shards(tmp_path / "new" / "folder")
    shards.add(entries())
    for reader in (shards, Shards(shards.folder)):
        for key, tensor in entries().items():
            assert key in reader
            found = reader.get(key)
            assert found is not None
            assert same(found, tensor)
        assert "d" not in reader
        assert reader.get("d") is None


def test_a_tensor_is_the_readers_own(tmp_path: Path):
    shards = Shards(tmp_path)
    shards.add(entries())
    first = shards.get("a")
    assert first is not None
    assert first.untyped_storage().nbytes() == first.nbytes
    first.zero_()
    second = shards.get("a")
    assert second is not None
    assert same(second, entries()["a"])


def test_others_entries_are_found_when_they_are_asked_for(tmp_path: Path):
    first, second = Shards(tmp_path), Shards(tmp_path)
    first.add(entries())
    assert "a" not in second
    assert second.get("a") is not None
    assert "b" in second


def test_equal_entries_make_one_shard(tmp_path: Path):
    for tensors in (entries(), dict(reversed(entries().items()))):
        Shards(tmp_path).add(tensors)
    assert len(list(tmp_path.iterdir())) == 1


# Damage -----------------------------------------------------------------------------------------------------


def test_no_flipped_byte_goes_unnoticed(tmp_path: Path):
    """Wherever it is: in the length of the header, in the header, or in a tensor."""
    Shards(tmp_path).add(entries())
    [shard] = tmp_path.iterdir()
    data = shard.read_bytes()
    for place in range(len(data)):
        shard.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        shards = Shards(tmp_path)
        found = {key: shards.get(key) for key in entries()}
        lost = [key for key, tensor in found.items() if tensor is None]
        assert lost or place < len(data) - sum(t.nbytes for t in entries().values())  # spaces after the header
        assert all(same(tensor, entries()[key]) for key, tensor in found.items() if tensor is not None)
        assert shards.num_damaged == (not shard.exists())


@pytest.mark.parametrize("num_bytes", [0, 7, 100, -1])
def test_a_truncated_shard_is_removed_and_counted(tmp_path: Path, num_bytes: int):
    Shards(tmp_path).add({"z": torch.ones(3)})
    [whole] = tmp_path.iterdir()
    before = Shards(tmp_path)
    before.add(entries())
    [cut] = set(tmp_path.iterdir()) - {whole}
    cut.write_bytes(cut.read_bytes()[:num_bytes])
    after = Shards(tmp_path)
    assert (after.num_damaged, list(tmp_path.iterdir())) == (1, [whole])
    assert after.get("a") is None
    assert after.get("z") is not None
    assert before.get("a") is None
    assert before.num_damaged == 1


def test_entries_that_were_lost_can_be_added_again(tmp_path: Path):
    shards = Shards(tmp_path)
    shards.add(entries())
    [shard] = tmp_path.iterdir()
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert [shards.get(key) is None for key in ("c", "b", "a")].count(True) >= 1
    shards.add(entries())
    assert shard.read_bytes() == data
    assert all(shards.get(key) is not None for key in entries())
    assert shards.num_damaged == 1


def test_files_of_others_are_left_alone(tmp_path: Path):
    foreign = tmp_path / "model.safetensors"
    foreign.write_bytes(b"no tensors")
    shards = Shards(tmp_path)
    assert shards.num_damaged == 0
    assert foreign.exists()


# Many entries, many processes -------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in use from Linux's /proc")
def test_memory_does_not_grow_with_what_is_read(tmp_path: Path):
    """24 entries of 4 MB, 8 to a shard, are 96 MB; of which one is held at a time."""
    shards = Shards(tmp_path)
    for start in range(0, 24, 8):
        shards.add({f"{start + k}": torch.full((2**20,), float(start + k)) for k in range(8)})
    before = resident_megabytes()
    for key in range(24):
        found = shards.get(f"{key}")
        assert found is not None
        assert found[-1] == key
        assert resident_megabytes() - before < 16


def resident_megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


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
    assert [process.wait(60) for process in both] == [0, 0]
    shards = Shards(tmp_path)
    assert len(list(tmp_path.iterdir())) == 80
    for key in range(40):
        found = shards.get(str(key))
        assert found is not None
        assert torch.equal(found, torch.full((1000,), key))
