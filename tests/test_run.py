import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field
from tiny_training import Settings, train

from reward.checkpoint import CheckpointError, load_newest, sha256, steps
from reward.config import Config, ConfigError, load
from reward.run import Run, RunError, generator, git_state, open_run, seed_for, stop_on_signal

ROOT = Path(__file__).parents[1]


class Optim(Config):
    lr: float = 0.1
    betas: tuple[float, ...] = (0.9,)


class Other(Config):
    steps: int = 3
    optim: Optim = Optim()
    weights: dict[str, float] = Field(default={"a": 1.0})


def metrics(run: Run) -> list[dict[str, object]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


# Resume


@pytest.mark.parametrize("stops", [[4], [5], [1], [3, 4, 11]])
def test_a_resumed_run_equals_a_straight_one_bit_for_bit(tmp_path, stops):
    """Weights, AdamW's moments, the state and the metrics have the same bytes."""
    straight, stopped = Settings(run=tmp_path / "straight"), Settings(run=tmp_path / "stopped")
    train(straight)
    for step in stops:
        train(stopped, until=step)
    train(stopped)
    for name in ("checkpoints/00000012", "metrics.jsonl"):
        assert sha256(stopped.run / name) == sha256(straight.run / name)
    assert load(Settings, stopped.run / "config.yaml") == stopped
    assert len(json.loads((stopped.run / "provenance.json").read_text())) == len(stops) + 1


def test_a_finished_run_started_again_changes_nothing(tmp_path):
    settings = Settings(run=tmp_path / "run")
    train(settings)
    before = {name: sha256(settings.run / name) for name in ("checkpoints", "metrics.jsonl", "config.yaml")}
    train(settings)
    assert {name: sha256(settings.run / name) for name in before} == before


def test_a_damaged_checkpoint_stops_the_resume_and_the_advice_helps(tmp_path):
    straight, damaged = Settings(run=tmp_path / "straight"), Settings(run=tmp_path / "damaged")
    train(straight)
    train(damaged, until=10)
    state = damaged.run / "checkpoints" / "00000010" / "state.json"
    state.write_bytes(state.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match=r"00000010 is damaged.*goes on from 00000008"):
        train(damaged)
    state.parent.rename(tmp_path / "deleted")
    train(damaged)
    for name in ("checkpoints/00000012", "metrics.jsonl"):
        assert sha256(damaged.run / name) == sha256(straight.run / name)


def test_a_checkpoint_of_another_run_is_refused_unless_its_settings_are_the_same(tmp_path):
    own, same, other = (Settings(run=tmp_path / name, lr=lr) for name, lr in (("a", 0.1), ("b", 0.1), ("c", 0.2)))
    train(own, until=4)
    for donor in (same, other):
        train(donor, until=8)
    newer = own.run / "checkpoints" / "00000008"
    shutil.copytree(other.run / "checkpoints" / "00000008", newer)
    with pytest.raises(CheckpointError, match=r"a: checkpoint 00000008 was made with other settings than config\.yaml"):
        train(own)
    with open_run(own.run, own, seed=0, is_main=False) as run, pytest.raises(CheckpointError, match="other settings"):
        run.resume()
    assert count(own.run) == 4, "no metrics were dropped"
    shutil.rmtree(newer)
    shutil.copytree(same.run / "checkpoints" / "00000008", newer)
    with open_run(own.run, own, seed=0) as run:
        point = run.resume()
    assert point is not None
    assert point.step == 8


def test_a_checkpoint_that_names_no_settings_is_refused(tmp_path):
    settings = Settings(run=tmp_path / "run")
    train(settings, until=4)
    path = settings.run / "checkpoints" / "00000004" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in manifest.items() if key != "config_sha256"}))
    with pytest.raises(CheckpointError, match="SHA-256 is not given"):
        train(settings)


# Settings and inputs


def test_other_settings_are_refused_naming_the_keys(tmp_path):
    with open_run(tmp_path / "run", Other(), seed=0):
        pass
    changed = Other(optim=Optim(lr=0.2, betas=(0.5,)), weights={"b": 1.0})
    with pytest.raises(RunError) as error, open_run(tmp_path / "run", changed, seed=0):
        pass
    assert "was made with other settings" in str(error.value)
    assert "optim.lr was 0.1, is 0.2; optim.betas was [0.9], is [0.5]; " in str(error.value)
    assert "weights.a was 1.0, is 'absent'; weights.b was 'absent', is 1.0" in str(error.value)
    assert "steps" not in str(error.value)


def test_a_spoiled_config_is_refused(tmp_path):
    with open_run(tmp_path / "run", Other(), seed=0):
        pass
    (tmp_path / "run" / "config.yaml").write_text("stpes: 3")
    with (
        pytest.raises(ConfigError, match=r"config\.yaml: stpes"),
        open_run(tmp_path / "run", Other(), seed=0),
    ):
        pass


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with (
        pytest.raises(RunError, match=r"holds thesis\.tex but no config"),
        open_run(tmp_path, Other(), seed=0),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["thesis.tex"]


def test_provenance_tells_code_machine_and_inputs(tmp_path):
    data, weights = tmp_path / "data.json", tmp_path / "weights"
    data.write_bytes(b"abc")
    weights.mkdir()
    (weights / "a").write_bytes(b"x")
    with open_run(tmp_path / "run", Other(), seed=7, inputs=[data, weights]) as run:
        (record,) = json.loads((run.folder / "provenance.json").read_text())
    assert record["seed"] == 7
    assert record["inputs"] == {str(data): sha256(data), str(weights): sha256(weights)}
    assert record["packages"]["torch"] == torch.__version__
    assert record["python"] == sys.version.split()[0]
    assert record["started"].endswith("+00:00")
    assert record["git"] is None or set(record["git"]) == {"revision", "dirty"}


def test_git_state_tells_revision_and_edits(tmp_path):
    def git(*command: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *who, *command], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert git_state(tmp_path) is None
    git("init")
    assert git_state(tmp_path) is None  # nothing committed yet
    git("commit", "--allow-empty", "--message", "first")
    assert git_state(tmp_path) == {"revision": git("rev-parse", "HEAD").strip(), "dirty": False}
    (tmp_path / "new.py").touch()
    assert git_state(tmp_path) == {"revision": git("rev-parse", "HEAD").strip(), "dirty": True}


def test_changed_or_missing_inputs_are_refused(tmp_path):
    data = tmp_path / "data.json"
    with (
        pytest.raises(RunError, match="no such file"),
        open_run(tmp_path / "run", Other(), seed=0, inputs=[data]),
    ):
        pass
    data.write_bytes(b"abc")
    with open_run(tmp_path / "run", Other(), seed=0, inputs=[data]):
        pass
    data.write_bytes(b"abd")
    expected = r"data\.json changed since the run began: SHA-256 was ba7816bf.*, is a52d159f"
    with pytest.raises(RunError, match=expected), open_run(tmp_path / "run", Other(), seed=0, inputs=[data]):
        pass


# Metrics


def test_metrics_are_lines_with_a_step(tmp_path):
    with open_run(tmp_path / "run", Other(), seed=0) as run:
        run.log(1, {"loss": 0.5, "note": "é\u2028\n"})
        run.log(2, {"loss": 1e-300})
        assert metrics(run) == [{"step": 1, "loss": 0.5, "note": "é\u2028\n"}, {"step": 2, "loss": 1e-300}]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(1.0)])
def test_a_value_that_is_not_finite_or_not_json_stops_the_run(tmp_path, value):
    with open_run(tmp_path / "run", Other(), seed=0) as run:
        with pytest.raises(RunError, match=r"metrics\.jsonl: step 3: .*loss"):
            run.log(3, {"loss": value})
        assert not run.metrics.exists()


@given(cut=st.integers(1, 60))
def test_resume_drops_later_metrics_and_a_cut_off_line(tmp_path_factory, cut):
    run = Run(folder=tmp_path_factory.mktemp("run"))
    for step in range(1, 5):
        run.log(step, {"loss": "é" * step})
        if step == 2:
            run.save(step, {}, {})
    whole = run.metrics.read_bytes()
    run.metrics.write_bytes(whole[:-cut])
    run.resume()
    assert run.metrics.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])


def test_without_a_checkpoint_the_metrics_begin_anew(tmp_path):
    with open_run(tmp_path / "run", Other(), seed=0) as run:
        run.log(0, {"loss": 0.5})
        assert run.resume() is None
        assert run.metrics.read_text() == ""


def test_a_spoiled_line_in_the_middle_is_told(tmp_path):
    with open_run(tmp_path / "run", Other(), seed=0) as run:
        run.metrics.write_text('{"step": 1}\nspoiled\n{"step": 3}\n')
        with pytest.raises(RunError, match=r"metrics\.jsonl: a line is not a JSON object with a step"):
            run.resume()


def test_only_the_main_process_writes(tmp_path):
    with open_run(tmp_path / "run", Other(), seed=0) as run:
        run.save(3, {"w": torch.ones(2)}, {"a": 1})
        before = sha256(run.folder)
        with open_run(tmp_path / "run", Other(), seed=0, is_main=False) as second:
            second.log(4, {"loss": 1.0})
            second.save(4, {}, {})
            point = second.resume()
        assert sha256(run.folder) == before
    assert point is not None
    assert (point.step, point.state) == (3, {"a": 1})


# Other processes and signals


@contextmanager
def training(folder: Path, *, lines: int) -> Generator[subprocess.Popen[str]]:
    """A long training in another process that has logged at least so many steps."""
    command = [sys.executable, "-m", "tests.tiny_training", f"run={folder}", "steps=1000000", "save_every=7"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: (folder / "metrics.jsonl").exists() and count(folder) >= lines)
            yield process
        finally:
            process.kill()


def count(folder: Path) -> int:
    return (folder / "metrics.jsonl").read_bytes().count(b"\n")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_like_a_straight_run(settings: Settings, straight: Path) -> None:
    """Go on five steps, and compare with a run that was never stopped."""
    point = load_newest(settings.run / "checkpoints")
    assert point is not None
    train(settings, until=point.step + 5)
    train(settings.model_copy(update={"run": straight}), until=point.step + 5)
    for name in (f"checkpoints/{point.step + 5:08d}", "metrics.jsonl"):
        assert sha256(settings.run / name) == sha256(straight / name)


def test_a_run_in_use_is_refused_and_sigterm_saves_it(tmp_path):
    settings = Settings(run=tmp_path / "run", steps=1000000, save_every=7)
    with training(settings.run, lines=20) as process:
        with pytest.raises(RunError, match=f"in use by process {process.pid}; wait for it, or stop it"):
            train(settings)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
        assert "stopping after this step" in process.communicate()[1]
    assert steps(settings.run / "checkpoints")[-1] == count(settings.run)
    assert_like_a_straight_run(settings, tmp_path / "straight")


def test_kill_9_frees_the_folder_and_the_run_goes_on(tmp_path):
    settings = Settings(run=tmp_path / "run", steps=1000000, save_every=7)
    with training(settings.run, lines=20) as process:
        process.kill()
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert_like_a_straight_run(settings, tmp_path / "straight")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_raises_the_flag_and_the_handlers_come_back(number, status, capfd):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with stop_on_signal() as stop:
        assert not stop
        assert stop.exit_status == 0
        signal.raise_signal(number)
        assert stop
        assert stop.exit_status == status
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert "once more stops at once" in capfd.readouterr().err


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)])
def test_a_second_signal_ends_the_process_at_once(first, second):
    child = os.fork()
    if child == 0:
        with stop_on_signal():
            signal.raise_signal(first)
            signal.raise_signal(second)
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -second


# Randomness


def test_seed_for_is_the_sha256_of_its_arguments():
    """`printf 7/1/20/noise | sha256sum` begins with 3f6f8fb59b6c2bf5; halved, it is 1fb7c7dacdb615fa."""
    assert seed_for(7, 1, 20, "noise") == 0x3F6F8FB59B6C2BF5 // 2 == 0x1FB7C7DACDB615FA


keys = st.tuples(st.integers(), st.integers(0, 9), st.integers(0), st.text(max_size=8))


@given(keys, keys)
def test_seeds_differ_exactly_if_anything_differs(one, other):
    assert 0 <= seed_for(*one) < 2**63
    assert (seed_for(*one) == seed_for(*other)) == (one == other)


def test_ten_thousand_neighbouring_generators_differ():
    """On a CPU 32 bits count: two of 10,000 random ones meet with chance 1e8 / 2 / 2**32 = 1.2 %."""
    seeds = {seed_for(0, rank, step, "noise") % 2**32 for rank in range(2) for step in range(5000)}
    assert len(seeds) == 10_000


def test_a_generator_repeats_itself_and_differs_by_purpose():
    def draw(step: int, purpose: str, rank: int = 0) -> torch.Tensor:
        return torch.randn(4, generator=generator(3, rank=rank, step=step, purpose=purpose))

    assert torch.equal(draw(5, "noise"), draw(5, "noise"))
    others = [draw(6, "noise"), draw(5, "sigma"), draw(5, "noise", rank=1)]
    assert all(not torch.equal(draw(5, "noise"), other) for other in others)


LEAVING = """
import atexit, sys, torch
from reward.run import leave

atexit.register(print, "wound up")
if "several" in sys.argv:
    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
print("said")
leave(143)
"""


@pytest.mark.parametrize("number", ["one", "several"])
def test_one_of_several_processes_ends_without_winding_up(number: str):
    """What it said is not lost, nor is its exit status."""
    done = subprocess.run([sys.executable, "-c", LEAVING, number], capture_output=True, text=True, check=False)
    assert done.returncode == 143, done.stderr
    assert done.stdout.split("\n")[:-1] == (["said", "wound up"] if number == "one" else ["said"])
