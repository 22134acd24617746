"""One short run on digits, exported at 8 and 2 bits, shared by the command line's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_runner import Done, execute


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
