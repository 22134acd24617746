"""Speed of exported artifacts in ONNX Runtime against the float32 model of the same architecture, on one thread.

    python benchmarks/engine_speed.py --artifacts runs/r-ort-8 runs/r-ort-4 runs/r-ort-2 --out engine_speed.json

All models take turns, so that a busy machine slows them alike; a turn is one call to warm the caches and a few that are
timed, and a ratio is that of the same turn.
The float model is built from the first artifact (its weights dequantized, batch norm folded) unless `--float-onnx` names
one, and is fed normalized float32 images; the integer engines start from uint8 pixels.
"""

from __future__ import annotations

import argparse
import functools
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from edgeguard import files
from edgeguard.artifact import Artifact
from edgeguard.errors import EdgeGuardError
from edgeguard.export.float_onnx import float_onnx
from edgeguard.targets import cpu_flags
from edgeguard.targets.ort import open_session
from edgeguard.targets.timing import interleave

SCHEMA = "edgeguard.engine_speed/1"
FLOAT = "float32"


def measure(sessions: dict[str, Any], shape: tuple[int, int, int], batch: int, seconds: float, turns: int) -> dict[str, Any]:
    """Milliseconds per image of every session: {name: (turns,) float64} for wall and CPU time."""
    rng = np.random.default_rng(batch)
    pixels = rng.integers(0, 256, (batch, *shape)).astype(np.uint8)
    inputs = {"tensor(uint8)": pixels, "tensor(float)": ((pixels / 255 - 0.47) / 0.25).astype(np.float32)}
    calls = {
        name: functools.partial(session.run, None, {session.get_inputs()[0].name: inputs[session.get_inputs()[0].type]})
        for name, session in sessions.items()
    }
    end = time.perf_counter() + seconds
    times = interleave(calls, lambda rounds: time.perf_counter() < end or rounds < turns)
    scale = 1e3 / batch
    return {"wall": {name: entry.wall.mean(1) * scale for name, entry in times.items()},
            "cpu": {name: entry.cpu.mean(1) * scale for name, entry in times.items()}}  # fmt: skip


def summary(times: dict[str, Any], batch: int) -> list[dict[str, Any]]:
    """One row per model: median milliseconds per image, and how many times faster than float32 with quartiles."""
    rows = []
    for name, wall in times["wall"].items():
        row: dict[str, Any] = {"model": name, "batch": batch, "turns": len(wall)}
        row["ms_per_image"] = float(np.median(wall))
        for clock in ("wall", "cpu"):
            ratio = times[clock][FLOAT] / times[clock][name]
            low, middle, high = np.quantile(ratio, (0.25, 0.5, 0.75))
            row[f"speedup_{clock}"] = {"median": float(middle), "quartiles": [float(low), float(high)]}
        rows.append(row)
    return rows


def sizes(path: Path) -> dict[str, int]:
    """Bytes of a model's file, and of the weights of its layers in it."""
    layers = ("Conv", "Gemm", "QLinearConv", "QGemm")
    model = onnx.load(path)
    casts = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    index = {"Conv": 1, "Gemm": 1, "QLinearConv": 3, "QGemm": 3}
    names = {node.input[index[node.op_type]] for node in model.graph.node if node.op_type in layers}
    stored = {casts.get(name, name) for name in names}
    weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer if tensor.name in stored)
    return {"file_bytes": path.stat().st_size, "weight_bytes": weights}


def run(paths: list[Path], float_path: Path | None, batches: list[int], seconds: float, turns: int) -> dict[str, Any]:
    """The whole benchmark: a JSON document of schema `edgeguard.engine_speed/1`."""
    artifacts = {f"{artifact.width} bit": artifact for artifact in map(Artifact.load, paths)}
    first = next(iter(artifacts.values()))
    with tempfile.TemporaryDirectory() as folder:
        if float_path is None:
            float_path = Path(folder) / "float.onnx"
            onnx.save(float_onnx(first.graph()), float_path)
        models = {FLOAT: float_path, **{name: artifact.onnx for name, artifact in artifacts.items()}}
        sessions = {name: open_session(path, threads=1) for name, path in models.items()}
        shape = first.graph().input_shape
        rows = [row for batch in batches for row in summary(measure(sessions, shape, batch, seconds, turns), batch)]
        files_of = {name: sizes(path) for name, path in models.items()}
        hashes = {name: files.sha256(path) for name, path in models.items()}
    largest = max(entry["weight_bytes"] for name, entry in files_of.items() if name != FLOAT)
    for entry in files_of.values():
        entry["weight_share"] = entry["weight_bytes"] / largest
    return {
        "schema": SCHEMA, "threads": 1, "seconds": seconds, "rows": rows, "files": files_of, "sha256": hashes,
        "environment": {
            "python": platform.python_version(), "onnxruntime": onnxruntime.__version__,
            "machine": platform.machine(), "cpu_flags": cpu_flags(),
        },
    }  # fmt: skip


def table(document: dict[str, Any]) -> str:
    """The results for people."""
    lines = [f"{'model':>10} {'batch':>6} {'ms/image':>9}  times over float32 (quartiles)    by CPU time"]
    for row in document["rows"]:
        wall, cpu = row["speedup_wall"], row["speedup_cpu"]
        spread = f"{wall['median']:.2f} ({wall['quartiles'][0]:.2f} to {wall['quartiles'][1]:.2f})"
        lines.append(f"{row['model']:>10} {row['batch']:>6} {row['ms_per_image']:>9.3f}  {spread:<33}"
                     f" {cpu['median']:.2f}")  # fmt: skip
    lines += ["", f"{'model':>10} {'file bytes':>11} {'weight bytes':>13}  of the largest integer model's weights"]
    for name, entry in document["files"].items():
        sizes_text = f"{entry['file_bytes']:>11,} {entry['weight_bytes']:>13,}"
        lines.append(f"{name:>10} {sizes_text}  {entry['weight_share']:.3f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=Path, nargs="+", required=True, help="folders that `edgeguard export` wrote")
    parser.add_argument("--float-onnx", type=Path, help="a float32 model to compare with; built when not given")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring time of each batch size")
    parser.add_argument("--turns", type=int, default=50, help="turns of each model at least; few for large models")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    try:
        document = run(options.artifacts, options.float_onnx, options.batch, options.seconds, options.turns)
        if options.out:
            files.write_json(options.out, document)
    except EdgeGuardError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
    print(table(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
