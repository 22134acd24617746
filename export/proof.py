"""The export proves itself: what the runtime really executes, read from the runtime's own optimized graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from edgeguard import folders
from edgeguard import graph as g
from edgeguard.errors import ExportError
from edgeguard.export.kernels import (
    BITS,
    FLOAT_BITS,
    INTEGER_BITS,
    INTEGER_KERNELS,
    PARAMETER_OPS,
    RENAMED,
    WEIGHT_INPUT,
    live,
)
from edgeguard.graph import IntegerGraph
from edgeguard.targets import Engine, reference
from edgeguard.targets.ort import OrtEngine, write_optimized

BATCH = 32

MOVES = frozenset({
    "Add", "AveragePool", "Cast", "Clip", "Concat", "DequantizeLinear", "Div", "Flatten", "Gather", "GlobalAveragePool",
    "Identity", "MaxPool", "Mul", "NhwcMaxPool", "Pad", "QLinearAdd", "QLinearAveragePool", "QLinearConcat",
    "QLinearGlobalAveragePool", "QLinearLeakyRelu", "QuantizeLinear", "Relu", "ReorderInput", "ReorderOutput",
    "Reshape", "Round", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip
"""Operations without multiply-accumulates in an export of ours. Any other that is no integer kernel counts as float.
Products of two tensors are found by their names, so a float `Mul` in the place of one is seen."""


def prove(graph: IntegerGraph, onnx_path: Path, images: NDArray[np.uint8], allow_float: bool = False,
          wide: bool = True) -> dict[str, Any]:  # fmt: skip
    """Examine an ONNX model of a graph, as ONNX Runtime executes it.

    Args:
        images: (N, 3, H, W) uint8 real images, on which logits are compared with the reference.
        allow_float: report layers in float and differing logits instead of raising.
        wide: as `OrtEngine` takes it.

    Returns:
        A JSON document: `integer_mac_coverage`, `macs`, `allowed` (every stored weight is within its integer type),
        `identical` and `max_difference` of the logits over `images`, `foreign` (operations that no layer of the graph
        explains), `runtime`, and `layers`: name, op, macs, storage_bits, compute_bits, kernel, allowed.

    Raises:
        ExportError: naming the layers that compute in float or whose weights leave their type, a layer that cannot be
            found in the file or in the optimized graph, or the images whose logits differ.
    """
    stored = _StoredModel(onnx.load(onnx_path, load_external_data=False), graph)
    kernels, foreign, provider = _kernels(onnx_path, stored, wide)
    layers = [_layer(graph, node, stored, kernels[node.name], provider) for node in _layers(graph)]
    layers += [_product(graph, node, kernels[node.name], provider) for node in _products(graph)]
    total = sum(layer["macs"] for layer in layers) + sum(item["macs"] for item in foreign)
    integer = sum(layer["macs"] for layer in layers if layer["compute_bits"] == INTEGER_BITS)
    with OrtEngine(onnx_path, graph.input_shape, graph.num_classes, wide=wide) as engine:
        differing, difference = _compare(graph, engine, images)
        runtime = engine.describe()
    if not allow_float:
        _refuse(layers, foreign, differing)
    return {
        "integer_mac_coverage": integer / total if total else 1.0,
        "macs": total,
        "allowed": all(layer["allowed"] for layer in layers),
        "images": len(images),
        "identical": not differing,
        "max_difference": difference,
        "foreign": foreign,
        "runtime": runtime,
        "layers": layers,
    }


def _layers(graph: IntegerGraph) -> Iterator[g.Conv | g.Linear]:
    return (node for node in graph.nodes if isinstance(node, g.Conv | g.Linear))


def _products(graph: IntegerGraph) -> Iterator[g.Multiply]:
    return (node for node in graph.nodes if isinstance(node, g.Multiply))


class _StoredModel:
    """The file: which node is which layer, the stored weight of each, and the names that betray a layer later."""

    def __init__(self, model: onnx.ModelProto, graph: IntegerGraph) -> None:
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers = {output: node for node in model.graph.node for output in node.output}
        self.weights: dict[str, onnx.TensorProto] = {}
        self.names: dict[str, str] = {}
        """Layer by the name of its node and of its output."""
        parameters: dict[str, set[str]] = {}
        by_name = {node.name: node for node in model.graph.node if node.op_type in WEIGHT_INPUT}
        for layer in _layers(graph):
            node = by_name.get(layer.name)
            if node is None:
                raise ExportError(f"layer {layer.name!r} is not in the ONNX file")
            chains = [list(self.chain(name)) for name in node.input]
            self.weights[layer.name] = self.source(layer.name, node)
            self.names |= {layer.name: layer.name, node.output[0]: layer.name}
            for chain in chains:
                constant = self.constants.get(chain[-1])
                if constant is not None and np.prod(constant.dims) > 1:  # the runtime merges equal scalars
                    for name in chain:
                        parameters.setdefault(name, set()).add(layer.name)
        outputs = {node.name: node.output[0] for node in model.graph.node}
        self.products = {node.name for node in _products(graph)}
        if missing := self.products - outputs.keys():
            raise ExportError(f"the products {sorted(missing)} are not in the ONNX file")
        self.names |= {name: product for product in self.products for name in (product, outputs[product])}
        self.parameters = {name: layers.pop() for name, layers in parameters.items() if len(layers) == 1}
        """Layer by the names of the constants that it alone uses."""

    def chain(self, name: str) -> Iterator[str]:
        """A tensor and what it is made of, back to a constant, as long as only parameters are reshaped or cast."""
        yield name
        producer = self.producers.get(name)
        while producer is not None and producer.op_type in PARAMETER_OPS:
            name = producer.input[0]
            yield name
            producer = self.producers.get(name)

    def source(self, layer: str, node: onnx.NodeProto) -> onnx.TensorProto:
        *_, last = self.chain(node.input[WEIGHT_INPUT[node.op_type]])
        if last not in self.constants:
            raise ExportError(f"layer {layer!r}: its weights are not stored in the ONNX file but computed ({last!r})")
        constant: onnx.TensorProto = self.constants[last]
        return constant

    def layer_of(self, node: onnx.NodeProto) -> str | None:
        """The layer that a node of the optimized graph executes: by its weights, by its other constants, by its name.

        The runtime may merge equal constants of different layers, so the weights, which are seldom equal, come first.
        """
        index = WEIGHT_INPUT.get(node.op_type, len(node.input))
        found = {self.parameters.get(name) for name in node.input[index : index + 1]} - {None}
        found = found or {self.parameters.get(name) for name in node.input} - {None}
        if not found:
            found = {self.names.get(RENAMED.sub("", name)) for name in (node.name, *node.output)} - {None}
        if len(found) > 1:
            raise ExportError(f"the optimized graph merges the layers {sorted(map(str, found))}; it cannot be read")
        return found.pop() if found else None


def _kernels(path: Path, stored: _StoredModel, wide: bool) -> tuple[dict[str, str], list[dict[str, Any]], str]:
    """Operation type of each layer in the optimized graph; the operations there that belong to none; the provider."""
    with folders.temporary_folder() as folder:
        optimized = folder / "optimized.onnx"
        provider = write_optimized(path, optimized, wide)
        model = onnx.load(optimized)
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    found: list[tuple[str, str]] = []
    foreign: list[dict[str, Any]] = []
    for node in live(model.graph):
        if node.op_type in MOVES and stored.names.get(RENAMED.sub("", node.name)) not in stored.products:
            continue
        layer = stored.layer_of(node)
        if layer is not None:
            found.append((layer, node.op_type))
        elif node.op_type not in INTEGER_KERNELS:
            at_least = max((sizes.get(name, 0) for name in node.input), default=0)
            foreign.append({"name": node.name, "op": node.op_type, "macs": at_least})
    times = Counter(layer for layer, _ in found)
    unclear = [layer for layer in (*stored.weights, *sorted(stored.products)) if times[layer] != 1]
    if unclear:
        raise ExportError(f"not exactly one kernel in the runtime's optimized graph for: {', '.join(unclear)}")
    return dict(found), foreign, provider


def _layer(
    graph: IntegerGraph, node: g.Conv | g.Linear, stored: _StoredModel, kernel: str, provider: str
) -> dict[str, Any]:
    weight = stored.weights[node.name]
    if weight.data_location == TensorProto.EXTERNAL:
        raise ExportError(f"layer {node.name!r}: its weights are in another file than the model")
    if weight.data_type not in BITS:
        raise ExportError(f"layer {node.name!r}: unknown storage type {weight.data_type} of its weights")
    values = numpy_helper.to_array(weight)
    if BITS[weight.data_type] <= INTEGER_BITS:
        values = values.astype(np.int16)
    return {
        "name": node.name,
        "op": "linear" if isinstance(node, g.Linear) else "conv" if node.groups == 1 else "grouped conv",
        "macs": graph.macs(node),
        "storage_bits": BITS[weight.data_type],
        "compute_bits": INTEGER_BITS if kernel in INTEGER_KERNELS else FLOAT_BITS,
        "kernel": f"{kernel} ({provider})",
        "allowed": node.weight_type.allowed(values),
    }


def _product(graph: IntegerGraph, node: g.Multiply, kernel: str, provider: str) -> dict[str, Any]:
    """A product of two tensors: nothing of it is stored."""
    return {
        "name": node.name,
        "op": "multiply",
        "macs": graph.macs(node),
        "storage_bits": 0,
        "compute_bits": INTEGER_BITS if kernel in INTEGER_KERNELS else FLOAT_BITS,
        "kernel": f"{kernel} ({provider})",
        "allowed": True,
    }


def _compare(graph: IntegerGraph, engine: Engine, images: NDArray[np.uint8]) -> tuple[list[int], float]:
    """Indices of images whose logits are not bit for bit the reference's, and the largest difference."""
    differing: list[int] = []
    largest = 0.0
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        got, expected = engine(batch), reference.run(graph, batch)[graph.output]
        differing += [start + int(index) for index in np.flatnonzero((got != expected).any(1))]
        largest = max(largest, float(np.abs(got.astype(np.float64) - expected).max()))
    return differing, largest


def _refuse(layers: list[dict[str, Any]], foreign: list[dict[str, Any]], differing: list[int]) -> None:
    beyond = [layer["name"] for layer in layers if not layer["allowed"]]
    in_float = [f"{layer['name']} ({layer['kernel']})" for layer in layers if layer["compute_bits"] > INTEGER_BITS]
    in_float += [f"{item['name']} ({item['op']})" for item in foreign]
    if in_float:
        raise ExportError(
            f"the runtime computes in float: {', '.join(in_float)}; --allow-float permits it, and reports will say so"
        )
    if beyond:
        raise ExportError(f"stored weights are beyond their integer type: {', '.join(beyond)}")
    if differing:
        raise ExportError(f"logits differ from the reference on {len(differing)} images, first on {differing[0]}")
