from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving import Served, serve_artifact, serve_toy
from small_artifact import small_graph

from edgeguard.artifact import Artifact


@pytest.fixture(scope="session")
def ort_artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A small network, exported for ONNX Runtime."""
    pytest.importorskip("onnx")
    pytest.importorskip("torch")
    import graphs

    from edgeguard.export import export_artifact

    graph = small_graph()
    return export_artifact(
        graph, tmp_path_factory.mktemp("artifacts") / "small-4", target="ort", width="4", weight_bits=4, activation_bits=4,
        images=graphs.random_images(graph.input_shape, 2), source={"patch_sizes": [4]},
    )  # fmt: skip


@pytest.fixture(scope="session")
def served(ort_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`edgeguard serve` of it, for all tests that leave it as it was."""
    with serve_artifact(ort_artifact.path, tmp_path_factory.mktemp("served")) as server:
        yield server


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A toy engine that takes bodies of at most 100,000 bytes and 16 images."""
    with serve_toy(tmp_path_factory.mktemp("toy"), max_body=100_000, max_batch=16) as server:
        yield server
