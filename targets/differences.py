"""How far the logits of two engines lie apart. NumPy only."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray


def logit_steps(
    got: NDArray[np.float32], expected: NDArray[np.float32], scale: NDArray[np.float32]
) -> dict[str, int]:
    """Logits by the magnitude of their difference, in steps of the last layer's integers.

    Args:
        got, expected: (N, classes) float32.
        scale: (classes,) float32, a step of each class; `Dequantize.scale`.

    Returns:
        Number of logits in the classes "0", "1", "2", "3-4", "5-8" and so on; those without any are left out.
    """
    steps = np.rint(np.abs(got.astype(np.float64) - expected) / scale).astype(np.int64)
    counts: Counter[int] = Counter()
    for value, count in zip(*np.unique(steps, return_counts=True), strict=True):
        counts[(int(value) - 1).bit_length() if value else -1] += int(count)
    return {_class(power): counts[power] for power in sorted(counts)}


def _class(power: int) -> str:
    """Name of the class of differences above 2**(power - 1), up to 2**power; -1 is none at all."""
    if power < 2:
        return str(power + 1)
    return f"{(1 << (power - 1)) + 1}-{1 << power}"
