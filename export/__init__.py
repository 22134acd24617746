"""From an `IntegerGraph` to an artifact that has proved itself."""

from __future__ import annotations

import platform
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgeguard
from edgeguard import files
from edgeguard.artifact import GRAPH, ONNX_MODEL, Artifact, write_manifest
from edgeguard.errors import InputError, require
from edgeguard.graph import IntegerGraph
from edgeguard.graph_io import save_graph
from edgeguard.targets import check_images

TARGETS = ("ort",)
"""Runtimes that this version exports for."""


def export_artifact(
    graph: IntegerGraph, out: Path, *, target: str, width: str, weight_bits: int, activation_bits: int,
    images: NDArray[np.uint8], source: dict[str, Any], allow_float: bool = False,
) -> Artifact:  # fmt: skip
    """Write the graph, the runtime's model and the manifest to a new folder, and prove the result.

    Args:
        out: must not exist; on failure nothing is left there.
        width: as users write it, e.g. "4" or "w4a8".
        images: (N, 3, H, W) uint8 real images for the proof.
        source: what the graph was lowered from, for the records.
        allow_float: keep an artifact that computes in float or differs from the reference; the manifest says so.

    Raises:
        InputError: an unknown target, wrong images, or a folder that exists.
        ExportError: the proof failed; see `edgeguard.export.proof.prove`.
        MissingDependency: onnx or onnxruntime is not installed.
    """
    if target not in TARGETS:
        raise InputError(f"unknown target {target!r}; expected {', '.join(TARGETS)}")
    check_images(images, graph.input_shape)
    packages = {"onnx": require("onnx", "train"), "onnxruntime": require("onnxruntime", None)}
    from edgeguard.export.onnx_writer import write_onnx
    from edgeguard.export.proof import prove

    with files.folder_transaction(out) as folder:
        save_graph(graph, folder / GRAPH)
        write_onnx(graph, folder / ONNX_MODEL)
        proof = prove(graph, folder / ONNX_MODEL, images, allow_float)
        write_manifest(folder, {
            "target": target, "width": width, "weight_bits": weight_bits, "activation_bits": activation_bits,
            "num_classes": graph.num_classes, "input_shape": list(graph.input_shape),
            "layers": proof.pop("layers"), "proof": proof, "source": source,
            "versions": _versions(packages) | {"cpu_flags": " ".join(proof["runtime"]["cpu_flags"])},
        })  # fmt: skip
    return Artifact.load(out)


def _versions(packages: dict[str, ModuleType]) -> dict[str, str]:
    return {
        "edgeguard": edgeguard.__version__, "python": platform.python_version(), "numpy": np.__version__,
        **{name: str(package.__version__) for name, package in packages.items()}, "machine": platform.machine(),
    }  # fmt: skip
