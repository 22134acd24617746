"""`edgeguard inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeguard.cli.console import JsonOption, emit
from edgeguard.inspection import format_inspection, inspect_artifact


def inspect(
    artifact: Annotated[Path, typer.Argument(help="The folder that `edgeguard export` wrote.")],
    as_json: JsonOption = False,
) -> None:
    """Show what an exported model really computes: kernels, bits and multiply-accumulates, layer by layer."""
    document = inspect_artifact(artifact)
    emit(document, format_inspection(document), as_json)
