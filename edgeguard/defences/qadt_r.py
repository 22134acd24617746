"""`qadt-r`: quantization-aware defence training with randomization, the paper's method with definitions of ours.

The paper (arXiv 2503.07058) names three parts: A-QAPA, patches made inside the quantized model; DBWT, training at changing
bit-widths; GIR, gradient-inconsistent regularization. Its equations are not available to us. What is ours:

1. A batch is passed several times, each time at a width drawn anew (DBWT) and with an update of the weights each time.
2. First pass: clean images, some of them under universal patches of a pool (A-QAPA, universal). The gradient by the pixels
   comes out of the same backward pass and tells where a patch of its own would harm each image most.
3. The passes after it: a share of the images carries such a patch (A-QAPA, per image), which climbs along the sign of its
   gradient: by some ascents of its own before a pass, while the weights rest, and once more by the gradient that the pass
   itself leaves. As widths change between the passes, what it climbs is the loss at all widths.
   Most patches go on in the next epoch from where they ended (`PatchMemory`). Taking the attack's steps from the training
   passes follows Shafahi et al. 2019, "Adversarial Training for Free!", arXiv:1904.12843; patches in training, and choosing
   their place, Rao et al. 2020, arXiv:2005.02313.
4. GIR: noise on what activation quantizers pass backward, a penalty on the similarity of input gradients at two widths,
   and noise on the gradient that universal patches climb. Each is switched off by 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from edgeguard.attacks.placement import extreme_pixels
from edgeguard.attacks.pool import PatchPool
from edgeguard.defences.attacking import attacked
from edgeguard.defences.climbing import Climbing
from edgeguard.defences.defence import Batch, StepResult, accuracy
from edgeguard.defences.gir import gradient_alignment
from edgeguard.defences.parts import PerImagePatches, UniversalPatches
from edgeguard.defences.pasting import Leaves, ascend, make_pool, paste
from edgeguard.defences.patch_memory import PatchMemory
from edgeguard.patch import Patch, Positions
from edgeguard.quant.width import Width

if TYPE_CHECKING:
    from edgeguard.defences.trainer import Trainer


class QADTR:
    """See the module."""

    def __init__(self, trainer: Trainer, universal: UniversalPatches | None, per_image: PerImagePatches | None) -> None:
        self._trainer, self._universal, self._per_image = trainer, universal, per_image
        self._memory: PatchMemory | None = None
        if per_image is not None and per_image.keep and trainer.dataset.crop is None:
            self._memory = PatchMemory(len(trainer.dataset), max(per_image.sizes))
        self._pool: PatchPool | None = None
        if universal is not None:
            self._pool = make_pool(universal, trainer.config.gir.patch_noise, trainer.config.seed)

    def train(self, batch: Batch) -> StepResult:
        result, gradient = self._first_pass(batch)
        if self._per_image is None:
            return result
        patched = self._further_passes(batch, gradient, self._per_image)
        return StepResult(patched.loss, patched.width, result.clean_accuracy, patched.patched_accuracy)

    def _first_pass(self, batch: Batch) -> tuple[StepResult, Tensor]:
        """Clean images and universal patches. Returns the gradient (n, 3, H, W) by the pixels beside the result."""
        trainer = self._trainer
        width = trainer.draw_width(batch)
        patched, leaves = self._paste(batch)
        if self._per_image is not None and not patched.requires_grad:
            patched = patched.clone().requires_grad_()
        elif self._per_image is not None:
            patched.retain_grad()
        logits = trainer.forward(patched, width)
        loss = trainer.loss(logits, batch.labels, batch.taught)
        trainer.descend(loss + self._penalty(batch, width))
        if self._pool is not None and self._universal is not None:
            ascend(self._pool, leaves, self._universal, trainer.summed)
        count = leaves[-1][2].stop if leaves else 0
        under = accuracy(logits[:count], batch.labels[:count]) if count else None
        result = StepResult(float(loss.detach()), width, accuracy(logits[count:], batch.labels[count:]), under)
        gradient = patched.grad if self._per_image is not None else None
        gradient = torch.zeros_like(batch.pixels) if gradient is None else gradient
        return result, gradient

    def _paste(self, batch: Batch) -> tuple[Tensor, Leaves]:
        """Universal patches at random places of the first images."""
        if self._pool is None or self._universal is None:
            return batch.pixels, []
        return paste(batch, self._pool, self._universal)

    def _penalty(self, batch: Batch, width: Width) -> Tensor | float:
        """GIR, part (b), on the last images, which carry no patch."""
        gir, widths = self._trainer.config.gir, self._trainer.config.widths
        if not gir.alignment or batch.step % gir.alignment_every or len(widths) == 1:
            return 0.0
        others = [other for other in widths if other != width]
        other = others[int(batch.rng("gir").integers(len(others)))]
        wanted = min(gir.alignment_images, batch.total)
        count = len(batch.pixels) - len(range(batch.total - wanted)[batch.rows])
        if not count:
            return 0.0
        similarity = gradient_alignment(
            self._trainer.model, batch.pixels[-count:], batch.labels[-count:], (width, other)
        )
        return gir.alignment * similarity * (count * self._trainer.processes.world / wanted)

    def _further_passes(self, batch: Batch, gradient: Tensor, part: PerImagePatches) -> StepResult:
        """Passes over the batch with patches that climb before and meanwhile, the first `share` of it under one each."""
        trainer, count = self._trainer, batch.first(part.share)
        clean, labels = batch.pixels[:count], batch.labels[:count]
        climbing = Climbing(*self._openings(batch, gradient[:count], part), part)
        for number in range(part.passes):
            width = trainer.draw_width(batch, number + 1)
            self._ascend_alone(climbing, clean, labels, width)
            pixels = torch.cat([climbing.pasted(clean), batch.pixels[count:]])
            pixels = pixels.contiguous(memory_format=torch.channels_last).requires_grad_()
            logits = trainer.forward(pixels, width)
            loss = trainer.loss(logits, batch.labels, batch.taught)
            trainer.descend(loss)
            if pixels.grad is None:
                raise RuntimeError("the training pass gave no gradient by its pixels")
            climbing.ascend(climbing.window(pixels.grad))
        if self._memory is not None and batch.crops is not None:
            leading = slice(0, batch.leading(part.share))
            last, places = trainer.gathered(climbing.pixels()), trainer.gathered(climbing.places)
            kept, crops = batch.indices[leading], batch.crops.cut(leading)
            self._memory.keep(kept, crops, last, places, clean.shape[3], batch.rng("memory", 1))
        under = accuracy(logits[:count], labels)
        return StepResult(float(loss.detach()), width, accuracy(logits[count:], batch.labels[count:]), under)

    def _ascend_alone(self, climbing: Climbing, clean: Tensor, labels: Tensor, width: Width) -> None:
        """Ascents of the patches at the width of the pass that follows, while the weights rest."""
        if not climbing.part.ascents:
            return
        trainer = self._trainer
        with attacked(trainer.model):
            for _ in range(climbing.part.ascents):
                pixels = climbing.pasted(clean).contiguous(memory_format=torch.channels_last).requires_grad_()
                loss = F.cross_entropy(trainer.forward(pixels, width), labels, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, pixels)
                climbing.ascend(climbing.window(gradient))

    def _openings(self, batch: Batch, gradient: Tensor, part: PerImagePatches) -> tuple[Tensor, Positions]:
        """Patches (n, 3, s, s) and places (n, 2) to begin with: the image's last one, or a fresh one at a promising place.

        Half of the fresh ones are what harms most to first order, the others are random pixels.
        """
        rng, count = batch.rng("per-image"), len(gradient)
        side = int(rng.choice(part.sizes))
        clean = batch.pixels[:count]
        places = _promising(gradient, clean, batch.share(rng.random((batch.total, part.candidates)))[:count], side)
        pixels = batch.share(rng.integers(0, 256, (batch.total, 3, side, side), np.uint8))[:count]
        harmful = batch.share(rng.random(batch.total))[:count] < 0.5
        pixels[harmful] = extreme_pixels(gradient, side, places).to(torch.uint8).cpu().numpy()[harmful]
        if self._memory is not None and batch.crops is not None:
            indices, crops = batch.share(batch.indices)[:count], batch.crops.cut(batch.rows).cut(slice(0, count))
            again = batch.share(batch.rng("memory", 0).random(batch.total))[:count] < part.keep
            again &= self._memory.known(indices)
            image = (clean.shape[2], clean.shape[3])
            pixels[again], places[again] = self._memory.recall(indices[again], crops.cut(again), side, image)
        return torch.from_numpy(pixels).to(clean.device).float(), places

    def state(self) -> dict[str, Any]:
        pool = self._pool.state() if self._pool is not None else {}
        return {**pool, **(self._memory.state() if self._memory is not None else {})}

    def load_state(self, state: Mapping[str, Any]) -> None:
        memory = {name: value for name, value in state.items() if name.startswith("memory.")}
        if self._pool is not None:
            self._pool.load_state({name: value for name, value in state.items() if name not in memory})
        if self._memory is not None:
            self._memory.load_state(memory)

    def patches(self) -> list[Patch]:
        return self._pool.patches() if self._pool is not None else []


def _promising(gradient: Tensor, clean: Tensor, draws: NDArray[np.float64], side: int) -> Positions:
    """Of places drawn at random for each image, the one where a patch can raise the loss most, to first order.

    gradient, clean: (n, 3, H, W). draws: (n, candidates) in [0, 1). Returns: (n, 2).
    """
    gain = torch.where(gradient > 0, gradient * (255 - clean), -gradient * clean).sum(1, keepdim=True)
    windows = F.avg_pool2d(gain, side, 1)[:, 0]
    columns = windows.shape[2]
    drawn = torch.from_numpy((draws * (windows.shape[1] * columns)).astype(np.int64)).to(gradient.device)
    best = drawn.gather(1, windows.flatten(1).gather(1, drawn).argmax(1, keepdim=True))[:, 0].cpu().numpy()
    return np.stack([best // columns, best % columns], 1)
