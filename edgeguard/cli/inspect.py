"""`edgeguard inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeguard.cli.console import JsonOption, emit
from edgeguard.inspection import format_inspection, inspect_artifact
from edgeguard.pool_artifact import Pool, format_pool, inspect_pool


def inspect(
    model: Annotated[Path, typer.Argument(help="A folder that `edgeguard export` wrote, or any ONNX file.")],
    as_json: JsonOption = False,
) -> None:
    """Show what a model really computes: kernels, bits and multiply-accumulates, layer by layer, and what is float."""
    if Pool.is_pool(model):
        pool = inspect_pool(Pool.load(model))
        emit(pool, format_pool(pool), as_json)
        return
    if model.is_dir():
        document = inspect_artifact(model)
    else:
        from edgeguard.export.isolated import inspect_onnx

        document = inspect_onnx(model)
    emit(document, format_inspection(document), as_json)
