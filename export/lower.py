"""Lowering: a hardened Brevitas model at one width becomes an `IntegerGraph`. The model is only read.

Batch norm goes into the requantization scales and int32 biases, never into the weights: the integers that were trained
are the integers that ship. A negative gain flips its channel's integers, which narrow range allows exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from edgeguard import graph as g
from edgeguard.errors import ExportError, InputError
from edgeguard.graph_check import output_shape
from edgeguard.inttype import ACCUMULATOR, PIXEL, IntType
from edgeguard.quant.batchnorm import SwitchableBatchNorm2d
from edgeguard.quant.model import QuantizedModel, activation_quantizer, weight_quantizer
from edgeguard.quant.place import FUNCTIONS, METHODS, MODULES
from edgeguard.quant.quantizers import ActivationQuantizer, WeightQuantizer
from edgeguard.quant.width import Width

LOGITS = "logits"
DEAD_RESOLUTION = 256
"""Steps per output step of the bias of a channel that batch norm has switched off."""


def lower(model: QuantizedModel, width: Width, input_shape: tuple[int, int, int]) -> g.IntegerGraph:
    """The integers that the model computes with at a width.

    input_shape: (3, H, W) of the images.

    Raises:
        ExportError: a layer that has no integer form: which one, which operation, why.
        InputError: a width the model was not trained at.
    """
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
        scale = _array(quantizer.scale).reshape(-1).astype(np.float32)
        zero_point = _array(quantizer.zero_point).reshape(-1).astype(np.int32)
        self.nodes.append(g.Quantize("image", "pixels", "image", scale, zero_point))

    def visit(self, node: fx.Node) -> None:
        """Emit the operations of one fx node, if its value is complete here."""
        if node.op == "placeholder":
            self.values[node] = "image"
            return
        if node.op == "output":
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

    def _emit(self, operation: g.Node, source: fx.Node, dtype: IntType, scale: float | None) -> None:
        inputs = [self.tensors[name] for name in g.node_inputs(operation)]
        self.tensors[operation.output] = g.Tensor(
            operation.output, output_shape(operation, inputs), dtype, scale
        )
        self.nodes.append(operation)
        self.values[source] = operation.output

    def _activation(self, node: fx.Node, quantizer: ActivationQuantizer) -> None:
        """A quantization point: emit its head (convolution, linear, addition, average pool) with what is fused into it."""
        head = node.all_input_nodes[0]
        norm: SwitchableBatchNorm2d | None = None
        layer = self.model.body.get_submodule(str(head.target)) if head.op == "call_module" else None
        if isinstance(layer, SwitchableBatchNorm2d):
            norm, head = layer, head.all_input_nodes[0]
            layer = self.model.body.get_submodule(str(head.target))
        dtype, scale = quantizer.dtype(self.width), quantizer.scale()
        name = str(head.target) if head.op == "call_module" else head.name
        weights = weight_quantizer(layer) if layer is not None else None
        if layer is not None and weights is not None:
            operation: g.Node = self._compute(head, name, layer, weights, norm, scale)
        elif isinstance(layer, nn.AdaptiveAvgPool2d | nn.AvgPool2d):
            operation = self._average(head, name, layer)
        elif layer is None and len(head.all_input_nodes) == 2:
            first, second = (self.values[source] for source in head.all_input_nodes)
            operation = g.Add(name, first, second, name)
        else:
            raise ExportError(f"layer {head.name!r}: {head.target} has no integer form")
        self._emit(operation, node, dtype, scale)
        low, high = quantizer.limits()
        if (low, high) != (dtype.qmin, dtype.qmax):
            clamp = g.Clamp(f"{name}.clamp", operation.output, f"{name}.clamp", low, high)
            self._emit(clamp, node, dtype, scale)

    def _compute(self, head: fx.Node, name: str, layer: nn.Module, weights: WeightQuantizer,
                 norm: SwitchableBatchNorm2d | None, output_scale: float | None) -> g.Conv | g.Linear:  # fmt: skip
        source = self._input(head)
        if source.scale is None:
            raise ExportError(f"layer {name!r}: its input is not quantized")
        integers, weight_scale = weights.integers(layer.get_parameter("weight"))
        gain, shift = _affine(layer, norm, int(integers.shape[0]))
        weight, scale, bias = fold(
            _array(integers), _array(weight_scale).reshape(-1), gain, shift, source.scale, source.dtype, output_scale
        )
        dtype = weights.dtype(self.width)
        if isinstance(layer, nn.Linear):
            return g.Linear(name, source.name, name, weight, dtype, scale, bias)
        if not isinstance(layer, nn.Conv2d) or isinstance(layer.padding, str):
            raise ExportError(f"layer {name!r}: {type(layer).__name__} with padding {getattr(layer, 'padding', None)!r}")
        rows, columns = int(layer.padding[0]), int(layer.padding[1])
        return g.Conv(name, source.name, name, weight, dtype, scale, bias, _pair(layer.stride),
                      (rows, columns, rows, columns), _pair(layer.dilation), layer.groups)  # fmt: skip

    def _average(self, head: fx.Node, name: str, layer: nn.AdaptiveAvgPool2d | nn.AvgPool2d) -> g.AveragePool:
        source = self._input(head)
        size = _pair(source.shape[1:])
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            wanted: Any = layer.output_size
            rows, columns = (wanted, wanted) if isinstance(wanted, int) else (wanted[0] or size[0], wanted[1] or size[1])
            if size[0] % rows or size[1] % columns:
                raise ExportError(f"layer {name!r}: pooling {size} to {(rows, columns)} needs windows of unequal size")
            kernel = stride = (size[0] // rows, size[1] // columns)
        else:
            if _pair(layer.padding) != (0, 0) or layer.ceil_mode or layer.divisor_override:
                raise ExportError(f"layer {name!r}: average pooling with padding, ceil_mode or a divisor")
            kernel, stride = _pair(layer.kernel_size), _pair(layer.stride)
        return g.AveragePool(name, source.name, name, kernel, stride)

    def _logits(self, node: fx.Node, layer: nn.Module) -> None:
        weights, source = weight_quantizer(layer), self._input(node)
        if weights is None or not isinstance(layer, nn.Linear) or source.scale is None:
            raise ExportError(f"layer {node.name!r}: the logits must come from a linear layer")
        operation = self._compute(node, str(node.target), layer, weights, None, None)
        self._emit(operation, node, ACCUMULATOR, None)
        scale = (np.float32(source.scale) * operation.weight_scale).astype(np.float32)
        self.nodes.append(g.Dequantize(LOGITS, operation.output, LOGITS, scale))

    def _move(self, node: fx.Node, module: nn.Module | None) -> None:
        """Operations that only move integers, and heads whose quantizer comes later."""
        kind = MODULES.get(type(module)) if module is not None else FUNCTIONS.get(_function(node))
        if node.op == "call_method":
            kind = METHODS.get(str(node.target))
        if kind in ("add", "avgpool"):
            return
        source, name = self._input(node), str(node.target) if module is not None else node.name
        if kind == "maxpool" and isinstance(module, nn.MaxPool2d):
            if module.ceil_mode or _pair(module.dilation) != (1, 1) or module.return_indices:
                raise ExportError(f"layer {name!r}: max pooling with ceil_mode, dilation or indices")
            rows, columns = _pair(module.padding)
            operation: g.Node = g.MaxPool(name, source.name, name, _pair(module.kernel_size),
                                          _pair(module.stride), (rows, columns, rows, columns))  # fmt: skip
        elif kind == "pad":
            operation = g.Pad(name, source.name, name, *_padding(node, module, name))
        elif kind == "flatten":
            operation = g.Flatten(name, source.name, name)
        elif kind == "identity":
            self.values[node] = source.name
            return
        else:
            raise ExportError(f"layer {name!r}: {node.target} has no integer form")
        self._emit(operation, node, source.dtype, source.scale)


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


def _affine(
    layer: nn.Module, norm: SwitchableBatchNorm2d | None, channels: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Per-channel gain and shift, float64, of a layer's bias and the batch norm behind it."""
    gain, shift = np.ones(channels), np.zeros(channels)
    bias = getattr(layer, "bias", None)
    if bias is not None:
        shift = shift + _array(bias)
    if norm is None:
        return gain, shift
    current = norm.current()
    if current.running_mean is None or current.running_var is None:
        raise ExportError("a batch norm without running statistics cannot be folded")
    gain = 1.0 / np.sqrt(_array(current.running_var) + current.eps)
    if current.affine:
        gain = gain * _array(current.weight)
    shift = (shift - _array(current.running_mean)) * gain
    if current.affine:
        shift = shift + _array(current.bias)
    return gain, shift


def _array(tensor: torch.Tensor) -> NDArray[np.float64]:
    array: NDArray[np.float64] = tensor.detach().cpu().double().numpy()
    return array


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _function(node: fx.Node) -> Any:
    return node.target if node.op == "call_function" else None


def _padding(node: fx.Node, module: nn.Module | None, name: str) -> tuple[g.Pair, g.Padding]:
    """Channel padding and (top, left, bottom, right) of a pad module or call; only zeros have an integer form."""
    arguments: dict[str, Any] = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | dict(node.kwargs)
    if module is not None:
        arguments = {"pad": module.padding, "value": getattr(module, "value", 0.0)}
    amounts, mode, value = tuple(arguments["pad"]), arguments.get("mode", "constant"), arguments.get("value") or 0.0
    if mode != "constant" or value != 0.0 or len(amounts) > 6:
        raise ExportError(f"layer {name!r}: only padding with zeros has an integer form")
    left, right, top, bottom, before, after = (*(int(a) for a in amounts), *[0] * (6 - len(amounts)))
    return (before, after), (top, left, bottom, right)
