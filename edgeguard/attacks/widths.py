"""The adaptive part of A-QAPA: which bit-width to attack next. NumPy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class WidthChooser:
    """Exponential weights over widths: `p = (1 - floor) * softmax(-rate * success) + floor / K`.

    Success is a running mean of each width's batches, first seen as 0 so that every width is soon tried. In the
    limit of small rates this is the multiplicative weights player of a zero-sum game between attack and widths.
    Source: Freund & Schapire 1999, Games and Economic Behavior 29:79.
    """

    MEMORY = 0.8

    def __init__(self, names: list[str], rate: float, floor: float) -> None:
        self._names, self._rate, self._floor = names, rate, floor
        self._success = np.zeros(len(names))

    def probabilities(self) -> NDArray[np.float64]:
        """(K,), summing to 1."""
        weights = np.exp(-self._rate * (self._success - self._success.min()))
        mixed: NDArray[np.float64] = (1 - self._floor) * weights / weights.sum() + self._floor / len(self._names)
        return mixed

    def draw(self, rng: np.random.Generator) -> str:
        return self._names[int(rng.choice(len(self._names), p=self.probabilities()))]

    def update(self, name: str, success: float) -> None:
        index = self._names.index(name)
        self._success[index] += (1 - self.MEMORY) * (success - self._success[index])
