from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from small_artifact import labelled, small_graph, write_artifact

from edgeguard.artifact import Artifact
from edgeguard.data.dataset import Dataset
from edgeguard.verify import VerifyOptions


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_artifact(tmp_path_factory.mktemp("artifacts") / "small-4", small_graph(), "4")


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    return labelled(small_graph(), 160)


@pytest.fixture
def quick() -> Callable[..., VerifyOptions]:
    """Options that craft in a second."""

    def options(**changes: Any) -> VerifyOptions:
        return VerifyOptions(**{"patch_sizes": (4,), "steps": 12, "attack_batch": 20, "stride": 4, **changes})

    return options
