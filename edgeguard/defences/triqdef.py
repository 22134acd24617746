"""`triqdef`: training that makes the widths of one net unlike each other, so that patches transfer less between them.

The paper's (TriQDef, Guesmi et al., ICLR 2026, arXiv:2508.12132), as far as its abstract and public notes tell: half of
each batch is patched (6x6 on CIFAR-10); to the loss are added a feature disalignment penalty, on the similarity of
intermediate features at two widths, and a gradient perceptual dissonance penalty, on the structural similarity of input
gradients at two widths by the intersection over union of their edges and the cosine of their histograms of oriented
gradients; weights 1 / 0.8 / 0.5; a curriculum over widths. Its equations are not available to us.

Our reading:

1. Patches are universal, of a pool that climbs on the gradient of the training pass, at random places.
2. Features are the last quantized activations of the last stages of the net, a stage being what has one resolution; their
   penalty is the mean cosine over images and stages.
3. Input gradients are those of the cross-entropy; edges and orientations of their saliency are soft, so that they can be
   differentiated (`edgeguard.defences.similarity`); the penalty is the mean of the two measures.
4. Both are computed on patched images of every `penalty_every`-th batch, at the width of its pass and at another, and run
   through the Brevitas model itself, uncompiled, with the statistics of these images in the batch norms. With running
   statistics a net is taught to outrun them: its features at two widths come apart because one of them is no longer
   normalized, the loss does not see it, and what is deployed is of no use at that width.
5. The curriculum: the run starts with the two highest widths, and lower ones join them one after the other. Among those
   open, a batch's width is drawn as in dynamic bit-width training, in proportion to 1 / bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeguard.attacks.pool import PatchPool
from edgeguard.defences.defence import Batch, StepResult, accuracy
from edgeguard.defences.parts import Disalignment
from edgeguard.defences.pasting import ascend, make_pool, paste
from edgeguard.defences.similarity import edge_iou, feature_cosine, hog_cosine, saliency
from edgeguard.errors import InputError
from edgeguard.patch import Patch
from edgeguard.quant.model import QuantizedModel
from edgeguard.quant.width import Width

if TYPE_CHECKING:
    from edgeguard.defences.trainer import Trainer


class TriQDef:
    """See the module."""

    def __init__(self, trainer: Trainer, part: Disalignment) -> None:
        self._trainer, self._part = trainer, part
        self._pool: PatchPool = make_pool(part.patches, 0.0, trainer.config.seed)

    def train(self, batch: Batch) -> StepResult:
        trainer, part = self._trainer, self._part
        width, other = self._draw(batch)
        patched, leaves = paste(batch, self._pool, part.patches)
        count = batch.first(part.patches.share)
        logits = trainer.forward(patched, width)
        loss = trainer.loss(logits, batch.labels, batch.taught)
        trainer.descend(loss + self._penalty(patched[:count].detach(), batch, (width, other)))
        ascend(self._pool, leaves, part.patches, trainer.summed)
        under = accuracy(logits[:count], batch.labels[:count])
        return StepResult(float(loss.detach()), width, accuracy(logits[count:], batch.labels[count:]), under)

    def open_widths(self, step: int) -> tuple[Width, ...]:
        """The widths, from the highest down, that the curriculum has reached after so many batches; two at least."""
        widths = tuple(sorted(self._trainer.config.widths, reverse=True))
        if not self._part.curriculum:
            return widths
        progress = step / (self._part.curriculum * max(1, self._trainer.total_steps))
        return widths[: 2 + int((len(widths) - 1) * progress)]

    def _draw(self, batch: Batch) -> tuple[Width, Width]:
        """The width of the pass, and the one that it is compared with."""
        widths = self.open_widths(batch.step)
        chances = np.array([1.0 / width.weight for width in widths])
        rng = batch.rng("width")
        width = widths[int(rng.choice(len(widths), p=chances / chances.sum()))]
        others = [one for one in widths if one != width]
        return width, others[int(rng.integers(len(others)))]

    def _penalty(self, patched: Tensor, batch: Batch, widths: tuple[Width, Width]) -> Tensor | float:
        """Both penalties, weighted, on some of the patched images; spread over all patches of the batch."""
        part = self._part
        if batch.step % part.penalty_every or not (part.feature_penalty or part.gradient_penalty):
            return 0.0
        chosen = torch.from_numpy(np.linspace(0, len(patched) - 1, min(part.penalty_images, len(patched))).astype(int))
        chosen = chosen.to(patched.device)
        features, gradients = likeness(
            self._trainer.model, patched[chosen], batch.labels[chosen], widths, part.layers, part.gradient_penalty > 0
        )
        return part.feature_penalty * features + part.gradient_penalty * gradients

    def state(self) -> dict[str, Any]:
        return self._pool.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._pool.load_state(state)

    def patches(self) -> list[Patch]:
        return self._pool.patches()


def likeness(
    model: QuantizedModel, pixels: Tensor, labels: Tensor, widths: tuple[Width, Width], layers: int, gradients: bool
) -> tuple[Tensor, Tensor]:
    """How alike two widths are on images (N, 3, H, W): of features and of input gradients, scalars in [0, 1].

    All images count for the statistics of the batch norms. layers: stages that count as features. gradients: compute the
    second; it is 0 else. Both are differentiable by the parameters.

    Raises:
        InputError: the net has no quantized activation with rows and columns.
    """
    features, maps = [], []
    with batch_statistics(model):
        for width in widths:
            inputs = pixels.detach().requires_grad_(gradients)
            with model.at(width):
                logits, seen = _traced(model, inputs)
            features.append(_stage_ends(seen, layers))
            if gradients:
                loss = F.cross_entropy(logits, labels, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, inputs, create_graph=True)
                maps.append(saliency(gradient))
    alike = feature_cosine(*features).mean()
    if not gradients:
        return alike, alike.new_zeros(())
    return alike, (0.5 * (edge_iou(*maps) + hog_cosine(*maps))).mean()


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms in training take the statistics of the batch for the length of a block and remember nothing of it."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d) and module.training]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _traced(model: QuantizedModel, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and every quantized activation in the order of execution."""
    seen: list[Tensor] = []
    layers = [model.body.get_submodule(name) for name in model.activation_quantizers()]
    handles = [layer.register_forward_hook(lambda _, __, out: seen.append(out)) for layer in layers]
    try:
        return model(inputs), seen
    finally:
        for handle in handles:
            handle.remove()


def _stage_ends(seen: list[Tensor], layers: int) -> list[Tensor]:
    """The last activation of each of the last `layers` stages; what has no rows and columns (any more) is no stage."""
    ends: dict[torch.Size, Tensor] = {}
    for values in seen:
        if values.dim() == 4 and values.shape[2] * values.shape[3] > 1:
            ends[values.shape[2:]] = values
    if not ends:
        raise InputError("triqdef needs a net with quantized feature maps; this one has none larger than one pixel")
    return list(ends.values())[-layers:]
