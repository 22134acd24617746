"""The sections of the page that look deeper: places, transfer, layers, what training saw, and what is not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeguard.report.charts import bars, grid
from edgeguard.report.figures import ATTACK_NAMES, Report, attack_name, interval, percent, steps_text
from edgeguard.report.markup import card, counted, facts, note, points, table, text
from edgeguard.statistics import wilson

MOST_CELLS = 24
"""Places of a heat map along one side; of more, the highest of each block is drawn."""
MOST_BARS = 24
SPLITS = {
    "size": "Patch size", "placement": "Placement", "family": "Kind of attack", "width": "Bit-width crafted on",
}  # fmt: skip


def heat_map(report: Report) -> str:
    """ASR by the place of the strongest universal patch."""
    found = report["heat_map"]
    if found is None:
        return note("Not measured: there is no universal patch, or no image that counts.")
    rows, columns, shares, n = found["rows"], found["columns"], found["asr"], found["n"]
    places = [(share, row, column) for row, line in zip(rows, shares, strict=True)
              for column, share in zip(columns, line, strict=True)]  # fmt: skip
    (high, *worst), (low, *best) = max(places), min(places)
    step = max(1, -(-max(len(rows), len(columns)) // MOST_CELLS))
    blocks = [
        [
            max(max(line[left : left + step]) for line in shares[top : top + step])
            for left in range(0, len(columns), step)
        ]
        for top in range(0, len(rows), step)
    ]
    drawn = grid([str(row) for row in rows[::step]], [str(column) for column in columns[::step]], blocks,
                 f"ASR from {percent(low)} to {percent(high)} by place of the patch")  # fmt: skip
    owners = [attack for attack in report["attacks"] if attack["patch"] == found["patch"]]
    what = attack_name(owners[0]).rsplit(",", 1)[0] if owners else f"patch {found['patch']}"
    pairs = (
        ("Patch", what),
        ("Worst place", f"row {worst[0]}, column {worst[1]}: {percent(high)}, {_wilson(high, n)}"),
        ("Best place", f"row {best[0]}, column {best[1]}: {percent(low)}, {_wilson(low, n)}"),
        ("Images at each place", str(n)),
        ("Places", f"{len(places)}, every {found['stride']} pixels"
                   + (f"; drawn is the highest of each {step}x{step}" if step > 1 else "")),
    )  # fmt: skip
    words = (
        "ASR in percent with the patch's top left corner at that row and column, in pixels. The worst of many places is "
        "high partly by chance; its interval does not account for that."
    )
    return f'{note(words)}<div class="split">{card(drawn)}{card(facts(pairs))}</div>'


def transfer(report: Report) -> str:
    """How well patches that were crafted on twins work on this engine, beside those crafted on the engine itself."""
    rows = [row for row in report["attacks"] if row["access"] == "transfer"]
    if not rows:
        return note("Not measured: no patch was crafted on a surrogate.")
    kinds = {(row["name"], row["patch_size"], row["placement"]) for row in rows}
    beside = [row for row in report["attacks"] if row["access"] == "engine"
              and (row["name"], row["patch_size"], row["placement"]) in kinds]  # fmt: skip
    chosen = sorted([*rows, *beside], key=lambda row: -float(row["asr"]))[:MOST_BARS]
    shares = [(row["asr"], *row["ci95"]) for row in chosen]
    drawn = bars([_transfer_label(row, kinds) for row in chosen], shares, [row["n"] for row in chosen],
                 "ASR on this engine by what the patch was crafted on")  # fmt: skip
    hidden = len(rows) + len(beside) - len(chosen)
    words = f"ASR on this engine (target {report['artifact']['target']}, width {report['artifact']['width']}) by what the patch "
    words += "was crafted on, with 95 % intervals."
    words += f" The {hidden} weakest are not drawn." if hidden else ""
    best = facts(
        (
            f"Maximum over surrogates ({len(row['surrogates'])}): {ATTACK_NAMES.get(row['name'], row['name'])}, "
            f"{row['patch_size']}x{row['patch_size']}, {row['placement']}",
            f"{percent(row['asr'])}, {interval(row['ci95'])}, n = {row['n']}, crafted on {row['source']}",
        )
        for row in report["aggregated"]
    )
    return f'{note(words)}<div class="split">{card(drawn)}{card(best)}</div>'


def _transfer_label(row: Mapping[str, Any], kinds: set[tuple[str, int, str]]) -> str:
    origin = "this engine" if row["access"] == "engine" else f"twin {row['source']}"
    names, sizes, placements = ({kind[axis] for kind in kinds} for axis in range(3))
    parts = [origin]
    parts += [ATTACK_NAMES.get(row["name"], row["name"])] if len(names) > 1 else []
    parts += [f"{row['patch_size']}px"] if len(sizes) > 1 else []
    parts += [row["placement"]] if len(placements) > 1 and row["placement"] != "optimized" else []
    return ", ".join(parts)


def divergence(report: Report) -> str:
    """Where engine and twin part, layer by layer."""
    found = report["divergence"]
    if found is None:
        return note("Not measured: it needs the twin and a universal patch.")
    if found["reason"] is not None or not found["layers"]:
        return note(f"Not measured: {found['reason'] or 'no layer could be read'}.")
    layers = found["layers"]
    apart = [layer for layer in layers if min(layer["clean"]["equal"], layer["patched"]["equal"]) < 1]
    head = (("Layer", ""), ("Equal, clean", "n"), ("Equal, patched", "n"), ("Integers by steps apart, patched", ""))
    words = (
        f"Integers of {len(layers)} layers of the engine against those of its twin, on {found['n']} images without and "
        "with a patch. An early difference travels on: the first layer that differs is where to look."
    )
    if apart:
        verdict = f"{len(apart)} of {len(layers)} layers differ; the first is {apart[0]['layer']}."
        shown = card(f"<p><b>{text(verdict)}</b></p>", table(head, map(_layer, apart)))
    else:
        shown = card(f"<p><b>All {len(layers)} layers are identical, integer for integer, clean and patched.</b></p>")
    every = f"<details><summary>All {len(layers)} layers</summary>{table(head, map(_layer, layers))}</details>"
    skipped = found.get("skipped") or []
    unread = [f"{entry['tensor']}: {entry['reason']}" for entry in skipped]
    missing = card("<p><b>Not compared</b></p>", points(unread)) if unread else ""
    return note(words) + shown + card(every) + missing


def _layer(layer: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{text(layer['layer'])}<small>{text(layer['op'])}</small>",
        *(
            f"{_share(layer[kind])}<small>of {sum(layer[kind]['steps'].values()):,}</small>"
            for kind in ("clean", "patched")
        ),
        text(steps_text(layer["patched"]["steps"])),
    )


def _share(entry: Mapping[str, Any]) -> str:
    """A share of equal integers; one that is not 1 never reads as 100 %."""
    equal = 100 * float(entry["equal"])
    return "100 %" if entry["equal"] == 1 else f"{min(equal, 99.9999):.4f} %"


def seen_unseen(report: Report) -> str:
    """The strongest attack that training saw against the strongest that it did not, in four ways."""
    rows = [
        (text(SPLITS.get(entry["split"], entry["split"])), *(_rate(entry[side]) for side in ("seen", "unseen")))
        for entry in report["seen_unseen"]
    ]
    if not rows:
        return note("Not known: the artifact does not say what it was trained against.")
    head = (("Split by", ""), ("Seen in training, strongest", "meter"), ("Unseen, strongest", "meter"))
    words = (
        "A defence that only knows its training attacks shows here: a much higher ASR on the right than on the left."
    )
    return note(words) + card(table(head, rows))


def _rate(entry: Mapping[str, Any] | None) -> str:
    return "none tried" if entry is None else counted(entry["asr"], entry["ci95"], entry["n"], bar=True)


def advice(report: Report) -> str:
    """What more images or a longer search would settle."""
    if not report["advice"]:
        return note(
            "No sign of it: no rule is left open by its interval, the highest ASR is known well, and no search was still finding "
            "images in its last restart. More steps may still find some."
        )
    return card(points(report["advice"]))


def untested(report: Report) -> str:
    """What this report does not show."""
    return card(points(limits(report)))


def limits(report: Report) -> list[str]:
    """What was not tested, and what no such test can show, in sentences."""
    rows = report["attacks"]
    found = []
    if not report["status"]["complete"]:
        found.append(f"Everything after the failure: {report['status']['reason']}.")
    for access, what in (("transfer", "patches crafted on twins"), ("engine", "gradients at the engine's own values"),
                         ("query", "attacks on the engine's outputs alone, without any gradient")):  # fmt: skip
        if not any(row["access"] == access for row in rows):
            found.append(f"No {access} access: {what}.")
    found += [f"{one['attack']}: {one['reason']}." for one in report.get("skipped") or []]
    tried = {row["name"] for row in rows}
    missing = [name for key, name in ATTACK_NAMES.items() if key not in tried and key not in ("replay", "noise")]
    found += [f"Attacks not tried: {', '.join(missing)}."] if missing else []
    found += _placement_limits(rows)
    sizes = sorted({f"{row['patch_size']}x{row['patch_size']}" for row in rows}, key=lambda size: (len(size), size))
    found.append(f"Patches of other sizes than {', '.join(sizes)} pixels, of other shapes, and several at once.")
    if all(row.get("target") is None for row in rows):
        found.append("Targeted attacks, which push images to one chosen class.")
    data = report["data"]
    if data["n"] < data["of"]:
        found.append(f"{data['of'] - data['n']:,} of the {data['of']:,} images of {data['name']}, and any other data.")
    not_run = [check["check"] for check in report["trust"] if check["passed"] is None]
    found += [f"Trust checks that did not run: {', '.join(not_run)}."] if not_run else []
    found.append(
        "Printed patches before a camera: pixels of a patch replace pixels of an image, without light or lens."
    )
    found.append("Attacks nobody has thought of yet. These rates say what known attacks reach, which bounds robustness from above; "
                 "a bound against every patch is what edgeguard certify gives.")  # fmt: skip
    return found


def _placement_limits(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    universal = [row for row in rows if row["scope"] == "universal"]
    strides = {row.get("stride") for row in universal if row["placement"] == "worst"}
    found = []
    if universal and not strides:
        found.append("Universal patches at their worst place: they were judged at other places only.")
    coarse = sorted(stride for stride in strides if isinstance(stride, int) and stride > 1)
    found += [f"Places between those of the grid, whose stride is {coarse[-1]} pixels."] if coarse else []
    if len(universal) == len(rows):
        found.append("Patches made for one image each, which are far stronger than universal ones.")
    return found


def _wilson(share: float, n: int) -> str:
    return interval(wilson(min(n, round(share * n)), n))
