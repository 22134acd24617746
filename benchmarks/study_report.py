"""`docs/study.md` and its plots, from the study's JSON files alone.

    python benchmarks/study_report.py

The section of what was not reproduced is written by hand, in `benchmarks/study/notes.md`.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from study.figures import Study
from study.grid import ABLATION_ATTACKS
from study.plots import plots
from study.tables import (
    ablation_table,
    attack_table,
    by_width,
    difference_table,
    export_table,
    goals_table,
    largest_interval,
    part_table,
    price_table,
    sources,
)

from edgeguard import files
from edgeguard.errors import EdgeGuardError, InputError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "study"
NOTES = ROOT / "benchmarks" / "study" / "notes.md"


def render(study: Study, notes: str, images: Sequence[str]) -> str:
    """The page. notes: Markdown of what was not reproduced. images: names of the plots."""
    grid = study.grid
    parts = [
        "# The study\n", _head(study), "## Goals\n", goals_table(study), "## Clean accuracy\n",
        "Percent of all test images, on ONNX Runtime's integer engine.\n", by_width(study, study.accuracy),
        "## What training costs\n",
        f"{grid['passes']} passes over the training images at most for every run; a ready model has passes of its own. Seconds of"
        " wall clock over all runs that a defence needs for its widths; other work on the machine is in them.\n",
        price_table(study),
        "## Engines\n", export_table(study), _images([name for name in images if name.startswith("study-asr")]),
        *_attacks(study), "## QADT-R against the others\n",
        "Points of ASR, on the images that both engines classify correctly; Newcombe's interval for pairs, 95 %.\n",
        *(f"### {one['title']}\n\n{difference_table(study, one['name'])}" for one in _tried(study)),
        "## Certified accuracy\n", _certified(study), by_width(study, study.certified),
    ]  # fmt: skip
    if study.ablations:
        parts += [
            "## The parts of QADT-R\n",
            f"Percent; one seed. No interval is wider than {largest_interval(study):.1f} points to either side.\n",
            ablation_table(study),
            "What leaving a part out adds to the ASR, in points, on the images that count for both; Newcombe's interval for "
            "pairs, 95 %. So many intervals are looked at here that one in twenty misses zero by chance.\n",
            *(f"### {one['title']}, without a part\n\n{part_table(study, one['name'])}" for one in _tried(study)
              if one["name"] in ABLATION_ATTACKS),
        ]  # fmt: skip
    parts += ["## Not reproduced\n", notes.strip() + "\n"]
    if study.missing:
        parts += ["## Not measured\n", _missing(study.missing)]
    return "\n".join(part for part in parts if part)


def _head(study: Study) -> str:
    grid, budget = study.grid, study.grid["budget"]
    document = next((documents[0] for documents in study.cells.values()), None)
    if document is None:
        raise InputError("no cell of the study is finished; start benchmarks/study.py first")
    machine = document["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    seeds = ", ".join(map(str, grid["seeds"]))
    return (
        f"`{grid['model']}` on {grid['data']}, seed{'s' if len(grid['seeds']) > 1 else ''} {seeds}. Made by "
        "`benchmarks/study.py`, written by `benchmarks/study_report.py` from the JSON files in "
        "`benchmarks/results/study`; every cell holds its settings and hashes.\n\n"
        "ASR = P[engine(x_adv) != y | engine(x) = y], of the deployed ONNX Runtime engine; Wilson intervals, 95 %; n counts "
        "the images that the engine classifies correctly, of all seeds together (they are the same images for every seed, so "
        "the interval says nothing of the spread over seeds). Universal patches are crafted on training images, with the "
        f"values of an engine and the gradients of its twin, at the attacked width and at {', '.join(grid['surrogates'])} "
        f"bits, {budget['steps']} steps of {budget['attack_batch']} images; the strongest of them counts. A-QAPA per image: "
        f"{budget['per_image_steps']} steps, {budget['per_image_restarts']} restarts, places optimized. LaVAN: "
        f"{budget['lavan_steps']} steps. Patch-RS: {budget['queries']:,} queries an image, logits only. Corners: an image is "
        f"fooled when any of the four fools it; worst: any place on a grid of stride {budget['stride']}.\n\n"
        f"{versions}; {machine['machine']}, {' '.join(machine['cpu_flags']) or 'no flags known'}"
        + (f"; {machine['cuda']}" if machine["cuda"] else "") + ".\n"
    )  # fmt: skip


def _missing(names: Sequence[str]) -> str:
    """Trainings by name, all else by kind and number."""
    counts = Counter(name.split(".")[0] for name in names)
    trainings = [name.removeprefix("train.") for name in names if name.startswith("train.")]
    kinds = ", ".join(f"{count} of kind {kind}" for kind, count in sorted(counts.items()))
    listed = f" Not trained: {', '.join(trainings)}." if trainings else ""
    return f"{len(names)} cells of the grid: {kinds}.{listed} The same command computes them.\n"


def _tried(study: Study) -> list[Mapping[str, Any]]:
    """Attacks of which anything is measured."""
    names = [one["name"] for one in study.defences]
    return [one for one in study.attacks if any(study.documents("attack", n, w, one["name"]) for n in names for w in study.widths)]


def _attacks(study: Study) -> list[str]:
    parts = ["## Attack success rates\n", "Percent. The lower the better for the defence.\n"]
    for one in _tried(study):
        seen = " (seen in training)" if one["seen"] else ""
        parts += [f"### {one['title']}{seen}\n", attack_table(study, one["name"])]
        if one["method"] in ("a-qapa", "gap"):
            parts.append(sources(study, one["name"]))
        if one["name"] == "per-image-8" and any(
            study.asr(d["name"], w, one["name"]) for d in study.defences for w in study.widths
        ):
            parts.append(_images(["study-per-image.svg"]))
    return parts


def _certified(study: Study) -> str:
    budget: dict[str, Any] = study.grid["budget"]
    side = budget["certificate_size"]
    return (
        f"Percent of images for which PatchCleanser's double masking proves the label against every patch of {side}x{side} "
        f"pixels; {budget['certificate_masks']} masks along each axis.\n"
    )


def _images(names: Sequence[str]) -> str:
    return "".join(f"![{name.removesuffix('.svg')}](images/{name})\n" for name in names)


def run(argv: Sequence[str] | None = None) -> Path:
    """Returns: the page.

    Raises:
        InputError: no study, nothing finished, or a broken file.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the study's cells")
    parser.add_argument("--notes", type=Path, default=NOTES, help="what was not reproduced, in Markdown")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of study.md and images/")
    args = parser.parse_args(argv)
    if not args.notes.is_file():
        raise InputError(f"{args.notes} does not exist; write there what was not reproduced")
    study = Study.load(args.results)
    drawn = plots(study)
    page = render(study, args.notes.read_text(encoding="utf-8"), list(drawn))
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    for old in (args.out / "images").glob("study-*.svg"):
        if old.name not in drawn:
            old.unlink()
    for name, svg in drawn.items():
        files.write_bytes(args.out / "images" / name, svg.encode())
    files.write_bytes(args.out / "study.md", page.encode())
    return args.out / "study.md"


def main() -> None:
    try:
        print(run())
    except EdgeGuardError as exc:
        print(f"study: {exc}", file=sys.stderr)
        sys.exit(exc.exit_code)


if __name__ == "__main__":
    main()
