"""Runs `edgeguard` inside the test process, through the same `main` that the console script calls.

Starting Python and importing torch for each of the many commands would take minutes. `tests/test_readme.py` runs the real
script.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgeguard.cli import main


@dataclass(frozen=True)
class Done:
    """What a finished command left: exit code and output."""

    returncode: int
    stdout: str
    stderr: str


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def execute(folder: Path, *arguments: object) -> Done:
    """Run `edgeguard ARGUMENTS` in a folder."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["edgeguard", *map(str, arguments)]
    code: object = 0
    try:
        with in_folder(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as exc:
        code = exc.code or 0
    finally:
        sys.argv = argv
    assert isinstance(code, int)
    return Done(code, out.getvalue(), err.getvalue())
