"""What a built TensorRT engine multiplies with: its inspector's JSON, read against the layers of the ONNX model.

The inspector of an engine that was built with detailed profiling verbosity lists the engine's layers: `Name`,
`LayerType`, `ParameterType`, `TacticName`, `Weights` {`Type`}, `Inputs` and `Outputs` with `Format/Datatype` (since
release 11 two fields), and `Metadata` with the ONNX nodes in each. Not every layer has every field. What a layer does
not say is unknown, and unknown is not INT8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import onnx

from edgeguard.errors import ExportError
from edgeguard.export.trt_qdq_rules import WEIGHTED

ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
INTEGER_TACTIC = re.compile(r"i8i8|s8s8|int8|imma")
FLOAT_TACTIC = re.compile(r"f16f16|f32f32|h884|h1688|s1688|bf16bf16|tf32")
PLUMBING = ("reformat", "constant", "shuffle", "signal", "wait", "nocopy", "quantize", "dequantize", "scale", "cast")
"""Types of engine layers that multiply nothing and may still name an ONNX layer, as copies of its input or weights."""
UNKNOWN = "unknown"


@dataclass(frozen=True)
class LayerPrecision:
    """How one convolution or matrix product of the ONNX model runs.

    name, op: of the ONNX node. precision: "int8", "fp16", "fp32" or "unknown". kernel: TensorRT's name of the tactic.
    engine_layer: the layer of the engine that it became part of, "" when none was found.
    """

    name: str
    op: str
    precision: str
    kernel: str
    engine_layer: str


def weighted_layers(model: onnx.ModelProto) -> dict[str, str]:
    """Operation by name of every node with multiply-accumulates."""
    return {node.name: node.op_type for node in model.graph.node if node.op_type in WEIGHTED}


def read_layers(document: str, expected: dict[str, str]) -> tuple[LayerPrecision, ...]:
    """The precision of each expected ONNX node, from the inspector's JSON.

    Raises:
        ExportError: the document is not the inspector's, or lists layer names only.
    """
    try:
        layers = json.loads(document)["Layers"]
    except (ValueError, TypeError, KeyError) as exc:
        raise ExportError("TensorRT's inspector gave no JSON with the layers of the engine") from exc
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise ExportError("TensorRT's inspector lists names of layers only; build with detailed profiling verbosity")
    by_node: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        for name in set(onnx_nodes(layer)):
            by_node.setdefault(name, []).append(layer)
    return tuple(_precision(name, op, by_node.get(name, [])) for name, op in expected.items())


def require_int8(layers: Iterable[LayerPrecision]) -> None:
    """Refuse an engine in which a convolution or matrix product is not INT8.

    Raises:
        ExportError: naming the layers and what they are instead.
    """
    others = [layer for layer in layers if layer.precision != "int8"]
    if others:
        names = ", ".join(f"{layer.name} ({layer.precision}{layer.kernel and f', {layer.kernel}'})" for layer in others)
        raise ExportError(f"TensorRT does not compute these layers in INT8: {names}; no plan was kept")


def as_json(layers: Iterable[LayerPrecision]) -> list[dict[str, str]]:
    return [asdict(layer) for layer in layers]


def onnx_nodes(layer: dict[str, Any]) -> Iterator[str]:
    """Names of the ONNX nodes in a layer of the engine: its metadata's, or the parts of its name."""
    metadata = ONNX_LAYER.findall(str(layer.get("Metadata", "")))
    if metadata:
        yield from metadata
    else:
        yield from (part.strip() for part in str(layer.get("Name", "")).split(" + "))


def _precision(name: str, op: str, candidates: list[dict[str, Any]]) -> LayerPrecision:
    working = [layer for layer in candidates if not _is_plumbing(layer)]
    if not working:
        return LayerPrecision(name, op, UNKNOWN, "", "")
    found = [(precision_of(layer), layer) for layer in working]
    # Several layers can bear one node's name; the product is in one of them, so the least favourable counts.
    precision, layer = next((pair for pair in found if pair[0] != "int8"), found[0])
    return LayerPrecision(name, op, precision, str(layer.get("TacticName", "")), str(layer.get("Name", "")))


def _is_plumbing(layer: dict[str, Any]) -> bool:
    return str(layer.get("LayerType", "")).lower() in PLUMBING


def precision_of(layer: dict[str, Any]) -> str:
    """ "int8", "fp16", "fp32" or "unknown": by the weights, else the tactic, else both factors."""
    weights = layer.get("Weights")
    stored = datatype(str(weights.get("Type", ""))) if isinstance(weights, dict) else UNKNOWN
    tactic = str(layer.get("TacticName", "")).lower()
    if stored not in (UNKNOWN, "int8"):
        return stored
    if INTEGER_TACTIC.search(tactic):
        return "int8"
    if FLOAT_TACTIC.search(tactic):
        return "fp32" if "32" in tactic else "fp16"
    read = [io_datatype(tensor) for tensor in layer.get("Inputs", ()) if isinstance(tensor, dict)]
    if read and read[0] not in (UNKNOWN, "int8"):
        return read[0]
    factors = read.count("int8") + (stored == "int8")
    return "int8" if read and read[0] == "int8" and factors >= 2 else UNKNOWN


def io_datatype(tensor: dict[str, Any]) -> str:
    """The type of an input or output of an engine's layer, however the release spells its field."""
    fields = [str(value) for key, value in tensor.items() if "datatype" in key.lower()]
    fields += [str(value) for key, value in tensor.items() if key.lower() == "format"]
    return next((kind for kind in map(datatype, fields) if kind != UNKNOWN), UNKNOWN)


def datatype(text: str) -> str:
    """A type in the words of the inspector: "Int8", "Half", "Row major linear FP32 format (kLINEAR)"."""
    lower = text.lower()
    for kind, words in {"int8": ("int8",), "fp16": ("half", "fp16", "bf16", "bfloat16"),
                        "fp32": ("float", "fp32")}.items():  # fmt: skip
        if any(re.search(rf"\b{word}\b", lower) for word in words):
            return kind
    return UNKNOWN
