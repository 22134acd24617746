"""`edgeguard doctor`."""

from __future__ import annotations

from edgeguard.cli.console import JsonOption, emit


def doctor(as_json: JsonOption = False) -> None:
    """Show what this machine can do: runtimes, CPU, GPU, which target runs and exports here, and what to install."""
    from edgeguard.targets.doctor import doctor as examine
    from edgeguard.targets.doctor import format_doctor

    document = examine()
    emit(document, format_doctor(document), as_json)
