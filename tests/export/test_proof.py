"""The proof: true for what we write, and able to catch every way in which a model only pretends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest

from edgeguard import graph as g
from edgeguard.errors import ExportError
from edgeguard.graph import IntegerGraph
from edgeguard.targets import ort

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgeguard.export import proof  # noqa: E402
from edgeguard.export.onnx_writer import to_onnx  # noqa: E402
from edgeguard.export.proof import prove  # noqa: E402

LAYER = "conv2"
"""A depthwise convolution at the chosen width."""
Prove = Callable[..., dict[str, Any]]


@pytest.fixture
def proved(tmp_path: Path) -> Prove:
    """Spoil the model of a 4-bit graph, then let it prove itself."""

    def run(spoil: Callable[[Any], None] = lambda model: None, graph: IntegerGraph | None = None, **options: Any) -> Any:
        graph = graph or graphs.every_op(4)
        model = to_onnx(graph, options.pop("min_storage_bits", 2))
        spoil(model)
        onnx.save(model, tmp_path / "model.onnx")
        return prove(graph, tmp_path / "model.onnx", graphs.random_images(graph.input_shape, 40), **options)

    return run


def node_of(model: Any, name: str) -> Any:
    return next(node for node in model.graph.node if node.name == name)


def initializer(model: Any, name: str) -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def replace(model: Any, old: Any, new: list[Any]) -> None:
    nodes = list(model.graph.node)
    index = next(i for i, node in enumerate(nodes) if node.name == old.name)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:index], *new, *nodes[index + 1 :]])


def make_float(model: Any) -> None:
    """The usual low-bit export: INT4 weights -> DequantizeLinear -> Conv, which the runtime executes in float."""
    old = node_of(model, LAYER)
    x, x_scale, x_zero, _, w_scale, _, y_scale, y_zero, _ = old.input
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(8, np.int8).astype(
        helper.tensor_dtype_to_np_dtype(TensorProto.INT4)), "zeros4"))  # fmt: skip
    kept = {a.name: helper.get_attribute_value(a) for a in old.attribute}
    replace(model, old, [
        helper.make_node("DequantizeLinear", [x, x_scale, x_zero], ["real.x"], name="real.x"),
        helper.make_node("DequantizeLinear", [f"{LAYER}/weight/stored", w_scale, "zeros4"], ["real.w"], axis=0),
        helper.make_node("Conv", ["real.x", "real.w"], ["real.y"], name=LAYER, **kept),
        helper.make_node("QuantizeLinear", ["real.y", y_scale, y_zero], list(old.output), name="real.q"),
    ])  # fmt: skip
    cast = node_of(model, f"{LAYER}/weight/cast")
    replace(model, cast, [])


def append(model: Any, op: str, *constants: tuple[str, Any]) -> None:
    """Put an operation behind the logits."""
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "before"
    for name, values in constants:
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    model.graph.node.append(helper.make_node(op, ["before", *(name for name, _ in constants)], ["logits"], name="extra"))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_what_we_write_is_integer(proved: Prove, bits: int) -> None:
    graph = graphs.every_op(bits)
    document = proved(graph=graph)
    layers = document["layers"]
    assert document["integer_mac_coverage"] == 1.0
    assert document["allowed"] is True
    assert document["identical"] is True
    assert document["max_difference"] == 0.0
    assert document["images"] == 40
    assert document["foreign"] == []
    assert document["runtime"]["runtime"] == "ort"
    assert document["macs"] == sum(graph.macs(node) for node in graph.nodes) == sum(layer["macs"] for layer in layers)
    assert [layer["name"] for layer in layers] == ["conv1", "conv2", "conv3", "conv6", "conv7", "linear16", "linear17"]
    assert [layer["op"] for layer in layers] == ["conv", *["grouped conv"] * 2, *["conv"] * 2, *["linear"] * 2]
    small = {8: 8, 4: 4, 3: 4, 2: 2}[bits]
    assert [layer["storage_bits"] for layer in layers] == [8, *[small] * 5, 8]
    assert {layer["compute_bits"] for layer in layers} == {8}
    assert layers[0]["kernel"] == "QLinearConv (CPUExecutionProvider)"
    assert layers[-1]["kernel"] == "QGemm (CPUExecutionProvider)"


def test_a_float_layer_is_caught_and_named(proved: Prove) -> None:
    with pytest.raises(ExportError, match=rf"computes in float: {LAYER} \(Conv \(CPUExecutionProvider\)\)"):
        proved(make_float)


def test_a_float_layer_can_be_allowed_and_is_reported(proved: Prove) -> None:
    document = proved(make_float, allow_float=True)
    layer = next(layer for layer in document["layers"] if layer["name"] == LAYER)
    assert layer["compute_bits"] == 32
    assert layer["storage_bits"] == 4, "small in the file and float in the engine: the very thing to show"
    assert document["integer_mac_coverage"] == 1 - layer["macs"] / document["macs"] < 1.0


def set_weight(value: int, name: str = f"{LAYER}/weight") -> Callable[[Any], None]:
    def spoil(model: Any) -> None:
        tensor = initializer(model, name)
        values = numpy_helper.to_array(tensor).copy()
        values.flat[0] = value if values.flat[0] != value else value - 1
        tensor.CopyFrom(numpy_helper.from_array(values, name))

    return spoil


def test_a_weight_beyond_its_type_is_caught(proved: Prove) -> None:
    """Stored as INT8, a 4-bit weight could hold anything; -8 leaves the narrow range by one."""
    for value in (8, -8, 127):
        with pytest.raises(ExportError, match=f"beyond their integer type: {LAYER}"):
            proved(set_weight(value), min_storage_bits=8)
    assert proved(set_weight(8), min_storage_bits=8, allow_float=True)["allowed"] is False


def test_another_weight_within_the_type_is_caught_by_the_logits(proved: Prove) -> None:
    with pytest.raises(ExportError, match=r"logits differ from the reference on \d+ images, first on 0"):
        proved(set_weight(7), min_storage_bits=8)
    document = proved(set_weight(7), min_storage_bits=8, allow_float=True)
    assert document["identical"] is False
    assert document["max_difference"] > 0


def test_a_foreign_operation_is_caught(proved: Prove) -> None:
    with pytest.raises(ExportError, match=r"computes in float: extra \(Tanh\)"):
        proved(lambda model: append(model, "Tanh"))


def test_a_foreign_product_lowers_the_coverage_even_where_the_logits_agree(proved: Prove) -> None:
    def spoil(model: Any) -> None:
        append(model, "MatMul", ("identity", np.eye(10, dtype=np.float32)))

    with pytest.raises(ExportError, match=r"extra \(MatMul\)"):
        proved(spoil)
    document = proved(spoil, allow_float=True)
    assert document["identical"] is True
    assert document["foreign"] == [{"name": "extra", "op": "MatMul", "macs": 100}]
    assert document["integer_mac_coverage"] < 1.0


def test_a_layer_that_is_not_in_the_file_is_an_error(proved: Prove) -> None:
    def spoil(model: Any) -> None:
        node_of(model, LAYER).name = "other"

    with pytest.raises(ExportError, match=f"layer '{LAYER}' is not in the ONNX file"):
        proved(spoil)


def test_a_layer_that_the_runtime_drops_is_an_error(proved: Prove) -> None:
    """A decoy that carries the layer's name feeds nothing: it is in the file but not in the optimized graph."""

    def spoil(model: Any) -> None:
        decoy = onnx.NodeProto()
        decoy.CopyFrom(node_of(model, LAYER))
        decoy.output[0] = "nowhere"
        node_of(model, LAYER).name = "other"
        model.graph.node.append(decoy)

    with pytest.raises(ExportError, match=f"not exactly one kernel in the runtime's optimized graph for: {LAYER}$"):
        proved(lambda model: (spoil(model), set_unique_weights(model)))


def set_unique_weights(model: Any) -> None:
    """Give the working node parameters of its own, so that nothing betrays it."""
    node = node_of(model, "other")
    for index in (3, 4, 5, 8):
        produced = next((n for n in model.graph.node if node.input[index] in n.output), None)
        source = initializer(model, produced.input[0] if produced is not None else node.input[index])
        values = numpy_helper.to_array(source)
        values = values.astype(np.int8) if produced is not None else values
        model.graph.initializer.append(numpy_helper.from_array(values, f"own{index}"))
        node.input[index] = f"own{index}"


def test_weights_that_are_computed_at_run_time_are_an_error(proved: Prove) -> None:
    def spoil(model: Any) -> None:
        node_of(model, f"{LAYER}/weight/cast").op_type = "Sign"

    with pytest.raises(ExportError, match=f"'{LAYER}': its weights are not stored in the ONNX file but computed"):
        proved(spoil)


def test_an_unknown_storage_type_is_an_error(proved: Prove, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(proof.BITS, TensorProto.INT4)
    with pytest.raises(ExportError, match=f"layer '{LAYER}': unknown storage type"):
        proved()


def test_cpus_without_vnni(proved: Prove, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the runtime rewrites weights to uint8 and renames them; the layers are still found, and exact."""
    monkeypatch.setattr(ort, "session_options", lambda wide=True: {ort.PRECISION: "1"})
    document = proved(graph=graphs.every_op(8))
    assert document["integer_mac_coverage"] == 1.0
    assert document["identical"] is True
    assert document["runtime"]["options"] == {ort.PRECISION: "1"}


def test_equal_constants_of_different_layers_are_told_apart(proved: Prove) -> None:
    """The runtime keeps one of several equal constants, here the biases, so it no longer says whose layer is whose."""
    graph = graphs.every_op(4)
    nodes = tuple(
        dataclasses.replace(node, bias=np.zeros_like(node.bias)) if isinstance(node, g.Conv) else node
        for node in graph.nodes
    )
    result = proved(graph=IntegerGraph(nodes, graph.tensors))
    assert result["integer_mac_coverage"] == 1.0
    assert [layer["name"] for layer in result["layers"]] == [n.name for n in nodes if isinstance(n, g.Conv | g.Linear)]
