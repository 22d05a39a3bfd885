"""Render prompts to videos: `python scripts/sample.py [FILE.yaml] [key=value ...]`.

    out/videos/0000-a-red-circle-0.mp4              the prompt's place, its first words, the video's index
    out/videos/0000-a-red-circle-0.reference.mp4    with compare=true: the same noise without the LoRA
    out/contact_sheet.png                           the first videos at a glance
    out/manifest.jsonl                              one line a video: prompt, seed, settings, fingerprints
    out/videos/0000-a-red-circle-0.webp             with preview=webp or gif: a looping animation of each, for pages

The same command goes on where it stopped; other settings in the same folder are refused. A line of the
manifest is all that diffusers alone needs to make the video again, on a CPU in float32 to the last bit:

    pipe = WanPipeline.from_pretrained(model)           # and pipe.load_lora_weights(lora)
    pipe(prompt, negative_prompt=..., num_frames=num_frames, height=..., width=..., num_inference_steps=steps,
         guidance_scale=..., max_sequence_length=min(512, pipe.tokenizer.model_max_length),
         generator=torch.Generator().manual_seed(seed))

The network attends to the padding of a text, so the length counts: 24 for the sandbox's base model, 512 for Wan.
Where the VAE does not compress time (`scale_factor_temporal` 1), the pipeline makes one frame more than it is
asked for: ask for num_frames - 1.

With certificate=FILE, one that passes and is about videos made just so, its id stands in each video and its line.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import diffusers.utils.logging
import torch
import transformers.utils.logging
from pydantic import PositiveFloat, PositiveInt, model_validator
from tqdm import tqdm

from align import certificate
from align.folder import PolicyError
from align.manifest import Job, Manifest, Setup, make, require_usable, slug
from align.policy import Policy
from align.sample import Sampler, video_seed
from reward import preferences, video
from reward.config import parse
from reward.files import DataError, replacing
from reward.video import Video, VideoError

PROMPTS = Path("configs/sample/prompts.txt")
MAX_SHEET_ROWS = 32

Role = Literal["reference", "policy"]


class SampleError(ValueError):
    """A request that cannot be served: which setting or file, why, and what to do."""


class SampleConfig(Sampler):
    """Render prompts to videos, with or without a LoRA, or both side by side."""

    model: Path = Path("sandbox/assets/base")
    """Folder of a Wan text-to-video pipeline in diffusers' format."""
    lora: Path | None = None
    """LoRA in diffusers' format: a file, or its folder."""
    lora_scale: PositiveFloat = 1.0
    """Strength of the LoRA; below 1 lies between reference and policy."""
    certificate: Path | None = None
    """What `python -m align.certify table` wrote of this very model, LoRA, scale, dtype and sampler."""
    compare: bool = False
    """Whether to render each video without the LoRA too."""
    prompts: Path = PROMPTS
    """Text file with a prompt a line, or a prompt file of SafeSora (.json, .json.gz)."""
    prompt: str | None = None
    """One prompt, instead of a file."""
    num_per_prompt: PositiveInt = 1
    preview: Literal["webp", "gif"] | None = None
    """Animations to write beside the videos, for pages that do not play them; they flash as the videos do."""
    seed: int = 0
    out: Path = Path("runs/sample")
    batch_size: PositiveInt = 4
    """Videos at a time; more is faster and takes more memory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the transformer and the text encoder."""
    device: str = "cpu"
    """Such as cpu or cuda."""

    @model_validator(mode="after")
    def _has_the_lora_that_it_needs(self) -> "SampleConfig":
        if self.lora is None and self.lora_scale != 1:
            raise ValueError(f"lora_scale={self.lora_scale}: needs lora=FILE")
        if self.lora is None and self.compare:
            raise ValueError("compare=true: needs lora=FILE; without one, policy and reference are the same")
        return self


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program; an error of the user's ends it with status 2."""
    prog = "python scripts/sample.py"
    config = parse(SampleConfig, sys.argv[1:] if argv is None else argv, prog=prog)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        sample(config)
    except (SampleError, PolicyError, DataError, VideoError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def sample(config: SampleConfig) -> None:
    """Render what is not there yet, and draw the contact sheet.

    Raises: SampleError, PolicyError, DataError: bad settings, before any weight is loaded.
    """
    prompts = read_prompts(config)
    require_usable(config.model, config, [config.lora] if config.lora else [], config.device)
    jobs = plan(config, prompts)
    manifest = Manifest(config.out, jobs)
    missing = [job for job in jobs if not manifest.has(job)]
    if missing:
        render_all(config, missing, manifest)
    if config.preview:
        write_previews(config, jobs)
    draw_sheet(config, jobs)
    print(f"{config.out}: {len(jobs)} videos, {len(missing)} of them new")


# What is asked for ------------------------------------------------------------------------------------------


def read_prompts(config: SampleConfig) -> list[str]:
    """Give the prompts, each once.

    Raises: SampleError: none, two sources, or a prompt twice. DataError: a SafeSora file that cannot be read.
    """
    if config.prompt is not None:
        if config.prompts != PROMPTS:
            raise SampleError(f"prompt={config.prompt!r} and prompts={config.prompts}: give one of them")
        found = [config.prompt.strip()] if config.prompt.strip() else []
    elif config.prompts.name.endswith((".json", ".json.gz", ".jsonl", ".jsonl.gz")):
        found = _read_data(config.prompts)
    else:
        found = _read_lines(config.prompts)
    if not found:
        raise SampleError(f"{'prompt' if config.prompt is not None else config.prompts}: holds no prompt")
    return found


def _read_lines(path: Path) -> list[str]:
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SampleError(f"prompts={path}: cannot be read as a UTF-8 text file: {error}") from error
    places: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line in places:
            raise SampleError(f"{path}: line {number} repeats line {places[line]}; num_per_prompt gives several")
        if line:
            places[line] = number
    return list(places)


def _read_data(path: Path) -> list[str]:
    """Read a data file; rows that may not be used, such as child abuse, are dropped and counted there."""
    data = preferences.load(preferences.Source(path=path, validation_share=0.0))
    splits: tuple[preferences.Split, ...] = ("train", "validation", "test", "eval")
    texts = dict.fromkeys(prompt.text for split in splits for prompt in data.prompts(split))
    dropped = ", ".join(f"{count} {reason}" for reason, count in data.num_dropped.items()) or "none"
    print(f"{path}: {data.num_read} rows, {len(texts)} different prompts, dropped: {dropped}")
    return list(texts)


def plan(config: SampleConfig, prompts: Sequence[str]) -> list[Job]:
    """List all videos of a run; a policy's video stands beside its reference's.

    Raises: SampleError: the certificate is not about them.
    """
    reference = Setup.of(config.model, config, dtype=config.dtype)
    setups: dict[Role, Setup] = {"reference": reference} if config.compare else {}
    policy = reference.with_lora(config.lora, config.lora_scale) if config.lora else reference
    setups["policy"] = certified(policy, config.certificate) if config.certificate else policy
    return [
        Job(
            file=f"videos/{number:04d}-{slug(prompt)}{index}{'.reference' if role == 'reference' else ''}.mp4",
            role=role,
            prompt=prompt,
            index=index,
            seed=video_seed(config.seed, prompt, index),
            setup=setup,
        )
        for number, prompt in enumerate(prompts)
        for index in range(config.num_per_prompt)
        for role, setup in setups.items()
    ]


def certified(setup: Setup, path: Path) -> Setup:
    """Name the certificate that videos which are made so have.

    Raises: SampleError: it is none, does not pass, or is about videos that are made in another way.
    """
    try:
        found = certificate.load(path)
    except ValueError as error:
        raise SampleError(f"certificate={error}") from error
    if found.verdict != "PASS":
        raise SampleError(f"certificate={path}: its verdict is {found.verdict}; only one that passes can be named")
    made = found.made[found.system]
    for key, value in (setup.line() | {"best_of": 1}).items():
        if made.get(key) != value:
            raise SampleError(
                f"certificate={path}: is about {key}={made.get(key)}, here it is {value}; sample as it says, or leave "
                "it out"
            )
    return replace(setup, certificate=found.id)


# Making it --------------------------------------------------------------------------------------------------


def render_all(config: SampleConfig, jobs: Sequence[Job], manifest: Manifest) -> None:
    """Render jobs, first the reference's, in batches of one role."""
    policy = Policy.load(
        config.model,
        device=config.device,
        dtype=getattr(torch, config.dtype),
        lora=config.lora,
        lora_scale=config.lora_scale,
    )
    with tqdm(total=len(jobs), unit="video") as progress:
        for role in get_args(Role):
            own = [job for job in jobs if job.role == role]
            with policy.as_reference() if role == "reference" else nullcontext():
                for num in make(policy, own, manifest, batch_size=config.batch_size):
                    progress.update(num)


def write_previews(config: SampleConfig, jobs: Sequence[Job]) -> None:
    """Write the animations that are not there yet."""
    for job in jobs:
        path = (config.out / job.file).with_suffix(f".{config.preview}")
        if not path.exists():
            video.write_preview(path, video.read(config.out / job.file))


def draw_sheet(config: SampleConfig, jobs: Sequence[Job]) -> None:
    """Draw the first videos of a run as rows of frames."""
    shown = jobs[:MAX_SHEET_ROWS]
    videos: list[Video] = [video.read(config.out / job.file) for job in shown]
    captions = [f"{job.role}\n{job.prompt}" if config.compare else job.prompt for job in shown]
    with replacing(config.out / "contact_sheet.png") as new:
        video.contact_sheet(videos, captions).save(new, format="PNG")


if __name__ == "__main__":
    main()
