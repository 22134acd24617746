"""The float32 model of the same architecture as an `IntegerGraph`: what a quantized engine is measured against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeguard import graph as g
from edgeguard.errors import ExportError
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
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(name: str, values: Any) -> str:
        constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def emit(op: str, node: g.Node, inputs: list[str], **attributes: Any) -> None:
        tensor = graph.tensors.get(node.output)
        rectified = op in ("Conv", "Gemm", "Add") and tensor is not None and not tensor.dtype.signed
        nodes.append(helper.make_node(op, inputs, [node.output + "/sum" * rectified], name=node.name, **attributes))
        if rectified:
            nodes.append(helper.make_node("Relu", [node.output + "/sum"], [node.output], name=f"{node.name}/relu"))

    for node in graph.nodes:
        inputs = list(g.node_inputs(node))
        if isinstance(node, g.Conv | g.Linear):
            scale = node.weight_scale * np.float32(graph.tensors[node.input].scale or 0)
            bias = (node.bias * scale).astype(np.float32)
            real = node.weight_scale.reshape(-1, *(1,) * (node.weight.ndim - 1)) * node.weight
            inputs += [constant(f"{node.name}/weight", real), constant(f"{node.name}/bias", bias)]
        if isinstance(node, g.Conv):
            emit("Conv", node, inputs, kernel_shape=node.weight.shape[2:], strides=node.stride, pads=node.padding,
                 dilations=node.dilation, group=node.groups)  # fmt: skip
        elif isinstance(node, g.Linear):
            emit("Gemm", node, inputs, transB=1)
        elif isinstance(node, g.Add):
            emit("Add", node, inputs)
        elif isinstance(node, g.AveragePool):
            emit("AveragePool", node, inputs, kernel_shape=node.kernel, strides=node.stride)
        elif isinstance(node, g.MaxPool):
            emit("MaxPool", node, inputs, kernel_shape=node.kernel, strides=node.stride, pads=node.padding)
        elif isinstance(node, g.Pad):
            top, left, bottom, right = node.padding
            pads = np.array([0, node.channels[0], top, left, 0, node.channels[1], bottom, right])
            emit("Pad", node, [*inputs, constant(f"{node.name}/pads", pads)])
        elif isinstance(node, g.Flatten):
            emit("Flatten", node, inputs, axis=1)
        elif isinstance(node, g.Concat):
            emit("Concat", node, inputs, axis=1)
        elif isinstance(node, g.Clamp):
            real_limits = [np.float32(q * (graph.tensors[node.input].scale or 0)) for q in (node.low, node.high)]
            emit("Clip", node, inputs + [constant(f"{node.name}/{i}", q) for i, q in enumerate(real_limits)])
        elif isinstance(node, g.Multiply):
            emit("Mul", node, inputs)
        elif isinstance(node, g.Lookup):
            function = lookup_function(graph, node)
            if function == "Silu":
                nodes.append(helper.make_node("Sigmoid", inputs, [f"{node.output}/gate"], name=f"{node.name}/gate"))
                emit("Mul", node, [*inputs, f"{node.output}/gate"])
            else:
                emit(function, node, inputs, **({"alpha": 1 / 6, "beta": 0.5} if function == "HardSigmoid" else {}))
        elif isinstance(node, g.Slice):
            limits = [constant(f"{node.name}/{key}", np.array([value])) for key, value in
                      (("start", node.start), ("stop", node.stop), ("axis", 1))]  # fmt: skip
            emit("Slice", node, [*inputs, *limits])
        elif isinstance(node, g.Shuffle):
            channels, height, width = graph.tensors[node.input].shape
            grouped = constant(f"{node.name}/groups", np.array([0, node.groups, channels // node.groups, height * width]))
            whole = constant(f"{node.name}/shape", np.array([0, channels, height, width]))
            parts, swapped = f"{node.output}/parts", f"{node.output}/swapped"
            nodes.append(helper.make_node("Reshape", [*inputs, grouped], [parts], name=f"{node.name}/group"))
            nodes.append(helper.make_node("Transpose", [parts], [swapped], name=f"{node.name}/swap", perm=(0, 2, 1, 3)))
            emit("Reshape", node, [swapped, whole])
        elif isinstance(node, g.Quantize | g.Dequantize):
            emit("Identity", node, inputs)
        else:
            raise ExportError(f"no float equivalent of {type(node).__name__}")
    source = helper.make_tensor_value_info(graph.input, TensorProto.FLOAT, ["N", *graph.input_shape])
    logits = helper.make_tensor_value_info(graph.output, TensorProto.FLOAT, ["N", graph.num_classes])
    body = helper.make_graph(nodes, "float32", [source], [logits], constants)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


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
