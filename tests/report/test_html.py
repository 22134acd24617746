from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from report_example import encoded, example_report

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
        "Undecided", "resnet20-w4", "90.0 %", "95 % interval 83.0 to 94.0 %", "45.0 %", "A-QAPA, engine access, 6x6",
        "ASR = P[engine(x_adv) != y | engine(x) = y]", "Maximum over surrogates", "unseen in training",
        "engine fooled", "twin holds", "p = 0.5", "Gradients are alive", "not run", "max_asr = 0.6", "ab" * 32,
        "cd" * 32, "edgeguard verify 'my model'", "engine: class 5", "twin: class 4", "100 of 300 images",
    ):  # fmt: skip
        assert part in page.text, part
    assert page.tags.count("h1") == 1
    assert page.tags.count("img") == 2 + 6


def test_the_verdict_and_the_three_numbers_come_first() -> None:
    text = Page(render_html(example_report())).text
    words = ("Undecided", "Clean accuracy", "Attack success rate", "Robust accuracy", "A-QAPA engine: values")
    order = [text.index(word) for word in words]
    assert order == sorted(order)


def test_nothing_comes_from_outside() -> None:
    page = Page(render_html(example_report()))
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "srcset", "action", "data"):
            assert value.startswith("data:image/png;base64,"), value
    html = render_html(example_report())
    assert "default-src 'none'" in html
    assert "@import" not in html
    assert "url(" not in html
    assert "http:" not in html
    assert "https:" not in html


def test_light_dark_narrow_and_paper() -> None:
    html = render_html(example_report())
    for part in ("prefers-color-scheme: dark", "@media print", "max-width: 760px", "width=device-width"):
        assert part in html


def poison(value: Any, key: str = "") -> Any:
    """Every text replaced by a hostile one, but for those that decide what is shown or hold pixels."""
    if isinstance(value, dict):
        kept = {name: poison(item, name) for name, item in value.items()}
        return {**kept, HOSTILE: HOSTILE} if key in ("versions", "files", "engine", "options") else kept
    if isinstance(value, list):
        return [poison(item, key) for item in value]
    return HOSTILE if isinstance(value, str) and key not in ("schema", "pixels", "mask") else value


def test_hostile_texts_are_escaped() -> None:
    html = render_html(poison(example_report()))
    page = Page(html)
    assert "script" not in page.tags
    assert page.tags.count("img") == 8
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
    assert "The gate" not in text


def test_refuses_what_is_no_report() -> None:
    with pytest.raises(InputError, match="schema"):
        render_html({})


def test_equal_reports_give_equal_pages() -> None:
    assert render_html(example_report()) == render_html(example_report())
