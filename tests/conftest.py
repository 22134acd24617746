"""The tests run on the installed package.

`python -m pytest` puts the checkout first on the search path. There, `edgeguard/` lacks its three sibling folders,
which only the installed package has inside, so the checkout's own folder is taken off the path.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


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
