"""One short run on digits, exported at 8 and 2 bits, shared by the command line's tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = [sys.executable, "-c", "from edgeguard.cli import main; main()"]


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, `a8` and `a2`, made by the program itself."""
    folder = tmp_path_factory.mktemp("cli")
    commands = [
        ["harden", "--model", "resnet8", "--image-size", "16", "--bits", "8,2", "--epochs", "4", "--batch-size", "64",
         "--patch-sizes", "3,4", "--pretrain-epochs", "4", "--eval-limit", "120", "--threads", "1", "--out", "run"],
        ["export", "run", "--bits", "8", "--out", "a8"],
        ["export", "run", "--bits", "2", "--target", "ort", "--out", "a2"],
    ]  # fmt: skip
    for command in commands:
        done = subprocess.run([*PROGRAM, *command], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def program(workspace: Path):
    """Runs the program in the workspace: program("inspect", "a8") -> CompletedProcess with text."""

    def run(*arguments: object, cwd: Path = workspace) -> subprocess.CompletedProcess[str]:
        command = [*PROGRAM, *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)

    return run
