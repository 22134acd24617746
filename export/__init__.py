"""From an `IntegerGraph` to an artifact that has proved itself."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgeguard
from edgeguard import folders
from edgeguard.artifact import GRAPH, ONNX_MODEL, Artifact, write_manifest
from edgeguard.errors import ExportError, InputError, require
from edgeguard.graph import Conv, IntegerGraph, Linear
from edgeguard.graph_io import save_graph
from edgeguard.pool_artifact import Pool, check_members, check_probabilities, check_seed, write_pool
from edgeguard.targets import PLAN, check_images
from edgeguard.targets.profiles import TargetProfile, load_profile

PACKAGES = {"ort": ("onnxruntime", None), "openvino": ("openvino", "openvino"), "trt": ("tensorrt", "trt")}
"""What proves an export for each runtime, and the extra that installs it."""


def export_artifact(
    graph: IntegerGraph, out: Path, *, target: str | TargetProfile, width: str, weight_bits: int, activation_bits: int,
    images: NDArray[np.uint8], source: dict[str, Any], allow_float: bool = False, onnx_only: bool = False, repeat: int = 1,
) -> Artifact:  # fmt: skip
    """Write the graph, the runtime's model and the manifest to a new folder, and prove the result.

    Args:
        out: must not exist; on failure nothing is left there.
        target: a profile, or what `load_profile` takes.
        width: as users write it, e.g. "4" or "w4a8".
        images: (N, 3, H, W) uint8 real images for the proof.
        source: what the graph was lowered from, for the records.
        allow_float: keep an artifact that computes in float or differs from the reference; the manifest says so.

        onnx_only: for TensorRT, where it is not installed: no plan, and a proof that leaves the runtime open.
        repeat: for TensorRT: builds of the plan, whose spread the proof reports.

    Raises:
        InputError: an unknown target, wrong images, or a folder that exists.
        ExportError: the graph does not fit the target, or the proof failed; see `edgeguard.export.proof.prove`.
        MissingDependency: onnx or the target's runtime is not installed.
    """
    profile = target if isinstance(target, TargetProfile) else load_profile(target)
    if onnx_only and profile.runtime != "trt":
        raise InputError(f"--onnx-only is for TensorRT targets; {profile.name} is proved by running {profile.runtime}")
    if repeat != 1 and (profile.runtime != "trt" or onnx_only or repeat < 1):
        raise InputError(f"--repeat counts builds of a TensorRT plan, got {repeat} for {profile.name}")
    check_images(images, graph.input_shape)
    _check_weights(graph, profile)
    module, extra = PACKAGES["ort" if onnx_only else profile.runtime]
    packages = {"onnx": require("onnx", "train"), module: require(module, extra)}
    with folders.folder_transaction(out) as folder:
        save_graph(graph, folder / GRAPH)
        _write(graph, folder / ONNX_MODEL, profile)
        proof = _prove(graph, folder / ONNX_MODEL, images, profile, allow_float, onnx_only, repeat)
        write_manifest(folder, {
            "target": profile.name, "profile": profile.to_json(),
            "width": width, "weight_bits": weight_bits, "activation_bits": activation_bits,
            "num_classes": graph.num_classes, "input_shape": list(graph.input_shape),
            "layers": proof.pop("layers"), "proof": proof, "source": source,
            "versions": _versions(packages) | {"cpu_flags": " ".join(proof["runtime"].get("cpu_flags", []))},
        })  # fmt: skip
    return Artifact.load(out)


def export_pool(
    export_member: Callable[[str, Path], Artifact], widths: Sequence[str], out: Path, *,
    probabilities: Sequence[float] | None = None, seed: int | None = None,
) -> Pool:  # fmt: skip
    """Write several artifacts of one model and how one of them is drawn for each batch: all of them, or nothing.

    Args:
        export_member: writes the artifact of one width into a new folder, as `export_artifact` does.
        out: must not exist; on failure nothing is left there.
        probabilities: of the widths; None draws all alike. seed: of the draw; None is fresh entropy at each opening.

    Raises:
        InputError: fewer than two widths, one twice, probabilities or a seed that are none, a folder that exists; and
            whatever `export_member` raises.
    """
    check_members(widths)
    check_seed(seed, "the pool")
    if probabilities is not None:
        check_probabilities(probabilities, "the pool")
        if len(probabilities) != len(widths):
            raise InputError(f"a pool of {len(widths)} members needs as many probabilities, got {len(probabilities)}")
    with folders.folder_transaction(out) as folder:
        for width in widths:
            export_member(width, folder / width)
        write_pool(folder, widths, probabilities, seed)
    return Pool.load(out)


def _check_weights(graph: IntegerGraph, profile: TargetProfile) -> None:
    wide = [n.name for n in graph.nodes if isinstance(n, Conv | Linear) and n.weight_type.bits > profile.weight_bits]
    if wide:
        raise ExportError(
            f"target {profile.name!r} takes weights of at most {profile.weight_bits} bits, which {wide[0]!r} and "
            f"{len(wide) - 1} other layers exceed; harden or calibrate with --target {profile.name}"
        )


def _write(graph: IntegerGraph, path: Path, profile: TargetProfile) -> None:
    """The runtime's ONNX file, of no newer opset and IR version than it loads."""
    if profile.format == "qdq":
        from edgeguard.export.qdq_writer import write_qdq

        write_qdq(graph, path, signed=profile.signed_activations, opset=profile.opset)
        return
    from edgeguard.export.onnx_writer import write_onnx

    write_onnx(graph, path, profile.storage_bits, (profile.opset, profile.ir_version))


def _prove(graph: IntegerGraph, path: Path, images: NDArray[np.uint8], profile: TargetProfile, allow_float: bool,
           onnx_only: bool, repeat: int) -> dict[str, Any]:  # fmt: skip
    """The proof of the target's runtime."""
    if profile.runtime == "openvino":
        from edgeguard.export import openvino_proof

        return openvino_proof.prove(graph, path, images, allow_float)
    if profile.runtime == "trt":
        from edgeguard.export.trt_proof import prove_onnx, prove_plan

        return prove_onnx(graph, path, images) if onnx_only else prove_plan(graph, path, path.with_name(PLAN), images, repeat)
    from edgeguard.export.proof import prove

    return prove(graph, path, images, allow_float, profile.saturates)


def _versions(packages: dict[str, ModuleType]) -> dict[str, str]:
    return {
        "edgeguard": edgeguard.__version__, "python": platform.python_version(), "numpy": np.__version__,
        **{name: str(package.__version__) for name, package in packages.items()}, "machine": platform.machine(),
    }  # fmt: skip
