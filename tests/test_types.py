"""mypy on the package as it is installed.

mypy does not see where an editable install maps `edgeguard.export` and its siblings, so for one the package is laid out
in a temporary folder, by the same table that setuptools reads.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


def is_editable() -> bool:
    direct = importlib.metadata.distribution("edgeguard").read_text("direct_url.json")
    return bool(direct and json.loads(direct).get("dir_info", {}).get("editable"))


def lay_out(destination: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for package, folder in project["tool"]["setuptools"]["package-dir"].items():
        shutil.copytree(
            ROOT / folder,
            destination.joinpath(*package.split(".")),
            ignore=shutil.ignore_patterns("__pycache__"),
            dirs_exist_ok=True,
        )


@pytest.mark.slow
def test_mypy_strict(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    pytest.importorskip("mypy")
    pytest.importorskip("torch")
    if is_editable():
        lay_out(tmp_path)
    cache = ["--cache-dir", str(pytestconfig.cache.mkdir("mypy"))] if pytestconfig.cache else []
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml"), *cache]
    result = subprocess.run([*command, "-p", "edgeguard"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
