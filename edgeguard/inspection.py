"""What an artifact is, from its manifest alone: no runtime, no torch, no onnx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeguard.artifact import GRAPH, Artifact
from edgeguard.errors import ArtifactError

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
    return {
        "schema": SCHEMA,
        "target": artifact.target,
        "weight_bits": manifest["weight_bits"],
        "activation_bits": manifest["activation_bits"],
        "integer_mac_coverage": float(coverage),
        "identical_to_reference": proof.get("identical"),
        "macs": sum(layer["macs"] for layer in layers),
        "file_bytes": sum((artifact.path / name).stat().st_size for name in manifest["files"] if name != GRAPH),
        "layers": layers,
    }


def _layer(artifact: Artifact, layer: Any) -> dict[str, Any]:
    if not isinstance(layer, dict):
        raise ArtifactError(f"{artifact.path}: a layer of the manifest is not an object: {layer!r}")
    for key, kind in LAYER_KEYS.items():
        if type(layer.get(key)) is not kind:
            raise ArtifactError(f"{artifact.path}: layer {layer.get('name')!r} has no {kind.__name__} {key!r}")
    return {key: layer[key] for key in LAYER_KEYS}


def format_inspection(document: dict[str, Any]) -> str:
    """A table for the terminal."""
    rows = [[str(key).replace("_", " ") for key in LAYER_KEYS]]
    rows += [[_cell(layer[key]) for key in LAYER_KEYS] for layer in document["layers"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [kind is int for kind in LAYER_KEYS.values()]
    lines = [
        "  ".join(cell.rjust(width) if number else cell.ljust(width)
                  for cell, width, number in zip(row, widths, right, strict=True)).rstrip()
        for row in rows
    ]  # fmt: skip
    return "\n".join([
        f"target {document['target']}, weights {document['weight_bits']} bit, activations "
        f"{document['activation_bits']} bit, model {document['file_bytes']:,} bytes",
        f"{_share(document['integer_mac_coverage'])} of {document['macs']:,} multiply-accumulates "
        "run in integer kernels",
        "", *lines,
    ])  # fmt: skip


def _share(value: float) -> str:
    """A percentage that says 100 only when it is."""
    return "100%" if value == 1 else f"{min(value, 0.9999):.2%}"


def _cell(value: str | int) -> str:
    return f"{value:,}" if isinstance(value, int) else value
