"""Deployed runtimes behind one protocol: `with open_engine(artifact) as engine: logits = engine(images)`."""

from __future__ import annotations

import contextlib
import platform
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edgeguard.artifact import Artifact
from edgeguard.errors import EngineError, InputError, require
from edgeguard.pool_artifact import Pool, load_model

if TYPE_CHECKING:
    from edgeguard.targets.random_precision import RandomPrecisionEngine

Images = NDArray[np.uint8]
"""(N, 3, H, W) uint8 RGB."""
Logits = NDArray[np.float32]
"""(N, classes) float32."""

RUNTIMES = ("ort", "reference", "twin")
"""Engines whose logits are the same bits."""
PLAN = "model.plan"
Own = TypeVar("Own", bound="BaseEngine")
OTHERS = ("openvino", "trt")
"""Engines that may differ by a step, and execute artifacts of their own targets only."""


@runtime_checkable
class Engine(Protocol):
    """A runtime that executes an artifact. Use it as a context manager.

    Calling it raises InputError for images it cannot take and EngineError when the runtime fails.
    """

    @property
    def name(self) -> str:
        """The runtime, as `open_engine` spells it."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(3, H, W)."""

    @property
    def num_classes(self) -> int: ...

    def __call__(self, images: Images) -> Logits:
        """(N, 3, H, W) uint8 to (N, classes) float32."""

    def describe(self) -> dict[str, Any]:
        """What ran, for the records: runtime, version, provider, threads, CPU flags."""

    def close(self) -> None:
        """Release the runtime; calling the engine afterwards is an EngineError."""

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class BaseEngine(ABC):
    """What all engines share: checks around a call, closing, and the description of the machine.

    A runtime implements `_logits` on checked images, and extends `describe` and `close`.
    """

    name = ""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        self.input_shape = input_shape
        self.num_classes = num_classes
        self._closed = False

    def __call__(self, images: Images) -> Logits:
        if self._closed:
            raise EngineError(f"the {self.name} engine is closed")
        check_images(images, self.input_shape)
        logits = self._logits(np.ascontiguousarray(images))
        expected = (len(images), self.num_classes)
        if logits.shape != expected or logits.dtype != np.float32:
            raise EngineError(f"{self.name} returned {logits.shape} {logits.dtype}, expected {expected} float32 logits")
        if not np.isfinite(logits).all():
            raise EngineError(f"{self.name} returned logits that are not finite")
        return logits

    @abstractmethod
    def _logits(self, images: Images) -> Logits:
        """(N, classes) float32 of images (N, C, H, W) uint8 that were checked and are contiguous."""

    def describe(self) -> dict[str, Any]:
        return {"runtime": self.name, "machine": platform.machine(), "cpu_flags": cpu_flags()}

    def close(self) -> None:
        self._closed = True

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_engine(artifact: Artifact | Pool | Path | str, runtime: str | None = None, threads: int = 0) -> Engine:
    """Load an artifact into a runtime; of a pool every member, behind one engine that draws one of them for each batch.

    Args:
        artifact: or the folder of one.
        runtime: one of `RUNTIMES` or `OTHERS`; without it that of the artifact's own target.
        threads: threads of one operation; 0 leaves the choice to the runtime. The reference uses NumPy's.

    Raises:
        InputError: an unknown runtime, one that the artifact was not exported for, or a negative number of threads.
        ArtifactError: the folder is neither an artifact nor a pool.
        MissingDependency: the runtime is not installed; says how to install it.
        EngineError: the runtime cannot load the model.
    """
    if not isinstance(artifact, Artifact | Pool):
        artifact = load_model(artifact)
    if isinstance(artifact, Pool):
        return open_pool(artifact, runtime, threads)
    own = artifact_runtime(artifact)
    runtime = runtime or own
    if threads < 0:
        raise InputError(f"{threads} threads make no sense; expected 0 (the runtime's choice) or more")
    if runtime == "reference":
        from edgeguard.targets.reference import ReferenceEngine

        return ReferenceEngine(artifact.graph())
    if runtime == "twin":
        require("torch", "train")
        from edgeguard.targets.twin import TwinEngine

        return TwinEngine(artifact.graph(), threads=threads)
    if runtime not in (*RUNTIMES, *OTHERS):
        raise InputError(f"unknown runtime {runtime!r}; expected one of {', '.join((*RUNTIMES, *OTHERS))}")
    if runtime != own:
        raise InputError(f"{artifact.path} was exported for {own!r}; {runtime!r} cannot execute it, export it for that target")
    return _deployed(artifact, runtime, threads)


def open_pool(pool: Pool, runtime: str | None = None, threads: int = 0) -> RandomPrecisionEngine:
    """Load every member of a pool; runtime, threads and errors as `open_engine`."""
    from edgeguard.targets.random_precision import RandomPrecisionEngine

    with contextlib.ExitStack() as opened:
        members: dict[str, Engine] = {}
        for artifact in pool.artifacts:
            members[artifact.width] = opened.enter_context(open_engine(artifact, runtime, threads))
        engine = RandomPrecisionEngine(members, pool.probabilities, pool.seed)
        opened.pop_all()  # the engine closes them from here on
    return engine


def _deployed(artifact: Artifact, runtime: str, threads: int) -> Engine:
    channels, height, width = artifact.manifest["input_shape"]
    shape, classes = (channels, height, width), artifact.manifest["num_classes"]
    if runtime == "openvino":
        from edgeguard.targets.openvino import OpenVinoEngine

        return OpenVinoEngine(artifact.onnx, shape, classes, threads)
    if runtime == "trt":
        plan = artifact.path / PLAN
        if not plan.is_file():
            raise InputError(f"{artifact.path} holds no {PLAN}: it was exported with --onnx-only; export it without")
        from edgeguard.targets.tensorrt import TensorRTEngine

        return TensorRTEngine(plan, shape, classes)
    from edgeguard.targets.ort import OrtEngine

    profile = artifact.manifest.get("profile") or {}
    return OrtEngine(artifact.onnx, shape, classes, threads, wide=profile.get("saturates") is not False)


def artifact_runtime(artifact: Artifact) -> str:
    """The runtime that an artifact was exported for; before there were target profiles it had the target's name."""
    profile = artifact.manifest.get("profile")
    return str(profile.get("runtime")) if isinstance(profile, dict) else artifact.target


def check_images(images: Any, expected: tuple[int, int, int]) -> None:
    """The one check of an engine's input.

    Raises:
        InputError: saying the tensor, what was got and what was expected.
    """
    got = f"{getattr(images, 'dtype', type(images).__name__)} {getattr(images, 'shape', '')}".rstrip()
    wanted = f"uint8 (N, {', '.join(map(str, expected))}) with N of at least 1"
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != expected:
        raise InputError(f"tensor 'pixels': got {got}, expected a NumPy array of {wanted}")
    if len(images) == 0:
        raise InputError(f"tensor 'pixels': got an empty batch, expected {wanted}")


def cpu_flags() -> list[str]:
    """Which instructions decide how this CPU multiplies 8-bit integers; empty where the system does not tell.

    Linux lists them for x86 as `flags` and for ARM as `features`; an emulated CPU's list is the host's, and is not taken.
    """
    relevant = ("sse4_1", "avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").lower().splitlines()
    except OSError:
        return []
    key = "features" if platform.machine().lower().startswith(("aarch64", "arm")) else "flags"
    flags = next((line.split(":")[1].split() for line in lines if line.startswith(key)), [])
    return [flag for flag in relevant if flag in flags]
