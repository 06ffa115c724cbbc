import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from picture3d.view import curves

COLORS = {"a": "var(--run-0)", "b": "#d55e00"}


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def test_a_chart_is_well_formed_and_draws_every_run_in_its_colour():
    steps = np.arange(10.0)
    svg = parsed(curves.line_chart({"a": (steps, steps), "b": (steps, steps**2)}, colors=COLORS, title="loss"))
    assert [line.get("stroke") for line in svg.iter("polyline")] == ["var(--run-0)", "#d55e00"]
    assert svg.findtext("title") == "loss"


def test_a_straight_line_of_data_is_a_straight_line_on_paper():
    svg = parsed(curves.line_chart({"a": ([0, 50, 100], [0, 1, 2])}, colors=COLORS, title=""))
    line = next(svg.iter("polyline"))
    points = np.array([[float(v) for v in pair.split(",")] for pair in line.get("points", "").split()])
    np.testing.assert_allclose(points[1], (points[0] + points[2]) / 2, atol=0.1)
    assert points[0, 1] > points[2, 1], "greater values lie higher"


def test_powers_of_ten_lie_evenly_on_a_logarithmic_axis():
    svg = parsed(curves.line_chart({"a": ([0, 1, 2], [1, 10, 100])}, colors=COLORS, title="", log=True))
    points = [pair.split(",") for pair in next(svg.iter("polyline")).get("points", "").split()]
    y = [float(p[1]) for p in points]
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)


@pytest.mark.parametrize(
    ("x", "y", "log"),
    [([], [], False), ([1, 2], [np.nan, np.inf], False), ([1, 2], [0, -3], True)],
)
def test_a_chart_without_a_point_to_draw_is_empty(x: list, y: list, log: bool):
    assert curves.line_chart({"a": (x, y)}, colors=COLORS, title="t", log=log) == ""


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0], [0.0, 0.0], [1e-9, 1e9], [-5.0, -4.0], [1.0, np.nan, 3.0]])
def test_awkward_values_make_finite_coordinates(values: list[float], log: bool):
    svg = curves.line_chart({"a": (np.arange(len(values)), values)}, colors=COLORS, title="t", log=log)
    assert "nan" not in svg
    assert "inf" not in svg
    if svg:
        parsed(svg)


def test_long_curves_also_get_a_running_mean():
    steps = np.arange(200.0)
    svg = parsed(curves.line_chart({"a": (steps, np.sin(steps))}, colors=COLORS, title="t"))
    assert len(list(svg.iter("polyline"))) == 2


def test_running_mean_equals_its_definition():
    values = np.random.default_rng(0).normal(size=31)
    oracle = [values[max(0, i - 4) : i + 5].mean() for i in range(31)]
    np.testing.assert_allclose(curves.running_mean(values, 4), oracle, atol=1e-12)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.013), (-3, 7), (12.1, 12.4), (0, 98765), (5, 5), (0, 0)])
def test_ticks_are_round_and_cover_the_values(low: float, high: float):
    ticks = curves.nice_ticks(low, high, 4)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 8
    np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_tick_labels_are_short():
    assert [curves.tick_label(v) for v in (0, 0.05, 12, 3000, 2e6, 1e-5)] == ["0", "0.05", "12", "3k", "2M", "1e-5"]


@pytest.mark.parametrize(("share", "width"), [(0.421, "42.1%"), (1.7, "100%"), (-1, "0%")])
def test_a_bar_is_as_long_as_its_share(share: float, width: str):
    rects = list(parsed(curves.bar(share, "red")).iter("rect"))
    assert rects[1].get("width") == width


@pytest.mark.parametrize("share", [None, float("nan")])
def test_a_bar_without_a_number_is_an_empty_track(share: float | None):
    assert len(list(parsed(curves.bar(share, "red")).iter("rect"))) == 1


def test_dots_leave_out_what_has_no_number():
    svg = parsed(curves.dots([(0.25, "red"), (None, "green"), (float("nan"), "blue"), (0.75, "black")]))
    assert [(c.get("cx"), c.get("fill")) for c in svg.iter("circle")] == [("25%", "red"), ("75%", "black")]
    assert not list(parsed(curves.dots([(None, "red")])).iter("circle"))


def test_texts_in_charts_are_escaped():
    svg = curves.line_chart({"a": ([0, 1], [1, 2])}, colors={"a": '"><script>'}, title="<script>", x_label="<b>")
    assert not re.search(r"<script|<b>", svg)
    parsed(svg)


def test_curves_that_fall_tenfold_span_decades_and_those_that_reach_zero_do_not():
    steps = np.arange(3)
    assert curves.spans_decades({"a": (steps, [1.0, 0.5, np.nan]), "b": (steps, [2.0, 0.1, 0.09])})
    assert not curves.spans_decades({"a": (steps, [1.0, 0.5, 0.2])})
    assert not curves.spans_decades({"a": (steps, [1.0, 0.5, 0.0])})
    assert not curves.spans_decades({})


def test_whiskers_run_from_low_to_high_beside_each_other_and_unknown_ones_are_left_out():
    lines = {"a": ([1, 4, 16], [1, 2, 3]), "b": ([1, 4, 16], [2, 2, 2])}
    whiskers = {"a": ([1, 4, 16], [0, np.nan, 2], [2, np.nan, 4]), "b": ([1], [1], [3])}
    svg = parsed(curves.line_chart(lines, colors=COLORS, title="t", log_x=True, whiskers=whiskers))
    bars = [(bar.get("stroke"), re.match(r"M([\d.]+),([\d.]+)h4m-2,0V([\d.]+)", bar.get("d", ""))) for bar in svg.iter("path")]
    assert [color for color, _ in bars] == ["var(--run-0)"] * 2 + ["#d55e00"]
    found = [[float(v) for v in match.groups()] for _, match in bars if match]
    assert all(low > high for _, low, high in found)  # down is more on paper
    assert found[0][0] != found[2][0]
    # a from 0 to 2, b from 1 to 3, on one axis
    assert found[0][1] - found[0][2] == pytest.approx(found[2][1] - found[2][2], abs=0.2)


def test_equal_factors_lie_evenly_on_a_logarithmic_x_axis_which_marks_every_x():
    svg = parsed(curves.line_chart({"a": ([12, 48, 192], [1, 2, 3])}, colors=COLORS, title="", log_x=True))
    x = [float(pair.split(",")[0]) for pair in next(svg.iter("polyline")).get("points", "").split()]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert {"12", "48", "192"} <= {text.text for text in svg.iter("text")}
