"""The integers between a deployed runtime's layers: the same model once more, with those tensors as outputs. Needs onnx.

A tensor that is an output has to exist, so the runtime fuses less than in the deployed session: layouts change, and
operations that would have been merged stay apart. Everything else is as deployed: file, optimization level, options,
provider, kernels of each product. Whether that changed an answer can be told from the logits, which come along.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard import folders
from edgeguard.artifact import Artifact
from edgeguard.errors import EngineError, InputError, require
from edgeguard.graph import IntegerGraph
from edgeguard.inttype import zero_point_of
from edgeguard.targets import Images, artifact_runtime, check_images, reference

Values = dict[str, NDArray[Any]]
"""Integers by tensor name, batch first; the float32 logits under the graph's output."""

UNREADABLE = {
    "trt": "a TensorRT plan gives no tensor but its outputs; reading its layers takes another build, which may choose "
    "other kernels",
    "remote": "a server gives the outputs of its model and nothing from inside",
    "twin": "the twin is what other runtimes are compared with",
}
"""Why the layers of a runtime cannot be read."""
ABSENT = "not in the model file under its own name: the writer merged it into an operation"


@dataclass(frozen=True, eq=False)
class LayerReader:
    """Reads tensors of a runtime. names: those that can be read, in the graph's order; skipped: the others, with why."""

    graph: IntegerGraph
    names: tuple[str, ...]
    skipped: Mapping[str, str]
    run: Callable[[Images], Values]

    def __call__(self, images: Images) -> Values:
        """The tensors of `names` and the logits, for images (N, 3, H, W) uint8.

        Raises:
            InputError: images that the model cannot take.
            EngineError: the runtime fails.
        """
        check_images(images, self.graph.input_shape)
        return self.run(np.ascontiguousarray(images))


def layer_values(
    artifact: Artifact, runtime: str | None, images: Images, names: Collection[str] | None = None, threads: int = 0
) -> Values:
    """Tensors of the integer graph as the deployed runtime computes them; arguments and errors as of `open_layers`.

    A name that is missing from the result could not be read; `open_layers` says why.
    """
    return open_layers(artifact, runtime, names, threads)(images)


def open_layers(
    artifact: Artifact, runtime: str | None = None, names: Collection[str] | None = None, threads: int = 0
) -> LayerReader:
    """Load an artifact with tensors of its graph as outputs.

    Args:
        runtime: as `open_engine` spells it; without it that of the artifact's own target.
        names: tensors of the graph; None for all that are quantized.

    Raises:
        InputError: a name that the graph does not have, a runtime that the artifact was not exported for, or one of
            `UNREADABLE`.
        EngineError: the runtime cannot load the model.
        MissingDependency: onnx or the runtime is not installed.
    """
    own = artifact_runtime(artifact)
    runtime = runtime or own
    if runtime in UNREADABLE:
        raise InputError(f"layers of {runtime!r} cannot be read: {UNREADABLE[runtime]}")
    graph = artifact.graph()
    unknown = sorted(set(names or ()) - graph.tensors.keys() - {graph.output})
    if unknown:
        raise InputError(f"the graph has no tensor {unknown[0]!r}")
    inside = [name for name, tensor in graph.tensors.items() if tensor.scale is not None]
    wanted = tuple(name for name in graph.tensors if name in (inside if names is None else names))
    if runtime == "reference":
        return LayerReader(graph, wanted, {}, lambda images: reference.run(graph, images, wanted))
    if runtime != own or runtime not in ("ort", "openvino"):
        raise InputError(f"{artifact.path} was exported for {own!r}; its layers cannot be read in {runtime!r}")
    skipped = {name: ABSENT if name in inside else "it is not a quantized tensor" for name in wanted}
    sources = {name: source for name, source in _sources(artifact.onnx, graph, runtime).items() if name in skipped}
    skipped = {name: reason for name, reason in skipped.items() if name not in sources}
    names = tuple(name for name in wanted if name in sources)
    profile = artifact.manifest.get("profile") or {}
    execute = _session(artifact.onnx, graph, runtime, [sources[name].output for name in names], threads,
                       profile.get("saturates") is not False)  # fmt: skip

    def run(images: Images) -> Values:
        logits, *found = execute(images)
        return {
            **{name: sources[name].integers(values) for name, values in zip(names, found, strict=True)},
            graph.output: logits,
        }

    return LayerReader(graph, names, skipped, run)


@dataclass(frozen=True)
class _Source:
    """Where a tensor's integers are: `(value - zero_point) / scale` of an output that the model gets."""

    output: str
    zero_point: int = 0
    scale: float = 1.0

    def integers(self, values: NDArray[Any]) -> NDArray[np.int16]:
        if values.dtype != np.uint8:
            values = np.rint(values / np.float32(self.scale))
        found: NDArray[np.int16] = values.astype(np.int16) - np.int16(self.zero_point)
        return found


def _sources(path: Path, graph: IntegerGraph, runtime: str) -> dict[str, _Source]:
    """Every quantized tensor of the file.

    ONNX Runtime: the tensor itself. OpenVINO: the real values of its first reader. As long as only those are looked
    at, the pair of QuantizeLinear and DequantizeLinear stays what the runtime takes for a quantizer.
    """
    onnx = require("onnx", "train")
    body = onnx.load(path, load_external_data=False).graph
    quantized = {name: tensor for name, tensor in graph.tensors.items() if tensor.scale is not None}
    if runtime == "ort":
        there = {output for node in body.node for output in node.output}
        return {name: _Source(name, zero_point_of(quantized[name].dtype)) for name in quantized if name in there}
    constants = {tensor.name: tensor for tensor in body.initializer}
    found: dict[str, _Source] = {}
    for node in body.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in quantized and node.input[1] in constants:
            scale = onnx.numpy_helper.to_array(constants[node.input[1]])
            if scale.size == 1:
                found.setdefault(node.input[0], _Source(node.output[0], scale=float(scale.item())))
    return found


def _session(path: Path, graph: IntegerGraph, runtime: str, outputs: list[str], threads: int,
             wide: bool) -> Callable[[Images], list[NDArray[Any]]]:  # fmt: skip
    """The model with further outputs, in its runtime: from images to the logits and those outputs."""
    onnx = require("onnx", "train")
    model = onnx.load(path, load_external_data=False)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs)
    with folders.temporary_folder() as folder:
        larger = folder / "layers.onnx"
        larger.write_bytes(model.SerializeToString())
        if runtime == "ort":
            from edgeguard.targets.ort import open_session

            session = open_session(larger, threads, wide=wide)
            names = [graph.output, *outputs]
            return _guarded(runtime, lambda images: session.run(names, {graph.input: images}))
        from edgeguard.targets.openvino import compile_model

        compiled = compile_model(larger, threads)

    def run(images: Images) -> list[NDArray[Any]]:
        result = compiled({0: images})
        return [np.array(result[index]) for index in range(1 + len(outputs))]  # the runtime may reuse its buffers

    return _guarded(runtime, run)


def _guarded(runtime: str, run: Callable[[Images], list[NDArray[Any]]]) -> Callable[[Images], list[NDArray[Any]]]:
    def guarded(images: Images) -> list[NDArray[Any]]:
        try:
            return run(images)
        except Exception as exc:  # the runtimes' exceptions have no common base below Exception
            raise EngineError(f"{runtime} failed to run the model with its layers as outputs: {exc}") from exc

    return guarded
