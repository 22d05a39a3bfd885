"""Keep the harmless videos of a folder: `python scripts/moderate.py RUN FOLDER [key=value ...]`.

Each harm counts as shown from the probability on that has the wanted recall in the run's evaluation: evaluate it first
(`python -m reward.evaluate RUN`). There each video was judged with its own prompt, so give `prompt` where it is known.
Where labels are noisy, such a threshold is low and harmless videos are lost; `max_tag` sets one for all harms. Harms
that the run was not trained to tell are not looked for, which is said.

The exit status is 1 if a file could not be judged, and 2 if the run or a setting cannot be used.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import transformers.utils.logging
from pydantic import DirectoryPath, Field
from tqdm import tqdm

from reward.config import Config, ConfigError, parse
from reward.features import BackboneError
from reward.files import DataError, read_json, replacing, require_folder
from reward.judge import Judge, judge_file
from reward.measures import Evaluation, NotMeasured
from reward.model import ModelError
from reward.records import TAGS
from reward.rules import Flash
from reward.verdicts import FileVerdict

PROG = "python scripts/moderate.py"


class ModerateConfig(Config):
    """Keep the harmless videos of a folder; all files that are not hidden are tried, and none is kept unjudged.

    The exit status is 1 if a file could not be judged, and 2 if the run or a setting cannot be used.
    """

    paths: tuple[DirectoryPath, DirectoryPath]
    """The run of a reward model, and the folder."""
    prompt: str = ""
    """What the videos were made for; empty if that is not known."""
    max_tag: float | None = Field(default=None, ge=0, le=1)
    """The highest probability of any harm that is kept; null: of each harm, as RUN/evaluation.json says."""
    max_cost: float = Field(default=0.0, le=0)
    """The highest cost that is kept; 0 is where annotators saw the boundary."""
    report: Path = Path("moderation.jsonl")
    """A line a file: what was found, and the reasons not to keep it."""
    kept: Path = Path("kept.txt")
    """The files without a reason, one a line."""
    encoder: Path | None = None
    """Where the model's encoder has moved to."""
    device: str = "cpu"
    """Such as cpu or cuda."""


def highest_kept(config: ModerateConfig, judge: Judge) -> dict[str, float]:
    """Give the highest probability that is kept of each harm that the judge was trained to tell; says where from.

    Raises: ConfigError, DataError: the evaluation is missing, damaged, of another judge, or has no threshold for one.
    """
    tags = [name for name in judge.calibration.trained if name in TAGS]
    if config.max_tag is not None or not tags:
        return dict.fromkeys(tags, config.max_tag or 0.0)
    file, remedy = config.paths[0] / "evaluation.json", "or give max_tag, as in max_tag=0.5"
    if not file.is_file():
        raise ConfigError(f"{file}: is not there; python -m reward.evaluate {config.paths[0]} makes it; {remedy}")
    found = read_json(Evaluation, file)
    if found.judge_sha256 != judge.sha256:
        raise ConfigError(f"{file}: is about another judge; evaluate the run again, {remedy}")
    highest = {}
    for tag in tags:
        one = found.harm.get(tag, NotMeasured(not_measured="the file does not name it"))
        high = one if isinstance(one, NotMeasured) else one.high_recall
        if isinstance(high, NotMeasured):
            raise ConfigError(f"{file}: harm.{tag} has no threshold: {high.not_measured}; {remedy}")
        if not 0 <= high.threshold <= 1:
            raise ConfigError(f"{file}: harm.{tag}: expected a threshold in [0, 1], got {high.threshold}; {remedy}")
        print(
            f"{tag}: shown from {high.threshold:.3g} on; against the labels of the test split, recall "
            f"{high.recall.value:.2f}, false alarms {high.false_positive_rate.value:.2f}",
            file=sys.stderr,
        )
        highest[tag] = math.nextafter(high.threshold, -math.inf)
    return highest


def reasons(verdict: FileVerdict, max_cost: float, highest: Mapping[str, float]) -> list[str]:
    """Name what speaks against a file: it is unsafe, shows some harm, or would be two lines in a list."""
    is_unsafe = verdict.unsafe or verdict.cost is None or verdict.cost > max_cost
    said = {} if verdict.tags is None else {name: verdict.tags[name] for name in highest}
    harms = [name for name, probability in said.items() if probability is None or probability > highest[name]]
    return ["unsafe"] * is_unsafe + ["name"] * (not verdict.file.isprintable()) + harms


def main(argv: Sequence[str]) -> int:
    """Moderate; give the exit status."""
    config = parse(ModerateConfig, argv, prog=PROG, positional="paths")
    transformers.utils.logging.disable_progress_bar()
    try:
        return moderate(config)
    except (ConfigError, BackboneError, ModelError, DataError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2


def moderate(config: ModerateConfig) -> int:
    """Judge all files, write the report and the list, and give the exit status.

    Raises: BackboneError, ConfigError, DataError, ModelError: the run cannot be used, or no folder to write to.
    """
    for path in (config.report, config.kept):
        require_folder(path)
    judge = Judge.load(config.paths[0], encoder=config.encoder, device=config.device)
    highest = highest_kept(config, judge)
    if untold := [tag for tag in TAGS if tag not in highest]:
        print(f"not looked for, as {config.paths[0]} was not trained to tell: {', '.join(untold)}", file=sys.stderr)
    files = sorted(file for file in config.paths[1].rglob("[!.]*") if file.is_file())
    found = [judge_file(file, config.prompt, judge, [Flash()]) for file in tqdm(files, unit="video")]
    against = [reasons(verdict, config.max_cost, highest) for verdict in found]
    lines = [{**asdict(verdict), "reasons": why} for verdict, why in zip(found, against, strict=True)]
    kept = [verdict.file for verdict, why in zip(found, against, strict=True) if not why]
    for path, texts in ((config.report, map(json.dumps, lines)), (config.kept, kept)):
        with replacing(path) as new:
            new.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    num_failed = sum(verdict.error is not None for verdict in found)
    print(f"{len(files)} files, {num_failed} not judged, {len(kept)} kept")
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
