"""What every operation of a QOperator file is made of: nodes, constants, zero points, stored weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeguard import graph as g
from edgeguard.errors import ExportError
from edgeguard.graph import IntegerGraph
from edgeguard.inttype import IntType, zero_point_of

MICROSOFT = "com.microsoft"
STORAGE = {2: TensorProto.INT2, 4: TensorProto.INT4, 8: TensorProto.INT8}
"""ONNX type of a weight by `IntType.storage_bits`."""


class Collector:
    """Collects ONNX nodes. A node of the graph keeps its name on the operation that does its work."""

    def __init__(self, graph: IntegerGraph) -> None:
        self.graph = graph
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def model(self, imports: list[onnx.OperatorSetIdProto], ir_version: int) -> onnx.ModelProto:
        """What was collected: uint8 pixels (N, 3, H, W) to float32 logits (N, classes).

        Raises:
            ExportError: it is not valid ONNX.
        """
        graph = self.graph
        pixels = helper.make_tensor_value_info(graph.input, TensorProto.UINT8, ["N", *graph.input_shape])
        logits = helper.make_tensor_value_info(graph.output, TensorProto.FLOAT, ["N", graph.num_classes])
        body = helper.make_graph(self.nodes, "edgeguard", [pixels], [logits], list(self.initializers.values()))
        model = helper.make_model(body, producer_name="edgeguard", opset_imports=imports, ir_version=ir_version)
        try:
            onnx.checker.check_model(model)
        except onnx.checker.ValidationError as exc:
            raise ExportError(f"the ONNX model of this graph is not valid: {exc}") from exc
        return model

    def constant(self, name: str, values: Any) -> str:
        array = np.asarray(values)
        tensor = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        if self.initializers.setdefault(name, tensor) != tensor:
            raise ExportError(f"two different constants are called {name!r}; rename the layer")
        return name

    def node(self, op: str, name: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        output = output or f"{name}/{op}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def take(self, node: g.Take, source: str, output: str | None = None) -> str:
        """The rows, then the columns."""
        rows, columns = (
            self.constant(f"{node.name}/{axis}", np.array(indices, np.int64))
            for axis, indices in (("row_indices", node.rows), ("column_indices", node.columns))
        )
        taken = self.node("Gather", f"{node.name}/rows", [source, rows], axis=2)
        return self.node("Gather", node.name, [taken, columns], output, axis=3)


class Builder(Collector):
    """Collects operations on integers."""

    def __init__(self, graph: IntegerGraph, min_storage_bits: int) -> None:
        super().__init__(graph)
        self.min_storage_bits = min_storage_bits
        self.smallest = max(STORAGE)

    def emit(self, op: str, node: g.Node, inputs: list[str], output: str | None = None, **attributes: Any) -> None:
        """An operation that saturates at uint8, then the `Clip` of its type where that is narrower."""
        dtype, output = self.graph.tensors[node.output].dtype, output or node.output
        if (dtype.qmin, dtype.qmax) == (-zero_point_of(dtype), 255 - zero_point_of(dtype)):
            self.node(op, node.name, inputs, output, **attributes)
        else:
            wide = self.node(op, node.name, inputs, **attributes)
            self.clip(f"{node.name}/clip", wide, output, dtype.qmin, dtype.qmax, zero_point_of(dtype))

    def clip(self, name: str, source: str, output: str, low: int, high: int, zero_point: int | None = None) -> None:
        zero_point = zero_point_of(self.graph.tensors[output].dtype) if zero_point is None else zero_point
        limits = [min(max(q + zero_point, 0), 255) for q in (low, high)]
        self.node("Clip", name, [source, *(self.constant(f"uint8/{q}", np.uint8(q)) for q in limits)], output)

    def weight(self, node: g.Conv | g.Linear, values: NDArray[np.int8]) -> str:
        bits = max(node.weight_type.storage_bits, self.min_storage_bits)
        self.smallest = min(self.smallest, bits)
        return self.stored(f"{node.name}/weight", values, bits)

    def stored(self, name: str, values: NDArray[np.int8], bits: int) -> str:
        """int8 values, in the file as ONNX INT2, INT4 or INT8."""
        if bits == max(STORAGE):
            return self.constant(name, values)
        stored = self.constant(f"{name}/stored", values.astype(helper.tensor_dtype_to_np_dtype(STORAGE[bits])))
        return self.node("Cast", f"{name}/cast", [stored], name, to=TensorProto.INT8)

    def weight_quantization(self, node: g.Node, scale: NDArray[np.float32]) -> list[str]:
        # Not shared: the runtime's rewriting for CPUs without VNNI would fail. A Gemm wants one for each scale.
        values = np.zeros(len(scale) if isinstance(node, g.Linear) else (), np.int8)
        zero_point = self.constant(f"{node.name}/weight_zero_point", values)
        return [self.constant(f"{node.name}/weight_scale", scale), zero_point]

    def quantized(self, tensor: str) -> list[str]:
        """A tensor with its scale and zero point: the three inputs that QLinear operations expect."""
        scale = np.float32(self.graph.tensors[tensor].scale or 0)
        return [tensor, self.constant(f"{tensor}/activation_scale", scale), self.zero_point(self.graph.tensors[tensor].dtype)]

    def zero_point(self, dtype: IntType) -> str:
        value = zero_point_of(dtype)
        return self.constant(f"uint8/{value}", np.uint8(value))
