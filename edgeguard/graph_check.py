"""What makes an `IntegerGraph` valid: names, order, shapes, types, ranges and scales."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np

from edgeguard import graph as g
from edgeguard.errors import InputError
from edgeguard.graph import IntegerGraph, Node, Shape, Tensor
from edgeguard.inttype import ACCUMULATOR, MAX_BITS, PIXEL

EXACT_SUM = 1 << 24
"""Sums of an average pool stay below this, so that float32 holds them."""
MAX_ELEMENTS = 1 << 28
"""Of one tensor of one image: more is a mistake or an attack."""
ARRAY_DTYPES = {
    "weight": np.int8, "weight_scale": np.float32, "bias": np.int32, "scale": np.float32, "zero_point": np.int32,
    "table": np.int16, "slope": np.float32,
}  # fmt: skip
LENGTHS = {"stride": 2, "dilation": 2, "kernel": 2, "channels": 2, "padding": 4}


def validate(graph: IntegerGraph) -> None:
    """Check a whole graph.

    Raises:
        InputError: naming the node and what is wrong.
    """
    if not graph.nodes or not isinstance(graph.nodes[-1], g.Dequantize):
        raise InputError("an integer graph ends in a Dequantize")
    source = graph.tensors.get(graph.input)
    if source is None or source.dtype != PIXEL or source.scale is not None or len(source.shape) != 3:
        raise InputError(f"the input {graph.input!r} must be (C, H, W) uint8 pixels")
    for name, tensor in graph.tensors.items():
        if tensor.name != name or math.prod(tensor.shape) > MAX_ELEMENTS or min(tensor.shape, default=0) < 1:
            raise InputError(f"tensor {name!r} is called {tensor.name!r} or has an impossible shape {tensor.shape}")
        if tensor.dtype.bits > MAX_BITS and tensor.dtype != ACCUMULATOR:
            raise InputError(f"tensor {name!r} has {tensor.dtype.bits} bits; integer engines run {MAX_BITS} at most")
    known = {graph.input}
    for node in graph.nodes:
        try:
            _check_node(graph, node, known)
        except (InputError, KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError) as exc:
            raise InputError(f"integer graph, node {node.name!r} ({type(node).__name__}): {exc}") from exc
        known.add(node.output)
    read = {name for node in graph.nodes for name in g.node_inputs(node)}
    if idle := {*graph.tensors, *known} - (known & read) - {graph.output}:
        raise InputError(f"the tensors {sorted(idle)} are never written or never read")
    if len({node.name for node in graph.nodes}) < len(graph.nodes):
        raise InputError("two nodes of an integer graph have the same name")


def _check_node(graph: IntegerGraph, node: Node, known: set[str]) -> None:
    _check_fields(node)
    missing = [name for name in g.node_inputs(node) if name not in known]
    if missing or node.output in known:
        raise InputError(f"reads {missing} before they are written, or writes {node.output!r} twice")
    inputs = [graph.tensors[name] for name in g.node_inputs(node)]
    if isinstance(node, g.Dequantize) != (node is graph.nodes[-1]):
        raise InputError("a Dequantize is the last node and nothing else is")
    shape = output_shape(node, inputs)
    if isinstance(node, g.Dequantize):
        if node.output in graph.tensors:
            raise InputError(f"its output {node.output!r} is float32 and has no place among the integer tensors")
        return _check_last(node, inputs[0])
    output = graph.tensors[node.output]
    if output.shape != shape:
        raise InputError(f"writes {shape}, but its output is declared {output.shape}")
    return _check_types(graph, node, inputs, output)


def _window(size: int, kernel: int, stride: int, pad: int, dilation: int = 1) -> int:
    result = (size + pad - dilation * (kernel - 1) - 1) // stride + 1
    if result < 1 or min(kernel, stride, dilation) < 1 or pad < 0:
        raise InputError(f"a window of {kernel} at stride {stride} does not fit {size} rows or columns")
    return result


def _check_padded(channels: int, height: int, width: int) -> None:
    if channels * height * width > MAX_ELEMENTS:
        raise InputError(f"its input has {channels}x{height}x{width} values when it is padded; at most {MAX_ELEMENTS} are held")


def output_shape(node: Node, inputs: list[Tensor]) -> Shape:
    """Shape of a node's output, without the batch axis, from its inputs'."""
    shape = inputs[0].shape
    if isinstance(node, g.Conv):
        channels, height, width = shape
        out, per_group, kernel_h, kernel_w = node.weight.shape
        if per_group * node.groups != channels or out % node.groups:
            raise InputError(f"weight {node.weight.shape} and {node.groups} groups do not fit {channels} channels")
        top, left, bottom, right = node.padding
        _check_padded(channels, height + top + bottom, width + left + right)
        rows = _window(height, kernel_h, node.stride[0], top + bottom, node.dilation[0])
        return out, rows, _window(width, kernel_w, node.stride[1], left + right, node.dilation[1])
    if isinstance(node, g.Linear):
        if shape != (node.weight.shape[1],):
            raise InputError(f"weight {node.weight.shape} does not fit an input of shape {shape}")
        return (node.weight.shape[0],)
    if isinstance(node, g.Concat):
        if any(t.shape[1:] != shape[1:] for t in inputs):
            raise InputError(f"cannot concatenate {[t.shape for t in inputs]}")
        return (sum(t.shape[0] for t in inputs), *shape[1:])
    if isinstance(node, g.MaxPool | g.AveragePool):
        channels, height, width = shape
        top, left, bottom, right = node.padding if isinstance(node, g.MaxPool) else (0, 0, 0, 0)
        _check_padded(channels, height + top + bottom, width + left + right)
        rows = _window(height, node.kernel[0], node.stride[0], top + bottom)
        return channels, rows, _window(width, node.kernel[1], node.stride[1], left + right)
    if isinstance(node, g.Pad):
        channels, height, width = shape
        top, left, bottom, right = node.padding
        return channels + sum(node.channels), height + top + bottom, width + left + right
    if isinstance(node, g.Add) and inputs[1].shape != shape:
        raise InputError(f"cannot add {shape} and {inputs[1].shape}")
    if isinstance(node, g.Multiply) and inputs[1].shape not in (shape, (shape[0], 1, 1)):
        raise InputError(f"cannot multiply {shape} by {inputs[1].shape}")
    if isinstance(node, g.Slice):
        if not 0 <= node.start < node.stop <= shape[0]:
            raise InputError(f"there are no channels {node.start} to {node.stop} among {shape[0]}")
        return (node.stop - node.start, *shape[1:])
    if isinstance(node, g.Take):
        channels, height, width = shape
        for what, indices, size in (("rows", node.rows, height), ("columns", node.columns, width)):
            if not indices or max(indices) >= size:
                raise InputError(f"it takes {what} {indices}, but there are {size}")
        return channels, len(node.rows), len(node.columns)
    if isinstance(node, g.Shuffle) and (len(shape) != 3 or node.groups < 1 or shape[0] % node.groups):
        raise InputError(f"cannot shuffle {shape} in {node.groups} groups")
    return (math.prod(shape),) if isinstance(node, g.Flatten) else shape


def _positive_float32(values: Any, what: str) -> None:
    array = np.asarray(values)
    if array.dtype == object or not np.isfinite(array).all() or (array <= 0).any():
        raise InputError(f"{what} must be positive and finite")
    if (array.astype(np.float32) != array).any():
        raise InputError(f"{what} must be exact in float32")


def _check_fields(node: Node) -> None:
    for field in fields(node):
        value = getattr(node, field.name)
        length, dtype = LENGTHS.get(field.name), ARRAY_DTYPES.get(field.name)
        if dtype and (not isinstance(value, np.ndarray) or value.dtype != dtype):
            raise InputError(f"its {field.name} must be an array of {np.dtype(dtype)}, got {getattr(value, 'dtype', value)}")
        if length and (len(value) != length or any(type(item) is not int or item < 0 for item in value)):
            raise InputError(f"its {field.name} must be {length} integers, none negative, got {value!r}")
        if field.name in ("rows", "columns") and any(type(item) is not int or item < 0 for item in value):
            raise InputError(f"its {field.name} must be integers, none negative, got {value!r}")
        if field.name in ("groups", "low", "high", "start", "stop") and type(value) is not int:
            raise InputError(f"its {field.name} must be an integer, got {value!r}")
        names = value if field.name == "inputs" else (value,) if field.name in ("name", "input", "output", "other") else ()
        if any(type(name) is not str or not name for name in names):
            raise InputError(f"its {field.name} must be text, got {value!r}")


def _check_types(graph: IntegerGraph, node: Node, inputs: list[Tensor], output: Tensor) -> None:
    """Types, ranges and scales of a node other than the last."""
    if any(t.scale is None for t in inputs) != isinstance(node, g.Quantize):
        raise InputError("a Quantize reads pixels, and everything between it and the accumulators is quantized")
    if output.dtype != ACCUMULATOR:
        _positive_float32(output.scale, "its output's scale")
    elif not isinstance(node, g.Linear) or output.scale is not None:
        raise InputError("only a Linear may leave its accumulators, and they have no scale")
    if isinstance(node, g.Conv | g.Linear):
        _check_product(graph, node, inputs[0], output)
    elif isinstance(node, g.Add):
        graph.add_ratios(node)
    elif isinstance(node, g.Multiply):
        if any(t.dtype.bits > MAX_BITS for t in inputs):
            raise InputError("it multiplies integers of at most 8 bits")
        _positive_float32(graph.product_multiplier(node), "its multiplier")
    elif isinstance(node, g.Lookup):
        entries = (1 << inputs[0].dtype.bits,)
        if node.table.shape != entries or node.slope.shape != entries or not output.dtype.allowed(node.table):
            raise InputError(f"its table and slope need {entries[0]} entries each, those of the table {output.dtype}")
        if not np.isfinite(node.slope).all():
            raise InputError("its slope must be finite")
    elif isinstance(node, g.Quantize):
        channels = inputs[0].shape[:1]
        if inputs[0].dtype != PIXEL or node.scale.shape != channels or node.zero_point.shape != channels:
            raise InputError("it reads pixels and needs one scale and zero point per channel")
        _positive_float32(node.scale, "its scales")
        if (np.abs(node.zero_point.astype(np.int64)) >= EXACT_SUM).any():
            raise InputError("its zero points are beyond what float32 holds exactly")
    elif isinstance(node, g.AveragePool):
        if math.prod(node.kernel) * max(-inputs[0].dtype.qmin, inputs[0].dtype.qmax) >= EXACT_SUM:
            raise InputError(f"its window of {node.kernel} is too large for an exact sum")
        _positive_float32(graph.average_multiplier(node), "its multiplier")
    else:
        _check_move(node, inputs, output)


def _check_product(graph: IntegerGraph, node: g.Conv | g.Linear, source: Tensor, output: Tensor) -> None:
    if node.weight.ndim != (4 if isinstance(node, g.Conv) else 2):
        raise InputError(f"its weights are {node.weight.ndim}-dimensional")
    if not node.weight_type.signed or node.weight_type.bits > MAX_BITS or not node.weight_type.allowed(node.weight):
        raise InputError(f"its weights are not {node.weight_type}")
    channels = node.weight.shape[:1]
    if node.weight_scale.shape != channels or node.bias.shape != channels:
        raise InputError("it needs one scale and one bias per output channel")
    _positive_float32(node.weight_scale, "its weight scales")
    if output.dtype != ACCUMULATOR:
        _positive_float32(graph.multiplier(node), "its requantization factors")
    if g.accumulator_bound(node, source.dtype) > ACCUMULATOR.qmax:
        raise InputError("its accumulator can leave 32 bits")


def _check_move(node: Node, inputs: list[Tensor], output: Tensor) -> None:
    if any(t.scale != output.scale or t.dtype != output.dtype for t in inputs):
        raise InputError("it moves integers, so types and scales of input and output must be equal")
    if isinstance(node, g.Clamp) and max(node.low, output.dtype.qmin) > min(node.high, output.dtype.qmax):
        raise InputError(f"the limits {node.low} and {node.high} leave nothing of {output.dtype}")
    if isinstance(node, g.MaxPool):
        (height, width), (top, left, bottom, right) = node.kernel, node.padding
        if max(top, bottom) >= height or max(left, right) >= width:
            raise InputError(f"its padding {node.padding} must be smaller than its kernel {node.kernel}")


def _check_last(node: g.Dequantize, source: Tensor) -> None:
    if node.scale.shape != source.shape or len(source.shape) != 1:
        raise InputError(f"it reads (classes,) integers with one scale each, got {source.shape} and {node.scale.shape}")
    _positive_float32(node.scale, "its scales")
