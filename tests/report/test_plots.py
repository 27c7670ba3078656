import re
from xml.etree import ElementTree

import numpy as np
import pytest

from palimpsest.core.records import Measurement
from palimpsest.report import plots

KNOWLEDGE = Measurement("knowledge", "forget", 96.0, 21.4, 19.8, 17.0, 26.0, 40, "reference")
SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_a_panel_shows_its_numbers_as_text_and_says_them():
    svg = plots.panel(KNOWLEDGE, "k")
    assert {"before", "after", "reference", "96.0", "21.4", "19.8"} <= set(texts(svg))
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    described = {
        element.get("id"): element.text for element in root.iter() if element.tag in (f"{SVG}title", f"{SVG}desc")
    }
    assert set(root.get("aria-labelledby").split()) == set(described)
    assert "after 21.4 (17.0 to 26.0)" in described["k-desc"]


def test_colours_come_from_the_page_and_nothing_from_elsewhere():
    svg = plots.panel(KNOWLEDGE, "k") + plots.curve([3.0, 2.0, 1.0], "c", "loss")
    assert "var(--after)" in svg
    assert not re.search(r"#[0-9a-f]{6}", svg)
    assert "font-family" not in svg
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")
    assert "<style" not in svg


def test_ids_are_unique_and_every_use_finds_one():
    page = plots.panel(KNOWLEDGE, "a") + plots.panel(KNOWLEDGE, "b") + plots.curve([1.0, 2.0], "c", "loss")
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {found for pair in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page) for found in pair if found} <= set(
        ids
    )


def test_the_same_numbers_give_the_same_picture():
    assert plots.panel(KNOWLEDGE, "k") == plots.panel(KNOWLEDGE, "k")


def test_values_lie_where_the_range_says():
    """On a 0-to-100 axis, the marker of 50 is half way between those of 0 and 100."""
    lanes = [plots.Lane(str(value), float(value)) for value in (0, 50, 100)]
    svg = plots.lanes_figure(KNOWLEDGE, lanes, "k")
    x = [float(use) for use in re.findall(r'<use x="([\d.]+)" y="[\d.]+" style="fill: var\(--after\)', svg)]
    assert len(x) == 3
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=1e-3)
    assert x[2] - x[0] > 150


def test_missing_numbers_are_said_in_place():
    bare = Measurement("knowledge", "forget", None, 10.0)
    assert texts(plots.panel(bare, "k")).count("not measured") == 2


@pytest.mark.parametrize("name", ["$\\frac{", "<b>&", "方法", "a" * 200])
def test_any_name_can_be_drawn(name):
    svg = plots.lanes_figure(KNOWLEDGE, [plots.Lane(name, 3.0)], "k")
    assert any(text and name.startswith(text.rstrip("…")) for text in texts(svg))


def test_a_constant_or_negative_measurement_has_an_axis():
    for better in ("lower", "zero", "reference"):
        for value in (0.0, -3.0, 1e-9):
            plots.panel(Measurement("novel", "x", value, value, value, value, value, 2, better), "k")


def test_long_curves_are_thinned_without_losing_their_level():
    steps = np.arange(1, 50_001)
    loss = np.full(50_000, 2.0)
    thin_steps, thin = plots._thinned(steps, loss)
    assert len(thin) == len(thin_steps) <= 240
    assert np.allclose(thin, 2.0)
    assert len(plots.curve(loss, "c", "loss")) < 30_000


def test_curves_with_holes_are_drawn():
    assert "to 1 in 4 steps" in plots.curve([4.0, float("nan"), float("inf"), 1.0], "c", "loss")
    assert "no finite value" in plots.curve([float("nan")], "c", "loss")


def test_running_mean_against_plain_python():
    values = np.array([1.0, 2.0, np.nan, 4.0, 8.0])
    found = plots._running_mean(values, 1)
    assert found[0] == 1.5
    assert found[1] == 1.5
    assert np.isnan(found[2])
    assert found[3] == 6.0
    assert found[4] == 6.0


def test_a_course_names_its_lines_at_their_ends_without_overlap():
    lines = {"utility": [95.0, 80.0], "knowledge": [96.0, 21.0], "verbatim": [99.0, 20.0]}
    svg = plots.course([0, 10], lines, "c", "Sustainability")
    assert {"utility", "knowledge", "verbatim"} <= set(texts(svg))
    assert "utility 95.0, 80.0" in svg
    placed = plots._apart([80.0, 21.0, 20.0], 9.0)
    assert placed == [80.0, 29.0, 20.0]
