"""The float32 model of the same architecture as an `IntegerGraph`: what a quantized engine is measured against."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeguard import graph as g
from edgeguard.errors import ExportError
from edgeguard.graph import IntegerGraph


def float_onnx(graph: IntegerGraph) -> onnx.ModelProto:
    """Dequantized weights, batch norm already folded, ReLU where an output is unsigned, no quantizers anywhere.

    Its input is float32 (N, 3, H, W), already normalized, so the float model is spared the work that the integer model
    does on pixels.
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
