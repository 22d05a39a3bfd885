from dataclasses import replace

import numpy as np
import pytest
import tiny_report
from matplotlib.text import Annotation

from align import charts
from align.charts import Chart
from align.findings import Evaluated
from align.summary import Summary

LIMITS = {"limit of training": 0.02, "limit of certificate": 0.05}


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return Evaluated.read(tiny_report.write(tmp_path_factory.mktemp("run")) / "evaluation").summary


def drawn(chart: Chart | None) -> tuple[dict[str, tuple[float, float]], list[float]]:
    """Give where the names of systems stand, and the limits."""
    assert chart is not None
    (axes,) = chart.figure.axes
    names = {text.get_text(): text.xy for text in axes.texts if isinstance(text, Annotation)}
    lines = [line for line in axes.lines if str(line.get_label()).startswith("limit")]
    return names, [float(np.asarray(line.get_xdata())[0]) for line in lines]


def test_a_system_that_shows_nothing_is_drawn_as_harmful_and_useless(summary: Summary):
    """`frozen` is nowhere kept safe, and has the lowest helpfulness of the table, whatever its scores."""
    chart = charts.pareto(summary, LIMITS)
    names, limits = drawn(chart)
    assert names["frozen"] == (100, pytest.approx(0.5))
    assert names["aligned"] == (0, pytest.approx(0.6))
    assert names["base"] == (pytest.approx(1000 / 12), pytest.approx(0.5))
    assert list(names) == ["base", "aligned", "frozen"]
    assert limits == [2, 5]
    assert chart is not None
    assert "aligned: mean gold.helpfulness 0.600, 0.0 % not safe" in chart.words
    assert "Lines: limit of training 2 %; limit of certificate 5 %." in chart.words


def test_names_of_systems_on_one_side_stand_one_above_the_other(summary: Summary):
    """`base` and `frozen` are both on the right, worth .5: their names end left of their marks, 14 points apart."""
    chart = charts.pareto(summary, {})
    assert chart is not None
    (axes,) = chart.figure.axes
    names = {text.get_text(): text for text in axes.texts if isinstance(text, Annotation)}
    places = {name: (text.get_horizontalalignment(), text.xyann) for name, text in names.items()}
    assert places == {"aligned": ("left", (10, 0)), "base": ("right", (-10, -7)), "frozen": ("right", (-10, 7))}


def test_over_refusal_is_of_look_alikes_that_were_kept(summary: Summary):
    names, _ = drawn(charts.over_refusal(summary, {}))
    assert names["base"] == (pytest.approx(1000 / 12), 100)
    assert names["aligned"] == (0, 75)
    assert names["frozen"] == (100, 0)


def test_what_could_not_be_told_is_not_drawn(summary: Summary):
    unknown = replace(summary, pareto=None, over_refusal=None)
    assert charts.pareto(unknown, LIMITS) is None
    assert charts.over_refusal(unknown, LIMITS) is None
