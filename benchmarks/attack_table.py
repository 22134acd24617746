"""Every attack on every engine: ASR, interval, n and seconds.

    python benchmarks/attack_table.py --artifact qat-8=DIR --artifact qadt-r-8=DIR ... --data npz:cifar10-{split}.npz \\
        --work DIR --out benchmarks/results

Each artifact is verified as `edgeguard verify` does it, at the accesses engine and query: all attacks with patches of
--size at the places that they choose, at random and at the worst of a grid; and patches per image of --large, which any
sound attack must win with. Reports and finished stages stay below --work, so an interrupted run goes on. Seconds are of
one thread for crafting and judging together, the judgement of the twin left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from edgeguard import files
from edgeguard.artifact import Artifact
from edgeguard.data import load_splits
from edgeguard.report.html import render_html
from edgeguard.verify import ATTACKS, VerifyOptions, verify

KEEP = (
    "name", "scope", "access", "patch_size", "placement", "asr", "ci95", "robust_accuracy", "n", "twin_asr", "queries",
    "steps", "places",
)  # fmt: skip


def report(name: str, artifact: Artifact, data: str, work: Path, options: VerifyOptions) -> dict[str, Any]:
    """A finished verification, from disk or made now."""
    path = work / f"{name}.json"
    if not path.is_file():
        train, test = load_splits(data)
        found = verify(
            artifact, test, options, craft_data=train, command=["benchmarks/attack_table.py"], stages=work / f"{name}.stages",
            announce=lambda text: print(f"{name}: {text}", file=sys.stderr, flush=True),
        )  # fmt: skip
        files.write_json(path, found)
        files.write_bytes(path.with_suffix(".html"), render_html(found).encode())
    document: dict[str, Any] = files.read_json(path)
    return document


def rows(name: str, documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"engine": name, **{key: row[key] for key in KEEP}, "seconds": seconds}
        for document in documents
        for row, seconds in zip(document["attacks"], document["timing"]["attacks"], strict=True)
    ]


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a row for each attack, a column for each engine."""
    engines = list(dict.fromkeys(row["engine"] for row in found))
    groups: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in found:
        low, high = row["ci95"]
        key = (row["name"], row["scope"], row["access"], f"{row['patch_size']}x{row['patch_size']}", row["placement"])
        groups.setdefault(key, {})[row["engine"]] = (
            f"{row['asr']:.1%} [{low:.1%}, {high:.1%}], n = {row['n']}, {row['seconds']:.0f} s"
        )
    lines = [f"| attack | scope | access | patch | placement | {' | '.join(engines)} |", "|---" * (5 + len(engines)) + "|"]
    for key, cells in groups.items():
        lines.append(f"| {' | '.join(key)} | {' | '.join(cells.get(engine, '') for engine in engines)} |")
    return "\n".join(lines) + "\n"


def trust_table(documents: dict[str, dict[str, Any]]) -> str:
    lines = ["| engine | check | passed | detail |", "|---|---|---|---|"]
    for name, document in documents.items():
        lines += [f"| {name} | {check['check']} | {check['passed']} | {check['detail']} |" for check in document["trust"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--large", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--per-image-limit", type=int, default=200)
    parser.add_argument("--stride", type=int, default=8)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--universal-queries", type=int, default=50_000)
    args = parser.parse_args()
    common: dict[str, Any] = {"limit": args.limit, "per_image_limit": args.per_image_limit, "threads": 1}
    full = VerifyOptions(
        attacks=ATTACKS, accesses=("engine", "query"), patch_sizes=(args.size,), placements=("random", "worst"),
        stride=args.stride, steps=args.steps, queries=args.queries, universal_queries=args.universal_queries, **common,
    )  # fmt: skip
    large = VerifyOptions(attacks=("a-qapa-per-image",), accesses=("engine",), patch_sizes=(args.large,), **common)
    args.work.mkdir(parents=True, exist_ok=True)
    found, documents = [], {}
    for name, _, folder in (entry.partition("=") for entry in args.artifact):
        artifact = Artifact.load(Path(folder))
        documents[name] = report(name, artifact, args.data, args.work, full)
        big = report(f"{name}-{args.large}", artifact, args.data, args.work, large)
        found += rows(name, [documents[name], big])
    args.out.mkdir(parents=True, exist_ok=True)
    trust = {name: document["trust"] for name, document in documents.items()}
    files_of = ("artifact", "work", "out", "data")
    options = {key: value for key, value in vars(args).items() if key not in files_of}
    result = {"schema": "edgeguard.benchmark.attacks/1", "options": options, "rows": found, "trust": trust}
    (args.out / "attack_table.json").write_text(json.dumps(result, indent=1) + "\n")
    text = table(found) + "\n" + trust_table(documents)
    (args.out / "attack_table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
