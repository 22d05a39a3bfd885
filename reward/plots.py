"""Plots of an evaluation: accuracy, reliability and probes, as PNG files."""

from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reward.files import replacing
from reward.measures import Evaluation, Ranking
from reward.metrics import Calibration, Estimate, PairAccuracy
from reward.probes import PROBED

_BLUE, _ORANGE, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "#8c8c8c"
"""Of Okabe and Ito's palette, which colour-blind readers can tell apart."""
_PANELS_A_ROW = 4


def draw(found: Evaluation, folder: Path) -> None:
    """Write accuracy.png, reliability.png and probes.png.

    Raises: DataError: the folder does not exist.
    """
    for name, figure in (("accuracy", accuracy(found)), ("reliability", reliability(found)), ("probes", probes(found))):
        FigureCanvasAgg(figure)
        with replacing(folder / f"{name}.png") as new:
            figure.savefig(new, format="png", dpi=120)


def accuracy(found: Evaluation) -> Figure:
    """Draw a bar for each dimension, from chance, with its ceiling and what the generators alone give."""
    bars = {
        dimension: (result, result.accuracy.ties_dropped)
        for dimension, result in found.ranking.items()
        if isinstance(result, Ranking) and isinstance(result.accuracy, PairAccuracy)
    }
    figure = Figure(figsize=(8, 1.6 + 0.55 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    for place, (result, estimate) in enumerate(bars.values()):
        value = 100 * estimate.value
        axes.barh(place, value - 50, left=50, color=_BLUE, height=0.6, label="this model, 95 % interval")
        axes.errorbar(value, place, xerr=_reach(estimate, 100), color="black", capsize=3)
        if isinstance(result.generator_only, Estimate):
            axes.plot(
                100 * result.generator_only.value, place, "D", color=_ORANGE, mec="white", label="generators only"
            )
        if result.ceiling is not None:
            axes.plot([100 * result.ceiling] * 2, [place - 0.4, place + 0.4], color=_GREEN, lw=4, label="ceiling")
    axes.axvline(50, color="black", ls="--", lw=1, label="chance")
    _finish(axes, bars, title="Accuracy on test pairs", xlabel="pairs ranked as people rank them, %, ties dropped")
    return figure


def reliability(found: Evaluation) -> Figure:
    """Draw a panel for each probability: predicted against observed, with intervals."""
    panels = {name: result for name, result in found.calibration.items() if isinstance(result, Calibration)}
    rows = -(-max(1, len(panels)) // _PANELS_A_ROW)
    figure = Figure(figsize=(2.9 * _PANELS_A_ROW, 0.4 + 3.1 * rows), layout="constrained")
    for number, (name, result) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, _PANELS_A_ROW, number)
        axes.plot([0, 1], [0, 1], color=_GREY, ls="--")
        for each in result.bins:
            axes.errorbar(each.predicted, each.observed.value, _reach(each.observed), fmt="o", color=_BLUE, capsize=2)
        axes.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), aspect="equal")
        axes.set_title(f"{_event(name)}\nECE {result.ece:.3f}, its floor {result.noise_floor:.3f}", fontsize=10)
    figure.supxlabel("predicted probability")
    figure.supylabel("observed share")
    return figure


def _event(name: str) -> str:
    return {"helpfulness": "first video preferred", "cost": "unsafe"}.get(name, name.replace("_", " "))


def probes(found: Evaluation) -> Figure:
    """Draw how far each probe moves each score."""
    figure = Figure(figsize=(8, 1.6 + 0.7 * len(found.probes)), layout="constrained")
    axes = figure.add_subplot()
    for score, colour, offset in zip(PROBED, (_BLUE, _GREEN, _ORANGE), (-0.22, 0.0, 0.22), strict=True):
        for place, result in enumerate(found.probes.values()):
            moved = result.shifts[score].shift if score in result.shifts else None
            if isinstance(moved, Estimate):
                label, reach = score.replace("_", " "), _reach(moved)
                axes.errorbar(moved.value, place + offset, xerr=reach, fmt="o", color=colour, capsize=3, label=label)
    axes.axvline(0, color="black", ls="--", lw=1)
    xlabel = "mean change in standard deviations of the score, 95 % interval"
    _finish(axes, found.probes, title="What probes do to the scores", xlabel=xlabel)
    return figure


def _reach(estimate: Estimate, scale: float = 1.0) -> list[list[float]]:
    """How far the interval goes down and up."""
    return [[scale * (estimate.value - estimate.low)], [scale * (estimate.high - estimate.value)]]


def _finish(axes: Axes, names: Iterable[str], *, title: str, xlabel: str) -> None:
    """Name the rows, from the top, and explain each mark once."""
    labels = [name.replace("_", " ") for name in names]
    axes.set(title=title, xlabel=xlabel, yticks=range(len(labels)), yticklabels=labels)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    handles, said = axes.get_legend_handles_labels()
    once = dict(zip(said, handles, strict=True))
    axes.figure.legend(list(once.values()), list(once), loc="outside lower center", ncols=4, frameon=False)
