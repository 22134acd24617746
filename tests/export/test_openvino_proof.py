"""The proof for OpenVINO: true for what we write, and able to catch what computes in float."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest

from edgeguard.errors import ExportError

pytest.importorskip("openvino")
onnx = pytest.importorskip("onnx")

from onnx import helper, numpy_helper  # noqa: E402

from edgeguard.export import openvino_proof  # noqa: E402
from edgeguard.export.qdq_writer import to_qdq  # noqa: E402

LAYER = "conv2"
Prove = Callable[..., dict[str, Any]]


@pytest.fixture
def proved(tmp_path: Path) -> Prove:
    """Spoil the model of a 4-bit graph, then let it prove itself."""

    def run(spoil: Callable[[Any], None] = lambda model: None, bits: int = 4, **options: Any) -> dict[str, Any]:
        graph = graphs.every_op(bits)
        model = to_qdq(graph, signed=False)
        spoil(model)
        onnx.save(model, tmp_path / "model.onnx")
        images = graphs.random_images(graph.input_shape, 40)
        return openvino_proof.prove(graph, tmp_path / "model.onnx", images, **options)

    return run


def node_of(model: Any, name: str) -> Any:
    return next(node for node in model.graph.node if node.name == name)


def weight_of(model: Any, layer: str = LAYER) -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.name == f"{layer}/weight")


def make_float(model: Any) -> None:
    """The layer reads values that are not quantized."""
    node = node_of(model, LAYER)
    quantize = next(n for n in model.graph.node if n.output[0] == node_of(model, f"{LAYER}/input0").input[0])
    node.input[0] = quantize.input[0]


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_what_we_write_is_integer(proved: Prove, bits: int) -> None:
    graph = graphs.every_op(bits)
    document = proved(bits=bits)
    layers = document["layers"]
    assert document["integer_mac_coverage"] == 1.0
    assert document["allowed"] is True
    assert document["images"] == 40
    assert document["foreign"] == []
    assert document["runtime"]["runtime"] == "openvino"
    assert document["macs"] == sum(graph.macs(node) for node in graph.nodes) == sum(layer["macs"] for layer in layers)
    assert [layer["name"] for layer in layers] == ["conv1", "conv2", "conv3", "conv6", "conv7", "linear16", "linear17"]
    assert [layer["op"] for layer in layers] == ["conv", *["grouped conv"] * 2, *["conv"] * 2, *["linear"] * 2]
    assert {layer["storage_bits"] for layer in layers} == {layer["compute_bits"] for layer in layers} == {8}
    assert all("u8xi8" in layer["kernel"] or "i8xi8" in layer["kernel"] for layer in layers)
    assert document["agreement"] >= 0.975
    assert sum(document["steps"].values()) == 400
    assert document["steps"]["0"] >= 360
    assert isinstance(document["identical"], bool)
    assert document["max_difference"] >= 0


def test_a_float_layer_is_caught_and_named(proved: Prove) -> None:
    with pytest.raises(ExportError, match=rf"OpenVINO computes in float: {LAYER} \(Convolution .* f32xf32\)"):
        proved(make_float)
    document = proved(make_float, allow_float=True)
    layer = next(layer for layer in document["layers"] if layer["name"] == LAYER)
    assert layer["compute_bits"] == 32
    assert document["integer_mac_coverage"] == 1 - layer["macs"] / document["macs"] < 1.0


def test_another_weight_is_reported_by_the_logits(proved: Prove) -> None:
    def spoil(model: Any) -> None:
        tensor = weight_of(model)
        tensor.CopyFrom(numpy_helper.from_array(np.clip(-numpy_helper.to_array(tensor), -7, 7), tensor.name))

    document = proved(spoil)
    assert document["identical"] is False
    assert document["max_difference"] > 0.01
    assert document["steps"].get("0", 0) < 200
    assert document["agreement"] < 1


def test_a_weight_beyond_its_type_is_caught(proved: Prove) -> None:
    def spoil(model: Any) -> None:
        values = numpy_helper.to_array(weight_of(model)).copy()
        values.flat[0] = 8
        weight_of(model).CopyFrom(numpy_helper.from_array(values, f"{LAYER}/weight"))

    with pytest.raises(ExportError, match=f"beyond their integer type: {LAYER}"):
        proved(spoil)
    assert proved(spoil, allow_float=True)["allowed"] is False


def test_a_foreign_product_lowers_the_coverage(proved: Prove) -> None:
    def spoil(model: Any) -> None:
        last = next(node for node in model.graph.node if "logits" in node.output)
        last.output[0] = "before"
        model.graph.initializer.append(numpy_helper.from_array(np.eye(10, dtype=np.float32)[::-1].copy(), "swap"))
        model.graph.node.append(helper.make_node("MatMul", ["before", "swap"], ["logits"], name="extra"))

    with pytest.raises(ExportError, match=r"computes in float: .*f32"):
        proved(spoil)
    document = proved(spoil, allow_float=True)
    assert [item["macs"] for item in document["foreign"]] == [100]
    assert document["integer_mac_coverage"] < 1.0


def test_a_layer_that_is_not_in_the_file_is_an_error(proved: Prove) -> None:
    with pytest.raises(ExportError, match=f"layer '{LAYER}' is not in the ONNX file"):
        proved(lambda model: setattr(node_of(model, LAYER), "name", "other"))


def test_weights_in_float_are_an_error(proved: Prove) -> None:
    def spoil(model: Any) -> None:
        values = numpy_helper.to_array(weight_of(model)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, "real"))
        node_of(model, LAYER).input[1] = "real"

    with pytest.raises(ExportError, match=f"layer '{LAYER}': its weights are not stored as INT8"):
        proved(spoil)
