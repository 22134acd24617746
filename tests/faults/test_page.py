"""`docs/reliability.md` shows what `benchmarks/faults.py` wrote down."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def driver() -> Any:
    spec = importlib.util.spec_from_file_location("faults_driver", ROOT / "benchmarks" / "faults.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_page_are_the_results() -> None:
    faults = driver()
    document = json.loads(faults.RESULT.read_text(encoding="utf-8"))
    page = faults.PAGE.read_text(encoding="utf-8")
    for name, table in faults.tables(document).items():
        assert f"{faults.BEGIN.format(name)}\n{table}\n{faults.END.format(name)}" in page
    assert {row["kind"] for row in document["rows"]} == set(faults.KINDS)
    assert all(row["right"] for row in document["rows"])


def test_a_page_is_filled_again(tmp_path: Path) -> None:
    faults = driver()
    faults.PAGE = tmp_path / "page.md"
    marks = "".join(f"{faults.BEGIN.format(name)}old\n{faults.END.format(name)}\n" for name in ("counts", "disks", "servers"))
    faults.PAGE.write_text(f"before\n{marks}after\n")
    row = {"kind": "disk", "job": "export", "fault": "full", "right": True, "said": "a | b"}
    faults.write_page({"rows": [row, {**row, "right": False}]})
    text = faults.PAGE.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| full disk | export | 2 | 1 |" in text
    assert "| export | full | a / b |" in text
    assert "old" not in text


def test_what_is_of_one_run_alone_is_not_written_down() -> None:
    said = "edgeguard: http://127.0.0.1:4711/v2/models/m: cannot write /tmp/x/run"
    assert driver().tidy(said, Path("/tmp/x")) == "edgeguard: http://127.0.0.1:8000/v2/models/m: cannot write /run"
