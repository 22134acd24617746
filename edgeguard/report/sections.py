"""The sections of the page on one engine: attacks, pictures, survival, trust, gate. Each returns HTML."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from edgeguard.report.figures import (
    ACCESS_NAMES,
    ATTACK_NAMES,
    CHECK_NAMES,
    Report,
    attack_name,
    interval,
    member_rates,
    of_images,
    percent,
    seconds,
    steps_sentence,
    strongest,
)
from edgeguard.report.markup import card, checks, counted, decode, facts, image, note, small, table, text

DEFINED = (
    ("asr", "Attack success rate (ASR)"), ("robust_accuracy", "Robust accuracy"), ("ci95", "Intervals"), ("pool", "Pool"),
    ("random", "Random placement"), ("worst", "Worst placement"), ("optimized", "Optimized placement"),
    ("per-image", "A patch for each image"), ("transfer", "Transfer access"), ("engine", "Engine access"),
    ("query", "Query access"),
)  # fmt: skip
DEFINED_ACCESS = ("transfer", "engine", "query")
SEEN = {True: "seen in training", False: "unseen in training", None: "pixels"}
HEAD = (
    ("Attack", ""), ("Patch", ""), ("Placement", ""), ("ASR on the engine", "meter"), ("ASR on the twin", "n"),
    ("Robust accuracy", "n"), ("Effort", "n"),
)  # fmt: skip


def attack_table(report: Report) -> str:
    """Every attack with counts, intervals and effort, and what each figure means."""
    durations = report["timing"]["attacks"]
    ranked = sorted(zip(report["attacks"], durations, strict=True), key=lambda pair: -float(pair[0]["asr"]))
    meanings = report["definitions"]
    pairs = [(label, meanings[key]) for key, label in DEFINED if key in meanings]
    total = f"{seconds(report['timing']['total'])} in all, checks included; an attack's time is that of crafting and judging."
    return card(table(HEAD, (_attack_cells(*pair) for pair in ranked))) + card(facts((*pairs, ("Time", total))))


def _attack_cells(attack: Mapping[str, Any], spent: float) -> tuple[str, ...]:
    access = attack["access"]
    access = f"{access} access" if access in DEFINED_ACCESS else ACCESS_NAMES.get(access, access)
    source = f", {_origin(attack)}" if attack["source"] else ""
    name = ATTACK_NAMES.get(attack["name"], attack["name"])
    own = ", a patch for each image" if attack["scope"] == "per-image" else ""
    places = f"{attack['places']} place{'s' * (attack['places'] != 1)} per image"
    found = attack["survival"]
    twin = percent(attack["twin_asr"])
    if found:
        apart = (f"engine {percent(found['delta_asr'], True)};", interval(found["ci95"], True) + ";")
        twin += small(*(("bit-identical;",) if found["bit_identical"] else apart), f"n = {found['n']}")
    by_member = member_rates(attack)
    effort = [f"{attack['steps']:,} steps"] if attack["steps"] is not None else []
    effort += [f"{attack['queries']:,} queries"] if attack["queries"] else []
    return (
        f"{text(name)}<small>{text(access + source + own)}</small>",
        f"{attack['patch_size']}x{attack['patch_size']}{small(SEEN[attack['seen']])}",
        f"{text(attack['placement'])}{small(places)}",
        counted(attack["asr"], attack["ci95"], attack["n"], bar=True) + (small(by_member) if by_member else ""),
        twin,
        counted(attack["robust_accuracy"], attack["robust_ci95"], attack["robust_n"]),
        f"{seconds(spent)}{small(*effort or ['nothing crafted'])}",
    )


def _origin(attack: Mapping[str, Any]) -> str:
    """Where a patch comes from."""
    return f"{'from the file' if attack['access'] == 'replay' else 'crafted on'} {attack['source']}"


def patch_images(report: Report) -> str:
    """Every universal patch, enlarged, with the highest ASR it reached."""
    figures = []
    for number, block in enumerate(report["patches"]):
        rows = [attack for attack in report["attacks"] if attack["patch"] == number]
        if not rows:
            continue
        best = max(rows, key=lambda row: float(row["asr"]))
        access = "" if best["access"] in ("none", best["name"]) else f", {best['access']}"
        height, width = block["height"], block["width"]
        mask = decode(block["mask"], (height, width)) > 0
        picture = image(decode(block["pixels"], (3, height, width)), mask, f"patch of {height}x{width} pixels")
        label = f"<b>{text(ATTACK_NAMES.get(best['name'], best['name']))}</b>{text(access)}"
        source = f"<span>{text(_origin(best))}</span>" if best["source"] else ""
        detail = f"<span>{height}x{width}, up to {percent(best['asr'])} of {best['n']}</span>"
        detail += f"<code>{text(block['sha256'][:12])}</code>"
        figures.append(f"<figure>{picture}<figcaption>{label}{source}{detail}</figcaption></figure>")
    if not figures:
        return note("No universal patch: every image was given a patch of its own, pictured below in the image.")
    words = note(
        "Enlarged; each pixel of the patch replaces one pixel of the image. Below: the first digits of its SHA-256."
    )
    return f'{words}<div class="card pictures patches">{"".join(figures)}</div>'


def example_images(report: Report) -> str:
    """The images of the report, patched, with what engine and twin say."""
    images = report["examples"]["images"]
    attack = report["attacks"][report["examples"]["attack"]]
    if not images:
        return note("The report holds no images.")
    figures = []
    for entry in images:
        label, engine, twin = entry["label"], entry["engine"], entry["twin"]
        mood, words = ("bad", "✗ fooled") if entry["fooled"] else ("good", "✓ holds")
        simulated = "not run" if twin is None else twin["name"]
        caption = (
            f'<span class="mark {mood}">{words}</span><span>truth: <b>{text(label["name"])}</b></span>'
            f"<span>no patch: <b>{text(entry['clean']['name'])}</b></span>"
            f"<span>engine: <b>{text(engine['name'])}</b></span><span>twin: <b>{text(simulated)}</b></span>"
        )
        alt = f"image {entry['index']}, a {label['name']}, with the patch"
        picture = image(decode(entry["pixels"], (3, entry["height"], entry["width"])), None, alt)
        figures.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
    words = f"The first {len(images)} judged images that count, not picked, under {attack_name(attack)}."
    member = report["examples"].get("member")
    words += f" The answers are those of the pool's member {member}, when it is the one drawn." if member else ""
    return f'{note(words)}<div class="card pictures">{"".join(figures)}</div>'


def survival(report: Report) -> str:
    """The 2x2 table of engine against twin, and the verdict."""
    found = report["survival"]
    if not found:
        return note("Not measured: it needs the twin, and the twin needs torch.")
    flips = found["flips"]
    mood = {"survived": "good", "did not survive": "bad"}.get(found["verdict"], "unknown")
    identical = "every logit bit-identical" if found["bit_identical"] else "logits differ"
    pairs = (
        ("Difference in ASR", f"{percent(found['delta_asr'], True)}, {interval(found['ci95'], True)}"),
        ("McNemar's exact test", f"p = {found['mcnemar_p']:.3g}"),
        ("Images compared", str(found["n"])),
        ("Margin", f"{percent(found['margin'])} more ASR than on the twin is tolerated"),
        ("Engine and twin", identical),
        *([] if found["bit_identical"] else [("Clean logits apart, in integer steps", steps_sentence(report))]),
        ("Attack", attack_name(report["attacks"][found["attack"]])),
        *([("Member of the pool, the worst", str(found["member"]))] if found.get("member") else []),
    )
    cross = (
        '<table class="flips"><thead><tr><td></td><th scope="col">twin fooled</th><th scope="col">twin holds</th></tr>'
        f'</thead><tbody><tr><th scope="row">engine fooled</th><td>{flips["both"]}</td>'
        f'<td class="apart">{flips["engine_only"]}</td></tr><tr><th scope="row">engine holds</th>'
        f'<td class="apart">{flips["twin_only"]}</td><td>{flips["neither"]}</td></tr></tbody></table>'
    )
    verdict = f'<p class="note"><span class="mark {mood}">{text(found["verdict"])}.</span> '
    definition = f"{text(report['definitions'].get('survival', ''))}</p>"
    return f'{verdict}{definition}<div class="split">{card(cross)}{card(facts(pairs))}</div>'


def trust_checks(report: Report) -> str:
    """The checks on the evaluation itself."""
    if not report["trust"]:
        return note("No trust check ran.")
    entries = ((check["passed"], text(CHECK_NAMES.get(check["check"], check["check"])), check["detail"])
               for check in report["trust"])  # fmt: skip
    words = (
        "Attacks that fail for the wrong reason look like robustness. One failed check makes every rate above doubtful."
    )
    return note(words) + card(checks(entries))


def gate_rules(report: Report) -> str:
    """Every rule with its figure."""
    entries = (
        (rule["passed"], f"<code>{text(rule['rule'])} = {text(_toml(rule['limit']))}</code>", rule["detail"])
        for rule in report["gate"]["rules"]
    )
    return note("Numbers are decided by the unfavourable end of their 95 % interval.") + card(checks(entries))


def _toml(value: object) -> str:
    return "true" if value is True else str(value)


def environment(report: Report) -> str:
    """Data, clean accuracy, versions, options and hashes."""
    artifact, surroundings, data, options = (report[key] for key in ("artifact", "environment", "data", "options"))
    crafting, bundle = data["crafting"], report.get("bundle")
    versions = ", ".join(f"{name} {version}" for name, version in surroundings["versions"].items() if version)
    engine = "; ".join(f"{name} {_flat(value)}" for name, value in surroundings["engine"].items())
    clean = report["clean"]
    twin = clean["twin"]
    pairs = (
        ("Judged on", f"{data['n']} of {data['of']} images of {data['name']}"),
        ("Crafted on", f"{crafting['n']} of {crafting['of']} other images of {crafting['name']}" if crafting
         else "no universal patch was crafted"),
        ("Clean accuracy, engine", of_images(clean["engine"])),
        ("Clean accuracy, twin", of_images(twin) if twin else "not measured"),
        ("Strongest attack", attack_name(strongest(report))),
        ("Versions", versions),
        ("Engine", engine),
        ("Platform", surroundings["platform"]),
        ("Options", "; ".join(f"{name} {_flat(value)}" for name, value in options.items())),
        ("Artifact, SHA-256 of its manifest", artifact["sha256"]),
        *((f"SHA-256 of {name}", digest) for name, digest in artifact["files"].items()),
        ("SHA-256 of the judged data", data["sha256"]),
        *([("SHA-256 of the data crafted on", crafting["sha256"])] if crafting else []),
        *([("SHA-256 of the bundle's bundle.json", bundle["sha256"])] if bundle else []),
    )  # fmt: skip
    return card(facts(pairs))


def repeat(report: Report) -> str:
    """The exact command, and what it needs to give the same result."""
    surroundings = report["environment"]
    command = shlex.join(surroundings["command"])
    if not command:
        return note("The command was not recorded: this report was made by a call from Python, with the options above.")
    words = (
        f"With edgeguard {report['edgeguard']}, the versions above, and an artifact and data of the SHA-256 above. Seed "
        f"{surroundings['seed']}. On one machine the same command gives the same report, but for the times."
    )
    return card(note(words), f"<pre>{text(command)}</pre>")


def _flat(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
