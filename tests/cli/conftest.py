"""One short run on digits, exported at 8 and 2 bits, shared by the command line's tests.

The program runs inside the test process, through the same `main` that the console script calls: starting Python and
importing torch for each of the many commands would take minutes. `tests/test_readme.py` runs the real script.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, `a8` and `a2`, made by the program itself."""
    folder = tmp_path_factory.mktemp("cli")
    commands = [
        ["harden", "--model", "resnet8", "--image-size", "16", "--bits", "8,2", "--epochs", "4", "--batch-size", "64",
         "--patch-sizes", "3,4", "--pretrain-epochs", "4", "--eval-limit", "120", "--out", "run"],
        ["export", "run", "--bits", "8", "--out", "a8"],
        ["export", "run", "--bits", "2", "--target", "ort", "--out", "a2"],
    ]  # fmt: skip
    for command in commands:
        done = execute(folder, *command)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def program(workspace: Path) -> Callable[..., Done]:
    """Runs the program in the workspace: program("inspect", "a8") -> Done."""

    def run(*arguments: object, cwd: Path = workspace) -> Done:
        return execute(cwd, *arguments)

    return run
