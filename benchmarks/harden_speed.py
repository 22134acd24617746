"""Seconds of one pass of QADT-R training over a batch, against float training of the same net, batch, threads and run.

The baseline is a float training step of the net with its batch norms folded into its convolutions, channels last: what
training would cost without quantization, batch statistics and defence. Beside it: the same with live batch norms; what
Brevitas offers out of the box (its `preprocess_for_quantize` and `quantize` with default 8-bit quantizers, activation
statistics collected beforehand); and QADT-R as `edgeguard harden` trains it, compiled, uncompiled, compiled with bfloat16
where the machine has units for it, and that replayed as CUDA graphs on a GPU where they hold. All run SGD with momentum, and
are interleaved, so that a busy machine slows all of them alike.

A batch of QADT-R is passed several times, each time with an update of the weights: once clean and then once for every step
of the patches. What is given is the time of the whole batch over the number of its passes; augmentation, pasting, the float
teacher, patches and the penalty on gradients (on every 16th batch) are in it. Compiling is timed apart: the first batch less a
later one.

    python benchmarks/harden_speed.py --weights resnet20-cifar10.safetensors --curve 50 --out benchmarks/results/harden_speed.json

--curve trains so many batches from the same weights in float32: uncompiled, which is the Brevitas model itself; compiled; on a GPU
also with CUDA graphs; and uncompiled again with every weight moved by one unit in its last place, which shows how far rounding
alone leads apart. All others are compared with the first, loss by loss.

On a CUDA device (--device cuda --batch-size 512) it also prints images per second and the share of the time in which the GPU
is busy: the summed times of all kernels over the wall time, by torch.profiler. That part was written without a GPU and has
not been run on one.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from make_zoo import public
from torch import nn
from torch.fx.experimental.optimization import fuse

from edgeguard.calib import calibrate
from edgeguard.data import Dataset, load_splits
from edgeguard.defences.config import HardenConfig, passes_per_batch, preset
from edgeguard.defences.graphs import settle_graphs
from edgeguard.defences.harden import choose_device
from edgeguard.defences.job import versions
from edgeguard.defences.speed import has_bfloat16_units
from edgeguard.defences.trainer import Trainer
from edgeguard.errors import InputError
from edgeguard.memory import keep_freed_memory
from edgeguard.models import FloatModel, load_model
from edgeguard.quant.model import Normalization, quantize_model
from edgeguard.quant.scheme import QuantScheme
from edgeguard.quant.width import parse_widths

BASELINE = "float_folded"
QADT_R = {
    "qadt_r": {"compiled": True},
    "qadt_r_uncompiled": {"compiled": False},
    "qadt_r_amp": {"compiled": True, "amp": True},
    "qadt_r_graphs": {"compiled": True, "amp": True, "cuda_graphs": True},
}
STEPS = (BASELINE, "float", "brevitas_qat", *QADT_R)
WARMUP_BATCHES = 40
PROFILED = 16


@dataclass(frozen=True, eq=False)
class Setting:
    """What all steps share. pixels: (N, 3, H, W) float32, normalized, channels last; labels: (N,) int64; one batch."""

    model: FloatModel
    data: Dataset
    device: torch.device
    config: HardenConfig
    pixels: torch.Tensor
    labels: torch.Tensor


def folded(module: nn.Module) -> nn.Module:
    """A trainable copy of a float net with each batch norm folded into the convolution before it, which gets a bias."""
    return fuse(copy.deepcopy(module).eval()).requires_grad_(True)


def plain_step(module: nn.Module, setting: Setting) -> Callable[[], None]:
    """One step of ordinary training."""
    module = module.train().to(setting.device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(module(setting.pixels), setting.labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def brevitas_step(setting: Setting) -> Callable[[], None]:
    """Plain Brevitas quantization-aware training, past the steps in which it collects percentile statistics."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from brevitas.graph.quantize import preprocess_for_quantize, quantize

        model = quantize(preprocess_for_quantize(copy.deepcopy(setting.model.module)))
    for module in model.modules():
        if hasattr(module, "collect_stats_steps"):
            module.collect_stats_steps = WARMUP_BATCHES // 2
    step = plain_step(model, setting)
    for _ in range(WARMUP_BATCHES):
        step()
    return step


def make_trainer(setting: Setting, nudged: bool = False, **changes: Any) -> Trainer:
    """`edgeguard harden` with its defaults. nudged: every weight one unit in its last place higher."""
    config = replace(setting.config, **changes)
    normalization = Normalization(setting.model.mean, setting.model.std)
    model = quantize_model(setting.model.module, QuantScheme(config.widths), normalization)
    calibrate(model, setting.data.images(np.arange(min(64, len(setting.data)))))
    if nudged:
        with torch.no_grad():
            for parameter in model.body.parameters():
                parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, torch.inf)))
    trainer = Trainer(model, setting.data, config, setting.device, copy.deepcopy(setting.model))
    if reason := settle_graphs(trainer):
        raise InputError(f"CUDA graphs do not hold: {reason}")
    return trainer


def batches(setting: Setting, count: int) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    rng = np.random.default_rng(0)
    return [rng.choice(len(setting.data), setting.config.batch_size, replace=False) for _ in range(count)]


def qadtr_step(setting: Setting, count: int, **changes: Any) -> Callable[[], None]:
    """The step of one whole batch; there are `count` batches."""
    trainer, chosen = make_trainer(setting, **changes), iter(batches(setting, count))
    return lambda: void(trainer.step(next(chosen)))


def void(_: object) -> None:
    """A step returns nothing."""


def timed(step: Callable[[], None], device: torch.device) -> float:
    """Seconds, until the device has done it."""
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(
    steps: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Seconds of the first time of every step, and of `rounds` more, interleaved."""
    first = {name: timed(step, device) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(timed(step, device))
    return first, times


def losses(setting: Setting, count: int, **changes: Any) -> list[float]:
    """The loss of every batch, as training reports it."""
    trainer = make_trainer(setting, **changes)
    return [trainer.step(indices).loss for indices in batches(setting, count)]


def curves(setting: Setting, count: int) -> dict[str, Any]:
    """Loss curves in float32, and how far two of them are from the uncompiled one."""
    found = {
        "uncompiled": losses(setting, count, compiled=False),
        "compiled": losses(setting, count, compiled=True),
        "uncompiled_nudged": losses(setting, count, compiled=False, nudged=True),
    }
    result: dict[str, Any] = {"losses": found}
    if setting.device.type == "cuda":
        found["graphs"] = losses(setting, count, compiled=True, cuda_graphs=True)
    for name in [name for name in found if name != "uncompiled"]:
        apart = np.abs(np.array(found[name]) - np.array(found["uncompiled"]))
        result[name] = {"max": float(apart.max()), "mean": float(apart.mean()), "first": float(apart[0])}
        print(f"loss over {count} batches, {name} against uncompiled: "
              f"max {apart.max():.2e}, mean {apart.mean():.2e}, first {apart[0]:.2e}")  # fmt: skip
    return result


def busy(step: Callable[[], None], device: torch.device, count: int) -> float:
    """Share of the wall time that a CUDA device spends in kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        seconds = sum(timed(step, device) for _ in range(count))
    microseconds = sum(event.self_device_time_total for event in profile.key_averages())
    return float(microseconds) / 1e6 / seconds


def prepare(args: argparse.Namespace) -> Setting:
    device = choose_device(args.device)
    data, _ = load_splits(args.data, args.image_size, seed=0)
    model = load_model(args.model, data.num_classes if args.weights is None else None, args.weights)
    config = preset(HardenConfig("qadt-r", parse_widths(args.bits), batch_size=args.batch_size, epochs=1000))
    indices = np.arange(args.batch_size)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.mean, model.std))
    pixels = (torch.from_numpy(data.images(indices)).float() / 255 - mean) / std
    return Setting(
        model, data, device, config, pixels.to(device).contiguous(memory_format=torch.channels_last),
        torch.from_numpy(data.labels[indices]).to(device),
    )  # fmt: skip


def make_steps(names: Sequence[str], setting: Setting, count: int) -> dict[str, Callable[[], None]]:
    """The steps asked for, in the order of `STEPS`, as far as the machine can take them."""
    steps: dict[str, Callable[[], None]] = {}
    for name in (name for name in STEPS if name in names or name == BASELINE):
        if name in QADT_R:
            if "amp" in QADT_R[name] and not has_bfloat16_units(setting.device):
                print(f"{name}: this machine has no units for bfloat16")
                continue
            try:
                steps[name] = qadtr_step(setting, count, **QADT_R[name])
            except InputError as exc:
                print(f"{name}: {exc}")
        elif name == "brevitas_qat":
            steps[name] = brevitas_step(setting)
        else:
            module = setting.model.module
            steps[name] = plain_step(folded(module) if name == BASELINE else copy.deepcopy(module), setting)
    return steps


def report(setting: Setting, first: dict[str, float], times: dict[str, list[float]]) -> dict[str, Any]:
    """One entry for each step, which is also printed."""
    entries = {}
    print(f"{'step':<18} {'passes':>6} {'s / pass':>9} {'median':>8} {'over baseline':>13} {'first, s':>9}")
    for name, values in times.items():
        passes = passes_per_batch(setting.config) if name in QADT_R else 1.0
        mean, median = statistics.fmean(values) / passes, statistics.median(values) / passes
        ratios = [a / passes / b for a, b in zip(values, times[BASELINE], strict=True)]
        entries[name] = {
            "passes": passes, "mean_s_per_pass": mean, "median_s_per_pass": median, "s_per_batch": statistics.fmean(values),
            "ratio_of_means": mean / statistics.fmean(times[BASELINE]), "median_ratio": statistics.median(ratios),
            "first_s": first[name], "compile_s": max(0.0, first[name] - statistics.median(values)),
        }  # fmt: skip
        print(
            f"{name:<18} {passes:6.0f} {mean:9.4f} {median:8.4f} {entries[name]['ratio_of_means']:12.2f}x {first[name]:9.2f}"
        )
    return entries


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--bits", default="8,5,4,3,2")
    parser.add_argument(
        "--rounds", type=int, default=32, help="a multiple of 16 holds as many penalties as training; 0: none"
    )
    parser.add_argument("--steps", default=",".join(STEPS), help="which to measure; the baseline always is")
    parser.add_argument("--curve", type=int, default=0, metavar="N", help="loss curves of N batches; 0: none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    return parser


def main() -> None:
    options = parser()
    args = options.parse_args()
    names = args.steps.split(",")
    if unknown := set(names) - set(STEPS):
        options.error(f"unknown steps {', '.join(sorted(unknown))}; expected some of {', '.join(STEPS)}")
    torch.set_num_threads(args.threads)
    kept = keep_freed_memory()
    setting = prepare(args)
    result: dict[str, Any] = {
        "schema": "edgeguard.benchmark.harden_speed/2", "model": args.model, "data": public(args.data),
        "image_shape": setting.data.image_shape, "batch_size": args.batch_size, "bits": args.bits, "rounds": args.rounds,
        "threads": args.threads, "device": str(setting.device), "keeps_freed_memory": kept, "versions": versions(),
    }  # fmt: skip
    if args.rounds:
        steps = make_steps(names, setting, args.rounds + 1 + 2 * PROFILED)
        result["steps"] = report(setting, *measure(steps, args.rounds, setting.device))
        if setting.device.type == "cuda":
            result["gpu"] = {"name": torch.cuda.get_device_name(setting.device)}
            for name, step in steps.items():
                rate = args.batch_size / result["steps"][name]["s_per_batch"]
                share = busy(step, setting.device, PROFILED)
                result["gpu"][name] = {"images_per_s": rate, "busy": share}
                print(f"{name:<18} {rate:9.0f} images/s, GPU busy {share:.1%} of the time")
    if args.curve:
        result["curve"] = curves(setting, args.curve)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
