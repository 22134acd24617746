"""Range estimators: from observed activations to the scale of an integer type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgeguard.errors import InputError
from edgeguard.inttype import IntType

SAMPLES_PER_BATCH = 4096
PERCENTILE = 0.9999
CANDIDATES = 64
SMALLEST = 1e-6


@dataclass
class Observer:
    """Collects what a quantizer sees: the exact extremes, and evenly strided samples of every batch."""

    low: float = float("inf")
    high: float = float("-inf")
    samples: list[Tensor] = field(default_factory=list)

    def __call__(self, x: Tensor) -> None:
        flat = x.flatten()
        self.low = min(self.low, float(flat.min()))
        self.high = max(self.high, float(flat.max()))
        stride = max(1, flat.numel() // SAMPLES_PER_BATCH)
        if stride > 1:
            stride |= 1  # an odd stride does not fall in step with rows and channels
        self.samples.append(flat[::stride].float().cpu())

    def values(self) -> Tensor:
        """All samples, (n,) float32."""
        if not self.samples:
            raise InputError("no calibration image reached a quantizer")
        return torch.cat(self.samples)


Estimator = Callable[[Observer, IntType], float]
"""From what was seen to a scale for an integer type."""


def _reach(low: float, high: float, dtype: IntType) -> float:
    """The smallest scale that covers [low, high]."""
    negative = -low / -dtype.qmin if dtype.signed and low < 0 else 0.0
    return max(high / dtype.qmax, negative, SMALLEST)


def minmax(observer: Observer, dtype: IntType) -> float:
    """Cover everything that was seen."""
    return _reach(observer.low, observer.high, dtype)


def percentile(observer: Observer, dtype: IntType) -> float:
    """Cover all but the largest 0.01 % of the samples on either side."""
    values = observer.values()
    tail = torch.quantile(values[:: max(1, values.numel() // 1_000_000)], torch.tensor([1.0 - PERCENTILE, PERCENTILE]))
    return _reach(float(tail[0]), float(tail[1]), dtype)


def squared_error(values: Tensor, scale: float, dtype: IntType) -> float:
    """Mean squared error of quantizing values (clipped at 0 first where the type is unsigned)."""
    real = values if dtype.signed else values.clamp_min(0.0)
    quantized = (real / scale).round_().clamp_(dtype.qmin, dtype.qmax).mul_(scale)
    return float((quantized - real).square_().mean())


def mse(observer: Observer, dtype: IntType) -> float:
    """The scale of least mean squared error among 64, from the full range down in steps of 1/16 octave."""
    values = observer.values()
    full = minmax(observer, dtype)
    candidates = [full * 2.0 ** (-step / 16.0) for step in range(CANDIDATES)]
    best: float = min(candidates, key=lambda scale: squared_error(values, scale, dtype))
    return best


ESTIMATORS: Mapping[str, Estimator] = {"minmax": minmax, "percentile": percentile, "mse": mse}
