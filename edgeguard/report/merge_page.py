"""A merged report as one HTML page, and as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeguard.report.figures import ACCESS_NAMES, ATTACK_NAMES, attack_name, interval, percent
from edgeguard.report.html import page, section
from edgeguard.report.markup import card, counted, facts, note, printable, small, table, text

SAME = {True: ("good", "the same count"), False: ("unknown", "another count")}
WORDS = (
    "Every rate is of one engine, on one machine, at one access, with its own count and interval. Nothing is averaged over "
    "engines, accesses or places."
)


def render_merged(document: Mapping[str, Any]) -> str:
    """The page on what `merge` returned, as text to be written in UTF-8."""
    artifact, data, cells = document["artifact"], document["data"], document["cells"]
    parts = [
        ("sources", "Where the figures come from", _sources(document["sources"])),
        ("rates", "Every rate", _rates(document)),
        ("same", "The same patches on several engines", _same(document)),
        ("meaning", "What the figures mean", _definitions(document)),
    ]
    strongest = cells[document["highest"]]
    links = " ".join(f'<a href="#{anchor}">{text(title)}</a>' for anchor, title, _ in parts)
    name = _name(document)
    letters = len(document["sources"])
    header = (
        f'<p class="brand"><b>EdgeGuard</b> merged report of {letters} verifications</p><h1>{text(name)}</h1>'
        f"<p>{text(_highest(strongest))}</p><nav>{links}</nav>"
    )
    identity = card(facts((
        ("Integer graph, SHA-256", artifact["graph_sha256"]),
        *((f"{kind} of report {one['letter']}, SHA-256 of its manifest", one[key])
          for one in document["sources"] for kind, key in (("Artifact", "artifact_sha256"), ("Twin", "twin_sha256")) if one[key]),
        ("Judged on", f"{data['n']} of {data['of']} images of {data['name']}, the same in all reports"),
        ("SHA-256 of the data", data["sha256"]),
    )))  # fmt: skip
    body = "".join(section(*part) for part in (*parts, ("hashes", "What was merged", identity)))
    return page(text(f"EdgeGuard merged report: {name}"), header, body, document["edgeguard"])


def format_merged(document: Mapping[str, Any]) -> str:
    """What `merge` returned, as lines of text."""
    data, cells = document["data"], document["cells"]
    lines = [
        f"{_name(document)}; {data['n']} of {data['of']} images of {data['name']}",
        "",
    ]
    for one in document["sources"]:
        clean = one["clean"]
        lines += [f"{one['letter']}: {one['engine']} on {one['machine']}: {one['executes']}. {one['verdict']['sentence']}.",
                  f"   clean {percent(clean['accuracy'])} ({interval(clean['ci95'])}, n = {clean['n']})"]  # fmt: skip
        lines += [f"   incomplete: {one['reason']}"] if not one["complete"] else []
        lines += [f"   not tried: {skipped['attack']}; {skipped['reason']}" for skipped in one["skipped"]]
    rows = [("report", "attack", "access", "size", "placement", "ASR", "95 % interval", "n", "robust", "n"),
            *(_line(cell) for cell in cells)]  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += ["", *("  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip() for row in rows), ""]
    equal = sum(group["equal"] for group in document["side_by_side"])
    if document["side_by_side"]:
        count = len(document["side_by_side"])
        lines.append(f"The same patches on several engines: {count} measure{'s' * (count != 1)}, {equal} with the same count.")
    lines.append(_highest(cells[document["highest"]]))
    lines += [words["words"] for words in document["definitions"].get("asr", [])]
    return "\n".join(printable(line) for line in lines) + "\n"


def _name(document: Mapping[str, Any]) -> str:
    executed = dict.fromkeys(one["executes"] for one in document["sources"])
    return f"{'; '.join(executed)}; {document['artifact']['width']} bit"


def _highest(cell: Mapping[str, Any]) -> str:
    rate = f"{percent(cell['asr'])} ({interval(cell['ci95'])}, n = {cell['n']})"
    return f"Highest ASR: {rate}, {attack_name({**cell, 'name': cell['attack']})}, in report {cell['source']}."


def _crafted(cell: Mapping[str, Any]) -> tuple[str, ...]:
    """How a patch came about, where that is not its access here, in phrases."""
    if cell["access"] != "replay":
        return (f"crafted on {cell['crafted']['source']}",) if cell["crafted"]["source"] else ()
    if cell["crafted"] is None:
        return (f"from the file {cell['file']}",)
    source = f" on {cell['crafted']['source']}" if cell["crafted"]["source"] else ""
    return f"{cell['file']}, crafted", f"at {cell['crafted']['access']} access{source}"


def _line(cell: Mapping[str, Any]) -> tuple[str, ...]:
    made = f" ({cell['crafted']['access']})" if cell["access"] == "replay" and cell["crafted"] else ""
    return (
        cell["source"], ATTACK_NAMES.get(cell["attack"], cell["attack"]), f"{cell['access']}{made}", str(cell["patch_size"]),
        cell["placement"], percent(cell["asr"]), interval(cell["ci95"]), str(cell["n"]), percent(cell["robust_accuracy"]),
        str(cell["robust_n"]),
    )  # fmt: skip


def _sources(sources: Sequence[Mapping[str, Any]]) -> str:
    head = (("Report", ""), ("Machine", ""), ("Clean accuracy", "n"), ("Survival", ""), ("Trust", ""), ("Verdict", ""))
    return card(table(head, map(_source, sources)))


def _source(one: Mapping[str, Any]) -> tuple[str, ...]:
    trust, clean = one["trust"], one["clean"]
    notes = [] if one["complete"] else [f"incomplete: {one['reason']}"]
    notes += [f"not tried: {skipped['attack']}" for skipped in one["skipped"]]
    return (
        f"{one['letter']}: {text(one['engine'])}{small(one['executes'] + ',', 'with a twin' if one['twin'] else 'without a twin')}",
        f"{text(one['machine'])}{small('edgeguard ' + one['edgeguard'], 'seed ' + str(one['seed']))}",
        counted(clean["accuracy"], clean["ci95"], clean["n"]),
        text(one["survival"] or "not measured"),
        f"{trust['passed']} of {trust['passed'] + trust['failed']} checks passed{small(str(trust['not_run']) + ' did not run')}",
        f"{text(one['verdict']['sentence'])}{small(*notes) if notes else ''}",
    )


def _rates(document: Mapping[str, Any]) -> str:
    engines = {one["letter"]: one["engine"] for one in document["sources"]}
    head = (("Report", ""), ("Attack", ""), ("Access", ""), ("Placement", ""), ("ASR", "meter"), ("Robust accuracy", "n"))
    ranked = sorted(document["cells"], key=lambda cell: -float(cell["asr"]))
    return card(note(WORDS), table(head, (_cell(cell, engines) for cell in ranked)))


def _cell(cell: Mapping[str, Any], engines: Mapping[str, str]) -> tuple[str, ...]:
    side = cell["patch_size"]
    own = ", a patch for each image" if cell["scope"] == "per-image" else ""
    digest = cell["patch_sha256"]
    return (
        f"{cell['source']}{small(engines[cell['source']])}",
        f"{text(ATTACK_NAMES.get(cell['attack'], cell['attack']))}{small(f'{side}x{side}{own}')}"
        + (f"<code>{text(digest[:12])}</code>" if digest else ""),
        f"{text(ACCESS_NAMES.get(cell['access'], cell['access']))}{small(*_crafted(cell))}",
        f"{text(cell['placement'])}{small(str(cell['places']) + ' tried')}",
        counted(cell["asr"], cell["ci95"], cell["n"], bar=True),
        counted(cell["robust_accuracy"], cell["robust_ci95"], cell["robust_n"]),
    )


def _same(document: Mapping[str, Any]) -> str:
    groups, cells = document["side_by_side"], document["cells"]
    if not groups:
        return note("No patch was shown to the engines of several reports.")
    letters = [one["letter"] for one in document["sources"]]
    head = (("Patch", ""), *((f"Report {letter}", "n") for letter in letters), ("", ""))
    return card(note("The same patches at the same places of the same images."),
                table(head, (_row(group, cells, letters) for group in groups)))  # fmt: skip


def _row(group: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], letters: Sequence[str]) -> tuple[str, ...]:
    chosen = [cells[number] for number in group["cells"]]
    first, (mood, words) = chosen[0], SAME[group["equal"]]
    rates = {
        letter: "".join(
            f"<p>{counted(one['asr'], one['ci95'], one['n'])}{small(one['access'])}</p>"
            for one in chosen
            if one["source"] == letter
        )
        for letter in letters
    }
    side = first["patch_size"]
    return (
        f"{text(ATTACK_NAMES.get(first['attack'], first['attack']))}{small(f'{side}x{side},', first['placement'] + ' placement')}"
        f"<code>{text(first['patch_sha256'][:12])}</code>",
        *(rates[letter] or "not tried" for letter in letters),
        f'<span class="mark {mood}">{words}</span>',
    )


def _definitions(document: Mapping[str, Any]) -> str:
    pairs = [
        (name if len(found) == 1 else f"{name}, in report {' and '.join(words['sources'])}", words["words"])
        for name, found in document["definitions"].items()
        for words in found
    ]
    return card(facts(pairs))
