"""`edgeguard export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeguard.artifact import Artifact
from edgeguard.cli.console import ConfigOption, JsonOption, OutOption, TrustCodeOption, emit, output_folder
from edgeguard.errors import InputError, require
from edgeguard.targets.profiles import load_profile
from edgeguard.zoo import resolve


def export(
    run: Annotated[str, typer.Argument(help="The folder that `harden` or `calibrate` wrote, or zoo:NAME, see `harden --list`.")],
    bits: Annotated[str, typer.Option(help="One width the run was trained at, e.g. 4 or w4a8; with --pool several: 8,4,2.")],
    target: Annotated[str, typer.Option(help="ort, ort-legacy, ort-avx2, openvino, trt or a profile, FILE.toml.")] = "ort",
    data: Annotated[str | None, typer.Option(help="Images for the proof; the run's own data by default.")] = None,
    proof_images: Annotated[int, typer.Option(help="Images on which engine and reference are compared.")] = 64,
    allow_float: Annotated[bool, typer.Option(help="Write it even if some layers run in float; it is marked.")] = False,
    onnx_only: Annotated[bool, typer.Option("--onnx-only", help="trt: write the ONNX file and no plan.")] = False,
    repeat: Annotated[int, typer.Option(help="trt: build the plan so often, and report the spread.")] = 1,
    pool: Annotated[
        bool, typer.Option("--pool", help="Several widths in one folder, of which each batch is answered by a random one.")
    ] = False,
    probabilities: Annotated[str | None, typer.Option(help="pool: of the widths, e.g. 0.5,0.3,0.2; all alike.")] = None,
    seed: Annotated[int | None, typer.Option(help="pool: of the draw; without it fresh entropy each time.")] = None,
    trust_code: TrustCodeOption = False,
    out: OutOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Lower a run to integers at one width, write the model, and prove that the runtime executes it in integers."""
    profile = load_profile(target)
    for module in ("torch", "brevitas", "onnx"):
        require(module, "train")
    from edgeguard.cli.pipeline import export_run
    from edgeguard.export import export_pool
    from edgeguard.inspection import format_inspection, inspect_artifact
    from edgeguard.pool_artifact import format_pool, inspect_pool
    from edgeguard.quant.width import parse_widths
    from edgeguard.run import Run

    if not pool and (probabilities is not None or seed is not None):
        raise InputError("--probabilities and --seed say how a member of a pool is drawn; add --pool or leave them out")
    source = Run.load(resolve(run), trust_code)

    def export_one(width: str, to: Path) -> Artifact:
        return export_run(source, width, profile, to, data, proof_images, allow_float, onnx_only, repeat)

    if pool:
        made = export_pool(
            export_one, [str(width) for width in parse_widths(bits)],
            output_folder(out, f"{source.path.resolve().name}-{profile.name}-pool-{bits.replace(',', '-')}"),
            probabilities=None if probabilities is None else _shares(probabilities), seed=seed,
        )  # fmt: skip
        contents = inspect_pool(made)
        text = f"{format_pool(contents)}\npool: {made.path}\nnext: edgeguard verify {made.path}"
        emit({**contents, "pool": str(made.path)}, text, as_json)
        return
    artifact = export_one(bits, output_folder(out, f"{source.path.resolve().name}-{profile.name}-{bits}"))
    document = inspect_artifact(artifact.path)
    after = f"edgeguard verify {artifact.path}"
    if onnx_only:
        after = f"where TensorRT and its GPU are: edgeguard export {run} --target {target} --bits {bits}"
        after += " --trust-code" if source.names_code else ""
    text = f"{format_inspection(document)}\nartifact: {artifact.path}\nnext: {after}"
    emit({**document, "artifact": str(artifact.path)}, text, as_json)


def _shares(text: str) -> list[float]:
    """A comma-separated list of numbers."""
    try:
        return [float(entry) for entry in text.split(",")]
    except ValueError as exc:
        raise InputError(f"--probabilities {text!r} is not a comma-separated list of numbers such as 0.5,0.3,0.2") from exc
