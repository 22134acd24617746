"""The reference against slow integer loops, and against ONNX Runtime's single operations on exhaustive inputs."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import graphs
import numpy as np
import pytest

from edgeguard import graph as g
from edgeguard.errors import InputError
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
            half = np.vectorize(lambda a, b, ratios=ratios: round(a * ratios[0] + b * ratios[1]), otypes=[np.int64])
            y = half(*inputs)
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


def all_pairs(first: float, second: float, output: float, signed: bool) -> tuple[IntegerGraph, Any]:
    """An addition of two channels whose pixels run through all 65,536 pairs of 8-bit values."""
    dtype = IntType(8, signed)
    middle = 128 if signed else 0
    pick = [np.eye(2, dtype=np.int8)[[channel]].reshape(1, 2, 1, 1) for channel in (0, 1)]
    one = np.ones(1, np.float32)
    weight_type = IntType(2, True, True)
    zero = np.zeros(1, np.int32)

    def conv(name: str, weight: Any) -> g.Conv:
        return g.Conv(name, "q", f"{name}.out", weight, weight_type, one, zero, (1, 1), (0,) * 4, (1, 1), 1)

    # The pickers copy integers, since input, weight and output scales cancel.
    tensors = [
        Tensor("pixels", (2, 256, 256), PIXEL, None), Tensor("q", (2, 256, 256), dtype, 1.0),
        Tensor("a.out", (1, 256, 256), dtype, 1.0), Tensor("b.out", (1, 256, 256), dtype, 1.0),
        Tensor("sum", (1, 256, 256), dtype, output), Tensor("flat", (65536,), dtype, output),
    ]  # fmt: skip
    scaled = {"a.out": first, "b.out": second}
    nodes: list[g.Node] = [
        g.Quantize("quantize", "pixels", "q", np.ones(2, np.float32), np.full(2, -middle, np.int32)),
        conv("a", pick[0]), conv("b", pick[1]), g.Add("add", "a.out", "b.out", "sum"),
        g.Flatten("flatten", "sum", "flat"), g.Dequantize("logits", "flat", "logits", np.full(65536, output, np.float32)),
    ]  # fmt: skip
    named = {t.name: Tensor(t.name, t.shape, t.dtype, scaled.get(t.name, t.scale)) for t in tensors}
    for index, scale in ((1, first), (2, second)):
        node = nodes[index]
        assert isinstance(node, g.Conv)
        nodes[index] = g.Conv(
            node.name, node.input, node.output, node.weight, node.weight_type, np.full(1, scale, np.float32), node.bias,
            node.stride, node.padding, node.dilation, node.groups,
        )  # fmt: skip
    pixels = np.stack(np.meshgrid(np.arange(256), np.arange(256)))[None].astype(np.uint8)
    return IntegerGraph(tuple(nodes), named), pixels


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (1.0, 1.0, 2.0), (0.75, 3.0, 1.5), (0.25, 8.0, 4.0)])
def test_addition_equals_the_runtime_on_all_pairs(scales: tuple[float, float, float], signed: bool, tmp_path: Any) -> None:
    pytest.importorskip("onnx")
    from edgeguard.export.onnx_writer import write_onnx
    from edgeguard.targets.ort import OrtEngine

    graph, pixels = all_pairs(*scales, signed)
    write_onnx(graph, tmp_path / "add.onnx")
    with OrtEngine(tmp_path / "add.onnx", graph.input_shape, graph.num_classes, threads=1) as engine:
        logits = engine(pixels)
    expected = reference.run(graph, pixels)[graph.output]
    np.testing.assert_array_equal(logits, expected)
    a, b = pixels[0].astype(int) - (128 if signed else 0)
    exact = np.array([Fraction(scales[0]) / Fraction(scales[2]), Fraction(scales[1]) / Fraction(scales[2])])
    sample = np.random.default_rng(0).integers(0, 65536, 300)
    low, high = (-128, 127) if signed else (0, 255)
    for index in sample:
        q = round(int(a.flat[index]) * exact[0] + int(b.flat[index]) * exact[1])
        assert expected[0, index] == min(max(q, low), high) * scales[2]


def test_accumulators_leave_as_int32() -> None:
    graph = graphs.every_op(4)
    last = graph.nodes[-2]
    assert graph.tensors[last.output].dtype == ACCUMULATOR
    values = reference.run(graph, graphs.random_images(graph.input_shape, 2), keep=[last.output])
    assert values[last.output].dtype == np.int32
