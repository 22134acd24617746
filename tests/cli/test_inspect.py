"""`edgeguard inspect` on ONNX files, from outside."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import graphs
import pytest

from edgeguard.cli import main

pytest.importorskip("onnx")

Program = Callable[..., int]


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch) -> Program:
    """Run `edgeguard inspect ARGUMENTS`. Returns: the exit code."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["edgeguard", "inspect", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        assert isinstance(caught.value.code, int | None)
        return caught.value.code or 0

    return run


def test_a_file_as_table_and_as_json(
    inspect: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgeguard.export.onnx_writer import write_onnx

    graph = graphs.every_op(4)
    write_onnx(graph, tmp_path / "größe.onnx")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the working folder')")
    assert inspect("größe.onnx", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "edgeguard.inspect/1"
    assert document["file"] == "größe.onnx"
    assert document["integer_mac_coverage"] == 1
    assert inspect("größe.onnx") == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[1].startswith("100% of ")
    assert shown.err == ""


@pytest.mark.parametrize(
    ("name", "words"),
    [("missing.onnx", "cannot read"), ("text.onnx", "is not an ONNX model"), ("", "is not an artifact")],
)
def test_bad_input_is_one_sentence(
    inspect: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    assert inspect(tmp_path / name) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert words in shown.err
