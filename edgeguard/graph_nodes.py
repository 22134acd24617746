"""The tensors and operations of an `IntegerGraph`: plain values. What they compute is defined in `edgeguard.graph`.

Shapes are without the batch axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeguard.inttype import IntType

Shape = tuple[int, ...]
Pair = tuple[int, int]
Padding = tuple[int, int, int, int]
"""Zeros added at the top, left, bottom and right."""

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
class Unary:
    """An operation on one tensor. input, output: names of tensors."""

    name: str
    input: str
    output: str


@dataclass(frozen=True, eq=False)
class Quantize(Unary):
    """Pixels to integers; normalization is folded in. scale: (C,) float32, zero_point: (C,) int32."""

    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Conv(Unary):
    """Convolution. weight: (O, I / groups, kh, kw) int8, weight_scale: (O,) float32, bias: (O,) int32."""

    weight: NDArray[np.int8]
    weight_type: IntType
    weight_scale: NDArray[np.float32]
    bias: NDArray[np.int32]
    stride: Pair
    padding: Padding
    dilation: Pair
    groups: int


@dataclass(frozen=True, eq=False)
class Linear(Unary):
    """Matrix product over (I,). weight: (O, I) int8. An `ACCUMULATOR` output is left as int32, unscaled."""

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
class Multiply:
    """Product of two tensors; `other` has the shape of `input`, or (C, 1, 1): one factor for each channel."""

    name: str
    input: str
    other: str
    output: str


@dataclass(frozen=True, eq=False)
class Lookup(Unary):
    """A function of each integer: `table[q - qmin]` of the input's type, for sigmoid, SiLU, hard-swish and the like.

    table: (2 ** bits,) int16, integers of the output's type. slope: (2 ** bits,) float32, the function's derivative in
    output steps per input step; for gradients only.
    """

    table: NDArray[np.int16]
    slope: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Concat:
    """Concatenation along channels of tensors with equal type and scale."""

    name: str
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True, eq=False)
class Slice(Unary):
    """Channels `start` to `stop`, without the latter."""

    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Take(Unary):
    """Pixel (i, j) is the input's pixel (rows[i], columns[j]); rows and columns may repeat."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Shuffle(Unary):
    """Channel shuffle: channel `g * (C / groups) + i` becomes channel `i * groups + g`."""

    groups: int


@dataclass(frozen=True, eq=False)
class MaxPool(Unary):
    """Maximum over windows; padding never wins."""

    kernel: Pair
    stride: Pair
    padding: Padding


@dataclass(frozen=True, eq=False)
class AveragePool(Unary):
    """Mean over the whole image when `kernel` equals the input's height and width."""

    kernel: Pair
    stride: Pair


@dataclass(frozen=True, eq=False)
class Pad(Unary):
    """Zeros around rows and columns (`padding`) and channels (`channels`: before, after)."""

    channels: Pair
    padding: Padding


@dataclass(frozen=True, eq=False)
class Flatten(Unary):
    """(C, H, W) to (C * H * W,)."""


@dataclass(frozen=True, eq=False)
class Clamp(Unary):
    """Integers limited to [low, high]: ReLU and ReLU6."""

    low: int
    high: int


@dataclass(frozen=True, eq=False)
class Dequantize(Unary):
    """Integers to float32 logits: accumulators, or a quantized tensor. scale: (classes,) float32. Always the last node."""

    scale: NDArray[np.float32]


Node = (
    Quantize | Conv | Linear | Add | Multiply | Lookup | Concat | Slice | Take | Shuffle | MaxPool | AveragePool | Pad
    | Flatten | Clamp | Dequantize
)


def node_inputs(node: Node) -> tuple[str, ...]:
    """Names of the tensors a node reads."""
    if isinstance(node, Concat):
        return node.inputs
    if isinstance(node, Add | Multiply):
        return (node.input, node.other)
    return (node.input,)
