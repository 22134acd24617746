"""What `harden` is asked to do, and how a run remembers it: as the JSON of its configuration."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import brevitas
import numpy as np
import torch
import torchvision

import edgeguard
from edgeguard import files
from edgeguard.data import Dataset
from edgeguard.defences.config import BASELINES, HardenConfig
from edgeguard.defences.parts import GIR, PerImagePatches, UniversalPatches, part_from_json, part_to_json
from edgeguard.errors import InputError
from edgeguard.inttype import MAX_BITS
from edgeguard.models import FloatModel
from edgeguard.quant.scheme import QuantScheme
from edgeguard.quant.width import parse_width
from edgeguard.run import Run

PARTS: Mapping[str, Any] = {"universal": UniversalPatches, "per_image": PerImagePatches, **BASELINES}
"""Parts of a configuration that a method may not have."""


@dataclass(frozen=True)
class HardenJob:
    """Everything `harden` needs besides the training configuration.

    model, data: as on the command line. weights: trained float weights; None trains from scratch for `pretrain_epochs`.
    calibration_images, estimator: for the activation scales that training starts from.
    eval_limit: images measured after every epoch. device: auto, cpu, cuda or cuda:N.
    signed_activations, max_weight_bits: what the target asks for, see `QuantScheme`.
    amp, compiled, cuda_graphs: decide what the configuration says of them; None leaves it to the machine.
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
    cuda_graphs: bool | None = None
    start: Path | None = None
    start_sha256: str | None = None


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
