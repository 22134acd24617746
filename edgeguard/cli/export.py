"""`edgeguard export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeguard.cli.console import ConfigOption, JsonOption, OutOption, emit, output_folder
from edgeguard.errors import InputError, require

TARGETS = ("ort",)


def export(
    run: Annotated[Path, typer.Argument(help="The folder that `edgeguard harden` wrote.")],
    bits: Annotated[str, typer.Option(help="One width the run was trained at, e.g. 4 or w4a8.")],
    target: Annotated[str, typer.Option(help="Runtime to export for: ort (ONNX Runtime).")] = "ort",
    data: Annotated[str | None, typer.Option(help="Images for the proof; the run's own data by default.")] = None,
    proof_images: Annotated[int, typer.Option(help="Images on which engine and reference are compared.")] = 64,
    allow_float: Annotated[bool, typer.Option(help="Write it even if some layers run in float; it is marked.")] = False,
    out: OutOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Lower a run to integers at one width, write the model, and prove that the runtime executes it in integers."""
    if target not in TARGETS:
        raise InputError(f"unknown target {target!r}; expected {', '.join(TARGETS)}")
    for module in ("torch", "brevitas", "onnx"):
        require(module, "train")
    from edgeguard.cli.pipeline import export_run
    from edgeguard.inspection import format_inspection, inspect_artifact
    from edgeguard.run import Run

    source = Run.load(run)
    folder = output_folder(out, f"{source.path.resolve().name}-{target}-{bits}")
    artifact = export_run(source, bits, target, folder, data, proof_images, allow_float)
    document = inspect_artifact(artifact.path)
    text = f"{format_inspection(document)}\nartifact: {artifact.path}\nnext: edgeguard verify {artifact.path}"
    emit({**document, "artifact": str(artifact.path)}, text, as_json)
