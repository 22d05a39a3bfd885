import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from align import guards, rounds, table, train
from align.policy import Policy
from align.settings import AlignConfig, check_batch, check_window, load_prompts
from align.train import run_alignment
from reward import checkpoint, config, rows
from reward.config import ConfigError
from reward.files import DataError
from reward.run import RunError
from tests import tiny_alignment, tiny_judge, two_processes

UNSAFE = {"limits": [{"name": "unsafe", "bound": 0.4}]}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("alignment")
    tiny_alignment.settings(home)
    return home


@pytest.fixture(scope="module")
def finished(home: Path) -> AlignConfig:
    """A run that was never stopped; its second round learns from the first one's videos as well."""
    settings = tiny_alignment.settings(home, out=str(home / "finished"), constraint=UNSAFE, replay=1)
    assert run_alignment(settings) == 0
    return settings


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Those of the newest checkpoint: LoRA, average, best and the optimiser's."""
    point = checkpoint.load_newest(run / "checkpoints")
    assert point is not None
    return dict(point.tensors)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# A run ------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_lora_metrics_and_a_result(finished: AlignConfig):
    found = lines(finished.out)
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    assert [line.get("round") for line in found] == [0, None, 1, None]
    assert found[0]["preference_loss"] == pytest.approx(0.6931472)
    assert found[0]["margin"] == 0.0
    assert found[0]["rollout_reward"] == pytest.approx(0.0, abs=1e-6), "the reference sets the unit"
    assert json.loads((finished.out / "result.json").read_text())["best"]["step"] in (0, 2, 4)
    policy = Policy.load(finished.model, lora=finished.out / "lora")
    assert policy.named_lora()
    loaded = WanPipeline.from_pretrained(finished.model)
    loaded.load_lora_weights(finished.out / "lora")
    assert loaded.get_active_adapters()


def test_a_lora_says_which_prompts_it_comes_from(finished: AlignConfig):
    """Those of training with their rewrites, and those that the choice of a round was made by; no other is watched."""
    prompts, watched = load_prompts(finished)
    expected = {text for each in prompts for text in (each.text, f"{each.text} moving left")}
    expected |= {text for each in watched for text in (each.text, f"{each.text} moving left")}
    found = table.read_hashes(finished.out / "lora/pytorch_lora_weights.prompts.sha256")
    assert found == set(map(table.hash_alike, expected))
    rollouts = [row.values for path in finished.out.glob("*/*/rollouts.jsonl") for row in rows.read(path)]
    assert {table.hash_alike(row[key]) for row in rollouts for key in ("prompt", "text")} <= found


def test_the_same_command_again_changes_nothing(finished: AlignConfig):
    before = (finished.out / "lora/pytorch_lora_weights.safetensors").read_bytes()
    assert run_alignment(finished) == 0
    assert (finished.out / "lora/pytorch_lora_weights.safetensors").read_bytes() == before
    assert len(lines(finished.out)) == 4


def test_replay_adds_the_videos_of_earlier_rounds(finished: AlignConfig, home: Path):
    """Both runs see the same in their first round; what only training needs is gone at the end."""
    alone = tiny_alignment.settings(home, out=str(home / "alone"), constraint=UNSAFE)
    assert run_alignment(alone) == 0
    (first, second), others = ([line["num_items"] for line in lines(run.out)[::2]] for run in (finished, alone))
    assert first == others[0]
    assert second > others[1]
    assert not list(finished.out.glob("rounds/*/*.safetensors"))


def test_offloading_changes_nothing_but_where(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What steps read of the text encoder is made before it goes; the next run finds it, with the same bits."""
    told: list[str] = []
    for owner, name in ((Policy, "offload"), (Policy, "encode_prompts"), (train.Aligner, "_step")):
        monkeypatch.setattr(owner, name, noted(told, name, getattr(owner, name)))
    found, shards = {}, []
    for offload in (True, False):
        told.clear()
        changes = {"out": str(tmp_path / f"{offload}"), "cache": str(tmp_path / "cache"), "num_rounds": 1}
        run = tiny_alignment.settings(home, offload=offload, **changes)
        assert run_alignment(run) == 0
        first = told.index("_step")
        assert ("offload" in told[:first]) is offload
        assert "encode_prompts" not in told[first : told.index("_step", first + 1)]
        found[offload] = weights(run.out)
        shards += (tmp_path / "cache").iterdir()
    assert shards[0] == shards[1]
    assert len(shards) == 2, "one for the round, which the second run adds nothing to"
    assert all(torch.equal(found[True][name], found[False][name]) for name in found[True])


def noted(told: list[str], name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Give the method, which tells of each call."""

    def noting(*values: Any, **named: Any) -> Any:
        told.append(name)
        return method(*values, **named)

    return noting


@pytest.mark.parametrize(
    ("cooldown", "rates"),
    [(0.0, [0.1, 1, 1, 1, 1]), (0.5, [0.1, 1, 1, 0.5, 0.02]), (1.0, [0.1, 0.91, 0.6, 0.25, 0.01])],
)
def test_the_learning_rate_rises_stays_and_falls(cooldown: float, rates: list[float], home: Path):
    """Of 100 steps; step 75 has a quarter left, which is half of the last 50."""
    settings = tiny_alignment.settings(
        home, num_rounds=4, steps_per_round=25, warmup_steps=10, cooldown=cooldown, learning_rate=2.0
    )
    found = [train.learning_rate_at(settings, step) / 2.0 for step in (0, 9, 40, 75, 99)]
    assert found == pytest.approx(rates)


def test_beta_of_the_settings_reaches_every_step(home: Path):
    """Margins follow from the gaps that are logged beside them."""
    objective = {"kind": "dpo", "beta": {"kind": "fixed", "value": 123.0}}
    settings = tiny_alignment.settings(
        home,
        out=str(home / "fixed"),
        objective=objective,
        num_rounds=1,
        learning_rate=0.05,  # else gaps differ by a rounding error
    )
    assert run_alignment(settings) == 0
    _, second = lines(settings.out)
    assert second["beta"] == 123.0
    assert second["margin"] == pytest.approx(-61.5 * (second["chosen_gap"] - second["rejected_gap"]), rel=1e-3)
    assert second["margin"] != 0


@pytest.mark.parametrize("objective", [{"kind": "rwr"}, {"kind": "dpo", "chosen_reserve": 0.5, "anchor": 1.0}])
def test_each_objective_trains(objective: dict[str, Any], home: Path):
    settings = tiny_alignment.settings(
        home, out=str(home / f"each-{len(objective)}"), objective=objective, num_rounds=1
    )
    assert run_alignment(settings) == 0
    assert all(torch.isfinite(value).all() for value in weights(settings.out).values())


def stopped_after(num: int, settings: AlignConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until a process dies in the middle of step `num` + 1."""
    step = train.Aligner._step

    def dying(self: train.Aligner, done: int, number: int) -> dict[str, float]:
        if done == num:
            raise KeyboardInterrupt
        return step(self, done, number)

    with monkeypatch.context() as patch:
        patch.setattr(train.Aligner, "_step", dying)
        with pytest.raises(KeyboardInterrupt):
            run_alignment(settings)


@pytest.mark.parametrize("num", [1, 2, 3])
def test_a_killed_run_ends_at_the_same_bits(
    num: int, home: Path, finished: AlignConfig, monkeypatch: pytest.MonkeyPatch
):
    """Killed in the middle of a round, between rounds, and in the second round."""
    settings = tiny_alignment.settings(home, out=str(home / f"killed-{num}"), constraint=UNSAFE, replay=1)
    stopped_after(num, settings, monkeypatch)
    assert len(lines(settings.out)) == num
    assert run_alignment(settings) == 0
    ours, theirs = weights(settings.out), weights(finished.out)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert lines(settings.out) == lines(finished.out)
    assert (settings.out / "result.json").read_text() == (finished.out / "result.json").read_text()


def test_a_killed_run_with_kept_references_ends_at_the_same_bits(home: Path, monkeypatch: pytest.MonkeyPatch):
    """Three steps of two pairs are more than one epoch of four; the run dies when some pairs were seen before."""
    shared = {"constraint": UNSAFE, "noise": {"draws": 1}, "steps_per_round": 3}
    straight = tiny_alignment.settings(home, out=str(home / "kept"), **shared)
    assert run_alignment(straight) == 0
    killed = tiny_alignment.settings(home, out=str(home / "kept-killed"), **shared)
    stopped_after(5, killed, monkeypatch)
    assert run_alignment(killed) == 0
    ours, theirs = weights(killed.out), weights(straight.out)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert lines(killed.out) == lines(straight.out)
    assert all("reference_error" in line and "distance" not in line for line in lines(straight.out))


def test_a_signal_saves_and_a_program_says_so(home: Path):
    settings = tiny_alignment.settings(home, out=str(home / "signal"), num_rounds=50)
    command = [sys.executable, "-m", "align", str(home / "align.json")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    for _ in wait_for(settings.out / "metrics.jsonl"):
        process.poll()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert list((settings.out / "checkpoints").iterdir())


def wait_for(path: Path, *, seconds: int = 60) -> Iterator[None]:
    import time

    for _ in range(10 * seconds):
        if path.exists():
            return
        time.sleep(0.1)
        yield
    raise AssertionError(f"{path} did not come")


@pytest.mark.parametrize(("norm", "best"), [([1.0, 1.0], 0), ([0.5, 2.0], 4)])
def test_a_policy_that_breaks_a_guard_is_never_the_best(
    norm: list[float], best: int, home: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each newer policy would be kept; a norm of exactly 1 is what no trained policy has."""
    monkeypatch.setattr(guards, "is_better", lambda new, old: True)
    watch = {"velocity_norm": norm, "patience": 9, "least_motion": None, "least_benign_reward": None}
    settings = tiny_alignment.settings(home, out=str(home / f"guarded-{best}"), guards=watch)
    assert run_alignment(settings) == 0
    assert json.loads((settings.out / "result.json").read_text())["best"]["step"] == best


# What is refused --------------------------------------------------------------------------------------------


def test_another_base_or_judge_is_refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = tiny_alignment.settings(home, out=str(tmp_path / "align"))
    stopped_after(1, settings, monkeypatch)
    shutil.copytree(home / "wan", tmp_path / "wan")
    (tmp_path / "wan/model_index.json").write_text((home / "wan/model_index.json").read_text() + "\n")
    with pytest.raises(RunError, match="made with other settings: model was"):
        run_alignment(
            config.load(AlignConfig, home / "align.json", [f"out={settings.out}", f"model={tmp_path / 'wan'}"])
        )
    monkeypatch.setattr(rounds, "fingerprint", lambda path: "0" * 64)
    with pytest.raises(RunError, match="checkpoint was made with another model: SHA-256"):
        run_alignment(settings)


def test_an_infeasible_limit_is_refused_with_its_table(tmp_path: Path):
    """Every video is unsafe, and there is no rewrite that could be safe."""
    settings = tiny_alignment.settings(tmp_path, constraint=UNSAFE, rewrites=None)
    tiny_judge.refill(tmp_path / "run", cost=1.0)
    with pytest.raises(DataError, match=r"no reweighting(.|\n)*unsafe +0\.4 +1 "):
        run_alignment(settings)
    assert not (settings.out / "checkpoints").exists()


def test_a_judge_without_a_zero_is_refused(tmp_path: Path):
    settings = tiny_alignment.settings(tmp_path, constraint=UNSAFE)
    tiny_judge.calibrate(tmp_path / "run", cost_has_zero=False)
    with pytest.raises(ConfigError, match="its cost has no zero"):
        run_alignment(settings)


def test_a_limit_on_an_untrained_tag_is_refused(tmp_path: Path):
    limits = {"limits": [{"name": "children", "bound": 0.1, "tag": "child_abuse"}]}
    with pytest.raises(ConfigError, match="was not trained on the tag child_abuse"):
        run_alignment(tiny_alignment.settings(tmp_path, constraint=limits))


def test_too_few_validation_prompts_are_refused(home: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"validation prompts; expected 7 of these: raise prompts\.validation_share"):
        run_alignment(tiny_alignment.settings(home, out=str(tmp_path / "a"), num_validation_prompts=7))


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        (
            {"kind": "dpo", "leash": 0.5},
            r"noise\.draws=2 .* objective\.leash=0\.5 .* set noise\.draws=null or objective",
        ),
        ({"kind": "rwr"}, r"noise\.draws=2 .* objective\.kind=rwr has none; set noise\.draws=null"),
    ],
)
def test_kept_references_are_for_preferences_without_a_leash(objective: dict[str, Any], told: str, home: Path):
    with pytest.raises(ConfigError, match=told):
        tiny_alignment.settings(home, noise={"draws": 2}, objective=objective)


def test_a_window_must_show_enough_videos(home: Path):
    """299 safe videos show at most 1 % at 95 %; two measurements of 150 are enough if the first moves nothing."""
    limited: dict[str, Any] = {"limits": [{"name": "unsafe", "bound": 0.01}], "delta": 0.05, "window": 2}
    rollouts = {"num_prompts": 75, "num_per_prompt": 2}
    with pytest.raises(ConfigError, match=r"unsafe: the first 150 videos .* at most 0.01 at delta=0.05, 299 can"):
        run_alignment(tiny_alignment.settings(home, out=str(home / "few"), constraint=limited, rollouts=rollouts))
    assert not (home / "few").exists()
    check_window(tiny_alignment.settings(home, constraint=limited | {"delay": 1}, rollouts=rollouts))
    check_window(tiny_alignment.settings(home, constraint=limited | {"rule": None}, rollouts=rollouts))


def test_videos_that_hardly_move_are_told_to_switch_the_guard_off(home: Path, monkeypatch: pytest.MonkeyPatch):
    """And with the guard off, the run goes on."""

    def still(policy: guards.Footage, reference: guards.Footage) -> float:
        raise ValueError("the reference's videos hardly move; or least_motion=null")

    monkeypatch.setattr(rounds, "motion_ratio", still)
    with pytest.raises(SystemExit, match=r"hardly move; or least_motion=null"):
        train.main(written(home, out=str(home / "still")))
    assert train.main(written(home, out=str(home / "moved"), guards={"least_motion": None})) == 0


def written(home: Path, **changes: Any) -> list[str]:
    path = home / "settings.yaml"
    path.write_text(config.dump(tiny_alignment.settings(home, **changes)), encoding="utf-8")
    return [str(path)]


def test_a_batch_must_be_shared_evenly(home: Path):
    settings = tiny_alignment.settings(home, batch_size=6, accumulate=2)
    check_batch(settings, 3)
    with pytest.raises(ConfigError, match="batch_size=6: expected a multiple of 2 processes times accumulate=2"):
        check_batch(settings, 2)


# Processes --------------------------------------------------------------------------------------------------


SAVED = """
import hashlib, json, os, sys
from align import train
from reward.run import Run, leave

save = Run.save

def noting(self, step, tensors, state):
    hashes = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}
    with open(f"{self.folder}-{os.environ['RANK']}.jsonl", "a") as file:
        file.write(json.dumps([step, hashes, state]) + "\\n")
    save(self, step, tensors, state)

Run.save = noting
leave(train.main(sys.argv[1:]))
"""
"""An alignment in which each process tells what it would save, were it the main one."""


@pytest.mark.parametrize("changes", [{}, {"noise": {"draws": 1}, "steps_per_round": 3}])
def test_two_processes_are_one_with_twice_the_parts(changes: dict[str, Any], home: Path, tmp_path: Path):
    """Gradients are summed in another order, so to rounding only.

    With draws, one process has to ask its reference in the third step, and the other has kept all that it needs.
    """
    shared = {"num_rounds": 2, "batch_size": 4, "constraint": UNSAFE} | changes
    alone = tiny_alignment.settings(home, out=str(tmp_path / "one"), accumulate=2, **shared)
    assert run_alignment(alone) == 0
    both = tiny_alignment.settings(home, out=str(tmp_path / "two"), **shared)
    assert two_processes.run(SAVED, str(home / "align.json")) == [0, 0]
    first, second = (Path(f"{both.out}-{rank}.jsonl").read_text().splitlines() for rank in (0, 1))
    assert len(first) == len(lines(both.out))
    assert first == second, "weights, optimiser, multipliers, guards and beta, bit for bit"
    ours, theirs = weights(both.out), weights(alone.out)
    for name in theirs:
        if name.startswith(("lora.", "average.")):  # Adam's squares keep too few digits to compare
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-6)
    for one, two in zip(lines(alone.out), lines(both.out), strict=True):
        assert one.keys() == two.keys()
        for key in ("beta", "margin", "multiplier_unsafe", "rollout_unsafe"):
            assert one.get(key, 0) == pytest.approx(two.get(key, 0), rel=1e-3, abs=1e-4), key
    for before, after in pairwise(lines(both.out)):
        steered = before["beta"] * math.exp(0.5 * (before["folded_factor"] - 0.2))
        assert after["beta"] == pytest.approx(steered, rel=1e-12), "by the mean of both, which is logged"


@pytest.mark.parametrize(
    ("owner", "method", "number", "saved"),
    [("align.train:Aligner", "_step", 1, ["00000001"]), ("align.rollouts:Round", "make", 1, [])],
)
def test_a_signal_to_one_of_two_processes_stops_both(
    owner: str, method: str, number: int, saved: list[str], home: Path, tmp_path: Path
):
    """In the same step, or before the first one, when both have their videos."""
    settings = tiny_alignment.settings(home, out=str(tmp_path / "align"), num_rounds=1)
    arguments = [str(home / "align.json")]
    assert two_processes.run(two_processes.STOPPED, "align.train", owner, method, str(number), *arguments) == [143, 143]
    assert [path.name for path in settings.out.glob("checkpoints/*")] == saved
    assert run_alignment(settings) == 0
    assert [line["step"] for line in lines(settings.out)] == [1, 2]
