"""What the operating system refuses, and files of options, end in a sentence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_runner import execute

from edgeguard.errors import InputError


@pytest.mark.parametrize("arguments", [("inspect",), ("verify",), ("report",), ("serve",), ("bench",)])
def test_a_name_longer_than_names_may_be(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = execute(tmp_path, *arguments, "x" * 5000)
    assert done.returncode == 2
    assert done.stderr.startswith("edgeguard: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_debug_shows_where(tmp_path: Path) -> None:
    done = execute(tmp_path, "--debug", "inspect", "x" * 5000)
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_a_file_of_options_that_never_ends_or_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "deep.toml").write_text("bits = " + "[" * 20_000)
    (tmp_path / "large.toml").write_text("#" * (2 << 20))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    for name, words in {
        "pipe": "not a plain file", "deep": "is not valid TOML", "large": "at most 1048576", "bytes": "is not valid TOML",
        "missing": "does not exist",
    }.items():  # fmt: skip
        done = execute(tmp_path, "verify", "a", "--config", f"{name}.toml")
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_sentences_are_printable() -> None:
    assert str(InputError("a\nb\x1b[2J\u202e\ud800 \u00e4")) == "a\\nb\\x1b[2J\\u202e\\ud800 \u00e4"
