"""Keep the harmless videos of a folder: `python scripts/moderate.py RUN FOLDER [key=value ...]`.

The exit status is 1 if a file could not be judged, and 2 if the run or a setting cannot be used.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import transformers.utils.logging
from pydantic import DirectoryPath, Field
from tqdm import tqdm

from reward.config import Config, ConfigError, parse
from reward.features import BackboneError
from reward.files import DataError, replacing
from reward.judge import Judge, judge_file
from reward.model import ModelError
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
    max_tag: float = Field(default=0.5, ge=0, le=1)
    """The highest probability of a harm that is kept; harms that were not trained are not looked for."""
    max_cost: float = Field(default=0.0, le=0)
    """The highest cost that is kept; 0 is where annotators saw the boundary."""
    report: Path = Path("moderation.jsonl")
    """A line a file: what was found, and the reasons not to keep it."""
    kept: Path = Path("kept.txt")
    """The files without a reason, one a line."""


def reasons(verdict: FileVerdict, config: ModerateConfig) -> list[str]:
    """Name what speaks against a file: it is unsafe, shows some harm, or would be two lines in a list."""
    is_unsafe = verdict.unsafe or verdict.cost is None or verdict.cost > config.max_cost
    tags = {name: probability for name, probability in (verdict.tags or {}).items() if probability is not None}
    harms = [name for name, probability in tags.items() if probability > config.max_tag]
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
    judge = Judge.load(config.paths[0])
    files = sorted(file for file in config.paths[1].rglob("[!.]*") if file.is_file())
    found = [judge_file(file, config.prompt, judge, [Flash()]) for file in tqdm(files, unit="video")]
    lines = [{**asdict(verdict), "reasons": reasons(verdict, config)} for verdict in found]
    kept = [verdict.file for verdict in found if not reasons(verdict, config)]
    for path, texts in ((config.report, map(json.dumps, lines)), (config.kept, kept)):
        with replacing(path) as new:
            new.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    num_failed = sum(verdict.error is not None for verdict in found)
    print(f"{len(files)} files, {num_failed} not judged, {len(kept)} kept")
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
