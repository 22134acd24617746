"""The QDQ writer: every tensor against the reference given the same inputs, exact scales, and what each target needs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest
from numpy.typing import NDArray

from edgeguard import graph as g
from edgeguard.errors import ExportError, InputError
from edgeguard.graph import IntegerGraph
from edgeguard.inttype import IntType
from edgeguard.targets import reference

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from edgeguard.export import qdq_writer  # noqa: E402
from edgeguard.export.qdq_numbers import bias_shift, file_scale  # noqa: E402
from edgeguard.export.qdq_writer import to_qdq, write_qdq  # noqa: E402

INT8, UINT8, FLOAT = onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT
MOSTLY = 0.001
"""Most of a graph's values that may be one step off: rounding ties, where float sums decide either way."""
TIE = 1e-4
"""Output steps between a quotient and a tie that a float32 sum may confuse."""


class SignedBuilder(graphs.Builder):
    """Every activation signed, as a model for TensorRT has them."""

    def append(self, node: g.Node, dtype: IntType, scale: float | None) -> str:
        return super().append(node, IntType(dtype.bits, signed=True), scale)

    def lookup(self, x: str, function: Any, signed: bool = True, bits: int | None = None) -> str:
        return super().lookup(x, function, True, bits)


@functools.cache
def net(name: str, bits: int, signed: bool) -> IntegerGraph:
    """One of the nets of `graphs`, with signed activations if asked for."""
    build = getattr(graphs, name)
    if not signed:
        return build(bits)  # type: ignore[no-any-return]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "Builder", SignedBuilder)
        return build.__wrapped__(bits)  # type: ignore[no-any-return]


def head(builder: graphs.Builder, x: str) -> IntegerGraph:
    return builder.finish(builder.linear(builder.move(g.Flatten, x), 10, bits=8, accumulators=True))


def small(bits: int, signed: bool = False, quantize_bits: int = 8) -> IntegerGraph:
    builder = (SignedBuilder if signed else graphs.Builder)(bits, (3, 8, 7), 4)
    return head(builder, builder.conv(builder.quantize(quantize_bits), 5))


def values(graph: IntegerGraph, model: Any, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """All quantized tensors and the logits, in ONNX Runtime without any optimization."""
    wanted = [name for name, tensor in graph.tensors.items() if tensor.scale is not None]
    zeros = {node.output[0]: node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for name in wanted:
        kind = INT8 if zeros[name].startswith("int8") else UINT8
        copy.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [*wanted, graph.output]
    return dict(zip(names, session.run(names, {graph.input: images}), strict=True))


def check(graph: IntegerGraph, signed: bool, count: int = 8, **options: Any) -> None:
    """Hold every node to the reference, given the node's own inputs."""
    images = graphs.random_images(graph.input_shape, count, seed=21)
    got = values(graph, to_qdq(graph, signed=signed, **options), images) | {graph.input: images}
    steps: Counter[int] = Counter()
    for node in graph.nodes:
        inputs = [got[name] for name in g.node_inputs(node) if name in got]
        if isinstance(node, g.Linear) and graph.tensors[node.output].scale is None:
            got[node.output] = reference.execute(graph, node, inputs)
        elif isinstance(node, g.Dequantize):
            expected = reference.execute(graph, node, inputs)
            assert np.abs(got[node.output] - expected).max() <= 1e-5 * np.abs(expected).max()
        else:
            off = got[node.output].astype(int) - reference.execute(graph, node, inputs)
            steps.update(off.ravel().tolist())
            if off.any():
                assert isinstance(node, g.Conv | g.Linear), f"{node.name} differs"
                assert distance_to_tie(graph, node, inputs[0])[off != 0].max() < TIE, f"{node.name} differs beyond ties"
    assert set(steps) <= {-1, 0, 1}, steps
    assert steps[-1] + steps[1] <= MOSTLY * steps[0], steps


def distance_to_tie(graph: IntegerGraph, node: g.Conv | g.Linear, x: NDArray[Any]) -> NDArray[np.float64]:
    """How far each exact quotient of a product is from where rounding changes."""
    if isinstance(node, g.Conv):
        sums = reference.convolve(node, x, graph.tensors[node.input].dtype) * graph.multiplier(node)[:, None, None].astype(float)
    else:
        sums = (x.astype(np.int64) @ node.weight.T + node.bias) * graph.multiplier(node).astype(float)
    return np.asarray(np.abs(sums - np.floor(sums) - 0.5))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", ["every_op", "gated"])
def test_every_tensor_is_the_references_but_for_rare_ties(name: str, bits: int, signed: bool) -> None:
    """Products alone may tie differently; additions, which tie half of the time, are exact, and so is the rest."""
    check(net(name, bits, signed), signed)


def test_the_nets_have_additions_that_round() -> None:
    additions = [node for node in graphs.every_op(4).nodes if isinstance(node, g.Add)]
    assert any(min(graphs.every_op(4).add_ratios(node)) < 1 for node in additions)


@pytest.mark.parametrize("bits", [4, 2])
def test_unsigned_tensors_below_8_bits_fit_int8(bits: int) -> None:
    graph = net("every_op", bits, False)
    check(graph, signed=True)
    model = to_qdq(graph, signed=True)
    assert types(model) == {INT8}
    assert [node.name for node in nodes(model, "Min")] == ["linear16/clip/high"], "TensorRT's Clip fails behind a Gemm"


def constants(model: Any) -> dict[str, NDArray[Any]]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def nodes(model: Any, *ops: str) -> Iterator[Any]:
    return (node for node in model.graph.node if node.op_type in ops)


def types(model: Any) -> set[int]:
    found = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return {found[node.input[2]] for node in nodes(model, "QuantizeLinear", "DequantizeLinear")}


@pytest.mark.parametrize("signed", [False, True])
def test_what_runtimes_ask_of_quantization(signed: bool) -> None:
    """Zero points of zero; one power of two per activation; per-channel int8 weights; every product reads quantized."""
    model = to_qdq(net("every_op", 8, signed), signed=signed)
    known = constants(model)
    producers = {output: node for node in model.graph.node for output in node.output}
    for node in nodes(model, "QuantizeLinear", "DequantizeLinear"):
        assert not known[node.input[2]].any()
        if node.input[0] in known:
            assert known[node.input[0]].dtype == np.int8
            assert known[node.input[1]].shape == (len(known[node.input[0]]),)
            assert [(a.name, a.i) for a in node.attribute] == [("axis", 0)]
        else:
            assert known[node.input[1]].shape == ()
            assert math.frexp(known[node.input[1]].item())[0] == 0.5
    for node in nodes(model, "Conv", "Gemm"):
        assert [producers[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
        assert known[node.input[2]].dtype == np.float32
    readers = Counter(name for node in model.graph.node for name in node.input)
    assert all(readers[node.output[0]] == 1 for node in nodes(model, "DequantizeLinear"))
    assert types(model) == ({INT8} if signed else {INT8, UINT8})


@pytest.mark.parametrize("bits", [8, 2])
def test_the_scales_in_the_file_give_the_graphs_own_multipliers(bits: int) -> None:
    graph = graphs.every_op(bits)
    known = constants(to_qdq(graph, signed=False))
    for node in graph.nodes:
        if isinstance(node, g.Conv | g.Linear):
            product = known[f"{node.input}/scale"] * known[f"{node.name}/weight_scale"]
            bias = known[f"{node.name}/bias"]
            assert np.abs(bias / product.astype(np.float64) - node.bias).max() < 1
            if graph.tensors[node.output].scale is None:
                assert (product == 1).all()
                np.testing.assert_array_equal(bias, node.bias)
                np.testing.assert_array_equal(known["logits/scale"], graph.nodes[-1].scale)  # type: ignore[union-attr]
            else:
                np.testing.assert_array_equal(product / known[f"{node.output}/scale"], graph.multiplier(node))


@pytest.mark.parametrize(("bits", "signed"), [(2, False), (4, False), (8, False)])
def test_shifted_biases_decide_as_the_reference_does_and_farther_from_ties(bits: int, signed: bool) -> None:
    dtype = IntType(bits, signed)
    multiplier = np.array([0.0371, 0.13001, 0.00417, 0.27183], np.float32)
    sums = np.arange(-600, 601)[:, None]
    shift = bias_shift(multiplier, dtype, 600)
    assert 0 < np.abs(shift).max() <= 1
    expected = reference.requantize(np.tile(sums.astype(np.int32), 4), multiplier, dtype)
    margins = []
    for moved in (sums * multiplier.astype(np.float64), (sums + shift) * multiplier.astype(np.float64)):
        np.testing.assert_array_equal(np.clip(np.rint(moved), dtype.qmin, dtype.qmax), expected)
        inside = (moved > dtype.qmin - 0.4) & (moved < dtype.qmax + 0.4)
        margins.append(np.where(inside, np.abs(moved - np.floor(moved) - 0.5), 1).min(0))
    assert (margins[1] >= margins[0] - 1e-12).all(), margins
    assert margins[1].sum() > 1.1 * margins[0].sum(), margins


def test_a_tie_within_reach_is_left_on_the_side_it_rounds_to() -> None:
    """8 / 16 rounds to 0 and 9 / 16 to 1: the middle between both; the tie at 24 is out of reach."""
    assert bias_shift(np.array([1 / 16], np.float32), IntType(2, False), 10) == -0.5


def test_a_bias_cannot_resolve_ties_of_both_kinds() -> None:
    """At 1/2, ties at 0.5 round down and at 1.5 up: no shift agrees with both, and the bias stays."""
    assert bias_shift(np.array([0.5], np.float32), IntType(8, False), 600) == 0
    assert bias_shift(np.array([0.5], np.float32), IntType(2, True), 600) == 0
    assert bias_shift(np.array([0.3], np.float32), IntType(8, False), 0) == 0


def test_file_scales_keep_their_ratios() -> None:
    for scale in (0.75, 1.0, 3e-5, 1.999):
        assert 0.5 < file_scale(scale) / scale <= 1
        assert file_scale(scale * 4) == 4 * file_scale(scale)


def test_clips_are_in_float_and_only_below_8_bits() -> None:
    for bits, count in ((8, 0), (4, 6)):
        model = to_qdq(net("every_op", bits, True), signed=True)
        inferred = onnx.shape_inference.infer_shapes(model)
        kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
        clips = list(nodes(model, "Clip", "Relu"))
        assert {kinds[node.input[0]] for node in clips} == {FLOAT}
        products = {node.output[0] for node in nodes(model, "Conv", "Gemm")}
        assert sum(node.input[0] in products for node in clips) == count


def test_roundings_that_openvino_would_lose_are_written_out() -> None:
    """What an addition that rounds reads, for that target alone; the accumulators behind the logits, always."""
    for signed, expected in ((False, {"conv6/whole", "conv7/whole", "linear17/whole"}), (True, {"linear17/whole"})):
        model = to_qdq(net("every_op", 8, signed), signed=signed)
        assert {node.name for node in nodes(model, "Round")} == expected


def test_a_relu_ends_at_the_largest_int8() -> None:
    model = to_qdq(net("every_op", 7, False), signed=True)
    assert len(list(nodes(model, "Relu"))) > 2
    check(net("every_op", 7, False), signed=True)


def test_a_tensor_beyond_int8_is_named() -> None:
    graph = net("every_op", 8, False)
    with pytest.raises(ExportError, match=r"'conv1\.out' is uint8 \(0 to 255\).*with signed activations"):
        to_qdq(graph, signed=True)


@pytest.mark.parametrize("bits", [8, 5])
@pytest.mark.parametrize("scale", [2.0, 2.5, 0.03, 3.0])
def test_pixels_are_quantized_exactly(bits: int, scale: float) -> None:
    """All 256 values; a scale of 2 ties at every odd pixel, where half to even has to survive odd zero points."""
    builder = graphs.Builder(8, (3, 16, 16), 0)
    builder.quantize(bits)
    node = builder.nodes.pop()
    node = dataclasses.replace(
        node, scale=np.array([scale, scale * 1.37, scale * 2], np.float32), zero_point=np.array([-63, 0, -17], np.int32)
    )  # type: ignore[arg-type]
    builder.append(node, IntType(bits, signed=True), float(np.float32(0.017)))
    graph = head(builder, builder.conv("quantized", 4))
    images = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, 1)
    model = to_qdq(graph, signed=False)
    got = values(graph, model, images)["quantized"]
    np.testing.assert_array_equal(got, reference.run(graph, images, keep=["quantized"])["quantized"])
    assert ("quantize/round" in [node.name for node in model.graph.node]) is (scale in (2.0, 3.0))


def test_normalization_is_one_product_and_one_sum() -> None:
    assert [node.op_type for node in to_qdq(small(8), signed=False).graph.node[:4]] == ["Cast", "Mul", "Add", "QuantizeLinear"]


@pytest.mark.parametrize("signed", [False, True])
def test_logits_from_a_quantized_tensor(signed: bool) -> None:
    builder = (SignedBuilder if signed else graphs.Builder)(5, (3, 9, 9), 2)
    x = builder.average(builder.conv(builder.quantize(), 6))
    x = builder.move(g.Flatten, builder.conv(x, 7, kernel=1))
    scale = np.linspace(0.1, 0.2, 7).astype(np.float32)
    graph = IntegerGraph((*builder.nodes, g.Dequantize("logits", x, "logits", scale)), builder.tensors)
    check(graph, signed)


def test_the_model_is_valid_and_has_the_agreed_ends() -> None:
    model = to_qdq(graphs.every_op(2), signed=False)
    onnx.checker.check_model(model, full_check=True)
    (pixels,), (logits,) = model.graph.input, model.graph.output
    assert (pixels.name, pixels.type.tensor_type.elem_type) == ("pixels", UINT8)
    assert (logits.name, logits.type.tensor_type.elem_type) == ("logits", FLOAT)
    assert [d.dim_param or d.dim_value for d in pixels.type.tensor_type.shape.dim] == ["N", 3, 13, 11]
    assert [d.dim_param or d.dim_value for d in logits.type.tensor_type.shape.dim] == ["N", 10]
    assert (model.opset_import[0].version, model.ir_version, len(model.opset_import)) == (17, 8, 1)


def test_equal_graphs_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_qdq(small(4), tmp_path / name, signed=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    write_qdq(small(4), tmp_path / "unsigned", signed=False)
    assert (tmp_path / "a").read_bytes() != (tmp_path / "unsigned").read_bytes()


@pytest.mark.parametrize("opset", [13, 21])
def test_other_opsets(opset: int) -> None:
    assert to_qdq(small(4), signed=False, opset=opset).opset_import[0].version == opset
    check(small(4), signed=False, opset=opset)


@pytest.mark.parametrize("opset", [12, 10_000])
def test_opsets_that_cannot_hold_it(opset: int) -> None:
    with pytest.raises(InputError, match=f"opset {opset} cannot hold this model; expected 13 to"):
        to_qdq(small(4), signed=False, opset=opset)


def test_an_operation_that_it_does_not_know_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(qdq_writer.HANDLERS, g.Flatten)
    with pytest.raises(ExportError, match=r"flatten2: Flatten cannot be written as QDQ"):
        to_qdq(small(4), signed=False)


def test_scales_beyond_float32_are_an_error() -> None:
    graph = small(4)
    last = graph.nodes[-1]
    assert isinstance(last, g.Dequantize)
    tiny = dataclasses.replace(last, scale=np.full(10, 1e-40, np.float32))
    with pytest.raises(ExportError, match=r"logits: its scales span .* beyond normal float32 numbers"):
        to_qdq(IntegerGraph((*graph.nodes[:-1], tiny), graph.tensors), signed=False)


def test_names_that_collide_are_an_export_error() -> None:
    builder = graphs.Builder(4, (3, 8, 8), 3)
    builder.conv(builder.quantize(), 5)
    node = builder.nodes.pop()
    assert isinstance(node, g.Conv)
    del builder.tensors[node.output]
    clash = dataclasses.replace(node, output=f"{node.name}/Conv")
    graph = head(builder, builder.append(clash, IntType(4, False), 1.0))
    with pytest.raises(ExportError, match="not valid"):
        to_qdq(graph, signed=False)
