"""`edgeguard harden`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
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
    TrustCodeOption,
    WeightsOption,
    command_line,
    emit,
    integers,
    limit_threads,
    log,
    output_folder,
    progress_bars,
)
from edgeguard.cli.zoo import list_models
from edgeguard.errors import require
from edgeguard.memory import keep_freed_memory
from edgeguard.targets.profiles import load_profile
from edgeguard.zoo import resolve

if TYPE_CHECKING:
    from edgeguard.defences.defence import StepResult
    from edgeguard.run import Run

INTERRUPTED = 130


def harden(
    model: ModelOption = "resnet20",
    weights: WeightsOption = None,
    data: DataOption = "digits",
    bits: Annotated[str, typer.Option(help="Widths to train at, e.g. 8,4,2 or w4a8.")] = "8,6,5,4,3,2",
    target: TargetOption = "ort",
    method: Annotated[str, typer.Option(help="qadt-r, pbat, dwq, triqdef, or qat: no defence.")] = "qadt-r",
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 8,
    max_steps: Annotated[int, typer.Option(help="Stop after so many steps; 0: never.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 128,
    accumulate: Annotated[int, typer.Option(help="Parts in which a batch is passed, to save memory.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the cosine schedule.")] = 0.05,
    distillation: Annotated[
        float, typer.Option(help="Weight of the float model's answer against the label's; 0: off.")
    ] = 0.5,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    image_size: ImageSizeOption = None,
    flip: Annotated[bool | None, typer.Option(help="Mirror training images; by default all but digits.")] = None,
    pretrain_epochs: Annotated[int, typer.Option(help="Float epochs first, where there are no weights.")] = 4,
    start: Annotated[
        str | None, typer.Option(help="Go on from the quantized model of this run, or zoo:NAME; same model and bits.")
    ] = None,
    estimator: Annotated[
        str, typer.Option(help="Of the first activation scales: mse, percentile, entropy or minmax.")
    ] = "mse",
    calibration_images: Annotated[int, typer.Option(help="Training images for the first activation scales.")] = 512,
    patch_sizes: Annotated[
        str | None, typer.Option(help="Sides of the patches to train against, in pixels, e.g. 5,6,8.")
    ] = None,
    universal_share: Annotated[float, typer.Option(help="Part of each batch under universal patches; 0: none.")] = 0.25,
    passes: Annotated[int, typer.Option(help="Passes of each batch under patches of its own; 0: none.")] = 3,
    ascents: Annotated[int, typer.Option(help="Steps of these patches alone before each of the passes.")] = 0,
    backward_noise: Annotated[float | None, typer.Option(help="GIR (a): noise on quantizers' gradients.")] = None,
    alignment: Annotated[float | None, typer.Option(help="GIR (b): weight of the gradient similarity penalty.")] = None,
    patch_noise: Annotated[float | None, typer.Option(help="GIR (c): noise on the patch gradient.")] = None,
    attack_steps: Annotated[int | None, typer.Option(help="pbat: ascents of each patch in every batch; 25.")] = None,
    attack_width: Annotated[str | None, typer.Option(help="pbat: the width attacked; the largest.")] = None,
    moves: Annotated[
        str | None, typer.Option(help="pbat: places tried with each ascent: full, random or none.")
    ] = None,
    single_width: Annotated[
        bool, typer.Option("--single-width", help="pbat: train at the attacked width alone.")
    ] = False,
    epsilon: Annotated[float | None, typer.Option(help="dwq: largest change of a pixel in grey levels; 8.")] = None,
    feature_penalty: Annotated[float | None, typer.Option(help="triqdef: weight of FDP, on features; 0.8.")] = None,
    gradient_penalty: Annotated[float | None, typer.Option(help="triqdef: weight of GPDP, on gradients; 0.5.")] = None,
    penalty_every: Annotated[
        int | None, typer.Option(help="triqdef: batches from one with penalties to the next; 4.")
    ] = None,
    amp: Annotated[
        bool | None,
        typer.Option("--amp/--no-amp", help="bfloat16 outside the quantizers; by default where it is quicker."),
    ] = None,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Compile the step; by default in runs that win from it."),
    ] = None,
    cuda_graphs: Annotated[
        bool | None,
        typer.Option("--cuda-graphs/--no-cuda-graphs", help="Replay compiled passes; by default on one GPU where it holds."),
    ] = None,
    eval_limit: Annotated[int, typer.Option(help="Test images measured after every epoch.")] = 1000,
    out: OutOption = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue this interrupted run; no option of the training is read.")
    ] = None,
    trust_code: TrustCodeOption = False,
    list_ready: Annotated[
        bool, typer.Option("--list", help="Only list the ready models, zoo:NAME, that export takes.")
    ] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Train a quantized model that withstands adversarial patches, at all widths at once."""
    if list_ready:
        list_models(as_json)
        return
    require("torch", "train")
    require("brevitas", "train")
    from edgeguard.defences import harden as hardening
    from edgeguard.defences.config import BASELINES, HardenConfig, against, preset
    from edgeguard.defences.distributed import joined
    from edgeguard.defences.job import HardenJob
    from edgeguard.defences.parts import PerImagePatches, UniversalPatches
    from edgeguard.models import is_code
    from edgeguard.quant.width import parse_width, parse_widths

    limit_threads(threads)
    keep_freed_memory()
    job: HardenJob | None = None
    folder, profile = resume, load_profile(target)
    if folder is None:
        gir = {"backward_noise": backward_noise, "alignment": alignment, "patch_noise": patch_noise}
        sizes = None if patch_sizes is None else integers(patch_sizes, "--patch-sizes")
        settings = HardenConfig(
            method, parse_widths(bits), epochs, max_steps, batch_size, accumulate, lr, seed=seed,
            flip=(data != "digits") if flip is None else flip, distillation=distillation,
            universal=against(UniversalPatches(share=universal_share), sizes) if universal_share else None,
            per_image=against(PerImagePatches(passes=passes, ascents=ascents), sizes) if passes else None,
        )  # fmt: skip
        own = {
            "attack_steps": attack_steps, "attack_width": None if attack_width is None else parse_width(attack_width),
            "moves": moves, "single_width": single_width or None, "epsilon": epsilon, "feature_penalty": feature_penalty,
            "gradient_penalty": gradient_penalty, "penalty_every": penalty_every,
            "sizes": sizes if method in BASELINES else None,
        }  # fmt: skip
        chosen = preset(settings, _given(gir), _given(own))
        job = HardenJob(
            model, data, chosen, weights, image_size, pretrain_epochs, calibration_images, estimator, eval_limit, device,
            profile.signed_activations, profile.weight_bits, amp, compiled, cuda_graphs,
            None if start is None else resolve(start),
        )  # fmt: skip
        folder = output_folder(out, f"{model.rpartition('/')[2].replace(':', '-')}-{method}")
    with joined() as processes, _listening(processes.first) as listener:
        try:
            if job is None:
                run = hardening.resume(folder, listener, device, processes, trust_code)
            else:
                run = hardening.harden(job, folder, listener, command_line(), processes)
        except KeyboardInterrupt:
            if processes.first:
                asked = trust_code or (job is not None and is_code(job.model))
                log(f"interrupted; continue with: edgeguard harden --resume {folder}{' --trust-code' if asked else ''}")
            raise typer.Exit(INTERRUPTED) from None
    if not processes.first:
        return
    last = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
    emit(
        {"schema": "edgeguard.harden/1", "run": str(run.path), "metrics": last},
        _summary(run, last, target),
        as_json,
    )


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def _summary(run: Run, metrics: dict[str, Any], target: str) -> str:
    from edgeguard.quant.width import parse_width

    lines = [f"{'bits':>6} {'accuracy':>9}  attack success of the training patches (simulated)"]
    for width, entry in metrics["widths"].items():
        rates = (
            "  ".join(f"{size} {rate:6.1%}" for size, rate in entry["asr"].items())
            or "none: no universal patches in training"
        )
        lines.append(f"{width:>6} {entry['accuracy']:9.2%}  {rates}")
    count = next(iter(metrics["widths"].values()))["n"]
    first = next((width for width in metrics["widths"] if parse_width(width).deployable), None)
    lines += [
        f"on {count} test images; success is P[pred(x_adv) != y | pred(x) = y] at random places",
        f"run: {run.path}",
    ]
    if first is not None:
        trust = " --trust-code" if run.names_code else ""
        lines.append(f"next: edgeguard export {run.path} --target {target} --bits {first}{trust}")
    return "\n".join(lines)


@contextmanager
def _listening(first: bool) -> Iterator[Progressing | Quiet]:
    """Of several processes the first one shows how far all are."""
    if not first:
        yield Quiet()
        return
    with progress_bars() as progress:
        yield Progressing(progress)


class Quiet:
    """Of the processes that torchrun started but the first: one tells what all do."""

    def on_phase(self, name: str, total: int) -> None:
        """Nothing."""

    def on_note(self, text: str) -> None:
        """Nothing."""

    def on_pretrain(self, loss: float) -> None:
        """Nothing."""

    def on_step(self, result: StepResult) -> None:
        """Nothing."""

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        """Nothing."""


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

    def on_note(self, text: str) -> None:
        log(text)

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
