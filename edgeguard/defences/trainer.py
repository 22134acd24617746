"""The one training loop that every defence shares: batches, widths, schedule, updates. What a batch is for, defences say.

The weights are trained at all widths at once (dynamic bit-width training): each pass runs at a width drawn anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeguard.data import Dataset, batches
from edgeguard.defences.augment import Crops
from edgeguard.defences.config import HardenConfig
from edgeguard.defences.defence import Batch, Defence, StepResult
from edgeguard.defences.distributed import ALONE, Processes, data_parallel, forbid_local_statistics
from edgeguard.defences.dwq import DWQ
from edgeguard.defences.pbat import PBAT
from edgeguard.defences.qadt_r import QADTR
from edgeguard.defences.qat import QAT
from edgeguard.defences.resident import resident_images
from edgeguard.defences.speed import unrecordable
from edgeguard.defences.triqdef import TriQDef
from edgeguard.errors import InputError
from edgeguard.models import FloatModel
from edgeguard.quant.model import QuantizedModel
from edgeguard.quant.view import CompiledView
from edgeguard.quant.width import Width

STREAMS = {"order": 0, "width": 1, "augment": 2, "patch": 3, "gir": 4, "per-image": 6, "memory": 7}
"""Purposes of random numbers; 5 is pretraining's."""
_Images = tuple[NDArray[np.int64], NDArray[np.uint8] | None, "Crops | None"]
"""Indices of a part of a batch; this process's images of it, augmented, or None where they lie on the device; and where the
crops of all lie."""


class Trainer:
    """Holds everything a run needs to continue: model, optimizers, defence and counters.

    teacher: the float model, where the configuration distils. processes: that train the model together.

    Raises:
        InputError: a batch cannot be dealt out evenly to the processes.
    """

    def __init__(self, model: QuantizedModel, dataset: Dataset, config: HardenConfig, device: torch.device,
                 teacher: FloatModel | None = None, processes: Processes = ALONE) -> None:  # fmt: skip
        processes.check(config.batch_size, config.accumulate)
        self.processes = processes
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.dataset, self.config, self.device = dataset, config, device
        self.teacher = _Teacher(teacher, device) if teacher is not None and config.distillation else None
        self._forward: Callable[[Tensor], Tensor] = self.model
        if config.compiled or processes.world > 1:
            graphs = config.cuda_graphs and unrecordable(config, device, processes.world) is None
            self._forward = CompiledView(self.model, config.compiled, processes.world, graphs)
        self._resident = resident_images(dataset, device)
        self.labels = torch.from_numpy(dataset.labels).to(device)
        self.steps_per_epoch = max(1, len(dataset) // config.batch_size)
        planned = self.steps_per_epoch * config.epochs
        self.total_steps = min(planned, config.max_steps) if config.max_steps else planned
        self.step_index = 0
        self._passes = 0
        self._scales = [group.log_scale for group in model.groups()]
        self._weights = [p for p in model.body.parameters() if not any(p is scale for scale in self._scales)]
        self.weight_optimizer = torch.optim.SGD(
            self._weights, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )  # fmt: skip
        self.scale_optimizer = torch.optim.Adam(self._scales, lr=config.scale_lr)
        model.noise.sigma = config.gir.backward_noise
        model.noise.rank, model.noise.world = processes.rank, processes.world
        self._parallel = data_parallel(self.model) if processes.world > 1 else None
        if processes.world > 1:
            processes.copied(self.model, device)
            forbid_local_statistics(self.model)
        self.defence = make_defence(self)

    def without_graphs(self) -> None:
        """From now on passes are launched operation by operation. See `graphs.settle_graphs`."""
        self._forward = CompiledView(self.model, self.config.compiled, self.processes.world)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """By the prefix of their entries in a checkpoint."""
        return {"sgd": self.weight_optimizer, "adam": self.scale_optimizer}

    def rng(self, stream: str, *numbers: int) -> np.random.Generator:
        """The generator of one purpose at one place of the run: equal numbers, equal draws."""
        return np.random.default_rng([self.config.seed, STREAMS[stream], *numbers])

    @property
    def epoch(self) -> int:
        """Epochs completed so far."""
        return self.step_index // self.steps_per_epoch

    @property
    def between_epochs(self) -> bool:
        """Whether the last step ended an epoch, or the run."""
        return self.finished or self.step_index % self.steps_per_epoch == 0

    @property
    def finished(self) -> bool:
        return self.step_index >= self.total_steps

    def run_epoch(self, on_step: Callable[[StepResult], None] | None = None) -> None:
        """Train until the end of the current epoch or of the run."""
        first, size = self.step_index, self.config.batch_size
        end = min((self.epoch + 1) * self.steps_per_epoch, self.total_steps)
        order = self.rng("order", self.epoch).permutation(len(self.dataset))
        start = (first % self.steps_per_epoch) * size
        wanted = order[start : start + (end - first) * size]

        def make(number: int, indices: NDArray[np.int64]) -> list[_Images]:
            return self._images(indices, first + number)

        with closing(batches(wanted, size, make)) as made:
            for parts in made:
                result = self._train(parts)
                if on_step is not None:
                    on_step(result)

    def step(self, indices: NDArray[np.int64]) -> StepResult:
        """All passes over the images at `indices` of the training set."""
        return self._train(self._images(indices, self.step_index))

    def _images(self, indices: NDArray[np.int64], step: int) -> list[_Images]:
        """The parts of a batch, read and augmented."""
        count = self.config.accumulate
        parts = [indices[part::count] for part in range(count)]
        return [(part, *self._augmented(part, self.rng("augment", step, n))) for n, part in enumerate(parts)]

    def _train(self, parts: list[_Images]) -> StepResult:
        self.model.train()
        self._schedule()
        self._forget_gradients()
        self._passes = 0
        results = [self.defence.train(self._batch(*images, part)) for part, images in enumerate(parts)]
        self.step_index += 1
        result = results[0] if len(parts) == 1 else _mean(results)
        return result if self._parallel is None else _over(self.processes, result)

    def _batch(
        self, indices: NDArray[np.int64], images: NDArray[np.uint8] | None, crops: Crops | None, part: int
    ) -> Batch:
        step, rows = self.step_index, self.processes.rows
        if images is not None:
            pixels = torch.from_numpy(images).to(self.device)
        elif self._resident is not None and crops is not None:
            pixels = self._resident.cropped(indices[rows], crops.cut(rows))
        else:
            raise RuntimeError("a batch has neither images nor places of crops")
        pixels = pixels.float().contiguous(memory_format=torch.channels_last)
        labels = self.labels[torch.from_numpy(indices[rows].copy()).to(self.device)]
        taught = None
        if self.teacher is not None:
            with torch.no_grad(), self.autocast():
                taught = self.teacher(pixels).float()

        def rng(stream: str, *numbers: int) -> np.random.Generator:
            return self.rng(stream, step, part, *numbers)

        return Batch(pixels, labels, taught, step, indices, crops, rows, rng)

    def _augmented(
        self, indices: NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8] | None, Crops | None]:
        """This process's training images, and where the crops of all lie.

        No images where they lie on the device, and no crops where the data set makes its own.
        """
        config, dataset, rows = self.config, self.dataset, self.processes.rows
        if config.augment and dataset.crop is not None:
            draws = rng.random((len(indices), dataset.crop_draws))
            return dataset.cropped(indices[rows], draws[rows], config.flip), None
        crops = Crops.whole(len(indices))
        if config.augment:
            crops = Crops.draw(len(indices), dataset.image_shape[1:], rng, config.flip)
        if self._resident is not None:
            return None, crops
        return crops.cut(rows).apply(dataset.images(indices[rows])), crops

    def gathered(self, values: NDArray[Any]) -> NDArray[Any]:
        """Rows of a batch, or of the first images of it, from all processes, in the batch's order."""
        return self.processes.gathered(values)

    def draw_width(self, batch: Batch, number: int = 0) -> Width:
        """The width of a batch's pass with this number."""
        widths = self.config.widths
        return widths[int(batch.rng("width", number).choice(len(widths), p=self.config.width_probabilities()))]

    def forward(self, pixels: Tensor, width: Width) -> Tensor:
        """Logits (n, classes) float32 of a training pass. Gradients of gradients: use `model` itself."""
        seed = int(self.rng("gir", self.step_index, self._passes).integers(1 << 62))
        self.model.noise.generator.manual_seed(seed)
        with self.model.at(width), self.autocast():
            return self._forward(pixels).float()

    def loss(self, logits: Tensor, labels: Tensor, taught: Tensor | None) -> Tensor:
        """Cross-entropy, mixed with the divergence from the float model's softened answer (Hinton et al. 2015).

        What is taught is the answer to the *clean* image, also for an image under a patch.
        """
        hard = F.cross_entropy(logits, labels)
        if taught is None:
            return hard
        heat, share = self.config.temperature, self.config.distillation
        soft = F.kl_div(F.log_softmax(logits / heat, 1), F.softmax(taught / heat, 1), reduction="batchmean")
        return (1 - share) * hard + share * heat * heat * soft

    def descend(self, loss: Tensor) -> None:
        """Backward, and an update of weights and scales after every `accumulate` passes, from the sum of their gradients.

        loss: a mean over this process's images. Parameters receive the gradient of the mean over all processes; tensors
        of this process alone, as its pixels, receive `world` times what they would in one process.

        Raises:
            InputError: the loss is no longer finite, in any process.
        """
        config = self.config
        if self.processes.any(not bool(torch.isfinite(loss))):
            raise InputError(f"the loss is no longer finite at step {self.step_index}; try a lower --lr")
        self._passes += 1
        complete = self._passes % config.accumulate == 0
        self._backward(loss / config.accumulate, complete)
        if complete:
            if config.clip_norm:
                torch.nn.utils.clip_grad_norm_(self._weights, config.clip_norm)
            self.weight_optimizer.step()
            self.scale_optimizer.step()
            self._forget_gradients()

    def _forget_gradients(self) -> None:
        """At once: a CUDA graph's next pass writes where this one's gradients lie."""
        for optimizer in self.optimizers().values():
            optimizer.zero_grad(set_to_none=True)

    def _backward(self, loss: Tensor, complete: bool) -> None:
        """complete: whether gradients are averaged over the processes now, or still added up in each."""
        if self._parallel is None:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        with nullcontext() if complete else self._parallel.no_sync():
            self._parallel(loss).backward()

    def summed(self, gradient: Tensor) -> Tensor:
        """The gradient by something that all processes share, as a universal patch, over the images of all of them."""
        return self.processes.averaged(gradient)

    def _schedule(self) -> None:
        """Linear warm-up, then a cosine to zero over the whole run."""
        config, step = self.config, self.step_index
        warm = min(1.0, (step + 1) / max(1, min(config.warmup_steps, self.total_steps // 10)))
        factor = warm * 0.5 * (1.0 + math.cos(math.pi * step / max(1, self.total_steps)))
        for optimizer, peak in ((self.weight_optimizer, config.lr), (self.scale_optimizer, config.scale_lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor

    def autocast(self) -> Any:
        """bfloat16 for the operations that take it, where the configuration says so."""
        if self.config.amp:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()


def _mean(results: list[StepResult]) -> StepResult:
    """Of the parts of one batch; the width is the last one's."""
    patched = [r.patched_accuracy for r in results if r.patched_accuracy is not None]
    return StepResult(
        float(np.mean([r.loss for r in results])), results[-1].width,
        float(np.mean([r.clean_accuracy for r in results])), float(np.mean(patched)) if patched else None,
    )  # fmt: skip


def _over(processes: Processes, result: StepResult) -> StepResult:
    """The mean over the processes."""
    patched = math.nan if result.patched_accuracy is None else result.patched_accuracy
    loss, clean, under = processes.mean([result.loss, result.clean_accuracy, patched])
    return StepResult(loss, result.width, clean, None if math.isnan(under) else under)


class _Teacher(nn.Module):
    """A float model in evaluation mode, from pixels. (n, 3, H, W) float32, 0 to 255, to logits."""

    def __init__(self, model: FloatModel, device: torch.device) -> None:
        super().__init__()
        self.module = model.module.to(device).eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self._mean = 255 * torch.tensor(model.mean, device=device).view(1, 3, 1, 1)
        self._std = 255 * torch.tensor(model.std, device=device).view(1, 3, 1, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.module((pixels - self._mean) / self._std)
        return logits


def make_defence(trainer: Trainer) -> Defence:
    """The defence that the configuration's method names."""
    config = trainer.config
    if config.method == "qat":
        return QAT(trainer)
    if config.pbat is not None:
        return PBAT(trainer, config.pbat)
    if config.dwq is not None:
        return DWQ(trainer, config.dwq)
    if config.triqdef is not None:
        return TriQDef(trainer, config.triqdef)
    return QADTR(trainer, config.universal, config.per_image)
