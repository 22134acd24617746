"""Calibration: set the scale of every activation quantizer, at every width, from a few real images."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from edgeguard.calib.estimators import ESTIMATORS, Observer
from edgeguard.errors import InputError
from edgeguard.quant.model import QuantizedModel
from edgeguard.quant.quantizers import ActivationQuantizer, ScaleGroup
from edgeguard.quant.width import Width

FRACTIONS = 64


def calibration_indices(size: int, count: int, seed: int) -> NDArray[np.int64]:
    """`count` different indices below `size` (all of them when there are fewer), sorted, the same for the same seed.

    Raises:
        InputError: nothing to choose from.
    """
    if size < 1 or count < 1:
        raise InputError(f"calibration needs at least one image, got {min(size, count)}")
    chosen = np.random.default_rng(seed).permutation(size)[:count]
    return np.sort(chosen).astype(np.int64)


@torch.no_grad()
def calibrate(
    model: QuantizedModel, images: NDArray[np.uint8], estimator: str = "mse", batch_size: int = 64
) -> None:
    """Observe the unquantized activations of `images` once, then set scales and exponents for every width, in place.

    images: (N, 3, H, W) uint8. estimator: one of `ESTIMATORS`.

    Raises:
        InputError: an unknown estimator or no images.
    """
    if estimator not in ESTIMATORS:
        raise InputError(f"unknown estimator {estimator!r}; expected one of {', '.join(ESTIMATORS)}")
    quantizers = list(model.activation_quantizers().values())
    observers = [Observer() for _ in quantizers]
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    model.enable_quantization(False)
    for quantizer, observer in zip(quantizers, observers, strict=True):
        quantizer.observer = observer
    try:
        for start in range(0, len(images), batch_size):
            model(torch.from_numpy(images[start : start + batch_size]).to(device).float())
    finally:
        for quantizer in quantizers:
            quantizer.observer = None
        model.enable_quantization(True)
        model.train(training)
    seen = dict(zip(quantizers, observers, strict=True))
    for index, width in enumerate(model.control.widths):
        for group in model.groups():
            _set_group(group, {q: seen[q] for q in model.members(group)}, width, index, estimator)


def _set_group(
    group: ScaleGroup, members: dict[ActivationQuantizer, Observer], width: Width, index: int, estimator: str
) -> None:
    """Choose the group's scale so that power-of-two multiples of it come nearest to what each member wants.

    Tensors that are only added are kept at a finer type, so their scale is rounded up: they must not clip.
    """
    wanted = {q: math.log2(ESTIMATORS[estimator](seen, q.dtype(width))) for q, seen in members.items()}

    def exponent(quantizer: ActivationQuantizer, base: float) -> int:
        distance = wanted[quantizer] - base
        return math.ceil(distance) if quantizer.role == "residual" else round(distance)

    def misfit(base: float) -> float:
        return sum((wanted[q] - base - exponent(q, base)) ** 2 for q in members if q.role != "residual" or len(members) == 1)

    first = next(iter(wanted.values()))
    base = min((first + step / FRACTIONS for step in range(FRACTIONS)), key=misfit) if len(members) > 1 else first
    group.log_scale[index] = base
    for quantizer in members:
        quantizer.set_exponent(index, exponent(quantizer, base))
