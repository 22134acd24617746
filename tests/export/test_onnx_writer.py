"""The ONNX writer: node counts, storage, and equality of what ONNX Runtime computes with the reference."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest

from edgeguard import graph as g
from edgeguard.errors import ExportError
from edgeguard.graph import IntegerGraph
from edgeguard.inttype import IntType
from edgeguard.targets import reference
from edgeguard.targets.ort import OrtEngine, write_optimized

onnx = pytest.importorskip("onnx")

from edgeguard.export.onnx_writer import to_onnx, write_onnx  # noqa: E402

INT2, INT4, INT8 = onnx.TensorProto.INT2, onnx.TensorProto.INT4, onnx.TensorProto.INT8


def operations(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def check_equal(graph: IntegerGraph, path: Path, count: int = 4, threads: int = 1, **options: Any) -> None:
    write_onnx(graph, path, **options)
    images = graphs.random_images(graph.input_shape, count, seed=21)
    with OrtEngine(path, graph.input_shape, graph.num_classes, threads=threads) as engine:
        np.testing.assert_array_equal(engine(images), reference.run(graph, images)[graph.output])


def head(builder: graphs.Builder, x: str) -> IntegerGraph:
    return builder.finish(builder.linear(builder.move(g.Flatten, x), 10, bits=8, accumulators=True))


def test_resnet20_has_no_node_too_many(tmp_path: Path) -> None:
    """Shortcuts are one convolution each, clips exist below 8 bits only, and the runtime transposes once.

    One addition of this net has an output coarser than its inputs, so it rounds: by a convolution, or a table.
    """
    eight, four = (operations(to_onnx(graphs.resnet20(bits))) for bits in (8, 4))
    assert eight == {
        "Cast": 1, "QuantizeLinear": 1, "QLinearConv": 19 + 2 + 1, "QLinearAdd": 8, "Concat": 1, "Transpose": 1,
        "Flatten": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1,
    }  # fmt: skip
    del eight["Concat"]
    same = {"QLinearConv": 19 + 2, "QLinearAdd": 9, "QLinearLeakyRelu": 1}
    assert four == {**eight, **same, "Cast": 1 + 18 + 2, "Clip": 19 + 8}
    for bits in (8, 4, 2):
        write_onnx(graphs.resnet20(bits), tmp_path / f"{bits}.onnx")
        write_optimized(tmp_path / f"{bits}.onnx", tmp_path / f"{bits}.optimized.onnx")
        optimized = operations(onnx.load(tmp_path / f"{bits}.optimized.onnx"))
        assert optimized["Cast"] == 1, "the casts of weights are folded when the model is loaded"
        assert optimized["Transpose"] == 1
        assert optimized["Clip"] == {8: 0, 4: 27, 2: 28}[bits]


@pytest.mark.parametrize("build", [graphs.every_op, graphs.resnet20])
@pytest.mark.parametrize("bits", [8, 6, 4, 2])
def test_the_runtimes_addition_never_rounds(build: Any, bits: int) -> None:
    """QLinearAdd rounds ties to even on x86-64 and away from zero on aarch64; with whole ratios there is nothing to round."""
    model = to_onnx(build(bits))
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    additions = [node for node in model.graph.node if node.op_type == "QLinearAdd"]
    assert additions
    for node in additions:
        for index in (1, 4):
            ratio = float(constants[node.input[index]] / constants[node.input[6]])
            assert ratio in (1, 2, 4, 8, 16, 32, 64, 128), node.name


@pytest.mark.parametrize("signed", [(False, True, False), (True, True, True), (False, False, False), (True, False, True)])
@pytest.mark.parametrize("ratios", [(0.5, 2.0), (4.0, 0.25), (0.125, 8.0)])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_finer_addend_beside_an_even_one_is_rounded_alone(
    bits: int, ratios: tuple[float, float], signed: tuple[bool, bool, bool], tmp_path: Path
) -> None:
    b = graphs.Builder(bits, (3, 16, 16), 5)
    x = b.quantize()
    unit = 2.0**-6
    left, right = (b.conv(x, 16, kernel=1, padding=0, signed=s, bits=8, scale=unit * ratio)
                   for s, ratio in zip(signed, ratios, strict=False))  # fmt: skip
    total = b.append(g.Add("sum", left, right, "sum.out"), IntType(bits, signed[2]), unit)
    graph = head(b, total)
    model = to_onnx(graph)
    assert operations(model)["QLinearLeakyRelu"] == 1
    values = reference.run(graph, graphs.random_images((3, 16, 16), 30), keep=[left, right])
    fine = values[left if ratios[0] < 1 else right].astype(np.float64) * min(ratios)
    assert ((fine % 1) == 0.5).any(), "no tie, no test"
    check_equal(graph, tmp_path / "model.onnx", 30)


@pytest.mark.parametrize(("bits", "stored", "opset"), [(8, INT8, 17), (5, INT8, 17), (4, INT4, 21), (3, INT4, 21), (2, INT2, 25)])
def test_weights_are_stored_in_the_smallest_type(bits: int, stored: int, opset: int) -> None:
    graph = graphs.every_op(bits)
    model = to_onnx(graph)
    assert model.opset_import[0].version == opset
    names = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in graph.nodes:
        if isinstance(node, g.Conv | g.Linear):
            tensor = names.get(f"{node.name}/weight/stored", names.get(f"{node.name}/weight"))
            assert tensor is not None
            assert tensor.data_type == (INT8 if node.weight_type.bits == 8 else stored)
            np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), node.weight)


def test_two_bit_files_are_small(tmp_path: Path) -> None:
    sizes, weights = {}, {}
    for bits in (8, 4, 2):
        write_onnx(graphs.resnet20(bits), tmp_path / "model.onnx")
        sizes[bits] = (tmp_path / "model.onnx").stat().st_size
        tensors = onnx.load(tmp_path / "model.onnx").graph.initializer
        weights[bits] = sum(len(t.raw_data) for t in tensors if "/weight" in t.name and "scale" not in t.name)
    assert weights[2] < 0.27 * weights[8]
    assert sizes[4] < 0.56 * sizes[8]
    assert sizes[2] < 0.33 * sizes[8]


@pytest.mark.parametrize("smallest", [4, 8])
def test_storage_for_runtimes_without_small_types(smallest: int, tmp_path: Path) -> None:
    graph = graphs.every_op(2)
    model = to_onnx(graph, min_storage_bits=smallest)
    types = {tensor.data_type for tensor in model.graph.initializer}
    assert INT2 not in types
    assert (INT4 in types) is (smallest == 4)
    assert model.ir_version == {4: 10, 8: 8}[smallest]
    check_equal(graph, tmp_path / "model.onnx", min_storage_bits=smallest)


def test_equal_graphs_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_onnx(graphs.every_op(4), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_model_is_valid_and_has_the_agreed_ends() -> None:
    model = to_onnx(graphs.every_op(2))
    onnx.checker.check_model(model, full_check=True)
    (pixels,), (logits,) = model.graph.input, model.graph.output
    assert (pixels.name, pixels.type.tensor_type.elem_type) == ("pixels", onnx.TensorProto.UINT8)
    assert (logits.name, logits.type.tensor_type.elem_type) == ("logits", onnx.TensorProto.FLOAT)
    assert [d.dim_param or d.dim_value for d in pixels.type.tensor_type.shape.dim] == ["N", 3, 13, 11]
    assert [d.dim_param or d.dim_value for d in logits.type.tensor_type.shape.dim] == ["N", 10]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("zero_point", [-300, 200])
def test_input_zero_points_beyond_uint8(bits: int, zero_point: int, tmp_path: Path) -> None:
    builder = graphs.Builder(8, (3, 8, 8), 0)
    builder.quantize(bits)
    quantize = builder.nodes.pop()
    assert isinstance(quantize, g.Quantize)
    quantize = dataclasses.replace(
        quantize, scale=quantize.scale / 2, zero_point=np.array([zero_point, -20, 10], np.int32)
    )  # fmt: skip
    builder.append(quantize, builder.tensors["quantized"].dtype, builder.tensors["quantized"].scale)
    graph = head(builder, builder.conv("quantized", 4))
    values = reference.run(graph, graphs.random_images(graph.input_shape, 4), keep=["quantized"])["quantized"]
    assert len(np.unique(values)) > 4
    check_equal(graph, tmp_path / "model.onnx")


@pytest.mark.parametrize("signed", [False, True])
def test_logits_from_a_quantized_tensor(signed: bool, tmp_path: Path) -> None:
    """A fully convolutional net: no last Linear, and a pooled image that something other than a Flatten reads."""
    builder = graphs.Builder(5, (3, 9, 9), 2)
    x = builder.average(builder.conv(builder.quantize(), 6, signed=signed))
    x = builder.move(g.Flatten, builder.conv(x, 7, kernel=1, signed=signed))
    scale = np.linspace(0.1, 0.2, 7).astype(np.float32)
    graph = IntegerGraph((*builder.nodes, g.Dequantize("logits", x, "logits", scale)), builder.tensors)
    check_equal(graph, tmp_path / "model.onnx")


@pytest.mark.parametrize("signed", [False, True])
def test_large_linear_layers_on_two_threads(signed: bool, tmp_path: Path) -> None:
    """The runtime cuts a long sum into blocks; the last layer's int32 sums must survive in a float32 buffer."""
    builder = graphs.Builder(8, (3, 32, 32), 3)
    x = builder.move(g.Flatten, builder.conv(builder.quantize(), 6, signed=signed))
    x = builder.linear(x, 70)
    graph = builder.finish(builder.linear(x, 1001, accumulators=True))
    check_equal(graph, tmp_path / "model.onnx", count=37, threads=2)


def test_one_class(tmp_path: Path) -> None:
    builder = graphs.Builder(8, (3, 6, 6), 3)
    x = builder.move(g.Flatten, builder.conv(builder.quantize(), 4))
    check_equal(builder.finish(builder.linear(x, 1, accumulators=True)), tmp_path / "model.onnx")


@pytest.mark.parametrize("channels", [(0, 0), (3, 5)])
@pytest.mark.parametrize("signed", [False, True])
def test_subsampling_shortcuts(channels: tuple[int, int], signed: bool, tmp_path: Path) -> None:
    """A 1x1 pool with stride and the channel padding behind it copy integers exactly, together or alone."""
    builder = graphs.Builder(4, (3, 8, 7), 3)
    x = builder.conv(builder.quantize(), 5, signed=signed)
    x = builder.move(g.MaxPool, x, (1, 1), (2, 2), (0, 0, 0, 0))
    if any(channels):
        x = builder.move(g.Pad, x, channels, (0, 0, 0, 0))
    graph = head(builder, x)
    assert operations(to_onnx(graph))["MaxPool"] == (0 if any(channels) else 1)
    check_equal(graph, tmp_path / "model.onnx")


def test_a_subsampled_tensor_with_two_readers_is_kept(tmp_path: Path) -> None:
    builder = graphs.Builder(4, (3, 8, 8), 3)
    x = builder.move(g.MaxPool, builder.conv(builder.quantize(), 5), (1, 1), (2, 2), (0, 0, 0, 0))
    both = builder.concat(builder.move(g.Pad, x, (1, 2), (0, 0, 0, 0)), x)
    graph = head(builder, both)
    assert operations(to_onnx(graph))["MaxPool"] == 1
    check_equal(graph, tmp_path / "model.onnx")


def test_clamps_wider_than_the_type_are_harmless(tmp_path: Path) -> None:
    builder = graphs.Builder(4, (3, 8, 8), 3)
    x = builder.move(g.Clamp, builder.conv(builder.quantize(), 5, signed=True), -3, 10_000)
    x = builder.move(g.Clamp, x, -10_000, 2)
    graph = head(builder, x)
    kept = reference.run(graph, graphs.random_images(graph.input_shape, 2), keep=[x])[x]
    assert (kept.min(), kept.max()) == (-3, 2)
    check_equal(graph, tmp_path / "model.onnx")


def test_names_that_collide_are_an_export_error() -> None:
    builder = graphs.Builder(4, (3, 8, 8), 3)
    builder.conv(builder.quantize(), 5)
    node = builder.nodes.pop()
    assert isinstance(node, g.Conv)
    del builder.tensors[node.output]
    clash = dataclasses.replace(node, output=f"{node.name}/QLinearConv")
    graph = head(builder, builder.append(clash, IntType(4, False), 1.0))
    with pytest.raises(ExportError, match="not valid"):
        to_onnx(graph)
