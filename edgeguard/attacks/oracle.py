"""An engine as a query attack sees it: what is asked is counted, what is answered is checked. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeguard.attacks.api import Images, Labels, Logits
from edgeguard.errors import EngineError, InputError


@dataclass(frozen=True, eq=False)
class Goal:
    """What an attack wants of each image. labels: (N,). target: the class to reach; None is to leave the label's.

    Rows are indices (n,) of images; logits (n, classes) are theirs.
    """

    labels: Labels
    target: int | None

    @property
    def open(self) -> NDArray[np.bool_]:
        """(N,): images that are worth attacking: all, or those that are not of the target's class."""
        return np.ones(len(self.labels), bool) if self.target is None else self.labels != self.target

    def fooled(self, logits: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(n,), by the largest logit alone."""
        flags: NDArray[np.bool_] = (logits.argmax(1) == self._class(rows)) == (self.target is not None)
        return flags

    def margin(self, logits: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """(n,): the largest other logit minus the label's, or the target's minus the largest other."""
        values = logits.astype(np.float64)
        where = np.arange(len(rows)), self._class(rows)
        own = values[where]
        values[where] = -np.inf
        difference: NDArray[np.float64] = values.max(1) - own
        return difference if self.target is None else -difference

    def _class(self, rows: NDArray[np.int64]) -> Labels:
        return self.labels[rows] if self.target is None else np.full(len(rows), self.target, np.int64)


class Oracle:
    """The engine. queries: images that it was shown so far."""

    def __init__(self, classify: Logits, goal: Goal) -> None:
        self._classify, self.goal = classify, goal
        self.queries = 0

    def __call__(self, images: Images) -> NDArray[np.float32]:
        """Logits (n, classes) of images (n, 3, H, W).

        Raises:
            EngineError: they are not finite, or of another shape.
            InputError: a label or the target is none of the classes.
        """
        self.queries += len(images)
        logits = np.asarray(self._classify(images))
        if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 2 or not np.isfinite(logits).all():
            raise EngineError(
                f"the engine must give finite logits ({len(images)}, classes), got {logits.shape} with "
                f"{int((~np.isfinite(logits)).sum())} values that are not finite"
            )
        labels, target, classes = self.goal.labels, self.goal.target, logits.shape[1]
        if labels.min() < 0 or max(labels.max(), target or 0) >= classes:
            raise InputError(
                f"the engine has {classes} classes, but labels run from {labels.min()} to {labels.max()}"
                + ("" if target is None else f" and the target is {target}")
            )
        return logits
