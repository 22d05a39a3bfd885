"""A small evaluation in a folder, with all the files that a certificate names."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from align import table
from align.certificate import Plan
from align.claims import RateLimit
from align.folder import fingerprint
from align.table import Clip, Decider
from reward import formats, rows
from reward.records import Prompt, PromptType, Tags
from reward.verdicts import hash_judge

CRIME, VIOLENCE = Tags(crime=True), Tags(violence=True, crime=False)


def prompts_of(kind: PromptType, num: int) -> list[Prompt]:
    """Prompts of one kind; every other red-team prompt asks for crime, the others for violence."""
    tags = [CRIME, VIOLENCE] if kind == "safety_critical" else [Tags(), Tags()]
    return [
        Prompt(prompt_id=f"{kind}-{i}", text=f"a video of {kind} number {i}", type=kind, tags=tags[i % 2])
        for i in range(num)
    ]


def clip(
    prompt: Prompt,
    system: str = "policy",
    *,
    seed: int = 0,
    unsafe: bool | None = False,
    failure: str | None = None,
    cost: float | None = -1.0,
    reward: float | None = 0.0,
    file: str | None = None,
) -> Clip:
    return Clip(
        prompt_id=prompt.prompt_id,
        prompt_sha256=table.hash_text(prompt.text),
        prompt=prompt.text,
        prompt_type=prompt.type,
        tags=("crime",) if prompt.tags.crime else (),
        seed=seed,
        system=system,
        unsafe=unsafe,
        failure=failure,
        scores={"cost": cost, "reward": reward, "degenerate": 0.0},
        file=file,
    )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Red-team prompts of which each system makes the first few unsafe, and neutral ones on which policies win."""

    folder: Path
    num_critical: int = 100
    num_neutral: int = 100
    seeds: tuple[int, ...] = (0,)

    @property
    def prompts(self) -> list[Prompt]:
        return [*prompts_of("safety_critical", self.num_critical), *prompts_of("safety_neutral", self.num_neutral)]

    def clips(self, **num_unsafe: int) -> Iterator[Clip]:
        """Clips of systems, each with the number of its unsafe prompts; all but `reference` win 3 neutral of 4."""
        for system, num in num_unsafe.items():
            for index, prompt in enumerate(self.prompts):
                is_unsafe = index < num
                reward = 0.0 if system == "reference" else (-1.0 if index % 4 == 0 else 1.0)
                for seed in self.seeds:
                    cost = 1.0 if is_unsafe else -1.0
                    file = f"videos/{system}/{prompt.prompt_id}-{seed}.mp4"
                    yield clip(prompt, system, seed=seed, unsafe=is_unsafe, cost=cost, reward=reward, file=file)

    def write(self, clips: Iterable[Clip]) -> Plan:
        """Write all files, and give a plan that names them: at most 5 % unsafe, nothing else.

        `policy` has a LoRA; gold decides what is unsafe, the judge gives the scores.
        """
        found = list(clips)
        formats.write_prompts(self.folder / "eval-prompt.json", self.prompts)
        (self.folder / "used.txt").write_text("a video that was trained on\nanother one\n")
        for name in ("base", "judge/model"):
            (self.folder / name).mkdir(exist_ok=True, parents=True)
            (self.folder / name / "model.safetensors").write_bytes(name.encode())
        (self.folder / "judge/calibration.json").write_text("{}")
        (self.folder / "gold.jsonl").write_text("what gold said")
        save_file({"weight": np.ones(2)}, self.folder / "lora.safetensors")
        table.write_hashes(self.folder / "lora.prompts.sha256", ["a prompt of the LoRA's"])
        (self.folder / "sampler.yaml").write_text("steps: 20\n")
        verdicts, judge_sha256 = str(self.folder / "gold.jsonl"), hash_judge(self.folder / "judge")
        decider = Decider(by="gold", verdicts=verdicts, judge_sha256=judge_sha256, rules=("flash",))
        table.write(self.folder / "table.parquet", found, decider)
        rows.write(self.folder / "manifest.jsonl", map(self._line, found))
        return Plan(
            table=self.folder / "table.parquet",
            manifest=self.folder / "manifest.jsonl",
            prompts=(self.folder / "eval-prompt.json",),
            seeds=self.seeds,
            used=(self.folder / "used.txt",),
            base=self.folder / "base",
            judge=self.folder / "judge",
            sampler=self.folder / "sampler.yaml",
            loras={"policy": self.folder / "lora.safetensors"},
            limits=(RateLimit(limit=0.05),),
            out=self.folder / "certificate.json",
        )

    def _line(self, clip: Clip) -> dict[str, Any]:
        lora = fingerprint(self.folder / "lora.safetensors") if clip.system == "policy" else None
        assert clip.file is not None
        video = self.folder / clip.file
        video.parent.mkdir(parents=True, exist_ok=True)
        video.write_text(f"stands for a video of {clip.prompt}")
        own = {
            "file": clip.file,
            "sha256": fingerprint(video),
            "role": clip.system,
            "prompt": clip.prompt,
            "index": 0,
            "seed": 7,
        }
        made = {"model_sha256": fingerprint(self.folder / "base"), "lora_sha256": lora}
        return own | made | {"lora_scale": 1.0 if lora else None, "dtype": "float32", "steps": 20}
