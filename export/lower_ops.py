"""Parameters of single operations when a model is lowered: folded weights, tables, paddings."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from edgeguard import graph as g
from edgeguard.errors import ExportError
from edgeguard.inttype import ACCUMULATOR, IntType
from edgeguard.quant.batchnorm import SwitchableBatchNorm2d
from edgeguard.quant.prepare import is_node

DEAD_RESOLUTION = 256
"""Steps per output step of the bias of a channel that batch norm has switched off."""


def lookup(name: str, source: g.Tensor, function: nn.Module, dtype: IntType, scale: float) -> g.Lookup:
    """A function of one tensor as a table: computed in float64, rounded half to even, with its derivative."""
    if source.scale is None:
        raise ExportError(f"layer {name!r}: its input is not quantized")
    integers = np.arange(source.dtype.qmin, source.dtype.qmin + (1 << source.dtype.bits))
    with torch.enable_grad():
        real = torch.from_numpy(integers * np.float64(source.scale)).requires_grad_()
        values = copy.deepcopy(function).double()(real * 1.0)
        (derivative,) = torch.autograd.grad(values.sum(), real)
    steps = np.rint(array(values) / scale)
    inside = (steps >= dtype.qmin) & (steps <= dtype.qmax)
    slope = np.where(inside, array(derivative) * source.scale / scale, 0.0).astype(np.float32)
    table = np.clip(steps, dtype.qmin, dtype.qmax).astype(np.int16)
    return g.Lookup(name, source.name, name, table, slope)


def fold(integers: NDArray[Any], weight_scale: NDArray[Any], gain: NDArray[np.float64], shift: NDArray[np.float64],
         input_scale: float, input_type: IntType, output_scale: float | None,
         ) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.int32]]:  # fmt: skip
    """Fold `y = gain * conv(x) + shift` into integers, scales and int32 biases.

    A channel whose gain is so small that its bias leaves 32 bits is off: its weights become 0 and only its bias stays.

    Returns: weight int8 of the shape of `integers`, weight scale (O,) float32, bias (O,) int32.
    """
    channels = len(gain)
    columns = (channels, *[1] * (integers.ndim - 1))
    weight = (integers * np.where(gain < 0, -1.0, 1.0).reshape(columns)).astype(np.int8)
    scale = (np.abs(gain) * weight_scale.astype(np.float64)).astype(np.float32)
    step = np.float64(input_scale) * scale.astype(np.float64)
    magnitude = np.abs(weight.astype(np.int64)).reshape(channels, -1).sum(1) * max(-input_type.qmin, input_type.qmax)
    limit = ACCUMULATOR.qmax - magnitude - 1
    dead = (scale < np.finfo(np.float32).tiny) | (np.abs(shift) > limit * step)
    if dead.any():
        fallback = (output_scale or input_scale) / DEAD_RESOLUTION
        scale = np.where(dead, np.float32(fallback / input_scale), scale).astype(np.float32)
        step = np.float64(input_scale) * scale.astype(np.float64)
        weight[dead] = 0
    bias = np.clip(np.rint(shift / step), -(1 << 30) if dead.any() else -ACCUMULATOR.qmax, ACCUMULATOR.qmax)
    return weight, scale, bias.astype(np.int32)


def affine(
    layer: nn.Module, norm: SwitchableBatchNorm2d | None, channels: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Per-channel gain and shift, float64, of a layer's bias and the batch norm behind it."""
    gain, shift = np.ones(channels), np.zeros(channels)
    bias = getattr(layer, "bias", None)
    if bias is not None:
        shift = shift + array(bias)
    if norm is None:
        return gain, shift
    current = norm.current()
    if current.running_mean is None or current.running_var is None:
        raise ExportError("a batch norm without running statistics cannot be folded")
    gain = 1.0 / np.sqrt(array(current.running_var) + current.eps)
    if current.affine:
        gain = gain * array(current.weight)
    shift = (shift - array(current.running_mean)) * gain
    if current.affine:
        shift = shift + array(current.bias)
    return gain, shift


def array(tensor: torch.Tensor) -> NDArray[np.float64]:
    array: NDArray[np.float64] = tensor.detach().cpu().double().numpy()
    return array


def pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def conv_padding(layer: nn.Conv2d) -> g.Padding:
    """(top, left, bottom, right); "same" puts the odd pixel at the bottom and right."""
    if layer.padding == "valid":
        return 0, 0, 0, 0
    if layer.padding == "same":
        rows, columns = (d * (k - 1) for d, k in zip(pair(layer.dilation), pair(layer.kernel_size), strict=True))
        return rows // 2, columns // 2, rows - rows // 2, columns - columns // 2
    rows, columns = pair(layer.padding)
    return rows, columns, rows, columns


def max_pool(name: str, source: g.Tensor, layer: nn.MaxPool2d) -> g.MaxPool:
    """`ceil_mode` is padding at the bottom and right, which never wins."""
    if pair(layer.dilation) != (1, 1) or layer.return_indices:
        raise ExportError(f"layer {name!r}: max pooling with dilation or indices has no integer form; leave them out")
    kernel, stride, (top, left) = pair(layer.kernel_size), pair(layer.stride), pair(layer.padding)
    extra = [0, 0]
    for axis, (size, pad) in enumerate(zip(source.shape[1:], (top, left), strict=True)):
        remainder = (size + 2 * pad - kernel[axis]) % stride[axis]
        last = size + 2 * pad - kernel[axis] + (stride[axis] - remainder)
        if layer.ceil_mode and remainder and last < size + pad:  # a window may not begin beyond the image
            extra[axis] = stride[axis] - remainder
    return g.MaxPool(name, source.name, name, kernel, stride, (top, left, top + extra[0], left + extra[1]))


def equal_windows(size: int, count: int) -> tuple[tuple[int, ...], int]:
    """The windows of adaptive pooling along one axis, side by side and of one length.

    Window i is the pixels `floor(i * size / count)` to `ceil((i + 1) * size / count)`. Each pixel is repeated as often
    as makes all windows as long as the least common multiple of their lengths, which leaves their means as they are.

    Returns: indices of pixels, and the common length.
    """
    windows = [range(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
    length = math.lcm(*(len(window) for window in windows))
    return tuple(pixel for window in windows for pixel in window for _ in range(length // len(window))), length


def chunk_limits(node: fx.Node, source: g.Tensor) -> tuple[int, int]:
    """First and last channel of one part of `x.chunk(parts, 1)`."""
    chunk, index = node.args[0], node.args[1]
    arguments = dict(zip(("input", "chunks", "dim"), chunk.args, strict=False)) | dict(chunk.kwargs) \
        if is_node(chunk) else {}  # fmt: skip
    parts, channels = arguments.get("chunks"), source.shape[0]
    if not isinstance(parts, int) or arguments.get("dim") != 1 or not isinstance(index, int):
        raise ExportError(f"layer {node.name!r}: only parts of x.chunk(n, dim=1) have an integer form, one at a time")
    size = -(-channels // parts)
    starts = range(0, channels, size)
    start = starts[index]
    return start, min(start + size, channels)


def padding(node: fx.Node, module: nn.Module | None, name: str) -> tuple[g.Pair, g.Padding]:
    """Channel padding and (top, left, bottom, right) of a pad module or call; only zeros have an integer form."""
    arguments: dict[str, Any] = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | dict(node.kwargs)
    if module is not None:
        arguments = {"pad": module.padding, "value": getattr(module, "value", 0.0)}
    amounts, mode, value = tuple(arguments["pad"]), arguments.get("mode", "constant"), arguments.get("value") or 0.0
    if mode != "constant" or value != 0.0 or len(amounts) > 6:
        raise ExportError(f"layer {name!r}: only padding with zeros has an integer form")
    left, right, top, bottom, before, after = (*(int(a) for a in amounts), *[0] * (6 - len(amounts)))
    return (before, after), (top, left, bottom, right)
