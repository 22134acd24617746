"""A short run of the coverage-guided fuzzer, where it is installed: it starts, reaches code, and finds nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz.py"


def test_a_few_seconds(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    command = [sys.executable, str(SCRIPT), "--seconds", "3", "--reader", "gate", "--findings", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = done.stdout.splitlines()[-1].strip("| ").split(" | ")
    assert cells[0] == "gate"
    executions, _, _, before, after, findings = map(int, cells[1:])
    assert executions > 20
    assert 0 < before <= after
    assert findings == 0


def test_what_is_no_reader(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    done = subprocess.run([sys.executable, str(SCRIPT), "--reader", "x"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "there is no reader 'x'; expected one of artifact" in done.stderr
