"""What an alignment leaves behind, written by hand: 3 rounds of 8 steps, whose numbers are easy to foretell."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from align.constraint import Constraint, Dual, Limit, LimitRow
from align.objectives import Objective
from align.objectives.dpo import Dpo
from align.rollouts import Rollout
from align.sample import Sampler
from align.settings import AlignConfig
from reward import config, video
from reward.preferences import Source
from reward.video import Video

PROMPTS = ("a ring that costs $5 or $6", "two red squares", "a secret bar", "a blue circle")
NUM_ROUNDS, STEPS = 3, 8
LIMITS = (
    Limit(name="harm", bound=0.25),
    Limit(name="violence | blood", kind="mean_cost", bound=-1.0, tag="violence"),
)
EVENT: dict[str, Any] = {"guard": "motion", "level": "warn", "value": 0.7, "threshold": 0.8, "step": 8}


def write(folder: Path, *, model: Path = Path("base"), limits: tuple[Limit, ...] = LIMITS, **changes: Any) -> Path:
    """Write the folder of a run that is still going on; give it."""
    settings: dict[str, Any] = {
        "model": model,
        "judge": Path("judge"),
        "prompts": Source(path=Path("prompts.json")),
        "constraint": Constraint(limits=limits),
        "sampler": Sampler(num_frames=8, height=16, width=16),
        "num_validation_prompts": len(PROMPTS),
        "num_rounds": NUM_ROUNDS,
        "steps_per_round": STEPS,
    }
    made = AlignConfig(**settings | changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.dump(made))
    rows = tuple(LimitRow(limit.name, limit.bound, 0.125, 0.5, 0.375, 0.25, 1.5) for limit in limits)
    found = Dual(rows=rows, effective_samples=12.5, num_samples=20)
    (folder / "feasibility.json").write_text(json.dumps(asdict(found)))
    lines = [_line(step, made.objective, limits) for step in range(1, NUM_ROUNDS * STEPS + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    inputs = {str(model): "a" * 64, str(Path("judge/model")): "b" * 64, "prompts.json": "c" * 64}
    start = {"git": {"revision": "d" * 40, "dirty": True}, "python": "3.11", "platform": "here", "device": "cpu"}
    record = {"inputs": inputs, "packages": {"torch": "2.13.0", "hypothesis": "6"}, **start}
    (folder / "provenance.json").write_text(json.dumps([record]))
    return folder


def end(folder: Path, *, best_round: int = 2, violation: float = 0.0, limits: tuple[Limit, ...] = LIMITS) -> Path:
    """Write what a run adds when it ends."""
    best = {"step": best_round * STEPS, "reward": 1.0, "violation": violation}
    last = {**_of_round(NUM_ROUNDS, limits), "round": NUM_ROUNDS, "events": [EVENT | {"level": "stop", "step": 24}]}
    (folder / "result.json").write_text(json.dumps({"best": best, "ended": "motion fell", "last": last}))
    (folder / "lora").mkdir()
    (folder / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"a LoRA")
    return folder


def _line(step: int, objective: Objective, limits: tuple[Limit, ...]) -> dict[str, Any]:
    number, place = divmod(step - 1, STEPS)
    line: dict[str, Any] = {"step": step}
    if place == 0:
        line |= {"round": number, **_of_round(number, limits), "num_items": 5, "motion_ratio": 1 - number / 8}
        line |= {"events": [EVENT] if number == 1 else []}
    if isinstance(objective, Dpo):
        return line | {"loss": 1 / step, "margin": step, "chosen_gap": -step, "rejected_gap": 2 * step, "beta": 100.0}
    return line | {"loss": 1 / step, "weight": 1.0, "chosen_error": 2.0}


def _of_round(number: int, limits: tuple[Limit, ...]) -> dict[str, float]:
    shown = {"validation_reward": number / 2, "rollout_reward": number / 4, "rollout_cost": 0.5 - number}
    shown |= {"rollout_unsafe": 0.5 / (number + 1), "validation_unsafe": 0.25 / (number + 1)}
    shown |= {f"multiplier_{limit.name}": number + 0.5 for limit in limits}
    return shown | {f"limited_{limit.name}": 0.75 - number / 4 for limit in limits}


def add_videos(folder: Path, num_rounds: int, num_frames: int = 8, blank: tuple[int, ...] = ()) -> None:
    """Write validation videos; those of odd rounds are unsafe, and a frame's grey tells its number: 20 times it.

    Of the rounds in `blank`, the first clip is told to be.
    """
    greys = (np.arange(num_frames) * 20).astype(np.uint8)
    clip = Video(frames=np.broadcast_to(greys[:, None, None, None], (num_frames, 16, 16, 3)), fps=16)
    for number in range(num_rounds):
        where = folder / "validation" / f"{number:04d}"
        (where / "videos").mkdir(parents=True)
        rows = [asdict(_rollout(place, unsafe=number % 2 == 1)) for place in range(len(PROMPTS))]
        rows[0]["flaw"] = "blank" if number in blank else None
        for row in rows:
            video.write(where / row["file"], clip)
        told = json.dumps({"made_by": "", "rows": json.dumps(rows)})
        safetensors.torch.save_file({"latents": torch.zeros(1)}, where / "0000.safetensors", {"rollouts": told})


def _rollout(place: int, *, unsafe: bool) -> Rollout:
    return Rollout(
        prompt=PROMPTS[place],
        prompt_type="safety_critical" if place == 3 else "safety_neutral",
        text=PROMPTS[place],
        seed=place,
        file=f"videos/0000-{place:03d}.mp4",
        reward=0.0,
        cost=1.5 if unsafe else -1.5,
        tag_costs={"violence": 0.0},
        reward_spread=0.0,
        cost_spread=0.0,
        motion=1.0,
        flaw=None,
    )
