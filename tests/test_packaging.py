"""What setuptools is told against what lies on disk."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import sys
from pathlib import Path
from typing import Any

import edgeguard

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def package_folders() -> dict[str, Path]:
    """Every folder with Python files below the roots of package-dir, and the package it becomes."""
    found = {}
    for package, folder in SETUPTOOLS["package-dir"].items():
        root = ROOT / folder
        for path in {file.parent for file in root.rglob("*.py")}:
            found[".".join([package, *path.relative_to(root).parts])] = path
    return found


def test_the_package_list_is_what_lies_on_disk() -> None:
    folders = package_folders()
    assert sorted(SETUPTOOLS["packages"]) == sorted(folders)
    assert SETUPTOOLS["packages"] == sorted(SETUPTOOLS["packages"])
    missing = [str(folder) for folder in folders.values() if not (folder / "__init__.py").is_file()]
    assert not missing, f"no __init__.py in {missing}"


def test_every_other_file_is_package_data() -> None:
    packages = package_folders()
    for package, folder in packages.items():
        patterns = SETUPTOOLS["package-data"].get(package, [])
        listed = {path for pattern in patterns for path in folder.glob(pattern)}
        inner = [other for other in packages.values() if folder in other.parents]
        others = {
            path for path in folder.rglob("*")
            if path.is_file() and path.suffix not in (".py", ".pyc") and not any(one in path.parents for one in inner)
        }  # fmt: skip
        assert others == listed, f"package-data of {package} and its folder differ"


def test_package_data_is_installed() -> None:
    folders = package_folders()
    for package, patterns in SETUPTOOLS["package-data"].items():
        installed = Path(str(importlib.resources.files(package)))
        for path in (path for pattern in patterns for path in folders[package].glob(pattern)):
            assert (installed / path.relative_to(folders[package])).is_file(), f"{package} is installed without {path}"


def test_versions_agree() -> None:
    version = PROJECT["project"]["version"]
    assert edgeguard.__version__ == version
    assert importlib.metadata.version("edgeguard") == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_one_python_version() -> None:
    lowest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + lowest.replace(".", "")
    assert PROJECT["tool"]["mypy"]["python_version"] == lowest


def test_the_license_is_there() -> None:
    for name in PROJECT["project"]["license-files"]:
        assert (ROOT / name).is_file()
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
