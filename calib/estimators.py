"""Range estimators: from observed activations to the scale of an integer type."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeguard.errors import InputError
from edgeguard.inttype import IntType

SAMPLES_PER_BATCH = 4096
PERCENTILE = 0.9999
CANDIDATES = 64
BINS = 2048
THRESHOLDS = 128
ENTROPY_SAMPLES_PER_BATCH = 32_768
"""A histogram of `BINS` bins needs more samples than a quantile: its noise alone would favour narrow ranges."""
SMALLEST = 1e-6
EMPTY = 1e-12
"""Probability of a bin that quantization leaves empty."""


@dataclass
class Observer:
    """Collects what a quantizer lets through: the exact extremes, and evenly strided samples of every batch.

    per_batch: about how many samples to keep of a batch. floor, ceiling: what a ReLU or ReLU6 inside the quantizer cuts
    off; a signed type on a ReLU must not spend its range on values that never pass.
    """

    per_batch: int = SAMPLES_PER_BATCH
    floor: float = float("-inf")
    ceiling: float = float("inf")
    low: float = float("inf")
    high: float = float("-inf")
    samples: list[Tensor] = field(default_factory=list)

    def __call__(self, x: Tensor) -> None:
        flat = x.flatten()
        self.low = min(self.low, max(float(flat.min()), self.floor))
        self.high = max(self.high, min(float(flat.max()), self.ceiling))
        stride = max(1, flat.numel() // self.per_batch)
        if stride > 1:
            stride |= 1  # an odd stride does not fall in step with rows and channels
        self.samples.append(flat[::stride].float().clamp(self.floor, self.ceiling).cpu())

    def values(self) -> Tensor:
        """All samples, (n,) float32."""
        if not self.samples:
            raise InputError("no calibration image reached a quantizer")
        return torch.cat(self.samples)


def merge(observers: Sequence[Observer]) -> Observer:
    """What several quantizers have seen, as if one had."""
    low, high = min(seen.low for seen in observers), max(seen.high for seen in observers)
    samples = [sample for seen in observers for sample in seen.samples]
    return Observer(low=low, high=high, samples=samples)


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


def entropy(observer: Observer, dtype: IntType) -> float:
    """The clipping threshold whose quantized values tell least apart from the clipped real ones, by KL divergence.

    Magnitudes above zero go into a histogram of `BINS` bins (zero costs nothing at any scale). For each threshold, P is
    the histogram up to there with everything beyond in its last bin; Q is the same histogram without what lies beyond,
    the mass of each integer level spread evenly over the bins that round to it and are not empty. The threshold of least
    KL(P || Q) becomes qmax times the scale. Bins belong to the level they round to, so two levels work as well as 256.

    Source: S. Migacz, "8-bit Inference with TensorRT", NVIDIA GTC 2017; the level assignment by rounding is ours.
    """
    values = observer.values()
    values = values.abs() if dtype.signed else values
    values = values[values > 0].double()
    full = float(values.max()) if values.numel() else 0.0
    if full <= SMALLEST * dtype.qmax or dtype.qmax >= BINS:  # nothing there, or more levels than the histogram tells apart
        return minmax(observer, dtype)
    counts = torch.histc(values, BINS, 0.0, full).numpy()
    first = max(dtype.qmax + 1, BINS // THRESHOLDS)
    thresholds = np.unique(np.linspace(first, BINS, THRESHOLDS).round().astype(int)).tolist()
    best: int = min(thresholds, key=lambda bins: _divergence(counts, bins, dtype.qmax))
    return max(full * best / BINS / dtype.qmax, SMALLEST)


def _divergence(counts: NDArray[np.float64], bins: int, qmax: int) -> float:
    """KL(P || Q) of clipping a histogram after `bins` bins and rounding to the levels 0 to qmax."""
    kept = counts[:bins]
    reference = kept.copy()
    reference[-1] += counts[bins:].sum()
    level = np.rint((np.arange(bins) + 0.5) * (qmax / bins)).astype(int)
    filled = (kept > 0).astype(float)
    share = np.bincount(level, kept, qmax + 1) / np.maximum(np.bincount(level, filled, qmax + 1), 1.0)
    candidate = share[level] * filled
    seen = reference > 0
    p = reference[seen] / reference.sum()
    q = np.maximum(candidate[seen] / max(candidate.sum(), 1.0), EMPTY)
    return float((p * np.log(p / q)).sum())


ESTIMATORS: Mapping[str, Estimator] = {"minmax": minmax, "percentile": percentile, "mse": mse, "entropy": entropy}
