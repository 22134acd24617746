"""Speed of an artifact's engine against the float32 model of the same architecture, in the same run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from edgeguard import files, folders
from edgeguard.artifact import MANIFEST, Artifact
from edgeguard.errors import InputError, require
from edgeguard.targets import open_engine
from edgeguard.targets.ort import open_session
from edgeguard.targets.timing import TURN, Times, interleave, speedup

SCHEMA = "edgeguard.bench/1"
FLOAT = "float32"
MEAN, STD = 0.47, 0.25
"""Of normalized random pixels; only their size matters, for denormal numbers would be slow."""
MAX_BATCH = 4096


def bench(artifact: Artifact, batches: tuple[int, ...] = (1, 32), rounds: int = 30, threads: int = 1,
          runtime: str | None = None, on_round: Callable[[], None] = lambda: None) -> dict[str, Any]:  # fmt: skip
    """Measure an engine and the float32 model in ONNX Runtime, taking turns.

    The engine is called as users call it, from uint8 pixels to float32 logits, checks included; the float model gets
    normalized float32 images. Both run on as many threads.

    Args:
        rounds: turns of each model at each batch size, of `TURN` timed calls. on_round: called after each.
        threads: 0 leaves the choice to the runtimes. runtime: see `open_engine`.

    Returns:
        A JSON document of schema `edgeguard.bench/1`. Latencies are milliseconds of a call; throughput is images per
        second at the median latency; the speed-up is over `float32`, by turn.

    Raises:
        InputError: a batch size or number of rounds out of range. MissingDependency: onnx or the runtime.
    """
    if not batches or min(batches) < 1 or max(batches) > MAX_BATCH:
        raise InputError(f"batch sizes must be 1 to {MAX_BATCH}, got {', '.join(map(str, batches)) or 'none'}")
    if rounds < 1:
        raise InputError(f"at least one round is needed, got {rounds}")
    onnx = require("onnx", "train")
    from edgeguard.export.float_onnx import float_onnx

    graph = artifact.graph()
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []

    def more(done: int) -> bool:
        on_round()
        return done < rounds

    with folders.temporary_folder() as folder, open_engine(artifact, runtime, threads) as engine:
        path = folder / "float.onnx"
        onnx.save(float_onnx(graph), path)
        session = open_session(path, threads)
        name = session.get_inputs()[0].name
        for batch in batches:
            pixels = rng.integers(0, 256, (batch, *graph.input_shape), dtype=np.uint8)
            feed = {name: ((pixels / 255 - MEAN) / STD).astype(np.float32)}
            calls: dict[str, Callable[[], object]] = {
                engine.name: functools.partial(engine, pixels), FLOAT: functools.partial(session.run, None, feed),
            }  # fmt: skip
            times = interleave(calls, more)
            rows += [_row(model, batch, times[model], times[FLOAT]) for model in calls]
        description = engine.describe()
    return {
        "schema": SCHEMA, "artifact": str(artifact.path), "target": artifact.target, "width": artifact.width,
        "threads": threads, "rounds": rounds, "calls_per_round": TURN, "rows": rows,
        "environment": {**description, "float32": f"onnxruntime {require('onnxruntime', None).__version__}"},
        "sha256": files.sha256(artifact.path / MANIFEST),
    }  # fmt: skip


def _row(model: str, batch: int, times: Times, reference: Times) -> dict[str, Any]:
    median, p95 = np.quantile(times.wall, (0.5, 0.95)) * 1e3
    return {
        "model": model, "batch": batch, "latency_ms": {"median": float(median), "p95": float(p95)},
        "images_per_second": float(batch / median * 1e3), "speedup": speedup(times, reference),
    }  # fmt: skip
