"""What a runtime computes between its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest
from small_artifact import small_graph, write_artifact

from edgeguard.artifact import Artifact
from edgeguard.errors import EngineError, InputError
from edgeguard.graph import IntegerGraph
from edgeguard.targets import layers, open_engine, reference
from edgeguard.targets.layers import UNREADABLE, layer_values, open_layers

pytest.importorskip("onnx")

from edgeguard.export import export_artifact


def export(graph: IntegerGraph, folder: Path, target: str) -> Artifact:
    if target == "openvino":
        pytest.importorskip("openvino")
    images = graphs.random_images(graph.input_shape, 2)
    return export_artifact(
        graph, folder / target, target=target, width="4", weight_bits=4, activation_bits=4, images=images, source={}
    )


@pytest.mark.parametrize("build", [graphs.every_op, graphs.gated], ids=["every-op", "gated"])
def test_onnxruntime_has_the_references_integers_in_every_tensor(build: Any, tmp_path: Path) -> None:
    graph = build(4)
    artifact = export(graph, tmp_path, "ort")
    images = graphs.random_images(graph.input_shape, 5, seed=3)
    reader = open_layers(artifact, threads=1)
    got = reader(images)
    expected = reference.run(graph, images, keep=graph.tensors)
    assert list(got) == [*reader.names, graph.output]
    for name, values in got.items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)
    quantized = [name for name, tensor in graph.tensors.items() if tensor.scale is not None]
    assert sorted([*reader.names, *reader.skipped]) == sorted(quantized)
    assert any(graph.tensors[name].dtype.signed for name in reader.names)
    assert any(not graph.tensors[name].dtype.signed for name in reader.names)
    with open_engine(artifact, threads=1) as engine:
        np.testing.assert_array_equal(engine(images), got[graph.output])


def test_tensors_that_the_file_does_not_hold_are_listed(tmp_path: Path) -> None:
    graph = graphs.resnet20(4)
    reader = open_layers(export(graph, tmp_path, "ort"), names=[*graph.tensors])
    reasons = {name: reason.split(":")[0] for name, reason in reader.skipped.items()}
    pooled = next(node.output for node in graph.nodes if type(node).__name__ == "AveragePool")
    assert reasons[pooled] == "not in the model file under its own name"
    assert reasons["pixels"] == "it is not a quantized tensor"
    assert not set(reader.names) & reasons.keys()
    assert {*reader.names, *reasons} == graph.tensors.keys()


def test_openvino_has_integers_a_step_apart_at_most(tmp_path: Path) -> None:
    graph = graphs.every_op(4)
    artifact = export(graph, tmp_path, "openvino")
    images = graphs.random_images(graph.input_shape, 5, seed=3)
    reader = open_layers(artifact, threads=1)
    assert not reader.skipped
    got, expected = reader(images), reference.run(graph, images, keep=graph.tensors)
    for name in reader.names:
        assert got[name].shape == expected[name].shape
        assert (got[name] == expected[name]).mean() > 0.99, name
    with open_engine(artifact, threads=1) as engine:
        np.testing.assert_array_equal(engine(images), got[graph.output])


def test_chosen_names_and_the_reference(tmp_path: Path) -> None:
    graph = small_graph()
    artifact = write_artifact(tmp_path / "a", graph, "4")
    images = graphs.random_images(graph.input_shape, 3)
    name = graph.nodes[1].output
    got = layer_values(artifact, "reference", images, [name])
    assert got.keys() == {name, graph.output}
    np.testing.assert_array_equal(got[name], reference.run(graph, images, [name])[name])


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", small_graph(), "4")
    images = graphs.random_images((3, 16, 16), 1)
    with pytest.raises(InputError, match="layers of 'trt' cannot be read: a TensorRT plan"):
        layer_values(artifact, "trt", images)
    with pytest.raises(InputError, match="was exported for 'reference'; its layers cannot be read in 'ort'"):
        layer_values(artifact, "ort", images)
    with pytest.raises(InputError, match="the graph has no tensor 'nonsense'"):
        layer_values(artifact, None, images, ["nonsense"])
    with pytest.raises(InputError, match="tensor 'pixels': got"):
        layer_values(artifact, None, images[:, :, 1:])
    assert set(UNREADABLE) == {"remote", "trt", "twin"}


def test_a_failing_runtime_is_an_engine_error() -> None:
    def fail(images: Any) -> Any:
        raise RuntimeError("no memory")

    with pytest.raises(EngineError, match="ort failed to run the model with its layers as outputs: no memory"):
        layers._guarded("ort", fail)(np.zeros((1, 3, 4, 4), np.uint8))
