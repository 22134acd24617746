"""The lowered model: a short list of integer operations with NumPy parameters. The single truth of an export.

A quantized tensor is integers `q` with a float32 scale `s` and zero point 0: the real value is `q * s`. Arithmetic:

* `Conv`, `Linear`: exact int32 accumulators `acc = sum(w * x) + bias`, then
  `q = clamp(round_half_even(float32(acc) * m))` with `m = (s_x * s_w[c]) / s_y` in float32, in that order.
* `Add`: `q = clamp(round_half_even(a * (s_a / s_y) + b * (s_b / s_y)))`; both ratios must be powers of two, so the sum
  is exact in float32 whatever the order or fusion of the operations.
* `AveragePool`: `q = clamp(round_half_even(float32(sum) * (s_x / (n * s_y))))`, n = the pixels of the window.
* `Quantize`: `q = clamp(round_half_even(float32(p) / scale[c]) + zero_point[c])` on uint8 pixels p.
* `Dequantize`: `logits = float32(acc) * scale[c]`.

Everything else moves or clips integers. Shapes are without the batch axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import InputError
from edgeguard.inttype import IntType

Shape = tuple[int, ...]
Pair = tuple[int, int]
Padding = tuple[int, int, int, int]
"""Zeros added at the top, left, bottom and right."""

MAX_RATIO = 1 << 7
"""Between the scales of an addition, either way: its sum is then exact in float32."""


@dataclass(frozen=True)
class Tensor:
    """A value between two operations.

    scale: exactly representable in float32; None where the integers have no single scale (pixels, accumulators).
    """

    name: str
    shape: Shape
    dtype: IntType
    scale: float | None


@dataclass(frozen=True, eq=False)
class Quantize:
    """Pixels to integers; normalization is folded in. scale: (C,) float32, zero_point: (C,) int32."""

    name: str
    input: str
    output: str
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Conv:
    """Convolution. weight: (O, I / groups, kh, kw) int8, weight_scale: (O,) float32, bias: (O,) int32."""

    name: str
    input: str
    output: str
    weight: NDArray[np.int8]
    weight_type: IntType
    weight_scale: NDArray[np.float32]
    bias: NDArray[np.int32]
    stride: Pair
    padding: Padding
    dilation: Pair
    groups: int


@dataclass(frozen=True, eq=False)
class Linear:
    """Matrix product over (I,). weight: (O, I) int8. An `ACCUMULATOR` output is left as int32, unscaled."""

    name: str
    input: str
    output: str
    weight: NDArray[np.int8]
    weight_type: IntType
    weight_scale: NDArray[np.float32]
    bias: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Add:
    """Sum of two tensors whose scales are powers of two times the output's."""

    name: str
    input: str
    other: str
    output: str


@dataclass(frozen=True, eq=False)
class Concat:
    """Concatenation along channels of tensors with equal type and scale."""

    name: str
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True, eq=False)
class MaxPool:
    """Maximum over windows; padding never wins."""

    name: str
    input: str
    output: str
    kernel: Pair
    stride: Pair
    padding: Padding


@dataclass(frozen=True, eq=False)
class AveragePool:
    """Mean over the whole image when `kernel` equals the input's height and width."""

    name: str
    input: str
    output: str
    kernel: Pair
    stride: Pair


@dataclass(frozen=True, eq=False)
class Pad:
    """Zeros around rows and columns (`padding`) and channels (`channels`: before, after)."""

    name: str
    input: str
    output: str
    channels: Pair
    padding: Padding


@dataclass(frozen=True, eq=False)
class Flatten:
    """(C, H, W) to (C * H * W,)."""

    name: str
    input: str
    output: str


@dataclass(frozen=True, eq=False)
class Clamp:
    """Integers limited to [low, high]: ReLU and ReLU6."""

    name: str
    input: str
    output: str
    low: int
    high: int


@dataclass(frozen=True, eq=False)
class Dequantize:
    """Accumulators to float32 logits. scale: (classes,) float32. Always the last node."""

    name: str
    input: str
    output: str
    scale: NDArray[np.float32]


Node = Quantize | Conv | Linear | Add | Concat | MaxPool | AveragePool | Pad | Flatten | Clamp | Dequantize


def node_inputs(node: Node) -> tuple[str, ...]:
    """Names of the tensors a node reads."""
    if isinstance(node, Concat):
        return node.inputs
    if isinstance(node, Add):
        return (node.input, node.other)
    return (node.input,)


def requantization(input_scale: float, weight_scale: NDArray[np.float32], output_scale: float) -> NDArray[np.float32]:
    """The float32 multiplier of each output channel, `(s_x * s_w) / s_y`, rounded after each operation."""
    product: NDArray[np.float32] = np.float32(input_scale) * weight_scale
    quotient: NDArray[np.float32] = product / np.float32(output_scale)
    return quotient.astype(np.float32)


def accumulator_reach(node: Conv | Linear, input_type: IntType) -> NDArray[np.int64]:
    """(O, I / groups) largest magnitude that each input channel can add to each accumulator, without the bias."""
    weights: NDArray[np.int64] = np.abs(node.weight.astype(np.int64)).reshape(*node.weight.shape[:2], -1).sum(2)
    return weights * max(-input_type.qmin, input_type.qmax)


def accumulator_bound(node: Conv | Linear, input_type: IntType) -> int:
    """The largest magnitude that any partial sum of any accumulator can reach, bias included."""
    return int((accumulator_reach(node, input_type).sum(1) + np.abs(node.bias.astype(np.int64))).max())


def add_ratio(input_scale: float, output_scale: float) -> float:
    """The exact power of two by which an addend's integers are multiplied.

    Raises:
        InputError: when the ratio is not a power of two, or so far from one that float32 could not hold the sum.
    """
    ratio = input_scale / output_scale
    if math.frexp(ratio)[0] != 0.5 or not 1 / MAX_RATIO <= ratio <= MAX_RATIO:
        raise InputError(f"an addition needs scales a power of two (up to {MAX_RATIO}) apart, got a ratio of {ratio!r}")
    return ratio


@dataclass(frozen=True, eq=False)
class IntegerGraph:
    """Nodes in execution order, and the tensors they write, by name.

    The input is tensor `input`: (3, H, W) uint8 RGB pixels. The last node is a `Dequantize`; its output, float32 logits
    (classes,), has no entry in `tensors`.

    Raises:
        InputError: when a node is malformed; `edgeguard.graph_check.validate` says which one and why.
    """

    nodes: tuple[Node, ...]
    tensors: Mapping[str, Tensor]
    input: str = "pixels"

    def __post_init__(self) -> None:
        from edgeguard.graph_check import validate

        validate(self)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.tensors[self.input].shape
        return channels, height, width

    @property
    def output(self) -> str:
        return self.nodes[-1].output

    @property
    def num_classes(self) -> int:
        last = self.nodes[-1]
        if not isinstance(last, Dequantize):
            raise InputError("the last node must be a Dequantize")
        return int(last.scale.size)

    def multiplier(self, node: Conv | Linear) -> NDArray[np.float32]:
        """(O,) float32 requantization factors of a node with a scaled output."""
        input_scale, output_scale = self.tensors[node.input].scale, self.tensors[node.output].scale
        if input_scale is None or output_scale is None:
            raise InputError(f"{node.name}: its input and output need a scale")
        return requantization(input_scale, node.weight_scale, output_scale)

    def average_multiplier(self, node: AveragePool) -> np.float32:
        """The float32 factor `s_x / (n * s_y)`, in ONNX Runtime's order of operations."""
        input_scale, output_scale = self.tensors[node.input].scale, self.tensors[node.output].scale
        if input_scale is None or output_scale is None:
            raise InputError(f"{node.name}: its input and output need a scale")
        count = np.float32(node.kernel[0] * node.kernel[1])
        factor: np.float32 = np.float32(input_scale) / np.float32(count * np.float32(output_scale))
        return factor

    def add_ratios(self, node: Add) -> tuple[float, float]:
        """The exact powers of two by which the integers of both addends are multiplied."""
        first, second, output = (self.tensors[name].scale for name in (node.input, node.other, node.output))
        if first is None or second is None or output is None:
            raise InputError(f"{node.name}: its inputs and output need a scale")
        return add_ratio(first, output), add_ratio(second, output)

    def macs(self, node: Node) -> int:
        """Multiply-accumulates of one node for one image."""
        if isinstance(node, Conv):
            _, height, width = self.tensors[node.output].shape
            return int(node.weight.size) * height * width
        return int(node.weight.size) if isinstance(node, Linear) else 0
