"""What a defence is: the rule by which one batch of clean images becomes passes of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from edgeguard.defences.augment import Crops
from edgeguard.patch import Patch
from edgeguard.quant.width import Width


@dataclass(frozen=True, eq=False)
class Batch:
    """The images of one step as every defence receives them, augmented, on the device.

    pixels: (n, 3, H, W) float32, 0 to 255. labels: (n,) int64. taught: (n, classes), the float model's logits of `pixels`,
    or None without distillation. step: counts the batches of a run. rng: the step's own generator for each purpose.

    Under several processes a batch is spread over them: `rows` are this process's among all of its images, of which
    `indices` (total,) in the training set and `crops` are known everywhere; crops are None where the data set makes its own.
    Whatever is drawn for each image is drawn for all, and cut by `share`, so that the number of processes changes nothing.
    """

    pixels: Tensor
    labels: Tensor
    taught: Tensor | None
    step: int
    indices: NDArray[np.int64]
    crops: Crops | None
    rows: slice
    rng: Callable[..., np.random.Generator]

    @property
    def total(self) -> int:
        """Images of the batch, over all processes."""
        return len(self.indices)

    def share(self, values: NDArray[Any]) -> NDArray[Any]:
        """This process's rows of what was drawn for all images."""
        return values[self.rows]

    def leading(self, share: float) -> int:
        """How many images the first `share` of the whole batch is; at least one."""
        return max(1, round(self.total * share))

    def first(self, share: float) -> int:
        """How many of them are this process's."""
        return len(range(self.leading(share))[self.rows])


@dataclass(frozen=True)
class StepResult:
    """What one batch measured: the loss and width of its last pass, accuracy on clean images and on patched ones."""

    loss: float
    width: Width
    clean_accuracy: float
    patched_accuracy: float | None


class Defence(Protocol):
    """One object a run. `train` makes the passes of one batch; the rest is what a checkpoint needs to know of it."""

    def train(self, batch: Batch) -> StepResult:
        """Forward, backward and update, as often as the defence sees fit."""

    def state(self) -> dict[str, Any]:
        """Arrays and integers from which `load_state` continues exactly."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state()`."""

    def patches(self) -> list[Patch]:
        """Universal patches to keep beside the checkpoint."""


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label's; NaN of none."""
    return float((logits.detach().argmax(1) == labels).float().mean())
