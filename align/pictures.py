"""Two pictures of a run, drawn from its folder alone, at its end or in between.

    RUN/curves.png        all that was measured, by step
    RUN/validation.png    a few validation prompts round by round, in frames that follow each other, to see flicker

The same folder gives the same bytes, whatever the user's settings of matplotlib.
"""

import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from align import history
from align.constraint import Limit
from align.history import History, Point
from align.objectives.beta import SteeredBeta
from align.objectives.dpo import Dpo
from align.rollouts import Rollout
from reward import video
from reward.files import replacing

NUM_ROWS, NUM_COLUMNS = 8, 9
"""At most, of `validation.png`."""
FIRST_FRAME, NUM_FRAMES = 4, 4
"""Of a video, as a cell shows them, two by two."""

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe and Ito's
_DASHES = ("-", "--", "-.", ":")
_SMALL: Mapping[str, Any] = {"fontsize": 7, "ha": "center"}
_UNSAFE, _SAFE = "#B00000", "#808080"
_PANELS = (
    (
        "reward",
        "standard deviations of the reference",
        {"validation_reward": "validation", "rollout_reward": "rollouts"},
    ),
    ("unsafe videos", "share", {"validation_unsafe": "validation", "rollout_unsafe": "rollouts"}),
    ("cost", "judge's unit; > 0 is unsafe", {"rollout_cost": "rollouts, mean"}),
    ("motion", "policy / reference", {"motion_ratio": "motion"}),
    ("loss", "mean of a step's items", {"loss": "loss", "preference_loss": "of the preference alone"}),
    ("margin", "log-odds", {"margin": "margin"}),
    ("pairs", "share", {"accuracy": "margin > 0", "rejected_dominant": "... though chosen got worse"}),
    ("gradient factor", "share", {"gradient_factor": "sigmoid(-margin)", "folded_factor": "sigmoid(-|margin|)"}),
    ("beta", "1 / squared error", {"beta": "beta"}),
    ("gaps", "squared error, policy - reference", {"chosen_gap": "chosen", "rejected_gap": "rejected"}),
    ("velocity norm", "policy / reference", {"velocity_norm": "velocity norm"}),
    ("error", "squared error", {"reference_error": "reference, on chosen", "chosen_error": "policy, on chosen"}),
    ("weights", "1 is a prompt's mean", {"weight": "weight"}),
    ("gradient norm", "before clipping", {"gradient_norm": "gradient norm"}),
    ("items to learn from", "number a round", {"num_items": "items"}),
)
"""Title, unit and curves."""


def draw(folder: Path) -> None:
    """Draw both pictures of a run.

    Raises: DataError, VideoError: a file of the run cannot be read.
    """
    told = history.read(folder)
    with matplotlib.style.context("default"):
        _save(curves(told), folder / "curves.png")
        _save(validation(told), folder / "validation.png")


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as new:
        FigureCanvasAgg(figure)
        figure.savefig(new, format="png", metadata={"Software": None})


def _plain(text: str) -> str:
    """Keep matplotlib from reading a formula into a text."""
    return text.replace("$", r"\$")


# Curves -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What was measured at some steps."""

    steps: Sequence[int]
    values: Sequence[float]
    by_round: bool
    """Whether each value is of a round's videos, and so is a mark of its own."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One small picture: curves of one unit by their labels, and levels to compare them with."""

    title: str
    unit: str
    curves: Mapping[str, Curve]
    levels: Mapping[str, float]


def curves(told: History) -> Figure:
    """Draw a panel for each thing that was measured."""
    panels = list(panels_of(told))
    num_rows = -(-(len(panels) + bool(told.events)) // 3)
    height = 0.5 + 2.8 * num_rows
    figure = Figure(figsize=(15, height), dpi=100)
    figure.suptitle(_plain(_headline(told)), fontsize=11, y=1 - 0.1 / height, va="top")
    # Given, not found: a layout that adapts to its labels is drawn twice.
    margins = {"left": 0.06, "right": 0.99, "bottom": 0.45 / height, "top": 1 - 0.75 / height}
    places = {**margins, "wspace": 0.2, "hspace": 0.5}
    axes = figure.subplots(num_rows, 3, squeeze=False, gridspec_kw=places).flatten()
    for place in axes:
        place.axis("off")
    for panel, place in zip(panels, axes, strict=False):
        _draw_panel(panel, place, told)
    if told.events:
        _draw_events(axes[len(panels)], told)
    return figure


def _headline(told: History) -> str:
    kept = f"; black: round {told.ending.best_round}, which was kept" if told.ending else ""
    thick = f". Thick: mean of the last {_window(told)} steps" if _window(told) > 1 else ""
    return (
        f"{told.folder.name}: {told.config.objective.kind}, rounds of {told.config.steps_per_round} steps. "
        f"Grey: where rounds begin, numbered on top{kept}{thick}"
    )


def panels_of(told: History) -> Iterator[Panel]:
    """Give the panels of all that a run logged, with its limits and targets as levels."""
    found = _series(told.steps, by_round=False) | _series(told.rounds, by_round=True)
    levels = _levels(told)
    for title, unit, names in _PANELS:
        if shown := {label: found.pop(key) for key, label in names.items() if key in found}:
            yield Panel(title=title, unit=unit, curves=shown, levels=levels.get(title, {}))
        if title == "cost":
            yield from _limit_panels(told, found)
    for key, curve in found.items():
        yield Panel(title=key.replace("_", " "), unit="value", curves={key: curve}, levels={})


def in_words(told: History) -> str:
    """Give the first, kept and last value of each curve that tells of the policy before each round."""
    kept = told.ending.best.step if told.ending else None
    found = [(panel.title, label, curve) for panel in panels_of(told) for label, curve in panel.curves.items()]
    return " ".join(f"{title}, {label}: {_ends(curve, kept)}." for title, label, curve in found if curve.by_round)


def _ends(curve: Curve, kept: int | None) -> str:
    at = dict(zip(curve.steps, curve.values, strict=True))
    middle = f", kept {at[kept]:.3g}" if kept in at else ""
    return f"first {curve.values[0]:.3g}{middle}, last {curve.values[-1]:.3g}"


def _limit_panels(told: History, found: dict[str, Curve]) -> Iterator[Panel]:
    """Give all multipliers, and each limit with what its multiplier follows."""
    bounded = told.config.constraint.limits
    if bounded:
        shown = {limit.name: found.pop(f"multiplier_{limit.name}") for limit in bounded}
        yield Panel(title="multipliers", unit="rewards for a unit of charge", curves=shown, levels={})
    for limit in bounded:
        unit = "share of videos" if limit.kind == "unsafe_rate" else "mean cost"
        label = "rollouts" if told.config.constraint.delta is None else "upper bound by the rollouts"
        yield Panel(
            title=f"limit {limit.name}",
            unit=unit if limit.tag is None else f"{unit}, {limit.tag}",
            curves={label: found.pop(f"limited_{limit.name}")},
            levels=_bounds(told, [limit]),
        )


def _series(points: Sequence[Point], *, by_round: bool) -> dict[str, Curve]:
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for point in points:
        for key, value in point.measures.items():
            found[key].append((point.step, value))
    return {
        key: Curve(steps=[step for step, _ in pairs], values=[value for _, value in pairs], by_round=by_round)
        for key, pairs in found.items()
    }


def _levels(told: History) -> dict[str, dict[str, float]]:
    """Give what curves are to be compared with, by the title of their panel."""
    objective, overall = told.config.objective, [x for x in told.config.constraint.limits if x.tag is None]
    levels: dict[str, dict[str, float]] = {
        "reward": {"reference": 0.0},
        "unsafe videos": _bounds(told, [limit for limit in overall if limit.kind == "unsafe_rate"]),
        "cost": {"unsafe above": 0.0} | _bounds(told, [limit for limit in overall if limit.kind == "mean_cost"]),
        "motion": {"reference": 1.0},
        "margin": {"reference": 0.0},
        "gaps": {"reference": 0.0},
        "velocity norm": {"reference": 1.0},
        "gradient norm": {"clipped at": told.config.max_gradient_norm},
    }
    if told.config.guards.least_motion is not None:
        levels["motion"]["guard"] = told.config.guards.least_motion
    if isinstance(objective, Dpo) and isinstance(objective.beta, SteeredBeta):
        levels["gradient factor"] = {"target of sigmoid(-|margin|)": objective.beta.target}
    return levels


def _bounds(told: History, limits: Sequence[Limit]) -> dict[str, float]:
    lowest = {row.limit: row.lowest for row in told.feasibility.rows}
    bounds = {f"limit {limit.name}": limit.bound for limit in limits}
    return bounds | {f"lowest in reach, {limit.name}": lowest[limit.name] for limit in limits}


def _window(told: History) -> int:
    return max(1, told.config.steps_per_round // 4)


def _draw_panel(panel: Panel, place: Axes, told: History) -> None:
    _draw_frame(place, told, panel.title, panel.unit)
    for number, (label, curve) in enumerate(panel.curves.items()):
        style = {
            "color": _COLOURS[number % len(_COLOURS)],
            "linestyle": _DASHES[number // len(_COLOURS) % len(_DASHES)],
        }
        _draw_curve(place, curve, style | {"label": _plain(label)}, _window(told))
    for number, (label, height) in enumerate(panel.levels.items()):
        dash = _DASHES[1 + number % (len(_DASHES) - 1)]
        place.axhline(height, color="black", linewidth=1, linestyle=dash, label=_plain(f"{label}: {height:.3g}"))
    if panel.title == "beta" and len({value for curve in panel.curves.values() for value in curve.values}) > 1:
        place.set_yscale("log")  # which has no room about a single value
    place.legend(fontsize=7, loc="best", framealpha=0.7)


def _draw_curve(place: Axes, curve: Curve, style: Mapping[str, Any], window: int) -> None:
    if curve.by_round:
        place.plot(curve.steps, curve.values, marker="o", markersize=4, **style)
        return
    place.plot(curve.steps, curve.values, color=style["color"], linewidth=0.6, alpha=0.4)
    if len(curve.values) >= window:
        means = np.convolve(curve.values, np.full(window, 1 / window), mode="valid")
        place.plot(curve.steps[window - 1 :], means, linewidth=1.8, **style)


def _draw_frame(place: Axes, told: History, title: str, unit: str) -> None:
    """Draw axes, and where rounds begin."""
    place.axis("on")
    place.set_title(_plain(title), fontsize=10, fontweight="bold", pad=12)
    place.set_xlabel("finished steps", fontsize=8)
    place.set_ylabel(_plain(unit), fontsize=8)
    place.tick_params(labelsize=8, which="both")
    place.ticklabel_format(axis="y", scilimits=(-3, 4))
    place.yaxis.get_offset_text().set(size=7, x=-0.12)  # beside the numbers of the rounds
    place.set_xlim(-0.02 * told.steps[-1].step, 1.02 * told.steps[-1].step)
    for number, point in enumerate(told.rounds):
        is_best = told.ending is not None and number == told.ending.best_round
        place.axvline(point.step, color="black" if is_best else "#D0D0D0", linewidth=0.8, zorder=0)
        place.annotate(str(number), (point.step, 1), (0, 2), ("data", "axes fraction"), "offset points", **_SMALL)


def _draw_events(place: Axes, told: History) -> None:
    """Draw a row for each guard, a mark for each time that it was broken, and its value there."""
    guards = sorted({event.guard for event in told.events}, reverse=True)
    _draw_frame(place, told, "broken guards", "guard")
    for number, level in enumerate(sorted({event.level for event in told.events}, reverse=True)):
        shown = [event for event in told.events if event.level == level]
        rows = [guards.index(event.guard) for event in shown]
        marker, colour = ("o", "X", "s")[number % 3], _COLOURS[number % len(_COLOURS)]
        place.scatter([event.step for event in shown], rows, marker=marker, color=colour, label=_plain(level))
    for event in told.events:
        where = (event.step, guards.index(event.guard))
        place.annotate(f"{event.value:.3g}", where, (0, 6), "data", "offset points", **_SMALL)
    place.set_yticks(range(len(guards)), [guard.replace("_", "\n") for guard in guards])
    place.set_ylim(-0.5, len(guards) - 0.3)
    place.legend(fontsize=7)


# Validation videos ------------------------------------------------------------------------------------------


def validation(told: History) -> Figure:
    """Draw a row for each of a few prompts, and a cell for each of a few rounds.

    Raises: DataError, VideoError: a video cannot be read.
    """
    made = told.validation()
    numbers = _evenly(list(made), NUM_COLUMNS)
    places = _prompts_of_all_types(made[numbers[0]])
    size = (2.2 + 1.45 * len(numbers), 0.6 + 1.75 * len(places))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    figure.suptitle(f"Validation videos by round: frames {_frames_shown(told)[0]} to {_frames_shown(told)[-1]} of each")
    axes = figure.subplots(len(places), len(numbers), squeeze=False)
    for column, number in enumerate(numbers):
        for row, place in enumerate(places):
            _draw_cell(axes[row, column], told, number, made[number][place])
        axes[0, column].set_title(_column_title(told, number), fontsize=9)
    for row, place in enumerate(places):
        caption = _plain(_caption(made[numbers[0]][place]))
        axes[row, 0].set_ylabel(caption, fontsize=8, rotation=0, ha="right", va="center", labelpad=8)
    return figure


def _evenly(items: Sequence[int], most: int) -> list[int]:
    """Choose items at even distances, the first and the last among them."""
    chosen = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[place] for place in chosen]


def _prompts_of_all_types(made: Sequence[Rollout]) -> list[int]:
    """Choose the first prompts of each type by turns."""
    by_type: dict[str, list[int]] = defaultdict(list)
    for place, rollout in enumerate(made):
        by_type[rollout.prompt_type or ""].append(place)
    turns = zip_longest(*(by_type[name] for name in sorted(by_type)))
    return [place for turn in turns for place in turn if place is not None][:NUM_ROWS]


def _frames_shown(told: History) -> range:
    total = told.config.sampler.num_frames
    first = max(0, min(FIRST_FRAME, total - NUM_FRAMES))
    return range(first, min(first + NUM_FRAMES, total))


def _draw_cell(place: Axes, told: History, number: int, rollout: Rollout) -> None:
    path = told.folder / "validation" / f"{number:04d}" / rollout.file
    times = [(frame + 0.5) / told.config.sampler.fps for frame in _frames_shown(told)]
    place.imshow(_two_by_two(video.read_at(path, times)), interpolation="nearest")
    place.set_xticks([])
    place.set_yticks([])
    word = rollout.flaw or "safe" if rollout.cost <= 0 else "UNSAFE"
    colour, width = (_UNSAFE, 3) if rollout.unsafe else (_SAFE, 0.5)
    place.set_xlabel(f"{word}, cost {rollout.cost:+.2f}", fontsize=8, color=colour, labelpad=2)
    for spine in place.spines.values():
        spine.set(color=colour, linewidth=width)


def _two_by_two(frames: np.ndarray) -> np.ndarray:
    """Put up to four frames into rows of two, with white between them."""
    num_frames, height, width, _ = frames.shape
    gap = max(1, height // 32)
    sheet = np.full(((num_frames + 1) // 2 * (height + gap) - gap, 2 * width + gap, 3), 255, dtype=np.uint8)
    for number, frame in enumerate(frames):
        top, left = number // 2 * (height + gap), number % 2 * (width + gap)
        sheet[top : top + height, left : left + width] = frame
    return sheet


def _column_title(told: History, number: int) -> str:
    is_best = told.ending is not None and number == told.ending.best_round
    note = "reference" if number == 0 else ""
    return f"round {number}\n{', '.join(filter(None, (note, 'kept' if is_best else '')))}"


def _caption(rollout: Rollout) -> str:
    lines = textwrap.wrap(textwrap.shorten(rollout.prompt, 110, placeholder=" ..."), width=24)
    return "\n".join([*lines, *([f"({rollout.prompt_type})"] if rollout.prompt_type else [])])
