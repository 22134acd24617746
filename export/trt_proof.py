"""What is proved of an export for TensorRT: its rules are kept, the numbers are right, and what the plan computes in.

Whether every layer becomes an INT8 kernel is known only once TensorRT has built a plan, so without one the coverage is 0
and the layers say that nothing was built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeguard.export.trt_rules import require_rules
from edgeguard.graph import Conv, IntegerGraph, Linear
from edgeguard.targets import Engine, reference
from edgeguard.targets.ort import OrtEngine

VERSIONS = ((8, 6), (10, 3), (11, 4))
"""Releases of TensorRT whose rules an export must keep: JetPack's and today's."""
INTEGER_BITS, FLOAT_BITS = 8, 32
BATCH = 32
STORAGE_BITS = 8
NOT_BUILT = "no plan built"


def prove_onnx(graph: IntegerGraph, path: Path, images: NDArray[np.uint8]) -> dict[str, Any]:
    """Hold a QDQ model against TensorRT's published rules, and against the reference in ONNX Runtime.

    images: (N, 3, H, W) uint8 real images.

    Returns: the keys of `edgeguard.export.proof.prove`, `agreement` (share of equal decisions) and `built`: False.

    Raises:
        ExportError: the model breaks a rule; says which and where.
    """
    model = onnx.load(path, load_external_data=False)
    for version in VERSIONS:
        require_rules(model, version)
    with OrtEngine(path, graph.input_shape, graph.num_classes) as engine:
        compared = _compare(graph, engine, images)
    layers = [_layer(graph, node) for node in graph.nodes if isinstance(node, Conv | Linear)]
    return {
        "integer_mac_coverage": 0.0,
        "built": False,
        "macs": sum(layer["macs"] for layer in layers),
        "allowed": all(layer["allowed"] for layer in layers),
        **compared,
        "foreign": [],
        "runtime": {"runtime": "trt", "built": False, "compared_in": "onnxruntime"},
        "layers": layers,
    }


def prove_plan(
    graph: IntegerGraph, path: Path, plan: Path, images: NDArray[np.uint8], repeat: int = 1
) -> dict[str, Any]:  # pragma: no cover - needs TensorRT and a GPU
    """Build a plan beside the ONNX model, and hold its layers against INT8 and its logits against the reference.

    repeat: builds in all; from 2 on, `rebuilds` says how far they lie apart.

    Returns: the keys of `prove_onnx`, `built`: True, and `plan`: its metadata.

    Raises:
        ExportError: the model breaks a rule, cannot be built, or a layer is not INT8.
        MissingDependency: TensorRT, its CUDA bindings or a GPU is missing.
    """
    from edgeguard.export.trt_build import build_plan, rebuild_spread
    from edgeguard.targets.tensorrt import TensorRTEngine

    proof = prove_onnx(graph, path, images)
    info = build_plan(path, plan)
    built = {layer["name"]: layer for layer in info["layers"]}
    for layer in proof["layers"]:
        found = built[layer["name"]]
        layer["compute_bits"] = INTEGER_BITS if found["precision"] == "int8" else FLOAT_BITS
        layer["kernel"] = f"{found['kernel']} ({found['precision']})"
    with TensorRTEngine(plan, graph.input_shape, graph.num_classes) as engine:
        proof |= _compare(graph, engine, images)
        proof["runtime"] = engine.describe()
    integer = sum(layer["macs"] for layer in proof["layers"] if layer["compute_bits"] == INTEGER_BITS)
    proof |= {"integer_mac_coverage": integer / proof["macs"], "built": True, "plan": info}
    if repeat > 1:
        proof["rebuilds"] = rebuild_spread(path, images, repeat)
    return proof


def _compare(graph: IntegerGraph, engine: Engine, images: NDArray[np.uint8]) -> dict[str, Any]:
    """How far an engine's logits are from the reference's."""
    got, expected = [], []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        got.append(engine(batch))
        expected.append(reference.run(graph, batch)[graph.output])
    logits, truth = np.concatenate(got), np.concatenate(expected)
    return {
        "images": len(images),
        "identical": bool(np.array_equal(logits, truth)),
        "agreement": float((logits.argmax(1) == truth.argmax(1)).mean()),
        "max_difference": float(np.abs(logits.astype(np.float64) - truth).max()),
    }


def _layer(graph: IntegerGraph, node: Conv | Linear) -> dict[str, Any]:
    return {
        "name": node.name, "op": "linear" if isinstance(node, Linear) else "conv" if node.groups == 1 else "grouped conv",
        "macs": graph.macs(node), "storage_bits": STORAGE_BITS, "compute_bits": 0, "kernel": NOT_BUILT,
        "allowed": node.weight_type.allowed(node.weight),
    }  # fmt: skip
