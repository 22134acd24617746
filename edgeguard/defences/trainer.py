"""The one training loop: dynamic bit-width training (DBWT) over clean and patched images, with GIR where switched on.

The paper behind QADT-R (arXiv 2503.07058) describes the parts in words; the equations here are ours. One step:

1. draw a width (DBWT) and a batch; paste pool patches at random places on a share of it (A-QAPA);
2. one forward and one backward pass at that width; the patches' gradients come out of the same backward pass;
3. optimizer step for the weights (descent), signed step for the patches (ascent), projected to uint8 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from edgeguard.attacks.pool import PatchPool, PoolConfig
from edgeguard.data import Dataset
from edgeguard.defences.augment import crop_and_flip
from edgeguard.defences.config import HardenConfig
from edgeguard.defences.gir import frozen_statistics, gradient_alignment
from edgeguard.errors import InputError
from edgeguard.patch import apply_patch, random_positions
from edgeguard.quant.model import QuantizedModel
from edgeguard.quant.width import Width

STREAMS = {"order": 0, "width": 1, "augment": 2, "patch": 3, "gir": 4}
RUNNING = 0.98
"""Decay of the running patch success per width, which steers the widths of inner attack steps."""


@dataclass(frozen=True)
class StepResult:
    """What one step measured: the training loss, the width, accuracy on its clean and on its patched images."""

    loss: float
    width: Width
    clean_accuracy: float
    patched_accuracy: float | None


class Trainer:
    """Holds everything a run needs to continue: model, optimizers, pool and counters."""

    def __init__(self, model: QuantizedModel, dataset: Dataset, config: HardenConfig, device: torch.device) -> None:
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.dataset, self.config, self.device = dataset, config, device
        self.labels = torch.from_numpy(dataset.labels).to(device)
        self.steps_per_epoch = max(1, len(dataset) // config.batch_size)
        planned = self.steps_per_epoch * config.epochs
        self.total_steps = min(planned, config.max_steps) if config.max_steps else planned
        self.step_index = 0
        scales = [group.log_scale for group in model.groups()]
        weights = [p for p in model.body.parameters() if not any(p is scale for scale in scales)]
        self.weight_optimizer = torch.optim.SGD(
            weights, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, nesterov=config.momentum > 0
        )
        self.scale_optimizer = torch.optim.Adam(scales, lr=config.scale_lr)
        self.pool: PatchPool | None = None
        self.success = np.full(len(config.widths), 0.5)
        if config.patches is not None:
            part = config.patches
            self.pool = PatchPool(
                PoolConfig(part.sizes, part.members, part.refresh_every, config.gir.patch_noise, config.seed)
            )
        model.noise.sigma = config.gir.backward_noise

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """By the prefix of their entries in a checkpoint."""
        return {"sgd": self.weight_optimizer, "adam": self.scale_optimizer}

    def _rng(self, stream: str, step: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, STREAMS[stream], step])

    @property
    def epoch(self) -> int:
        """Epochs completed so far."""
        return self.step_index // self.steps_per_epoch

    @property
    def finished(self) -> bool:
        return self.step_index >= self.total_steps

    def run_epoch(self, on_step: Callable[[StepResult], None] | None = None) -> None:
        """Train until the end of the current epoch or of the run."""
        end = min((self.epoch + 1) * self.steps_per_epoch, self.total_steps)
        order = self._rng("order", self.epoch).permutation(len(self.dataset))
        while self.step_index < end:
            start = (self.step_index % self.steps_per_epoch) * self.config.batch_size
            result = self.step(order[start : start + self.config.batch_size])
            if on_step is not None:
                on_step(result)

    def step(self, indices: NDArray[np.int64]) -> StepResult:
        """One optimizer step on the images at `indices` of the training set."""
        config, step = self.config, self.step_index
        width = config.widths[int(self._rng("width", step).choice(len(config.widths), p=config.width_probabilities()))]
        images = self.dataset.images(indices)
        if config.augment:
            images = crop_and_flip(images, self._rng("augment", step), config.flip)
        pixels = torch.from_numpy(images).to(self.device).float().contiguous(memory_format=torch.channels_last)
        labels = self.labels[torch.from_numpy(indices).to(self.device)]
        self.model.train()
        self.model.noise.generator.manual_seed(int(self._rng("gir", step).integers(1 << 62)))
        self._schedule()
        if self.pool is not None and config.patches is not None:
            for inner in range(config.patches.inner_steps):
                self._inner_step(pixels, labels, step, inner)
        rng = self._rng("patch", step)
        patched, leaves = self._paste(pixels, rng)
        with self.model.at(width), self._autocast():
            logits = self.model(patched).float()
        loss = F.cross_entropy(logits, labels)
        total = loss
        if config.gir.alignment and step % config.gir.alignment_every == 0 and len(config.widths) > 1:
            total = loss + config.gir.alignment * self._alignment(pixels, labels, width, step)
        self.weight_optimizer.zero_grad(set_to_none=True)
        self.scale_optimizer.zero_grad(set_to_none=True)
        if not bool(torch.isfinite(total)):
            raise InputError(f"the loss is no longer finite at step {step}; try a lower --lr")
        total.backward()  # type: ignore[no-untyped-call]
        self._descend()
        self._ascend(leaves)
        self.step_index += 1
        return self._result(float(loss.detach()), width, logits.detach(), labels, leaves)

    def _schedule(self) -> None:
        """Linear warm-up, then a cosine to zero over the whole run."""
        config, step = self.config, self.step_index
        warm = min(1.0, (step + 1) / max(1, min(config.warmup_steps, self.total_steps // 10)))
        factor = warm * 0.5 * (1.0 + math.cos(math.pi * step / max(1, self.total_steps)))
        for optimizer, peak in ((self.weight_optimizer, config.lr), (self.scale_optimizer, config.scale_lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor

    def _autocast(self) -> Any:
        if self.config.amp:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _paste(self, pixels: Tensor, rng: np.random.Generator) -> tuple[Tensor, list[tuple[int, Tensor, slice]]]:
        """Paste drawn patches on the first images of the batch; returns the batch and (member, leaf, images) of each."""
        part = self.config.patches
        if self.pool is None or part is None:
            return pixels, []
        count = max(1, round(len(pixels) * part.share))
        members = self.pool.draw(rng, min(part.per_step, count))
        bounds = np.linspace(0, count, len(members) + 1).astype(int)
        pieces, leaves = [], []
        for member, start, stop in zip(members.tolist(), bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            leaf = torch.from_numpy(self.pool[member]).to(self.device).requires_grad_(True)
            side = leaf.shape[-1]
            places = random_positions(stop - start, (pixels.shape[2], pixels.shape[3]), (side, side), rng)
            pieces.append(apply_patch(pixels[start:stop], leaf, np.ones((side, side), bool), places))
            leaves.append((member, leaf, slice(start, stop)))
        batch = torch.cat([*pieces, pixels[count:]])
        return batch.contiguous(memory_format=torch.channels_last), leaves

    def _inner_step(self, pixels: Tensor, labels: Tensor, step: int, inner: int) -> None:
        """One extra ascent of the pool at a width drawn where patches succeed least; no weight changes."""
        rng = np.random.default_rng([self.config.seed, STREAMS["patch"], step, inner + 1])
        weakness = 1.0 - self.success + 0.05
        width = self.config.widths[int(rng.choice(len(weakness), p=weakness / weakness.sum()))]
        patched, leaves = self._paste(pixels, rng)
        count = leaves[-1][2].stop
        with frozen_statistics(self.model), self.model.at(width), self._autocast():
            loss = F.cross_entropy(self.model(patched[:count]).float(), labels[:count])
        gradients = torch.autograd.grad(loss, [leaf for _, leaf, _ in leaves])
        for (member, _, _), gradient in zip(leaves, gradients, strict=True):
            self._ascend_member(member, gradient)

    def _alignment(self, pixels: Tensor, labels: Tensor, width: Width, step: int) -> Tensor:
        others = [other for other in self.config.widths if other != width]
        other = others[int(self._rng("gir", step).integers(len(others)))]
        count = min(self.config.gir.alignment_images, len(pixels))
        return gradient_alignment(self.model, pixels[-count:], labels[-count:], (width, other))

    def _descend(self) -> None:
        if self.config.clip_norm:
            parameters = self.weight_optimizer.param_groups[0]["params"]
            torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        self.weight_optimizer.step()
        self.scale_optimizer.step()

    def _ascend(self, leaves: list[tuple[int, Tensor, slice]]) -> None:
        for member, leaf, _ in leaves:
            if leaf.grad is not None:
                self._ascend_member(member, leaf.grad)

    def _ascend_member(self, member: int, gradient: Tensor) -> None:
        if self.pool is not None and self.config.patches is not None:
            self.pool.ascend(member, gradient.cpu().numpy(), self.config.patches.step_size)

    def _result(self, loss: float, width: Width, logits: Tensor, labels: Tensor,
                leaves: list[tuple[int, Tensor, slice]]) -> StepResult:  # fmt: skip
        correct = (logits.argmax(1) == labels).float()
        count = leaves[-1][2].stop if leaves else 0
        patched = float(correct[:count].mean()) if count else None
        clean = float(correct[count:].mean()) if count < len(correct) else float("nan")
        if patched is not None:
            index = self.config.widths.index(width)
            self.success[index] = RUNNING * self.success[index] + (1 - RUNNING) * (1.0 - patched)
        return StepResult(loss, width, clean, patched)
