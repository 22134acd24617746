"""`dwq`: random-precision training against perturbed images. Its other half, random-precision inference, is a pool.

The paper's (Fu et al. 2021, "Double-Win Quant", ICML): for each batch a precision of weights and activations is drawn, all
alike from a set; adversarial images are made at that precision and the weights updated at the same, on these images alone;
each precision has batch norms of its own. The attack is that of any adversarial training; ours is the paper's quickest,
"Fast is better than free" (Wong et al. 2020, arXiv:2001.03994): L-infinity, 8 of 255 grey levels, a start drawn evenly in
the ball and one signed step of 1.25 times its radius, projected back.

Our reading:

1. The set is the run's widths. The published one, 4 to 16 bits, is `--bits 16,15,14,13,12,11,10,9,8,7,6,5,4`: widths above 8
   exist in training only, for no integer engine runs them.
2. First and last layers have 8 bits, as in every method here; the paper leaves them in float.
3. The attack sees running statistics of the batch norms and does not move them; the update uses the batch's own.
4. Precision is drawn anew for each batch at inference too: `edgeguard export --pool` makes that one engine of several.

It knows nothing of patches: what it does against them is what the study measures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgeguard.defences.attacking import attacked
from edgeguard.defences.defence import Batch, StepResult, accuracy
from edgeguard.defences.parts import RandomPrecision
from edgeguard.patch import Patch
from edgeguard.quant.width import Width

if TYPE_CHECKING:
    from edgeguard.defences.trainer import Trainer


class DWQ:
    """See the module."""

    def __init__(self, trainer: Trainer, part: RandomPrecision) -> None:
        self._trainer, self._part = trainer, part

    def train(self, batch: Batch) -> StepResult:
        """There is no pass over clean images, so their accuracy is NaN; that under attack is of the perturbed ones."""
        trainer, widths = self._trainer, self._trainer.config.widths
        width = widths[int(batch.rng("width").integers(len(widths)))]
        logits = trainer.forward(self.perturbed(batch, width), width)
        loss = trainer.loss(logits, batch.labels, batch.taught)
        trainer.descend(loss)
        return StepResult(float(loss.detach()), width, math.nan, accuracy(logits, batch.labels))

    def perturbed(self, batch: Batch, width: Width) -> Tensor:
        """The images of the batch, each pixel changed by at most epsilon grey levels to raise the loss at `width`."""
        trainer, epsilon, clean = self._trainer, self._part.epsilon, batch.pixels
        drawn = batch.share(batch.rng("per-image").random((batch.total, *clean.shape[1:]), np.float32))
        start = (clean + epsilon * (2 * torch.from_numpy(drawn).to(clean.device) - 1)).clamp_(0, 255)
        with attacked(trainer.model):
            leaf = start.contiguous(memory_format=torch.channels_last).requires_grad_()
            loss = F.cross_entropy(trainer.forward(leaf, width), batch.labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
        moved = leaf.detach() + self._part.step * epsilon * gradient.sign()
        within = torch.minimum(torch.maximum(moved, clean - epsilon), clean + epsilon).clamp_(0, 255)
        return within.contiguous(memory_format=torch.channels_last)

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """There is none."""

    def patches(self) -> list[Patch]:
        return []
