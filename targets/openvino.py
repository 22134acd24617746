"""OpenVINO on the CPU, and what it says about the kernels it chose.

Its default precision is bfloat16 on CPUs that have it, which changes what is left between integer layers; every model
here is compiled for float32. Source of the runtime graph's keys: OpenVINO's `ov::exec_model_info`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import EngineError, InputError, require
from edgeguard.targets import BaseEngine

DEVICE = "CPU"
PRECISION = "f32"
INTEGER = frozenset({"u8", "i8"})
"""Runtime precisions of data whose products are summed in integers."""

MOVES = frozenset({
    "AdaptivePooling", "Broadcast", "Concatenation", "Const", "Convert", "Eltwise", "FakeQuantize", "Gather", "Input",
    "Math", "Output", "Pad", "Pooling", "Reduce", "Reorder", "Reshape", "ShapeOf", "ShuffleChannels", "Split",
    "StridedSlice", "Subgraph", "Transpose",
})  # fmt: skip
"""Kinds of runtime nodes without multiply-accumulates of their own. Any other has to be a layer's, or counts as float."""

WITHOUT_BIAS = "/WithoutBiases"
"""What the ONNX reader appends to the name of a product that it separates from its bias."""


@dataclass(frozen=True)
class Kernel:
    """One node of the runtime graph that multiplies and accumulates, or whose kind is unknown.

    precision, weight_precision: of the data and of the second input as the runtime spells them, e.g. "u8"; empty where
    it does not tell. weight: name of the second input, and weights: its elements, 0 where unknown. origins: names of
    the model's operations that it executes.
    """

    name: str
    kind: str
    precision: str
    weight_precision: str
    primitive: str
    weight: str
    weights: int
    origins: tuple[str, ...]

    @property
    def integer(self) -> bool:
        return {self.precision, self.weight_precision} <= INTEGER

    def executes(self, layer: str) -> bool:
        """Whether this kernel is a layer's product: by the names of its weights and of the operations it fuses."""
        return self.weight == f"{layer}/weight" or any(
            name == layer or name.startswith(layer + WITHOUT_BIAS) for name in self.origins
        )

    def __str__(self) -> str:
        return f"{self.kind} {self.primitive} {self.precision}x{self.weight_precision}"


class OpenVinoEngine(BaseEngine):
    """An exported QDQ model in OpenVINO.

    Args:
        threads: of one inference; 0 leaves the choice to the runtime.

    Raises:
        InputError: a negative number of threads.
        EngineError: the runtime cannot load the model, or the model has other inputs or outputs.
        MissingDependency: openvino is not installed.
    """

    name = "openvino"

    def __init__(self, path: Path, input_shape: tuple[int, int, int], num_classes: int, threads: int = 0) -> None:
        super().__init__(input_shape, num_classes)
        if threads < 0:
            raise InputError(f"{threads} threads make no sense; expected 0 (the runtime's choice) or more")
        self.threads = threads
        self._compiled = compile_model(path, threads)
        self._device = ", ".join(self._compiled.get_property("EXECUTION_DEVICES"))
        ports = (*self._compiled.inputs, *self._compiled.outputs)
        types = [port.get_element_type().get_type_name() for port in ports]
        if types != ["u8", "f32"] or len(self._compiled.inputs) != 1:
            raise EngineError(f"{path}: expected uint8 pixels in and float32 logits out, got {', '.join(types)}")
        self._kernels: tuple[Kernel, ...] | None = None

    def _logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        try:
            result = self._compiled({0: images})[0]
        except Exception as exc:  # the runtime's exceptions have no common base below Exception
            raise EngineError(f"openvino failed to run the model: {_sentence(exc)}") from exc
        return np.array(result)  # the runtime may reuse its buffer

    def kernels(self) -> tuple[Kernel, ...]:
        """Every kernel that multiplies and accumulates, from the runtime's own graph, in order of execution.

        Kernels of a dynamic batch are chosen when it first runs, so a black image runs before they are read.

        Raises:
            EngineError: the engine is closed.
        """
        if self._kernels is None:
            self(np.zeros((1, *self.input_shape), np.uint8))
            self._kernels = read_kernels(self._compiled.get_runtime_model())
        return self._kernels

    def describe(self) -> dict[str, Any]:
        openvino = require("openvino", "openvino")
        return {
            **super().describe(), "version": openvino.get_version(), "provider": DEVICE,
            "device": self._device, "threads": self.threads, "options": {"INFERENCE_PRECISION_HINT": PRECISION},
            "kernels": [_record(kernel) for kernel in self.kernels()],
        }  # fmt: skip

    def close(self) -> None:
        super().close()
        self._compiled = None


def _record(kernel: Kernel) -> dict[str, Any]:
    return {
        "name": kernel.name, "kind": kernel.kind, "precision": kernel.precision,
        "weight_precision": kernel.weight_precision, "primitive": kernel.primitive,
    }  # fmt: skip


def compile_model(path: Path, threads: int = 0) -> Any:
    """An `openvino.CompiledModel` on the CPU with the options of every engine here.

    Raises:
        EngineError: the runtime cannot load the model.
        MissingDependency: openvino is not installed.
    """
    openvino = require("openvino", "openvino")
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": PRECISION, "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        core = openvino.Core()
        return core.compile_model(core.read_model(str(path)), DEVICE, options)
    except Exception as exc:
        raise EngineError(f"openvino {openvino.__version__} cannot load {path}: {_sentence(exc)}") from exc


def _sentence(error: Exception) -> str:
    """The last line of a runtime's message, which is the reason; those before say where in its sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def read_kernels(runtime_model: Any) -> tuple[Kernel, ...]:
    """Every node of an OpenVINO runtime model that is not in `MOVES`."""
    found = []
    for node in runtime_model.get_ordered_ops():
        kind = _info(node, "layerType")
        if kind in MOVES:
            continue
        source = node.input_value(1) if node.get_input_size() > 1 else None
        shape = source.get_partial_shape() if source is not None else None
        found.append(Kernel(
            node.get_friendly_name(), kind, _info(node, "runtimePrecision"),
            "" if source is None else _info(source.get_node(), "outputPrecisions"), _info(node, "primitiveType"),
            "" if source is None else source.get_node().get_friendly_name(),
            int(np.prod(list(shape.to_shape()))) if shape is not None and shape.is_static else 0,
            tuple(_info(node, "originalLayersNames").split(",")),
        ))  # fmt: skip
    return tuple(found)


def _info(node: Any, key: str) -> str:
    info = node.get_rt_info()
    if key not in info:
        return ""
    value = info[key]
    return str(value.astype(str)) if hasattr(value, "astype") else str(value)
