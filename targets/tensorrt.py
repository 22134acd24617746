"""TensorRT 8.6, 10 and 11 on NVIDIA GPUs: a plan with its metadata beside it, buffers through the CUDA runtime.

A plan runs only on the GPU model and the TensorRT version it was built for, so its metadata is held against both before
TensorRT sees a byte of it. All three versions share the tensor-address API that is used here. Variables that hold
TensorRT objects bear the names of `tests/targets/test_tensorrt_names.py`, which holds every attribute against the
published bindings.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard import files
from edgeguard.errors import ArtifactError, EngineError, InputError, MissingDependency, require
from edgeguard.targets import BaseEngine

SCHEMA = "edgeguard.plan/1"
REQUIRED = {
    "schema": str, "tensorrt": str, "gpu": str, "compute_capability": str, "driver": str, "onnx_sha256": str,
    "plan_sha256": str, "timing_cache_sha256": str, "strongly_typed": bool, "workspace_bytes": int, "profile": dict,
    "layers": list,
}  # fmt: skip
"""Keys of a plan's metadata and their types."""
MUST_MATCH = ("tensorrt", "gpu", "compute_capability")
DRIVER_FILE = Path("/proc/driver/nvidia/version")


class Cuda:
    """The few calls of the CUDA runtime that are needed here, each with its error checked.

    Raises:
        MissingDependency: cuda-python is not installed, or there is no GPU of that number.
    """

    def __init__(self, device: int = 0) -> None:
        self._library = cuda_runtime()
        self.device = device
        try:
            count = self.call("cudaGetDeviceCount")
        except EngineError as exc:
            raise MissingDependency(f"no NVIDIA GPU can be used here: {exc}") from exc
        if not 0 <= device < count:
            raise MissingDependency(f"there is no NVIDIA GPU number {device}; this machine has {count}")
        self.activate()

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime; returns what it gives besides the status.

        Raises:
            EngineError: the status is not success.
        """
        status, *values = getattr(self._library, function)(*arguments)
        if int(status) != 0:
            _, text = self._library.cudaGetErrorString(status)
            raise EngineError(f"{function} failed: {text.decode() if isinstance(text, bytes) else status}")
        return values[0] if values else None

    def activate(self) -> None:
        """Make this GPU the calling thread's."""
        self.call("cudaSetDevice", self.device)

    def to_device(self, target: int, source: int, size: int, stream: Any) -> None:
        kind = self._library.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", target, source, size, kind, stream)

    def to_host(self, target: int, source: int, size: int, stream: Any) -> None:
        kind = self._library.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", target, source, size, kind, stream)

    def describe(self) -> dict[str, str]:
        """`gpu`, `compute_capability` and `driver`."""
        properties = self.call("cudaGetDeviceProperties", self.device)
        name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        return {
            "gpu": name.rstrip("\0"), "compute_capability": f"{properties.major}.{properties.minor}",
            "driver": driver_version(self.call("cudaDriverGetVersion")),
        }  # fmt: skip


def cuda_runtime() -> ModuleType:
    """The module of cuda-python: `cuda.bindings.runtime`, before version 12.6 `cuda.cudart`.

    Raises:
        MissingDependency: neither is installed.
    """
    try:
        return require("cuda.bindings.runtime", "trt")
    except MissingDependency as exc:
        try:
            return require("cuda.cudart", "trt")
        except MissingDependency:
            raise exc from None


def driver_version(cuda: int) -> str:
    """The driver's CUDA version, from what the runtime reports (12040 for 12.4), and its own where the system tells."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", DRIVER_FILE.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        found = None
    own = f"{found[0]}, " if found else ""
    return f"{own}CUDA {cuda // 1000}.{cuda % 1000 // 10}"


def environment(trt: ModuleType, cuda: Cuda) -> dict[str, str]:
    """What a plan depends on: `tensorrt`, `gpu`, `compute_capability`; and `driver`, for the records."""
    return {"tensorrt": str(trt.__version__), **cuda.describe()}


def info_path(plan: Path) -> Path:
    """Where the metadata of a plan is: `model.plan.json` beside `model.plan`."""
    return plan.with_name(f"{plan.name}.json")


def read_plan_info(plan: Path) -> dict[str, Any]:
    """The metadata of a plan.

    Raises:
        ArtifactError: missing, of another schema, incomplete, or the plan is not the one it describes.
    """
    path = info_path(plan)
    try:
        info = files.read_json(path)
    except InputError as exc:
        raise ArtifactError(f"{plan} has no readable metadata: {exc}") from exc
    if not isinstance(info, dict) or info.get("schema") != SCHEMA:
        raise ArtifactError(f"{path} is not of schema {SCHEMA!r}; build the plan again with `edgeguard export`")
    for key, kind in REQUIRED.items():
        if type(info.get(key)) is not kind:
            raise ArtifactError(f"{path}: {key!r} is missing or not a {kind.__name__}")
    if not plan.is_file():
        raise ArtifactError(f"{plan} does not exist, but its metadata does")
    if files.sha256(plan) != info["plan_sha256"]:
        raise ArtifactError(f"{plan} was changed after it was built: its SHA-256 is not the one in {path.name}")
    return info


def check_environment(plan: Path, info: dict[str, Any], here: dict[str, str]) -> None:
    """Hold a plan's metadata against this machine.

    Raises:
        EngineError: it was built by another TensorRT or for another GPU; says which, and what to do.
    """
    if any(info[key] != here[key] for key in MUST_MATCH):
        built, found = ("TensorRT {tensorrt} on {gpu} ({compute_capability})".format(**side) for side in (info, here))
        raise EngineError(f"{plan} was built for {built}, but this is {found}; export the model again on this machine")


def make_logger(trt: ModuleType, messages: list[str]) -> Any:
    """A TensorRT logger that keeps errors instead of printing them. It must outlive the objects that are given it."""
    errors = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)

    class Collector(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in errors:
                messages.append(message)

    return Collector()


def reason(messages: list[str]) -> str:
    """What a failed call left in the log, as the end of a sentence."""
    return f": {messages[-1].strip()}" if messages else ", and TensorRT gave no reason"


def load_plan(trt: ModuleType, logger: Any, messages: list[str], data: bytes, what: str) -> tuple[Any, Any]:
    """The runtime and the engine of a serialized plan; the runtime must outlive the engine.

    Raises:
        EngineError: TensorRT cannot load it.
    """
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise EngineError(f"TensorRT {trt.__version__} cannot load {what}{reason(messages)}")
    return runtime, engine


class TensorRTEngine(BaseEngine):
    """A TensorRT plan on one GPU: pinned host buffers, one stream, any batch (larger ones in parts).

    Args:
        path: `model.plan`; its metadata is beside it.
        device: number of the GPU.

    Raises:
        ArtifactError: the plan or its metadata is missing, altered or incomplete.
        MissingDependency: tensorrt, cuda-python or a GPU is missing.
        EngineError: a plan of another GPU or TensorRT, or with other inputs and outputs.
    """

    name = "trt"

    def __init__(self, path: Path, input_shape: tuple[int, int, int], num_classes: int, device: int = 0) -> None:
        super().__init__(input_shape, num_classes)
        self._release: list[Callable[[], object]] = []
        self._messages: list[str] = []
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self.info = read_plan_info(path)
        trt = require("tensorrt", "trt")
        self._cuda = Cuda(device)
        self._here = environment(trt, self._cuda)
        check_environment(path, self.info, self._here)
        try:
            self._logger = make_logger(trt, self._messages)
            self._runtime, self._engine = load_plan(trt, self._logger, self._messages, path.read_bytes(), str(path))
            self._input, self._output = self._tensor_names(trt, path)
            self._context = self._engine.create_execution_context()
            if self._context is None:
                raise EngineError(f"TensorRT cannot prepare {path}{reason(self._messages)}")
            smallest, _, largest = self._engine.get_tensor_profile_shape(self._input, 0)
            self.batches = int(smallest[0]), int(largest[0])
            self._allocate()
        except BaseException:
            self.close()
            raise

    def _tensor_names(self, trt: ModuleType, path: Path) -> tuple[str, str]:
        """Names of the one input and the one output, whose types and shapes must be an exported model's."""
        found: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {"input": [], "output": []}
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            is_input = self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            dtype, shape = self._engine.get_tensor_dtype(name), tuple(self._engine.get_tensor_shape(name))[1:]
            kind = {trt.DataType.UINT8: "uint8", trt.DataType.FLOAT: "float32"}.get(dtype, str(dtype))
            found["input" if is_input else "output"].append((name, kind, shape))
        expected: dict[str, tuple[str, tuple[int, ...]]] = {
            "input": ("uint8", self.input_shape), "output": ("float32", (self.num_classes,)),
        }  # fmt: skip
        for side, (kind, shape) in expected.items():
            if [tensor[1:] for tensor in found[side]] != [(kind, shape)]:
                wanted = ", ".join(map(str, shape))
                raise EngineError(f"{path}: expected one {side} of {kind} (N, {wanted}), got {found[side]}")
        return found["input"][0][0], found["output"][0][0]

    def _allocate(self) -> None:
        """Buffers for the largest batch, on the GPU and pinned on the host, and the stream."""
        most = self.batches[1]
        self._stream = self._cuda.call("cudaStreamCreate")
        self._release.append(lambda: self._cuda.call("cudaStreamDestroy", self._stream))
        self._pixels, self._pixels_on_gpu = self._buffers((most, *self.input_shape), np.uint8)
        self._scores, self._scores_on_gpu = self._buffers((most, self.num_classes), np.float32)

    def _buffers(self, shape: tuple[int, ...], dtype: type[np.generic]) -> tuple[NDArray[Any], int]:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        pinned = int(self._cuda.call("cudaMallocHost", size))
        self._release.append(lambda: self._cuda.call("cudaFreeHost", pinned))
        on_gpu = int(self._cuda.call("cudaMalloc", size))
        self._release.append(lambda: self._cuda.call("cudaFree", on_gpu))
        memory = (ctypes.c_uint8 * size).from_address(pinned)
        return np.ctypeslib.as_array(memory).view(dtype).reshape(shape), on_gpu

    def _logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        self._cuda.activate()
        most = self.batches[1]
        return np.concatenate([self._run(images[start : start + most]) for start in range(0, len(images), most)])

    def _run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """One batch of at most the profile's largest; below its smallest, black images fill it up."""
        rows = max(len(images), self.batches[0])
        self._pixels[: len(images)] = images
        self._pixels[len(images) : rows] = 0
        pixels, scores = self._pixels[:rows], self._scores[:rows]
        accepted = (
            self._context.set_input_shape(self._input, pixels.shape)
            and self._context.set_tensor_address(self._input, self._pixels_on_gpu)
            and self._context.set_tensor_address(self._output, self._scores_on_gpu)
        )
        self._cuda.to_device(self._pixels_on_gpu, pixels.ctypes.data, pixels.nbytes, self._stream)
        if not accepted or not self._context.execute_async_v3(int(self._stream)):
            raise EngineError(f"TensorRT failed on a batch of {len(images)} images{reason(self._messages)}")
        self._cuda.to_host(scores.ctypes.data, self._scores_on_gpu, scores.nbytes, self._stream)
        self._cuda.call("cudaStreamSynchronize", self._stream)
        logits: NDArray[np.float32] = scores[: len(images)].copy()
        return logits

    def describe(self) -> dict[str, Any]:
        smallest, largest = self.batches
        return {
            **super().describe(), "version": self._here["tensorrt"], "gpu": self._here["gpu"],
            "compute_capability": self._here["compute_capability"], "driver": self._here["driver"],
            "plan_sha256": self.info["plan_sha256"], "batch": [smallest, largest],
        }  # fmt: skip

    def close(self) -> None:
        """Free everything, newest first; a second call does nothing."""
        super().close()
        self._context = None
        self._engine = None
        self._runtime = None
        while self._release:
            self._release.pop()()
