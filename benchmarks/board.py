"""Deployed engines on an emulated ARM board against the same artifacts on this machine: are the logits the same bits?

    tests/device/prepare_board.sh BOARD
    python benchmarks/board.py BOARD ARTIFACT ... --data 'npz:cifar10-{split}.npz' --out results/board.json

Each artifact is served on the board by `edgeguard serve` and asked over loopback, once for each CPU that qemu shall be, and
held against ONNX Runtime here. The result is written after every row. Exit code 1 where a logit differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from serve_load import serving

from edgeguard import files
from edgeguard.artifact import MANIFEST, Artifact
from edgeguard.data import load_dataset
from edgeguard.errors import EdgeGuardError, EngineError
from edgeguard.targets import cpu_flags, open_engine
from edgeguard.targets.asking import RemoteOptions
from edgeguard.targets.remote import RemoteEngine, read_remote

SCHEMA = "edgeguard.board/1"
EMULATOR = "qemu-aarch64-static"
BATCH, SECONDS = 25, 3600
REMOTE = RemoteOptions(timeout=float(SECONDS))
CPUS = "max,cortex-a72"
"""Of qemu: one with all instructions that it knows, and one without dot products of bytes."""


def said(*command: object) -> str:
    """What a program prints."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=SECONDS)
    if done.returncode != 0:
        raise EngineError(f"{command[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def versions(python: Path) -> dict[str, str]:
    """Of what computes, in an environment."""
    code = ("import json, platform, numpy, onnxruntime, edgeguard; print(json.dumps({'machine': platform.machine(), "
            "'python': platform.python_version(), 'numpy': numpy.__version__, 'onnxruntime': onnxruntime.__version__, "
            "'edgeguard': edgeguard.__version__}))")  # fmt: skip
    found: dict[str, str] = json.loads(said(python, "-c", code).splitlines()[-1])
    return found


def compare(
    python: Path, artifact: Artifact, cpu: str, images: NDArray[np.uint8], expected: NDArray[np.float32]
) -> dict[str, Any]:
    """One row. images: (N, 3, H, W) uint8; expected: (N, classes), of this machine's engine."""
    os.environ["QEMU_CPU"] = cpu
    with serving(artifact.path, "--timeout", SECONDS, python=str(python)) as (url, _):
        model = read_remote(url, REMOTE)
        with RemoteEngine(model, REMOTE) as engine:
            begin = time.perf_counter()
            batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
            found = np.concatenate(list(engine.stream(batches)))
            seconds = time.perf_counter() - begin
    if model.claims.get("artifact_sha256") != files.sha256(artifact.path / MANIFEST):
        raise EngineError(f"{url} serves something else than {artifact.path}")
    return {
        "artifact": artifact.path.name, "width": artifact.width, "cpu": cpu, "machine": model.claims.get("machine"),
        "onnxruntime": model.claims.get("version"), "n": len(images),
        "logits": found.size, "different_logits": int((found.view(np.uint32) != expected.view(np.uint32)).sum()),
        "different_classes": int((found.argmax(1) != expected.argmax(1)).sum()),
        "logits_sha256": hashlib.sha256(found.tobytes()).hexdigest(), "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("board", type=Path, help="folder that tests/device/prepare_board.sh made")
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--cpus", default=CPUS, help="models of CPUs that qemu knows, comma-separated")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    python, cpus = arguments.board / "bin" / "python", arguments.cpus.split(",")
    if not python.is_file():
        parser.error(f"{arguments.board} is no board; tests/device/prepare_board.sh {arguments.board} makes one")
    try:
        artifacts = [Artifact.load(path) for path in arguments.artifacts]
        data = load_dataset(arguments.data, "test")
        images = data.images(np.arange(min(arguments.images, len(data))))
        document: dict[str, Any] = {
            "schema": SCHEMA, "date": date.today().isoformat(), "emulator": said(EMULATOR, "--version").splitlines()[0],
            "system": (arguments.board / "system").read_text().strip(), "board": versions(python),
            "host": {**versions(Path(sys.executable)), "cpu_flags": cpu_flags(), "platform": platform.platform()},
            "data": {"name": data.name, "n": len(images), "sha256": hashlib.sha256(images.tobytes()).hexdigest()},
            "load_average": os.getloadavg()[0], "rows": [],
        }  # fmt: skip
        expected = []
        for artifact in artifacts:
            with open_engine(artifact, threads=1) as engine:
                expected.append(np.concatenate([engine(images[i : i + 100]) for i in range(0, len(images), 100)]))
        for cpu in cpus:
            for artifact, logits in zip(artifacts, expected, strict=True):
                document["rows"].append(compare(python, artifact, cpu, images, logits))
                print(json.dumps(document["rows"][-1]), file=sys.stderr)
                files.write_json(arguments.out, document)
    except EdgeGuardError as exc:
        sys.exit(f"{exc}")
    sys.exit(int(any(row["different_logits"] for row in document["rows"])))


if __name__ == "__main__":
    main()
