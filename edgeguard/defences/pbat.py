"""`pbat`: patch-based adversarial training against patches whose place is optimized, crafted at one fixed width.

The paper's (Rao et al. 2020, "Adversarial Training against Location-Optimized Adversarial Patches", arXiv:2005.02313):
half of each batch carries an 8x8 patch of each image's own, made for this batch from random pixels at a random place by 25
signed steps of a tenth of the pixels' range on the cross-entropy. With every step the place may move by a stride of two
pixels: to the best of its four neighbours ("full") or to one of them drawn at random, where that raises the loss.

Our reading:

1. The paper's nets are float. Here the attack sees the quantized net at one width, the largest unless told otherwise, as
   work on quantized nets that names this baseline has it; so other widths never meet a patch made for them.
2. The weights are nevertheless trained at all widths, one drawn for each batch as in `qat`: without that there would be no
   engine at another width to compare with. `single_width` trains at the attacked width alone; the batch norms and scales
   of the others then stay as calibrated. A run for one width, `--bits 4`, is the same in less space.
3. Neighbours are compared under the patch that the gradient was taken of, so the loss in place costs no pass; the last
   patch is the one that is trained on, rounded to whole grey levels. A patch may lie anywhere in the image, also in its
   middle, which the paper leaves out.
4. Batch norms use their running statistics while patches are crafted, and do not move them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgeguard.attacks.placement import neighbours
from edgeguard.defences.attacking import attacked
from edgeguard.defences.defence import Batch, StepResult, accuracy
from edgeguard.defences.parts import MOVES, LocatedPatches
from edgeguard.patch import Patch, Positions, apply_patch, random_positions
from edgeguard.quant.width import Width

if TYPE_CHECKING:
    from edgeguard.defences.trainer import Trainer


class PBAT:
    """See the module."""

    def __init__(self, trainer: Trainer, part: LocatedPatches) -> None:
        self._trainer, self._part = trainer, part
        self.width: Width = part.attack_width or max(trainer.config.widths)
        """The one that patches are crafted at."""

    def train(self, batch: Batch) -> StepResult:
        trainer = self._trainer
        width = self.width if self._part.single_width else trainer.draw_width(batch)
        count = batch.first(self._part.share)
        pixels = torch.cat([self.patched(batch), batch.pixels[count:]]).contiguous(memory_format=torch.channels_last)
        logits = trainer.forward(pixels, width)
        loss = trainer.loss(logits, batch.labels, batch.taught)
        trainer.descend(loss)
        under = accuracy(logits[:count], batch.labels[:count])
        return StepResult(float(loss.detach()), width, accuracy(logits[count:], batch.labels[count:]), under)

    def patched(self, batch: Batch) -> Tensor:
        """The first images of the batch under their patches: (count, 3, H, W) float32, whole grey levels."""
        part, count, rng = self._part, batch.first(self._part.share), batch.rng("per-image")
        clean, labels, side = batch.pixels[:count], batch.labels[:count], int(rng.choice(part.sizes))
        image = (clean.shape[2], clean.shape[3])
        mask, limit = np.ones((side, side), bool), np.array(image) - side
        places = batch.share(random_positions(batch.total, image, (side, side), rng))[:count]
        start = batch.share(rng.integers(0, 256, (batch.total, 3, side, side), np.uint8))[:count]
        patch = torch.from_numpy(start).to(clean.device).float()
        with attacked(self._trainer.model):
            for _ in range(part.attack_steps):
                leaf = patch.requires_grad_()
                losses = self._losses(apply_patch(clean, leaf, mask, places), labels)
                (gradient,) = torch.autograd.grad(losses.sum(), leaf)
                leaf = leaf.detach()
                tried = _tried(places, part, limit, batch, rng)
                places = self._best(clean, labels, leaf, places, losses.detach(), tried)
                patch = (leaf + part.step_size * gradient.sign()).clamp_(0, 255)
        return apply_patch(clean, patch.round(), mask, places)

    def _best(
        self, clean: Tensor, labels: Tensor, patch: Tensor, places: Positions, losses: Tensor, tried: Positions
    ) -> Positions:
        """Of each image's place and those tried, (k, n, 2), the one with the largest loss under its patch."""
        mask, best = np.ones(patch.shape[2:], bool), losses
        places = places.copy()
        with torch.no_grad():
            for each in tried:
                found = self._losses(apply_patch(clean, patch, mask, each), labels)
                better = (found > best).cpu().numpy()
                places[better] = each[better]
                best = torch.maximum(best, found)
        return places

    def _losses(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each image at the attacked width: (n,)."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        return F.cross_entropy(self._trainer.forward(pixels, self.width), labels, reduction="none")

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """There is none: patches live for one batch."""

    def patches(self) -> list[Patch]:
        return []


def _tried(
    places: Positions, part: LocatedPatches, limit: np.ndarray[Any, Any], batch: Batch, rng: np.random.Generator
) -> Positions:
    """The neighbours of the places (n, 2) that one move compares them with: (k, n, 2)."""
    around = neighbours(places, part.stride, limit, MOVES["full"])
    if part.moves != "random":
        return around[: MOVES[part.moves]]
    drawn = batch.share(rng.integers(0, len(around), batch.total))[: len(places)]
    one: Positions = around[drawn, np.arange(len(places))][None]
    return one
