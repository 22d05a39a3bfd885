from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_page import evaluation

from reward import plots
from reward.probes import PROBES


def test_three_plots_are_written(tmp_path: Path):
    plots.draw(evaluation(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accuracy.png", "probes.png", "reliability.png"]
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            assert image.size[0] > 900, path
            assert len(image.convert("RGB").getcolors(2**24) or ()) > 50, path


def test_a_bar_reaches_from_chance_to_the_accuracy_and_the_ceiling_is_marked():
    (axes,) = plots.accuracy(evaluation()).axes
    (bar,) = axes.patches
    assert bar.get_x() == 50  # ty: ignore[missing-attribute]
    assert bar.get_x() + bar.get_width() == pytest.approx(75)  # ty: ignore[missing-attribute]
    assert [np.unique(line.get_xdata()) for line in axes.lines if line.get_label() == "ceiling"] == [80]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["helpfulness"]


def test_each_probability_has_a_panel_with_its_bins():
    found = evaluation()
    figure = plots.reliability(found)
    assert [axes.get_title().splitlines()[0] for axes in figure.axes] == ["first video preferred", "unsafe", "crime"]


def test_probes_are_drawn_from_the_top_with_their_shift():
    (axes,) = plots.probes(evaluation()).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [probe.name.replace("_", " ") for probe in PROBES]
    assert axes.yaxis_inverted()
    points = [np.unique(line.get_xdata()).item() for line in axes.lines if line.get_marker() == "o"]
    assert points == [-0.5] * 2 * len(PROBES)
