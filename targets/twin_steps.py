"""The steps of the twin: one torch module for each operation of an integer graph."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.backends import cudnn
from torch.nn import functional

from edgeguard import graph as g
from edgeguard.errors import InputError
from edgeguard.graph import IntegerGraph
from edgeguard.inttype import IntType
from edgeguard.targets.twin_elementwise import Lookup, Multiply

EXACT_FLOAT32 = 1 << 24


class Straight(torch.autograd.Function):
    """Runs a node's `integers` forward (values, integers before the clamp), its `gradients` backward."""

    @staticmethod
    def forward(ctx: Any, step: Rounding, *inputs: Tensor) -> Tensor:
        before = step.integers(*inputs)
        ctx.step, ctx.shapes = step, [x.shape for x in inputs]
        ctx.save_for_backward(before)
        return before.clamp(*step.limits)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        low, high = ctx.step.limits
        if gradient.ndim == 4:  # one layout throughout: mixed ones are slow
            gradient = gradient.contiguous(memory_format=torch.channels_last)
        # One pass: zero where the integers lie outside the limits, which are themselves inside.
        inside = torch.ops.aten.hardtanh_backward(gradient, ctx.saved_tensors[0], low - 0.5, high + 0.5)
        return (None, *ctx.step.gradients(inside, ctx.shapes))


class Rounding(nn.Module, ABC):
    """An operation that rounds and clamps."""

    def __init__(self, dtype: IntType) -> None:
        super().__init__()
        self.limits = (dtype.qmin, dtype.qmax)

    def forward(self, *inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            return Straight.apply(self, *inputs)  # type: ignore[no-any-return]
        return self.integers(*inputs).clamp_(*self.limits)

    @abstractmethod
    def integers(self, *inputs: Tensor) -> Tensor:
        """The unclamped results, a new tensor."""

    @abstractmethod
    def gradients(self, gradient: Tensor, shapes: list[torch.Size]) -> tuple[Tensor, ...]:
        """The gradient with regard to each input, whose shapes are given, rounding taken for the identity."""

    def constant(self, name: str, values: Any, dims: int = 0) -> None:
        """A float32 buffer, followed by `dims` axes of one to broadcast over pixels."""
        tensor = torch.from_numpy(np.array(values, np.float32))
        self.register_buffer(name, tensor.reshape(tensor.shape + (1,) * dims), persistent=False)


class Quantize(Rounding):
    scale: Tensor
    zero_point: Tensor

    def __init__(self, graph: IntegerGraph, node: g.Quantize) -> None:
        super().__init__(graph.tensors[node.output].dtype)
        self.constant("scale", node.scale, 2)
        self.constant("zero_point", node.zero_point, 2)

    def integers(self, *inputs: Tensor) -> Tensor:
        quotient = inputs[0].contiguous(memory_format=torch.channels_last) / self.scale
        return quotient.round_().add_(self.zero_point)

    def gradients(self, gradient: Tensor, shapes: list[torch.Size]) -> tuple[Tensor, ...]:
        return (gradient / self.scale,)


class Product(Rounding):
    """Conv and Linear, requantized when the output has a scale."""

    weight: Tensor
    bias: Tensor
    multiplier: Tensor
    backward_weight: Tensor

    def __init__(self, graph: IntegerGraph, node: g.Conv | g.Linear) -> None:
        dtype = graph.tensors[node.output].dtype
        super().__init__(dtype)
        self.is_conv = isinstance(node, g.Conv)
        self.scaled = dtype.bits < 32
        self.constant("weight", node.weight)
        self.constant("bias", node.bias)
        self.wide_bias = node.bias  # exact even where float32 is not
        spread = (slice(None), *(None,) * (node.weight.ndim - 1))
        multiplier = graph.multiplier(node) if self.scaled else np.ones(len(node.weight), np.float32)
        self.constant("multiplier", multiplier, 2 if self.is_conv else 0)
        self.constant("backward_weight", node.weight * multiplier[spread])
        if isinstance(node, g.Conv):
            top, left, bottom, right = node.padding
            self.symmetric = (top, left) == (bottom, right)
            self.border = (left, right, top, bottom)
            padding = (top, left) if self.symmetric else (0, 0)
            self.geometry = (node.stride, padding, node.dilation, node.groups)
            if node.groups == 1:
                self.weight = self.weight.contiguous(memory_format=torch.channels_last)
                self.backward_weight = self.backward_weight.contiguous(memory_format=torch.channels_last)
        self.slices = exact_slices(node, graph.tensors[node.input].dtype)

    def integers(self, *inputs: Tensor) -> Tensor:
        sums = self.accumulators(inputs[0])
        return sums.mul_(self.multiplier).round_() if self.scaled else sums

    def accumulators(self, x: Tensor) -> Tensor:
        """float32(acc), rounded once, of the exact accumulators."""
        if self.is_conv and not self.symmetric:
            x = functional.pad(x, self.border)
        if x.device.type != "cpu" or not self.slices:
            return self.product(x.double(), self.weight.double(), self.bias_like(torch.float64)).float()
        if len(self.slices) == 1:
            return self.product(x, self.weight, self.bias)
        # Input channels in portions whose sums are exact in float32: far faster than float64.
        shape = (-1, 1, 1) if self.is_conv else (-1,)
        total = self.bias_like(torch.int32).reshape(shape)
        for part in self.slices:
            total = total + self.product(x[:, part], self.weight[:, part], None).to(torch.int32)
        return total.float()

    def bias_like(self, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(self.wide_bias).to(self.bias.device, dtype)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.is_conv:
            return functional.linear(x, weight, bias)
        stride, padding, dilation, groups = self.geometry
        return functional.conv2d(x, weight, bias, stride, padding, dilation, groups)

    def gradients(self, gradient: Tensor, shapes: list[torch.Size]) -> tuple[Tensor, ...]:
        if not self.is_conv:
            return (gradient @ self.backward_weight,)
        stride, padding, dilation, groups = self.geometry
        left, right, top, bottom = (0, 0, 0, 0) if self.symmetric else self.border
        batch, channels, height, width = shapes[0]
        size = (batch, channels, height + top + bottom, width + left + right)
        back = input_gradient(gradient, size, self.backward_weight, stride, padding, dilation, groups)
        return (back[:, :, top : top + height, left : left + width],)


class Add(Rounding):
    def __init__(self, graph: IntegerGraph, node: g.Add) -> None:
        super().__init__(graph.tensors[node.output].dtype)
        self.ratios = graph.add_ratios(node)

    def integers(self, *inputs: Tensor) -> Tensor:
        first, second = self.ratios
        x = inputs[0] if first == 1 else inputs[0] * first
        total = torch.add(x, inputs[1], alpha=second)
        return total if min(self.ratios) >= 1 else total.round_()

    def gradients(self, gradient: Tensor, shapes: list[torch.Size]) -> tuple[Tensor, ...]:
        return tuple(gradient if ratio == 1 else gradient * ratio for ratio in self.ratios)


class AveragePool(Rounding):
    multiplier: Tensor

    def __init__(self, graph: IntegerGraph, node: g.AveragePool) -> None:
        super().__init__(graph.tensors[node.output].dtype)
        self.kernel, self.stride = node.kernel, node.stride
        self.whole = graph.tensors[node.input].shape[1:] == node.kernel
        self.constant("multiplier", graph.average_multiplier(node))

    def integers(self, *inputs: Tensor) -> Tensor:
        if self.whole:
            total = inputs[0].sum((2, 3), keepdim=True)
        else:
            total = functional.avg_pool2d(inputs[0], self.kernel, self.stride, divisor_override=1)
        return total.mul_(self.multiplier).round_()

    def gradients(self, gradient: Tensor, shapes: list[torch.Size]) -> tuple[Tensor, ...]:
        gradient = gradient * self.multiplier
        if self.whole:
            return (gradient.expand(shapes[0]),)
        channels = shapes[0][1]
        window = gradient.new_ones(1, 1, *self.kernel).expand(channels, 1, *self.kernel)
        return (input_gradient(gradient, shapes[0], window, self.stride, (0, 0), (1, 1), channels),)


class Clamp(Rounding):
    def __init__(self, graph: IntegerGraph, node: g.Clamp) -> None:
        dtype = graph.tensors[node.output].dtype
        super().__init__(dtype)
        self.limits = (max(node.low, dtype.qmin), min(node.high, dtype.qmax))

    def integers(self, *inputs: Tensor) -> Tensor:
        return inputs[0].clone()

    def gradients(self, gradient: Tensor, shapes: list[torch.Size]) -> tuple[Tensor, ...]:
        return (gradient,)


class Take(nn.Module):
    """Selection as matrix products with ones: exact, and its gradient is deterministic on every device."""

    rows: Tensor
    columns: Tensor

    def __init__(self, graph: IntegerGraph, node: g.Take) -> None:
        super().__init__()
        _, height, width = graph.tensors[node.input].shape
        self.register_buffer("rows", torch.eye(height)[list(node.rows)], persistent=False)
        self.register_buffer("columns", torch.eye(width)[list(node.columns)], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows @ x @ self.columns.T


class Dequantize(nn.Module):
    scale: Tensor

    def __init__(self, node: g.Dequantize) -> None:
        super().__init__()
        self.register_buffer("scale", torch.from_numpy(np.array(node.scale, np.float32)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Move(nn.Module):
    """Operations that only move integers; autograd knows their gradients."""

    def __init__(self, node: g.Node) -> None:
        super().__init__()
        self.node = node

    def forward(self, *inputs: Tensor) -> Tensor:
        node, x = self.node, inputs[0]
        if isinstance(node, g.Concat):
            return torch.cat(inputs, 1)
        if isinstance(node, g.Slice):
            return x[:, node.start : node.stop]
        if isinstance(node, g.Shuffle):
            return functional.channel_shuffle(x, node.groups)
        if isinstance(node, g.Flatten):
            return x.flatten(1)
        top, left, bottom, right = node.padding if isinstance(node, g.Pad | g.MaxPool) else (0, 0, 0, 0)
        if isinstance(node, g.Pad):
            return functional.pad(x, (left, right, top, bottom, *node.channels))
        if isinstance(node, g.MaxPool):
            if any(node.padding):
                x = functional.pad(x, (left, right, top, bottom), value=-torch.inf)
            if node.kernel == (1, 1):
                return x[:, :, :: node.stride[0], :: node.stride[1]]
            return functional.max_pool2d(x, node.kernel, node.stride)
        raise InputError(f"the twin does not know {type(node).__name__}, node {node.name!r}")


def step_of(graph: IntegerGraph, node: g.Node) -> nn.Module:
    if isinstance(node, g.Quantize):
        return Quantize(graph, node)
    if isinstance(node, g.Conv | g.Linear):
        return Product(graph, node)
    if isinstance(node, g.Add):
        return Add(graph, node)
    if isinstance(node, g.Multiply):
        return Multiply(graph, node)
    if isinstance(node, g.Lookup):
        return Lookup(graph, node)
    if isinstance(node, g.AveragePool):
        return AveragePool(graph, node)
    if isinstance(node, g.Clamp):
        return Clamp(graph, node)
    if isinstance(node, g.Take):
        return Take(graph, node)
    return Dequantize(node) if isinstance(node, g.Dequantize) else Move(node)


def input_gradient(
    gradient: Tensor, size: Sequence[int], weight: Tensor,
    stride: g.Pair, padding: g.Pair, dilation: g.Pair, groups: int,
) -> Tensor:  # fmt: skip
    """Gradient of a convolution with regard to its input of shape `size`, by deterministic kernels."""
    with ExitStack() as stack:
        if gradient.is_cuda:  # pragma: no cover
            stack.enter_context(cudnn.flags(enabled=True, benchmark=False, deterministic=True))
        placeholder = gradient.new_empty(1).expand(size)  # only its shape is read
        result: Tensor = torch.ops.aten.convolution_backward(
            gradient, placeholder, weight, None, stride, padding, dilation, False, (0, 0), groups, (True, False, False)
        )[0]
        return result


def exact_slices(node: g.Conv | g.Linear, input_type: IntType) -> list[slice]:
    """Portions of the input channels whose sums are exact in float32; none when only float64 will do."""
    if g.accumulator_bound(node, input_type) < EXACT_FLOAT32:
        return [slice(None)]
    if isinstance(node, g.Conv) and node.groups > 1:
        return []
    reach = g.accumulator_reach(node, input_type)
    channels = reach.shape[1]
    for portions in range(2, channels + 1):
        edges = np.linspace(0, channels, portions + 1).astype(int)
        if np.add.reduceat(reach, edges[:-1], axis=1).max() < EXACT_FLOAT32:
            return [slice(int(a), int(b)) for a, b in itertools.pairwise(edges)]
    return []
