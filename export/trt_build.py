"""From a QDQ ONNX model to a TensorRT plan that computes every convolution and matrix product in INT8.

The same code builds with TensorRT 8.6, 10 and 11. Where networks can be strongly typed (from 10 on, always in 11) they
are, so that the Q/DQ nodes alone decide what is INT8; 8.6 needs its INT8 flag besides. Variables that hold TensorRT
objects bear the names of `tests/targets/test_tensorrt_names.py`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeguard import files, folders
from edgeguard.errors import EngineError, ExportError, InputError, require
from edgeguard.export.trt_layers import LayerPrecision, as_json, read_layers, require_int8, weighted_layers
from edgeguard.export.trt_rules import require_rules
from edgeguard.targets.tensorrt import (
    SCHEMA,
    Cuda,
    TensorRTEngine,
    environment,
    info_path,
    load_plan,
    make_logger,
    reason,
)

MAX_CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class BuildOptions:
    """How to build a plan.

    batches: the smallest, the best and the largest batch of the optimization profile. workspace_bytes: memory that a
    kernel may use for itself. timing_cache: file that keeps kernel timings from build to build; without it, the plan's
    name with the suffix `.timing`. device: number of the GPU.
    """

    batches: tuple[int, int, int] = (1, 32, 128)
    workspace_bytes: int = 1 << 30
    timing_cache: Path | None = None
    device: int = 0

    def __post_init__(self) -> None:
        smallest, best, largest = self.batches
        if not 1 <= smallest <= best <= largest:
            raise InputError(f"batches {self.batches} make no profile; expected smallest <= best <= largest, from 1 on")
        if self.workspace_bytes < 1:
            raise InputError(f"a workspace of {self.workspace_bytes} bytes is none; expected 1 or more")


@dataclass(frozen=True)
class _Built:
    """One build: the serialized plan, the timings it left, and how each layer of the model runs."""

    plan: bytes
    timings: bytes
    layers: tuple[LayerPrecision, ...]
    strongly_typed: bool


def build_plan(onnx_path: Path, plan_path: Path, options: BuildOptions | None = None) -> dict[str, Any]:
    """Build a plan; write it, its metadata (`model.plan.json`) and the timing cache.

    Returns:
        The metadata: see `edgeguard.targets.tensorrt.REQUIRED`; `layers` are those of `LayerPrecision`.

    Raises:
        ExportError: the model breaks a rule of TensorRT, cannot be parsed or built, or a layer is not INT8. No plan is
            written then.
        InputError: the model is no ONNX file, or the timing cache is of another GPU or TensorRT.
        MissingDependency: tensorrt, cuda-python or a GPU is missing.
    """
    options = options or BuildOptions()
    model = load_model(onnx_path)
    trt = require("tensorrt", "trt")
    cuda = Cuda(options.device)
    require_rules(model, version_of(trt))
    cache_path = options.timing_cache or plan_path.with_suffix(".timing")
    built = _build(trt, model, options, cache_path)
    require_int8(built.layers)
    info = {
        "schema": SCHEMA, **environment(trt, cuda), "onnx_sha256": files.sha256(onnx_path),
        "plan_sha256": digest(built.plan), "timing_cache_sha256": digest(built.timings),
        "strongly_typed": built.strongly_typed, "workspace_bytes": options.workspace_bytes,
        "profile": dict(zip(("min", "opt", "max"), options.batches, strict=True)), "layers": as_json(built.layers),
    }  # fmt: skip
    files.write_bytes(cache_path, built.timings)
    files.write_bytes(plan_path, built.plan)
    files.write_json(info_path(plan_path), info)
    return info


def rebuild_spread(
    onnx_path: Path, images: NDArray[np.uint8], repeat: int, options: BuildOptions | None = None
) -> dict[str, Any]:
    """Build the same model several times, each with its own timings, and compare the plans and what they answer.

    Args:
        images: (N, 3, H, W) uint8.
        repeat: number of builds, 2 or more.

    Returns:
        `builds`, `plan_sha256` of each, `distinct_plans`, `images`, `max_difference` of a logit from the first build's,
        and `decisions_differing`: images on which not all builds decide alike.
    """
    if repeat < 2:
        raise InputError(f"{repeat} builds have no spread; expected 2 or more")
    options = options or BuildOptions()
    output = load_model(onnx_path).graph.output[0]
    classes = output.type.tensor_type.shape.dim[1].dim_value
    hashes, logits = [], []
    with folders.temporary_folder() as folder:
        for index in range(repeat):
            plan = folder / f"{index}.plan"
            own = BuildOptions(options.batches, options.workspace_bytes, None, options.device)
            hashes.append(build_plan(onnx_path, plan, own)["plan_sha256"])
            channels, height, width = images.shape[1:]
            with TensorRTEngine(plan, (channels, height, width), classes, options.device) as engine:
                logits.append(engine(images))
    return {"builds": repeat, "plan_sha256": hashes, **spread(logits), "distinct_plans": len(set(hashes))}


def spread(logits: Sequence[NDArray[np.float32]]) -> dict[str, Any]:
    """How far several (N, classes) answers to the same images lie apart."""
    stack = np.stack(logits).astype(np.float64)
    decisions = stack.argmax(2)
    return {
        "images": stack.shape[1], "max_difference": float(np.abs(stack - stack[0]).max()),
        "decisions_differing": int((decisions != decisions[0]).any(0).sum()),
    }  # fmt: skip


def load_model(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except FileNotFoundError as exc:
        raise InputError(f"{path} does not exist") from exc
    except Exception as exc:  # protobuf's exceptions are not onnx's, and differ between its implementations
        raise InputError(f"{path} is not a readable ONNX file: {exc}") from exc


def version_of(trt: ModuleType) -> tuple[int, int]:
    """(major, minor) of an imported TensorRT."""
    found = re.match(r"(\d+)\.(\d+)", str(trt.__version__))
    if not found:
        raise EngineError(f"TensorRT calls its version {trt.__version__!r}; expected numbers")
    return int(found[1]), int(found[2])


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_cache(path: Path) -> bytes:
    """The bytes of a timing cache; empty when there is none yet."""
    try:
        size = path.stat().st_size
        if size > MAX_CACHE_BYTES:
            raise InputError(f"{path} has {size} bytes, too many for a timing cache; delete it")
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as exc:
        raise InputError(f"cannot read the timing cache {path}: {exc.strerror or exc}") from exc


def _build(trt: ModuleType, model: onnx.ModelProto, options: BuildOptions, cache_path: Path) -> _Built:
    messages: list[str] = []
    logger = make_logger(trt, messages)
    builder = trt.Builder(logger)
    strongly_typed = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    flags = _network_flags(trt)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        raise ExportError(f"TensorRT {trt.__version__} cannot parse the model: {_parser_errors(parser)}")
    config = _config(trt, builder, network, model, options)
    if not strongly_typed and hasattr(trt.BuilderFlag, "INT8"):
        config.set_flag(trt.BuilderFlag.INT8)
    cache = config.create_timing_cache(read_cache(cache_path))
    if not config.set_timing_cache(cache, False):
        raise InputError(f"{cache_path} holds timings of another GPU or TensorRT; delete it or name another file")
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise ExportError(f"TensorRT {trt.__version__} cannot build the model{reason(messages)}")
    plan = bytes(serialized)
    cache = config.get_timing_cache()
    kept = cache.serialize()
    layers = _inspect(trt, logger, messages, plan, weighted_layers(model))
    return _Built(plan, bytes(kept), layers, strongly_typed)


def _network_flags(trt: ModuleType) -> int:
    """Strongly typed where that exists; 8.6 has explicit batches instead, which later releases always have."""
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    if hasattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH"):
        return 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    return 0


def _config(trt: ModuleType, builder: Any, network: Any, model: onnx.ModelProto, options: BuildOptions) -> Any:
    """The builder's configuration: workspace, detailed inspector, exact float32 between the integers, the profile."""
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)
    tensor = network.get_input(0)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    fixed = tuple(dim.dim_value for dim in dims)[1:]
    profile = builder.create_optimization_profile()
    smallest, best, largest = ((batch, *fixed) for batch in options.batches)
    profile.set_shape(tensor.name, smallest, best, largest)
    if config.add_optimization_profile(profile) < 0:
        raise ExportError(f"TensorRT refuses batches of {options.batches} for the input {tensor.name!r}")
    return config


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return "; ".join(error.desc() for error in errors) or "it gave no reason"


def _inspect(
    trt: ModuleType, logger: Any, messages: list[str], plan: bytes, expected: dict[str, str]
) -> tuple[LayerPrecision, ...]:
    runtime, engine = load_plan(trt, logger, messages, plan, "the plan that it has just built")
    inspector = engine.create_engine_inspector()
    document = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    del inspector, engine, runtime  # in this order: each needs the next
    return read_layers(document, expected)
