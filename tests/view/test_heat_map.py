from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from picture3d.view.colors import GREY, ramp_table
from picture3d.view.heat_map import HeatMap, heat_map_of, heat_map_picture, heat_map_svg
from picture3d.view.report import report_html
from picture3d.view.report_data import ReportData

SVG = "{http://www.w3.org/2000/svg}"


def shown() -> HeatMap:
    return heat_map_of("a & <b>", [[0.0, 1.0, None], [0.25, 0.5, 0.75]], ["low", "high"], ["x", "y", "z"])


def test_every_cell_has_its_colour_and_its_number_and_the_first_row_lies_lowest():
    root = ElementTree.fromstring(heat_map_svg(shown()))
    cells = [(float(r.get("x", "")), float(r.get("y", "")), r.get("fill")) for r in root.iter(f"{SVG}rect")]
    assert len(cells) == 6
    first, last = cells[0], cells[3]
    assert first[0] == last[0]
    assert first[1] > last[1], "the first row is at the bottom"
    ends = ["#{:02x}{:02x}{:02x}".format(*row) for row in (*ramp_table()[[0, -1]], GREY)]
    assert [cell[2] for cell in cells[:3]] == ends
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert [t for t in texts if t in {"0.00", "1.00", "–", "0.25", "0.50", "0.75"}] == [
        "0.00",
        "1.00",
        "–",
        "0.25",
        "0.50",
        "0.75",
    ]
    assert root.findtext(f"{SVG}title") == "a & <b>"


def test_the_picture_has_the_same_colours_in_the_same_places():
    image = np.asarray(heat_map_picture(shown(), cell=64))
    colors = {tuple(row) for row in image.reshape(-1, 3)}
    low, high = (tuple(int(v) for v in ramp_table()[i]) for i in (0, -1))
    assert {low, high} <= colors
    where = {name: np.argwhere((image == color).all(2)).mean(0) for name, color in (("low", low), ("high", high))}
    assert where["low"][1] < where["high"][1], "the first column lies left"
    assert abs(where["low"][0] - where["high"][0]) < 4, "both are in the first row"
    quarter = tuple(int(v) for v in ramp_table()[64])
    assert np.argwhere((image == quarter).all(2)).mean(0)[0] < where["low"][0], "the second row lies higher"


@pytest.mark.parametrize("size", [1, 8, 24])
def test_maps_of_any_size_fit_their_picture(size: int):
    heat = heat_map_of("all", [[0.5] * size] * size, [f"{i}.0a" for i in range(size)], [f"{i}.0a" for i in range(size)])
    image = heat_map_picture(heat)
    assert min(image.size) >= size * 64
    ElementTree.fromstring(heat_map_svg(heat))


def test_a_table_that_does_not_fit_its_names_is_refused():
    with pytest.raises(ValueError, match="2 rows of 1"):
        HeatMap("t", ((0.5,),), ("a", "b"), ("c",))
    assert math.isnan(shown().values[0][2])


def test_a_report_shows_the_maps_it_is_given_escaped_and_no_section_without_any():
    page = report_html(ReportData(title="t", comparisons=[shown()]))
    assert "Encoders compared" in page
    assert page.count("<rect") == 6
    assert "a &amp; &lt;b&gt;" in page
    assert "<b>" not in page.split("Encoders compared")[1].split("</section>")[0]
    assert "Encoders compared" not in report_html(ReportData(title="t"))
