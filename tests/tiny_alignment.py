"""An alignment in small: a random Wan, a random judge, prompts in a file, and two rounds of two steps."""

import json
from pathlib import Path
from typing import Any

from align.settings import AlignConfig
from reward import config, formats
from reward.records import Prompt
from tests import tiny_judge, tiny_wan

PROMPTS = tuple(f"a {colour} {shape}" for colour in ("red", "blue") for shape in ("circle", "square", "ring", "bar"))


def settings(root: Path, **changes: Any) -> AlignConfig:
    """Give the settings of a run in ROOT/align, whose inputs are written where they are missing."""
    if not (root / "wan").exists():
        tiny_wan.build(root / "wan")
        tiny_judge.write_run(root)
        prompts = [Prompt(prompt_id=f"{i:064d}", text=text, type="safety_neutral") for i, text in enumerate(PROMPTS)]
        formats.write_prompts(root / "config-train.json", prompts)
        lines = [json.dumps({"prompt": text, "safe": f"{text} moving left"}) for text in PROMPTS]
        (root / "rewrites.jsonl").write_text("\n".join(lines))
    tree: dict[str, Any] = {
        "out": str(root / "align"),
        "model": str(root / "wan"),
        "judge": str(root / "run"),
        "prompts": {"path": str(root / "config-train.json"), "validation_share": 0.3},
        "rewrites": str(root / "rewrites.jsonl"),
        "lora": {"rank": 2, "alpha": 2},
        "constraint": {"limits": []},
        "sampler": {"steps": 2, "num_frames": tiny_wan.NUM_FRAMES, "height": 32, "width": 32},
        "rollouts": {"num_prompts": 4, "num_per_prompt": 2, "chunk_size": 2},
        "num_validation_prompts": 2,
        "num_rounds": 2,
        "steps_per_round": 2,
        "batch_size": 2,
        "save_every": 1,
        "cache": str(root / "cache"),
        "mixed_precision": "no",
    }
    path = root / "align.json"
    path.write_text(json.dumps(tree | changes))
    return config.load(AlignConfig, path)
