"""`harden`: from a float model and data to a Run on disk, resumable at any time."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
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
from edgeguard.defences.config import GIR, HardenConfig, PatchTraining
from edgeguard.defences.evaluate import evaluate
from edgeguard.defences.pretrain import pretrain
from edgeguard.defences.trainer import StepResult, Trainer
from edgeguard.errors import InputError, MissingDependency
from edgeguard.inttype import MAX_BITS
from edgeguard.models import FloatModel, load_model
from edgeguard.patch import check_fits
from edgeguard.quant.model import Normalization, quantize_model
from edgeguard.quant.scheme import QuantScheme
from edgeguard.quant.width import parse_width
from edgeguard.run import METRICS, MODEL, PATCHES, Run, restore_model

CALIBRATED = "ptq"
"""The method that a run of `edgeguard calibrate` names."""


@dataclass(frozen=True)
class HardenJob:
    """Everything `harden` needs besides the training configuration.

    model, data: as on the command line. weights: trained float weights; None trains from scratch for `pretrain_epochs`.
    calibration_images, estimator: for the activation scales that training starts from.
    eval_limit: images measured after every epoch. device: auto, cpu, cuda or cuda:N.
    signed_activations, max_weight_bits: what the target asks for, see `QuantScheme`.
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


class Listener(Protocol):
    """Receives progress; the library itself never prints."""

    def on_phase(self, name: str, total: int) -> None:
        """A phase of `total` steps begins: pretrain or harden."""

    def on_pretrain(self, loss: float) -> None:
        """One step of float training."""

    def on_step(self, result: StepResult) -> None:
        """One step of hardening."""

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        """One epoch ended; the line that was added to metrics.jsonl."""


def choose_device(name: str) -> torch.device:
    """auto: CUDA when there is one.

    Raises:
        InputError: an unknown name. MissingDependency: a CUDA device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise InputError(f"unknown device {name!r}; expected auto, cpu, cuda or cuda:N") from exc
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MissingDependency(f"{name} is not available: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device {name!r}; expected auto, cpu, cuda or cuda:N")
    return device


def harden(job: HardenJob, out: Path, listener: Listener, command: str = "") -> Run:
    """Train a new run in the folder `out`, which must not exist.

    Raises:
        InputError: bad data, weights, options or folder; nothing is written before everything was checked.
        ExportError: the model has a layer without an integer form.
        KeyboardInterrupt: passed on after a checkpoint was written.
    """
    files.new_folder(out)
    device = choose_device(job.device)
    train, test = load_splits(job.data, job.image_size, seed=job.config.seed)
    _check(job, train, device)
    float_model = load_model(job.model, train.num_classes if job.weights is None else None, job.weights, job.config.seed)
    check_labels(train, float_model.num_classes)
    check_labels(test, float_model.num_classes)
    scheme = QuantScheme(job.config.widths, signed_activations=job.signed_activations,
                         max_weight_bits=job.max_weight_bits)  # fmt: skip
    normalization = Normalization(float_model.mean, float_model.std)
    quantize_model(float_model.module, scheme, normalization)  # refuses what has no integer form before anything runs
    config = run_config(command, float_model, job.weights, scheme, job.data, train, test, config_to_json(job))
    run = Run.create(out, config)
    if job.weights is None and job.pretrain_epochs:
        steps = job.pretrain_epochs * max(1, len(train) // job.config.batch_size)
        listener.on_phase("pretrain", steps)
        pretrain(float_model, train, job.config, job.pretrain_epochs, device, listener.on_pretrain)
    model = quantize_model(float_model.module, scheme, normalization)
    chosen = calibration_indices(len(train), job.calibration_images, job.config.seed)
    calibrate(model, train.images(chosen), job.estimator)
    trainer = Trainer(model, train, job.config, device)
    save(run, trainer)
    return _train(run, trainer, test, job.eval_limit, listener)


def resume(path: Path, listener: Listener, device: str = "auto") -> Run:
    """Continue an interrupted run from its last checkpoint; it ends with the same bytes as if never interrupted.

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
    trainer = Trainer(run.build(), train, job.config, choose_device(device))
    load(run, trainer)
    return _train(run, trainer, test, job.eval_limit, listener)


def _check(job: HardenJob, train: Dataset, device: torch.device) -> None:
    if job.config.amp and device.type != "cuda":
        raise InputError(f"--amp is for CUDA devices; the device is {device}")
    if len(train) < job.config.batch_size:
        raise InputError(f"{job.data} has {len(train)} training images, fewer than one batch of {job.config.batch_size}")
    for side in job.config.patches.sizes if job.config.patches else ():
        check_fits((side, side), (train.image_shape[1], train.image_shape[2]))


def _train(run: Run, trainer: Trainer, test: Dataset, eval_limit: int, listener: Listener) -> Run:
    listener.on_phase("harden", trainer.total_steps - trainer.step_index)
    lines = _kept_metrics(run, trainer)
    try:
        while not trainer.finished:
            losses: list[float] = []

            def on_step(result: StepResult, losses: list[float] = losses) -> None:
                losses.append(result.loss)
                listener.on_step(result)

            trainer.run_epoch(on_step)
            metrics = {"step": trainer.step_index, "epoch": trainer.epoch, "loss": float(np.mean(losses)),
                       "widths": evaluate(trainer, test, eval_limit, trainer.config.seed)}  # fmt: skip
            lines.append(json.dumps(metrics))
            save(run, trainer)
            files.write_bytes(run.path / METRICS, ("\n".join(lines) + "\n").encode())
            listener.on_epoch(metrics)
    except KeyboardInterrupt:
        save(run, trainer)
        raise
    return run


def _kept_metrics(run: Run, trainer: Trainer) -> list[str]:
    """Lines of metrics.jsonl up to the checkpoint: a run killed between the two files repeats the epoch."""
    path = run.path / METRICS
    lines = path.read_text().splitlines() if path.is_file() else []
    return [line for line in lines if json.loads(line)["step"] <= trainer.step_index]


def save(run: Run, trainer: Trainer) -> None:
    """Write the whole state of a training run, and its patches as files."""
    tensors: dict[str, Tensor] = {MODEL + name: value for name, value in trainer.model.state_dict().items()}
    for prefix, optimizer in trainer.optimizers().items():
        for index, entry in optimizer.state_dict()["state"].items():
            for name, value in entry.items():
                if value is not None:
                    tensors[f"{prefix}.{index}.{name}"] = torch.as_tensor(value)
    state: dict[str, Any] = {"step": trainer.step_index, "success": trainer.success.tolist()}
    if trainer.pool is not None:
        pool = trainer.pool.state()
        state["pool"] = {key: value for key, value in pool.items() if isinstance(value, int)}
        tensors.update({f"pool.{k}": torch.from_numpy(v) for k, v in pool.items() if not isinstance(v, int)})
        folder = run.path / PATCHES
        folder.mkdir(exist_ok=True)
        for number, patch in enumerate(trainer.pool.patches()):
            patch.save(folder / f"{patch.size[0]}x{patch.size[1]}-{number}.npz")
    run.write_checkpoint(tensors, state)


def load(run: Run, trainer: Trainer) -> None:
    """Put a checkpoint's state into a fresh trainer of the same configuration."""
    tensors, state = run.read_checkpoint()
    restore_model(trainer.model, tensors, run.checkpoint)
    for prefix, optimizer in trainer.optimizers().items():
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            head, _, rest = name.partition(".")
            if head == prefix:
                index, _, key = rest.partition(".")
                entries.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
    trainer.step_index = int(state["step"])
    trainer.success = np.array(state["success"])
    if trainer.pool is not None:
        arrays = {k.removeprefix("pool."): v.numpy() for k, v in tensors.items() if k.startswith("pool.")}
        trainer.pool.load_state({**arrays, **state["pool"]})


def run_config(command: str, float_model: FloatModel, weights: Path | None, scheme: QuantScheme, data: str,
               train: Dataset, test: Dataset, training: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    """The configuration that a new run is created with.

    training: how the weights and scales came about; every kind of run has `data`, `image_size` and a `config` with
    `method`, `widths`, `seed` and `patches`.
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
    entry["weights"] = str(job.weights) if job.weights else None
    return entry


def job_from_json(run: Run) -> HardenJob:
    """The job that a run was started with.

    Raises:
        InputError: a key is missing or unknown.
    """
    try:
        entry = dict(run.config["training"])
        config = dict(entry.pop("config"))
        config["widths"] = tuple(parse_width(width) for width in config["widths"])
        config["gir"] = GIR(**config["gir"])
        if config["patches"] is not None:
            config["patches"] = PatchTraining(**{**config["patches"], "sizes": tuple(config["patches"]["sizes"])})
        entry["weights"] = Path(entry["weights"]) if entry["weights"] else None
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
