"""`quantize`: post-training quantization. A float model and a few images become a Run that exports like a hardened one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeguard import files, folders
from edgeguard.calib import calibrate, calibration_indices
from edgeguard.calib.estimators import ESTIMATORS
from edgeguard.data import Dataset, check_labels, load_splits
from edgeguard.defences.harden import CALIBRATED, choose_device
from edgeguard.defences.job import run_config
from edgeguard.errors import InputError
from edgeguard.inttype import MAX_BITS
from edgeguard.models import FloatModel, load_model
from edgeguard.patch import Patch, apply_patch, check_fits, random_positions
from edgeguard.quant.model import Normalization, quantize_model
from edgeguard.quant.scheme import QuantScheme
from edgeguard.quant.width import Width
from edgeguard.run import METRICS, MODEL, Run

BATCH = 128
STREAM = 17
"""Keeps the draws of patches apart from those of the calibration images under one seed."""


@dataclass(frozen=True)
class CalibrateJob:
    """Everything `quantize` needs.

    model, data: as on the command line. weights: trained float weights; None leaves what the model's constructor made.
    calibration_images: training images that the activations are observed on. patched: share of them under a patch, so
    that ranges cover what a patch does to activations. patch: a patch file; None pastes uniform noise, another one on
    each image. patch_size: side of the noise in pixels; 0 is a fifth of the image's shorter side.
    eval_limit: test images measured. device: auto, cpu, cuda or cuda:N.
    signed_activations, max_weight_bits: what the target asks for, see `QuantScheme`.
    """

    model: str
    data: str
    widths: tuple[Width, ...]
    weights: Path | None = None
    image_size: int | None = None
    estimator: str = "mse"
    calibration_images: int = 512
    patched: float = 0.0
    patch: Path | None = None
    patch_size: int = 0
    seed: int = 0
    eval_limit: int = 1000
    device: str = "auto"
    signed_activations: bool = False
    max_weight_bits: int = MAX_BITS

    def __post_init__(self) -> None:
        if training_only := [str(width) for width in self.widths if not width.deployable]:
            raise InputError(
                f"no integer engine runs {', '.join(training_only)} bits; calibrate at {MAX_BITS} bits or fewer"
            )
        if self.estimator not in ESTIMATORS:
            raise InputError(f"unknown estimator {self.estimator!r}; expected one of {', '.join(ESTIMATORS)}")
        if not 0.0 <= self.patched <= 1.0:
            raise InputError(f"the share of patched calibration images must be 0 to 1, got {self.patched}")
        if self.calibration_images < 1 or self.eval_limit < 1 or self.seed < 0 or self.patch_size < 0:
            raise InputError("calibration needs calibration images and eval limit >= 1, seed and patch size >= 0")
        if not self.patched and (self.patch is not None or self.patch_size):
            raise InputError("a patch was given but no share of images to put it on; name one, for example 0.5")
        if self.patch is not None and self.patch_size:
            raise InputError("a patch file has its own size; leave out the patch size")


class Listener(Protocol):
    """Receives progress; the library itself never prints."""

    def on_phase(self, name: str, total: int) -> None:
        """A phase over `total` images begins: calibrate or measure."""

    def on_images(self, count: int) -> None:
        """So many images more are done."""


def quantize(job: CalibrateJob, out: Path, listener: Listener, command: str = "") -> Run:
    """Calibrate a float model at every width and write the run to the folder `out`, which must not exist.

    Batch norms keep the float model's statistics at every width; nothing is trained.

    Raises:
        InputError: bad data, weights, patch, options or folder; nothing is written before all is done.
        ExportError: the model has a layer without an integer form.
    """
    folders.new_folder(out)
    device = choose_device(job.device)
    train, test = load_splits(job.data, job.image_size, seed=job.seed)
    float_model = load_model(job.model, train.num_classes if job.weights is None else None, job.weights, job.seed)
    check_labels(train, float_model.num_classes)
    check_labels(test, float_model.num_classes)
    scheme = QuantScheme(job.widths, signed_activations=job.signed_activations, max_weight_bits=job.max_weight_bits)
    model = quantize_model(float_model.module, scheme, Normalization(float_model.mean, float_model.std)).eval()
    model.to(device)
    images = calibration_set(job, train)
    listener.on_phase("calibrate", len(images))
    calibrate(model, images, job.estimator, on_batch=listener.on_images)
    count = min(job.eval_limit, len(test))
    listener.on_phase("measure", count * (len(scheme.widths) + 1))
    metrics: dict[str, Any] = {
        "step": 0,
        "float": _accuracy(_normalized(float_model, device), test, count, device, listener),
    }
    metrics["widths"] = {}
    for width in scheme.widths:
        with model.at(width):
            metrics["widths"][str(width)] = _accuracy(model, test, count, device, listener)
    training = job_to_json(job)
    with folders.folder_transaction(out) as folder:
        run = Run.begin(folder, run_config(command, float_model, job.weights, scheme, job.data, train, test, training))
        run.write_checkpoint({MODEL + name: value for name, value in model.state_dict().items()}, {"step": 0})
        files.write_bytes(folder / METRICS, (json.dumps(metrics) + "\n").encode())
    return Run.load(out, trust_code=True)


def calibration_set(job: CalibrateJob, train: Dataset) -> NDArray[np.uint8]:
    """The images that ranges come from, (N, 3, H, W): a seeded choice, the first `patched` share of it under patches.

    Raises:
        InputError: a patch that cannot be read or is larger than the images.
    """
    images = train.images(calibration_indices(len(train), job.calibration_images, job.seed))
    size = (images.shape[2], images.shape[3])
    given = Patch.load(job.patch) if job.patch is not None else None
    side = job.patch_size or max(1, min(size) // 5)
    mask = np.ones((side, side), bool) if given is None else given.mask
    check_fits((mask.shape[0], mask.shape[1]), size)
    rng = np.random.default_rng([job.seed, STREAM])
    chosen = rng.permutation(len(images))[: round(job.patched * len(images))]
    if chosen.size:
        noise = rng.integers(0, 256, (len(chosen), 3, *mask.shape), dtype=np.uint8)
        places = random_positions(len(chosen), size, (mask.shape[0], mask.shape[1]), rng)
        images[chosen] = apply_patch(images[chosen], noise if given is None else given.pixels, mask, places)
    return images


def job_to_json(job: CalibrateJob) -> dict[str, Any]:
    """The job, resolved, as plain JSON values; laid out as the `training` of a hardening run."""
    return {
        "model": job.model, "data": job.data, "weights": str(job.weights) if job.weights else None,
        "image_size": job.image_size, "estimator": job.estimator, "calibration_images": job.calibration_images,
        "eval_limit": job.eval_limit, "device": job.device, "signed_activations": job.signed_activations,
        "max_weight_bits": job.max_weight_bits, "patch_sizes": None,
        "config": {
            "method": CALIBRATED, "widths": [str(width) for width in job.widths], "seed": job.seed,
            "patched": job.patched, "patch": str(job.patch) if job.patch else None,
            "patch_sha256": files.sha256(job.patch) if job.patch else None, "patch_size": job.patch_size,
        },
    }  # fmt: skip


def _normalized(float_model: FloatModel, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The float model on pixels 0 to 255."""
    module = float_model.module.to(device)
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (float_model.mean, float_model.std))

    def forward(pixels: Tensor) -> Tensor:
        logits: Tensor = module((pixels / 255.0 - mean) / std)
        return logits

    return forward


@torch.no_grad()
def _accuracy(model: Callable[[Tensor], Tensor], dataset: Dataset, count: int, device: torch.device,
              listener: Listener) -> dict[str, Any]:  # fmt: skip
    """Accuracy on the first `count` images. Simulated, not deployed."""
    correct = 0
    for start in range(0, count, BATCH):
        indices = np.arange(start, min(start + BATCH, count))
        pixels = torch.from_numpy(dataset.images(indices)).to(device).float()
        labels = torch.from_numpy(dataset.labels[indices]).to(device)
        correct += int((model(pixels).argmax(1) == labels).sum())
        listener.on_images(len(indices))
    return {"accuracy": correct / count, "n": count}
