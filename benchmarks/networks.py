"""Torchvision's networks as integers: coverage, equality with the reference, file size, latency against float32, and
whether the same networks with signed activations keep TensorRT's published rules.

    python benchmarks/networks.py --work DIR --out benchmarks/results --docs docs

Weights are random (batch norms have random statistics, scales come from calibration), since whether a network lowers does
not depend on what it has learned. Every cell is cached below --work. The result is one JSON and a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import nn

from edgeguard import files
from edgeguard.artifact import Artifact
from edgeguard.calib import calibrate
from edgeguard.defences.job import versions
from edgeguard.export import export_artifact
from edgeguard.export.bench import bench
from edgeguard.export.lower import lower
from edgeguard.export.qdq_writer import to_qdq
from edgeguard.export.trt_proof import VERSIONS
from edgeguard.export.trt_rules import check
from edgeguard.inspection import inspect_artifact
from edgeguard.models import load_model
from edgeguard.quant.model import Normalization, QuantizedModel, quantize_model
from edgeguard.quant.scheme import QuantScheme
from edgeguard.quant.width import parse_widths
from edgeguard.targets import cpu_flags
from edgeguard.targets.profiles import load_profile

NETWORKS = (
    "resnet18", "resnet50", "vgg11_bn", "mobilenet_v2", "mnasnet1_0", "squeezenet1_1", "googlenet", "shufflenet_v2_x1_0",
    "densenet121", "regnet_x_400mf", "mobilenet_v3_small", "efficientnet_b0",
)  # fmt: skip
OURS = ("resnet20", "resnet56")
SIDES = {"resnet20": 32, "resnet56": 32}
"""All others take 96."""
PAGE = """# Networks

What lowers to integers, measured by `benchmarks/networks.py` (its JSON: `benchmarks/results/networks.json`): torchvision's
networks and ours with random weights, 10 classes, calibrated on 16 images. Share of the multiply-accumulates in integer
kernels of ONNX Runtime, read from its own optimized graph; whether the engine's logits are the reference's, bit for bit;
the size of the ONNX file, also as a share of its parameters in float32; median milliseconds of one image on one thread against the
float32 model of the same architecture in the same run; and whether the QDQ model of the same network with signed
activations keeps TensorRT's published rules (8.6, 10.3 and 11.4).

Look-up tables on large tensors (MobileNet V3, EfficientNet) are exact but slow: ONNX Runtime's `Gather` copies single
bytes, and those networks are slower than in float32. All of them lower at any image size: where adaptive pooling has
windows of unequal size (VGG at 96 pixels: 3x3 to 7x7), pixels are repeated until they are equal, which is exact.
"""
CLASSES, IMAGES, CALIBRATION = 10, 64, 16


def build(name: str) -> nn.Module:
    """A network with random weights, and batch-norm statistics as if it had seen data."""
    torch.manual_seed(0)
    if name in OURS:
        return randomized(load_model(name, CLASSES).module)
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model: nn.Module = getattr(torchvision.models, name)(weights=None, num_classes=CLASSES, **options)
    return randomized(model)


def randomized(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.1)
    return model.eval()


def smooth_images(side: int, count: int) -> NDArray[np.uint8]:
    """(N, 3, side, side) uint8 with structure at several scales."""
    rng = np.random.default_rng(0)
    total = np.zeros((count, 3, side, side))
    for cell in (side // 2, side // 4, side // 8, 4):
        size = -(-side // cell)
        total += rng.uniform(-0.5, 0.5, (count, 3, size, size)).repeat(cell, 2).repeat(cell, 3)[:, :, :side, :side]
    return np.clip(np.rint(127 + 127 * total), 0, 255).astype(np.uint8)


def quantized(name: str, bits: str, images: NDArray[np.uint8], signed: bool) -> QuantizedModel:
    scheme = QuantScheme(parse_widths(bits), signed_activations=signed)
    normalization = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    model = quantize_model(build(name), scheme, normalization).eval()
    calibrate(model, images[:CALIBRATION])
    return model


def export(name: str, model: QuantizedModel, bits: str, folder: Path, images: NDArray[np.uint8], target: str) -> Artifact:
    width = next(width for width in model.control.widths if str(width) == bits)
    side = images.shape[2]
    return export_artifact(
        lower(model, width, (3, side, side)), folder, target=target, width=bits, weight_bits=width.weight,
        activation_bits=width.activation, images=images, source={"model": name, "weights": "random"},
    )  # fmt: skip


def cell(name: str, model: QuantizedModel, bits: str, work: Path, images: NDArray[np.uint8], rounds: int) -> dict[str, Any]:
    """One network at one width; its artifact is deleted again."""
    side = images.shape[2]
    folder = work / f"{name}-{bits}"
    shutil.rmtree(folder, ignore_errors=True)
    artifact = export(name, model, bits, folder, images, "ort")
    described = inspect_artifact(artifact.path)
    speed = bench(Artifact.load(folder), (1,), rounds)
    engine = next(row for row in speed["rows"] if row["model"] != "float32")
    reference = next(row for row in speed["rows"] if row["model"] == "float32")
    result = {
        "network": name, "bits": int(bits), "input": side, "macs": described["macs"], "layers": len(described["layers"]),
        "coverage": described["integer_mac_coverage"], "identical": described["identical_to_reference"],
        "images": len(images), "file_bytes": described["file_bytes"],
        "parameters": sum(p.numel() for p in model.body.parameters()),
        "ms": engine["latency_ms"]["median"], "float32_ms": reference["latency_ms"]["median"],
        "speedup": engine["speedup"],
    }  # fmt: skip
    shutil.rmtree(folder)
    return result


def trt_violations(model: QuantizedModel, bits: str, side: int) -> dict[str, list[str]]:
    """Rules of TensorRT that the QDQ model of a network with signed activations breaks, by version."""
    width = next(width for width in model.control.widths if str(width) == bits)
    qdq = to_qdq(lower(model, width, (3, side, side)), signed=True)
    return {".".join(map(str, version)): [str(found) for found in check(qdq, version)] for version in VERSIONS}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| network | input | bits | integer multiply-accumulates | identical to the reference | file, bytes | of float32 "
             "| ms | float32, ms | TensorRT's rules |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        share = row["file_bytes"] / (4 * row["parameters"])
        lines.append(
            f"| {row['network']} | {row['input']} | {row['bits']} | {row['coverage']:.1%} of {row['macs']:,} "
            f"| {'yes' if row['identical'] else 'NO'}, {row['images']} images | {row['file_bytes']:,} | {share:.1%} "
            f"| {row['ms']:.2f} | {row['float32_ms']:.2f} | {'BROKEN' if any(row['trt'].values()) else 'kept'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--docs", type=Path, help="folder for the table as a page of the documentation")
    parser.add_argument("--networks", default=",".join((*NETWORKS, *OURS)))
    parser.add_argument("--bits", default="8,4,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--artifacts", metavar="TARGET", help="only write artifacts for this target, at --side, and keep them")
    parser.add_argument("--side", type=int, default=224)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.artifacts:
        images = smooth_images(args.side, CALIBRATION)
        for name in args.networks.split(","):
            model = quantized(name, args.bits, images, load_profile(args.artifacts).signed_activations)
            for bits in args.bits.split(","):
                print(export(name, model, bits, args.work / f"{name}-{args.artifacts}-{bits}", images, args.artifacts).path)
        return
    rows = []
    for name in args.networks.split(","):
        todo = [bits for bits in args.bits.split(",") if not (args.work / f"{name}-{bits}.json").is_file()]
        if todo:
            images = smooth_images(SIDES.get(name, 96), IMAGES)
            model, signed = (quantized(name, args.bits, images, signed) for signed in (False, True))
            for bits in todo:
                row = cell(name, model, bits, args.work, images, args.rounds)
                row["trt"] = trt_violations(signed, bits, images.shape[2])
                files.write_json(args.work / f"{name}-{bits}.json", row)
                print(f"{name} at {bits} bits: done", flush=True)
        rows += [files.read_json(args.work / f"{name}-{bits}.json") for bits in args.bits.split(",")]
    args.out.mkdir(parents=True, exist_ok=True)
    document = {"schema": "edgeguard.benchmark.networks/1", "versions": versions(), "cpu_flags": cpu_flags(), "rows": rows}
    (args.out / "networks.json").write_text(json.dumps(document, indent=1) + "\n")
    if args.docs is not None:
        (args.docs / "networks.md").write_text(f"{PAGE}\n{table(rows)}")
    print(table(rows))


if __name__ == "__main__":
    main()
