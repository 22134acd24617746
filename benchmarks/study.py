"""The study: all defences, widths and attacks on ONNX Runtime's integer engines, from training to the figures.

    python benchmarks/study.py --data 'npz:cifar10-{split}.npz' --weights resnet20-cifar10.safetensors --work DIR --plan
    python benchmarks/study.py --data 'npz:cifar10-{split}.npz' --weights resnet20-cifar10.safetensors --work DIR
    python benchmarks/study_report.py

Trains every defence with `edgeguard harden` at an equal number of passes over the training images, exports every width
with its proof, crafts universal patches through the engines of the surrogate widths, and judges every attack on the live
engine. What is compared is in `benchmarks/study/grid.py`.

Every cell is one JSON file below --results, named by the hash of all it depends on: started again, the study goes on
where it ended, and computes only what is missing or has other settings now. Trainings, which continue from their last
checkpoint, and exported engines lie below --work. --plan says what is to be done and how long it will take; --only
restricts a start to some cells and what they need. On a GPU, trainings run there (--device auto).
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from study.estimates import Estimator, calibrate, duration
from study.grid import DEFENCES, Budget, Grid, ablations, ready_row
from study.planning import Data, parse_filters
from study.training import check_options
from study.work import Place, drive, split_threads

from edgeguard import files
from edgeguard.errors import EdgeGuardError, InputError

SCHEMA = "edgeguard.study/1"
INDEX = "index.json"
RESULTS = Path(__file__).resolve().parent / "results" / "study"
INTERRUPTED = 130


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--data", required=True, help="as `edgeguard harden --data` takes it")
    parser.add_argument("--weights", type=Path, help="trained float weights")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--work", type=Path, required=True, help="folder of trainings and engines")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the cells")
    parser.add_argument("--widths", default=",".join(Grid.widths))
    parser.add_argument("--surrogates", help="widths at which universal patches are crafted; by default those of 8,4,2")
    parser.add_argument("--seeds", default="0", help="0,1,2 on a GPU")
    parser.add_argument("--passes", type=int, default=Grid.passes, help="over the training images, of every defence")
    parser.add_argument("--max-steps", type=int, default=0, help="stop each training after so many batches; 0: never")
    parser.add_argument(
        "--harden", default="", metavar="OPTIONS", help="further options of all trainings, in one string"
    )
    parser.add_argument("--ready", metavar="NAME", help="a ready model of the package, zoo:NAME, as a row of its own")
    parser.add_argument("--no-ablations", action="store_true")
    parser.add_argument("--only", action="append", default=[], metavar="KEY=A,B", help="defence, seed, width or attack")
    parser.add_argument("--plan", action="store_true", help="print what is to be done and how long it takes")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, which share the processor's cores")
    parser.add_argument("--device", default="auto", help="of trainings: auto, cpu, cuda or cuda:N")
    for field in dataclasses.fields(Budget):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    return parser.parse_args(argv)


def grid_of(args: argparse.Namespace) -> Grid:
    """Raises InputError when an option is out of range."""
    budget = Budget(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Budget)})
    widths = tuple(args.widths.split(","))
    chosen = args.surrogates.split(",") if args.surrogates else [one for one in Grid.surrogates if one in widths]
    try:
        seeds = tuple(int(seed) for seed in args.seeds.split(","))
    except ValueError as exc:
        raise InputError(f"--seeds {args.seeds!r} is not a comma-separated list of whole numbers") from exc
    rows = (*DEFENCES, ready_row(args.ready)) if args.ready else DEFENCES
    return Grid(
        args.model, args.data, args.weights, args.image_size, widths, tuple(chosen), seeds, rows,
        () if args.no_ablations else ablations(), passes=args.passes, max_steps=args.max_steps,
        extra=tuple(shlex.split(args.harden)), budget=budget,
    )  # fmt: skip


def write_index(place: Place) -> None:
    """Which cells the study consists of, and which are there: what the report is made from."""
    grid, cache = place.grid, place.cache
    plain: dict[str, Any] = dataclasses.asdict(grid)
    kind, _, path = grid.data.partition(":")
    plain["data"] = f"{kind}:{Path(path).name}" if path else kind
    plain["weights"] = grid.weights.name if grid.weights is not None else None
    for key in ("defences", "ablations"):
        plain[key] = [
            {**entry, "epochs": grid.epochs(one)} for entry, one in zip(plain[key], getattr(grid, key), strict=True)
        ]
    cells = []
    for cell in place.planner().cells():
        file = cache.path(cell)
        there = file is not None and file.is_file()
        cells.append(
            {"name": cell.name, "file": str(file.relative_to(cache.folder).as_posix()) if file and there else None}
        )
    place.results.mkdir(parents=True, exist_ok=True)
    files.write_json(place.results / INDEX, {"schema": SCHEMA, "grid": plain, "cells": cells})


def plan(place: Place, filters: dict[str, tuple[str, ...]], jobs: int, measure: bool) -> str:
    """What is to be done, in lines; measure: calibrate where nothing like a cell is measured yet."""
    train, test = place.splits()
    data = Data(train.sha256, test.sha256, len(train), len(test))
    todo = [cell for cell in place.planner().cells(filters) if not place.cache.has(cell)]
    side = (train.image_shape[1], train.image_shape[2])
    estimator = Estimator(place.grid, data, side, place.cache.documents())
    seconds = [estimator.seconds(cell) for cell in todo]
    if measure and None in seconds:
        estimator = dataclasses.replace(estimator, rates=calibrate(place))
        seconds = [estimator.seconds(cell) for cell in todo]
    lines = [f"{cell.name}  {'not measured yet' if one is None else 'about ' + duration(one)}"
             for cell, one in zip(todo, seconds, strict=True)]  # fmt: skip
    known = [one for one in seconds if one is not None]
    total = f"{len(todo)} cells to do, about {duration(sum(known) / jobs)} with {jobs} at a time"
    open_ = len(todo) - len(known)
    return "\n".join(
        [*(lines if measure else ()), total + (f", and {open_} of which nothing is known (--plan)" if open_ else "")]
    )


def run(argv: Sequence[str] | None = None) -> int:
    """Returns: how many cells were computed.

    Raises:
        EdgeGuardError: bad options, or a cell failed.
    """
    args = arguments(argv)
    if args.jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {args.jobs}")
    grid = grid_of(args)
    filters = parse_filters(args.only, grid)
    chosen = [one for one in (*grid.defences, *grid.ablations) if one.name in filters.get("defence", (one.name,))]
    check_options(grid, chosen)
    args.work.mkdir(parents=True, exist_ok=True)
    place = Place(grid, args.results, args.work.resolve(), args.device, split_threads(args.jobs))
    if args.plan:
        print(plan(place, filters, args.jobs, True))
        return 0

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    say(plan(place, filters, args.jobs, False))
    write_index(place)
    return drive(place, filters, args.jobs, say, lambda: write_index(place))


def main() -> None:
    try:
        run()
    except EdgeGuardError as exc:
        print(f"study: {exc}", file=sys.stderr)
        sys.exit(exc.exit_code)
    except KeyboardInterrupt:
        print("study: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
