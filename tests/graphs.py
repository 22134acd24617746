"""Integer graphs with random weights, for tests and benchmarks of engines."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard import graph as g
from edgeguard.graph import IntegerGraph, Tensor
from edgeguard.inttype import ACCUMULATOR, PIXEL, IntType
from edgeguard.targets import reference

MEAN, STD = np.array([0.49, 0.48, 0.45]), np.array([0.25, 0.24, 0.26])


class Builder:
    """Appends nodes and calibrates the scale of each output on a few random images, so that no range is idle."""

    def __init__(self, bits: int, shape: tuple[int, int, int], seed: int, first_bits: int = 8) -> None:
        self.bits, self.first_bits = bits, first_bits
        self.rng = np.random.default_rng(seed)
        self.nodes: list[g.Node] = []
        self.tensors = {"pixels": Tensor("pixels", shape, PIXEL, None)}
        self.values: dict[str, NDArray[Any]] = {"pixels": random_images(shape, 4, seed)}

    def quantize(self, bits: int = 8) -> str:
        dtype = IntType(bits, signed=True)
        step = np.float32(np.max(np.maximum(MEAN, 1 - MEAN) / STD) / dtype.qmax)
        zero_point = np.rint(-MEAN / (STD * step)).astype(np.int32)
        node = g.Quantize("quantize", "pixels", "quantized", (255 * STD * step).astype(np.float32), zero_point)
        return self.append(node, dtype, float(step))

    def append(self, node: g.Node, dtype: IntType, scale: float | None) -> str:
        shape = self.shape_of(node)
        self.tensors[node.output] = Tensor(node.output, shape, dtype, scale)
        self.nodes.append(node)
        self.values[node.output] = reference.execute(self, node, [self.values[n] for n in g.node_inputs(node)])  # type: ignore[arg-type]
        return node.output

    def shape_of(self, node: g.Node) -> tuple[int, ...]:
        from edgeguard.graph_check import output_shape

        return output_shape(node, [self.tensors[name] for name in g.node_inputs(node)])

    multiplier = IntegerGraph.multiplier
    average_multiplier = IntegerGraph.average_multiplier
    add_ratios = IntegerGraph.add_ratios
    product_multiplier = IntegerGraph.product_multiplier

    def conv(
        self, x: str, out: int, kernel: int | tuple[int, int] = 3, stride: int = 1, padding: Any = None,
        dilation: int = 1, groups: int = 1, signed: bool = False, bits: int | None = None, scale: float | None = None,
    ) -> str:  # fmt: skip
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        channels = self.tensors[x].shape[0]
        weight_type = IntType(bits or self.bits, signed=True, narrow=True)
        weight = self.weights((out, channels // groups, *size), weight_type)
        padding = (
            padding if isinstance(padding, tuple) else (dilation * (size[0] // 2) if padding is None else padding,) * 4
        )
        name = f"conv{len(self.nodes)}"
        node = g.Conv(
            name, x, f"{name}.out", weight, weight_type, self.weight_scale(weight), np.zeros(out, np.int32),
            (stride, stride), padding, (dilation, dilation), groups,
        )  # fmt: skip
        sums = reference.convolve(node, self.values[x], self.tensors[x].dtype).transpose(0, 2, 3, 1)
        return self.append_product(node, sums, IntType(self.bits, signed), scale)

    def append_product(self, node: Any, sums: NDArray[Any], dtype: IntType, scale: float | None) -> str:
        node, sums = self.centred(node, sums)
        real = sums * (self.tensors[node.input].scale or 0.0) * node.weight_scale
        scale = scale or float(np.float32(np.quantile(np.abs(real), 0.97) / dtype.qmax))
        return self.append(node, dtype, scale)

    def centred(self, node: Any, sums: NDArray[Any]) -> tuple[Any, NDArray[Any]]:
        """Random biases that leave each channel about as often positive as negative, like batch norm."""
        flat = sums.reshape(-1, sums.shape[-1]).astype(float)
        bias = np.rint(flat.std(0) * self.rng.normal(0.2, 0.3, flat.shape[1]) - flat.mean(0)).astype(np.int32)
        return dataclasses.replace(node, bias=bias), sums + bias

    def weights(self, shape: tuple[int, ...], dtype: IntType) -> NDArray[np.int8]:
        values = np.rint(self.rng.normal(0, max(1.0, dtype.qmax / 2.5) * 0.8, shape))
        return np.clip(values, dtype.qmin, dtype.qmax).astype(np.int8)

    def weight_scale(self, weight: NDArray[np.int8]) -> NDArray[np.float32]:
        deviation = np.sqrt(math.prod(weight.shape[1:]) * weight.astype(float).var())
        return (self.rng.uniform(0.5, 1.5, len(weight)) / deviation).astype(np.float32)

    def linear(self, x: str, out: int, bits: int | None = None, accumulators: bool = False) -> str:
        weight_type = IntType(bits or self.bits, signed=True, narrow=True)
        weight = self.weights((out, self.tensors[x].shape[0]), weight_type)
        name = f"linear{len(self.nodes)}"
        node = g.Linear(name, x, f"{name}.out", weight, weight_type, self.weight_scale(weight), np.zeros(out, np.int32))
        sums = self.values[x].astype(np.int64) @ weight.T
        if accumulators:
            return self.append(self.centred(node, sums)[0], ACCUMULATOR, None)
        return self.append_product(node, sums, IntType(self.bits, False), None)

    def add(self, x: str, other: str, signed: bool = False) -> str:
        name = f"add{len(self.nodes)}"
        dtype = IntType(self.bits, signed)
        first, second = (self.values[name] * np.float32(self.tensors[name].scale or 0) for name in (x, other))
        scale = np.float32(self.tensors[x].scale or 0)
        while np.quantile(np.abs(first + second), 0.97) > scale * dtype.qmax:
            scale *= np.float32(2)
        return self.append(g.Add(name, x, other, f"{name}.out"), dtype, float(scale))

    def move(self, cls: Any, x: str, *arguments: Any) -> str:
        name = f"{cls.__name__.lower()}{len(self.nodes)}"
        return self.append(cls(name, x, f"{name}.out", *arguments), self.tensors[x].dtype, self.tensors[x].scale)

    def lookup(self, x: str, function: Any, signed: bool = True, bits: int | None = None) -> str:
        """A function of real values and its derivative, as a table. function: array to (values, derivatives)."""
        source, dtype, name = self.tensors[x], IntType(bits or self.bits, signed), f"lookup{len(self.nodes)}"
        step = source.scale or 0.0
        values, slopes = function(np.arange(source.dtype.qmin, source.dtype.qmin + (1 << source.dtype.bits)) * step)
        scale = float(np.float32(np.abs(values).max() * 0.8 / dtype.qmax))
        inside = np.abs(np.rint(values / scale) * 2 - dtype.qmin - dtype.qmax) <= dtype.qmax - dtype.qmin
        table = np.clip(np.rint(values / scale), dtype.qmin, dtype.qmax).astype(np.int16)
        slope = np.where(inside, slopes * step / scale, 0).astype(np.float32)
        return self.append(g.Lookup(name, x, f"{name}.out", table, slope), dtype, scale)

    def multiply(self, x: str, other: str, signed: bool = True) -> str:
        name, dtype = f"multiply{len(self.nodes)}", IntType(self.bits, signed)
        factors = [self.values[part] * (self.tensors[part].scale or 0.0) for part in (x, other)]
        scale = float(np.float32(np.quantile(np.abs(factors[0] * factors[1]), 0.97) / dtype.qmax))
        return self.append(g.Multiply(name, x, other, f"{name}.out"), dtype, scale)

    def concat(self, *inputs: str) -> str:
        name = f"concat{len(self.nodes)}"
        first = self.tensors[inputs[0]]
        return self.append(g.Concat(name, inputs, f"{name}.out"), first.dtype, first.scale)

    def average(self, x: str, kernel: int | None = None, stride: int = 1, bits: int | None = None) -> str:
        name = f"average{len(self.nodes)}"
        tensor = self.tensors[x]
        size = (kernel, kernel) if kernel else (tensor.shape[1], tensor.shape[2])
        dtype = IntType(bits or self.bits, tensor.dtype.signed)
        scale = float(np.float32((tensor.scale or 0.0) * 0.6 * tensor.dtype.qmax / dtype.qmax))
        return self.append(g.AveragePool(name, x, f"{name}.out", size, (stride, stride)), dtype, scale)

    def finish(self, x: str) -> IntegerGraph:
        linear = self.nodes[-1]
        scale = linear.weight_scale * np.float32(self.tensors[linear.input].scale or 0)  # type: ignore[union-attr]
        return IntegerGraph((*self.nodes, g.Dequantize("logits", x, "logits", scale)), self.tensors)


def random_images(shape: tuple[int, int, int], count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth random images with some black and white areas: pixels 0 and 255 occur."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(-0.4, 1.4, (count, shape[0], (shape[1] + 3) // 4, (shape[2] + 3) // 4))
    smooth = coarse.repeat(4, 2).repeat(4, 3)[:, :, : shape[1], : shape[2]] + rng.normal(0, 0.1, (count, *shape))
    return np.clip(np.rint(smooth * 255), 0, 255).astype(np.uint8)


@functools.cache
def every_op(bits: int, seed: int = 1) -> IntegerGraph:
    """A small net with every operation, odd sizes, groups, dilation, asymmetric padding, and both signs."""
    b = Builder(bits, (3, 13, 11), seed)
    x = b.conv(b.quantize(), 8, bits=8)
    depthwise = b.conv(x, 8, groups=8, stride=1)
    grouped = b.conv(x, 8, groups=2, dilation=2, signed=True, scale=b.tensors[depthwise].scale)
    x = b.add(depthwise, grouped)
    x = b.move(g.MaxPool, x, (3, 3), (2, 2), (1, 1, 1, 1))
    left = b.conv(x, 6, kernel=(2, 3), padding=(1, 0, 0, 2), signed=True)
    half = (b.tensors[left].scale or 0.0) / 2
    right = b.conv(x, 6, kernel=1, padding=(0, 0, 0, 0), signed=True, scale=half)
    x = b.add(left, right, signed=True)
    top = max(1, IntType(bits, True).qmax * 2 // 3)
    x = b.move(g.Clamp, x, -1, top)
    x = b.concat(x, b.move(g.Pad, b.move(g.MaxPool, x, (3, 3), (1, 1), (1, 1, 1, 1)), (2, 0), (0, 0, 0, 0)))
    x = b.move(g.Pad, x, (0, 0), (1, 0, 0, 1))
    x = b.average(x, 3, 2)
    x = b.linear(b.move(g.Flatten, x), 24)
    return b.finish(b.linear(x, 10, bits=8, accumulators=True))


def silu(x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    gate = 1 / (1 + np.exp(-x))
    return x * gate, gate * (1 + x * (1 - gate))


def sigmoid(x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    gate = 1 / (1 + np.exp(-x))
    return gate, gate * (1 - gate)


@functools.cache
def gated(bits: int, seed: int = 2) -> IntegerGraph:
    """Tables, products and moves: SiLU, squeeze-and-excite, channel shuffle and split, repeated pixels, ceil-mode pooling."""
    b = Builder(bits, (3, 13, 11), seed)
    x = b.lookup(b.conv(b.quantize(), 8, bits=8, signed=True), silu)
    gate = b.conv(b.average(x, bits=8), 8, kernel=1, padding=(0, 0, 0, 0), signed=True)
    x = b.multiply(x, b.lookup(gate, sigmoid, signed=False, bits=8))
    x = b.move(g.Shuffle, x, 2)
    left, right = b.move(g.Slice, x, 0, 3), b.move(g.Slice, x, 3, 8)
    x = b.move(g.Shuffle, b.concat(right, left), 4)
    x = b.move(g.Take, x, (0, 1, 1, 2, 3, 5, 6, 8, 9, 9, 10, 12), (10, 0, 2, 3, 4, 5, 6, 7, 8, 9, 9))
    x = b.multiply(x, b.lookup(x, sigmoid, signed=False), signed=True)
    x = b.move(g.MaxPool, x, (2, 2), (2, 2), (0, 0, 1, 1))
    x = b.conv(x, 6, stride=2)
    return b.finish(b.linear(b.move(g.Flatten, x), 10, bits=8, accumulators=True))


@functools.cache
def resnet20(bits: int, seed: int = 0) -> IntegerGraph:
    """ResNet-20 for 32x32 images with parameter-free shortcuts; first and last layer 8 bit, random weights."""
    b = Builder(bits, (3, 32, 32), seed)
    x = b.conv(b.quantize(), 16, bits=8)
    for channels in (16, 16, 16, 32, 32, 32, 64, 64, 64):
        stride = 1 if b.tensors[x].shape[0] == channels else 2
        y = b.conv(x, channels, stride=stride)
        y = b.conv(y, channels, signed=True, scale=b.tensors[x].scale)
        if stride == 2:
            x = b.move(g.MaxPool, x, (1, 1), (2, 2), (0, 0, 0, 0))
            x = b.move(g.Pad, x, (channels // 4, channels // 4), (0, 0, 0, 0))
        x = b.add(x, y)
    x = b.move(g.Flatten, b.average(x, bits=8))
    return b.finish(b.linear(x, 10, bits=8, accumulators=True))
