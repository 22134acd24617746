"""What an artifact is, from its files alone, and the table of that and of any ONNX file: no runtime, torch or onnx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeguard.artifact import GRAPH, Artifact
from edgeguard.errors import ArtifactError, printable
from edgeguard.graph import Conv, Linear, Multiply
from edgeguard.inttype import MAX_BITS

SCHEMA = "edgeguard.inspect/1"
LAYER_KEYS = {"name": str, "op": str, "macs": int, "storage_bits": int, "compute_bits": int, "kernel": str}


def inspect_artifact(path: Path | str) -> dict[str, Any]:
    """Describe an artifact: a JSON document of schema `edgeguard.inspect/1`.

    Raises:
        ArtifactError: not an artifact, altered, or with an incomplete proof.
    """
    artifact = Artifact.load(path)
    manifest, proof = artifact.manifest, artifact.manifest["proof"]
    coverage = proof.get("integer_mac_coverage")
    if isinstance(coverage, bool) or not isinstance(coverage, int | float) or not 0 <= coverage <= 1:
        raise ArtifactError(f"{artifact.path}: the proof has no integer_mac_coverage between 0 and 1, got {coverage!r}")
    layers = [_layer(artifact, layer) for layer in manifest["layers"]]
    file_bytes = sum((artifact.path / name).stat().st_size for name in manifest["files"] if name != GRAPH)
    return {
        "schema": SCHEMA,
        "target": artifact.target,
        "weight_bits": manifest["weight_bits"],
        "activation_bits": manifest["activation_bits"],
        "integer_mac_coverage": float(coverage),
        "identical_to_reference": proof.get("identical"),
        "macs": sum(layer["macs"] for layer in layers),
        "file_bytes": file_bytes,
        "float32_bytes": _float32_bytes(artifact, layers, file_bytes),
        "float_layers": [layer["name"] for layer in layers if layer["compute_bits"] > MAX_BITS],
        "layers": layers,
    }


def _float32_bytes(artifact: Artifact, layers: list[dict[str, Any]], file_bytes: int) -> int | None:
    """The model's size if the weights of its layers were float32; None where the graph has other layers."""
    weights: dict[str, int] = {}
    for node in artifact.graph().nodes:
        if isinstance(node, Conv | Linear | Multiply):
            weights[node.name] = 0 if isinstance(node, Multiply) else int(node.weight.size)
    if weights.keys() != {layer["name"] for layer in layers}:
        return None
    growth: int = sum((32 - layer["storage_bits"]) * weights[layer["name"]] // 8 for layer in layers)
    return file_bytes + growth


def _layer(artifact: Artifact, layer: Any) -> dict[str, Any]:
    if not isinstance(layer, dict):
        raise ArtifactError(f"{artifact.path}: a layer of the manifest is not an object: {layer!r}")
    for key, kind in LAYER_KEYS.items():
        if type(layer.get(key)) is not kind:
            raise ArtifactError(f"{artifact.path}: layer {layer.get('name')!r} has no {kind.__name__} {key!r}")
    return {key: layer[key] for key in LAYER_KEYS}


def format_inspection(document: dict[str, Any]) -> str:
    """A table for the terminal, of an artifact or an ONNX file; below it, why layers are not in integer kernels."""
    rows = [[str(key).replace("_", " ") for key in LAYER_KEYS]]
    rows += [[_cell(layer[key]) for key in LAYER_KEYS] for layer in document["layers"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [kind is int for kind in LAYER_KEYS.values()]
    lines = [
        "  ".join(cell.rjust(width) if number else cell.ljust(width)
                  for cell, width, number in zip(row, widths, right, strict=True)).rstrip()
        for row in rows
    ]  # fmt: skip
    reasons: dict[str, list[str]] = {}
    for layer in document["layers"]:
        if layer.get("reason"):
            reasons.setdefault(layer["reason"], []).append(layer["name"])
    why = ["", "Not in integer kernels:", *(f"  {', '.join(names)}: {reason}" for reason, names in reasons.items())]
    notes = [f"Note: {note}" for note in document.get("notes", ())]
    every = [*_heading(document), "", *lines, *(why if reasons else ()), *([""] if notes else ()), *notes]
    return "\n".join(map(printable, every))  # names are a file's


def _heading(document: dict[str, Any]) -> list[str]:
    coverage, macs = document["integer_mac_coverage"], document["macs"]
    share = f"{_share(coverage)} of {macs:,} multiply-accumulates run in integer kernels"
    whole = document["float32_bytes"]
    size = f"model {document['file_bytes']:,} bytes"
    size += f", {document['file_bytes'] / whole:.1%} of its size with float32 weights" if whole else ""
    if "file" not in document:
        bits = f"weights {document['weight_bits']} bit, activations {document['activation_bits']} bit"
        return [f"target {document['target']}, {bits}, {size}", share]
    runtime = document["runtime"]
    name = f"{document['file']} on {runtime['name']} {runtime['version']}"
    return [f"{name}, {size}", share if macs else "no multiply-accumulates"]


def _share(value: float | None) -> str:
    """A percentage that says 100 only when it is."""
    if value is None:
        return "none"
    return "100%" if value == 1 else f"{min(value, 0.9999):.2%}"


def _cell(value: str | int) -> str:
    return f"{value:,}" if isinstance(value, int) else value
