"""Charts of an evaluation: what a system gives, against how often it does harm or shows nothing. Bars are 95 %."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from align.summary import Summary
from reward.metrics import Estimate

_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's
_MARKERS = "osD^vPX"
_HARM = "red-team prompts not answered safely, %"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart, and what it shows in words, for those who cannot see it."""

    figure: Figure
    words: str


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a system stands."""

    system: str
    good: Estimate
    harm: Estimate
    """Share of red-team prompts with a clip that is unsafe or shows nothing."""


def pareto(summary: Summary, limits: Mapping[str, float]) -> Chart | None:
    """Draw helpfulness on harmless prompts against harm, with the front; None where it could not be told.

    `limits` are shares of unsafe prompts, by name.
    """
    if summary.pareto is None:
        return None
    points = summary.pareto.points
    places = [_Place(system=p.system, good=p.helpfulness, harm=p.not_kept_safe_rate) for p in points]
    front = sorted((p.not_kept_safe_rate.value, p.helpfulness.value) for p in points if p.on_front)
    with matplotlib.style.context("default"):
        figure, axes = _blank(f"mean {summary.helpfulness}, harmless prompts", "Helpfulness against harm")
        axes.step([100 * harm for harm, _ in front], [good for _, good in front], where="post", color="#999999", lw=1)
        _draw(axes, places, limits, 1.0)
    return Chart(figure=figure, words=_words(places, limits, f"mean {summary.helpfulness}", "{:.3f}", 1.0))


def over_refusal(summary: Summary, limits: Mapping[str, float]) -> Chart | None:
    """Draw the look-alikes that got what they asked for against harm; None where it could not be told."""
    if summary.over_refusal is None:
        return None
    places = [
        _Place(system=name, good=found.benign_kept_rate, harm=_complement(found.red_team_safe_rate))
        for name, found in summary.over_refusal.items()
    ]
    with matplotlib.style.context("default"):
        figure, axes = _blank("harmless look-alikes given what they asked for, %", "Over-refusal")
        _draw(axes, places, limits, 100.0)
    return Chart(figure=figure, words=_words(places, limits, "look-alikes kept", "{:.1f} %", 100.0))


def _complement(rate: Estimate) -> Estimate:
    return Estimate(value=1 - rate.value, low=1 - rate.high, high=1 - rate.low, n=rate.n)


def _blank(label: str, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 4.4), dpi=160, layout="constrained")
    axes = figure.subplots()
    axes.set_title(f"{title} (better: up and left)", fontsize=11, loc="left")
    axes.set_xlabel(_HARM, fontsize=11)
    axes.set_ylabel(label, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _draw(axes: Axes, places: Sequence[_Place], limits: Mapping[str, float], scale: float) -> None:
    """Draw a mark with its bars and its name for each system, and a line for each limit."""
    for number, place in enumerate(places):
        style = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
        at = 100 * place.harm.value, scale * place.good.value
        axes.errorbar(*at, xerr=_reach(place.harm, 100), yerr=_reach(place.good, scale), capsize=3, **style)
        axes.annotate(place.system, at, (7, 7), textcoords="offset points", fontsize=11, color=style["color"])
    for number, (name, limit) in enumerate(limits.items()):
        dash = ("--", ":", "-.")[number % 3]
        axes.axvline(100 * limit, color="#B00000", linestyle=dash, lw=1.3, label=f"{name}: {limit:.1%}")
    if limits:
        axes.legend(fontsize=9, loc="lower right", framealpha=0.8)
    axes.set_xlim(left=min(-2, axes.get_xlim()[0]))


def _reach(estimate: Estimate, scale: float) -> list[list[float]]:
    """How far the interval goes down and up."""
    return [[scale * (estimate.value - estimate.low)], [scale * (estimate.high - estimate.value)]]


def _words(places: Sequence[_Place], limits: Mapping[str, float], good: str, form: str, scale: float) -> str:
    points = "; ".join(
        f"{place.system}: {good} {form.format(scale * place.good.value)}, not answered safely {place.harm.value:.1%}"
        for place in places
    )
    lines = "; ".join(f"{name} {limit:.1%}" for name, limit in limits.items())
    return f"{points}. {f'Lines: {lines}.' if lines else 'No limit is drawn.'}"
