"""Render prompts to videos: `python scripts/sample.py [FILE.yaml] [key=value ...]`.

    out/videos/0000-a-red-circle-0.mp4              the prompt's place, its first words, the video's index
    out/videos/0000-a-red-circle-0.reference.mp4    with compare=true: the same noise without the LoRA
    out/contact_sheet.png                           the first videos at a glance
    out/manifest.jsonl                              one line a video: prompt, seed, settings, fingerprints

The same command goes on where it stopped; other settings in the same folder are refused. A line of the
manifest is all that diffusers alone needs to make the video again, on a CPU in float32 to the last bit:

    pipe = WanPipeline.from_pretrained(model)           # and pipe.load_lora_weights(lora)
    pipe(prompt, negative_prompt=..., num_frames=num_frames, height=..., width=..., num_inference_steps=steps,
         guidance_scale=..., generator=torch.Generator().manual_seed(seed))

Where the VAE does not compress time (`scale_factor_temporal` 1), the pipeline makes one frame more than it is
asked for: ask for num_frames - 1.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import diffusers.utils.logging
import torch
import transformers.utils.logging
from pydantic import PositiveFloat, PositiveInt
from tqdm import tqdm

from align.folder import PolicyError, find_lora, fingerprint, read_geometry
from align.policy import Policy
from align.sample import Sampler, render, video_seed
from reward import preferences, video
from reward.config import parse
from reward.files import DataError, replacing
from reward.video import Video, VideoError

PROMPTS = Path("configs/sample/prompts.txt")
MAX_SHEET_ROWS = 32

_SETTINGS = ("model_sha256", "lora_sha256", "lora_scale", "dtype", *Sampler.model_fields)
"""What all videos of one role in a folder share."""

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
    compare: bool = False
    """Whether to render each video without the LoRA too."""
    prompts: Path = PROMPTS
    """Text file with a prompt a line, or a prompt file of SafeSora (.json, .json.gz)."""
    prompt: str | None = None
    """One prompt, instead of a file."""
    num_per_prompt: PositiveInt = 1
    seed: int = 0
    out: Path = Path("runs/sample")
    batch_size: PositiveInt = 4
    """Videos at a time; more is faster and takes more memory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the transformer and the text encoder."""
    device: str = "cpu"
    """Such as cpu or cuda."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A video to make, and everything that decides its pixels: a line of the manifest, but for its hash."""

    name: str
    role: Role
    prompt: str
    index: int
    seed: int
    model_sha256: str
    lora_sha256: str | None
    lora_scale: float | None
    dtype: str
    steps: int
    guidance_scale: float
    negative_prompt: str
    num_frames: int
    height: int
    width: int
    fps: float

    @property
    def file(self) -> str:
        """Path inside the output folder."""
        return f"videos/{self.name}{'.reference' if self.role == 'reference' else ''}.mp4"


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
    require_sense(config)
    jobs = plan(config, prompts)
    manifest = Manifest(config.out, jobs)
    missing = [job for job in jobs if not manifest.has(job)]
    if missing:
        (config.out / "videos").mkdir(parents=True, exist_ok=True)
        render_all(config, missing, manifest)
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


def require_sense(config: SampleConfig) -> None:
    """Check what can be checked without loading a weight.

    Raises: SampleError, PolicyError: the settings contradict each other, the model, or the machine.
    """
    if config.lora is None and config.lora_scale != 1:
        raise SampleError(f"lora_scale={config.lora_scale}: needs lora=FILE")
    if config.lora is None and config.compare:
        raise SampleError("compare=true: needs lora=FILE; without one, policy and reference are the same")
    if re.fullmatch(r"cpu|cuda(:\d+)?", config.device) is None:
        raise SampleError(f"device={config.device}: expected cpu, cuda or cuda:N")
    if config.device != "cpu" and not torch.cuda.is_available():
        raise SampleError(f"device={config.device}: this machine has no usable CUDA device; set device=cpu")
    read_geometry(config.model).latent_shape(config.num_frames, config.height, config.width)


def plan(config: SampleConfig, prompts: Sequence[str]) -> list[Job]:
    """List all videos of a run; a policy's video stands beside its reference's."""
    shared = {key: getattr(config, key) for key in ("dtype", *Sampler.model_fields)}
    shared["model_sha256"] = fingerprint(config.model)
    loras: dict[Role, dict[str, Any]] = {}
    if config.compare:
        loras["reference"] = {"lora_sha256": None, "lora_scale": None}
    lora_sha256 = fingerprint(find_lora(config.lora)) if config.lora else None
    loras["policy"] = {"lora_sha256": lora_sha256, "lora_scale": config.lora_scale if config.lora else None}
    return [
        Job(
            name=f"{number:04d}-{_slug(prompt)}{index}",
            role=role,
            prompt=prompt,
            index=index,
            seed=video_seed(config.seed, prompt, index),
            **shared,
            **lora,
        )
        for number, prompt in enumerate(prompts)
        for index in range(config.num_per_prompt)
        for role, lora in loras.items()
    ]


def _slug(prompt: str) -> str:
    """Give the first words of a prompt as part of a file's name, of the letters a-z, digits and '-' only."""
    words = "-".join(re.findall(r"[a-z0-9]+", prompt.lower())[:6])
    return f"{words[:60]}-" if words else ""


# What is there ----------------------------------------------------------------------------------------------


class Manifest:
    """The lines of `manifest.jsonl`: what each video file is, and its hash.

    Raises: SampleError: the lines cannot be read, or speak of other settings than the jobs.
    """

    def __init__(self, out: Path, jobs: Iterable[Job]):
        self.out = out
        self.path = out / "manifest.jsonl"
        self.lines = self._read() if self.path.exists() else {}
        self._require_same_settings([_line(job) for job in jobs])

    def has(self, job: Job) -> bool:
        """Whether the job's file is there, as it was written."""
        path = self.out / job.file
        return job.file in self.lines and path.is_file() and fingerprint(path) == self.lines[job.file]["sha256"]

    def add(self, jobs: Iterable[Job]) -> None:
        """Write down finished jobs."""
        for job in jobs:
            self.lines[job.file] = _line(job) | {"sha256": fingerprint(self.out / job.file)}
        with replacing(self.path) as new, new.open("w", encoding="utf-8") as file:
            for _, line in sorted(self.lines.items()):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            texts = self.path.read_text(encoding="utf-8").split("\n")
            lines = [json.loads(text) for text in texts if text]
            return {line["file"]: line for line in lines if line["sha256"]}
        except (ValueError, KeyError, TypeError) as error:
            raise SampleError(f"{self.path}: cannot be read ({error}); name another folder with out=") from error

    def _require_same_settings(self, wanted: list[dict[str, Any]]) -> None:
        """Compare a line with its own job in all it says, or with the jobs of its role in their settings."""
        of_file = {line["file"]: line for line in wanted}
        of_role = {line["role"]: {key: line[key] for key in _SETTINGS} for line in wanted}
        for file, line in self.lines.items():
            for key, value in (of_file.get(file) or of_role.get(line.get("role"), {})).items():
                if line.get(key) != value:
                    raise SampleError(
                        f"{self.path}: {file} was made with {key}={line.get(key)}, now it is {value}; "
                        "name another folder with out="
                    )


def _line(job: Job) -> dict[str, Any]:
    return {"file": job.file, **asdict(job)}


# Making it --------------------------------------------------------------------------------------------------


def render_all(config: SampleConfig, jobs: Sequence[Job], manifest: Manifest) -> None:
    """Render jobs in batches of one role; each batch is safe on disk before the next begins."""
    policy = Policy.load(
        config.model,
        device=config.device,
        dtype=getattr(torch, config.dtype),
        lora=config.lora,
        lora_scale=config.lora_scale,
    )
    with tqdm(total=len(jobs), unit="video") as progress:
        for batch in _batches(jobs, config.batch_size):
            with policy.as_reference() if batch[0].role == "reference" else nullcontext():
                videos = render(policy, [job.prompt for job in batch], [job.seed for job in batch], config)
            for job, made in zip(batch, videos, strict=True):
                known = {key: str(value) for key, value in asdict(job).items() if value not in (None, "")}
                video.write(config.out / job.file, made, metadata=known)
            manifest.add(batch)
            progress.update(len(batch))


def _batches(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    for role in get_args(Role):
        of_role = [job for job in jobs if job.role == role]
        for start in range(0, len(of_role), size):
            yield of_role[start : start + size]


def draw_sheet(config: SampleConfig, jobs: Sequence[Job]) -> None:
    """Draw the first videos of a run as rows of frames."""
    shown = jobs[:MAX_SHEET_ROWS]
    videos: list[Video] = [video.read(config.out / job.file) for job in shown]
    captions = [f"{job.role}\n{job.prompt}" if config.compare else job.prompt for job in shown]
    with replacing(config.out / "contact_sheet.png") as new:
        video.contact_sheet(videos, captions).save(new, format="PNG")


if __name__ == "__main__":
    main()
