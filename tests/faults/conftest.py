from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

pytest.importorskip("torch")
pytest.importorskip("brevitas")

from commands import Nursery
from jobs import Workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """What all jobs of these tests begin with, and what they leave undisturbed."""
    if sys.platform != "linux":
        pytest.skip("the faults are made with what Linux has")
    folder = tmp_path_factory.mktemp("faults")
    with Nursery(folder / "logs") as nursery:
        yield Workshop(folder / "workshop", nursery)
