"""The lowered model: a short list of integer operations with NumPy parameters. The single truth of an export.

A quantized tensor is integers `q` with a float32 scale `s` and zero point 0: the real value is `q * s`. Arithmetic:

* `Conv`, `Linear`: exact int32 accumulators `acc = sum(w * x) + bias`, then
  `q = clamp(round_half_even(float32(acc) * m))` with `m = (s_x * s_w[c]) / s_y` in float32, in that order.
* `Add`: `q = clamp(round_half_even(a * (s_a / s_y) + b * (s_b / s_y)))`; both ratios must be powers of two, so the sum
  is exact in float32 whatever the order or fusion of the operations.
* `Multiply`: `q = clamp(round_half_even(float32(a * b) * m))` with `m = (s_a * s_b) / s_y` in float32, in that order.
* `AveragePool`: `q = clamp(round_half_even(float32(sum) * (s_x / (n * s_y))))`, n = the pixels of the window.
* `Quantize`: `q = clamp(round_half_even(float32(p) / scale[c]) + zero_point[c])` on uint8 pixels p.
* `Lookup`: `q = table[x - qmin]`.
* `Dequantize`: `logits = float32(q) * scale[c]`.

Everything else moves or clips integers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import InputError
from edgeguard.graph_nodes import (
    Add,
    AveragePool,
    Clamp,
    Concat,
    Conv,
    Dequantize,
    Flatten,
    Linear,
    Lookup,
    MaxPool,
    Multiply,
    Node,
    Pad,
    Padding,
    Pair,
    Quantize,
    Shape,
    Shuffle,
    Slice,
    Take,
    Tensor,
    node_inputs,
)
from edgeguard.inttype import IntType

__all__ = [
    "MAX_RATIO", "Add", "AveragePool", "Clamp", "Concat", "Conv", "Dequantize", "Flatten", "IntegerGraph", "Linear",
    "Lookup", "MaxPool", "Multiply", "Node", "Pad", "Padding", "Pair", "Quantize", "Shape", "Shuffle", "Slice", "Take", "Tensor",
    "accumulator_bound", "accumulator_reach", "add_ratio", "node_inputs", "requantization",
]  # fmt: skip

MAX_RATIO = 1 << 7
"""Between the scales of an addition, either way: its sum is then exact in float32."""


def requantization(input_scale: float, weight_scale: NDArray[np.float32], output_scale: float) -> NDArray[np.float32]:
    """The float32 multiplier of each output channel, `(s_x * s_w) / s_y`, rounded after each operation."""
    product: NDArray[np.float32] = np.float32(input_scale) * weight_scale
    quotient: NDArray[np.float32] = product / np.float32(output_scale)
    return quotient.astype(np.float32)


def accumulator_reach(node: Conv | Linear, input_type: IntType) -> NDArray[np.int64]:
    """(O, I / groups) largest magnitude that each input channel can add to each accumulator, without the bias."""
    magnitudes = np.abs(node.weight, dtype=np.int16).reshape(*node.weight.shape[:2], -1)
    weights: NDArray[np.int64] = magnitudes.sum(2, dtype=np.int64)
    return weights * max(-input_type.qmin, input_type.qmax)


def accumulator_bound(node: Conv | Linear, input_type: IntType) -> int:
    """The largest magnitude that any partial sum of any accumulator can reach, bias included."""
    magnitudes = np.abs(node.weight, dtype=np.int16).reshape(node.weight.shape[0], -1)
    reach = magnitudes.sum(1, dtype=np.int64) * max(-input_type.qmin, input_type.qmax)
    return int((reach + np.abs(node.bias.astype(np.int64))).max())


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

    def product_multiplier(self, node: Multiply) -> np.float32:
        """The float32 factor `(s_a * s_b) / s_y` of a product of two tensors, rounded after each operation."""
        first, second, output = (self.tensors[name].scale for name in (node.input, node.other, node.output))
        if first is None or second is None or output is None:
            raise InputError(f"{node.name}: its inputs and output need a scale")
        factor: np.float32 = np.float32(np.float32(first) * np.float32(second)) / np.float32(output)
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
        if isinstance(node, Multiply):
            return int(np.prod(self.tensors[node.output].shape))
        return int(node.weight.size) if isinstance(node, Linear) else 0
