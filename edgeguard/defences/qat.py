"""`qat`: quantization-aware training at all widths, without any defence. What every other method is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgeguard.defences.defence import Batch, StepResult, accuracy
from edgeguard.patch import Patch

if TYPE_CHECKING:
    from edgeguard.defences.trainer import Trainer


class QAT:
    """Dynamic bit-width training (DBWT) alone: one pass at a width drawn for each batch."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def train(self, batch: Batch) -> StepResult:
        width = self._trainer.draw_width(batch)
        logits = self._trainer.forward(batch.pixels, width)
        loss = self._trainer.loss(logits, batch.labels, batch.taught)
        self._trainer.descend(loss)
        return StepResult(float(loss.detach()), width, accuracy(logits, batch.labels), None)

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """There is none."""

    def patches(self) -> list[Patch]:
        return []
