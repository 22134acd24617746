"""What a system lacks, and streams that cannot be written, end in a sentence; a stderr that cannot be written ends nothing."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_runner import Done, execute

from edgeguard.cli import console
from edgeguard.errors import InputError

Program = Callable[..., Done]


def failing(code: int, *more: str) -> Callable[[], Any]:
    def examine() -> Any:
        raise OSError(code, os.strerror(code), *more)

    return examine


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (failing(errno.EMFILE, "/dev/null"), "edgeguard: /dev/null: Too many open files"),
        (failing(errno.ENOSPC), "edgeguard: the system: No space left on device"),
    ],
)
def test_what_the_system_lacks_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Any], said: str
) -> None:
    monkeypatch.setattr("edgeguard.targets.doctor.doctor", error)
    done = execute(tmp_path, "doctor")
    assert (done.returncode, done.stderr.strip()) == (2, said)


def test_other_errors_of_the_system_are_bugs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeguard.targets.doctor.doctor", failing(errno.EBADF))
    with pytest.raises(OSError, match="Bad file descriptor"):
        execute(tmp_path, "doctor")


class Full:
    """A stream on a full disk. descriptor: what it would be written to."""

    def __init__(self, error: OSError, descriptor: int) -> None:
        self.error, self.descriptor = error, descriptor

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        raise self.error

    def fileno(self) -> int:
        return self.descriptor


def test_a_full_stdout_is_said_and_a_reader_that_has_gone_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Full(OSError(errno.ENOSPC, "No space left on device"), -1))
    with pytest.raises(InputError, match="cannot write the standard output: No space left on device"):
        console.emit({}, "text", False)
    monkeypatch.setattr(sys, "stdout", Full(BrokenPipeError(errno.EPIPE, "Broken pipe"), -1))
    with pytest.raises(BrokenPipeError):
        console.emit({}, "text", True)


def test_what_cannot_be_written_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "full").open("w") as handle:
        monkeypatch.setattr(sys, "stderr", Full(OSError(errno.ENOSPC, "No space left on device"), handle.fileno()))
        monkeypatch.setattr(sys, "stdout", None)
        console.log("nobody reads this")
        console.end_streams()
        assert os.path.samestat(os.fstat(handle.fileno()), os.stat(os.devnull))


def test_a_run_that_is_trained_further_while_it_is_exported(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeguard.run import Run

    digests = iter(("one", "two"))
    monkeypatch.setattr(Run, "checkpoint_sha256", lambda run: next(digests))
    done = program("export", "run", "--bits", "8", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "run was trained further while it was read; export it when its training has ended" in done.stderr
    assert not (tmp_path / "out").exists()
