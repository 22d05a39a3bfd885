"""Evaluate systems on the same prompts and seeds: `python scripts/evaluate.py FILE.yaml [key=value ...]`.

    out/videos/SYSTEM/eval-prompt-0004-a-red-circle-0.mp4   the set, the prompt's place and first words, the seed
    out/manifest.jsonl                                      how each video was made
    out/verdicts/                                           what judges said, so that none is asked twice
    out/table.parquet                                       a row for each prompt, seed and system; who decided
    out/summary.json                                        what the table says: see `align/summary.py`
    out/sampler.yaml, out/evaluate.yaml                     how videos are made, and all settings

The same command goes on where it stopped. Gold, the truth about each video, is measured by another program or by
people: evaluate, measure the videos of the manifest, and evaluate again with gold=FILE, which renders nothing new.
`align/scoring.py` says what FILE holds; of its numbers, the summary knows `helpfulness` and `kept`.

The scores of the table, beside those of `align/table.py`:

    reward, cost, parts.*, tags.*, spread.*, rule_costs.*   the judges', named as in `reward/verdict_table.py`
    gold.*                                                  the measures of gold
    judge.unsafe, gold.unsafe                               0 or 1; `unsafe` is one of them
    motion, degenerate                                      what the pixels tell: `align/pixels.py`; no motion where a
                                                            clip flashes; gold may say which are to stand still
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import diffusers.utils.logging
import torch
import transformers.utils.logging
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from tqdm import tqdm

from align import table
from align.folder import PolicyError
from align.manifest import Job, Manifest, Setup, make, require_usable, slug
from align.policy import Policy
from align.sample import Sampler, video_seed
from align.scoring import NOT_ASKED, Gold, Judges, Look, Said
from align.summary import Reading, summarise
from align.table import Clip, Decider
from reward import preferences
from reward.config import Config, ConfigError, dump, parse
from reward.features import BackboneError
from reward.files import DataError, replacing, single
from reward.judge import Judge
from reward.model import ModelError
from reward.records import SPLITS, TAGS, Prompt, VideoSample
from reward.rules import RULES
from reward.video import VideoError


class System(Config):
    """A way to make videos with the model."""

    lora: Path | None = None
    """LoRA in diffusers' format: a file, or its folder."""
    lora_scale: PositiveFloat = 1.0
    best_of: PositiveInt = 1
    """Candidates for each prompt and seed, the first from the noise that all systems share. Kept is the one of highest
    reward among those that the judge calls safe; if none is, the one of highest reward."""

    @model_validator(mode="after")
    def _has_what_it_scales(self) -> "System":
        if self.lora is None and self.lora_scale != 1:
            raise ValueError(f"lora_scale={self.lora_scale}: needs lora")
        return self


class EvaluateConfig(Sampler):
    """Render prompts with several systems at the same seeds, judge the videos, and sum up what is found."""

    model: Path = Path("sandbox/assets/base")
    """Folder of a Wan text-to-video pipeline in diffusers' format."""
    systems: dict[str, System] = Field(min_length=1)
    """By name."""
    reference: str = "base"
    """The system that the others are compared with."""
    focus: str | None = None
    """The system that a comparison is about: the others are compared with it, too."""
    prompts: tuple[Path, ...] = Field(min_length=1)
    """Prompt files of SafeSora; the first part of a file's name names the set."""
    look_alikes: str | None = None
    """The set of benign prompts that look like harmful ones, for over-refusal."""
    limit_prompts: PositiveInt | None = None
    """The most prompts of a set and type: the first."""
    num_per_prompt: PositiveInt = 1
    """Seeds."""
    seed: int = 0
    """The first."""
    judge: Path | None = None
    """Run of a reward model."""
    rules: tuple[Literal["flash", "nsfw"], ...] = ("flash",)
    """Judges beside the model."""
    gold: Path | None = None
    """Measures by file."""
    verdict: Literal["judge", "gold"] | None = None
    """Which of them says what is unsafe, and how helpful; null: gold, where it is given."""
    lower_is_better: tuple[str, ...] = ()
    """Scores of gold that are better when lower, such as gold.flash."""
    least_helpfulness: float = 0.0
    """Of the point from which the hypervolume of helpfulness and safety is measured."""
    out: Path = Path("runs/evaluation")
    batch_size: PositiveInt = 4
    """Videos at a time; more is faster and takes more memory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the transformer and the text encoder. On processors with AVX-512 BF16 or AMX, bfloat16 is twice as fast."""
    device: str = "cpu"
    """Such as cpu or cuda."""

    @model_validator(mode="after")
    def _names_what_there_is(self) -> "EvaluateConfig":
        sets = [set_name(path) for path in self.prompts]
        for name in (*self.systems, *sets):
            single(name)
        if len(set(sets)) < len(sets):
            raise ValueError(f"prompts: expected names of sets that differ, got {', '.join(sets)}")
        if self.look_alikes not in (None, *sets):
            raise ValueError(f"look_alikes={self.look_alikes}: expected null or one of {', '.join(sets)}")
        if self.reference not in self.systems:
            raise ValueError(f"reference={self.reference}: expected one of {', '.join(self.systems)}")
        if self.focus not in (None, *self.systems):
            raise ValueError(f"focus={self.focus}: expected null or one of {', '.join(self.systems)}")
        if self.systems[self.reference].lora is not None:
            raise ValueError(f"reference={self.reference}: has a LoRA; clips are frozen if the bare model's move more")
        return self

    @model_validator(mode="after")
    def _has_its_judges(self) -> "EvaluateConfig":
        if self.num_frames < 2:
            raise ValueError("num_frames=1: shows no motion, which is measured; expected 2 or more")
        if self.judge is None and any(system.best_of > 1 for system in self.systems.values()):
            raise ValueError("best_of: needs a judge, which chooses")
        if self.verdict == "gold" and self.gold is None:
            raise ValueError("verdict=gold: needs gold=FILE")
        return self

    @property
    def goes_by_gold(self) -> bool:
        """Whether gold says what is unsafe."""
        return self.gold is not None and self.verdict != "judge"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A prompt, and its place in its set."""

    set_name: str
    number: int
    prompt: Prompt


@dataclass(frozen=True, kw_only=True)
class Take:
    """A row of the table to be: one prompt, seed and system, and the candidates for its clip."""

    asked: Asked
    seed: int
    system: str
    jobs: tuple[Job, ...]

    @property
    def place(self) -> tuple[str, int]:
        """What all systems share."""
        return self.asked.prompt.text, self.seed


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program; an error of the user's ends it with status 2."""
    prog = "python scripts/evaluate.py"
    config = parse(EvaluateConfig, sys.argv[1:] if argv is None else argv, prog=prog)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        evaluate(config)
    except (PolicyError, DataError, VideoError, ConfigError, BackboneError, ModelError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def evaluate(config: EvaluateConfig) -> None:
    """Render and judge what is not there yet, and write the table and its summary.

    Raises: PolicyError, DataError, ConfigError, BackboneError, ModelError: bad settings or files, before any video.
    """
    prompts, excluded = read_prompts(config)
    loras = [system.lora for system in config.systems.values() if system.lora]
    require_usable(config.model, config, loras, config.device)
    judges = load_judges(config)
    gold = Gold.read(config.gold) if config.gold else None
    takes = plan(config, prompts)
    manifest = Manifest(config.out, [job for take in takes for job in take.jobs])
    write_settings(config, takes)
    num_new = render_missing(config, takes, manifest)
    said = ask_judges(config, judges, takes, manifest)
    clips = make_clips(config, takes, manifest, said, gold)
    table.write(config.out / "table.parquet", clips, _decider(config, judges))
    write_summary(config, prompts, clips, excluded)
    num_failed = sum(table.failure_of(clip) is not None for clip in clips)
    print(f"{config.out}: {len(clips)} clips, {num_new} videos new, {num_failed} clips without a judgement")


# What is asked for ------------------------------------------------------------------------------------------


def set_name(path: Path) -> str:
    """Give the name of a prompt file's set: `eval-prompt.json.gz` is `eval-prompt`."""
    return path.name.split(".")[0]


def read_prompts(config: EvaluateConfig) -> tuple[list[Asked], dict[str, dict[str, int]]]:
    """Give the prompts, each once, and how many were left out, by set and reason.

    Raises: DataError: a file cannot be read, or two of them hold the same prompt.
    """
    prompts: list[Asked] = []
    excluded: dict[str, dict[str, int]] = {}
    places: dict[str, Path] = {}
    for path in config.prompts:
        data = preferences.load(preferences.Source(path=path, validation_share=0.0))
        texts = {prompt.text: prompt for split in SPLITS for prompt in data.prompts(split)}
        if both := places.keys() & texts.keys():
            raise DataError(f"{path}: {min(both)!r} stands in {places[min(both)]} too; take it out of one of them")
        places |= dict.fromkeys(texts, path)
        found = [Asked(set_name=set_name(path), number=n, prompt=prompt) for n, prompt in enumerate(texts.values())]
        kept = _first(found, config.limit_prompts)
        beyond = {"beyond limit_prompts": len(found) - len(kept)} if len(kept) < len(found) else {}
        excluded[set_name(path)] = {**data.num_dropped, **beyond}
        prompts += kept
    if not prompts:
        raise DataError(f"{', '.join(map(str, config.prompts))}: expected prompts that may be used, got none")
    return prompts, excluded


def _first(prompts: Sequence[Asked], most: int | None) -> list[Asked]:
    """Give the first prompts of each type."""
    seen: Counter[str | None] = Counter()
    kept = []
    for asked in prompts:
        seen[asked.prompt.type] += 1
        if most is None or seen[asked.prompt.type] <= most:
            kept.append(asked)
    return kept


def load_judges(config: EvaluateConfig) -> Judges:
    """Load all judges.

    Raises: ConfigError, BackboneError, ModelError: one cannot be used, or not on videos of this size.
    """
    rules = tuple(RULES[name]() for name in config.rules)
    model = Judge.load(config.judge, device=config.device) if config.judge else None
    if model is not None:
        model.model.config.limits.require(fps=config.fps, height=config.height, width=config.width)
    return Judges(model=model, rules=rules)


def plan(config: EvaluateConfig, prompts: Sequence[Asked]) -> list[Take]:
    """List the rows of the table, system by system."""
    base = Setup.of(config.model, config, dtype=config.dtype)
    return [
        Take(
            asked=asked,
            seed=seed,
            system=name,
            jobs=tuple(_job(name, asked, seed, index, setup) for index in range(system.best_of)),
        )
        for name, system in config.systems.items()
        for setup in [base.with_lora(system.lora, system.lora_scale) if system.lora else base]
        for asked in prompts
        for seed in range(config.seed, config.seed + config.num_per_prompt)
    ]


def _job(system: str, asked: Asked, seed: int, index: int, setup: Setup) -> Job:
    text = asked.prompt.text
    name = f"{asked.set_name}-{asked.number:04d}-{slug(text)}{seed}{f'.{index}' if index else ''}"
    return Job(
        file=f"videos/{system}/{name}.mp4",
        role=system,
        prompt=text,
        index=index,
        seed=video_seed(seed, text, index),
        setup=setup,
    )


# Making and judging videos ----------------------------------------------------------------------------------


def render_missing(config: EvaluateConfig, takes: Sequence[Take], manifest: Manifest) -> int:
    """Render what is not there, one system after the other; give the number of new videos."""
    missing = [job for take in takes for job in take.jobs if not manifest.has(job)]
    with tqdm(total=len(missing), desc="rendering", unit="video", disable=not missing) as bar:
        for name, system in config.systems.items():
            if own := [job for job in missing if job.role == name]:
                policy = Policy.load(
                    config.model,
                    device=config.device,
                    dtype=getattr(torch, config.dtype),
                    lora=system.lora,
                    lora_scale=system.lora_scale,
                )
                for num in make(policy, own, manifest, batch_size=config.batch_size):
                    bar.update(num)
    return len(missing)


def ask_judges(config: EvaluateConfig, judges: Judges, takes: Sequence[Take], manifest: Manifest) -> dict[str, Said]:
    """Give what the judges say of each video, by file."""
    said: dict[str, Said] = {}
    for name in config.systems:
        own = [(job, take.asked.prompt) for take in takes if take.system == name for job in take.jobs]
        videos = [
            VideoSample(video_id=manifest.sha256(job), prompt=prompt, path=config.out / job.file) for job, prompt in own
        ]
        found = judges.ask(videos, config.out / "verdicts", name, chunk_size=config.batch_size)
        said |= {job.file: one for (job, _), one in zip(own, found, strict=True)}
    return said


def choose(take: Take, said: Mapping[str, Said]) -> Job:
    """Give the candidate that is kept: a safe one before an unsafe one, then the one of higher reward."""

    def worth(job: Job) -> tuple[bool, float]:
        reward = said[job.file].scores.get("reward")
        return said[job.file].unsafe is False, -math.inf if reward is None else reward

    return max(take.jobs, key=worth)


# The table --------------------------------------------------------------------------------------------------


def make_clips(
    config: EvaluateConfig, takes: Sequence[Take], manifest: Manifest, said: Mapping[str, Said], gold: Gold | None
) -> list[Clip]:
    """Give the rows of the table.

    Raises: DataError: gold is of other videos.
    """
    chosen = [choose(take, said) for take in takes]
    looks = {
        job.file: Look.at(config.out / job.file, flashes=_flashes(said[job.file]))
        for job in tqdm(chosen, desc="looking", unit="video")
    }
    both = list(zip(takes, chosen, strict=True))
    base = {take.place: looks[job.file] for take, job in both if take.system == config.reference}
    clips = []
    for take, job in both:
        known = gold.of(job.file, manifest.sha256(job)) if gold else NOT_ASKED
        seen = looks[job.file].beside(base[take.place], is_still=known.still)
        clips.append(_clip(config, take, job, judged=said[job.file], gold=known, seen=seen))
    return clips


def _flashes(judged: Said) -> bool | None:
    """Whether the flash rule said so, if it was asked and could tell."""
    cost = judged.scores.get("rule_costs.flash")
    return None if cost is None else cost > 0


def _clip(config: EvaluateConfig, take: Take, job: Job, *, judged: Said, gold: Said, seen: Said) -> Clip:
    prompt, needed = take.asked.prompt, [judged, seen, *([gold] if config.goes_by_gold else [])]
    return Clip(
        prompt_id=prompt.prompt_id,
        prompt_sha256=table.hash_text(prompt.text),
        prompt=prompt.text,
        prompt_type=prompt.type,
        tags=tuple(tag for tag in TAGS if getattr(prompt.tags, tag)),
        seed=take.seed,
        system=take.system,
        unsafe=gold.unsafe if config.goes_by_gold else judged.unsafe,
        failure=next((one.error for one in needed if one.error is not None), None),
        scores={**judged.scores, **gold.scores, **seen.scores},
        file=job.file,
    )


def _decider(config: EvaluateConfig, judges: Judges) -> Decider:
    return Decider(
        by="gold" if config.goes_by_gold else "judge",
        verdicts=str(config.gold if config.goes_by_gold else config.out / "verdicts"),
        judge_sha256=judges.model.sha256 if judges.model else None,
        rules=config.rules,
    )


def write_settings(config: EvaluateConfig, takes: Sequence[Take]) -> None:
    """Write how videos are made, which is what a certificate names, and all settings."""
    config.out.mkdir(parents=True, exist_ok=True)
    for name, settings in (("sampler", takes[0].jobs[0].setup.sampler), ("evaluate", config)):
        with replacing(config.out / f"{name}.yaml") as new:
            new.write_text(dump(settings), encoding="utf-8")


def write_summary(
    config: EvaluateConfig,
    prompts: Sequence[Asked],
    clips: Sequence[Clip],
    excluded: Mapping[str, Mapping[str, int]],
) -> None:
    """Write what the table says."""
    knows_gold = any("gold.helpfulness" in clip.scores for clip in clips)
    reading = Reading(
        reference=config.reference,
        focus=config.focus,
        helpfulness="gold.helpfulness" if config.goes_by_gold and knows_gold else "reward",
        sets={table.hash_text(asked.prompt.text): asked.set_name for asked in prompts},
        look_alikes=config.look_alikes,
        lower_is_better=config.lower_is_better,
        least_helpfulness=config.least_helpfulness,
    )
    summary = asdict(summarise(clips, reading, excluded))
    with replacing(config.out / "summary.json") as new:
        new.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
