"""`edgeguard harden`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress, TaskID

from edgeguard.cli.console import (
    ConfigOption,
    DataOption,
    DeviceOption,
    ImageSizeOption,
    JsonOption,
    ModelOption,
    OutOption,
    SeedOption,
    TargetOption,
    ThreadsOption,
    WeightsOption,
    command_line,
    emit,
    integers,
    limit_threads,
    log,
    output_folder,
    progress_bars,
)
from edgeguard.errors import require
from edgeguard.targets.profiles import load_profile

if TYPE_CHECKING:
    from edgeguard.defences.harden import HardenJob
    from edgeguard.defences.trainer import StepResult

INTERRUPTED = 130


def harden(
    model: ModelOption = "resnet20",
    weights: WeightsOption = None,
    data: DataOption = "digits",
    bits: Annotated[str, typer.Option(help="Widths to train at, e.g. 8,4,2 or w4a8.")] = "8,6,5,4,3,2",
    target: TargetOption = "ort",
    method: Annotated[str, typer.Option(help="qadt-r, or qat: no defence.")] = "qadt-r",
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 8,
    max_steps: Annotated[int, typer.Option(help="Stop after so many steps; 0: never.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the cosine schedule.")] = 0.02,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    image_size: ImageSizeOption = None,
    flip: Annotated[bool | None, typer.Option(help="Mirror training images; by default all but digits.")] = None,
    pretrain_epochs: Annotated[int, typer.Option(help="Float epochs first, where there are no weights.")] = 4,
    estimator: Annotated[str, typer.Option(help="Of the first activation scales: mse, percentile, entropy or minmax.")] = "mse",
    calibration_images: Annotated[int, typer.Option(help="Training images for the first activation scales.")] = 512,
    patch_sizes: Annotated[str, typer.Option(help="Sides of the patches to train against, in pixels.")] = "5,6,8",
    inner_steps: Annotated[int, typer.Option(help="Extra attack steps before each training step.")] = 0,
    backward_noise: Annotated[float | None, typer.Option(help="GIR (a): noise on quantizers' gradients.")] = None,
    alignment: Annotated[float | None, typer.Option(help="GIR (b): weight of the gradient similarity penalty.")] = None,
    patch_noise: Annotated[float | None, typer.Option(help="GIR (c): noise on the patch gradient.")] = None,
    amp: Annotated[bool, typer.Option(help="bfloat16 outside the quantizers; CUDA only.")] = False,
    eval_limit: Annotated[int, typer.Option(help="Test images measured after every epoch.")] = 1000,
    out: OutOption = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this interrupted run; no other option is read.")] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Train a quantized model that withstands adversarial patches, at all widths at once."""
    require("torch", "train")
    require("brevitas", "train")
    from edgeguard.defences import harden as hardening
    from edgeguard.defences.config import HardenConfig, PatchTraining, preset
    from edgeguard.quant.width import parse_widths

    limit_threads(threads)
    job: HardenJob | None = None
    folder, profile = resume, load_profile(target)
    if folder is None:
        gir = {"backward_noise": backward_noise, "alignment": alignment, "patch_noise": patch_noise}
        settings = HardenConfig(
            method, parse_widths(bits), epochs, max_steps, batch_size, lr, seed=seed, amp=amp,
            flip=(data != "digits") if flip is None else flip,
            patches=PatchTraining(sizes=integers(patch_sizes, "--patch-sizes"), inner_steps=inner_steps),
        )  # fmt: skip
        chosen = preset(settings, {name: value for name, value in gir.items() if value is not None})
        job = hardening.HardenJob(model, data, chosen, weights, image_size, pretrain_epochs, calibration_images,
                                  estimator, eval_limit, device, profile.signed_activations, profile.weight_bits)  # fmt: skip
        folder = output_folder(out, f"{model.rpartition('/')[2].replace(':', '-')}-{method}")
    with progress_bars() as progress:
        listener = Progressing(progress)
        try:
            if job is None:
                run = hardening.resume(folder, listener, device)
            else:
                run = hardening.harden(job, folder, listener, command_line())
        except KeyboardInterrupt:
            log(f"interrupted; continue with: edgeguard harden --resume {folder}")
            raise typer.Exit(INTERRUPTED) from None
    last = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
    emit({"schema": "edgeguard.harden/1", "run": str(run.path), "metrics": last}, _summary(run.path, last, target), as_json)


def _summary(run: Path, metrics: dict[str, Any], target: str) -> str:
    lines = [f"{'bits':>6} {'accuracy':>9}  attack success of the training patches (simulated)"]
    for width, entry in metrics["widths"].items():
        rates = "  ".join(f"{size} {rate:6.1%}" for size, rate in entry["asr"].items()) or "none: no defence"
        lines.append(f"{width:>6} {entry['accuracy']:9.2%}  {rates}")
    count = next(iter(metrics["widths"].values()))["n"]
    first = next(iter(metrics["widths"]))
    lines += [
        f"on {count} test images; success is P[pred(x_adv) != y | pred(x) = y] at random places",
        f"run: {run}",
        f"next: edgeguard export {run} --target {target} --bits {first}",
    ]
    return "\n".join(lines)


class Progressing:
    """Shows a hardening run: a bar with loss and accuracies on a terminal, one line an epoch elsewhere."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None
        self._loss: float | None = None
        self._measured = ""

    def on_phase(self, name: str, total: int) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=total, note="")
        if self._progress.disable:
            log(f"{name}: {total} steps")

    def on_pretrain(self, loss: float) -> None:
        self._advance(loss)

    def on_step(self, result: StepResult) -> None:
        self._advance(result.loss)

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        parts = []
        for width, entry in metrics["widths"].items():
            worst = f"/{max(entry['asr'].values()):.0%}" if entry["asr"] else ""
            parts.append(f"{width}b {entry['accuracy']:.1%}{worst}")
        self._measured = " ".join(parts)
        if self._progress.disable:
            log(f"epoch {metrics['epoch']}, loss {metrics['loss']:.3f}, accuracy/worst ASR: {self._measured}")

    def _advance(self, loss: float) -> None:
        self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        if self._task is not None:
            self._progress.update(self._task, advance=1, note=f"loss {self._loss:.3f} {self._measured}")
