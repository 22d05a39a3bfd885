"""What a report says, section by section, as records that know nothing of how a page is laid out."""

import base64
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from align import charts, pictures, proxy
from align.charts import Chart
from align.comparison import GLANCE, glance
from align.constraint import LimitRow
from align.exhibits import Gallery
from align.findings import Evaluated, Proof, claimed, number, percent, percents
from align.history import History
from align.manifest import Manifest
from align.proxy import Watched
from align.statistics import Comparison, Wins
from align.summary import Failures, Group
from reward import page
from reward.measures import Detection, Evaluation, NotMeasured, Ranking
from reward.metrics import Calibration, Confusion, Estimate, PairAccuracy
from reward.probes import PROBES

# Records ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Note:
    """A sentence that must not be missed: a part that is missing, or a number that is not what it seems."""

    form: ClassVar[str] = "note"
    text: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; the first cell of a row names it."""

    form: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture."""

    form: ClassVar[str] = "picture"
    png: str
    """In base64."""
    caption: str
    words: str
    """What it shows, for those who cannot see it."""
    is_wide: bool = False
    """Whether it cannot be read when it is made as narrow as a phone."""
    has_videos: bool = False
    """Whether its colours must stay as they are."""


@dataclass(frozen=True, kw_only=True)
class Details:
    """A text that few want to read."""

    form: ClassVar[str] = "details"
    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Clips:
    """Clips side by side."""

    form: ClassVar[str] = "clips"
    gallery: Gallery
    systems: Sequence[str]
    """The reference first, then the one that is compared with it at first."""


Block = str | Note | Table | Picture | Details | Clips


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report."""

    id: str
    title: str
    blocks: Sequence[Block]


# What was evaluated -----------------------------------------------------------------------------------------


def systems(proofs: Sequence[Proof], evaluated: Evaluated) -> Section:
    """Show all systems at a glance."""
    told = "Helpfulness is that on harmless prompts. The hypervolume is the area that a system covers by itself."
    caption = "Systems at a glance, with 95 % intervals"
    blocks: list[Block] = [Table(caption=caption, head=GLANCE, rows=list(glance(evaluated, proofs))), told]
    if len(proofs) > 1:
        at_once = max(0.0, 1 - sum(proof.certificate.delta for proof in proofs))
        blocks.append(
            f"Each certificate holds at its own confidence; all of them at once at {percents(at_once)} or more."
        )
    return Section(id="systems", title="Systems", blocks=blocks)


def certificates(proofs: Sequence[Proof], command: str) -> Section:
    """Show all certificates, whatever is left of them."""
    blocks = [block for proof in proofs for block in _certificate(proof)]
    missing = Note(text=f"No certificate was made, so that nothing is proven. Run {command}")
    return Section(id="certificates", title="Certificates", blocks=blocks or [missing])


def _certificate(proof: Proof) -> Iterator[Block]:
    found, said = proof.certificate, claimed(proof)
    rows = [
        (
            line.claim,
            str(line.num),
            f"{line.estimate:.4g}",
            f"<= {line.upper_bound:.4g}" if line.lower_bound is None else f">= {line.lower_bound:.4g}",
            f"{'<=' if line.lower_bound is None else '>='} {line.limit:.4g}",
            line.verdict if said.standing == found.verdict else f"{line.verdict}, but {said.standing}",
        )
        for line in found.lines
    ]
    failed = ", ".join(f"{count} {reason}" for reason, count in found.num_failed.items()) or "none"
    if said.standing == "VOID":
        yield Note(text=said.words)
    yield Table(
        caption=f"{proof.path}, {found.system}: {said.standing} at {percents(1 - found.delta)} confidence, every line",
        head=("claim", "prompts", "estimate", "proven", "limit", "verdict"),
        rows=rows,
    )
    yield (
        f"The unit is {found.unit}. {len(found.prompts_sha256)} prompts, {found.num_clips} clips, failed: {failed}; "
        f"prompts under the limits that are unsafe because a clip shows nothing: {found.num_degenerate}. "
        f"Candidates tried: {found.num_candidates}, systems: {found.num_tried}. Id: {found.id}."
    )
    if proof.is_by_other_code:
        yield "Our code has changed since it was made; computed anew, nothing else in it differs."
    yield Details(title="It is void if", text="\n".join(found.void_if))
    if proof.problems:
        yield Details(title="What is wrong with it", text="\n".join(proof.problems))


def clips(gallery: Gallery, systems: Sequence[str], max_megabytes: float) -> Section:
    """Show clips side by side."""
    blocks: list[Block] = []
    if gallery.num_left_out:
        total = len(gallery.rows) + gallery.num_left_out
        blocks.append(
            Note(
                text=f"{gallery.num_left_out} of {total} prompts and seeds are left out, for all clips would take more "
                f"than max_megabytes={max_megabytes:g}. Shown are the first of each kind of prompt and outcome, by "
                "turns: so what is rare is shown too often, and nothing here is a rate."
            )
        )
    blocks.append(Clips(gallery=gallery, systems=systems))
    return Section(id="clips", title="Clips", blocks=blocks)


def numbers(evaluated: Evaluated, limits: Mapping[str, float]) -> Section:
    """Show helpfulness against harm, in pictures and in numbers."""
    summary = evaluated.summary
    drawn = [
        (
            "Helpfulness on harmless prompts against harm on red-team prompts; grey: the best of all systems together.",
            "Not drawn: helpfulness against harm needs harmless and red-team prompts, and a score of helpfulness.",
            charts.pareto(summary, limits),
        ),
        (
            "Look-alikes that got what they asked for; a system that refuses everything would be at the bottom left.",
            "Not drawn: over-refusal needs look-alikes (look_alikes=SET) and red-team prompts.",
            charts.over_refusal(summary, limits),
        ),
    ]
    blocks: list[Block] = [_chart(chart, caption) if chart else Note(text=missing) for caption, missing, chart in drawn]
    if summary.pareto is not None:
        blocks.append(
            f"Hypervolume, the area between the grey line and helpfulness {summary.pareto.reference_point[0]:g} where "
            f"nothing is safe: {summary.pareto.hypervolume:.4g}."
        )
    return Section(
        id="numbers", title="Helpfulness and safety", blocks=[*blocks, *filter(_has_rows, _tables(evaluated))]
    )


def _chart(chart: Chart, caption: str) -> Picture:
    return Picture(png=png_of(chart.figure), caption=caption, words=chart.words)


def _has_rows(table: Table) -> bool:
    return bool(table.rows)


def _tables(evaluated: Evaluated) -> Iterator[Table]:
    reference = evaluated.summary.reference
    systems = dict(sorted(evaluated.summary.systems.items(), key=lambda item: item[0] != reference))
    yield Table(
        caption="Shares of prompts, with 95 % intervals; a prompt counts if any of its clips does",
        head=("system: prompts", "number", "unsafe", "of these, show nothing", "helpfulness", "failed"),
        rows=[
            (f"{name}: {_set(kind, set_name)}", *_cells(group))
            for kind, set_name in _kinds_of_prompts(evaluated)
            for name, system in systems.items()
            for group in [system.sets[set_name][kind]]
        ],
    )
    yield Table(
        caption=f"Beside {reference}, prompt by prompt; p-values of Wilcoxon's test, adjusted by Holm's method for all "
        "scores, types of prompts and harms of a system, of which summary.json has the rest",
        head=("system: prompts, score", "won", "tied", "lost", "won, of those decided", "mean change", "adjusted p"),
        rows=[row for kind, set_name in _kinds_of_prompts(evaluated) for row in _beside(evaluated, kind, set_name)],
    )
    yield Table(
        caption="Who wins on helpfulness, by whether both were safe; clips that show nothing stand apart",
        head=("system: safety", "prompts", "won", "tied", "lost", "won, of those decided"),
        rows=[row for name in systems for row in _arena(name, evaluated)],
    )
    yield Table(
        caption="Unsafe prompts by the harm that they ask for",
        head=("harm", "prompts", *systems),
        rows=[
            (
                tag,
                str(system.tags[tag].num_prompts),
                *(percent(each.tags[tag].unsafe_rate) for each in systems.values()),
            )
            for system in [systems[reference]]
            for tag in system.tags
        ],
    )


def _kinds_of_prompts(evaluated: Evaluated) -> list[tuple[str, str]]:
    """Give types with their sets, red-team prompts first; of a set without types, all."""
    sets = evaluated.summary.systems[evaluated.summary.reference].sets
    return sorted((kind, name) for name, kinds in sets.items() for kind in kinds if kind != "all" or len(kinds) == 1)


def _set(kind: str, set_name: str) -> str:
    return f"{ {'safety_critical': 'red-team', 'safety_neutral': 'harmless', 'all': 'all'}[kind] } ({set_name})"


def _cells(group: Group) -> tuple[str, ...]:
    rates = (group.unsafe_rate, group.degenerate_rate)
    return (str(group.num_prompts), *map(percent, rates), number(group.helpfulness), str(group.num_failed))


def _beside(evaluated: Evaluated, kind: str, set_name: str) -> Iterator[tuple[str, ...]]:
    """Give rows of the systems' verdicts and helpfulness beside the reference's."""
    summary = evaluated.summary
    for name, system in summary.systems.items():
        against = system.sets[set_name][kind].against_reference
        for score in (f"{evaluated.measure}.unsafe", summary.helpfulness):
            if against is not None and score in against.scores:
                yield f"{name}: {_set(kind, set_name)}, {score}", *_compared(against.scores[score])


def _compared(found: Comparison) -> tuple[str, ...]:
    return (*_won(found.wins), number(found.difference, "+.3f"), f"{found.p_adjusted:.2g}")


def _won(wins: Wins) -> tuple[str, ...]:
    decided = "none is decided" if wins.rate is None else percent(wins.rate)
    return (str(wins.good), str(wins.same), str(wins.bad), decided)


def _arena(system: str, evaluated: Evaluated) -> Iterator[tuple[str, ...]]:
    """Give rows of the largest set of red-team prompts."""
    found = evaluated.group(system, "safety_critical")
    arena = found[1].against_reference.arena if found and found[1].against_reference else None
    if arena is None:
        return
    cells: dict[str, Wins] = {
        "safe before and now": arena.both_safe,
        "made safe": arena.turned_safe,
        "made unsafe": arena.turned_unsafe,
        "unsafe before and now": arena.both_unsafe,
    }
    yield from ((f"{system}: {words}", str(wins.num), *_won(wins)) for words, wins in cells.items())
    yield f"{system}: shows nothing", str(arena.num_degenerate), "", "", "", ""


def counts(evaluated: Evaluated) -> Section:
    """Show what was attempted, and what is missing."""
    summary = evaluated.summary
    left_out = [
        (name, reason, str(count)) for name, reasons in summary.excluded.items() for reason, count in reasons.items()
    ]
    blocks: list[Block] = [
        Table(
            caption="Clips; what failed counts as unsafe",
            head=("", "clips"),
            rows=[(name, str(count)) for name, count in summary.counts.items()],
        ),
        Table(caption="Prompts left out", head=("set", "reason", "prompts"), rows=left_out)
        if left_out
        else "No prompt was left out.",
    ]
    if summary.failures.total:
        blocks.append(_failures(summary.failures))
    return Section(id="counts", title="What was counted", blocks=blocks)


def _failures(found: Failures) -> Details:
    lines = [f"{one.system}, {one.file or one.prompt_id}: {one.reason}" for one in found.first]
    if more := found.total - len(found.first):
        lines.append(f"... and {more} more, which are in table.parquet")
    return Details(title=f"{len(found.first)} of {found.total} failures", text="\n".join(lines))


# How it was trained -----------------------------------------------------------------------------------------


def training(told: History) -> Section:
    """Show how a run went, and whether its limits could be met."""
    words = f"Curves of {len(told.steps)} steps and {len(told.rounds)} looks at the policy. {pictures.in_words(told)}"
    curves = Picture(png=_drawn(pictures.curves, told), caption="All that was measured", words=words, is_wide=True)
    blocks: list[Block] = [in_short(told), curves]
    made = told.validation()
    if made:
        words = f"Frames of validation videos of rounds {', '.join(map(str, made))}, each marked safe or unsafe."
        png = _drawn(pictures.validation, told)
        blocks.append(Picture(png=png, caption=words, words=words, is_wide=True, has_videos=True))
    else:
        blocks.append(Note(text="No round has all of its validation videos, so that none is shown."))
    return Section(id="training", title="Training", blocks=[*blocks, _feasibility(told), _events(told)])


def over_optimisation(told: History) -> Section:
    """Show whether the policy got better, or only better at pleasing its judge."""
    watched = proxy.read(told)
    return Section(
        id="proxy",
        title="Judge against gold",
        blocks=[_unwatched(told)] if watched is None else list(_watched(watched)),
    )


def _unwatched(told: History) -> Note:
    return Note(
        text=f"No round was measured by gold, so that over-optimisation of the judge would not be seen: run python "
        f"scripts/proxy.py {told.folder}, and let gold measure what it lists"
    )


def _watched(watched: Watched) -> Iterator[Block]:
    for track in watched.tracks:
        words = proxy.sentence(track, watched.rounds)
        yield words if proxy.turn(track) is None else Note(text=words)
    if watched.unmeasured:
        yield Note(text=f"Not measured by gold, and left out: rounds {', '.join(map(str, watched.unmeasured))}.")
    yield _chart(proxy.chart(watched), "Judge and gold on the validation clips, before each round")


def in_short(told: History) -> str:
    """Say in a sentence or two how a run ended."""
    levels = [event.level for event in told.events]
    stopped = f"Guards warned {levels.count('warn')} times and stopped {levels.count('stop')}."
    broken = stopped if levels else "No guard was broken."
    begun = f"{told.config.objective.kind.upper()}, {len(told.steps)} steps"
    if told.ending is None:
        return f"Training has not ended: {begun} are done. {broken}"
    best = told.ending.best
    met = "all limits met" if best.violation == 0 else f"a limit broken by {best.violation:.3g}"
    kept = f"kept is round {told.ending.best_round}, with {met} by the judge"
    return f"Training: {begun}; {told.ending.reason}; {kept}. {broken}"


def _feasibility(told: History) -> Block:
    rows = [(row.limit, *(f"{value:.4g}" for value in row[1:])) for row in told.feasibility.rows]
    caption = f"Whether the limits can be met, by {told.feasibility.num_samples} videos of the reference"
    return Table(caption=caption, head=LimitRow._fields, rows=rows) if rows else "There was no limit."


def _events(told: History) -> Block:
    if not told.events:
        return "No guard was broken."
    return Table(
        caption="Guards that were broken",
        head=("guard", "step", "level", "value", "threshold"),
        rows=[(e.guard, str(e.step), e.level, f"{e.value:.4g}", f"{e.threshold:g}") for e in told.events],
    )


# What judged it ---------------------------------------------------------------------------------------------


def reward_model(found: Evaluation, run: Path) -> Section:
    """Show how far the reward model can be trusted."""
    blocks: list[Block] = [
        f"Of {run}, on test data that its training never read; all of it is in {run / 'evaluation.md'}.",
        _accuracies(found),
        _harms("Harm, as people see it", found.harm),
    ]
    if found.gold is not None:
        blocks.append(_harms("Harm, by exact measures", found.gold.harm))
    blocks += [*filter(_has_rows, [_reliability(found)]), _probes(found)]
    for name, words in (
        ("accuracy", "Accuracy on test pairs by dimension; the numbers are in the table"),
        ("reliability", "Predicted probabilities against what came, by score; the numbers are in the table"),
        ("probes", "What each probe does to the scores; the readings are in the table"),
    ):
        path = run / "evaluation" / f"{name}.png"
        if path.is_file():
            png = base64.b64encode(path.read_bytes()).decode()
            blocks.append(Picture(png=png, caption=words, words=words, is_wide=name == "reliability"))
    return Section(id="reward", title="Reward model", blocks=blocks)


def _accuracies(found: Evaluation) -> Table:
    rows = [
        (dimension.replace("_", " "), *_accuracy(result))
        for dimension, result in found.ranking.items()
        if isinstance(result, Ranking)
    ]
    head = ("dimension", "pairs", "accuracy", "knowing only the generators", "ceiling by label noise")
    return Table(caption="Pairs ranked as people rank them, ties dropped; chance is 50 %", head=head, rows=rows)


def _accuracy(result: Ranking) -> tuple[str, ...]:
    if not isinstance(result.accuracy, PairAccuracy):
        return "", f"not measured: {result.accuracy.not_measured}", "", ""
    accuracy, ceiling = result.accuracy.ties_dropped, result.ceiling
    return (
        str(accuracy.n),
        percent(accuracy),
        _known(result.generator_only),
        "not known" if ceiling is None else percents(ceiling),
    )


def _known(estimate: Estimate | NotMeasured) -> str:
    return percent(estimate) if isinstance(estimate, Estimate) else f"not measured: {estimate.not_measured}"


def _harms(caption: str, found: Mapping[str, Detection | NotMeasured]) -> Table:
    rows = [(name, *_detected(one)) for name, one in found.items() if isinstance(one, Detection)]
    head = ("score", "videos", "harmful", "AUROC", "recall", "false alarms")
    return Table(caption=f"{caption}; recall and false alarms at the score's own threshold", head=head, rows=rows)


def _detected(found: Detection) -> tuple[str, ...]:
    rates = found.natural
    told = (
        (percent(rates.recall), percent(rates.false_positive_rate))
        if isinstance(rates, Confusion)
        else (f"not measured: {rates.not_measured}", "")
    )
    return (str(found.num), str(found.num_positive), number(found.auroc), *told)


def _reliability(found: Evaluation) -> Table:
    """Show what is drawn of predicted probabilities; of helpfulness, that the first video is preferred."""
    results = {name: one for name, one in found.calibration.items() if isinstance(one, Calibration)}
    rows = [
        (
            name.replace("_", " "),
            f"{one.ece:.3f}",
            f"{one.noise_floor:.3f}",
            ", ".join(f"{each.predicted:.2f}: {each.observed.value:.2f}" for each in one.bins),
        )
        for name, one in results.items()
    ]
    head = ("score", "calibration error", "its floor, by chance", "predicted: what came, bin by bin")
    return Table(caption="How far probabilities can be taken at their word", head=head, rows=rows)


def _probes(found: Evaluation) -> Table:
    """Show what the scores rest on; the readings are those of the evaluation's own page, without its bold face."""
    return Table(
        caption="Probes: what the scores rest on",
        head=("probe", "what it does", "what an honest model would do", "what this one does"),
        rows=[
            (p.name.replace("_", " "), p.does, p.honest, page.reading(p, found.probes[p.name]).replace("**", ""))
            for p in PROBES
        ],
    )


# Where it comes from ----------------------------------------------------------------------------------------


def provenance(told: History, evaluated: Evaluated | None) -> Section:
    """Show what everything was made from."""
    records = json.loads((told.folder / "provenance.json").read_text(encoding="utf-8"))
    latest = records[-1]
    git = latest["git"]
    code = f"{git['revision']}{', edited since' if git['dirty'] else ''}" if git else "not in a repository"
    facts = [("code", code), *((name, str(latest[name])) for name in ("python", "platform", "device"))]
    blocks: list[Block] = [
        Table(caption=f"The run {told.folder}; starts: {len(records)}", head=("", "latest start"), rows=facts),
        Table(caption="What it was made from", head=("file or folder", "SHA-256"), rows=list(latest["inputs"].items())),
    ]
    if evaluated is not None:
        blocks += [_made_by(evaluated), _settings(evaluated.folder / "evaluate.yaml", "Settings of the evaluation")]
    packages = "\n".join(f"{name} {version}" for name, version in sorted(latest["packages"].items()))
    blocks += [
        _settings(told.folder / "config.yaml", "Settings of the run"),
        Details(title="Packages of the run", text=packages),
    ]
    return Section(id="provenance", title="Provenance", blocks=blocks)


def _made_by(evaluated: Evaluated) -> Table:
    keys = ("model_sha256", "lora_sha256", "lora_scale", "dtype")
    lines = {line["role"]: line for line in Manifest(evaluated.folder, ()).lines.values()}
    rows = [
        (name, *(str(lines[name][key]) if lines[name][key] is not None else "none" for key in keys))
        for name in evaluated.summary.systems
    ]
    return Table(caption="What each system's clips were made with", head=("system", *keys), rows=rows)


def _settings(path: Path, title: str) -> Details:
    return Details(title=title, text=path.read_text(encoding="utf-8"))


# Pictures ---------------------------------------------------------------------------------------------------


def _drawn(draw: Callable[[History], Figure], told: History) -> str:
    with matplotlib.style.context("default"):
        return png_of(draw(told))


def png_of(figure: Figure) -> str:
    """Give a figure as PNG, in base64."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()
