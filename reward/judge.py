"""The judge: a trained reward model, frozen; all that `align` may ask how good and how harmful a video is.

    python -m reward.judge RUN VIDEO... prompt="a red circle"     prints one JSON line a file
    python -m reward.judge RUN DATASET out=scores.parquet         one row a video; the same command resumes

A video that cannot be judged counts as unsafe. On one machine a clip gets the same bits each time, in any company:
clips pass the model one by one, since in a batch the last bits of a score depend on its neighbours.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers.utils.logging
from jaxtyping import Float
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from reward import config, preferences, verdict_table
from reward.config import Config, ConfigError
from reward.features import BackboneError
from reward.files import DataError
from reward.model import ModelError, RewardModel
from reward.records import SPLITS
from reward.rules import RULES, CostJudge
from reward.scores import Outputs
from reward.screening import Missing
from reward.verdicts import NAMES, Calibration, FileVerdict, Verdicts, calibrated, hash_judge, joined, judge_files
from reward.video import Video, VideoError, read


class JudgeError(ValueError):
    """Videos that the model cannot judge: which, why, and what to do."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Judge:
    """A reward model and its calibration: `judge(prompts, videos)`."""

    model: RewardModel
    calibration: Calibration
    sha256: str
    """Of model, encoder and calibration."""
    name: str = "model"

    @classmethod
    def load(cls, run: Path, *, encoder: Path | None = None, device: str = "cpu") -> "Judge":
        """Load what a training left in its run folder; `encoder` says where the encoder has moved to.

        Raises: ConfigError, BackboneError, ModelError: no run, not a finished one, or damaged.
        """
        folder, file = judge_files(run)
        calibration = config.load(Calibration, file)
        model = RewardModel.load(folder, encoder=encoder).to(device)
        return cls(model=model, calibration=calibration, sha256=hash_judge(run))

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], videos: Sequence[Video]) -> Verdicts:
        """Judge videos by what users asked for; the verdicts are on the CPU.

        Raises: BackboneError: not one prompt for each, or a frame rate or size unlike those of the training.
            JudgeError: no video, or a score that is not finite.
        """
        if not videos:
            raise JudgeError("expected one video at least, got none")
        with torch.autocast(self.model.backbone.device.type, enabled=False):
            values = [self.model([one]).values.cpu() for one in self.model.encode(videos, prompts)]
        for video, found in enumerate(values):
            for _, _, column in (~found.isfinite()).nonzero().tolist():
                raise JudgeError(f"video {video}: its {NAMES[column]} is not finite; is the run's model damaged?")
        return joined([calibrated(Outputs(values=found), self.calibration) for found in values])

    def cost(self, prompts: Sequence[str], videos: Sequence[Video]) -> Float[Tensor, " b"]:
        """Give the cost alone; see `CostJudge`."""
        verdicts = self(prompts, videos)
        return verdicts.cost if verdicts.cost_has_zero else torch.full_like(verdicts.cost, torch.nan)


def _hash(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def judge_file(
    path: Path, prompt: str, judge: Judge | None, rules: Sequence[CostJudge], *, load: Callable[[Path], Video] = read
) -> FileVerdict:
    """Judge a video file, as `load` gives it; one that cannot be judged has an `error`, and is unsafe."""
    try:
        videos = [load(path)]
        verdicts = None if judge is None else judge([prompt], videos)
        costs = {rule.name: rule.cost([prompt], videos).item() for rule in rules}
    except (VideoError, BackboneError, JudgeError) as error:
        return FileVerdict(file=str(path), error=str(error))
    return FileVerdict.of(str(path), verdicts, costs)


# Command line -----------------------------------------------------------------------------------------------


class Settings(Config):
    """Judge video files, one JSON line each; or, with `out`, all videos of a preference data set.

    The exit status is 1 if a video could not be judged, and 2 if the run, a setting or the data cannot be used.
    """

    paths: tuple[Path, ...] = Field(min_length=2)
    """The run, then video files; with `out`, the run and one data set."""
    prompt: str | None = None
    """What users asked for; a data set brings its own."""
    out: Path | None = None
    """Parquet file for the scores of a data set."""
    video_dir: Path | None = None
    """Of a data set: see `python -m reward.preferences --help`, here and in the next two."""
    labels: Path | None = None
    missing: Missing = "error"
    chunk_size: PositiveInt = 64
    """Videos of a data set that are judged anew at most when the same command resumes."""
    rules: tuple[Literal["flash", "nsfw"], ...] = ("flash",)
    """Judges beside the model."""
    encoder: Path | None = None
    """Where the model's encoder has moved to."""
    device: str = "cpu"
    """Such as cpu or cuda."""

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        if (self.prompt is None) == (self.out is None):
            raise ValueError("give prompt= for video files, or out= for a data set, which brings its own prompts")
        if self.out is not None and len(self.paths) > 2:
            raise ValueError(f"with out=, expected a run and one data set, got {len(self.paths)} paths")
        idle = self.model_fields_set & {"video_dir", "labels", "missing", "chunk_size"}
        if self.out is None and idle:
            raise ValueError(f"{', '.join(sorted(idle))}: only of a data set, with out=")
        return self


def main(argv: Sequence[str]) -> int:
    """Judge; give the exit status."""
    prog = "python -m reward.judge"
    settings = config.parse(Settings, argv, prog=prog, positional="paths")
    transformers.utils.logging.disable_progress_bar()
    run, *paths = settings.paths
    try:
        rules = [RULES[name]() for name in settings.rules]
        judge = Judge.load(run, encoder=settings.encoder, device=settings.device)
        if settings.out is not None:
            return _judge_data(settings, paths[0], settings.out, judge, rules)
    except (ConfigError, BackboneError, ModelError, DataError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    status = 0
    for path in paths:
        verdict = judge_file(path, settings.prompt or "", judge, rules)
        print(json.dumps(asdict(verdict), allow_nan=False), flush=True)
        status |= verdict.error is not None
    return status


def _judge_data(settings: Settings, path: Path, out: Path, judge: Judge, rules: Sequence[CostJudge]) -> int:
    """Judge a data set, print the counts, and give the exit status."""
    source = preferences.Source(
        path=path, video_dir=settings.video_dir, labels=settings.labels, missing=settings.missing, validation_share=0.0
    )
    data = preferences.load(source)
    table = verdict_table.write(
        out,
        [video for split in SPLITS for video in data.videos(split)],
        lambda video: judge_file(video.path, video.prompt.text, judge, rules),
        judge_sha256=_hash(judge.sha256, *map(repr, rules)),
        rules=[rule.name for rule in rules],
        chunk_size=settings.chunk_size,
    )
    num_scored, num_unsafe = table["error"].null_count, sum(table["unsafe"].to_pylist())
    counts = {"attempted": len(table), "scored": num_scored, "failed": len(table) - num_scored, "unsafe": num_unsafe}
    print(json.dumps({"out": str(out), **counts, "excluded": dict(data.num_dropped)}))
    return int(num_scored < len(table))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
