"""`harden`: from a float model and data to a Run on disk, resumable at any time."""

from __future__ import annotations

import copy
import json
import platform
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import brevitas
import numpy as np
import torch
import torchvision
from torch import Tensor

import edgeguard
from edgeguard import files
from edgeguard.calib import calibrate, calibration_indices
from edgeguard.data import Dataset, check_labels, load_splits
from edgeguard.defences.config import (
    BASELINES,
    GIR,
    HardenConfig,
    PerImagePatches,
    UniversalPatches,
    part_from_json,
    part_to_json,
    passes_per_batch,
)
from edgeguard.defences.defence import StepResult
from edgeguard.defences.distributed import ALONE, Processes
from edgeguard.defences.evaluate import evaluate
from edgeguard.defences.pretrain import pretrain
from edgeguard.defences.speed import settle
from edgeguard.defences.trainer import Trainer
from edgeguard.errors import InputError, MissingDependency
from edgeguard.inttype import MAX_BITS
from edgeguard.models import FloatModel, load_model
from edgeguard.patch import check_fits
from edgeguard.quant.model import Normalization, quantize_model
from edgeguard.quant.scheme import QuantScheme
from edgeguard.quant.view import compiler_missing
from edgeguard.quant.width import parse_width
from edgeguard.run import METRICS, MODEL, PATCHES, Run, restore_model

PARTS: Mapping[str, Any] = {"universal": UniversalPatches, "per_image": PerImagePatches, **BASELINES}
"""Parts of a configuration that a method may not have."""

TEACHER, DEFENCE = "teacher.", "defence."
"""Prefixes of a checkpoint's tensors, beside `MODEL` and the optimizers'."""

CALIBRATED = "ptq"
"""The method that a run of `edgeguard calibrate` names."""


@dataclass(frozen=True)
class HardenJob:
    """Everything `harden` needs besides the training configuration.

    model, data: as on the command line. weights: trained float weights; None trains from scratch for `pretrain_epochs`.
    calibration_images, estimator: for the activation scales that training starts from.
    eval_limit: images measured after every epoch. device: auto, cpu, cuda or cuda:N.
    signed_activations, max_weight_bits: what the target asks for, see `QuantScheme`.
    amp, compiled: decide what the configuration says of them; None leaves it to the machine.
    start: a run of the same model and widths whose quantized model training begins with, instead of calibrating the float
    one; start_sha256: of its checkpoint, filled in when the run begins. The float weights remain what distillation teaches.
    """

    model: str
    data: str
    config: HardenConfig
    weights: Path | None = None
    image_size: int | None = None
    pretrain_epochs: int = 4
    calibration_images: int = 512
    estimator: str = "mse"
    eval_limit: int = 1000
    device: str = "auto"
    signed_activations: bool = False
    max_weight_bits: int = MAX_BITS
    amp: bool | None = None
    compiled: bool | None = None
    start: Path | None = None
    start_sha256: str | None = None


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
        files.new_folder(out)
    device = choose_device(job.device, processes)
    train, test = load_splits(job.data, job.image_size, seed=job.config.seed)
    _check(job, train)
    processes.check(job.config.batch_size, job.config.accumulate)
    job = _settled(job, len(train), device, listener, processes)
    start = _start(job)
    if start is not None:
        job = replace(job, start_sha256=files.sha256(start.checkpoint))
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
    run = Run.create(out, config) if processes.first else Run(out, config)
    if job.weights is None and job.pretrain_epochs:
        steps = job.pretrain_epochs * max(1, len(train) // job.config.batch_size)
        listener.on_phase("pretrain", steps)
        pretrain(float_model, train, job.config, job.pretrain_epochs, device, listener.on_pretrain)
        processes.copied(float_model.module, device)
    teacher = copy.deepcopy(float_model) if job.config.distillation else None
    model = quantize_model(float_model.module, scheme, normalization)
    if start is None:
        chosen = calibration_indices(len(train), job.calibration_images, job.config.seed)
        calibrate(model, train.images(chosen), job.estimator)
    else:
        restore_model(model, start.read_checkpoint()[0], start.checkpoint)
    trainer = Trainer(model, train, job.config, device, teacher, processes)
    save(run, trainer)
    return _train(run, trainer, test, job.eval_limit, listener)


def resume(path: Path, listener: Listener, device: str = "auto", processes: Processes = ALONE) -> Run:
    """Continue an interrupted run from its last checkpoint; it ends with the same bytes as if never interrupted.

    processes: as of `harden`; all read the folder. Another number of them gives the same up to rounding.

    Raises:
        InputError: no run, no checkpoint, or the data changed since.
    """
    run = Run.load(path)
    settings = run.config["training"].get("config")
    if isinstance(settings, dict) and settings.get("method") == CALIBRATED:
        raise InputError(f"{path} was calibrated, not trained; there is nothing to resume")
    job = job_from_json(run)
    train, test = load_splits(job.data, job.image_size, seed=job.config.seed)
    if (train.sha256, test.sha256) != (run.config["data"]["train_sha256"], run.config["data"]["test_sha256"]):
        raise InputError(f"{job.data} has changed since the run {path} began; it cannot be continued")
    if not run.checkpoint.is_file():
        raise InputError(f"{path} stopped before its first checkpoint; delete it and start again")
    if "defence" not in run.read_checkpoint()[1]:
        raise InputError(f"{path} is a packed model without the state of its training; it cannot be resumed")
    if job.config.compiled and (missing := compiler_missing()):
        raise MissingDependency(f"the run {path} was begun compiled, and {missing}")
    teacher = run.float_model() if job.config.distillation else None
    trainer = Trainer(run.build(), train, job.config, choose_device(device, processes), teacher, processes)
    load(run, trainer)
    return _train(run, trainer, test, job.eval_limit, listener)


def _settled(job: HardenJob, images: int, device: torch.device, listener: Listener, processes: Processes) -> HardenJob:
    """The job with nothing left to the machine; what one of the processes lacks none of them uses."""
    config = job.config
    batches = config.max_steps or config.epochs * (images // config.batch_size)
    passes = round(batches * passes_per_batch(config))
    config, notes = settle(config, job.amp, job.compiled, passes, device)
    amp, compiled = not processes.any(not config.amp), not processes.any(not config.compiled)
    config = replace(config, amp=amp, compiled=compiled)
    for note in notes:
        listener.on_note(note)
    return replace(job, config=config, amp=config.amp, compiled=config.compiled)


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


def _train(run: Run, trainer: Trainer, test: Dataset, eval_limit: int, listener: Listener) -> Run:
    listener.on_phase("harden", trainer.total_steps - trainer.step_index)
    lines = _kept_metrics(run, trainer)
    with _deferred_interrupt() as interrupted:
        while not trainer.finished:
            losses: list[float] = []

            def on_step(result: StepResult, losses: list[float] = losses) -> None:
                losses.append(result.loss)
                listener.on_step(result)
                if trainer.processes.any(interrupted()):
                    save(run, trainer)
                    raise KeyboardInterrupt

            trainer.run_epoch(on_step)
            if trainer.processes.first:
                metrics = {"step": trainer.step_index, "epoch": trainer.epoch, "loss": float(np.mean(losses)),
                           "widths": evaluate(trainer, test, eval_limit, trainer.config.seed)}  # fmt: skip
                lines.append(json.dumps(metrics))
                save(run, trainer)
                files.write_bytes(run.path / METRICS, ("\n".join(lines) + "\n").encode())
                listener.on_epoch(metrics)
            trainer.processes.wait()
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
    """Lines of metrics.jsonl up to the checkpoint: a run killed between the two files repeats the epoch."""
    path = run.path / METRICS
    lines = path.read_text().splitlines() if path.is_file() else []
    return [line for line in lines if json.loads(line)["step"] <= trainer.step_index]


def save(run: Run, trainer: Trainer) -> None:
    """Write the whole state of a training run, and its patches as files; only the first process does."""
    if not trainer.processes.first:
        return
    tensors: dict[str, Tensor] = {MODEL + name: value for name, value in trainer.model.state_dict().items()}
    if trainer.teacher is not None:
        tensors.update({TEACHER + name: value for name, value in trainer.teacher.module.state_dict().items()})
    for prefix, optimizer in trainer.optimizers().items():
        for index, entry in optimizer.state_dict()["state"].items():
            for name, value in entry.items():
                if value is not None:
                    tensors[f"{prefix}.{index}.{name}"] = torch.as_tensor(value)
    defence = trainer.defence.state()
    numbers = {key: value for key, value in defence.items() if isinstance(value, int)}
    tensors.update({DEFENCE + k: torch.from_numpy(v) for k, v in defence.items() if k not in numbers})
    patches = trainer.defence.patches()
    if patches:
        folder = run.path / PATCHES
        folder.mkdir(exist_ok=True)
        for number, patch in enumerate(patches):
            patch.save(folder / f"{patch.size[0]}x{patch.size[1]}-{number}.npz")
    run.write_checkpoint(tensors, {"step": trainer.step_index, "defence": numbers})


def load(run: Run, trainer: Trainer) -> None:
    """Put a checkpoint's state into a fresh trainer of the same configuration."""
    tensors, state = run.read_checkpoint()
    restore_model(trainer.model, tensors, run.checkpoint)
    if trainer.teacher is not None:
        trainer.teacher.module.load_state_dict(_part(tensors, TEACHER))
    for prefix, optimizer in trainer.optimizers().items():
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in _part(tensors, prefix + ".").items():
            index, _, key = name.partition(".")
            entries.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
    trainer.step_index = int(state["step"])
    trainer.defence.load_state({**{k: v.numpy() for k, v in _part(tensors, DEFENCE).items()}, **state["defence"]})


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def run_config(command: str, float_model: FloatModel, weights: Path | None, scheme: QuantScheme, data: str,
               train: Dataset, test: Dataset, training: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    """The configuration that a new run is created with.

    training: how the weights and scales came about; every kind of run has `data`, `image_size`, `patch_sizes` and a `config` with
    `method`, `widths` and `seed`; `patch_sizes` are the sides of the patches trained against, or None.
    """
    return {
        "command": command,
        "model": {
            "spec": float_model.spec, "num_classes": float_model.num_classes, "mean": float_model.mean,
            "std": float_model.std, "weights_sha256": files.sha256(weights) if weights else None,
        },
        "scheme": {**asdict(scheme), "widths": [str(width) for width in scheme.widths]},
        "data": {
            "spec": data, "image_shape": train.image_shape, "class_names": train.class_names,
            "train_sha256": train.sha256, "test_sha256": test.sha256, "train_size": len(train), "test_size": len(test),
        },
        "training": training,
        "versions": versions(),
    }  # fmt: skip


def config_to_json(job: HardenJob) -> dict[str, Any]:
    """The job and its configuration, resolved, as plain JSON values."""
    entry = asdict(job)
    entry["config"]["widths"] = [str(width) for width in job.config.widths]
    for name in PARTS:
        part = getattr(job.config, name)
        entry["config"][name] = None if part is None else part_to_json(part)
    entry["weights"] = str(job.weights) if job.weights else None
    entry["start"] = str(job.start) if job.start else None
    entry["patch_sizes"] = job.config.patch_sizes()
    return entry


def job_from_json(run: Run) -> HardenJob:
    """The job that a run was started with.

    Raises:
        InputError: a key is missing or unknown.
    """
    try:
        entry = dict(run.config["training"])
        del entry["patch_sizes"]
        config = dict(entry.pop("config"))
        config["widths"] = tuple(parse_width(width) for width in config["widths"])
        config["gir"] = GIR(**config["gir"])
        for name, kind in PARTS.items():
            if name in BASELINES and name not in config:
                continue  # the run is older than the method
            if config[name] is not None:
                config[name] = part_from_json(kind, config[name])
        for name in ("weights", "start"):
            entry[name] = Path(entry[name]) if entry.get(name) else None
        return HardenJob(**entry, config=HardenConfig(**config))
    except (KeyError, TypeError) as exc:
        raise InputError(f"{run.path}: the configuration of the run cannot be read: {exc}") from exc


def versions() -> dict[str, str]:
    """What a result was computed with."""
    return {
        "edgeguard": edgeguard.__version__, "python": platform.python_version(), "torch": torch.__version__,
        "torchvision": torchvision.__version__, "brevitas": brevitas.__version__, "numpy": np.__version__,
        "machine": platform.machine(), "threads": str(torch.get_num_threads()),
    }  # fmt: skip
