"""The float32 model of the same architecture as an `IntegerGraph`: what a quantized engine is measured against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgeguard import graph as g
from edgeguard.errors import ExportError
from edgeguard.export.onnx_builder import Collector
from edgeguard.graph import IntegerGraph

Values = NDArray[np.float64]
FUNCTIONS: Mapping[str, Callable[[Values], Values]] = {
    "Identity": lambda x: x,
    "Relu": lambda x: np.maximum(x, 0.0),
    "Sigmoid": lambda x: 1.0 / (1.0 + np.exp(-x)),
    "HardSigmoid": lambda x: np.clip(x / 6.0 + 0.5, 0.0, 1.0),
    "HardSwish": lambda x: x * np.clip(x / 6.0 + 0.5, 0.0, 1.0),
    "Silu": lambda x: x / (1.0 + np.exp(-x)),
}
"""What a look-up table may stand for, by its name in ONNX; `Silu` is written as a sigmoid and a product."""
TOLERANCE = 1
"""Steps by which a table may differ from its function."""


def float_onnx(graph: IntegerGraph) -> onnx.ModelProto:
    """Dequantized weights, batch norm already folded, ReLU where an output is unsigned, no quantizers anywhere.

    Its input is float32 (N, 3, H, W), already normalized, so the float model is spared the work that the integer model
    does on pixels.

    Raises:
        ExportError: a look-up table of no function that is known here.
    """
    writer = _Writer(graph)
    for node in graph.nodes:
        writer.write(node)
    source = helper.make_tensor_value_info(graph.input, TensorProto.FLOAT, ["N", *graph.input_shape])
    logits = helper.make_tensor_value_info(graph.output, TensorProto.FLOAT, ["N", graph.num_classes])
    body = helper.make_graph(writer.nodes, "float32", [source], [logits], list(writer.initializers.values()))
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


class _Writer(Collector):
    """Writes one operation after the other, as real numbers."""

    def write(self, node: g.Node) -> None:
        inputs = list(g.node_inputs(node))
        if isinstance(node, g.Conv | g.Linear):
            self.product(node, inputs)
        elif isinstance(node, g.Lookup):
            self.lookup(node, inputs)
        elif isinstance(node, g.Shuffle):
            self.shuffle(node, inputs)
        elif isinstance(node, g.Add):
            self.rectified("Add", node, inputs)
        elif isinstance(node, g.Multiply):
            self.emit("Mul", node, inputs)
        elif isinstance(node, g.AveragePool):
            self.emit("AveragePool", node, inputs, kernel_shape=node.kernel, strides=node.stride)
        elif isinstance(node, g.MaxPool):
            self.emit("MaxPool", node, inputs, kernel_shape=node.kernel, strides=node.stride, pads=node.padding)
        elif isinstance(node, g.Concat | g.Flatten):
            self.emit(type(node).__name__, node, inputs, axis=1)
        elif isinstance(node, g.Pad):
            top, left, bottom, right = node.padding
            pads = np.array([0, node.channels[0], top, left, 0, node.channels[1], bottom, right])
            self.emit("Pad", node, [*inputs, self.constant(f"{node.name}/pads", pads)])
        elif isinstance(node, g.Slice):
            limits = {"start": node.start, "stop": node.stop, "axis": 1}
            operands = [self.constant(f"{node.name}/{key}", np.array([value])) for key, value in limits.items()]
            self.emit("Slice", node, [*inputs, *operands])
        elif isinstance(node, g.Take):
            self.take(node, node.input, node.output)
        elif isinstance(node, g.Clamp):
            scale = self.graph.tensors[node.input].scale or 0
            limits = {"low": node.low, "high": node.high}
            operands = [self.constant(f"{node.name}/{key}", np.float32(q * scale)) for key, q in limits.items()]
            self.emit("Clip", node, [*inputs, *operands])
        elif isinstance(node, g.Quantize | g.Dequantize):
            self.emit("Identity", node, inputs)
        else:
            raise ExportError(f"no float equivalent of {type(node).__name__}")

    def emit(self, op: str, node: g.Node, inputs: list[str], **attributes: Any) -> None:
        self.node(op, node.name, inputs, node.output, **attributes)

    def rectified(self, op: str, node: g.Node, inputs: list[str], **attributes: Any) -> None:
        """An operation, then ReLU where its output is unsigned."""
        tensor = self.graph.tensors.get(node.output)
        if tensor is None or tensor.dtype.signed:
            self.emit(op, node, inputs, **attributes)
            return
        total = self.node(op, node.name, inputs, f"{node.output}/sum", **attributes)
        self.node("Relu", f"{node.name}/relu", [total], node.output)

    def product(self, node: g.Conv | g.Linear, inputs: list[str]) -> None:
        scale = node.weight_scale * np.float32(self.graph.tensors[node.input].scale or 0)
        real = node.weight_scale.reshape(-1, *(1,) * (node.weight.ndim - 1)) * node.weight
        inputs += [self.constant(f"{node.name}/weight", real),
                   self.constant(f"{node.name}/bias", (node.bias * scale).astype(np.float32))]  # fmt: skip
        if isinstance(node, g.Conv):
            self.rectified("Conv", node, inputs, kernel_shape=node.weight.shape[2:], strides=node.stride,
                           pads=node.padding, dilations=node.dilation, group=node.groups)  # fmt: skip
        else:
            self.rectified("Gemm", node, inputs, transB=1)

    def lookup(self, node: g.Lookup, inputs: list[str]) -> None:
        function = lookup_function(self.graph, node)
        if function == "Silu":
            gate = self.node("Sigmoid", f"{node.name}/gate", inputs, f"{node.output}/gate")
            self.emit("Mul", node, [*inputs, gate])
        else:
            self.emit(function, node, inputs, **({"alpha": 1 / 6, "beta": 0.5} if function == "HardSigmoid" else {}))

    def shuffle(self, node: g.Shuffle, inputs: list[str]) -> None:
        channels, height, width = self.graph.tensors[node.input].shape
        grouped = np.array([0, node.groups, channels // node.groups, height * width])
        whole = np.array([0, channels, height, width])
        parts = self.node("Reshape", f"{node.name}/group", [*inputs, self.constant(f"{node.name}/groups", grouped)])
        swapped = self.node("Transpose", f"{node.name}/swap", [parts], perm=(0, 2, 1, 3))
        self.emit("Reshape", node, [swapped, self.constant(f"{node.name}/shape", whole)])


def lookup_function(graph: IntegerGraph, node: g.Lookup) -> str:
    """The key of `FUNCTIONS` that a table was made from, to within `TOLERANCE` steps.

    Raises:
        ExportError: it is none of them.
    """
    source, target = graph.tensors[node.input], graph.tensors[node.output]
    if source.scale is None or target.scale is None:
        raise ExportError(f"{node.name}: a look-up table needs scales on both sides")
    x = np.arange(source.dtype.qmin, source.dtype.qmax + 1, dtype=np.float64) * np.float64(source.scale)
    for name, function in FUNCTIONS.items():
        expected = np.clip(np.rint(function(x) / target.scale), target.dtype.qmin, target.dtype.qmax)
        if np.abs(expected - node.table).max() <= TOLERANCE:
            return name
    raise ExportError(f"{node.name}: no float equivalent of this look-up table; known are {', '.join(FUNCTIONS)}")
