"""Lowering: a hardened Brevitas model at one width becomes an `IntegerGraph`. The model is only read.

Batch norm goes into the requantization scales and int32 biases, never into the weights: the integers that were trained
are the integers that ship. A negative gain flips its channel's integers, which narrow range allows exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from edgeguard import graph as g
from edgeguard.errors import ExportError, InputError
from edgeguard.export.lower_ops import (
    affine,
    array,
    chunk_limits,
    conv_padding,
    equal_windows,
    fold,
    lookup,
    max_pool,
    padding,
    pair,
)
from edgeguard.graph_check import output_shape
from edgeguard.inttype import ACCUMULATOR, MAX_BITS, PIXEL, IntType
from edgeguard.quant.batchnorm import SwitchableBatchNorm2d
from edgeguard.quant.model import QuantizedModel, activation_quantizer, weight_quantizer
from edgeguard.quant.place import FUNCTIONS, METHODS, MODULES, SUPPORTED
from edgeguard.quant.quantizers import ActivationQuantizer, WeightQuantizer
from edgeguard.quant.width import Width

LOGITS = "logits"


def lower(model: QuantizedModel, width: Width, input_shape: tuple[int, int, int]) -> g.IntegerGraph:
    """The integers that the model computes with at a width.

    input_shape: (3, H, W) of the images.

    Raises:
        ExportError: a layer that has no integer form: which one, which operation, why; or a width of training alone.
        InputError: a width the model was not trained at.
    """
    if not width.deployable:
        raise ExportError(f"no integer engine runs width {width}, it is for training; export at {MAX_BITS} bits or fewer")
    with torch.no_grad(), model.at(width):
        lowering = _Lowering(model, width)
        lowering.start(input_shape)
        for node in model.body.graph.nodes:
            try:
                lowering.visit(node)
            except InputError as exc:
                raise ExportError(f"layer {node.name!r}: {exc}") from exc
    try:
        return g.IntegerGraph(tuple(lowering.nodes), lowering.tensors)
    except InputError as exc:
        raise ExportError(str(exc)) from exc


@dataclass
class _Lowering:
    model: QuantizedModel
    width: Width
    nodes: list[g.Node] = field(default_factory=list)
    tensors: dict[str, g.Tensor] = field(default_factory=dict)
    values: dict[fx.Node, str] = field(default_factory=dict)
    """Tensor that holds each visited fx node's value; nodes fused into a later one have none."""

    def start(self, shape: tuple[int, int, int]) -> None:
        quantizer = self.model.input_quantizer
        self.tensors["pixels"] = g.Tensor("pixels", shape, PIXEL, None)
        self.tensors["image"] = g.Tensor("image", shape, quantizer.dtype, quantizer.step)
        scale = array(quantizer.scale).reshape(-1).astype(np.float32)
        zero_point = array(quantizer.zero_point).reshape(-1).astype(np.int32)
        self.nodes.append(g.Quantize("image", "pixels", "image", scale, zero_point))

    def visit(self, node: fx.Node) -> None:
        """Emit the operations of one fx node, if its value is complete here."""
        if node.op == "placeholder":
            self.values[node] = "image"
            return
        if node.op == "output":
            self._output(node)
            return
        module = self.model.body.get_submodule(str(node.target)) if node.op == "call_module" else None
        quantizer = activation_quantizer(module) if module is not None else None
        if quantizer is not None:
            self._activation(node, quantizer)
        elif module is not None and (weight_quantizer(module) or isinstance(module, SwitchableBatchNorm2d)):
            if [user.op for user in node.users] == ["output"]:
                self._logits(node, module)
        else:
            self._move(node, module)

    def _input(self, node: fx.Node) -> g.Tensor:
        return self.tensors[self.values[node.all_input_nodes[0]]]

    def _append(self, operation: g.Node, dtype: IntType, scale: float | None) -> g.Tensor:
        inputs = [self.tensors[name] for name in g.node_inputs(operation)]
        tensor = g.Tensor(operation.output, output_shape(operation, inputs), dtype, scale)
        self.tensors[operation.output] = tensor
        self.nodes.append(operation)
        return tensor

    def _emit(self, operation: g.Node, source: fx.Node, dtype: IntType, scale: float | None) -> None:
        self.values[source] = self._append(operation, dtype, scale).name

    def _activation(self, node: fx.Node, quantizer: ActivationQuantizer) -> None:
        """A quantization point: emit its head with what is fused into it."""
        dtype, scale = quantizer.dtype(self.width), quantizer.scale()
        head = node.all_input_nodes[0]
        if head in self.values:  # a ReLU of its own, which is the quantizer's lower limit
            name = str(node.target)
            operation: g.Node = lookup(name, self._input(node), nn.ReLU(), dtype, scale)
        else:
            name, operation = self._head(head, dtype, scale)
        self._emit(operation, node, dtype, scale)
        low, high = quantizer.limits()
        if (low, high) != (dtype.qmin, dtype.qmax):
            clamp = g.Clamp(f"{name}.clamp", operation.output, f"{name}.clamp", low, high)
            self._emit(clamp, node, dtype, scale)

    def _head(self, head: fx.Node, dtype: IntType, scale: float) -> tuple[str, g.Node]:
        """Name and operation of what makes the values of a quantization point."""
        norm: SwitchableBatchNorm2d | None = None
        layer = self.model.body.get_submodule(str(head.target)) if head.op == "call_module" else None
        if isinstance(layer, SwitchableBatchNorm2d) and head.all_input_nodes[0] not in self.values:
            norm, head = layer, head.all_input_nodes[0]
            layer = self.model.body.get_submodule(str(head.target))
        name = str(head.target) if head.op == "call_module" else head.name
        weights = weight_quantizer(layer) if layer is not None else None
        kind = FUNCTIONS.get(_function(head)) or METHODS.get(str(head.target))
        if layer is not None and weights is not None:
            return name, self._compute(head, name, layer, weights, norm, scale)
        if isinstance(layer, SwitchableBatchNorm2d):
            return name, self._norm(head, name, layer, scale)
        if isinstance(layer, nn.AdaptiveAvgPool2d | nn.AvgPool2d):
            return name, self._average(head, name, layer)
        if layer is not None and MODULES.get(type(layer)) == "function":
            return name, lookup(name, self._input(head), layer, dtype, scale)
        if kind in ("add", "multiply") and len(head.all_input_nodes) == 2:
            parts = [self.tensors[self.values[source]] for source in head.all_input_nodes]
            first, second = (part.name for part in sorted(parts, key=lambda part: -math.prod(part.shape)))
            return name, (g.Add if kind == "add" else g.Multiply)(name, first, second, name)
        raise ExportError(f"layer {head.name!r}: {head.target} has no integer form; supported are {SUPPORTED}")

    def _compute(self, head: fx.Node, name: str, layer: nn.Module, weights: WeightQuantizer,
                 norm: SwitchableBatchNorm2d | None, output_scale: float | None) -> g.Conv | g.Linear:  # fmt: skip
        source = self._input(head)
        if source.scale is None:
            raise ExportError(f"layer {name!r}: its input is not quantized")
        integers, weight_scale = weights.integers(layer.get_parameter("weight"))
        gain, shift = affine(layer, norm, int(integers.shape[0]))
        weight, scale, bias = fold(
            array(integers), array(weight_scale).reshape(-1), gain, shift, source.scale, source.dtype, output_scale
        )
        dtype = weights.dtype(self.width)
        if isinstance(layer, nn.Linear):
            return g.Linear(name, source.name, name, weight, dtype, scale, bias)
        if not isinstance(layer, nn.Conv2d):
            raise ExportError(f"layer {name!r}: {type(layer).__name__} has no integer form")
        return g.Conv(name, source.name, name, weight, dtype, scale, bias, pair(layer.stride),
                      conv_padding(layer), pair(layer.dilation), layer.groups)  # fmt: skip

    def _norm(self, head: fx.Node, name: str, norm: SwitchableBatchNorm2d, output_scale: float) -> g.Conv:
        """A batch norm on its own: a depthwise convolution of the largest integers, the gain in their scales."""
        source = self._input(head)
        if source.scale is None:
            raise ExportError(f"layer {name!r}: its input is not quantized")
        channels = source.shape[0]
        dtype = self.model.scheme.weight_type("boundary", self.width)
        gain, shift = affine(nn.Identity(), norm, channels)
        integers = np.full((channels, 1, 1, 1), dtype.qmax, np.float64)
        unit = np.full(channels, 1.0 / dtype.qmax)
        weight, scale, bias = fold(integers, unit, gain, shift, source.scale, source.dtype, output_scale)
        return g.Conv(name, source.name, name, weight, dtype, scale, bias, (1, 1), (0, 0, 0, 0), (1, 1), channels)

    def _average(self, head: fx.Node, name: str, layer: nn.AdaptiveAvgPool2d | nn.AvgPool2d) -> g.AveragePool:
        """Windows of unequal size become equal by repeating their pixels; zeros that count are padded before."""
        source = self._input(head)
        before: g.Node | None = None
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            wanted = layer.output_size if isinstance(layer.output_size, tuple) else (layer.output_size,) * 2
            windows = [equal_windows(size, count or size) for size, count in zip(source.shape[1:], wanted, strict=True)]
            kernel = stride = (windows[0][1], windows[1][1])
            taken = (windows[0][0], windows[1][0])
            if taken != tuple(tuple(range(size)) for size in source.shape[1:]):
                before = g.Take(f"{name}.windows", source.name, f"{name}.windows", *taken)
        else:
            rows, columns = pair(layer.padding)
            if layer.ceil_mode or layer.divisor_override or ((rows or columns) and not layer.count_include_pad):
                raise ExportError(
                    f"layer {name!r}: average pooling with ceil_mode, a divisor or padding that does not count has no "
                    "integer form; leave them out, or set count_include_pad"
                )
            kernel, stride = pair(layer.kernel_size), pair(layer.stride)
            if rows or columns:
                before = g.Pad(f"{name}.pad", source.name, f"{name}.pad", (0, 0), (rows, columns, rows, columns))
        if before is not None:
            source = self._append(before, source.dtype, source.scale)
        return g.AveragePool(name, source.name, name, kernel, stride)

    def _logits(self, node: fx.Node, layer: nn.Module) -> None:
        weights, source = weight_quantizer(layer), self._input(node)
        if weights is None or not isinstance(layer, nn.Linear) or source.scale is None:
            raise ExportError(f"layer {node.name!r}: the logits must come from a linear layer")
        operation = self._compute(node, str(node.target), layer, weights, None, None)
        self._emit(operation, node, ACCUMULATOR, None)
        scale = (np.float32(source.scale) * operation.weight_scale).astype(np.float32)
        self.nodes.append(g.Dequantize(LOGITS, operation.output, LOGITS, scale))

    def _output(self, node: fx.Node) -> None:
        """A model that does not end in a linear layer: its last quantized tensor is dequantized."""
        if isinstance(self.nodes[-1], g.Dequantize):
            return
        source = node.all_input_nodes[0]
        tensor = self.tensors[self.values[source]]
        if tensor.scale is None or len(tensor.shape) != 1:
            raise ExportError(f"layer {source.name!r}: the model must give logits (N, classes), not (N, {tensor.shape})")
        scale = np.full(tensor.shape, tensor.scale, np.float32)
        self.nodes.append(g.Dequantize(LOGITS, tensor.name, LOGITS, scale))

    def _move(self, node: fx.Node, module: nn.Module | None) -> None:
        """Operations that only move integers, and heads whose quantizer comes later."""
        kind = MODULES.get(type(module)) if module is not None else FUNCTIONS.get(_function(node))
        if node.op == "call_method":
            kind = METHODS.get(str(node.target))
        if kind in ("add", "multiply", "avgpool", "function"):
            return
        name = str(node.target) if module is not None else node.name
        if kind == "concat":
            if (node.args[1:] or (node.kwargs.get("dim", 0),))[0] != 1:
                raise ExportError(f"layer {name!r}: only concatenation along channels (dim=1) has an integer form")
            inputs = tuple(self.values[part] for part in node.all_input_nodes)
            first = self.tensors[inputs[0]]
            self._emit(g.Concat(name, inputs, name), node, first.dtype, first.scale)
            return
        source = self._input(node)
        if kind == "maxpool" and isinstance(module, nn.MaxPool2d):
            operation: g.Node = max_pool(name, source, module)
        elif kind == "shuffle" and isinstance(module, nn.ChannelShuffle):
            operation = g.Shuffle(name, source.name, name, module.groups)
        elif kind == "slice":
            operation = g.Slice(name, source.name, name, *chunk_limits(node, source))
        elif kind == "pad":
            operation = g.Pad(name, source.name, name, *padding(node, module, name))
        elif kind == "flatten":
            operation = g.Flatten(name, source.name, name)
        elif kind in ("identity", "chunk"):
            self.values[node] = source.name
            return
        else:
            raise ExportError(f"layer {name!r}: {node.target} has no integer form; supported are {SUPPORTED}")
        self._emit(operation, node, source.dtype, source.scale)


def _function(node: fx.Node) -> Any:
    return node.target if node.op == "call_function" else None
