"""The honest evaluation of a trained reward model: `python -m reward.evaluate RUN [key=value ...]`.

Thresholds are chosen on the validation split, everything else is measured on the test split, which the training never
read. Beside each accuracy stands what it has to beat: chance, a rule that knows only the generators, and the ceiling
that noisy labels leave. Probes show what the scores rest on.

    RUN/evaluation.md          for people
    RUN/evaluation.json        a `reward.measures.Evaluation`; what could not be measured is {"not_measured": why}
    RUN/evaluation/*.png       accuracy, reliability, probes
    RUN/evaluation/*.parquet   the verdicts; the same command goes on from there. Remove them to judge the files anew

    evaluation.json: run, judge_sha256, test_data, settings, num_rows_read, excluded.REASON, failures.FILE
      counts.{validation,test}_{videos,pairs}.{attempted,scored,failed,excluded}
      ranking.DIMENSION.{accuracy,unanimous,within_generator}.{strict,tie_aware,ties_dropped,ties_halved}.ESTIMATE
      ranking.DIMENSION.{generator_only.ESTIMATE,ceiling,gap_points}
      ranking.DIMENSION.outcomes.{theta,tie_threshold,{accuracy,log_likelihood}.ESTIMATE}, or null (`ties: soft`)
      harm.{cost,TAG}.{num,num_positive,auroc.ESTIMATE}
      harm.{cost,TAG}.{natural,high_recall}.{threshold,true_positives,...,{recall,false_positive_rate,accuracy}.ESTIMATE}
      label_agreement.ESTIMATE: Cohen's kappa of `is_safe` and "any tag"
      calibration.{helpfulness,cost,TAG}.{ece,noise_floor,brier,bins}
      probes.PROBE.{counts,shifts.SCORE.{shift,size,accuracy_before,accuracy}.ESTIMATE}
      gold.{counts,margin,{accuracy,accuracy_above_margin}.DIMENSION.ESTIMATE,harm.{cost,TAG}}, or null

An ESTIMATE is {value, low, high, n} with a 95 % interval over prompts.
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import transformers.utils.logging
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from reward import page, plots, preferences, screening, verdict_table
from reward.config import Config, ConfigError, load, parse
from reward.features import BackboneError
from reward.files import DataError, replacing
from reward.held_out import HeldOut, count_pairs, count_videos, videos_in
from reward.judge import Judge, judge_file
from reward.measures import (
    Evaluation,
    ProbeResult,
    Rows,
    Splits,
    against_gold,
    attempt,
    calibrations,
    harms,
    label_agreement,
    rankings,
    shift_of,
)
from reward.model import ModelError
from reward.preferences import Source
from reward.probes import PROBED, PROBES, ProbeName, altered, asked
from reward.records import Pair, VideoSample
from reward.run import seed_for
from reward.settings import RewardConfig, Tag
from reward.truth import Gold, read_ceilings, read_gold
from reward.verdicts import FileVerdict
from reward.video import Video, read

PROG = "python -m reward.evaluate"
_CHUNK_SIZE = 64
"""Videos that are judged anew at most when the same command resumes."""


class Settings(Config):
    """Evaluate a trained reward model on pairs that it has never seen."""

    run: Path
    """The folder of a finished training; its config.yaml names the data."""
    test: Source | None = None
    """Other data to test on: its test split, or all of it if it has none. Prompts of the training are left out."""
    ceilings: Path | None = None
    """JSON with the best accuracies that noisy labels leave: best_accuracy.test.DIMENSION."""
    gold: Path | None = None
    """JSON lines with exact measures: video_id, numbers named like dimensions, true or false for hazards."""
    gold_tags: dict[Tag, str] = Field(default_factory=dict)
    """Which hazard of gold a tag is about, as in {other_harmful: flash}."""
    gold_margin: NonNegativeFloat = 0.05
    """Pairs that differ by more than this are also measured apart."""
    recall: float = Field(default=0.95, gt=0, le=1)
    """Wanted of the threshold that is chosen on the validation split."""
    num_probed: int = Field(default=200, ge=2)
    """The most test prompts whose videos are probed: four more passes of the model a video."""
    num_shuffled: int = Field(default=1_000, ge=2)
    """The same of the probe that asks for other prompts, one pass a video: it takes many pairs to tell from chance."""
    blur: PositiveFloat = 0.02
    """Standard deviation of the blur probe, as a share of a frame's shorter side."""
    seed: int = Field(default=0, ge=0)
    """Of the probes."""
    encoder: Path | None = None
    """Where the model's encoder has moved to."""
    device: str = "cpu"
    """Such as cpu or cuda."""

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        idle = self.model_fields_set & {"gold_tags", "gold_margin"}
        if self.gold is None and idle:
            raise ValueError(f"{', '.join(sorted(idle))}: only with gold=")
        return self


# The data ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Wanted:
    """The pairs that an evaluation is about."""

    train: tuple[Pair, ...]
    """Not to be scored: only what is known of the generators is taken from here."""
    validation: tuple[Pair, ...]
    test: tuple[Pair, ...]
    num_seen: int = 0
    """Pairs of other data that were left out, because the training saw their prompt."""
    data: Mapping[str, Rows]


def wanted_pairs(settings: Settings, source: Source) -> Wanted:
    """Read the run's data, and the other data to test on, if there is any.

    Raises: DataError: they cannot be read, or there is no pair to test on.
    """
    own = preferences.load(source)
    train, validation = own.pairs("train"), own.pairs("validation")
    data = {str(source.path): Rows(read=own.num_read, excluded=own.num_dropped)}
    if settings.test is None:
        if not own.pairs("test"):
            raise DataError(f"{source.path}: has no test split; name other data to test on, as in test.path=FILE")
        return Wanted(train=train, validation=validation, test=own.pairs("test"), data=data)
    other = preferences.load(settings.test)
    found = other.pairs("test") or (*other.pairs("train"), *other.pairs("validation"))
    seen = {screening.plain(pair.prompt.text) for pair in (*train, *validation)}
    unseen = tuple(pair for pair in found if screening.plain(pair.prompt.text) not in seen)
    if not unseen:
        raise DataError(f"test.path={settings.test.path}: none of its {len(found)} pairs has a prompt new to the model")
    data[str(settings.test.path)] = Rows(read=other.num_read, excluded=other.num_dropped)
    num_seen = len(found) - len(unseen)
    return Wanted(train=train, validation=validation, test=unseen, num_seen=num_seen, data=data)


# Judging ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """A judge, and the folder that keeps its verdicts."""

    settings: Settings
    judge: Judge

    @property
    def folder(self) -> Path:
        """Where verdicts and plots are kept."""
        return self.settings.run / "evaluation"

    def judged(self, name: str, pairs: Sequence[Pair], probe: ProbeName | None = None) -> pa.Table:
        """Judge the videos of pairs, as they are or changed by a probe.

        Raises: ValueError: there is only one prompt, so that prompts cannot be shuffled.
        """
        settings, videos = self.settings, videos_in(pairs)
        texts = [video.prompt.text for video in videos]
        ask = asked(probe, texts, settings.seed) if probe else dict(zip(texts, texts, strict=True))
        job = [self.judge.sha256, probe, settings.seed, settings.blur] if probe else [self.judge.sha256]
        key = hashlib.sha256(json.dumps([job, [video.video_id for video in videos]]).encode()).hexdigest()

        def judge_one(sample: VideoSample) -> FileVerdict:
            load = partial(self._load, sample.video_id, probe)
            return judge_file(sample.path, ask[sample.prompt.text], self.judge, [], load=load)

        self.folder.mkdir(exist_ok=True)
        out = self.folder / f"{name}-{key[:8]}.parquet"
        return verdict_table.write(out, videos, judge_one, judge_sha256=key, rules=[], chunk_size=_CHUNK_SIZE)

    def _load(self, video_id: str, probe: ProbeName | None, path: Path) -> Video:
        if probe is None:
            return read(path)
        seed = seed_for(self.settings.seed, 0, 0, f"probe of {video_id}")
        return altered(probe, read(path), seed=seed, blur=self.settings.blur)

    def probe(self, name: ProbeName, test: HeldOut) -> ProbeResult:
        """Probe the judge on some of the test prompts, at least two."""
        texts = sorted({pair.prompt.text for pair in test.pairs})
        draw = np.random.default_rng(seed_for(self.settings.seed, 0, 0, "probed prompts"))
        number = self.settings.num_shuffled if name == "prompt_shuffle" else self.settings.num_probed
        chosen = set(draw.permutation(texts)[:number].tolist())
        pairs = [pair for pair in test.pairs if pair.prompt.text in chosen]
        videos, probed = videos_in(pairs), HeldOut.of(pairs, self.judged(name, pairs, name))
        trained = self.judge.calibration.trained
        return ProbeResult(
            counts=count_videos(videos, probed, excluded=len(test.videos) - len(videos)),
            shifts={score: shift_of(score, test, probed) for score in PROBED if score in trained},
        )


# Measuring --------------------------------------------------------------------------------------------------


def read_truth(settings: Settings) -> Gold | None:
    """Read gold, if the settings name it.

    Raises: DataError: it cannot be used. ConfigError: it does not know a hazard that a tag should stand for.
    """
    if settings.gold is None:
        return None
    gold = read_gold(settings.gold)
    for tag, hazard in settings.gold_tags.items():
        if hazard not in gold.hazard_names:
            known = ", ".join(gold.hazard_names) or "none"
            raise ConfigError(f"gold_tags.{tag}={hazard}: no such hazard in {settings.gold}; it knows {known}")
    return gold


def evaluate(settings: Settings) -> Evaluation:
    """Judge what is not judged yet, and measure.

    Raises: BackboneError, ConfigError, DataError, ModelError: the run, a setting or the data cannot be used, or hardly
        a video could be judged.
    """
    config, gold = load(RewardConfig, settings.run / "config.yaml"), read_truth(settings)
    ceilings = read_ceilings(settings.ceilings) if settings.ceilings else {}
    wanted = wanted_pairs(settings, config.data)
    bench = Bench(settings=settings, judge=Judge.load(settings.run, encoder=settings.encoder, device=settings.device))
    tables = [bench.judged("validation", wanted.validation), bench.judged("test", wanted.test)]
    validation, test = (HeldOut.of(*each) for each in zip((wanted.validation, wanted.test), tables, strict=True))
    failures = {row["file"]: row["error"] for table in tables for row in table.to_pylist() if row["error"]}
    if len({pair.prompt.text for pair in test.pairs}) < 2:
        raise DataError(
            f"expected test pairs of at least two prompts, got {len(wanted.test)} pairs, of which {len(test.pairs)} "
            f"could be judged; first failure: {next(iter(failures.values()), 'none')}"
        )
    splits = Splits(train=wanted.train, validation=validation, test=test, scales=bench.judge.calibration)
    return Evaluation(
        run=str(settings.run),
        judge_sha256=bench.judge.sha256,
        settings=settings.model_dump(mode="json"),
        data=wanted.data,
        counts={
            "validation_videos": count_videos(videos_in(wanted.validation), validation),
            "validation_pairs": count_pairs(wanted.validation, validation),
            "test_videos": count_videos(videos_in(wanted.test), test),
            "test_pairs": count_pairs(wanted.test, test, excluded=wanted.num_seen),
        },
        failures=failures,
        ranking=rankings(splits, ceilings),
        harm=harms(splits, settings.recall),
        label_agreement=attempt(label_agreement, test),
        calibration=calibrations(splits),
        probes={probe.name: bench.probe(probe.name, test) for probe in PROBES},
        gold=against_gold(splits, gold, settings.gold_tags, settings.gold_margin, settings.recall) if gold else None,
    )


# Program ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Evaluate, and write what was found; returns the exit status."""
    settings = parse(Settings, argv, prog=PROG, positional="run")
    transformers.utils.logging.disable_progress_bar()
    try:
        found = evaluate(settings)
    except (BackboneError, ConfigError, DataError, ModelError) as error:
        sys.exit(str(error))
    write(found, settings.run)
    print(json.dumps({"out": str(settings.run / "evaluation.md")} | {k: asdict(v) for k, v in found.counts.items()}))
    return 0


def write(found: Evaluation, run: Path) -> None:
    """Write an evaluation into its run: numbers, plots, and a page for people."""
    plots.draw(found, run / "evaluation")
    text = json.dumps(asdict(found), indent=2, allow_nan=False) + "\n"
    for name, content in (("evaluation.json", text), ("evaluation.md", page.to_markdown(found))):
        with replacing(run / name) as new:
            new.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
