"""Every exception EdgeGuard raises on purpose, and the exit code each one becomes.

    EdgeGuardError            2   base of everything below; its message is one clear sentence for the user
    ├── InputError            2   an option, a file or data the caller gave is wrong
    │   └── ArtifactError     2   an artifact folder is incomplete, altered or of another schema
    ├── ExportError           2   a model cannot be lowered, or the export failed to prove itself
    ├── EngineError           3   a runtime failed to load or execute a model
    └── MissingDependency     3   a package or device is not there; says how to install it

Exit code 0 is success and 1 a failed gate, which is a result and not an error. Anything else that escapes is a bug.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class EdgeGuardError(Exception):
    """Base of all errors meant for the user. Names of files and what they hold may stand in it: it is always `printable`."""

    exit_code = 2

    def __str__(self) -> str:
        return printable(super().__str__())


class InputError(EdgeGuardError):
    """The caller's input is wrong: what was got, what was expected, what to do."""


class ArtifactError(InputError):
    """An artifact is incomplete, altered, hostile or of an unknown schema."""


class ExportError(EdgeGuardError):
    """A layer cannot be lowered to integers, or the exported model failed its own proof."""


class EngineError(EdgeGuardError):
    """A runtime could not load or run a model."""

    exit_code = 3


class MissingDependency(EdgeGuardError):  # noqa: N818
    """A package, a runtime or a device is missing."""

    exit_code = 3


def printable(text: str) -> str:
    """A text with escapes for what would move a cursor, end a line of a log, or is no character at all."""
    return text if text.isprintable() else "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def shown(value: object, limit: int = 60) -> str:
    """A value for a message: its `repr`, of bounded length, or its type where that is nested too deep to be written."""
    try:
        return f"{value!r:.{limit}}"
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"


def require(module: str, extra: str | None) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: what to import, e.g. "torch".
        extra: the extra of this package that installs it, or None when the base install should have it.

    Raises:
        MissingDependency: with the exact command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.split(".")[0] != module.split(".")[0]:
            raise
        target = f'"edgeguard[{extra}]"' if extra else "edgeguard"
        raise MissingDependency(f"{module} is not installed; run: pip install {target}") from exc
