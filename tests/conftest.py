"""The tests run on the installed package.

`python -m pytest` puts the checkout first on the search path. There, `edgeguard/` lacks its three sibling folders,
which only the installed package has inside, so the checkout's own folder is taken off the path.

With `-n` the files are shared out to processes: those with a slow test go first, so that none is left working alone at the end, and
torch computes with one thread in each.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def gpu() -> None:
    """Skips where TensorRT, its CUDA bindings or an NVIDIA GPU is missing."""
    pytest.importorskip("tensorrt")
    from edgeguard.errors import MissingDependency
    from edgeguard.targets.tensorrt import Cuda

    try:
        Cuda()
    except MissingDependency as exc:
        pytest.skip(str(exc))
