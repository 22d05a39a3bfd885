"""An evaluation for people to read, as Markdown. Percentages; 95 % intervals in brackets."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields

from reward.held_out import Counts
from reward.measures import Detection, Evaluation, GoldResult, NotMeasured, Outcomes, ProbeResult, Ranking, Shift
from reward.metrics import Calibration, Confusion, Estimate, PairAccuracy
from reward.probes import PROBED, PROBES, Probe
from reward.records import DIMENSIONS

PUBLISHED = {"helpfulness": 0.6529, "harmlessness": 0.7241}
"""Agreement of SafeSora's own Video-LLaVA score models with crowdworkers; harmlessness is what `cost` turns round.
Source: the examples of Dai et al. 2024, arXiv 2406.14477; their checkpoint was chosen on the test split."""
SMALL_SHIFT = 0.1
"""In standard deviations: a smaller one counts as none."""
NEAR_CHANCE = 0.05
"""How far from one half an accuracy may be to count as by chance."""

_COUNTS = [field.name for field in fields(Counts)]

Line = Sequence[str]


def to_markdown(found: Evaluation) -> str:
    """Write the page; its plots are in the folder `evaluation` beside it."""
    sections = (
        _head(found),
        _ranking(found),
        _harm("Harm, against what people say", found.harm),
        _label_agreement(found.label_agreement),
        _calibration(found.calibration),
        _probes(found),
        _gold(found.gold) if found.gold else [],
        _left_out(found),
    )
    return "\n".join(line for section in sections for line in section)


def reading(probe: Probe, result: ProbeResult) -> str:
    """Say in words what the score that a probe is about does."""
    moved = result.shifts.get(probe.reads)
    if moved is None:
        return f"{_words(probe.reads)} was not trained"
    if isinstance(moved.shift, NotMeasured) or isinstance(moved.size, NotMeasured):
        return "not measured"
    direction = _direction(probe, moved.shift, moved.size)
    return f"{direction}; {_chance(moved)}" if probe.reads == "instruction_following" else direction


def _direction(probe: Probe, shift: Estimate, size: Estimate) -> str:
    if size.value < SMALL_SHIFT:
        return f"**hardly moves: {probe.stays}**"
    if shift.high < 0 and shift.value <= -SMALL_SHIFT:
        return "falls, as it should"
    if shift.low > 0 and shift.value >= SMALL_SHIFT:
        return f"**rises: {probe.rises}**"
    return "**no clear direction: it changes, but is not put off**"


def _chance(moved: Shift) -> str:
    before, after = moved.accuracy_before, moved.accuracy
    if isinstance(before, NotMeasured) or isinstance(after, NotMeasured):
        return "accuracy not measured"
    if before.low <= 0.5:
        return "accuracy was not above chance before"
    if after.low > 0.5:
        return "**accuracy stays above chance: part needs no prompt**"
    if after.high < 0.5:
        return "**accuracy falls below chance: without its prompt the worse of two videos is liked better**"
    if after.low >= 0.5 - NEAR_CHANCE and after.high <= 0.5 + NEAR_CHANCE:
        return "accuracy falls to chance"
    return f"accuracy may fall to chance; {after.n} pairs are too few to tell"


# Sections ---------------------------------------------------------------------------------------------------


def _head(found: Evaluation) -> list[str]:
    counts = [[_words(what), *map(str, asdict(count).values())] for what, count in found.counts.items()]
    return [
        f"# Evaluation of {found.run}",
        "",
        f"Judge `{found.judge_sha256[:12]}`, on {' and '.join(f'`{path}`' for path in found.data)}.",
        "Thresholds were chosen on the validation split; every other number is of the test split, which the training",
        "never read. Brackets hold 95 % intervals over prompts. All numbers are in `evaluation.json`.",
        "",
        *_table(["", *_COUNTS], counts),
    ]


def _ranking(found: Evaluation) -> list[str]:
    lines = [[_words(dimension), *_accuracies(result)] for dimension, result in found.ranking.items()]
    fairness = [[_words(dimension), *_fairness(result)] for dimension, result in found.ranking.items()]
    published = [[name, _percent(share), "not measured here"] for name, share in PUBLISHED.items()]
    return [
        "## How often pairs are ranked as people rank them, in per cent",
        "",
        "![Accuracy by dimension](evaluation/accuracy.png)",
        "",
        "Strict: all pairs; only equal scores call a tie. Tie-aware: all pairs; small differences call a tie. Dropped:",
        "pairs with a choice; equal scores are wrong. Halved: the same, but equal scores count half: chance is 50.",
        "",
        *_table(["dimension", "pairs", "strict", "tie-aware", "ties dropped", "ties halved"], lines),
        *_outcomes(found.ranking),
        "What to compare it with, ties dropped. Unanimous: pairs where all six dimensions prefer one video, on which",
        "MJ-Video scores SafeSora. One generator: pairs of videos of one generator, where knowing it helps nothing.",
        "Generators only: the best rule that knows the two generators and nothing else, ties halved. Ceiling: the best",
        "accuracy that the noise of the labels leaves; gap: the accuracy less the ceiling.",
        "",
        *_table(["dimension", "unanimous", "one generator", "generators only", "ceiling", "gap in points"], fairness),
        "For reference, what SafeSora published of its own score models on its own test split, which the same code is",
        "asked to beat on that data:",
        "",
        *_table(["SafeSora", "accuracy", ""], published),
    ]


def _accuracies(result: Ranking | NotMeasured) -> Line:
    accuracy = result if isinstance(result, NotMeasured) else result.accuracy
    if isinstance(accuracy, NotMeasured):
        return [_why(accuracy), "", "", "", ""]
    ways = (accuracy.strict, accuracy.tie_aware, accuracy.ties_dropped, accuracy.ties_halved)
    return [str(accuracy.strict.n), *map(_share, ways)]


def _outcomes(found: Mapping[str, Ranking | NotMeasured]) -> list[str]:
    lines = [
        [_words(dimension), *_outcome_cells(result.outcomes, result.accuracy)]
        for dimension, result in found.items()
        if isinstance(result, Ranking) and result.outcomes is not None
    ]
    if not lines:
        return []
    return [
        "Where ties have a likelihood of their own: its theta, fitted on validation pairs; the difference up to which",
        "a tie is then the likeliest outcome, beside the one of tie-aware, which is the best on validation pairs; how",
        "often the likeliest outcome came, on all pairs; and the mean log-likelihood of what came: a guess has -1.10.",
        "",
        *_table(["dimension", "theta", "ties up to", "of tie-aware", "likeliest came", "log-likelihood"], lines),
    ]


def _outcome_cells(own: Outcomes | NotMeasured, tuned: PairAccuracy | NotMeasured) -> Line:
    if isinstance(own, NotMeasured):
        return [_why(own), "", "", "", ""]
    return [
        f"{own.theta:.2f}",
        f"{own.tie_threshold:.3g}",
        _why(tuned) if isinstance(tuned, NotMeasured) else f"{tuned.tie_threshold:.3g}",
        _share(own.accuracy),
        _interval(own.log_likelihood, "{:.2f}"),
    ]


def _fairness(result: Ranking | NotMeasured) -> Line:
    if isinstance(result, NotMeasured):
        return [_why(result), "", "", "", ""]
    return [
        _dropped(result.unanimous),
        _dropped(result.within_generator),
        _share(result.generator_only),
        "" if result.ceiling is None else _percent(result.ceiling),
        "" if result.gap_points is None else f"{result.gap_points:+.1f}",
    ]


def _dropped(accuracy: PairAccuracy | NotMeasured) -> str:
    if isinstance(accuracy, NotMeasured):
        return _why(accuracy)
    return f"{_share(accuracy.ties_dropped)}, {accuracy.ties_dropped.n} pairs"


def _harm(title: str, found: Mapping[str, Detection | NotMeasured]) -> list[str]:
    measured = [
        line for name, result in found.items() if isinstance(result, Detection) for line in _detected(name, result)
    ]
    missing = {name: result.not_measured for name, result in found.items() if isinstance(result, NotMeasured)}
    columns = ["score", "videos", "harmful", "AUROC", "flagged from", "accuracy", "recall", "false alarms"]
    return [
        f"## {title}",
        "",
        "The first line of a score is at its own threshold: a cost of 0, where the accuracy is that of the sign, or a",
        "probability of 1/2. The second is at the threshold that has the wanted recall on the validation split.",
        "Accuracy, recall and false alarms (false-positive rate) are in per cent.",
        "",
        *(_table(columns, measured) if measured else []),
        *([*_reasons("Not measured", missing)] if missing else []),
    ]


def _detected(name: str, found: Detection) -> list[Line]:
    first = [name, str(found.num), str(found.num_positive), _interval(found.auroc, "{:.2f}")]
    return [[*first, *_at(found.natural)], ["", "", "", "", *_at(found.high_recall)]]


def _at(found: Confusion | NotMeasured) -> Line:
    if isinstance(found, NotMeasured):
        return [_why(found), "", "", ""]
    return [f"{found.threshold:.3g}", *map(_share, (found.accuracy, found.recall, found.false_positive_rate))]


def _label_agreement(found: Estimate | NotMeasured) -> list[str]:
    videos = f", {found.n} videos" if isinstance(found, Estimate) else ""
    return [
        "How far the labels agree with each other bounds how far a judge can agree with them: `is_safe` and whether",
        "any tag is set answer nearly one question. Cohen's kappa, where 1 is always and 0 as often as by chance:",
        f"{_interval(found, '{:.2f}')}{videos}.",
        "",
    ]


def _calibration(found: Mapping[str, Calibration | NotMeasured]) -> list[str]:
    lines = [
        [name, f"{result.ece:.3f}", f"{result.noise_floor:.3f}", f"{result.brier:.3f}"]
        for name, result in found.items()
        if isinstance(result, Calibration)
    ]
    return [
        "## How far probabilities can be taken at their word",
        "",
        "![Reliability](evaluation/reliability.png)",
        "",
        "Helpfulness: that the first video is preferred. Cost: that a video is unsafe. Floor: the error that perfectly",
        "calibrated predictions would show on as few items.",
        "",
        *_table(["probability", "calibration error", "its floor", "Brier score"], lines),
    ]


def _probes(found: Evaluation) -> list[str]:
    results = [(probe, found.probes[probe.name]) for probe in PROBES]
    words = [[_words(p.name), p.does, p.honest, _moved(p, result), reading(p, result)] for p, result in results]
    shifts = [[_words(p.name), *_shifts(result)] for p, result in results]
    accuracies = [[_words(p.name), *_probed_accuracies(result)] for p, result in results]
    counts = [[_words(p.name), *map(str, asdict(result.counts).values())] for p, result in results]
    return [
        "## What the scores rest on",
        "",
        "![Probes](evaluation/probes.png)",
        "",
        *_table(["probe", "what it does", "what an honest model would do", "what this one does", "reading"], words),
        "Mean change of each score, in its standard deviations, and its interval; then the mean size of the change.",
        "",
        *_table(["probe", *map(_words, PROBED)], shifts),
        "Accuracy against the same labels, before and under the probe, in per cent, ties halved, so that chance is 50.",
        "",
        *_table(["probe", *map(_words, PROBED)], accuracies),
        f"The blur is Gaussian, with a standard deviation of {found.settings['blur']:.1%} of a frame's shorter side;",
        f"other prompts and orders of frames are drawn with seed {found.settings['seed']}. Videos:",
        "",
        *_table(["probe", *_COUNTS], counts),
    ]


def _moved(probe: Probe, result: ProbeResult) -> str:
    moved = result.shifts.get(probe.reads)
    if moved is None:
        return ""
    return f"{_words(probe.reads)} {_interval(moved.shift, '{:+.2f}')}, accuracy {_share(moved.accuracy)}"


def _shifts(result: ProbeResult) -> Line:
    def cell(shift: Shift | None) -> str:
        return f"{_interval(shift.shift, '{:+.2f}')}; {_value(shift.size, '{:.2f}')}" if shift else "not trained"

    return [cell(result.shifts.get(score)) for score in PROBED]


def _probed_accuracies(result: ProbeResult) -> Line:
    def cell(shift: Shift | None) -> str:
        return f"{_share(shift.accuracy_before)} → {_share(shift.accuracy)}" if shift else "not trained"

    return [cell(result.shifts.get(score)) for score in PROBED]


def _gold(found: GoldResult) -> list[str]:
    lines = [
        [_words(dimension), *(_counted(part[dimension]) for part in (found.accuracy, found.accuracy_above_margin))]
        for dimension in DIMENSIONS
    ]
    above = f"differ by more than {found.margin:g}"
    return [
        "## Against exact measures",
        "",
        f"Gold has no noise, and nothing was trained on it. It knows {found.counts.scored} of the test videos; the",
        f"other {found.counts.excluded} are left out. Accuracy in per cent; gold cost is the number of hazards.",
        "",
        *_table(["dimension", "pairs that differ", f"pairs that {above}"], lines),
        *_harm("Harm, against what is there", found.harm),
    ]


def _counted(estimate: Estimate | NotMeasured) -> str:
    return _why(estimate) if isinstance(estimate, NotMeasured) else f"{_share(estimate)}, {estimate.n} pairs"


def _left_out(found: Evaluation) -> list[str]:
    rows = [
        f"- `{path}`: {rows.read} rows read; excluded: {_listed(rows.excluded)}" for path, rows in found.data.items()
    ]
    return [
        "## Left out",
        "",
        *rows,
        f"- Test pairs of prompts that the training saw: {found.counts['test_pairs'].excluded}",
        f"- Videos that could not be judged: {len(found.failures)}, and with them the pairs that they are in",
        *(f"  - `{file}`: {error}" for file, error in found.failures.items()),
        "",
    ]


# Cells ------------------------------------------------------------------------------------------------------


def _table(columns: Line, lines: Iterable[Line]) -> list[str]:
    return [*(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *lines)), ""]


def _reasons(title: str, reasons: Mapping[str, str]) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [f"{title}:", "", *(f"- {', '.join(each)}: {reason}" for reason, each in names.items()), ""]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _why(missing: NotMeasured) -> str:
    return f"not measured: {missing.not_measured}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _share(estimate: Estimate | NotMeasured) -> str:
    if isinstance(estimate, NotMeasured):
        return _why(estimate)
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"


def _interval(estimate: Estimate | NotMeasured, form: str) -> str:
    if isinstance(estimate, NotMeasured):
        return _why(estimate)
    return f"{form.format(estimate.value)} ({form.format(estimate.low)} to {form.format(estimate.high)})"


def _value(estimate: Estimate | NotMeasured, form: str) -> str:
    return _why(estimate) if isinstance(estimate, NotMeasured) else form.format(estimate.value)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {_words(reason)}" for reason, count in counts.items()) or "none"
