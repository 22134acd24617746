"""Seconds of one QADT-R training step against one plain Brevitas QAT step: same net, batch, threads and run.

The baseline is what Brevitas offers out of the box: its `preprocess_for_quantize` and `quantize` with its default 8-bit
quantizers, activation statistics collected beforehand, SGD with momentum. The QADT-R step pastes patches, trains, and
moves the patches, at a width drawn per step. A float step of the same net (batch norm live, channels last) is beside it.

    python benchmarks/harden_speed.py --weights resnet20-cifar10.safetensors --out benchmarks/results/harden_speed.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from edgeguard.calib import calibrate
from edgeguard.data import from_arrays
from edgeguard.defences.config import HardenConfig, preset
from edgeguard.defences.harden import versions
from edgeguard.defences.trainer import Trainer
from edgeguard.models import load_model
from edgeguard.quant.model import Normalization, quantize_model
from edgeguard.quant.scheme import QuantScheme
from edgeguard.quant.width import parse_widths

WARMUP_BATCHES = 40


def plain_step(module: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """One step of ordinary training."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(module(pixels), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def brevitas_step(weights: Path | None, pixels: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """Plain Brevitas quantization-aware training, past the steps in which it collects percentile statistics."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from brevitas.graph.quantize import preprocess_for_quantize, quantize

        model = quantize(preprocess_for_quantize(load_model("resnet20", 10, weights).module))
    model = model.train().to(memory_format=torch.channels_last)
    for module in model.modules():
        if hasattr(module, "collect_stats_steps"):
            module.collect_stats_steps = WARMUP_BATCHES // 2
    step = plain_step(model, pixels, labels)
    for _ in range(WARMUP_BATCHES):
        step()
    return step


def qadtr_step(weights: Path | None, images: Any, labels: Any, batch: int, bits: str) -> Callable[[], None]:
    """The step of `edgeguard harden` with its defaults, data augmentation included."""
    data = from_arrays("random", images.transpose(0, 2, 3, 1), labels)
    float_model = load_model("resnet20", 10, weights)
    config = preset(HardenConfig("qadt-r", parse_widths(bits), batch_size=batch))
    model = quantize_model(float_model.module, QuantScheme(config.widths), Normalization(float_model.mean, float_model.std))
    calibrate(model, images[:64])
    trainer = Trainer(model, data, config, torch.device("cpu"))
    state = {"step": 0}

    def step() -> None:
        start = state["step"] * batch % (len(images) - batch + 1)
        trainer.step(np.arange(start, start + batch))
        state["step"] += 1

    return step


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step, interleaved, so that a busy machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--bits", default="8,6,5,4,3,2")
    parser.add_argument("--rounds", type=int, default=32, help="a multiple of 16 holds as many penalty steps as training")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8 * args.batch_size, 3, 32, 32)).astype(np.uint8)
    labels = rng.integers(0, 10, len(images))
    pixels = torch.from_numpy(images[: args.batch_size]).float().div(255).sub(0.45).div(0.22)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    targets = torch.from_numpy(labels[: args.batch_size])
    float_net = load_model("resnet20", 10, args.weights).module.train().to(memory_format=torch.channels_last)
    times = measure({
        "float": plain_step(float_net, pixels, targets),
        "brevitas_qat": brevitas_step(args.weights, pixels, targets),
        "qadt_r": qadtr_step(args.weights, images, labels, args.batch_size, args.bits),
    }, args.rounds)  # fmt: skip
    base = statistics.fmean(times["brevitas_qat"])
    result: dict[str, Any] = {"batch_size": args.batch_size, "bits": args.bits, "rounds": args.rounds,
                              "threads": args.threads, "versions": versions(), "steps": {}}  # fmt: skip
    print(f"{'step':<14} {'mean s':>8} {'median s':>9} {'over Brevitas QAT':>18}")
    for name, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, times["brevitas_qat"], strict=True))
        entry = {"mean_s": statistics.fmean(values), "median_s": statistics.median(values),
                 "ratio_of_means": statistics.fmean(values) / base, "median_ratio": statistics.median(ratios)}  # fmt: skip
        result["steps"][name] = entry
        print(f"{name:<14} {entry['mean_s']:8.3f} {entry['median_s']:9.3f} {entry['ratio_of_means']:17.2f}x")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
