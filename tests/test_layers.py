"""Who may import whom: within the package, and from outside it."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIBLINGS = ("export", "targets", "calib")
CORE = {
    "__init__", "errors", "inttype", "files", "graph", "graph_nodes", "graph_check", "graph_io", "patch", "artifact", "inspection",
    "statistics", "pool_artifact", "memory", "open_inference", "secrets", "locks", "folders",
}  # fmt: skip

INTERNAL: dict[str, set[str]] = {
    "core": set(),
    "data": {"core"},
    "models": {"core"},
    "quant": {"core"},
    "calib": {"core", "quant"},
    "run": {"core", "models", "quant"},
    "attacks": {"core", "quant"},
    "defences": {"core", "quant", "attacks", "calib", "data", "models", "run"},
    "export": {"core", "quant", "targets"},
    "targets": {"core"},
    "report": {"core"},
    "serve": {"core", "targets"},
    "patch_files": {"core", "report"},
    "certify": {"core"},
    "zoo": {"core"},
    "__main__": {"cli"},
    "verify": {"core", "attacks", "data", "patch_files", "report", "targets"},
    "analysis": {"core", "attacks", "data", "patch_files", "report", "targets", "verify"},
    "cli": {
        "core", "data", "models", "quant", "calib", "run", "attacks", "defences", "export", "targets", "report",
        "verify", "certify", "analysis", "patch_files", "zoo", "serve",
    },
}  # fmt: skip
"""What each layer may import of the package, besides itself. Nobody imports cli but `python -m edgeguard`."""

EXTERNAL: dict[str, set[str]] = {
    "core": {"numpy", "tomli"},
    "data": {"numpy", "PIL", "torchvision"},
    "models": {"numpy", "torch", "torchvision", "safetensors"},
    "quant": {"numpy", "torch", "brevitas"},
    "calib": {"numpy", "torch", "brevitas"},
    "run": {"numpy", "torch", "safetensors"},
    "attacks": {"numpy", "torch"},
    "defences": {"numpy", "torch", "torchvision", "brevitas"},
    "export": {"numpy", "torch", "brevitas", "onnx", "onnxruntime", "tensorrt"},
    "targets": {"numpy", "onnx", "onnxruntime", "tensorrt", "cuda", "openvino", "torch", "tomli", "grpc", "google"},
    "report": {"numpy", "matplotlib"},
    "serve": {"numpy", "uvicorn"},
    "patch_files": {"numpy", "PIL", "matplotlib"},
    "certify": {"numpy"},
    "zoo": set(),
    "__main__": set(),
    "analysis": {"numpy", "torch"},
    "verify": {"numpy", "torch", "tomli"},
    "cli": {
        "numpy", "typer", "rich", "tomli", "torch", "brevitas", "matplotlib", "onnx", "onnxruntime", "tensorrt", "openvino",
    },
}
"""What each layer may import from outside the standard library, at the top of a file or later."""

RUNTIMES = {"onnxruntime", "tensorrt", "openvino", "torch"}
STANDARD = sys.stdlib_module_names | {"tomllib"}
TORCH_FREE = (
    "", ".cli", ".data", ".targets", ".artifact", ".pool_artifact", ".inspection", ".report", ".certify", ".zoo", ".serve",
)  # fmt: skip
HEAVY = ("torch", "torchvision", "onnx", "brevitas", "PIL")

Import = tuple[int, str]
"""Line and dotted name."""


def sources() -> list[Path]:
    folders = [ROOT / "edgeguard", *(ROOT / name for name in SIBLINGS)]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def layer_of(path: Path) -> str:
    """The layer of a source file, from its place."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = parts[0] if parts[0] in SIBLINGS else parts[1]
    name = "core" if len(parts) == 2 and parts[0] == "edgeguard" and name in CORE else name
    assert name in INTERNAL, f"{path}: add {name!r} to INTERNAL and EXTERNAL (or to CORE) in {__file__}"
    return name


def layer_of_module(module: str) -> str:
    """The layer of a dotted name within the package; a bare attribute of the package, as __version__, is core."""
    parts = module.split(".")
    if len(parts) == 1 or parts[1] in CORE:
        return "core"
    if parts[1] in INTERNAL:
        return parts[1]
    assert importlib.util.find_spec(f"edgeguard.{parts[1]}") is None, f"add edgeguard.{parts[1]} to a layer"
    return "core"


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file, wherever it stands, `require("x", ...)` and `import_module("x")` included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the whole name of the module"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}" if node.module == "edgeguard" else str(node.module)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("require", "import_module") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def violations(path: Path, layer: str) -> Iterator[str]:
    place = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    for line, module in imports(path):
        package = module.split(".")[0]
        if package == "edgeguard":
            other = layer_of_module(module)
            if other != layer and other not in INTERNAL[layer]:
                yield f"{place}:{line}: {layer} must not import {other} ({module})"
        elif package not in STANDARD and package not in EXTERNAL[layer]:
            yield f"{place}:{line}: {layer} must not import {package}"


def test_every_layer_is_in_both_tables() -> None:
    assert INTERNAL.keys() == EXTERNAL.keys()
    assert all(allowed <= INTERNAL.keys() - {"cli"} for name, allowed in INTERNAL.items() if name != "__main__")


def test_the_layers_have_no_cycle() -> None:
    done: set[str] = set()
    while left := {layer for layer in INTERNAL if layer not in done}:
        free = {layer for layer in left if INTERNAL[layer] <= done}
        assert free, f"cycle among {sorted(left)}"
        done |= free


def test_imports_follow_the_layers() -> None:
    found = [violation for path in sources() for violation in violations(path, layer_of(path))]
    assert not found, "\n".join(found)


def test_targets_keep_to_one_runtime_a_file_and_torch_to_the_twin() -> None:
    for path in (path for path in sources() if layer_of(path) == "targets" and path.name != "__init__.py"):
        used = {module.split(".")[0] for _, module in imports(path)} & RUNTIMES
        assert len(used) <= 1, f"{path} imports {sorted(used)}"
        assert "torch" not in used or path.name.startswith("twin"), f"{path} imports torch"


@pytest.mark.parametrize(
    ("source", "layer", "count"),
    [
        ("import edgeguard.targets", "attacks", 1),
        ("from edgeguard import targets", "attacks", 1),
        ("from edgeguard.targets.twin import Twin", "attacks", 1),
        ("def f():\n    from edgeguard.cli import main", "verify", 1),
        ("from edgeguard import __version__, files\nimport edgeguard.errors", "attacks", 0),
        ("from edgeguard.quant import scheme", "attacks", 0),
        ("import torch", "core", 1),
        ("from edgeguard.errors import require\nrequire('torch', 'train')", "core", 1),
        ("import importlib\nimportlib.import_module('onnx.helper')", "quant", 1),
        ("import targets", "verify", 1),
        ("import json, numpy as np", "core", 0),
        ("import tomli", "report", 1),
        ("from edgeguard.report import read", "attacks", 1),
    ],
)
def test_the_check_itself(tmp_path: Path, source: str, layer: str, count: int) -> None:
    (tmp_path / "source.py").write_text(source)
    assert len(list(violations(tmp_path / "source.py", layer))) == count


def test_an_unknown_module_is_an_error() -> None:
    for place in ("edgeguard/new.py", "edgeguard/new/__init__.py"):
        with pytest.raises(AssertionError, match="add 'new' to INTERNAL"):
            layer_of(ROOT / place)


@pytest.mark.parametrize("name", TORCH_FREE, ids=lambda name: f"edgeguard{name}")
def test_the_base_install_imports_nothing_heavy(name: str, tmp_path: Path) -> None:
    module = f"edgeguard{name}"
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} does not exist yet")
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
