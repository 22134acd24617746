"""`edgeguard analyze`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edgeguard import files, folders
from edgeguard.artifact import Artifact
from edgeguard.cli.console import ConfigOption, JsonOption, OutOption, emit, integers, output_folder, progress_bars
from edgeguard.cli.judged_data import judged_data
from edgeguard.cli.verify import Stages
from edgeguard.errors import InputError, require

ANALYSIS_JSON, ANALYSIS_HTML = "analysis.json", "analysis.html"


def analyze(
    artifacts: Annotated[list[Path], typer.Argument(help="Folders that `edgeguard export` wrote, of one model.")],
    data: Annotated[str | None, typer.Option(help="Labelled images; by default what the model was trained on.")] = None,
    what: Annotated[str, typer.Option(help="Comma-separated.")] = "alignment,sensitivity,visibility,transfer",
    patch: Annotated[Path | None, typer.Option(help="Patch file to try at places and opacities; else one is crafted.")] = None,
    patch_size: Annotated[int, typer.Option(help="Side of crafted patches in pixels.")] = 6,
    sizes: Annotated[str, typer.Option(help="Sides whose visibility is compared, comma-separated.")] = "3,4,6,8,10",
    opacities: Annotated[str, typer.Option(help="Between 0 and 1, comma-separated.")] = "0,0.2,0.4,0.6,0.8,1",
    stride: Annotated[int, typer.Option(help="Of the grid of places, in pixels.")] = 4,
    steps: Annotated[int, typer.Option(help="Gradient steps to craft a patch.")] = 100,
    limit: Annotated[int, typer.Option(help="Images to judge at most.")] = 200,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads of the runtime; 0: its choice.")] = 0,
    out: OutOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """How alike the widths' gradients are, where and how visibly a patch hurts, and what transfers."""
    require("torch", "train")
    from edgeguard.analysis import AnalysisOptions
    from edgeguard.analysis import analyze as run
    from edgeguard.analysis.page import format_analysis, render_analysis
    from edgeguard.patch_files import load_patch

    options = AnalysisOptions(
        parts=tuple(what.split(",")), patch_size=patch_size, sizes=integers(sizes, "--sizes"),
        opacities=_numbers(opacities), stride=stride, steps=steps, limit=limit, seed=seed, threads=threads,
    )  # fmt: skip
    loaded = [Artifact.load(path) for path in artifacts]
    given = load_patch(patch) if patch is not None else None
    folder = folders.new_folder(output_folder(out, f"{loaded[0].path.resolve().name}-analysis"))
    judged, crafted = judged_data(loaded[0], data, crafts=True)
    with progress_bars() as progress:
        document = run(loaded, judged, crafted, options, patch=given, progress=Stages(progress),
                       command=["edgeguard", *sys.argv[1:]])  # fmt: skip
    with folders.folder_transaction(folder) as part:
        files.write_json(part / ANALYSIS_JSON, document)
        files.write_bytes(part / ANALYSIS_HTML, render_analysis(document).encode())
    emit(document, f"{format_analysis(document)}\npage: {folder / ANALYSIS_HTML}", as_json)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(entry) for entry in text.split(","))
    except ValueError as exc:
        raise InputError(f"--opacities {text!r} is not a comma-separated list of numbers") from exc
