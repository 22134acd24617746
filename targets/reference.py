"""The reference executor: an `IntegerGraph` in NumPy, by the formulas of its docstring. All runtimes are held to it.

Products run in floating-point BLAS, and only where a bound on the accumulator proves that every partial sum is an
exact integer: below 2**24 in float32, below 2**53 in float64.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from edgeguard import graph as g
from edgeguard.errors import InputError
from edgeguard.graph import IntegerGraph
from edgeguard.inttype import IntType
from edgeguard.targets import BaseEngine

CHUNK_BYTES = 64 << 20
"""Most bytes of unfolded windows at a time; one image is always taken."""

Array = NDArray[Any]


def run(graph: IntegerGraph, images: NDArray[np.uint8], keep: Collection[str] = ()) -> dict[str, Array]:
    """Execute a graph.

    Args:
        images: (N, 3, H, W) uint8.
        keep: names of intermediate tensors to return as well, e.g. `graph.tensors` for all of them.

    Returns:
        Arrays by tensor name, batch first: the logits under `graph.output`, and those of `keep`.

    Raises:
        InputError: when `keep` names a tensor that the graph does not have.
    """
    unknown = set(keep) - graph.tensors.keys() - {graph.output}
    if unknown:
        raise InputError(f"the graph has no tensor {sorted(unknown)}")
    last_use = {name: index for index, node in enumerate(graph.nodes) for name in g.node_inputs(node)}
    values: dict[str, Array] = {graph.input: images}
    for index, node in enumerate(graph.nodes):
        values[node.output] = execute(graph, node, [values[name] for name in g.node_inputs(node)])
        for name in g.node_inputs(node):
            if last_use[name] == index and name not in keep:
                values.pop(name, None)
    return {name: value for name, value in values.items() if name in keep or name == graph.output}


def execute(graph: IntegerGraph, node: g.Node, inputs: list[Array]) -> Array:
    """One node on given inputs, batch first."""
    x = inputs[0]
    if isinstance(node, g.Dequantize):
        return x.astype(np.float32) * node.scale
    dtype = graph.tensors[node.output].dtype
    if isinstance(node, g.Conv):
        accumulators = convolve(node, x, graph.tensors[node.input].dtype)
        return requantize(accumulators, graph.multiplier(node)[:, None, None], dtype)
    if isinstance(node, g.Linear):
        exact = _exact_float(node, graph.tensors[node.input].dtype)
        sums = (x.astype(exact) @ node.weight.T.astype(exact)).astype(np.int32) + node.bias
        return sums if dtype.bits == 32 else requantize(sums, graph.multiplier(node), dtype)
    if isinstance(node, g.AveragePool):
        windows = sliding_window_view(x, node.kernel, axis=(2, 3))[:, :, :: node.stride[0], :: node.stride[1]]
        return requantize(windows.sum((4, 5), dtype=np.int32), graph.average_multiplier(node), dtype)
    if isinstance(node, g.Quantize):
        with np.errstate(over="ignore"):  # an infinite quotient is clamped like any other
            quotient = x.astype(np.float32) / node.scale[:, None, None]
        return _to_integers(np.rint(quotient) + node.zero_point[:, None, None].astype(np.float32), dtype)
    if isinstance(node, g.Add):
        first, second = (np.float32(ratio) for ratio in graph.add_ratios(node))
        return _to_integers(np.rint(x.astype(np.float32) * first + inputs[1].astype(np.float32) * second), dtype)
    if isinstance(node, g.Multiply):
        return requantize(x.astype(np.int32) * inputs[1], graph.product_multiplier(node), dtype)
    if isinstance(node, g.Lookup):
        index = x.astype(np.int16) - graph.tensors[node.input].dtype.qmin
        found: Array = node.table.astype(dtype.container)[index]
        return found
    return _move(node, inputs, dtype)


def _move(node: g.Node, inputs: list[Array], dtype: IntType) -> Array:
    x = inputs[0]
    if isinstance(node, g.Concat):
        return np.concatenate(inputs, 1)
    if isinstance(node, g.Slice):
        return x[:, node.start : node.stop]
    if isinstance(node, g.Take):
        return x[:, :, node.rows][:, :, :, node.columns]
    if isinstance(node, g.Shuffle):
        grouped = x.reshape(len(x), node.groups, -1, *x.shape[2:])
        return np.asarray(grouped.swapaxes(1, 2).reshape(x.shape))
    if isinstance(node, g.MaxPool):
        x = _pad(x, node.padding, dtype.qmin)
        windows = sliding_window_view(x, node.kernel, axis=(2, 3))[:, :, :: node.stride[0], :: node.stride[1]]
        return np.asarray(windows.max((4, 5)))
    if isinstance(node, g.Pad):
        return _pad(x, node.padding, 0, node.channels)
    if isinstance(node, g.Flatten):
        return x.reshape(len(x), -1)
    if isinstance(node, g.Clamp):
        return np.clip(x, max(node.low, dtype.qmin), min(node.high, dtype.qmax))
    raise InputError(f"the reference does not know {type(node).__name__}, node {node.name!r}")


def requantize(accumulators: NDArray[np.int32], multiplier: Any, dtype: IntType) -> Array:
    """`clamp(round_half_even(float32(acc) * m))` as the container of `dtype`."""
    scaled = accumulators.astype(np.float32)
    scaled *= multiplier
    return _to_integers(np.rint(scaled, out=scaled), dtype)


def convolve(node: g.Conv, x: Array, input_type: IntType) -> NDArray[np.int32]:
    """Exact accumulators (N, O, H, W) int32 of a convolution, bias included."""
    exact = _exact_float(node, input_type)
    out, per_group, kernel_h, kernel_w = node.weight.shape
    span = [(size - 1) * step + 1 for size, step in zip((kernel_h, kernel_w), node.dilation, strict=True)]
    weight = node.weight.reshape(node.groups, out // node.groups, -1).astype(exact)
    x = _pad(x, node.padding, 0)
    rows = (x.shape[2] - span[0]) // node.stride[0] + 1
    columns = (x.shape[3] - span[1]) // node.stride[1] + 1
    result = np.empty((len(x), out, rows, columns), np.int32)
    image_bytes = x.shape[1] * kernel_h * kernel_w * rows * columns * exact.itemsize
    step = max(1, CHUNK_BYTES // image_bytes)
    for start in range(0, len(x), step):
        part = x[start : start + step].astype(exact)
        windows = sliding_window_view(part, tuple(span), axis=(2, 3))
        windows = windows[:, :, :: node.stride[0], :: node.stride[1], :: node.dilation[0], :: node.dilation[1]]
        unfolded = windows.transpose(0, 1, 4, 5, 2, 3).reshape(
            len(part), node.groups, per_group * kernel_h * kernel_w, rows * columns
        )
        result[start : start + step] = (weight @ unfolded).reshape(len(part), out, rows, columns)
    result += node.bias[:, None, None]
    return result


def _exact_float(node: g.Conv | g.Linear, input_type: IntType) -> np.dtype[Any]:
    return np.dtype(np.float32 if g.accumulator_bound(node, input_type) < 1 << 24 else np.float64)


def _pad(x: Array, padding: g.Padding, value: int, channels: g.Pair = (0, 0)) -> Array:
    top, left, bottom, right = padding
    if not any((*padding, *channels)):
        return x
    return np.pad(x, ((0, 0), channels, (top, bottom), (left, right)), constant_values=value)


def _to_integers(values: NDArray[np.float32], dtype: IntType) -> Array:
    return np.clip(values, dtype.qmin, dtype.qmax, out=values).astype(dtype.container)


class ReferenceEngine(BaseEngine):
    """The reference behind the `Engine` protocol. It needs NumPy alone."""

    name = "reference"

    def __init__(self, graph: IntegerGraph) -> None:
        super().__init__(graph.input_shape, graph.num_classes)
        self.graph = graph

    def _logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return run(self.graph, images)[self.graph.output]

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "version": np.__version__, "provider": "numpy", "threads": None}
