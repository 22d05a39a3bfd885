"""Videos that are to be made, and `manifest.jsonl`, which says of each that is there how it was made.

The same jobs go on where they stopped; other settings in the same folder are refused.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from align.folder import PolicyError, find_lora, fingerprint, read_geometry
from align.policy import Policy, require_lora
from align.sample import Sampler, render
from reward import video
from reward.files import DataError, replacing


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all videos of one role in a folder share."""

    model_sha256: str
    lora_sha256: str | None
    lora_scale: float | None
    dtype: str
    sampler: Sampler
    certificate: str | None = None
    """Id of the one that is about videos which are made so."""

    @classmethod
    def of(cls, model: Path, sampler: Sampler, *, dtype: str) -> "Setup":
        """Describe a model without a LoRA; of `sampler`, a program's settings, only its own part counts."""
        return cls(
            model_sha256=fingerprint(model),
            lora_sha256=None,
            lora_scale=None,
            dtype=dtype,
            sampler=Sampler(**sampler.model_dump(include=set(Sampler.model_fields))),
        )

    def with_lora(self, lora: Path, scale: float) -> "Setup":
        """Describe the same with a LoRA.

        Raises: PolicyError: the LoRA cannot be read.
        """
        return replace(self, lora_sha256=fingerprint(find_lora(lora)), lora_scale=scale)

    def line(self) -> dict[str, Any]:
        """Give its part of a line of the manifest."""
        own = {key: value for key, value in vars(self).items() if key != "sampler"}
        return own | self.sampler.model_dump(mode="json")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A video to make, and everything that decides its pixels."""

    file: str
    """Path inside the output folder."""
    role: str
    """Who makes it: `policy`, `reference`, or the name of a system."""
    prompt: str
    index: int
    """Which one of its prompt's videos."""
    seed: int
    setup: Setup

    def line(self) -> dict[str, Any]:
        """Give its line of the manifest, but for the file's hash."""
        own = {key: value for key, value in vars(self).items() if key != "setup"}
        return own | self.setup.line()


def slug(prompt: str) -> str:
    """Give the first words of a prompt as part of a file's name, of the letters a-z, digits and '-' only."""
    words = "-".join(re.findall(r"[a-z0-9]+", prompt.lower())[:6])
    return f"{words[:60]}-" if words else ""


class Manifest:
    """The lines of `manifest.jsonl`: what each video file is, and its hash.

    Raises: DataError: the lines cannot be read, or speak of other settings than the jobs.
    """

    def __init__(self, out: Path, jobs: Iterable[Job]):
        if out.exists() and not out.is_dir():
            raise DataError(f"{out}: is a file; name a folder with out=")
        self.out = out
        self.path = out / "manifest.jsonl"
        self.lines = self._read() if self.path.exists() else {}
        self._require_same_settings(jobs)

    def has(self, job: Job) -> bool:
        """Whether the job's file is there, as it was written."""
        path = self.out / job.file
        return job.file in self.lines and path.is_file() and fingerprint(path) == self.sha256(job)

    def sha256(self, job: Job) -> str:
        """Give the hash of a finished job's file."""
        return self.lines[job.file]["sha256"]

    def add(self, jobs: Iterable[Job]) -> None:
        """Write down finished jobs."""
        for job in jobs:
            self.lines[job.file] = job.line() | {"sha256": fingerprint(self.out / job.file)}
        with replacing(self.path) as new, new.open("w", encoding="utf-8") as file:
            for _, line in sorted(self.lines.items()):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            texts = self.path.read_text(encoding="utf-8").split("\n")
            lines = [json.loads(text) for text in texts if text]
            return {line["file"]: line for line in lines if line["sha256"]}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path}: cannot be read ({error}); name another folder with out=") from error

    def _require_same_settings(self, jobs: Iterable[Job]) -> None:
        """Compare a line with its own job in all it says, or with the jobs of its role in their settings."""
        wanted = list(jobs)
        of_file = {job.file: job.line() for job in wanted}
        of_role = {job.role: job.setup.line() for job in wanted}
        for file, line in self.lines.items():
            for key, value in (of_file.get(file) or of_role.get(line.get("role"), {})).items():
                if line.get(key) != value:
                    raise DataError(
                        f"{self.path}: {file} was made with {key}={line.get(key)}, now it is {value}; "
                        "name another folder with out="
                    )


# Making videos ----------------------------------------------------------------------------------------------


def require_usable(model: Path, sampler: Sampler, loras: Iterable[Path], device: str) -> None:
    """Check that a model makes videos of this size with these LoRAs on this machine, without loading a weight.

    Raises: PolicyError: it does not.
    """
    require_device(device)
    read_geometry(model).latent_shape(sampler.num_frames, sampler.height, sampler.width)
    for lora in loras:
        require_lora(model, lora)


def require_device(device: str) -> None:
    """Check that this machine has a device.

    Raises: PolicyError: it has not, or the name is none.
    """
    if re.fullmatch(r"cpu|cuda(:\d+)?", device) is None:
        raise PolicyError(f"device={device}: expected cpu, cuda or cuda:N")
    if device != "cpu" and not torch.cuda.is_available():
        raise PolicyError(f"device={device}: this machine has no usable CUDA device; set device=cpu")


def make(policy: Policy, jobs: Sequence[Job], manifest: Manifest, *, batch_size: int) -> Iterator[int]:
    """Render jobs of one setup in batches, each safe on disk before the next begins; yield the size of each."""
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        sampler = batch[0].setup.sampler
        videos = render(policy, [job.prompt for job in batch], [job.seed for job in batch], sampler)
        for job, made in zip(batch, videos, strict=True):
            path = manifest.out / job.file
            path.parent.mkdir(parents=True, exist_ok=True)
            known = {key: str(value) for key, value in job.line().items() if value not in (None, "")}
            video.write(path, made, metadata=known)
        manifest.add(batch)
        yield len(batch)
