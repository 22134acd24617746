"""`edgeguard calibrate`."""

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
    limit_threads,
    log,
    output_folder,
    progress_bars,
)
from edgeguard.errors import require
from edgeguard.targets.profiles import load_profile

if TYPE_CHECKING:
    from edgeguard.run import Run


def calibrate(
    model: ModelOption = "resnet20",
    weights: WeightsOption = None,
    data: DataOption = "digits",
    bits: Annotated[str, typer.Option(help="Widths, e.g. 8,6 or w4a8.")] = "8",
    target: TargetOption = "ort",
    estimator: Annotated[str, typer.Option(help="Of the activations' ranges: mse, percentile, entropy or minmax.")] = "mse",
    calibration_images: Annotated[int, typer.Option(help="Training images to observe.")] = 512,
    patched: Annotated[float, typer.Option(help="Share of these under a patch, 0 to 1, so that ranges cover it.")] = 0.0,
    patch: Annotated[Path | None, typer.Option(help="Patch file (npz) for them; random noise by default.")] = None,
    patch_size: Annotated[int, typer.Option(help="Side of the noise in pixels; 0: a fifth of the image.")] = 0,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    image_size: ImageSizeOption = None,
    eval_limit: Annotated[int, typer.Option(help="Test images measured.")] = 1000,
    out: OutOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Quantize a trained model without training: observe activations on a few images and choose their ranges."""
    require("torch", "train")
    require("brevitas", "train")
    from edgeguard.defences.ptq import CalibrateJob, quantize
    from edgeguard.quant.width import parse_widths

    limit_threads(threads)
    profile = load_profile(target)
    job = CalibrateJob(
        model, data, parse_widths(bits), weights, image_size, estimator, calibration_images, patched, patch, patch_size,
        seed, eval_limit, device, profile.signed_activations, profile.weight_bits,
    )  # fmt: skip
    if weights is None:
        log(f"no --weights: {model} keeps what its constructor gives it, which for our models and torchvision's is random")
    folder = output_folder(out, f"{model.rpartition('/')[2].replace(':', '-')}-ptq")
    with progress_bars() as progress:
        run = quantize(job, folder, _Progressing(progress), command_line())
    metrics = json.loads((run.path / "metrics.jsonl").read_text())
    document = {"schema": "edgeguard.calibrate/1", "run": str(run.path), "estimator": estimator, "metrics": metrics}
    emit(document, _summary(run, metrics, target), as_json)


def _summary(run: Run, metrics: dict[str, Any], target: str) -> str:
    lines = [f"{'bits':>6} {'accuracy':>9}  against float"]
    reference = metrics["float"]["accuracy"]
    lines.append(f"{'float':>6} {reference:9.2%}")
    for width, entry in metrics["widths"].items():
        lines.append(f"{width:>6} {entry['accuracy']:9.2%}  {100 * (entry['accuracy'] - reference):+.2f} points")
    lines += [
        f"on {metrics['float']['n']} test images, simulated",
        f"run: {run.path}",
        f"next: edgeguard export {run.path} --target {target} --bits {next(iter(metrics['widths']))}"
        f"{' --trust-code' if run.names_code else ''}",
    ]
    return "\n".join(lines)


class _Progressing:
    """A bar for each phase on a terminal, one line elsewhere."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def on_phase(self, name: str, total: int) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=total, note="images")
        if self._progress.disable:
            log(f"{name}: {total} images")

    def on_images(self, count: int) -> None:
        if self._task is not None:
            self._progress.update(self._task, advance=count)
