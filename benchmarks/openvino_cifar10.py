"""OpenVINO against the reference on CIFAR-10: agreement of decisions, differences of logits, precision of every layer.

    python benchmarks/openvino_cifar10.py --run RUN --bits 8,4 --work DIR --out benchmarks/results/openvino_cifar10.json

The reference's decisions are those of the ONNX Runtime engine, whose logits its own export proves to be the reference's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from edgeguard import files
from edgeguard.artifact import Artifact
from edgeguard.cli.pipeline import export_run
from edgeguard.data import Dataset, load_splits
from edgeguard.run import Run
from edgeguard.statistics import wilson
from edgeguard.targets import cpu_flags, open_engine

BATCH = 100


def compare(exact: Artifact, other: Artifact, test: Dataset) -> dict[str, Any]:
    """Decisions and logits of both engines on all test images."""
    equal, identical, right, largest = 0, 0, [0, 0], 0.0
    with open_engine(exact) as first, open_engine(other) as second:
        for start in range(0, len(test), BATCH):
            indices = np.arange(start, min(start + BATCH, len(test)))
            images, labels = test.images(indices), test.labels[indices]
            logits = first(images), second(images)
            equal += int((logits[0].argmax(1) == logits[1].argmax(1)).sum())
            identical += int((logits[0] == logits[1]).all(1).sum())
            largest = max(largest, float(np.abs(logits[0].astype(np.float64) - logits[1]).max()))
            right = [count + int((found.argmax(1) == labels).sum()) for count, found in zip(right, logits, strict=True)]
    n = len(test)
    return {
        "n": n, "agreement": equal / n, "ci95": list(wilson(equal, n)), "identical_logits": identical / n,
        "max_difference": largest, "accuracy": {"reference": right[0] / n, "openvino": right[1] / n},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--bits", default="8,4")
    parser.add_argument("--data", help="test images; the run's own by default")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    run = Run.load(args.run)
    _, test = load_splits(args.data or run.config["training"]["data"])
    rows = {}
    for bits in args.bits.split(","):
        artifacts = []
        for target in ("ort", "openvino"):
            folder = args.work / f"{target}-{bits}"
            artifacts.append(Artifact.load(folder) if folder.is_dir() else export_run(run, bits, target, folder))
        proof, layers = artifacts[1].manifest["proof"], artifacts[1].manifest["layers"]
        rows[bits] = {
            **compare(artifacts[0], artifacts[1], test),
            "integer_mac_coverage": proof["integer_mac_coverage"], "steps": proof["steps"], "step_images": proof["images"],
            "kernels": {layer["name"]: layer["kernel"] for layer in layers},
        }  # fmt: skip
        print(bits, {key: value for key, value in rows[bits].items() if key != "kernels"}, flush=True)
    document = {"schema": "edgeguard.benchmark.openvino/1", "versions": artifacts[1].manifest["versions"],
                "cpu_flags": cpu_flags(), "rows": rows}  # fmt: skip
    files.write_json(args.out, document)


if __name__ == "__main__":
    main()
