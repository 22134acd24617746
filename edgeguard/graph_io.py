"""Reading and writing an `IntegerGraph` as one npz file: a JSON member `graph` and one array per parameter.

No pickle is ever read, sizes are bounded before anything is allocated, and unknown keys are errors.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard import files
from edgeguard import graph as g
from edgeguard.errors import ArtifactError, InputError
from edgeguard.graph_check import ARRAY_DTYPES
from edgeguard.inttype import IntType

SCHEMA = "edgeguard.graph/1"
MAX_BYTES, MAX_TEXT = 512 << 20, 16 << 20
"""Of all arrays together, and of the JSON member: a graph of half a billion weights."""
MAX_RANK = 4
NODE_TYPES: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        g.Quantize, g.Conv, g.Linear, g.Add, g.Multiply, g.Lookup, g.Concat, g.Slice, g.Take, g.Shuffle, g.MaxPool,
        g.AveragePool, g.Pad, g.Flatten, g.Clamp, g.Dequantize,
    )
}  # fmt: skip


def int_type_to_json(dtype: IntType) -> dict[str, Any]:
    return {"bits": dtype.bits, "signed": dtype.signed, "narrow": dtype.narrow}


def save_graph(graph: g.IntegerGraph, path: Path) -> None:
    """Write a graph; equal graphs give equal bytes, on every version of Python: the SHA-256 of the file is the graph's identity."""
    arrays: dict[str, NDArray[Any]] = {}
    nodes = []
    for index, node in enumerate(graph.nodes):
        entry: dict[str, Any] = {"op": type(node).__name__}
        for field in fields(node):
            value = getattr(node, field.name)
            if field.name in ARRAY_DTYPES:
                arrays[f"{index}.{field.name}"] = value
            else:
                entry[field.name] = int_type_to_json(value) if isinstance(value, IntType) else value
        nodes.append(entry)
    tensors = [
        {"name": t.name, "shape": t.shape, "dtype": int_type_to_json(t.dtype), "scale": t.scale}
        for t in graph.tensors.values()
    ]
    text = json.dumps({"schema": SCHEMA, "input": graph.input, "tensors": tensors, "nodes": nodes}, allow_nan=False)
    files.write_npz(path, {"graph": np.frombuffer(text.encode(), np.uint8), **arrays})


def load_graph(path: Path) -> g.IntegerGraph:
    """Read a graph and validate it.

    Raises:
        ArtifactError: truncated, hostile, of another schema, or not a valid graph.
    """
    try:
        arrays = files.read_npz(path, MAX_BYTES)
        text = arrays.pop("graph")
        if text.nbytes > MAX_TEXT:
            raise ArtifactError(f"{path}: its description has {text.nbytes} bytes; at most {MAX_TEXT} were expected")
        document = files.parse_json(text.tobytes())
        if document["schema"] != SCHEMA:
            raise ArtifactError(f"{path}: schema {document['schema']!r:.80}; this version reads {SCHEMA!r}")
        tensors = {t["name"]: _tensor(t) for t in document["tensors"]}
        nodes = tuple(_node(index, entry, arrays) for index, entry in enumerate(document["nodes"]))
        return g.IntegerGraph(nodes, tensors, document["input"])
    except ArtifactError as exc:
        raise ArtifactError(f"{exc!s:.400}") from exc
    except (
        InputError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError,
    ) as exc:  # fmt: skip
        raise ArtifactError(f"{path} is not a readable integer graph: {exc!s:.400}") from exc


def _int_type(entry: dict[str, Any]) -> IntType:
    bits, signed, narrow = entry["bits"], entry["signed"], entry["narrow"]
    if type(bits) is not int or type(signed) is not bool or type(narrow) is not bool:
        raise ArtifactError(f"{entry!r} is not an integer type")
    return IntType(bits, signed, narrow)


def _tensor(entry: dict[str, Any]) -> g.Tensor:
    shape = tuple(entry["shape"])
    if not 1 <= len(shape) <= MAX_RANK or any(type(size) is not int or not 1 <= size <= 1 << 24 for size in shape):
        raise ArtifactError(f"tensor {entry['name']!r} has an impossible shape {shape}")
    scale = entry["scale"]
    if type(scale) not in (int, float, type(None)):
        raise ArtifactError(f"tensor {entry['name']!r} has no number as its scale but {scale!r}")
    return g.Tensor(str(entry["name"]), shape, _int_type(entry["dtype"]), None if scale is None else float(scale))


def _node(index: int, entry: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> g.Node:
    cls = NODE_TYPES.get(entry["op"])
    if cls is None:
        raise ArtifactError(f"unknown operation {entry['op']!r}")
    names = {field.name for field in fields(cls)}
    values: dict[str, Any] = {}
    for key, value in entry.items():
        if key == "op":
            continue
        if key not in names - ARRAY_DTYPES.keys():
            raise ArtifactError(f"unknown field {key!r} of a {entry['op']}")
        if key == "weight_type":
            values[key] = _int_type(value)
        elif isinstance(value, list):
            values[key] = tuple(value)
        elif type(value) in (str, int):
            values[key] = value
        else:
            raise ArtifactError(f"field {key!r} of a {entry['op']} cannot be {value!r}")
    for key in names & ARRAY_DTYPES.keys():
        values[key] = arrays[f"{index}.{key}"]
    node: g.Node = cls(**values)
    return node
