"""An `IntegerGraph` refuses everything whose integers would not be exact, and says which node and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import graphs
import numpy as np
import pytest

from edgeguard import graph as g
from edgeguard.errors import InputError
from edgeguard.graph import IntegerGraph, Tensor
from edgeguard.inttype import ACCUMULATOR, PIXEL, IntType

GRAPH = graphs.every_op(4)
Changes = Callable[[IntegerGraph], tuple[tuple[g.Node, ...], dict[str, Tensor]]]


def change(kind: type, index: int = 0, **fields: Any) -> Changes:
    """Replace fields of the n-th node of a type."""

    def apply(graph: IntegerGraph) -> tuple[tuple[g.Node, ...], dict[str, Tensor]]:
        found = [node for node in graph.nodes if isinstance(node, kind)]
        values = {key: value(found[index]) if callable(value) else value for key, value in fields.items()}
        new = dataclasses.replace(found[index], **values)
        return tuple(new if node is found[index] else node for node in graph.nodes), dict(graph.tensors)

    return apply


def output(kind: type, index: int = 0, **fields: Any) -> Changes:
    """Replace fields of the tensor that the n-th node of a type writes."""

    def apply(graph: IntegerGraph) -> tuple[tuple[g.Node, ...], dict[str, Tensor]]:
        name = [node.output for node in graph.nodes if isinstance(node, kind)][index]
        return graph.nodes, {**graph.tensors, name: dataclasses.replace(graph.tensors[name], **fields)}

    return apply


def test_properties() -> None:
    assert GRAPH.input_shape == (3, 13, 11)
    assert GRAPH.num_classes == 10
    assert GRAPH.output == "logits"
    conv = next(node for node in GRAPH.nodes if isinstance(node, g.Conv))
    assert GRAPH.macs(conv) == 8 * 3 * 3 * 3 * 13 * 11
    linear = GRAPH.nodes[-2]
    assert isinstance(linear, g.Linear)
    assert GRAPH.macs(linear) == 10 * 24
    assert GRAPH.macs(GRAPH.nodes[0]) == 0
    assert graphs.resnet20(8).input_shape == (3, 32, 32)


def test_resnet20_has_the_published_number_of_multiply_accumulates() -> None:
    graph = graphs.resnet20(8)
    assert sum(graph.macs(node) for node in graph.nodes) == 40_551_040


def test_requantization_rounds_after_each_operation() -> None:
    scale = np.array([0.1, 0.3], np.float32)
    got = g.requantization(0.7, scale, 0.9)
    expected = [np.float32(np.float32(np.float32(0.7) * s) / np.float32(0.9)) for s in scale]
    assert got.dtype == np.float32
    assert got.tolist() == [float(value) for value in expected]


@pytest.mark.parametrize(("a", "b", "ratio"), [(1.0, 1.0, 1.0), (0.5, 2.0, 0.25), (3.0, 0.75, 4.0), (128.0, 1.0, 128.0)])
def test_addition_ratios(a: float, b: float, ratio: float) -> None:
    assert g.add_ratio(a, b) == ratio


@pytest.mark.parametrize(("a", "b"), [(1.0, 3.0), (0.1, 0.3), (1.0, 1.0000001), (256.0, 1.0), (1.0, 256.0)])
def test_additions_that_are_not_exact_are_refused(a: float, b: float) -> None:
    with pytest.raises(InputError, match="power of two"):
        g.add_ratio(a, b)


def test_accumulator_bound_is_reached() -> None:
    node = next(node for node in GRAPH.nodes if isinstance(node, g.Conv) and node.groups == 1 and node.weight.shape[1] > 3)
    for dtype, extreme in ((IntType(8, False), 255), (IntType(8, True), 128)):
        bound = g.accumulator_bound(node, dtype)
        sums = np.abs(node.weight.astype(int)).reshape(len(node.weight), -1).sum(1) * extreme + np.abs(node.bias)
        assert bound == sums.max()
    reach = g.accumulator_reach(node, IntType(8, False))
    assert reach.shape == node.weight.shape[:2]


def wide(node: g.Conv | g.Linear) -> Any:
    return np.full_like(node.bias, 2**31 - 1)


@pytest.mark.parametrize(
    ("changes", "node", "message"),
    [
        (change(g.Conv, input="nowhere"), "conv1", r"reads \['nowhere'\] before"),
        (change(g.Conv, 1, output="conv1.out"), "conv2", "writes 'conv1.out' twice"),
        (change(g.Conv, output="unknown"), "conv1", "unknown"),
        (change(g.Conv, name=""), "", "name must be text"),
        (change(g.Conv, weight=lambda n: n.weight.astype(np.int16)), "conv1", "array of int8, got int16"),
        (change(g.Conv, weight=lambda n: n.weight[..., 0]), "conv1", "unpack"),
        (change(g.Conv, weight=lambda n: n.weight[:, :2]), "conv1", "do not fit 3 channels"),
        (change(g.Conv, 1, weight=lambda n: n.weight + np.int8(20)), "conv2", "weights are not int4"),
        (change(g.Conv, weight_type=IntType(32, True)), "conv1", "weights are not int32"),
        (change(g.Conv, weight_type=IntType(8, False)), "conv1", "weights are not uint8"),
        (change(g.Conv, weight_scale=lambda n: n.weight_scale[1:]), "conv1", "one scale and one bias"),
        (change(g.Conv, weight_scale=lambda n: -n.weight_scale), "conv1", "weight scales must be positive"),
        (change(g.Conv, weight_scale=lambda n: n.weight_scale * np.float32("nan")), "conv1", "finite"),
        (change(g.Conv, weight_scale=lambda n: n.weight_scale.astype(float)), "conv1", "array of float32, got float64"),
        (change(g.Conv, weight_scale=lambda n: n.weight_scale * np.float32(1e-45)), "conv1", "positive"),
        (change(g.Conv, bias=lambda n: n.bias.astype(np.int64)), "conv1", "array of int32, got int64"),
        (change(g.Conv, bias=wide), "conv1", "can leave 32 bits"),
        (change(g.Conv, stride=(0, 1)), "conv1", ""),
        (change(g.Conv, stride=(1,)), "conv1", "stride must be 2 integers"),
        (change(g.Conv, stride=(1.0, 1.0)), "conv1", "stride must be 2 integers"),
        (change(g.Conv, padding=(-1, 1, 3, 1)), "conv1", "none negative"),
        (change(g.Conv, padding=(9, 9, 9, 9)), "conv1", r"writes \(8, 29, 27\), but its output is declared"),
        (change(g.Conv, dilation=(9, 9)), "conv1", "does not fit"),
        (change(g.Conv, 1, groups=3), "conv2", "3 groups do not fit"),
        (change(g.Conv, 1, groups=0), "conv2", "groups do not fit"),
        (change(g.Conv, 1, groups=8.0), "conv2", "groups must be an integer"),
        (change(g.Linear, weight=lambda n: n.weight[:, 1:]), "linear16", "does not fit an input"),
        (change(g.Quantize, scale=lambda n: n.scale[:1]), "quantize", "one scale and zero point per channel"),
        (change(g.Quantize, zero_point=lambda n: n.zero_point + (1 << 25)), "quantize", "zero points are beyond"),
        (change(g.Quantize, scale=lambda n: n.scale * 0), "quantize", "positive"),
        (change(g.Add, other="quantized"), "add4", "cannot add"),
        (change(g.MaxPool, padding=(3, 1, 0, 1)), "maxpool5", ""),
        (change(g.MaxPool, kernel=(1, 1), stride=(2, 2), padding=(0, 0, 0, 1)), "maxpool5", "padding .* smaller"),
        (change(g.MaxPool, kernel=(30, 30)), "maxpool5", "does not fit"),
        (change(g.Clamp, low=5, high=4), "clamp9", "leave nothing"),
        (change(g.Clamp, low=100, high=200), "clamp9", "leave nothing"),
        (change(g.Clamp, low=0.5), "clamp9", "low must be an integer"),
        (change(g.Concat, inputs=()), "concat12", ""),
        (change(g.Concat, inputs=("conv1.out", "clamp9.out")), "concat12", "cannot concatenate"),
        (change(g.Pad, padding=(-1, 0, 0, 0)), "pad11", "none negative"),
        (change(g.Dequantize, scale=lambda n: n.scale[1:]), "logits", "one scale each"),
        (change(g.Dequantize, scale=lambda n: -n.scale), "logits", "positive"),
        (change(g.Dequantize, output="pixels"), "logits", "twice"),
        (change(g.Dequantize, input="linear16.out"), "logits", ""),
        (output(g.Conv, scale=None), "conv1", "positive"),
        (output(g.Conv, scale=0.1), "conv1", "exact in float32"),
        (output(g.Conv, scale=float("inf")), "conv1", "finite"),
        (output(g.Conv, dtype=ACCUMULATOR, scale=None), "conv1", "only a Linear may leave its accumulators"),
        (output(g.Linear, 1, scale=1.0), "linear17", "have no scale"),
        (output(g.Linear, 0, dtype=ACCUMULATOR, scale=None), "linear17", "is quantized"),
        (output(g.Conv, shape=(8, 13, 12)), "conv1", "declared"),
        (output(g.Add, scale=0.375), "add4", "power of two"),
        (output(g.MaxPool, dtype=IntType(3, False)), "maxpool5", "moves integers"),
        (output(g.MaxPool, scale=0.375), "maxpool5", "moves integers"),
        (output(g.Quantize, dtype=ACCUMULATOR), "quantize", "only a Linear"),
    ],
)  # fmt: skip
def test_what_is_not_exact_is_refused(changes: Changes, node: str, message: str) -> None:
    nodes, tensors = changes(GRAPH)
    with pytest.raises(InputError, match=rf"node '{node}' \(\w+\): .*{message}"):
        IntegerGraph(nodes, tensors)


@pytest.mark.parametrize(
    ("changes", "node", "message"),
    [
        (change(g.Multiply, other="quantized"), "Multiply", "multiply"),
        (change(g.Lookup, table=lambda node: node.table[:-1]), "Lookup", "table"),
        (change(g.Lookup, table=lambda node: node.table + 100), "Lookup", "table"),
        (change(g.Lookup, table=lambda node: node.table.astype(np.int32)), "Lookup", "int16"),
        (change(g.Lookup, slope=lambda node: node.slope * np.float32(np.nan)), "Lookup", "slope"),
        (change(g.Slice, stop=9), "Slice", "no channels 0 to 9"),
        (change(g.Slice, start=3), "Slice", "no channels 3 to 3"),
        (change(g.Slice, start=1.0), "Slice", "integer"),
        (change(g.Shuffle, groups=3), "Shuffle", "3 groups"),
        (output(g.Shuffle, scale=0.5), "Shuffle", "equal"),
        (change(g.Take, rows=(0, 13)), "Take", "rows .* there are 13"),
        (change(g.Take, columns=()), "Take", "columns .* there are 11"),
        (change(g.Take, columns=(0, -1)), "Take", "none negative"),
        (output(g.Take, scale=0.5), "Take", "equal"),
    ],
)
def test_tables_products_and_moves_are_checked(changes: Changes, node: str, message: str) -> None:
    nodes, tensors = changes(graphs.gated(4))
    with pytest.raises(InputError, match=rf"{node}.*{message}"):
        IntegerGraph(nodes, tensors)


def test_products_of_tensors_count_as_multiply_accumulates() -> None:
    graph = graphs.gated(4)
    assert [graph.macs(node) for node in graph.nodes if isinstance(node, g.Multiply)] == [8 * 13 * 11, 8 * 12 * 11]


def without_last(graph: IntegerGraph) -> Any:
    return graph.nodes[:-1], graph.tensors


def renamed(graph: IntegerGraph) -> Any:
    return change(g.Conv, 1, name="conv1")(graph)


def idle(graph: IntegerGraph) -> Any:
    return graph.nodes, {**graph.tensors, "idle": Tensor("idle", (1,), PIXEL, 1.0)}


def misnamed(graph: IntegerGraph) -> Any:
    return graph.nodes, {**graph.tensors, "pixels": Tensor("other", (3, 13, 11), PIXEL, None)}


def gigantic(graph: IntegerGraph) -> Any:
    return graph.nodes, {**graph.tensors, "pixels": Tensor("pixels", (3, 1 << 20, 1 << 20), PIXEL, None)}


def of_training(graph: IntegerGraph) -> Any:
    tensor = dataclasses.replace(graph.tensors["conv1.out"], dtype=IntType(12, signed=False))
    return graph.nodes, {**graph.tensors, "conv1.out": tensor}


def flat(graph: IntegerGraph) -> Any:
    return graph.nodes, {**graph.tensors, "pixels": Tensor("pixels", (3, 143), PIXEL, None)}


def unread(graph: IntegerGraph) -> Any:
    extra = g.Flatten("extra", "conv1.out", "extra.out")
    tensor = dataclasses.replace(graph.tensors["conv1.out"], name="extra.out", shape=(8 * 13 * 11,))
    return (*graph.nodes[:-1], extra, graph.nodes[-1]), {**graph.tensors, "extra.out": tensor}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (without_last, "ends in a Dequantize"),
        (lambda graph: ((), graph.tensors), "ends in a Dequantize"),
        (lambda graph: (graph.nodes, {}), "the input 'pixels' must be"),
        (flat, "the input 'pixels' must be"),
        (misnamed, "'pixels' is called 'other'"),
        (gigantic, "impossible shape"),
        (of_training, "'conv1.out' has 12 bits; integer engines run 8 at most"),
        (renamed, "same name"),
        (idle, r"\['idle'\] are never written or never read"),
        (unread, r"\['extra.out'\] are never written or never read"),
    ],
)
def test_what_is_wrong_with_the_whole_is_refused(changes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        IntegerGraph(*changes(GRAPH))


@pytest.mark.parametrize(("side", "exact"), [(256, True), (257, False)])
def test_average_windows_beyond_exact_sums_are_refused(side: int, exact: bool) -> None:
    byte, one = IntType(8, signed=False), np.ones(3, np.float32)
    nodes = (
        g.Quantize("quantize", "pixels", "q", one, np.zeros(3, np.int32)),
        g.AveragePool("average", "q", "mean", (side, side), (1, 1)),
        g.Flatten("flatten", "mean", "flat"),
        g.Dequantize("logits", "flat", "logits", one),
    )
    shapes = {"pixels": (3, side, side), "q": (3, side, side), "mean": (3, 1, 1), "flat": (3,)}
    tensors = {name: Tensor(name, shape, byte, None if name == "pixels" else 1.0) for name, shape in shapes.items()}
    if exact:
        assert IntegerGraph(nodes, tensors).num_classes == 3
    else:
        with pytest.raises(InputError, match="too large for an exact sum"):
            IntegerGraph(nodes, tensors)


def test_nodes_read() -> None:
    by_type = {type(node): node for node in GRAPH.nodes}
    assert g.node_inputs(by_type[g.Concat]) == by_type[g.Concat].inputs
    assert len(g.node_inputs(by_type[g.Add])) == 2
    assert g.node_inputs(by_type[g.Flatten]) == (by_type[g.Flatten].input,)
