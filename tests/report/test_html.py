from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from report_example import encoded, example_report, minimal_report

from edgeguard.errors import InputError
from edgeguard.report.html import render_html

VOID = {"meta", "img", "br", "link", "input", "hr"}
HOSTILE = "\"><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>'&"


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"unclosed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_holds_what_it_must() -> None:
    page = Page(render_html(example_report()))
    for part in (
        "Undecided", "resnet20-w4", "90.0 %", "95 % interval 83.0 to 94.0 %, n = 100", "45.0 %",
        "A-QAPA, engine access, 6x6",
        "ASR = P[engine(x_adv) != y | engine(x) = y]", "Maximum over surrogates (2): A-QAPA", "unseen in training",
        "40 of 90; 40.0 to 50.0 %",
        "engine fooled", "twin holds", "p = 0.5", "Gradients are alive", "not run", "max_asr = 0.6", "ab" * 32,
        "cd" * 32, "edgeguard verify 'my model'", "engine: class 5", "twin: class 4", "no patch: class 3",
        "100 of 300 images", "12.5 s", "1.3 min", "300 steps", "1,200 queries", "a patch for each image", "optimized",
        "Worst place row 1, column 1: 45.0 %, 34.6 to 54.7 %", "2 of 3 layers differ; the first is layer1.0.conv2",
        "99.7070 % of 4,096", "0: 4084, 1: 12", "none tried", "200 images would decide it", "02" * 6,
        "Attacks not tried: GAP, LaVAN, Patch-RS.", "No query access", "at their worst place", "200 of the 300 images of digits",
        "Trust checks that did not run: deterministic.", "Seed 7",
    ):  # fmt: skip
        assert part in page.text, part
    assert page.tags.count("h1") == 1
    assert page.tags.count("img") == 2 + 6


def test_the_verdict_and_the_three_numbers_come_first() -> None:
    text = Page(render_html(example_report())).text
    words = ("Undecided", "Clean accuracy", "Attack success rate", "Robust accuracy", "A-QAPA engine access")
    order = [text.index(word) for word in words]
    assert order == sorted(order)


def test_nothing_comes_from_outside() -> None:
    page = Page(render_html(example_report()))
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "srcset", "action", "data"):
            assert value.startswith(("data:image/png;base64,", "#")), value
    html = render_html(example_report())
    assert "default-src 'none'" in html
    assert "@import" not in html
    assert "url(" not in html
    assert "http:" not in html
    assert "https:" not in html


def test_light_dark_narrow_and_paper() -> None:
    html = render_html(example_report())
    for part in ("prefers-color-scheme: dark", "@media print", "max-width: 880px", "width=device-width"):
        assert part in html


def poison(value: Any, key: str = "") -> Any:
    """Every text replaced by a hostile one, but for those that decide what is shown or hold pixels."""
    if isinstance(value, dict):
        kept = {name: poison(item, name) for name, item in value.items()}
        return {**kept, HOSTILE: HOSTILE} if {"python", "model.onnx", "runtime", "accesses"} & kept.keys() else kept
    if isinstance(value, list):
        return [poison(item, key) for item in value]
    return HOSTILE if isinstance(value, str) and key not in ("schema", "pixels", "mask", "scope") else value


def test_hostile_texts_are_escaped() -> None:
    report = poison(example_report())
    report["attacks"][1]["access"] = "transfer"
    html = render_html(report)
    page = Page(html)
    assert "script" not in page.tags
    assert page.tags.count("img") == 8
    assert page.tags.count("svg") == 2
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "<script" not in html
    assert "alert(1)" in page.text


def test_images_are_the_pixels_of_the_report() -> None:
    image = pytest.importorskip("PIL.Image")
    report = example_report()
    page = Page(render_html(report))
    sources = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    with image.open(io.BytesIO(base64.b64decode(sources[0].split(",")[1]))) as opened:
        pixels = np.asarray(opened)[..., :3].transpose(2, 0, 1)
    assert pixels.tobytes() == base64.b64decode(report["patches"][0]["pixels"])


@pytest.mark.parametrize(
    "change", [{"pixels": "@@@"}, {"pixels": encoded(3, 5, 6)}, {"height": 0}, {"height": 10**9}, {"mask": "AA=="}]
)
def test_broken_images_are_refused(change: dict[str, Any]) -> None:
    report = example_report()
    report["patches"][0].update(change)
    with pytest.raises(InputError, match="an image of the report"):
        render_html(report)


def test_parts_that_were_not_measured() -> None:
    report = example_report(survival=None, gate=None)
    report["clean"].update(twin=None, agreement=None, bit_identical=None, steps=None)
    for attack in report["attacks"]:
        attack.update(twin_asr=None, survival=None, seen=None, source=None)
    for entry in report["examples"]["images"]:
        entry["twin"] = None
    text = Page(render_html(report)).text
    assert "Not measured" in text
    assert "The gate " not in text


def test_as_little_as_there_can_be() -> None:
    text = Page(render_html(minimal_report())).text
    for part in (
        "Not accepted", "The engine failed at a replayed patch: it gave 9 logits.", "No trust check ran", "Replay",
        "Everything after the failure", "The command was not recorded", "The report holds no images",
        "does not say what it was trained against", "no patch was crafted on a surrogate",
    ):  # fmt: skip
        assert part in text, part
    assert text.index("it gave 9 logits") < text.index("Clean accuracy")


def test_a_report_of_patches_for_each_image_only() -> None:
    report = example_report(patches=[], heat_map=None)
    report["attacks"] = [{**row, "patch": None, "scope": "per-image"} for row in report["attacks"]]
    text = Page(render_html(report)).text
    assert "No universal patch" in text
    assert "Patches made for one image each" not in text


def test_engines_that_cannot_be_looked_into_and_layers_that_are_equal() -> None:
    report = example_report()
    report["divergence"]["layers"] = report["divergence"]["layers"][:1]
    report["divergence"]["skipped"] = [{"tensor": "pool", "reason": "fused"}]
    text = Page(render_html(report)).text
    assert "All 1 layers are identical" in text
    assert "pool: fused" in text
    report["divergence"].update(layers=[], reason="the plan hides them")
    assert "Not measured: the plan hides them." in Page(render_html(report)).text


def test_links_lead_somewhere() -> None:
    page = Page(render_html(example_report()))
    anchors = {value for _, name, value in page.attributes if name == "id"}
    links = [value[1:] for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert links
    assert set(links) <= anchors


def test_large_heat_maps_are_drawn_in_blocks_of_the_worst_place() -> None:
    report = example_report()
    shares = np.zeros((60, 60))
    shares[59, 59] = 0.9
    report["heat_map"].update(rows=list(range(60)), columns=list(range(60)), asr=shares.tolist())
    html = render_html(report)
    assert "drawn is the highest of each 3x3" in html
    assert "row 59, column 59: 90.0 %" in html
    assert html.count('opacity: 0.9"') == 1


def test_refuses_what_is_no_report() -> None:
    with pytest.raises(InputError, match="schema"):
        render_html({})


def test_equal_reports_give_equal_pages() -> None:
    assert render_html(example_report()) == render_html(example_report())
