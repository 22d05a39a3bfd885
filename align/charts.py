"""Charts of an evaluation: what a system gives, against how often it does harm or shows nothing. Bars are 95 %."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

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
    """Share of red-team prompts with an unsafe clip, or one that shows nothing."""


def pareto(summary: Summary, limits: Mapping[str, float]) -> Chart | None:
    """Draw helpfulness on harmless prompts against harm, with the front; None where it could not be told.

    `limits` are shares of unsafe prompts, by name.
    """
    if summary.pareto is None:
        return None
    points = sorted(summary.pareto.points, key=lambda point: point.system != summary.reference)
    places = [_Place(system=p.system, good=p.helpfulness, harm=p.unsafe_rate) for p in points]
    front = sorted((p.unsafe_rate.value, p.helpfulness.value) for p in points if p.on_front)
    with matplotlib.style.context("default"):
        figure, axes = _blank(f"mean {summary.helpfulness}, harmless prompts", "Helpfulness against harm")
        _draw(axes, places, limits, 1.0)
        _draw_front(axes, front)
    return Chart(figure=figure, words=_words(places, limits, f"mean {summary.helpfulness}", "{:.3f}", 1.0))


def over_refusal(summary: Summary, limits: Mapping[str, float]) -> Chart | None:
    """Draw the look-alikes that got what they asked for against harm; None where it could not be told."""
    if summary.over_refusal is None:
        return None
    places = [
        _Place(system=name, good=found.benign_kept_rate, harm=_complement(found.red_team_safe_rate))
        for name, found in sorted(summary.over_refusal.items(), key=lambda item: item[0] != summary.reference)
    ]
    with matplotlib.style.context("default"):
        figure, axes = _blank("harmless look-alikes kept, %", "Over-refusal")
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
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
        at, bars = (
            (100 * place.harm.value, scale * place.good.value),
            (_reach(place.harm, 100), _reach(place.good, scale)),
        )
        axes.errorbar(*at, xerr=bars[0], yerr=bars[1], capsize=3, color=colour, marker=marker)
        where, side = _beside(place, places)
        axes.annotate(
            place.system, at, where, textcoords="offset points", fontsize=11, color=colour, ha=side, va="center"
        )
    for number, (name, limit) in enumerate(limits.items()):
        dash = ("--", ":", "-.")[number % 3]
        axes.axvline(100 * limit, color="#B00000", linestyle=dash, lw=1.3, label=f"{name}: {100 * limit:g} %")
    if limits:
        axes.figure.legend(fontsize=9, loc="outside lower center", frameon=False)
    axes.set_xlim(left=min(-2, axes.get_xlim()[0]))


def _beside(place: _Place, places: Sequence[_Place]) -> tuple[tuple[float, float], Literal["left", "right"]]:
    """Where a name stands, in points from its mark: towards the middle, above those of worse systems on its side."""
    is_left = place.harm.value < 0.5
    names = sorted((p.good.value, p.system) for p in places if (p.harm.value < 0.5) == is_left)
    rank = names.index((place.good.value, place.system)) - (len(names) - 1) / 2
    return (10.0 if is_left else -10.0, 14.0 * rank), "left" if is_left else "right"


def _draw_front(axes: Axes, front: Sequence[tuple[float, float]]) -> None:
    """Draw what some system is at least as good as: below and right of a line of steps."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    harms, goods = zip(*front, strict=True)
    axes.step(
        [100 * harm for harm in (harms[0], *harms)] + [right],
        [bottom, *goods, goods[-1]],
        where="post",
        color="#999999",
        linewidth=1,
        zorder=1,
    )
    axes.set(xlim=(left, right), ylim=(bottom, top))


def _reach(estimate: Estimate, scale: float) -> list[list[float]]:
    """How far the interval goes down and up; the mean of equal values may be a rounding error outside its own."""
    sides = (estimate.value - estimate.low, estimate.high - estimate.value)
    return [[scale * max(0.0, side)] for side in sides]


def _words(places: Sequence[_Place], limits: Mapping[str, float], good: str, form: str, scale: float) -> str:
    points = "; ".join(
        f"{place.system}: {good} {form.format(scale * place.good.value)}, {100 * place.harm.value:.1f} % not safe"
        for place in places
    )
    lines = "; ".join(f"{name} {100 * limit:g} %" for name, limit in limits.items())
    return f"{points}. {f'Lines: {lines}.' if lines else 'No limit is drawn.'}"
