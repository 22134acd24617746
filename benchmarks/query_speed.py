"""Speed of Patch-RS (per image, logits) on ONNX Runtime as a share of the engine's own, on one thread.

    python benchmarks/query_speed.py --artifact runs/r-ort-8 --data cifar10 --out query_speed.json

The search and the engine alone take turns. A search of a fixed seed asks the same questions each time; the engine alone
gets calls of exactly those sizes, on images that lie ready, so what differs is all that the search does between its calls.
Images that are fooled leave the search: with more images than fit a batch, batches stay nearly full.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edgeguard import files
from edgeguard.artifact import Artifact
from edgeguard.attacks.api import Images, Labels, Logits, Victim
from edgeguard.attacks.patch_rs import PatchRS
from edgeguard.data import load_splits
from edgeguard.errors import EdgeGuardError
from edgeguard.targets import cpu_flags, open_engine
from edgeguard.targets.timing import TURN, Times, interleave

SCHEMA = "edgeguard.query_speed/1"


def sizes_of(attack: PatchRS, classify: Logits, images: Images, labels: Labels) -> list[int]:
    """Images in each call that a search makes."""
    sizes: list[int] = []

    def noted(batch: Images) -> NDArray[np.float32]:
        sizes.append(len(batch))
        return classify(batch)

    attack.run(Victim(classify=noted), images, labels)
    return sizes


def summary(times: dict[str, Times], sizes: list[int]) -> dict[str, Any]:
    """Images per second, and the search's share of the engine's throughput turn by turn: median and quartiles."""
    document: dict[str, Any] = {"calls": len(sizes), "queries": sum(sizes), "mean_batch": sum(sizes) / len(sizes)}
    for clock in ("wall", "cpu"):
        engine, search = (getattr(times[name], clock).mean(1) for name in ("engine", "patch-rs"))
        low, middle, high = np.quantile(engine / search, (0.25, 0.5, 0.75))
        document[clock] = {
            "engine_images_per_second": float(sum(sizes) / np.median(engine)),
            "search_images_per_second": float(sum(sizes) / np.median(search)),
            "share": {"median": float(middle), "quartiles": [float(low), float(high)]},
        }
    return document


def run(path: Path, data: str, attack: PatchRS, count: int, seconds: float) -> dict[str, Any]:
    """The whole benchmark: a JSON document of schema `edgeguard.query_speed/1`."""
    artifact = Artifact.load(path)
    test = load_splits(data)[1]
    rows = np.arange(min(count, len(test)))
    images, labels = np.ascontiguousarray(test.images(rows)), test.labels[rows]  # else the engine would copy each time
    with open_engine(artifact, "ort", threads=1) as engine:
        sizes = sizes_of(attack, engine, images, labels)

        def alone() -> None:
            for size in sizes:
                engine(images[:size])

        end = time.perf_counter() + seconds
        calls = {"engine": alone, "patch-rs": lambda: attack.run(Victim(classify=engine), images, labels)}
        times = interleave(calls, lambda rounds: time.perf_counter() < end)
    return {
        "schema": SCHEMA, "artifact": path.name, "sha256": files.sha256(artifact.onnx), "threads": 1,
        "images": len(rows), "patch_size": attack.patch_size, "queries_per_image": attack.queries,
        "batch_size": attack.batch_size, "turns": len(times["engine"].wall), "runs_per_turn": TURN,
        **summary(times, sizes),
        "environment": {
            "python": platform.python_version(), "numpy": np.__version__, "onnxruntime": onnxruntime.__version__,
            "machine": platform.machine(), "cpu_flags": cpu_flags(),
        },
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True, help="a folder that `edgeguard export` wrote")
    parser.add_argument("--data", default="cifar10", help="as of `edgeguard verify`")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--queries", type=int, default=15, help="of each image, in one run of the search")
    parser.add_argument("--patch-size", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=30.0, help="measuring time at least")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    try:
        attack = PatchRS(options.patch_size, options.queries, batch_size=options.batch_size)
        document = run(options.artifact, options.data, attack, options.images, options.seconds)
        if options.out:
            files.write_json(options.out, document)
    except EdgeGuardError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
    wall, cpu = document["wall"], document["cpu"]
    low, high = wall["share"]["quartiles"]
    print(
        f"Patch-RS shows {wall['search_images_per_second']:.0f} images/s, the engine alone takes "
        f"{wall['engine_images_per_second']:.0f}: {wall['share']['median']:.1%} (quartiles {low:.1%} to {high:.1%}; "
        f"{cpu['share']['median']:.1%} by CPU time), mean batch {document['mean_batch']:.0f}, one thread"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
