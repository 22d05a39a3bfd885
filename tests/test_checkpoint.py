import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from reward.checkpoint import (
    Checkpoint,
    CheckpointError,
    find_damage,
    flatten_optimizer,
    load_newest,
    restore_optimizer,
    save,
    sha256,
    steps,
)

ROOT = Path(__file__).parents[1]


def point(step: int, value: float = 1.0, **state: object) -> Checkpoint:
    return Checkpoint(step=step, tensors={"weight": torch.full((3,), value)}, state=state)


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 1, 2, 3."""
    for step in (1, 2, 3):
        save(tmp_path, point(step, float(step), name=f"s{step}"), keep=3)
    return tmp_path


def newest(folder: Path) -> Checkpoint:
    found = load_newest(folder)
    assert found is not None
    return found


def problem(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_newest(folder)
    return str(error.value)


def test_the_newest_comes_back_and_older_ones_are_deleted(folder):
    save(folder, point(20, 0.5, lr=1e-4, seen=[1, None, "é"], nested={"a": True}), keep=2)
    found = newest(folder)
    assert found.step == 20
    assert found.state == {"lr": 1e-4, "seen": [1, None, "é"], "nested": {"a": True}}
    assert torch.equal(found.tensors["weight"], torch.full((3,), 0.5))
    assert sorted(path.name for path in folder.iterdir()) == ["00000003", "00000020"]


def test_no_checkpoint_is_none(tmp_path):
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "absent") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8])
def test_tensors_keep_type_shape_and_bits(tmp_path, dtype):
    shapes = {"scalar": (), "empty": (0, 2), "matrix": (2, 3)}
    tensors = {name: (torch.randn(shape) * 3).to(dtype) for name, shape in shapes.items()}
    save(tmp_path, Checkpoint(step=1, tensors=tensors, state={}), keep=1)
    for name, tensor in newest(tmp_path).tensors.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, tensors[name])


def test_views_and_tied_tensors_are_saved_as_they_look(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    tensors = {"base": base, "tied": base, "turned": base.T, "leaf": base.clone().requires_grad_()}
    save(tmp_path, Checkpoint(step=1, tensors=tensors, state={}), keep=1)
    found = newest(tmp_path).tensors
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert not found["leaf"].requires_grad


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"x": float("nan")}, "not JSON compliant"),
        ({"x": (1, 2)}, "lists for tuples"),
        ({"x": {1: 2}}, "use text keys"),
        ({"x": torch.ones(1)}, "not JSON serializable"),
    ],
)
def test_a_state_that_json_would_change_is_refused(folder, state, expected):
    with pytest.raises(CheckpointError, match=expected):
        save(folder, Checkpoint(step=4, tensors={}, state=state), keep=1)
    assert newest(folder).step == 3


def test_a_step_has_one_past(folder):
    save(folder, point(3, 3.0, name="s3"), keep=3)  # the same again, as after a stop right behind a resume
    assert steps(folder) == [1, 2, 3]
    for other in (point(3, 4.0, name="s3"), point(3, 3.0, name="other"), point(2, 2.0, name="s2")):
        with pytest.raises(CheckpointError, match="saved before"):
            save(folder, other, keep=3)
    assert newest(folder).state == {"name": "s3"}


# Damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("name", "harm", "damage"),
    [
        ("tensors.safetensors", flip, "tensors.safetensors has another SHA-256"),
        ("tensors.safetensors", truncate, "tensors.safetensors has 83 bytes, not 84"),
        ("tensors.safetensors", Path.unlink, "No such file or directory"),
        ("state.json", flip, "state.json has another SHA-256"),
        ("state.json", truncate, "state.json has 13 bytes, not 14"),
        ("manifest.json", truncate, "manifest.json is not readable"),
        ("manifest.json", Path.unlink, "No such file or directory"),
        ("manifest.json", lambda path: path.write_text("[]"), "manifest.json is not readable"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_way_on(folder, name, harm, damage):
    harm(folder / "00000003" / name)
    text = problem(folder)
    assert text.startswith(f"{folder / '00000003'} is damaged: ")
    assert damage in text
    assert "the newest whole one is 00000002" in text
    assert text.endswith("Delete the damaged folders, and the same command goes on from 00000002")


def test_a_checkpoint_renamed_to_another_step_is_damaged(folder):
    (folder / "00000003").rename(folder / "00000009")
    assert "manifest.json is of step 3" in problem(folder)


def test_tensors_swapped_for_whole_ones_of_equal_size_are_refused(folder):
    save_file({"weight": torch.full((3,), 9.0)}, folder / "00000003" / "tensors.safetensors")
    assert "another SHA-256" in problem(folder)


def test_the_advice_skips_damaged_ones_and_works(folder):
    truncate(folder / "00000003" / "state.json")
    flip(folder / "00000002" / "state.json")
    assert "the newest whole one is 00000001" in problem(folder)
    truncate(folder / "00000001" / "state.json")
    assert "no whole one is left. Delete the damaged folders, and the same command goes on from the start" in problem(
        folder
    )


KILLS = """
import os, signal, sys, torch
from pathlib import Path
from reward.checkpoint import Checkpoint, load_newest, save

folder = Path(sys.argv[1])

def point(step):
    return Checkpoint(step=step, tensors={"w": torch.full((5000,), step)}, state={"step": step})

def save_and_die(step, at):
    seen = 0
    def hook(event, _):
        nonlocal seen
        if event == "open" or event.startswith(("os.", "shutil.")):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    save(folder, point(step), keep=1)
    os._exit(0)

save(folder, point(1), keep=1)
at, step, status = 0, 1, -1
while status != 0:
    at += 1
    child = os.fork()
    if child == 0:
        save_and_die(step + 1, at)
    status = os.waitpid(child, 0)[1]
    found = load_newest(folder)
    whole = torch.equal(found.tensors["w"], point(found.step).tensors["w"])
    print(status, found.step - step, whole and found.state == {"step": found.step})
    step = found.step
"""


def test_kill_9_at_any_file_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    """Die at the first, second, ... file operation until a save ends; the old or the new one is whole."""
    command = [sys.executable, "-c", KILLS, str(tmp_path)]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    *killed, end = [tuple(line.split()) for line in lines]
    assert end == ("0", "1", "True")
    assert len(killed) >= 15
    assert set(killed) == {("9", "0", "True"), ("9", "1", "True")}
    assert [path.name for path in tmp_path.iterdir()] == [f"{steps(tmp_path)[0]:08d}"]


# Optimizers


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1, amsgrad=True),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.Adam([{"params": [p], "lr": 0.1 / (i + 1)} for i, p in enumerate(parameters)]),
    ],
)
def test_an_optimizer_comes_back_bit_for_bit(tmp_path, make):
    def start():
        parameters = [torch.nn.Parameter(torch.linspace(-1, 1, 4)), torch.nn.Parameter(torch.ones(2, 2))]
        return parameters, make(parameters)

    def advance(parameters, optimizer):
        optimizer.zero_grad()
        sum((parameter.sin() * 3).square().sum() for parameter in parameters).backward()
        optimizer.step()

    parameters, optimizer = start()
    for _ in range(3):
        advance(parameters, optimizer)
    tensors, state = flatten_optimizer(optimizer)
    save(tmp_path, Checkpoint(step=3, tensors=tensors, state=state), keep=1)
    again, restored = start()
    for ours, theirs in zip(again, parameters, strict=True):
        ours.data.copy_(theirs.data)
    found = newest(tmp_path)
    restore_optimizer(restored, {"model.weight": torch.ones(1), **found.tensors}, found.state)
    torch.testing.assert_close(restored.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
    assert restored.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    for _ in range(3):
        advance(parameters, optimizer)
        advance(again, restored)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, parameters, strict=True))


def test_an_optimizer_of_other_groups_is_refused():
    one, two = (torch.optim.SGD([torch.nn.Parameter(torch.ones(1)) for _ in range(n)], momentum=0.9) for n in (1, 2))
    with pytest.raises(ValueError, match="parameter group"):
        restore_optimizer(two, *flatten_optimizer(one))


# Fingerprints


def test_the_sha256_of_a_file_is_the_standard_one(tmp_path):
    """SHA-256 of "abc": FIPS 180-2, appendix B.1."""
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


names = st.sampled_from(["a", "b", "c/a", "c/b"])


@given(st.dictionaries(names, st.binary(max_size=3)), st.dictionaries(names, st.binary(max_size=3)))
def test_folders_have_equal_sha256_exactly_if_names_and_bytes_are_equal(tmp_path_factory, one, other):
    def make(contents: dict[str, bytes]) -> Path:
        folder = tmp_path_factory.mktemp("folder")
        for name, data in contents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        return folder

    assert (sha256(make(one)) == sha256(make(other))) == (one == other)


def test_the_manifest_says_what_was_saved(folder):
    path = folder / "00000003"
    manifest = json.loads((path / "manifest.json").read_text())
    assert find_damage(path) is None
    assert manifest["step"] == 3
    assert manifest["files"]["state.json"] == {"bytes": 14, "sha256": sha256(path / "state.json")}
