from __future__ import annotations

import re
from xml.etree import ElementTree as Xml

import pytest

from edgeguard.report.charts import LABEL, bars, grid

HOSTILE = "$x^2$ <script>alert(1)</script> \x00\x1b 漢字"


def words(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in Xml.fromstring(svg).iter("text")]


def test_bars_say_what_they_show() -> None:
    svg = bars(["twin 4", "this engine"], [(0.25, 0.2, 0.3), (0.5, 0.4, 0.6)], [80, 100], "two bars")
    assert {"twin 4", "this engine", "25.0 % of 80", "50.0 % of 100", "100 %"} <= set(words(svg))
    assert 'aria-label="two bars"' in svg
    lengths = [
        max(xs) - min(xs)
        for xs in ([float(x) for x in re.findall(r"[ML] ([\d.]+) ", path)]
                   for path in re.findall(r'<path d="([^"]*)" style="fill: var\(--bar\)', svg))
    ]  # fmt: skip
    assert lengths[1] == pytest.approx(2 * lengths[0])


def test_a_grid_says_every_share_and_leaves_gaps() -> None:
    svg = grid(["0", "8"], ["0", "4", "8"], [[0.0, 0.5, None], [1.0, None, 0.25]], "places")
    assert sorted(words(svg)) == sorted(["0", "8", "0", "4", "8", "0", "50", "100", "25"])
    assert svg.count("fill: var(--heat)") == 3
    assert "opacity: 0.25" in svg


def test_cells_too_small_for_numbers_have_none() -> None:
    side = [str(number) for number in range(60)]
    found = words(grid(side, side, [[0.77] * 60] * 60, "places"))
    assert "77" not in found
    assert len(found) < 120


@pytest.mark.parametrize("draw", [
    lambda label: bars([label], [(0.5, 0.4, 0.6)], [9], label),
    lambda label: grid([label], [label], [[0.5]], label),
])  # fmt: skip
def test_text_stays_text_whatever_it_is(draw: object) -> None:
    svg = draw(HOSTILE)  # type: ignore[operator]
    assert "<script" not in svg
    assert "\x00" not in svg
    assert any(word.startswith("$x^2$ <script>") for word in words(svg))
    assert max(map(len, words(svg))) <= LABEL


def test_nothing_leaks_into_the_page_around_it() -> None:
    svg = bars(["a"], [(0.5, 0.4, 0.6)], [9], "x") + grid(["a"], ["b"], [[0.5]], "y")
    for part in ("http", "<style", " id=", "url(", "font-family", "clip-path", "<?xml", "<!DOCTYPE", "metadata"):
        assert part not in svg, part
    assert not re.search(r"(fill|stroke): #", svg)


def test_equal_arguments_give_equal_text() -> None:
    assert bars(["a"], [(0.5, 0.4, 0.6)], [9], "x") == bars(["a"], [(0.5, 0.4, 0.6)], [9], "x")


def test_settings_of_the_caller_neither_matter_nor_change() -> None:
    import matplotlib

    before = bars(["a"], [(0.5, 0.4, 0.6)], [9], "x")
    with matplotlib.rc_context({"axes.facecolor": "red", "axes.grid": True, "font.size": 40, "text.usetex": True}):
        assert bars(["a"], [(0.5, 0.4, 0.6)], [9], "x") == before
        assert matplotlib.rcParams["font.size"] == 40


def test_titles_wider_than_their_columns_are_slanted() -> None:
    wide, narrow = (grid(["a"] * 3, [title] * 7, [[0.5] * 7] * 3, "x") for title in ("seven-letters", "abc"))
    assert wide.count("rotate(-35") == 7
    assert "rotate(-35" not in narrow
