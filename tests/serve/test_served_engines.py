"""Other engines than ONNX Runtime's behind the same server."""

from __future__ import annotations

from pathlib import Path

import graphs
import numpy as np
import pytest
from serving import serve_artifact
from small_artifact import small_graph, write_artifact

from edgeguard.pool_artifact import write_pool
from edgeguard.targets import open_engine
from edgeguard.targets.remote import RemoteEngine, read_remote


def test_a_pool_draws_for_every_request(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    for bits in (8, 4):
        write_artifact(tmp_path / "pool" / str(bits), small_graph(bits), str(bits))
    pool = write_pool(tmp_path / "pool", ["8", "4"], seed=1)
    images = graphs.random_images((3, 16, 16), 6)
    answers = []
    for artifact in pool.artifacts:
        with open_engine(artifact) as engine:
            answers.append(engine(images))
    assert not np.array_equal(*answers)
    with serve_artifact(pool.path, tmp_path / "run") as server, RemoteEngine(read_remote(server.url)) as engine:
        assert engine.model.claims["width"] == "8, 4"
        drawn = [[np.array_equal(logits, answer) for answer in answers] for logits in engine.stream([images] * 24)]
    assert all(sum(one) == 1 for one in drawn)
    assert 0 < sum(one[0] for one in drawn) < 24


def test_openvino(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnx")
    from edgeguard.export import export_artifact

    graph, images = small_graph(8), graphs.random_images((3, 16, 16), 5)
    artifact = export_artifact(graph, tmp_path / "a", target="openvino", width="8", weight_bits=8, activation_bits=8,
                               images=images, source={})  # fmt: skip
    with open_engine(artifact) as engine:
        expected = engine(images)
    with serve_artifact(artifact.path, tmp_path / "run") as server, RemoteEngine(read_remote(server.url)) as engine:
        assert engine.model.platform == "edgeguard_openvino"
        np.testing.assert_array_equal(engine(images), expected)
