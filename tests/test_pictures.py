from pathlib import Path

import matplotlib
import numpy as np
import pytest
import tiny_history
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from align import history, pictures
from align.objectives.rwr import Rwr
from align.pictures import Panel
from align.sample import Sampler


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tiny_history.end(tiny_history.write(tmp_path / "run"))
    tiny_history.add_videos(folder, 4)
    return folder


def panels(folder: Path) -> dict[str, Panel]:
    return {panel.title: panel for panel in pictures.panels_of(history.read(folder))}


def axes_of(figure: Figure, title: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title() == title)


def line_of(axes: Axes, label: str) -> tuple[list[float], list[float]]:
    (line,) = (line for line in axes.lines if line.get_label() == label)
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def test_both_pictures_are_drawn_to_the_same_bytes_whatever_the_users_style(tmp_path: Path):
    folder = tiny_history.write(tmp_path / "run", objective=Rwr(), limits=())
    tiny_history.add_videos(folder, 1)
    pictures.draw(folder)
    first = [(folder / name).read_bytes() for name in ("curves.png", "validation.png")]
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 20}):
        pictures.draw(folder)
    assert [(folder / name).read_bytes() for name in ("curves.png", "validation.png")] == first
    with Image.open(folder / "curves.png") as image:
        assert image.size[0] == 1500
    assert not list(folder.glob(".*.tmp"))


def test_dpo_has_panels_for_what_it_logs(run: Path):
    expected = ["reward", "unsafe videos", "cost", "multipliers", "limit harm", "limit violence | blood", "motion"]
    assert list(panels(run)) == [*expected, "loss", "margin", "beta", "gaps", "items to learn from"]


def test_rwr_has_panels_for_what_it_logs(tmp_path: Path):
    found = panels(tiny_history.write(tmp_path / "run", objective=Rwr(), limits=()))
    expected = ["reward", "unsafe videos", "cost", "motion", "loss", "error", "weights", "items to learn from"]
    assert list(found) == expected
    assert list(found["unsafe videos"].levels) == []


def test_curves_stand_where_they_were_measured_and_levels_where_the_limits_are(run: Path):
    found = panels(run)
    assert list(found["unsafe videos"].curves["rollouts"].steps) == [0, 8, 16, 24]
    assert list(found["unsafe videos"].curves["rollouts"].values) == [0.5, 0.25, 0.5 / 3, 0.125]
    assert found["unsafe videos"].levels == {"limit harm": 0.25, "lowest in reach, harm": 0.125}
    assert found["limit violence | blood"].levels["limit violence | blood"] == -1.0
    assert list(found["limit violence | blood"].curves["rollouts"].values) == [0.75, 0.5, 0.25, 0]
    assert list(found["multipliers"].curves["harm"].values) == [0.5, 1.5, 2.5, 3.5]
    assert list(found["gaps"].curves["chosen"].values) == [-step for step in range(1, 25)]
    assert found["motion"].levels == {"reference": 1.0, "guard": 0.8}


def test_what_no_panel_is_for_gets_one_of_its_own(run: Path):
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines.replace('"loss"', '"sharpness": 3.0, "loss"'))
    assert list(panels(run)["sharpness"].curves["sharpness"].values) == [3.0] * 24


def test_every_panel_says_what_its_axes_are_and_marks_the_rounds(run: Path):
    figure = pictures.curves(history.read(run))
    shown = [axes for axes in figure.axes if axes.axison]
    assert len(shown) == len(panels(run)) + 1
    for axes in shown:
        assert axes.get_xlabel() == "finished steps"
        assert axes.get_ylabel()
        assert [text.get_text() for text in axes.texts][:4] == ["0", "1", "2", "3"]
        marks = [line for line in axes.lines if line.get_linewidth() == 0.8]
        assert [np.asarray(line.get_xdata())[0] for line in marks] == [0, 8, 16, 24]
        assert [line.get_color() == "black" for line in marks] == [False, False, True, False]


def test_the_thick_line_is_the_mean_of_the_last_steps(run: Path):
    """A quarter of a round's 8 steps is 2, and the margin of step s is s: at step 2, the mean of 1 and 2."""
    steps, values = line_of(axes_of(pictures.curves(history.read(run)), "margin"), "margin")
    assert steps == list(range(2, 25))
    assert values == pytest.approx([step - 0.5 for step in range(2, 25)])


def test_broken_guards_are_marked_with_their_value(run: Path):
    axes = axes_of(pictures.curves(history.read(run)), "broken guards")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["motion"]
    marks = {str(dots.get_label()): np.asarray(dots.get_offsets()).tolist() for dots in axes.collections}
    assert marks == {"warn": [[8, 0]], "stop": [[24, 0]]}
    assert [text.get_text() for text in axes.texts][4:] == ["0.7", "0.7"]


# Validation videos ------------------------------------------------------------------------------------------


def test_a_cell_shows_frames_that_follow_each_other(run: Path):
    """Frame k is 20 k grey: frames 4 to 7 are 80, 100, 120, 140, two by two, within what the codec changes."""
    figure = pictures.validation(history.read(run))
    assert len(figure.axes) == 4 * 4
    shown = np.asarray(figure.axes[0].images[0].get_array()).astype(int)
    assert shown.shape == (33, 33, 3)
    corners = [shown[8, 8, 0], shown[8, 25, 0], shown[25, 8, 0], shown[25, 25, 0]]
    assert np.abs(np.subtract(corners, [80, 100, 120, 140])).max() <= 3
    assert (shown[16] == 255).all()


def test_unsafe_cells_say_so_and_prompts_and_rounds_are_named(run: Path):
    axes = np.array(pictures.validation(history.read(run)).axes).reshape(4, 4)
    assert [cell.get_xlabel() for cell in axes[0]] == ["safe, cost -1.50", "UNSAFE, cost +1.50"] * 2
    assert [cell.get_title() for cell in axes[0]] == ["round 0\nreference", "round 1\n", "round 2\nkept", "round 3\n"]
    captions = [cell.get_ylabel().replace("\n", " ") for cell in axes[:, 0]]
    kinds = ("safety_critical", *("safety_neutral",) * 3)
    prompts = [tiny_history.PROMPTS[place].replace("$", r"\$") for place in (3, 0, 1, 2)]
    assert captions == [f"{prompt} ({kind})" for prompt, kind in zip(prompts, kinds, strict=True)]


def test_a_blank_cell_is_marked_as_unsafe_and_says_why(tmp_path: Path):
    folder = tiny_history.write(tmp_path / "run")
    tiny_history.add_videos(folder, 1, blank=(0,))
    cells = [
        (axes.get_xlabel(), axes.xaxis.label.get_color()) for axes in pictures.validation(history.read(folder)).axes
    ]
    assert sorted(cells)[0] == ("blank, cost -1.50", "#B00000")
    assert {colour for word, colour in cells if word.startswith("safe")} == {"#808080"}


def test_of_many_rounds_nine_are_shown_the_first_and_the_last_among_them(tmp_path: Path):
    folder = tiny_history.write(tmp_path / "run")
    tiny_history.add_videos(folder, 17, num_frames=8)
    titles = [axes.get_title() for axes in pictures.validation(history.read(folder)).axes[:9]]
    assert [int(title.split()[1]) for title in titles] == list(range(0, 17, 2))


def test_short_videos_show_what_they_have(tmp_path: Path):
    """Of 3 frames, the first three, and white in the fourth place."""
    folder = tiny_history.write(tmp_path / "run", sampler=Sampler(num_frames=3, height=16, width=16))
    tiny_history.add_videos(folder, 1, num_frames=3)
    figure = pictures.validation(history.read(folder))
    shown = np.asarray(figure.axes[0].images[0].get_array()).astype(int)
    corners = [shown[8, 8, 0], shown[8, 25, 0], shown[25, 8, 0], shown[25, 25, 0]]
    assert np.abs(np.subtract(corners, [0, 20, 40, 255])).max() <= 3
