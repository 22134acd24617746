"""The reference against slow integer loops, and against ONNX Runtime's single operations on exhaustive inputs."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest

from edgeguard import graph as g
from edgeguard.errors import ExportError, InputError
from edgeguard.graph import IntegerGraph, Tensor
from edgeguard.inttype import ACCUMULATOR, PIXEL, IntType
from edgeguard.targets import reference

INT8, UINT8 = IntType(8, signed=True), IntType(8, signed=False)


def naive_conv(node: g.Conv, x: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Accumulators by loops over output pixels and kernel taps, in int64."""
    top, left, bottom, right = node.padding
    x = np.pad(x.astype(np.int64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    out, per_group, kernel_h, kernel_w = node.weight.shape
    rows = (x.shape[2] - node.dilation[0] * (kernel_h - 1) - 1) // node.stride[0] + 1
    columns = (x.shape[3] - node.dilation[1] * (kernel_w - 1) - 1) // node.stride[1] + 1
    result = np.zeros((len(x), out, rows, columns), np.int64) + node.bias[:, None, None]
    for channel in range(out):
        first = channel // (out // node.groups) * per_group
        for row, column in np.ndindex(rows, columns):
            for i, j in np.ndindex(kernel_h, kernel_w):
                y, z = row * node.stride[0] + i * node.dilation[0], column * node.stride[1] + j * node.dilation[1]
                taps = x[:, first : first + per_group, y, z]
                result[:, channel, row, column] += taps @ node.weight[channel, :, i, j].astype(np.int64)
    return result


def random_conv(rng: np.random.Generator, out: int, channels: int, **geometry: Any) -> g.Conv:
    settings = {"stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1, **geometry}
    kernel = settings.pop("kernel", (3, 3))
    weight = rng.integers(-127, 128, (out, channels // settings["groups"], *kernel)).astype(np.int8)
    scale = np.ones(out, np.float32)
    bias = rng.integers(-1000, 1000, out).astype(np.int32)
    return g.Conv("conv", "x", "y", weight, IntType(8, True, True), scale, bias, **settings)


@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"kernel": (1, 1)},
        {"kernel": (2, 3), "padding": (1, 0, 0, 2)},
        {"stride": (2, 3), "padding": (1, 1, 1, 1)},
        {"dilation": (2, 1), "padding": (2, 0, 1, 3)},
        {"groups": 2, "stride": (2, 2)},
        {"groups": 4, "padding": (1, 1, 1, 1)},
    ],
    ids=str,
)
def test_convolution_equals_loops(geometry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    node = random_conv(rng, 8, 4, **geometry)
    x = rng.integers(-128, 128, (3, 4, 9, 8)).astype(np.int8)
    expected = naive_conv(node, x)
    got = reference.convolve(node, x, INT8)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, expected)
    monkeypatch.setattr(reference, "CHUNK_BYTES", 1)
    np.testing.assert_array_equal(reference.convolve(node, x, INT8), expected)


def test_sums_beyond_float32_stay_exact() -> None:
    rng = np.random.default_rng(4)
    weight = rng.choice(np.array([126, 127], np.int8), (3, 900, 1, 1))
    weight[1] *= -1
    bias = np.array([1, -1, 2_000_000_001], np.int32)
    node = g.Conv(
        "conv", "x", "y", weight, IntType(8, True, True), np.ones(3, np.float32), bias, (1, 1), (0,) * 4, (1, 1), 1
    )
    x = rng.integers(200, 256, (2, 900, 2, 2)).astype(np.uint8)
    expected = naive_conv(node, x)
    assert (np.abs(expected) > 1 << 24).all()
    np.testing.assert_array_equal(reference.convolve(node, x, UINT8), expected)


def test_requantization_rounds_the_accumulator_first_and_ties_to_even() -> None:
    halves = np.array([-5, -3, -1, 1, 3, 5, 500], np.int32)
    assert reference.requantize(halves, np.float32(0.5), INT8).tolist() == [-2, -2, 0, 0, 2, 2, 127]
    # 2**24 + 1 becomes 2**24 in float32; from the exact value the quotient would be above the tie and round up.
    accumulator, multiplier = np.array([(1 << 24) + 1], np.int32), np.float32(2.5 / (1 << 24))
    assert round(Fraction(int(accumulator[0])) * Fraction(float(multiplier))) == 3
    assert reference.requantize(accumulator, multiplier, INT8).tolist() == [2]


def half_even(numerator: Any, denominator: int) -> Any:
    """Integers nearest to a quotient of integers, ties to even, without any float."""
    low, rest = np.divmod(numerator, denominator)
    return low + ((2 * rest > denominator) | ((2 * rest == denominator) & (low % 2 == 1)))


def loops(graph: IntegerGraph, images: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor of a graph in int64, one window at a time, by the formulas of `edgeguard.graph`."""
    values: dict[str, np.ndarray[Any, Any]] = {"pixels": images.astype(np.int64)}
    f = np.float32
    for node in graph.nodes:
        inputs = [values[name] for name in g.node_inputs(node)]
        x, scales = inputs[0], [graph.tensors[name].scale for name in g.node_inputs(node)]
        if isinstance(node, g.Dequantize):
            values[node.output] = x.astype(f) * node.scale
            continue
        target = graph.tensors[node.output]
        if isinstance(node, g.Quantize):
            shape = (-1, 1, 1)
            y = np.rint(x.astype(f) / node.scale.reshape(shape)) + node.zero_point.reshape(shape)
        elif isinstance(node, g.Conv | g.Linear):
            if isinstance(node, g.Conv):
                y = naive_conv(node, x)
            else:
                y = np.stack([x @ row for row in node.weight.astype(np.int64)], 1) + node.bias
            if target.scale is not None:
                m = f(scales[0]) * node.weight_scale / f(target.scale)
                y = np.rint(y.astype(f) * m.reshape(-1, *(1,) * (y.ndim - 2)))
        elif isinstance(node, g.Add):
            ratios = [Fraction(scale) / Fraction(target.scale) for scale in scales]
            unit = max(ratio.denominator for ratio in ratios)
            y = half_even(sum(v * int(ratio * unit) for v, ratio in zip(inputs, ratios, strict=True)), unit)
        elif isinstance(node, g.MaxPool | g.AveragePool):
            padding = node.padding if isinstance(node, g.MaxPool) else (0, 0, 0, 0)
            top, left, bottom, right = padding
            x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=-1000)
            y = np.zeros((len(x), *target.shape), np.int64)
            for row, column in np.ndindex(*target.shape[1:]):
                i, j = row * node.stride[0], column * node.stride[1]
                window = x[:, :, i : i + node.kernel[0], j : j + node.kernel[1]]
                if isinstance(node, g.MaxPool):
                    y[:, :, row, column] = window.max((2, 3))
                else:
                    factor = f(scales[0]) / (f(node.kernel[0] * node.kernel[1]) * f(target.scale))
                    y[:, :, row, column] = np.rint(window.sum((2, 3)).astype(f) * factor)
        elif isinstance(node, g.Pad):
            top, left, bottom, right = node.padding
            y = np.pad(x, ((0, 0), node.channels, (top, bottom), (left, right)))
        elif isinstance(node, g.Concat):
            y = np.concatenate(inputs, 1)
        elif isinstance(node, g.Flatten):
            y = x.reshape(len(x), -1)
        else:
            y = np.maximum(np.minimum(x, node.high), node.low)
        values[node.output] = np.clip(y, target.dtype.qmin, target.dtype.qmax).astype(np.int64)
    return values


@pytest.mark.parametrize("bits", [8, 5, 2])
def test_every_tensor_equals_the_loops(bits: int) -> None:
    graph = graphs.every_op(bits)
    images = graphs.random_images(graph.input_shape, 3, seed=2)
    expected = loops(graph, images)
    got = reference.run(graph, images, keep=graph.tensors)
    assert got.keys() == expected.keys() == {*graph.tensors, graph.output}
    for name, values in expected.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)
        if name in graph.tensors:
            assert graph.tensors[name].dtype.allowed(got[name])
            assert got[name].dtype == graph.tensors[name].dtype.container
            assert got[name].shape[1:] == graph.tensors[name].shape


def test_keep_returns_what_was_asked_for() -> None:
    graph = graphs.every_op(4)
    images = graphs.random_images(graph.input_shape, 1)
    first = graph.nodes[1].output
    assert reference.run(graph, images).keys() == {graph.output}
    assert reference.run(graph, images, keep=[first]).keys() == {first, graph.output}
    with pytest.raises(InputError, match="no tensor \\['nonsense'\\]"):
        reference.run(graph, images, keep=["nonsense"])


def all_pairs(scales: tuple[float, float, float], signed: bool, bits: int) -> tuple[IntegerGraph, Any]:
    """An addition of two channels whose pixels run through all 65,536 pairs of 8-bit values; the pixels."""
    dtype, output = IntType(8, signed), IntType(bits, signed)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.int32)
    tensors = {
        "pixels": Tensor("pixels", (2, 256, 256), PIXEL, None), "q": Tensor("q", (2, 256, 256), dtype, 1.0),
        "sum": Tensor("sum", (1, 256, 256), output, scales[2]), "flat": Tensor("flat", (65536,), output, scales[2]),
    }  # fmt: skip
    nodes: list[g.Node] = [
        g.Quantize("quantize", "pixels", "q", np.ones(2, np.float32), np.full(2, -128 * signed, np.int32))
    ]
    for name, channel in (("a", 0), ("b", 1)):  # picks a channel: input, weight and output scales cancel
        weight, scale = np.eye(2, dtype=np.int8)[channel].reshape(1, 2, 1, 1), np.float32(scales[channel])
        tensors[name] = Tensor(name, (1, 256, 256), dtype, float(scale))
        nodes.append(g.Conv(f"pick.{name}", "q", name, weight, IntType(2, True, True), one * scale, zero, (1, 1),
                            (0, 0, 0, 0), (1, 1), 1))  # fmt: skip
    logits = g.Dequantize("logits", "flat", "logits", np.full(65536, scales[2], np.float32))
    nodes += [g.Add("add", "a", "b", "sum"), g.Flatten("flatten", "sum", "flat"), logits]
    pixels = np.stack(np.meshgrid(np.arange(256), np.arange(256)))[None].astype(np.uint8)
    return IntegerGraph(tuple(nodes), tensors), pixels


ADDITIONS = [
    ((1.0, 1.0, 1.0), 8, "QLinearAdd"),
    ((3.0, 0.75, 0.75), 8, "QLinearAdd"),
    ((1.0, 1.0, 1.0), 3, "QLinearAdd"),
    ((1.0, 1.0, 2.0), 8, "QLinearConv"),
    ((0.75, 3.0, 1.5), 8, "QLinearAdd"),
    ((0.25, 8.0, 4.0), 8, "QLinearAdd"),
    ((1.0, 1024.0, 128.0), 8, "QLinearAdd"),
    ((1.0, 128.0, 128.0), 8, "QLinearConv"),
    ((1.0, 1.0, 2.0), 7, "QLinearLeakyRelu"),
    ((0.75, 3.0, 1.5), 6, "QLinearAdd"),
    ((1.0, 16.0, 16.0), 4, "QLinearLeakyRelu"),
    ((1.0, 1.0, 8.0), 4, "QLinearLeakyRelu"),
    ((1.0, 32.0, 32.0), 4, "QLinearConv"),
    ((1.0, 8.0, 64.0), 2, "QLinearLeakyRelu"),
    ((1.0, 128.0, 128.0), 2, "QLinearConv"),
]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("scales", "bits", "operation"), ADDITIONS)
def test_additions_on_all_pairs(
    scales: tuple[float, float, float], bits: int, operation: str, signed: bool, tmp_path: Path
) -> None:
    """Reference, ONNX Runtime and twin against exact integers: ties go to even."""
    graph, pixels = all_pairs(scales, signed, bits)
    expected = reference.run(graph, pixels)[graph.output]
    a, b = pixels[0].reshape(2, -1).astype(np.int64) - 128 * signed
    units = [Fraction(scale) / Fraction(min(scales)) for scale in scales]
    assert all(unit.denominator == 1 for unit in units)
    exact = half_even(a * int(units[0]) + b * int(units[1]), int(units[2]))
    limits = IntType(bits, signed)
    np.testing.assert_array_equal(expected[0], np.clip(exact, limits.qmin, limits.qmax) * np.float32(scales[2]))

    onnx = pytest.importorskip("onnx")
    from edgeguard.export.onnx_writer import to_onnx, write_onnx
    from edgeguard.targets.ort import OrtEngine

    assert [node.op_type for node in to_onnx(graph).graph.node if node.name == "add"] == [operation]
    write_onnx(graph, tmp_path / "add.onnx")
    with OrtEngine(tmp_path / "add.onnx", graph.input_shape, graph.num_classes, threads=1) as engine:
        np.testing.assert_array_equal(engine(pixels), expected)
    assert onnx.load(tmp_path / "add.onnx").graph.output[0].name == "logits"

    torch = pytest.importorskip("torch")
    from edgeguard.targets.twin import Twin

    np.testing.assert_array_equal(Twin(graph)(torch.from_numpy(pixels)).numpy(), expected)


def test_a_sum_of_vectors_that_does_not_fit_uint8_is_an_export_error() -> None:
    pytest.importorskip("onnx")
    from edgeguard.export.onnx_writer import to_onnx

    b = graphs.Builder(8, (3, 4, 4), 1)
    x = b.linear(b.move(g.Flatten, b.conv(b.quantize(), 4)), 6)
    x = b.append(g.Add("add", x, x, "sum"), IntType(8, False), 2 * float(b.tensors[x].scale or 0))
    with pytest.raises(ExportError, match=r"add: .*vectors"):
        to_onnx(b.finish(b.linear(x, 10, bits=8, accumulators=True)))


def test_accumulators_leave_as_int32() -> None:
    graph = graphs.every_op(4)
    last = graph.nodes[-2]
    assert graph.tensors[last.output].dtype == ACCUMULATOR
    values = reference.run(graph, graphs.random_images(graph.input_shape, 2), keep=[last.output])
    assert values[last.output].dtype == np.int32
