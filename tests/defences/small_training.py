"""A tiny training run: resnet8 on digits of 16 by 16 pixels."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from edgeguard.calib import calibrate
from edgeguard.data import load_dataset
from edgeguard.defences.augment import Crops
from edgeguard.defences.config import HardenConfig, preset
from edgeguard.defences.defence import Batch
from edgeguard.defences.trainer import Trainer
from edgeguard.models import load_model
from edgeguard.quant.model import Normalization, QuantizedModel, quantize_model
from edgeguard.quant.scheme import QuantScheme
from edgeguard.quant.width import parse_widths

WIDTHS = parse_widths("8,4,2")
TRAIN = load_dataset("digits", "train", 16).subset(np.arange(256))
EVERY = slice(None)


def fresh(bits: str) -> QuantizedModel:
    float_model = load_model("resnet8")
    return quantize_model(
        float_model.module, QuantScheme(parse_widths(bits)), Normalization(float_model.mean, float_model.std)
    )


@functools.cache
def calibrated(bits: str) -> dict[str, torch.Tensor]:
    model = fresh(bits)
    calibrate(model, TRAIN.images(np.arange(32)))
    return model.state_dict()


def small_trainer(method: str, options: Mapping[str, Any], bits: str = "8,4,2", **settings: Any) -> Trainer:
    """options: of the method's own part. settings: fields of HardenConfig."""
    given = {"epochs": 2, "batch_size": 32, "flip": False, "augment": False, **settings}
    config = preset(HardenConfig(method, parse_widths(bits), **given), options=options)
    model = fresh(bits)
    model.load_state_dict(calibrated(bits))
    return Trainer(model, TRAIN, config, torch.device("cpu"))


def batch_of(trainer: Trainer, count: int = 32, step: int = 0, rows: slice = EVERY) -> Batch:
    """The first images of the training set, as one process sees them that has these rows."""
    trainer.step_index = step
    indices = np.arange(count)
    pixels = torch.from_numpy(TRAIN.images(indices[rows])).float().contiguous(memory_format=torch.channels_last)
    return Batch(
        pixels=pixels, labels=torch.from_numpy(TRAIN.labels[indices[rows]]), taught=None, step=step, indices=indices,
        crops=Crops.whole(count), rows=rows, rng=lambda stream, *numbers: trainer.rng(stream, step, 0, *numbers),
    )  # fmt: skip


def train(trainer: Trainer, steps: int) -> dict[str, torch.Tensor]:
    """The model's state after some steps."""
    for number in range(steps):
        trainer.step(np.arange(32) + 7 * number)
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)
