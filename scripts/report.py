"""Make one page of an alignment and all that is known of it: `python scripts/report.py RUN [key=value ...]`.

    RUN/report/index.html    opens from disk, asks nothing of the network, and needs no file beside it

It shows the evaluation (`scripts/evaluate.py`), its certificates (`python -m align.certify`), clips side by side, how
the run went, and how good its judge is (`python -m reward.evaluate`). What was not made yet is named on the page, with
the command that makes it. Certificates are verified anew, which reads the files that they name: run it where they were
made. The clips that flash are found by measuring them as the page plays them, and do not play by themselves.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from pydantic import DirectoryPath, FilePath, PositiveFloat

from align import comparison, exhibits, findings, history, sections
from align.findings import Evaluated, Finding, Proof
from align.folder import LORA_FILE, fingerprint
from align.history import History
from align.manifest import Manifest
from align.sections import Note, Section
from reward.config import Config, ConfigError, parse
from reward.files import DataError, read_json, replacing
from reward.measures import Evaluation
from reward.video import VideoError

TEMPLATE = Path(__file__).with_name("report.html.j2")


class ReportConfig(Config):
    """Make one page of an alignment run."""

    run: DirectoryPath
    """Folder of an alignment."""
    evaluation: DirectoryPath | None = None
    """Folder of its evaluation; null: RUN/evaluation."""
    certificates: tuple[FilePath, ...] | None = None
    """null: every certificate*.json in the evaluation and in the run."""
    reward: DirectoryPath | None = None
    """Run of the reward model; null: the judge of the run's settings."""
    out: Path | None = None
    """null: RUN/report/index.html."""
    max_megabytes: PositiveFloat = 8.0
    """The most that clips may take; those beyond are left out, evenly, and counted."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """All that the template shows."""

    title: str
    about: Sequence[str]
    """What holds for all systems."""
    warnings: Sequence[str]
    comparison: Sequence[str]
    """What each system gives beside the one that a comparison is about."""
    findings: Sequence[Finding]
    """The system that the page is about first."""
    sections: Sequence[Section]


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of a run."""

    told: History
    evaluated: Evaluated | None
    proofs: tuple[Proof, ...]

    @property
    def limits(self) -> dict[str, float]:
        """Shares of unsafe prompts or videos that may not be exceeded, harm by harm apart.

        Where several certificates have the same, it is called after the first of them.
        """
        trained = {
            f"limit of training, {limit.name}": limit.bound
            for limit in self.told.config.constraint.limits
            if limit.kind == "unsafe_rate" and limit.tag is None
        }
        limits = {
            limit["limit"]: proof.path.stem
            for proof in reversed(self.proofs)
            for limit in proof.certificate.plan["limits"]
            if limit["tag"] is None
        }
        return trained | {f"limit of {first}": limit for limit, first in limits.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program; an error of the user's ends it with status 2."""
    prog = "python scripts/report.py"
    config = parse(ReportConfig, sys.argv[1:] if argv is None else argv, prog=prog, positional="run")
    try:
        report(config)
    except (ConfigError, DataError, VideoError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def report(config: ReportConfig) -> None:
    """Make the page, and print what matters most.

    Raises: ConfigError, DataError, VideoError: a file of the run, or of what was made from it, cannot be read.
    """
    page = make_page(config)
    out = config.out or config.run / "report" / "index.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as new:
        new.write_text(to_html(page), encoding="utf-8")
    for line in [*page.warnings, *in_three_lines(page), *page.comparison]:
        print(line)
    print(out)


def in_three_lines(page: Page) -> list[str]:
    """Give what matters most of the first system: safety, helpfulness, and what is proven."""
    if not page.findings:
        return []
    first = page.findings[0]
    return [first.safety, first.helpfulness, " ".join(f"{each.standing}: {each.words}" for each in first.claims)]


# What is shown ----------------------------------------------------------------------------------------------


def make_page(config: ReportConfig) -> Page:
    """Read everything, and put it in order.

    Raises: ConfigError, DataError, VideoError: a file cannot be read.
    """
    known = read(config)
    evaluated, judge = known.evaluated, config.reward or known.told.config.judge
    reviewed = judge / "evaluation.json"
    trust = (
        sections.reward_model(read_json(Evaluation, reviewed), judge)
        if reviewed.is_file()
        else _missing("reward", "Reward model", f"{reviewed} was not made: run python -m reward.evaluate {judge}")
    )
    ending = [sections.training(known.told), sections.over_optimisation(known.told), trust]
    if evaluated is None:
        folder = config.evaluation or config.run / "evaluation"
        command = f"python scripts/evaluate.py FILE.yaml out={folder}"
        absent = f"{folder / 'summary.json'} was not made, so that nothing is known of the policy: run {command}"
        return Page(
            title=config.run.name,
            about=[sections.in_short(known.told)],
            warnings=[absent],
            comparison=[],
            findings=[],
            sections=[_missing("clips", "Evaluation", absent), *ending, sections.provenance(known.told, None)],
        )
    systems, warnings = order(evaluated, known.told)
    gallery = exhibits.gather(evaluated, systems[-1] if len(systems) == 1 else systems[1], 1e6 * config.max_megabytes)
    certify = f"python -m align.certify table FILE.yaml out={evaluated.folder / 'certificate.json'}"
    return Page(
        title=config.run.name if evaluated.summary.focus is None else evaluated.folder.name,
        about=[sections.in_short(known.told), findings.basis(evaluated)],
        warnings=warnings,
        comparison=comparison.sentences(evaluated, known.proofs),
        findings=[findings.find(evaluated, known.proofs, name) for name in systems[1:]],
        sections=[
            sections.systems(known.proofs, evaluated),
            sections.certificates(known.proofs, certify),
            sections.clips(gallery, systems, config.max_megabytes),
            sections.numbers(evaluated, known.limits),
            *ending,
            sections.counts(evaluated),
            sections.provenance(known.told, evaluated),
        ],
    )


def read(config: ReportConfig) -> Known:
    """Read the run, its evaluation and its certificates.

    Raises: ConfigError, DataError: one of them cannot be read.
    """
    told = history.read(config.run)
    folder = config.evaluation or config.run / "evaluation"
    if not (folder / "summary.json").is_file():
        if config.certificates:
            raise DataError(f"certificates={config.certificates[0]}: needs the evaluation, but {folder} holds none")
        return Known(told=told, evaluated=None, proofs=())
    found = [path for place in (folder, config.run) for path in sorted(place.glob("certificate*.json"))]
    paths = found if config.certificates is None else config.certificates
    proofs = tuple(Proof.read(path, folder / "table.parquet") for path in paths)
    return Known(told=told, evaluated=Evaluated.read(folder), proofs=proofs)


def order(evaluated: Evaluated, told: History) -> tuple[list[str], list[str]]:
    """Give the systems, first the reference, then those that use the run's LoRA; and warn where none does."""
    reference, lora = evaluated.summary.reference, told.folder / "lora" / LORA_FILE
    own = fingerprint(lora) if lora.is_file() else None
    loras = {line["role"]: line["lora_sha256"] for line in Manifest(evaluated.folder, ()).lines.values()}
    names = [name for name in evaluated.summary.systems if name != reference]
    ours = [name for name in names if own is not None and loras.get(name) == own]
    if not names:
        warnings = [f"Only {reference} was evaluated, so that nothing is compared."]
    elif ours:
        warnings = []
    elif own is None:
        warnings = [f"{lora} does not exist yet: what was evaluated is not what this run will make."]
    else:
        warnings = [f"No system of {evaluated.folder} uses {lora} as it is now: evaluate it, for these are others."]
    return [reference, *ours, *(name for name in names if name not in ours)], warnings


def _missing(id_: str, title: str, text: str) -> Section:
    return Section(id=id_, title=title, blocks=[Note(text=text)])


# HTML -------------------------------------------------------------------------------------------------------


def to_html(page: Page) -> str:
    """Write the page; whatever comes from data is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(page=page)


if __name__ == "__main__":
    main()
