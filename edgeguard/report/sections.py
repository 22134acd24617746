"""The sections of the HTML page. Every function returns HTML in which all text of the report is escaped."""

from __future__ import annotations

import base64
import binascii
import html
import math
import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import InputError
from edgeguard.report.figures import (
    ACCESS_NAMES,
    ATTACK_NAMES,
    CHECK_NAMES,
    Report,
    attack_name,
    interval,
    percent,
    steps_sentence,
    strongest,
)
from edgeguard.report.png import encode

MARKS = {True: ("good", "✓ passed"), False: ("bad", "✗ failed"), None: ("unknown", "○ not run")}
DEFINED = (
    ("asr", "Attack success rate (ASR)"), ("robust_accuracy", "Robust accuracy"), ("ci95", "Intervals"),
    ("random", "Random placement"), ("worst", "Worst placement"),
)  # fmt: skip
MAX_SIDE = 4096


def text(value: object) -> str:
    """Any value as escaped text."""
    return html.escape(str(value), quote=True)


def mark(passed: bool | None) -> str:
    mood, words = MARKS[passed]
    return f'<span class="mark {mood}">{words}</span>'


def _decode(encoded: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Base64 text to uint8 of a shape.

    Raises:
        InputError: not base64, or of another size than it says.
    """
    if not all(1 <= side <= MAX_SIDE for side in shape):
        raise InputError(f"an image of the report has an impossible size: {shape}")
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise InputError(f"an image of the report is not base64: {exc}") from exc
    if len(data) != math.prod(shape):
        raise InputError(f"an image of the report holds {len(data)} bytes, its shape {shape} needs {math.prod(shape)}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _image(pixels: NDArray[np.uint8], mask: NDArray[np.bool_] | None, alt: str) -> str:
    data = base64.b64encode(encode(pixels, mask)).decode("ascii")
    return f'<img alt="{text(alt)}" src="data:image/png;base64,{data}">'


def attack_table(report: Report) -> str:
    """Every attack with intervals and counts, and what each figure means."""
    head = (
        ("Attack", ""), ("Patch", ""), ("Placement", ""), ("ASR on the engine", ""), ("ASR on the twin", "n"),
        ("Robust accuracy", "n"), ("n", "n"), ("Queries", "n"),
    )  # fmt: skip
    titles = "".join(f'<th scope="col" class="{kind}">{text(title)}</th>' for title, kind in head)
    top = strongest(report)
    rows = "".join(_attack_row(attack, attack is top) for attack in report["attacks"])
    meanings = report["definitions"]
    pairs = [(label, meanings[key]) for key, label in DEFINED if key in meanings]
    pairs += [
        (
            f"Maximum over surrogates, {row['patch_size']}x{row['patch_size']}, {row['placement']} placement",
            f"{percent(row['asr'])}, crafted on {row['source']}",
        )
        for row in report["aggregated"]
        if len(row["surrogates"]) > 1
    ]
    table = f'<table class="wide"><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="card">{table}</div><div class="card">{_facts(tuple(pairs))}</div>'


def _attack_row(attack: Mapping[str, Any], top: bool) -> str:
    seen = {True: "seen in training", False: "unseen in training", None: "pixels"}[attack["seen"]]
    access = ACCESS_NAMES.get(attack["access"], attack["access"])
    source = f" ({attack['source']})" if attack["source"] else ""
    places = f"{attack['places']} place{'s' * (attack['places'] != 1)} per image"
    low, high = (min(max(100 * end, 0.0), 100.0) for end in attack["ci95"])
    bar = (
        f'<span>{percent(attack["asr"])}<span class="track"><i style="width:{100 * attack["asr"]:.2f}%"></i>'
        f'<b style="left:{low:.2f}%;right:{100 - high:.2f}%"></b></span>'
        f"<small>{interval(attack['ci95'])}</small></span>"
    )
    robust = f"<span>{percent(attack['robust_accuracy'])}<small>{interval(attack['robust_ci95'])}</small></span>"
    size = attack["patch_size"]
    cells = (
        (
            "title",
            "Attack",
            f"{text(ATTACK_NAMES.get(attack['name'], attack['name']))}<small>{text(access + source)}</small>",
        ),
        ("", "Patch", f"<span>{size}x{size}<small>{seen}</small></span>"),
        ("", "Placement", f"<span>{text(attack['placement'])}<small>{places}</small></span>"),
        ("meter", "ASR on the engine", bar),
        ("n", "ASR on the twin", percent(attack["twin_asr"])),
        ("n", "Robust accuracy", robust),
        ("n", "n", str(attack["n"])),
        ("n", "Queries", str(attack["queries"])),
    )
    return (
        "<tr>"
        + "".join(f'<td class="{kind}" data-label="{label}">{body}</td>' for kind, label, body in cells)
        + "</tr>"
    )


def patch_images(report: Report) -> str:
    """Every patch, enlarged, with the highest ASR it reached."""
    figures = []
    for number, block in enumerate(report["patches"]):
        rows = [attack for attack in report["attacks"] if attack["patch"] == number]
        if not rows:
            continue
        best = max(rows, key=lambda row: float(row["asr"]))
        access = "" if best["access"] in ("none", best["name"]) else f", {best['access']}"
        height, width = block["height"], block["width"]
        mask = _decode(block["mask"], (height, width)) > 0
        image = _image(_decode(block["pixels"], (3, height, width)), mask, f"patch of {height}x{width} pixels")
        label = f"<b>{text(ATTACK_NAMES.get(best['name'], best['name']))}</b>{text(access)}"
        detail = f"<span>{height}x{width}, up to {percent(best['asr'])}</span>"
        figures.append(f"<figure>{image}<figcaption>{label}{detail}</figcaption></figure>")
    note = '<p class="note">Enlarged; each pixel of the patch replaces one pixel of the image.</p>'
    return f'{note}<div class="card pictures patches">{"".join(figures)}</div>'


def example_images(report: Report) -> str:
    """The first six images that count, under the strongest attack, with both predictions."""
    images = report["examples"]["images"]
    attack = report["attacks"][report["examples"]["attack"]]
    figures = []
    for entry in images:
        label, engine, twin = entry["label"], entry["engine"], entry["twin"]
        mood, words = ("bad", "✗ fooled") if entry["fooled"] else ("good", "✓ holds")
        simulated = "not run" if twin is None else twin["name"]
        caption = (
            f'<span class="mark {mood}">{words}</span><span>truth: <b>{text(label["name"])}</b></span>'
            f"<span>engine: <b>{text(engine['name'])}</b></span><span>twin: <b>{text(simulated)}</b></span>"
        )
        alt = f"image {entry['index']}, a {label['name']}, with the patch"
        image = _image(_decode(entry["pixels"], (3, entry["height"], entry["width"])), None, alt)
        figures.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    note = f"The first {len(images)} judged images that count, not picked, under {attack_name(attack)}."
    return f'<p class="note">{text(note)}</p><div class="card pictures">{"".join(figures)}</div>'


def survival(report: Report) -> str:
    """The 2x2 table of engine against twin, and the verdict."""
    found = report["survival"]
    if not found:
        return '<p class="note">Not measured: it needs the twin, and the twin needs torch.</p>'
    flips = found["flips"]
    mood = {"survived": "good", "did not survive": "bad"}.get(found["verdict"], "unknown")
    identical = "every logit bit-identical" if found["bit_identical"] else "logits differ"
    facts = _facts(
        (
            ("Difference in ASR", f"{percent(found['delta_asr'], True)}, {interval(found['ci95'], True)}"),
            ("McNemar's exact test", f"p = {found['mcnemar_p']:.3g}"),
            ("Images compared", str(found["n"])),
            ("Engine and twin", identical),
            *([] if found["bit_identical"] else [("Clean logits apart, in integer steps", steps_sentence(report))]),
            ("Attack", attack_name(report["attacks"][found["attack"]])),
        )
    )
    table = (
        '<table class="flips"><thead><tr><td></td><th scope="col">twin fooled</th><th scope="col">twin holds</th></tr>'
        f'</thead><tbody><tr><th scope="row">engine fooled</th><td>{flips["both"]}</td>'
        f'<td class="apart">{flips["engine_only"]}</td></tr><tr><th scope="row">engine holds</th>'
        f'<td class="apart">{flips["twin_only"]}</td><td>{flips["neither"]}</td></tr></tbody></table>'
    )
    verdict = f'<p class="note"><span class="mark {mood}">{text(found["verdict"])}.</span> '
    definition = f"{text(report['definitions'].get('survival', ''))}.</p>"
    return (
        f'{verdict}{definition}<div class="split"><div class="card">{table}</div><div class="card">{facts}</div></div>'
    )


def trust_checks(report: Report) -> str:
    items = "".join(
        f"<li>{mark(check['passed'])}<span>{text(CHECK_NAMES.get(check['check'], check['check']))}"
        f"<small>{text(check['detail'])}</small></span></li>"
        for check in report["trust"]
    )
    return f'<div class="card"><ul class="checks">{items}</ul></div>'


def gate_rules(report: Report) -> str:
    items = "".join(
        f"<li>{mark(rule['passed'])}<span><code>{text(rule['rule'])} = {text(_toml(rule['limit']))}</code>"
        f"<small>{text(rule['detail'])}</small></span></li>"
        for rule in report["gate"]["rules"]
    )
    note = '<p class="note">Numbers are decided by the unfavourable end of their 95 % interval.</p>'
    return f'{note}<div class="card"><ul class="checks">{items}</ul></div>'


def _toml(value: object) -> str:
    return "true" if value is True else str(value)


def environment(report: Report) -> str:
    """Data, versions, hashes, options and the command."""
    artifact, surroundings, data, options = (report[key] for key in ("artifact", "environment", "data", "options"))
    crafting = data["crafting"]
    versions = ", ".join(f"{name} {version}" for name, version in surroundings["versions"].items() if version)
    engine = "; ".join(f"{name} {_flat(value)}" for name, value in surroundings["engine"].items())
    facts = _facts(
        (
            ("Judged on", f"{data['n']} of {data['of']} images of {data['name']}"),
            ("Crafted on", f"{crafting['n']} other images of {crafting['name']}" if crafting else "nothing crafted"),
            ("Strongest attack", attack_name(strongest(report))),
            ("Versions", versions),
            ("Engine", engine),
            ("Platform", surroundings["platform"]),
            ("Options", "; ".join(f"{name} {_flat(value)}" for name, value in options.items())),
            ("Artifact, SHA-256 of its manifest", artifact["sha256"]),
            *((f"SHA-256 of {name}", digest) for name, digest in artifact["files"].items()),
            ("SHA-256 of the data", data["sha256"]),
        )
    )
    command = shlex.join(surroundings["command"])
    repeat = f"<pre>{text(command)}</pre>" if command else ""
    return f'<div class="card">{facts}{repeat}</div>'


def _flat(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _facts(pairs: tuple[tuple[str, object], ...]) -> str:
    return f'<dl class="facts">{"".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in pairs)}</dl>'
