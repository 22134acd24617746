"""`edgeguard verify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, TaskID

from edgeguard import files
from edgeguard.artifact import Artifact
from edgeguard.cli.console import (
    ConfigOption,
    JsonOption,
    OutOption,
    emit,
    integers,
    log,
    output_folder,
    progress_bars,
    write_report,
)
from edgeguard.data import Dataset, has_splits, load_dataset, load_splits
from edgeguard.errors import InputError, require
from edgeguard.report.summary import format_summary
from edgeguard.verify import ACCESSES, Gate, VerifyOptions
from edgeguard.verify import verify as verify_artifact

GATE_FAILED = 1
ATTACKS = ("a-qapa",)


def verify(
    artifact: Annotated[Path, typer.Argument(help="The folder that `edgeguard export` wrote.")],
    data: Annotated[str | None, typer.Option(help="Labelled images; by default what the model was trained on.")] = None,
    attack: Annotated[str, typer.Option(help="How patches are crafted: a-qapa.")] = "a-qapa",
    access: Annotated[str | None, typer.Option(help="replay, transfer, engine; comma-separated.")] = None,
    patch_size: Annotated[str, typer.Option(help="Sides in pixels, comma-separated.")] = "6",
    placement: Annotated[str, typer.Option(help="random, worst; comma-separated.")] = "random",
    stride: Annotated[int, typer.Option(help="Of the grid of worst placements, in pixels; 1 is exact.")] = 4,
    steps: Annotated[int, typer.Option(help="Gradient steps to craft a patch.")] = 300,
    restarts: Annotated[int, typer.Option(help="Fresh starts of each patch; the best is judged.")] = 1,
    loss: Annotated[str | None, typer.Option(help="The attack's loss.")] = None,
    target: Annotated[int | None, typer.Option(help="Class to push every image to; none: away from its own.")] = None,
    patch: Annotated[list[Path] | None, typer.Option(help="Patch file (npz) to replay; may be repeated.")] = None,
    surrogate: Annotated[list[Path] | None, typer.Option(help="Artifact to craft on as well; may be repeated.")] = None,
    limit: Annotated[int, typer.Option(help="Images to judge at most; 0: all.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    batch_size: Annotated[int, typer.Option(help="The batch the engine is deployed with.")] = 50,
    runtime: Annotated[str | None, typer.Option(help="ort, reference or twin; the artifact's own by default.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of the runtime; 0: its choice.")] = 0,
    gate: Annotated[Path | None, typer.Option(help="TOML file of rules; a broken one gives exit code 1.")] = None,
    out: OutOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Attack the deployed engine with adversarial patches and report how robust it is."""
    if attack not in ATTACKS:
        raise InputError(f"unknown attack {attack!r}; expected {', '.join(ATTACKS)}")
    replay = tuple(patch or ())
    default = "replay" if replay else ",".join(name for name in ACCESSES if name != "replay")
    options = VerifyOptions(
        accesses=tuple((access or default).split(",")), patch_sizes=integers(patch_size, "--patch-size"),
        placements=tuple(placement.split(",")), stride=stride, steps=steps, restarts=restarts,
        loss=loss or VerifyOptions.loss, target=target, limit=limit or None, seed=seed, batch_size=batch_size,
        replay=replay, surrogates=tuple(surrogate or ()), runtime=runtime, threads=threads,
    )  # fmt: skip
    rules = Gate.load(gate) if gate is not None else None
    source = Artifact.load(artifact)
    folder = files.new_folder(output_folder(out, f"{source.path.resolve().name}-verify"))
    if options.crafts:
        require("torch", "train")
    judged, crafted = _data(source, data, options.crafts)
    with progress_bars() as progress:
        report = verify_artifact(source, judged, options, craft_data=crafted, gate=rules,
                                 progress=Stages(progress), command=["edgeguard", *sys.argv[1:]])  # fmt: skip
    page = write_report(report, folder)
    emit(report, f"{format_summary(report)}\nreport: {page}", as_json)
    if report["gate"] is not None and not report["gate"]["passed"]:
        broken = [rule for rule in report["gate"]["rules"] if not rule["passed"]]
        log(f"gate failed: {'; '.join(str(rule['detail']) for rule in broken)}")
        raise typer.Exit(GATE_FAILED)


def _data(artifact: Artifact, spec: str | None, crafts: bool) -> tuple[Dataset, Dataset | None]:
    """Images to judge, and other images to craft on where there are any.

    Without `spec`, the test images of what the model was trained on, split as its training split it.
    """
    source = artifact.manifest["source"]
    trained_on = source.get("data", {}).get("spec")
    wanted = spec or trained_on
    if not isinstance(wanted, str):
        raise InputError(f"{artifact.path} does not say what it was trained on; name labelled images with --data")
    size = artifact.manifest["input_shape"][1] if wanted.startswith(("digits", "imagefolder")) else None
    if spec is None or has_splits(wanted):
        train, test = load_splits(wanted, size, seed=source.get("seed", 0))
        return test, train if crafts else None
    return load_dataset(wanted, "test", size), None


class Stages:
    """One bar for each stage of a verification."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, note="")
        self._progress.update(self._tasks[stage], completed=done, total=total)
