"""ONNX Runtime on the CPU, the default target.

x86 CPUs without VNNI instructions add pairs of uint8 x int8 products in 16 bits, which saturates: wrong logits on
bright images. The session option `session.x64quantprecision` avoids that, and makes other CPUs two to three times
slower, so it is set where a product of two known numbers comes out wrong.
"""

from __future__ import annotations

import base64
import functools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import EngineError, InputError, require
from edgeguard.targets import BaseEngine

PROVIDER = "CPUExecutionProvider"
PRECISION = "session.x64quantprecision"
PRODUCT = base64.b64decode(  # an ONNX model: c = MatMulInteger(a, b), uint8 (1, 4) times int8 (4, 1)
    "CAU6XAoYCgFhCgFiEgFjIg1NYXRNdWxJbnRlZ2VyEgFnWhMKAWESDgoMCAISCAoCCAEKAggEWhMKAWISDgoMCAMSCAoCCAQKAggBYhMKAWMSDg"
    "oMCAYSCAoCCAEKAggBQgQKABAK"
)


class OrtEngine(BaseEngine):
    """An exported ONNX model in ONNX Runtime.

    Args:
        threads: intra-op threads; 0 leaves the choice to the runtime.
        wide: whether weights may be so large that products saturate on some CPUs; see `session_options`.

    Raises:
        EngineError: the runtime cannot load the model, or the model has other inputs or outputs.
        MissingDependency: onnxruntime is not installed.
    """

    name = "ort"

    def __init__(self, path: Path, input_shape: tuple[int, int, int], num_classes: int, threads: int = 0,
                 wide: bool = True) -> None:  # fmt: skip
        super().__init__(input_shape, num_classes)
        self.threads, self.wide = threads, wide
        self._session = open_session(path, threads, wide=wide)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        types = [value.type for value in (*inputs, *outputs)]
        if types != ["tensor(uint8)", "tensor(float)"]:
            raise EngineError(f"{path}: expected uint8 pixels in and float32 logits out, got {', '.join(types)}")
        self._input, self._outputs = inputs[0].name, [outputs[0].name]

    def _logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        try:
            logits: NDArray[np.float32] = self._session.run(self._outputs, {self._input: images})[0]
        except Exception as exc:  # the runtime's exceptions have no common base below Exception
            raise EngineError(f"onnxruntime failed to run the model: {exc}") from exc
        return logits

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(), "version": require("onnxruntime", None).__version__, "provider": PROVIDER,
            "threads": self.threads, "options": session_options(self.wide),
        }  # fmt: skip

    def close(self) -> None:
        super().close()
        self._session = None


@functools.cache
def saturates() -> bool:
    """Whether this CPU's uint8 x int8 products overflow in the runtime's kernels: tried, not guessed from flags."""
    ort = require("onnxruntime", None)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(PRODUCT, options, providers=[PROVIDER])
    a, b = np.full((1, 4), 255, np.uint8), np.full((4, 1), 127, np.int8)
    return int(session.run(None, {"a": a, "b": b})[0].item()) != 4 * 255 * 127


def session_options(wide: bool = True) -> dict[str, str]:
    """Session configuration entries that this CPU needs. wide: for weights of 8 bits, whose products can saturate."""
    return {PRECISION: "1"} if wide and saturates() else {}


def open_session(path: Path, threads: int = 0, optimized: Path | None = None, wide: bool = True) -> Any:
    """An `onnxruntime.InferenceSession` with the options of every engine here.

    Args:
        optimized: file to which the runtime writes the graph that it will execute, after all its optimizations.

    Raises:
        EngineError: the model cannot be loaded. InputError: that file cannot be written.
    """
    ort = require("onnxruntime", None)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; it warns that an optimized graph is for this machine only
    for key, value in session_options(wide).items():
        options.add_session_config_entry(key, value)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        return ort.InferenceSession(str(path), options, providers=[PROVIDER])
    except Exception as exc:
        if optimized is not None and optimized.exists():  # it is begun after the model was loaded
            raise InputError(f"onnxruntime cannot write {optimized}: {exc}; is the disk full? TMPDIR names another place") from exc
        hint = "; update onnxruntime, or export with --target ort-legacy" if "IR version" in str(exc) else ""
        raise EngineError(f"onnxruntime {ort.__version__} cannot load {path}: {str(exc).strip()}{hint}") from exc


def write_optimized(path: Path, optimized: Path, wide: bool = True) -> str:
    """Write the graph that the runtime executes for a model, and return the provider that executes all of it.

    Raises:
        EngineError: the model cannot be loaded.
    """
    session = open_session(path, optimized=optimized, wide=wide)
    if session.get_providers() != [PROVIDER]:
        raise EngineError(f"onnxruntime chose {session.get_providers()} instead of {PROVIDER} alone")
    return PROVIDER
