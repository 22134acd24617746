"""`benchmarks/serve_load.py`, briefly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgeguard.artifact import Artifact

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "serve_load.py"


@pytest.mark.slow
def test_a_short_load(ort_artifact: Artifact, tmp_path: Path) -> None:
    options = ["--seconds", "3", "--clients", "16", "--out", str(tmp_path / "o.json")]
    command = [sys.executable, str(SCRIPT), str(ort_artifact.path), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    document = json.loads((tmp_path / "o.json").read_text())
    assert list(document["load"]["outcomes"]) == ["right"]
    assert document["load"]["requests"] > 16
    assert document["overload"]["outcomes"].keys() <= {"right", "503"}
    assert all(row["bit_identical"] for row in document["throughput"]["rows"])
