"""How much of any ONNX file ONNX Runtime executes in integers here, layer by layer, and why the rest is float.

Layers, their weights and the reasons are read from the file, shapes are inferred by the runtime, and which kernel runs
is read from the runtime's own optimized graph. What cannot be matched, or is not known, counts as float.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from edgeguard import folders
from edgeguard.errors import EngineError, InputError, require
from edgeguard.export.kernels import (
    DYNAMIC_KERNELS,
    FLOAT_BITS,
    INTEGER_BITS,
    INTEGER_KERNELS,
    KNOWN,
    NO_MACS,
    RENAMED,
    WEIGHT_INPUT,
)
from edgeguard.export.onnx_read import FOREIGN_BITS, StoredFile, read_model
from edgeguard.export.onnx_reason import why_float
from edgeguard.export.onnx_scope import Parameter, Scope, elements, label_of
from edgeguard.export.onnx_shapes import Shape, count_macs, infer_shapes
from edgeguard.inspection import SCHEMA
from edgeguard.targets.ort import PROVIDER, open_session

DOMAINS = ("", "ai.onnx", "com.microsoft")
"""Operations of these are named without their domain."""
NO_KERNEL = "none found"
MAX_NAME, MAX_REASON, MAX_SAID = 160, 400, 4000
_FUNCTION = r"(?:[\w:<>,&* ]{0,300}::)?[\w~<>,&*]{1,100}\([^()]{0,800}\)(?: const)?(?: \[with [^\]]{0,500}\])? "
NOISE = re.compile(rf"\[ONNXRuntimeError\] : -?\d+ : \w+ : |\S{{1,200}}\.(?:cc|h):\d+\s(?:{_FUNCTION})?")
"""What the runtime says of itself in its messages: kinds of errors, lines of its sources and signatures of its functions."""


@dataclass(frozen=True)
class Layer:
    """An operation of the file that multiplies, or may multiply for all we know."""

    scope: Scope
    node: onnx.NodeProto

    @property
    def weight(self) -> Parameter | None:
        index = WEIGHT_INPUT.get(self.node.op_type, len(self.node.input))
        return self.scope.parameter(self.node.input[index]) if index < len(self.node.input) else None


def examine(path: Path) -> dict[str, Any]:
    """Describe an ONNX file: a JSON document of schema `edgeguard.inspect/1`.

    Besides the keys of an artifact: `file`, `float_layers` (names), `float32_bytes` (the size if every weight of a layer
    were stored in float32), `unknown_ops`, `notes` (sentences), `runtime`; in each layer `macs_exact` (false: at least so
    many) and `reason` (null in an integer kernel). `storage_bits` is 0 where nothing is stored.
    `weight_bits`, `activation_bits` and `identical_to_reference` are null: a foreign file promises none.

    Raises:
        InputError: see `read_model`; the runtime cannot load it.
        MissingDependency: onnxruntime is not installed.
    """
    stored = read_model(path)
    return _describe(stored, _optimized(stored.path))


def _optimized(path: Path) -> onnx.ModelProto:
    """The graph that the runtime executes.

    Raises:
        InputError: with the runtime's reason for not loading the file.
        MemoryError: the runtime, or its copy of the file, takes more than this process may have.
    """
    with folders.temporary_folder() as folder:
        file = folder / "optimized.onnx"
        try:
            session = open_session(path, threads=1, optimized=file)
        except (EngineError, InputError) as exc:
            if "bad_alloc" in str(exc):
                raise MemoryError from exc
            if isinstance(exc, InputError):
                raise
            version = require("onnxruntime", None).__version__
            raise InputError(f"onnxruntime {version} cannot load {str(path)!r}: {_reason_of(exc, path)}") from exc
        if session.get_providers() != [PROVIDER]:
            raise InputError(f"onnxruntime chose {session.get_providers()} instead of {PROVIDER} alone")
        try:
            return onnx.load(file, load_external_data=False)
        except Exception as exc:  # protobuf's own, of a file that the runtime has just written: there is no room for it
            raise MemoryError from exc


def _reason_of(error: EngineError, path: Path) -> str:
    """Why the runtime does not load a file, without the names of its own sources."""
    said = str(error.__cause__ or error)[:MAX_SAID]
    said = re.sub(rf"Load model from {re.escape(str(path))}(?: failed:)?", "", said)
    return printable(" ".join(NOISE.sub("", said).split()), MAX_REASON).rstrip(".")


def _describe(stored: StoredFile, optimized: onnx.ModelProto) -> dict[str, Any]:
    model = stored.model
    functions = {(function.domain, function.name) for function in model.functions}
    layers = [layer for layer in _layers(Scope(model.graph)) if (layer.node.domain, layer.node.op_type) not in functions]
    kernels = list(_layers(Scope(optimized.graph)))
    matched, left = _match(layers, kernels)
    shapes = infer_shapes(model, {
        name for layer in layers if not layer.scope.place for name in (*layer.node.input, *layer.node.output)
    })  # fmt: skip
    rows = [_row(layer, matched.get(number), shapes or {}) for number, layer in enumerate(layers)]
    rows += [_row(kernel, kernel, {}) for kernel in left]
    macs = sum(row["macs"] for row in rows)
    integer = sum(row["macs"] for row in rows if row["compute_bits"] == INTEGER_BITS)
    return {
        "schema": SCHEMA,
        "target": "ort",
        "file": printable(str(stored.path), 1024),
        "weight_bits": None,
        "activation_bits": None,
        "integer_mac_coverage": integer / macs if macs else None,
        "identical_to_reference": None,
        "macs": macs,
        "file_bytes": stored.size,
        "float32_bytes": stored.size + _growth(layers),
        "float_layers": [row["name"] for row in rows if row["compute_bits"] != INTEGER_BITS],
        "unknown_ops": sorted({_op(item.node) for item in (*layers, *left) if item.node.op_type not in KNOWN}),
        "notes": list(_notes(rows, layers, left, shapes is None)),
        "runtime": {"name": "onnxruntime", "version": require("onnxruntime", None).__version__, "provider": PROVIDER},
        "layers": rows,
    }


def _layers(outermost: Scope) -> Iterator[Layer]:
    for scope in outermost.bodies():
        for node in scope.nodes:
            folded = not scope.place and not any(scope.varies(name) for name in node.input if name)
            if node.op_type not in NO_MACS and not folded:
                yield Layer(scope, node)


def _match(layers: list[Layer], kernels: list[Layer]) -> tuple[dict[int, Layer], list[Layer]]:
    """The kernel of each layer by its number, and the kernels that belong to none.

    A kernel is known by its name or its result's; otherwise by the layer that its result is made from in the file.
    """
    names: dict[str, list[int]] = {}
    for number, layer in enumerate(layers):
        for name in {layer.node.name, *layer.node.output} - {""}:
            names.setdefault(name, []).append(number)
    matched: dict[int, Layer] = {}
    left = list(kernels)
    scopes = {layer.scope.place: layer.scope for layer in layers}
    for find in (_same_names, _made_from):
        for kernel in list(left):
            candidates = [
                number for name in find(kernel, scopes) for number in names.get(name, ()) if number not in matched
            ]
            candidates.sort(key=lambda number: layers[number].scope.place != kernel.scope.place)
            if candidates:
                matched[candidates[0]] = kernel
                left = [item for item in left if item is not kernel]
    return matched, left


def _same_names(kernel: Layer, scopes: dict[tuple[str, ...], Scope]) -> list[str]:
    found = [kernel.node.name, *kernel.node.output]
    return [name for item in found for name in (item, RENAMED.sub("", item)) if name]


def _made_from(kernel: Layer, scopes: dict[tuple[str, ...], Scope]) -> list[str]:
    """Results of the nearest layers of the file that lead to a result of the kernel."""
    scope = scopes.get(kernel.scope.place)
    if scope is None:
        return []
    pending, seen, found = _same_names(kernel, scopes), set[str](), []
    while pending:
        name = pending.pop(0)
        producer = scope.producer(name)
        if name in seen or producer is None:
            continue
        seen.add(name)
        if producer.op_type in NO_MACS:
            pending += [item for item in producer.input if scope.varies(item)]
        else:
            found.append(producer.output[0])
    return found


def _row(layer: Layer, kernel: Layer | None, shapes: dict[str, Shape]) -> dict[str, Any]:
    def shape_of(name: str) -> Shape | None:
        constant = layer.scope.constant(name)
        return list(constant.dims) if constant is not None else None if layer.scope.place else shapes.get(name)

    node, weight = layer.node, layer.weight
    macs, exact = count_macs(node, shape_of)
    integer = kernel is not None and kernel.node.op_type in INTEGER_KERNELS | DYNAMIC_KERNELS
    stored = weight.tensor if weight is not None else None
    return {
        "name": printable("/".join((*layer.scope.place, label_of(node)))),
        "op": _op(node),
        "macs": macs,
        "macs_exact": exact,
        "storage_bits": FOREIGN_BITS.get(stored.data_type, 0) if stored is not None else 0,
        "compute_bits": INTEGER_BITS if integer else FLOAT_BITS,
        "kernel": f"{_op(kernel.node)} ({PROVIDER})" if kernel is not None else NO_KERNEL,
        "reason": None if integer else printable(_reason(layer, kernel), MAX_REASON),
    }


def _reason(layer: Layer, kernel: Layer | None) -> str:
    if kernel is None:
        return "no operation of the runtime's optimized graph could be recognized as this layer, so it counts as float"
    if layer.node.op_type not in KNOWN:
        return f"it is not known whether {_op(layer.node)} multiplies integers, so it counts as float"
    return why_float(layer.scope, layer.node, kernel.node.op_type)


def _growth(layers: list[Layer]) -> int:
    """Bytes that the weights of the layers would take more in float32 than they do."""
    weights = (layer.weight for layer in layers)
    stored = {id(weight.tensor): weight.tensor for weight in weights if weight is not None and weight.tensor is not None}
    return sum(
        4 * elements(tensor) - (elements(tensor) * FOREIGN_BITS[tensor.data_type] + 7) // 8
        for tensor in stored.values()
        if tensor.data_type in FOREIGN_BITS
    )


def _notes(rows: list[dict[str, Any]], layers: list[Layer], left: list[Layer], unshaped: bool) -> Iterator[str]:
    inner = sum(bool(layer.scope.place) for layer in layers)
    if inner:
        yield f"{inner} layers are inside If, Loop or Scan: each is counted once, whatever the branch or number of rounds"
    if left:
        yield f"{len(left)} kernels belong to no layer of the file (functions, fusions); each is named as the runtime does"
    if unshaped:
        yield "the runtime could not infer shapes"
    bounds = sum(not row["macs_exact"] for row in rows)
    if bounds:
        yield f"multiply-accumulates of {bounds} layers are lower bounds, because sizes of their tensors are not known"


def _op(node: onnx.NodeProto) -> str:
    return printable(node.op_type if node.domain in DOMAINS else f"{node.domain}:{node.op_type}")


def printable(text: str, limit: int = MAX_NAME) -> str:
    """Text without control characters, so that a name cannot steer a terminal; what is too long ends in an ellipsis."""
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[:limit])
    return shown + "…" * (len(text) > limit)
