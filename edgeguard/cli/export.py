"""`edgeguard export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeguard.cli.console import ConfigOption, JsonOption, OutOption, emit, output_folder
from edgeguard.errors import require
from edgeguard.targets.profiles import load_profile


def export(
    run: Annotated[Path, typer.Argument(help="The folder that `edgeguard harden` or `calibrate` wrote.")],
    bits: Annotated[str, typer.Option(help="One width the run was trained at, e.g. 4 or w4a8.")],
    target: Annotated[str, typer.Option(help="ort, ort-legacy, ort-avx2, openvino, trt or a profile, FILE.toml.")] = "ort",
    data: Annotated[str | None, typer.Option(help="Images for the proof; the run's own data by default.")] = None,
    proof_images: Annotated[int, typer.Option(help="Images on which engine and reference are compared.")] = 64,
    allow_float: Annotated[bool, typer.Option(help="Write it even if some layers run in float; it is marked.")] = False,
    onnx_only: Annotated[bool, typer.Option("--onnx-only", help="trt: write the ONNX file and no plan.")] = False,
    repeat: Annotated[int, typer.Option(help="trt: build the plan so often, and report the spread.")] = 1,
    out: OutOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Lower a run to integers at one width, write the model, and prove that the runtime executes it in integers."""
    profile = load_profile(target)
    for module in ("torch", "brevitas", "onnx"):
        require(module, "train")
    from edgeguard.cli.pipeline import export_run
    from edgeguard.inspection import format_inspection, inspect_artifact
    from edgeguard.run import Run

    source = Run.load(run)
    folder = output_folder(out, f"{source.path.resolve().name}-{profile.name}-{bits}")
    artifact = export_run(source, bits, profile, folder, data, proof_images, allow_float, onnx_only, repeat)
    document = inspect_artifact(artifact.path)
    after = f"edgeguard verify {artifact.path}"
    if onnx_only:
        after = f"where TensorRT and its GPU are: edgeguard export {source.path} --target {target} --bits {bits}"
    text = f"{format_inspection(document)}\nartifact: {artifact.path}\nnext: {after}"
    emit({**document, "artifact": str(artifact.path)}, text, as_json)
