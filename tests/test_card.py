import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_alignment
import tiny_history
import tiny_wan
from huggingface_hub import ModelCard

from align import card, guards, history
from align.constraint import Constraint
from align.objectives.rwr import Rwr
from align.offline import Offline
from align.policy import Policy
from align.rollouts import Round
from align.train import run_alignment
from reward.files import DataError
from reward.preferences import Source


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.build(tmp_path_factory.mktemp("wan"))


def written(folder: Path, **changes: Any) -> str:
    card.write(folder, num_prompts=60, **changes)
    return (folder / "lora" / "README.md").read_text()


def test_the_hub_reads_the_card_and_no_license_is_made_up(model: Path, tmp_path: Path):
    folder = tiny_history.end(tiny_history.write(tmp_path / "run", model=model))
    data = ModelCard(written(folder)).data.to_dict()
    assert (data["library_name"], data["pipeline_tag"], data["base_model"]) == (
        "diffusers",
        "text-to-video",
        str(model),
    )
    assert data["base_model_sha256"] == "a" * 64
    assert {"lora", "dpo"} <= set(data["tags"])
    assert "license" not in data
    assert "License: none is stated" in written(folder)


def test_the_card_says_in_numbers_what_was_asked_and_what_came(model: Path, tmp_path: Path):
    """Round 2 was kept: its rewards are 2 / 2 and 2 / 4; the multipliers at the end are those of round 3, 3 + 1/2."""
    text = written(tiny_history.end(tiny_history.write(tmp_path / "run", model=model), best_round=2))
    for line in (
        "| harm | share of videos whose overall cost is above 0 | 0.25 | 3.5 |",
        r"| violence \| blood | mean cost of violence | -1 | 3.5 |",
        "| harm | 0.25 | 0.125 | 0.5 | 0.375 | 0.25 | 1.5 |",
        "| measure | reference | this LoRA, of round 2 |",
        "| mean reward, validation prompts (standard deviations of the reference's) | 0 | 1 |",
        "| share of unsafe videos, validation prompts | 0.25 | 0.08333 |",
        "| mean cost, training prompts (the judge's unit; above 0 is unsafe) | 0.5 | -1.5 |",
        "| limit harm, at most 0.25 | 0.75 | 0.25 |",
        "By this, all limits were met.",
        "How training ended: motion fell. Guards that were broken: motion (stop) x 1, motion (warn) x 1.",
        "They are no certificate.",
        f"| base model | {model} | {'a' * 64} |",
        f"| judge | judge/model | {'b' * 64} |",
        f"| prompts | prompts.json | {'c' * 64} |",
        f"| code | {'d' * 40}, with changes that are not committed |",
        "| torch | 2.13.0 |",
        "60 training prompts and 4 validation prompts of",
        "15 items to learn from",
    ):
        assert line in text, line
    assert "| hypothesis |" not in text
    assert all(f"- {reason}" in text for reason in card.VOID_IF)
    assert re.search(r"this LoRA \| .*pytorch_lora_weights.safetensors \| [0-9a-f]{64} \|", text)


def test_prompts_are_never_quoted(model: Path, tmp_path: Path):
    folder = tiny_history.end(tiny_history.write(tmp_path / "run", model=model))
    tiny_history.add_videos(folder, 3)
    assert not any(prompt in written(folder) for prompt in tiny_history.PROMPTS)


def test_the_card_owns_up(model: Path, tmp_path: Path):
    folder = tiny_history.end(tiny_history.write(tmp_path / "a", model=model), best_round=0, violation=0.125)
    assert "**A limit was broken, by 0.125 (a share" in written(folder)
    assert "this LoRA changes nothing" in written(folder)
    bare = tiny_history.end(tiny_history.write(tmp_path / "b", model=model, limits=(), objective=Rwr()), limits=())
    assert "There was no limit: nothing but the reward" in written(bare)
    assert "Reward-weighted regression" in written(bare)
    assert "limits were met" not in written(bare)
    assert "The first round" not in written(bare)
    bound = Constraint(limits=tiny_history.LIMITS[:1], delta=0.25)
    sure = tiny_history.write(tmp_path / "c", model=model, limits=tiny_history.LIMITS[:1], constraint=bound)
    assert "at most 0.25, upper bound of confidence 0.75" in written(tiny_history.end(sure))
    offline = Offline(data=Source(path=Path("pairs.json")))
    learnt = tiny_history.end(tiny_history.write(tmp_path / "d", model=model, offline=offline))
    assert "The first round learnt from the pairs of `pairs.json` instead, as people preferred them." in written(learnt)


def test_a_run_that_goes_on_has_no_card(tmp_path: Path):
    told = history.read(tiny_history.write(tmp_path / "run"))
    with pytest.raises(DataError, match="has not ended"):
        card.text_of(told, num_prompts=60)


def test_the_cards_own_lines_give_the_frames_of_the_best_policy_in_stock_diffusers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The kept round's validation videos are those of the kept LoRA, and their latents are still there.

    Which round is best hangs on the last bits of a random judge; here it is the one before the first step of round 1.
    Texts are shorter than a stock pipeline pads them, as the sandbox's are.
    """
    monkeypatch.setattr(guards, "is_better", lambda new, old: new.step == 2)
    fast: dict[str, Any] = {"learning_rate": 0.1, "warmup_steps": 0, "ema_decay": 0, "lora": {"rank": 2, "alpha": 5}}
    off = ("motion", "benign_reward", "chosen_gap", "rejected_dominant", "degenerate", "disagreement")
    names = [("least_" if name in off[:2] else "most_") + name for name in off]
    fast |= {"guards": dict.fromkeys([*names, "velocity_norm"])}  # a policy that breaks one is never kept
    settings = tiny_alignment.settings(tmp_path, seed=1, num_validation_prompts=1, **fast)
    tokenizer = settings.model / "tokenizer" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"model_max_length": 5}))
    assert run_alignment(settings) == 0
    told = history.read(tmp_path / "align")
    assert told.ending is not None
    assert told.ending.best_round == 1  # neither the reference nor the latest policy
    assert {"curves.png", "validation.png"} <= {path.name for path in told.folder.iterdir()}
    rollout = told.validation()[1][0]
    made = by_the_card((told.folder / "lora" / "README.md").read_text(), rollout.prompt, rollout.seed)
    policy = Policy.load(told.config.model)
    distances = {}
    for number in told.validation():
        latents = Round(told.folder / "validation" / f"{number:04d}", "").latents(0)
        distances[number] = np.abs(made - policy.decode(latents[:1])[0]).max()
    assert distances.pop(1) <= 1
    assert min(distances.values()) > 5


def by_the_card(text: str, prompt: str, seed: int) -> np.ndarray:
    """Run the card's own lines."""
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    asked = code.replace('"a prompt of your own"', repr(prompt)).replace("manual_seed(0)", f"manual_seed({seed})")
    found: dict[str, Any] = {}
    exec(asked, found)
    return np.rint(found["frames"] * 255).astype(int)
