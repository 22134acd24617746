"""The export for OpenVINO proves itself: the kernels it chose, from its own runtime graph, and how far its logits go.

OpenVINO fuses operations and requantizes in its own order, so logits may differ from the reference's by rounding. That
is measured and reported, not refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from edgeguard import graph as g
from edgeguard.errors import ExportError
from edgeguard.graph import IntegerGraph
from edgeguard.targets import Engine, reference
from edgeguard.targets.differences import logit_steps
from edgeguard.targets.openvino import Kernel, OpenVinoEngine

BATCH = 32
INTEGER_BITS = 8
BITS = {"u8": INTEGER_BITS, "i8": INTEGER_BITS, "f16": 16, "bf16": 16, "f32": 32}
"""Bits of a runtime precision; one that is not here counts as float32."""


def prove(graph: IntegerGraph, onnx_path: Path, images: NDArray[np.uint8], allow_float: bool = False) -> dict[str, Any]:
    """Examine the QDQ model of a graph, as OpenVINO executes it.

    Args:
        images: (N, 3, H, W) uint8 real images, on which logits are compared with the reference.
        allow_float: report layers in float instead of raising.

    Returns:
        A JSON document with the keys of `edgeguard.export.proof.prove`, and `agreement` (share of images with the
        reference's answer) and `steps`: logits by the magnitude of their difference, in accumulator steps of the last
        layer, in classes "0", "1", "2", "3-4", "5-8" and so on.

    Raises:
        ExportError: naming the layers that compute in float or whose weights leave their type, or a layer that cannot
            be found in the file or in the runtime graph.
    """
    weights = _stored_weights(onnx.load(onnx_path, load_external_data=False), graph)
    with OpenVinoEngine(onnx_path, graph.input_shape, graph.num_classes) as engine:
        kernels, foreign = _assign(graph, engine.kernels())
        comparison = _compare(graph, engine, images)
        runtime = engine.describe()
    layers = [_layer(graph, node, weights[node.name], kernels[node.name]) for node in _layers(graph)]
    if not allow_float:
        _refuse(layers, foreign)
    total = sum(layer["macs"] for layer in layers) + sum(item["macs"] for item in foreign)
    integer = sum(layer["macs"] for layer in layers if layer["compute_bits"] == INTEGER_BITS)
    return {
        "integer_mac_coverage": integer / total if total else 1.0,
        "macs": total,
        "allowed": all(layer["allowed"] for layer in layers),
        "images": len(images),
        **comparison,
        "foreign": foreign,
        "runtime": runtime,
        "layers": layers,
    }


def _layers(graph: IntegerGraph) -> list[g.Conv | g.Linear]:
    return [node for node in graph.nodes if isinstance(node, g.Conv | g.Linear)]


def _stored_weights(model: onnx.ModelProto, graph: IntegerGraph) -> dict[str, NDArray[Any]]:
    """The weights of each layer as the file holds them: initializers behind one DequantizeLinear."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    sources = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    products = {node.name: node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")}
    found = {}
    for layer in _layers(graph):
        if layer.name not in products:
            raise ExportError(f"layer {layer.name!r} is not in the ONNX file")
        weight = constants.get(sources.get(products[layer.name].input[1], ""))
        if weight is None or weight.data_type != TensorProto.INT8:
            raise ExportError(f"layer {layer.name!r}: its weights are not stored as INT8 behind a DequantizeLinear")
        if weight.data_location == TensorProto.EXTERNAL:
            raise ExportError(f"layer {layer.name!r}: its weights are in another file than the model")
        found[layer.name] = numpy_helper.to_array(weight)
    return found


def _assign(graph: IntegerGraph, kernels: tuple[Kernel, ...]) -> tuple[dict[str, Kernel], list[dict[str, Any]]]:
    """The kernel of each layer, and the kernels that belong to none."""
    found: dict[str, list[Kernel]] = {layer.name: [] for layer in _layers(graph)}
    foreign = []
    for kernel in kernels:
        executed = [name for name in found if kernel.executes(name)]
        for name in executed:
            found[name].append(kernel)
        if not executed:
            foreign.append({"name": kernel.name, "op": str(kernel), "macs": kernel.weights})
    if unclear := [name for name, candidates in found.items() if len(candidates) != 1]:
        raise ExportError(f"not exactly one kernel in OpenVINO's runtime graph for: {', '.join(unclear)}")
    return {name: candidates[0] for name, candidates in found.items()}, foreign


def _layer(graph: IntegerGraph, node: g.Conv | g.Linear, weight: NDArray[Any], kernel: Kernel) -> dict[str, Any]:
    widest = max(BITS.get(precision, 32) for precision in (kernel.precision, kernel.weight_precision))
    return {
        "name": node.name,
        "op": "linear" if isinstance(node, g.Linear) else "conv" if node.groups == 1 else "grouped conv",
        "macs": graph.macs(node),
        "storage_bits": INTEGER_BITS,
        "compute_bits": widest,
        "kernel": str(kernel),
        "allowed": node.weight_type.allowed(weight),
    }


def _compare(graph: IntegerGraph, engine: Engine, images: NDArray[np.uint8]) -> dict[str, Any]:
    """`identical`, `max_difference`, `agreement` and `steps` of the logits over images."""
    last = graph.nodes[-1]
    if not isinstance(last, g.Dequantize):
        raise ExportError(f"the graph ends in {type(last).__name__}, expected Dequantize")
    pairs = []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        pairs.append((engine(batch), reference.run(graph, batch)[graph.output]))
    got, expected = (np.concatenate(part) for part in zip(*pairs, strict=True))
    return {
        "identical": bool(np.array_equal(got, expected)),
        "max_difference": float(np.abs(got.astype(np.float64) - expected).max()),
        "agreement": float((got.argmax(1) == expected.argmax(1)).mean()),
        "steps": logit_steps(got, expected, last.scale),
    }


def _refuse(layers: list[dict[str, Any]], foreign: list[dict[str, Any]]) -> None:
    in_float = [f"{layer['name']} ({layer['kernel']})" for layer in layers if layer["compute_bits"] > INTEGER_BITS]
    in_float += [f"{item['name']} ({item['op']})" for item in foreign]
    if in_float:
        raise ExportError(
            f"OpenVINO computes in float: {', '.join(in_float)}; --allow-float permits it, and reports will say so"
        )
    if beyond := [layer["name"] for layer in layers if not layer["allowed"]]:
        raise ExportError(f"stored weights are beyond their integer type: {', '.join(beyond)}")
