"""ResNet-20 on CIFAR-10, QADT-R against undefended QAT: coverage, equality, accuracy and ASR of the deployed engines.

Takes finished runs (the commands that make them are in `benchmarks/README.md`), exports every width, and for each engine

* reads the integer MAC coverage from ONNX Runtime's optimized graph (the export's own proof),
* compares engine, reference and twin on 1,000 test images, clean and under a random patch of noise,
* measures accuracy on all 10,000 test images with the engine,
* attacks it (A-QAPA, universal, engine access; crafted on training images, judged on test images).

Every cell is cached as JSON below --work, so an interrupted study continues. The result is one JSON and a Markdown table.

    python benchmarks/cifar10_resnet20.py --run qadt-r=RUN --run qat=RUN --work DIR --out benchmarks/results
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.artifact import Artifact
from edgeguard.cli.pipeline import export_run
from edgeguard.data import Dataset, load_splits
from edgeguard.defences.job import versions
from edgeguard.inspection import inspect_artifact
from edgeguard.patch import Patch, apply_patch, random_positions
from edgeguard.run import Run
from edgeguard.statistics import wilson
from edgeguard.targets import Engine, cpu_flags, open_engine
from edgeguard.verify import VerifyOptions, verify
from edgeguard.verify.harness import Subject, judge_at, judge_worst, random_places
from edgeguard.verify.propose import noise

BATCH = 100
AGGREGATED_IMAGES = {"random": 10_000, "worst": 2_000}
"""Test images on which the patches of all widths are compared; a worst place costs 16 times a random one."""


def logits(engine: Engine, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, classes) float32, in the deployed batch."""
    return np.concatenate([engine(images[start : start + BATCH]) for start in range(0, len(images), BATCH)])


def equality(artifact: Artifact, test: Dataset, count: int) -> dict[str, Any]:
    """Whether engine, reference and twin give the same logits, bit for bit, on clean and on patched images."""
    images = test.images(np.arange(count))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 8, 8)).astype(np.uint8)
    places = random_positions(count, (32, 32), (8, 8), rng)
    found: dict[str, Any] = {"n": count}
    for name, batch in (("clean", images), ("patched", apply_patch(images, pixels, np.ones((8, 8), bool), places))):
        values = {}
        for runtime in ("ort", "reference", "twin"):
            with open_engine(artifact, runtime) as engine:
                values[runtime] = logits(engine, batch)
        same = [np.array_equal(values["ort"], values[other]) for other in ("reference", "twin")]
        found[name] = {"reference": bool(same[0]), "twin": bool(same[1])}
    return found


def accuracy(artifact: Artifact, test: Dataset) -> dict[str, Any]:
    """Of the engine, on all test images."""
    correct = 0
    with open_engine(artifact) as engine:
        for start in range(0, len(test), BATCH):
            indices = np.arange(start, min(start + BATCH, len(test)))
            correct += int((engine(test.images(indices)).argmax(1) == test.labels[indices]).sum())
    return {"accuracy": correct / len(test), "n": len(test), "ci95": list(wilson(correct, len(test)))}


def cached(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The cell's JSON, computed once."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        result = compute()
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.rename(path)
        print(f"{path.parent.name}/{path.stem}: done", flush=True)
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def portable(run: Run) -> dict[str, Any]:
    """What a run was trained with; of its files the names, since where they lay is not part of the result."""
    training = dict(run.config["training"])
    kind, _, path = training["data"].partition(":")
    training["data"] = f"{kind}:{Path(path).name}"
    training["weights"] = Path(training["weights"]).name if training["weights"] else None
    data = {key: run.config["data"][key] for key in ("train_sha256", "test_sha256", "train_size", "test_size")}
    return {"training": training, "data": data, "model": run.config["model"], "scheme": run.config["scheme"],
            "versions": run.config["versions"]}  # fmt: skip


def study(name: str, run: Run, work: Path, attacked: list[str], options: VerifyOptions) -> dict[str, Any]:
    """Every cell of one run."""
    train, test = load_splits(run.config["training"]["data"])
    cells: dict[str, Any] = {"run": portable(run), "widths": {}, "attacks": {}, "aggregated": {}, "trust": {},
                             "survival": {}}  # fmt: skip
    cells["metrics"] = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    for width in map(str, run.widths):
        path = work / f"{name}-{width}"
        artifact = Artifact.load(path) if path.is_dir() else export_run(run, width, "ort", path)
        same = cached(work / name / f"equality-{width}.json", partial(equality, artifact, test, 1000))
        right = cached(work / name / f"accuracy-{width}.json", partial(accuracy, artifact, test))
        described = inspect_artifact(artifact.path)
        cells["widths"][width] = {"equality": same, "accuracy": right, "coverage": described["integer_mac_coverage"],
                                  "file_bytes": described["file_bytes"]}  # fmt: skip
    keep = ("name", "access", "patch_size", "placement", "asr", "ci95", "robust_accuracy", "n", "twin_asr")
    for width in attacked:
        artifact = Artifact.load(work / f"{name}-{width}")
        attack = partial(verify, artifact, test, options, craft_data=train, command=["benchmarks/cifar10_resnet20.py"])
        report = cached(work / name / f"attack-{width}.json", attack)
        cells["attacks"][width] = [{key: row[key] for key in keep} for row in report["attacks"] if row["access"] == "engine"]
        cells["trust"][width], cells["survival"][width] = report["trust"], report["survival"]
    for width in attacked:
        compute = partial(aggregated, name, width, work, attacked, test, options.stride)
        cells["aggregated"][width] = cached(work / name / f"aggregated-{width}.json", compute)
    return cells


def crafted(report: dict[str, Any]) -> dict[int, Patch]:
    """The patches of a report that were crafted through the engine, by size."""
    found: dict[int, Patch] = {}
    for row in report["attacks"]:
        entry = report["patches"][row["patch"]]
        if row["access"] == "engine":
            shape = (entry["height"], entry["width"])
            pixels = np.frombuffer(base64.b64decode(entry["pixels"]), np.uint8).reshape(3, *shape)
            mask = np.frombuffer(base64.b64decode(entry["mask"]), np.uint8).reshape(shape).astype(bool)
            found[row["patch_size"]] = Patch(pixels, mask)
    return found


def aggregated(name: str, width: str, work: Path, attacked: list[str], test: Dataset, stride: int) -> dict[str, Any]:
    """ASR on one engine of noise and of the patches crafted on any of the run's attacked widths, and the largest."""
    reports = {source: json.loads((work / name / f"attack-{source}.json").read_text()) for source in attacked}
    patches = [(source, size, patch) for source, report in reports.items() for size, patch in crafted(report).items()]
    patches += [("noise", size, noise(size, 0).patch) for size in sorted({size for _, size, _ in patches})]
    rows = []
    with open_engine(Artifact.load(work / f"{name}-{width}")) as engine:
        for placement, count in AGGREGATED_IMAGES.items():
            subject = Subject.of(engine, test.images(np.arange(count)), test.labels[:count])
            for source, size, patch in patches:
                if placement == "random":
                    judged = judge_at(subject, patch, random_places(subject, patch, 0))
                else:
                    judged = judge_worst(subject, patch, stride)
                rows.append({"source": source, "patch_size": size, "placement": placement, "asr": judged.asr,
                             "n": judged.n, "ci95": list(wilson(judged.successes, judged.n))})  # fmt: skip
    made = [row for row in rows if row["source"] != "noise"]
    best = [
        max((row for row in made if (row["patch_size"], row["placement"]) == cell), key=lambda row: float(row["asr"]))
        for cell in sorted({(row["patch_size"], row["placement"]) for row in made})
    ]
    return {"rows": rows, "best": best}


def tables(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| method | bits | integer MACs | identical, clean and patched | accuracy, n = 10,000 | file, bytes |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for method, cells in result["runs"].items():
        for bits, cell in cells["widths"].items():
            same = all(cell["equality"][kind][other] for kind in ("clean", "patched") for other in ("reference", "twin"))
            low, high = cell["accuracy"]["ci95"]
            lines.append(
                f"| {method} | {bits} | {cell['coverage']:.3f} | {'yes' if same else 'NO'}, n = {cell['equality']['n']:,} "
                f"| {cell['accuracy']['accuracy']:.2%} [{low:.2%}, {high:.2%}] | {cell['file_bytes']:,} |"
            )
    titles = {
        "own": "Patches crafted through the engine of the same width:",
        "best": "The strongest of the patches crafted at any attacked width of the run, on more images:",
        "noise": "Random pixels instead of a crafted patch, on the same images:",
    }
    for key, title in titles.items():
        lines += ["", title, *asr_table(result, key)]
    return "\n".join(lines) + "\n"


def asr_table(result: dict[str, Any], key: str) -> list[str]:
    """Rows of patch, placement and bits; a column for each run."""
    rows: dict[tuple[int, str, int], dict[str, str]] = {}
    for method, cells in result["runs"].items():
        for bits, entry in cells["aggregated"].items():
            chosen = {"own": cells["attacks"][bits], "best": entry["best"],
                      "noise": [row for row in entry["rows"] if row["source"] == "noise"]}[key]  # fmt: skip
            for row in chosen:
                low, high = row["ci95"]
                source = f", from {row['source']} bits" if key == "best" else ""
                text = f"{row['asr']:.1%} [{low:.1%}, {high:.1%}], n = {row['n']:,}{source}"
                rows.setdefault((row["patch_size"], row["placement"], -int(bits)), {})[method] = text
    names = list(result["runs"])
    header = " | ".join(f"ASR {name}" for name in names)
    lines = ["", f"| patch | placement | bits | {header} |", "|---|---|---|" + "---|" * len(names)]
    for (size, placement, bits), found in sorted(rows.items()):
        lines.append(f"| {size}x{size} | {placement} | {-bits} | {' | '.join(found.get(name, '') for name in names)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--attack-bits", default="8,4,2")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--restarts", type=int, default=2)
    parser.add_argument("--attack-batch", type=int, default=100)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--stride", type=int, default=8)
    args = parser.parse_args()
    options = VerifyOptions(accesses=("engine",), patch_sizes=(6, 8), placements=("random", "worst"), stride=args.stride,
                            steps=args.steps, restarts=args.restarts, attack_batch=args.attack_batch,
                            limit=args.limit)  # fmt: skip
    result: dict[str, Any] = {
        "schema": "edgeguard.benchmark.cifar10/1", "versions": versions(), "cpu_flags": cpu_flags(), "runs": {},
        "options": {"steps": args.steps, "restarts": args.restarts, "attack_batch": args.attack_batch,
                    "limit": args.limit, "stride": args.stride},
        "asr": "P[engine(x_adv) != y | engine(x) = y]; 95 % Wilson intervals; worst: any place on the stride grid",
    }  # fmt: skip
    for name, _, folder in (entry.partition("=") for entry in args.run):
        attacked = [bits for bits in args.attack_bits.split(",") if bits]
        result["runs"][name] = study(name, Run.load(folder), args.work, attacked, options)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "cifar10_resnet20.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "cifar10_resnet20.md").write_text(tables(result))
    print(tables(result))


if __name__ == "__main__":
    main()
