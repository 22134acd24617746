"""`harden`: from a float model and data to a Run on disk, resumable at any time."""

from __future__ import annotations

import copy
import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from edgeguard import files, folders
from edgeguard.calib import calibrate, calibration_indices
from edgeguard.data import Dataset, check_labels, load_splits
from edgeguard.defences.checkpoint import load, save
from edgeguard.defences.config import passes_per_batch
from edgeguard.defences.defence import StepResult
from edgeguard.defences.distributed import ALONE, Processes
from edgeguard.defences.evaluate import evaluate
from edgeguard.defences.graphs import settle_graphs
from edgeguard.defences.job import HardenJob, config_to_json, job_from_json, run_config
from edgeguard.defences.pretrain import pretrain
from edgeguard.defences.speed import settle
from edgeguard.defences.trainer import Trainer
from edgeguard.errors import InputError, MissingDependency
from edgeguard.models import FloatModel, load_model
from edgeguard.patch import check_fits
from edgeguard.quant.model import Normalization, quantize_model
from edgeguard.quant.scheme import QuantScheme
from edgeguard.quant.view import compiler_missing
from edgeguard.run import CONFIG, METRICS, Run, restore_model

CALIBRATED = "ptq"
"""The method that a run of `edgeguard calibrate` names."""


class Listener(Protocol):
    """Receives progress; the library itself never prints."""

    def on_phase(self, name: str, total: int) -> None:
        """A phase of `total` steps begins: pretrain or harden."""

    def on_note(self, text: str) -> None:
        """Something was decided that the user did not ask for."""

    def on_pretrain(self, loss: float) -> None:
        """One step of float training."""

    def on_step(self, result: StepResult) -> None:
        """One step of hardening."""

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        """One epoch ended; the line that was added to metrics.jsonl."""


def choose_device(name: str, processes: Processes = ALONE) -> torch.device:
    """auto: CUDA when there is one. Of several processes on a machine each gets a GPU of its own.

    Raises:
        InputError: an unknown name, or one GPU named for several processes. MissingDependency: a CUDA device that is not
            there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise InputError(f"unknown device {name!r}; expected auto, cpu, cuda or cuda:N") from exc
    if device.type == "cuda" and processes.world > 1:
        if device.index is not None:
            raise InputError(f"--device {name} names one GPU for {processes.world} processes; use --device cuda")
        device = torch.device("cuda", processes.local_rank)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MissingDependency(f"{device} is not available: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device {name!r}; expected auto, cpu, cuda or cuda:N")
    return device


def harden(job: HardenJob, out: Path, listener: Listener, command: str = "", processes: Processes = ALONE) -> Run:
    """Train a new run in the folder `out`, which must not exist.

    processes: that train it together, see `joined`. Only the first writes and measures, and only its listener hears of
    epochs; the folder is its own.

    Raises:
        InputError: bad data, weights, options or folder; nothing is written before everything was checked.
        ExportError: the model has a layer without an integer form.
        KeyboardInterrupt: passed on after a checkpoint was written.
    """
    if processes.first:
        if (out / CONFIG).is_file():
            raise InputError(f"{out} exists already, a run; continue it with --resume {out}, or name a new folder with --out")
        folders.new_folder(out)
    device = choose_device(job.device, processes)
    train, test = load_splits(job.data, job.image_size, seed=job.config.seed)
    _check(job, train)
    processes.check(job.config.batch_size, job.config.accumulate)
    job = _settled(job, len(train), device, listener, processes)
    start = _start(job)
    if start is not None:
        job = replace(job, start_sha256=start.checkpoint_sha256())
    float_model = load_model(
        job.model, train.num_classes if job.weights is None else None, job.weights, job.config.seed
    )
    check_labels(train, float_model.num_classes)
    check_labels(test, float_model.num_classes)
    scheme = QuantScheme(job.config.widths, signed_activations=job.signed_activations,
                         max_weight_bits=job.max_weight_bits)  # fmt: skip
    normalization = Normalization(float_model.mean, float_model.std)
    quantize_model(float_model.module, scheme, normalization)  # refuses what has no integer form before anything runs
    config = run_config(command, float_model, job.weights, scheme, job.data, train, test, config_to_json(job))
    run = Run.create(out, config) if processes.first else Run(out, config, trust_code=True)
    with _kept(run, processes):
        trainer = _begin(run, job, float_model, start, train, device, listener, processes)
        return _train(run, trainer, test, job.eval_limit, listener)


def _begin(run: Run, job: HardenJob, float_model: FloatModel, start: Run | None, train: Dataset, device: torch.device,
           listener: Listener, processes: Processes) -> Trainer:  # fmt: skip
    """Everything before the first step, up to the first checkpoint. start: whose quantized model training begins with."""
    if job.weights is None and job.pretrain_epochs:
        steps = job.pretrain_epochs * max(1, len(train) // job.config.batch_size)
        listener.on_phase("pretrain", steps)
        pretrain(float_model, train, job.config, job.pretrain_epochs, device, listener.on_pretrain)
        processes.copied(float_model.module, device)
    teacher = copy.deepcopy(float_model) if job.config.distillation else None
    model = quantize_model(float_model.module, run.scheme(), Normalization(float_model.mean, float_model.std))
    if start is None:
        chosen = calibration_indices(len(train), job.calibration_images, job.config.seed)
        calibrate(model, train.images(chosen), job.estimator)
    else:
        restore_model(model, start.read_checkpoint()[0], start.checkpoint)
    trainer = Trainer(model, train, job.config, device, teacher, processes)
    save(run, trainer)
    return trainer


def resume(path: Path, listener: Listener, device: str = "auto", processes: Processes = ALONE,
           trust_code: bool = False) -> Run:  # fmt: skip
    """Continue an interrupted run from its last checkpoint; it ends with the same bytes as if never interrupted.

    One that was interrupted before its first checkpoint begins again, as it was asked for.
    processes: as of `harden`; all read the folder. Another number of them gives the same up to rounding. trust_code: as of
    `Run.load`.

    Raises:
        InputError: no run, another process is at work on it, what it began with has changed since, or a model by code that
            is not trusted.
    """
    run = Run.load(path, trust_code)
    run.check_trust()
    settings = run.config["training"].get("config")
    if isinstance(settings, dict) and settings.get("method") == CALIBRATED:
        raise InputError(f"{path} was calibrated, not trained; there is nothing to resume")
    job = job_from_json(run)
    train, test = load_splits(job.data, job.image_size, seed=job.config.seed)
    if (train.sha256, test.sha256) != (run.config["data"]["train_sha256"], run.config["data"]["test_sha256"]):
        raise InputError(f"{job.data} has changed since the run {path} began; it cannot be continued")
    if job.config.compiled and (missing := compiler_missing()):
        raise MissingDependency(f"the run {path} was begun compiled, and {missing}")
    with _kept(run, processes):
        begun = run.checkpoint.is_file()
        processes.wait()  # until all have looked, before the first one writes it
        if not begun:
            listener.on_note(f"{path} stopped before its first checkpoint; it begins again")
            trainer = _begin_again(run, job, train, choose_device(device, processes), listener, processes)
            return _train(run, trainer, test, job.eval_limit, listener)
        if "defence" not in run.read_checkpoint()[1]:
            raise InputError(f"{path} is a packed model without the state of its training; it cannot be resumed")
        teacher = run.float_model() if job.config.distillation else None
        trainer = Trainer(run.build(), train, job.config, choose_device(device, processes), teacher, processes)
        return _train(run, trainer, test, job.eval_limit, listener, load(run, trainer))


def _begin_again(run: Run, job: HardenJob, train: Dataset, device: torch.device, listener: Listener,
                 processes: Processes) -> Trainer:  # fmt: skip
    """As `_begin`, of a run that its configuration describes.

    Raises:
        InputError: the model, its float weights or the run that it starts from is not what it was.
    """
    start = _start(job)
    weights_sha256 = files.sha256(job.weights) if job.weights else None
    weights_sha256 = files.sha256(job.weights) if job.weights else None
    now = {
        "model": (job.model, job.model, run.config["model"]["spec"]),
        "file of float weights": (job.weights, weights_sha256, run.config["model"]["weights_sha256"]),
        "run to start from": (job.start, start.checkpoint_sha256() if start else None, job.start_sha256),
    }
    for what, (where, found, wanted) in now.items():
        if found != wanted:
            raise InputError(f"the {what}, {where}, is not what the run {run.path} began with; it cannot be continued")
    classes = train.num_classes if job.weights is None else None
    float_model = load_model(job.model, classes, job.weights, job.config.seed)
    return _begin(run, job, float_model, start, train, device, listener, processes)


@contextmanager
def _kept(run: Run, processes: Processes) -> Iterator[None]:
    """The run's folder is kept to these processes; the first of them holds it. What cannot be written can be later."""
    with folders.held(run.path) if processes.first else nullcontext():
        try:
            yield
        except InputError as exc:
            if isinstance(exc.__cause__, OSError):
                exc.args = (f"{exc}; when that is mended, go on with: edgeguard harden --resume {run.path}",)
            raise


def _settled(job: HardenJob, images: int, device: torch.device, listener: Listener, processes: Processes) -> HardenJob:
    """The job with nothing left to the machine; what one of the processes lacks none of them uses."""
    config = job.config
    batches = config.max_steps or config.epochs * (images // config.batch_size)
    passes = round(batches * passes_per_batch(config))
    config, notes = settle(config, job.amp, job.compiled, job.cuda_graphs, passes, device, processes.world)
    amp, compiled = not processes.any(not config.amp), not processes.any(not config.compiled)
    config = replace(config, amp=amp, compiled=compiled)
    for note in notes:
        listener.on_note(note)
    return replace(job, config=config, amp=config.amp, compiled=config.compiled, cuda_graphs=config.cuda_graphs)


def _start(job: HardenJob) -> Run | None:
    """The run that training begins with.

    Raises:
        InputError: it is no run, or of another model, other widths or another quantization.
    """
    if job.start is None:
        return None
    run = Run.load(job.start)
    known = (run.config["model"]["spec"], run.widths, run.scheme().signed_activations, run.scheme().max_weight_bits)
    wanted = (job.model, job.config.widths, job.signed_activations, job.max_weight_bits)
    for what, one, other in zip(("model", "widths", "signed activations", "weight bits"), known, wanted, strict=True):
        if one != other:
            shown = [", ".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in (one, other)]
            raise InputError(f"--start {job.start}: its {what} are {shown[0]}, and {shown[1]} are asked for")
    return run


def _check(job: HardenJob, train: Dataset) -> None:
    if len(train) < job.config.batch_size:
        raise InputError(
            f"{job.data} has {len(train)} training images, fewer than one batch of {job.config.batch_size}"
        )
    for side in job.config.patch_sizes() or ():
        check_fits((side, side), (train.image_shape[1], train.image_shape[2]))


def _train(run: Run, trainer: Trainer, test: Dataset, eval_limit: int, listener: Listener,
           losses: Sequence[float] = ()) -> Run:  # fmt: skip
    """Train to the end. losses: of the steps that the current epoch has behind it."""
    if not trainer.finished and (reason := settle_graphs(trainer)):
        listener.on_note(f"training goes on without CUDA graphs, and slower: {reason}")
    listener.on_phase("harden", trainer.total_steps - trainer.step_index)
    lines = _kept_metrics(run, trainer)
    of_epoch = list(losses)
    with _deferred_interrupt() as interrupted:
        while not trainer.finished:

            def on_step(result: StepResult) -> None:
                of_epoch.append(result.loss)
                listener.on_step(result)
                if trainer.processes.any(interrupted()) and not trainer.between_epochs:
                    save(run, trainer, of_epoch)
                    raise KeyboardInterrupt

            trainer.run_epoch(on_step)
            if trainer.processes.first:
                metrics = {"step": trainer.step_index, "epoch": trainer.epoch, "loss": float(np.mean(of_epoch)),
                           "widths": evaluate(trainer, test, eval_limit, trainer.config.seed)}  # fmt: skip
                lines.append(json.dumps(metrics))
                files.write_bytes(run.path / METRICS, ("\n".join(lines) + "\n").encode())
                save(run, trainer)
                listener.on_epoch(metrics)
            of_epoch.clear()
            if trainer.processes.any(interrupted()) and not trainer.finished:  # all wait here for the first one
                raise KeyboardInterrupt
    if trainer.processes.first and not lines:
        raise InputError(f"{run.path} is trained to its end, and {METRICS} is not there; export it without, or train it again")
    return run


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """An interrupt (Ctrl-C) waits for the end of a batch, where a run can go on from; a second one does not wait.

    Yields: whether one came. Outside the main thread, where signals cannot be handled, interrupts are not deferred.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = threading.Event()

    def handle(*_: Any) -> None:
        if came.is_set():
            raise KeyboardInterrupt
        came.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _kept_metrics(run: Run, trainer: Trainer) -> list[str]:
    """Lines of metrics.jsonl up to the checkpoint, which is written after it: a run killed between the two repeats the epoch.

    Raises:
        InputError: it is damaged.
    """
    path = run.path / METRICS
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if json.loads(line)["step"] <= trainer.step_index]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise InputError(f"{path} is damaged ({exc!s:.100}); delete it to go on without the metrics of earlier epochs") from exc
