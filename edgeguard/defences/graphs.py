"""Whether passes that are recorded as CUDA graphs give what they gave when they were not, tried before training begins."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from edgeguard.defences.speed import unrecordable
from edgeguard.defences.trainer import Trainer
from edgeguard.quant.width import Width

ROUNDS = 4
"""Of passes at every width. PyTorch launches the very first pass as usual, records the next and replays those after it."""
TOLERANCE = 1e-2
"""Largest distance of a result from the first of its width, over that one's norm: more than gradients in bfloat16 differ by
when they are summed in another order, and far less than those of other pixels."""


def settle_graphs(trainer: Trainer) -> str | None:
    """Try the CUDA graphs that the trainer's configuration asks for, and leave them off where they do not hold.

    Returns: why they are left off, or None.
    """
    if not trainer.config.cuda_graphs:
        return None
    reason = unrecordable(trainer.config, trainer.device, trainer.processes.world)  # a resumed run may be elsewhere now
    if reason is None and (reason := graphs_fail(trainer)):
        trainer.without_graphs()
    return reason


def graphs_fail(trainer: Trainer) -> str | None:
    """Why the trainer's passes, replayed, cannot be relied on; None if they can be.

    Passes over random pixels, at all widths in turn, are compared with the first of their width: logits, gradients by
    pixels and parameters, and the statistics that they move. The model is afterwards what it was.
    """
    model, config = trainer.model.train(), trainer.config
    fixed = [*model.parameters(), *model.buffers()]
    kept = [tensor.detach().clone() for tensor in fixed]
    generator = torch.Generator().manual_seed(config.seed)
    shape = (len(config.widths), config.batch_size, *trainer.dataset.image_shape)
    pixels = torch.randint(0, 256, shape, generator=generator).float()
    labels = torch.randint(0, int(trainer.labels.max()) + 1, shape[:2], generator=generator)
    first: dict[Width, list[Tensor]] = {}
    refused = counters["inductor"]["cudagraph_skips"]
    try:
        for _ in range(ROUNDS):
            for width, images, classes in zip(config.widths, pixels, labels, strict=True):
                found = _pass(trainer, fixed, images.to(trainer.device), classes.to(trainer.device), width)
                _restore(fixed, kept)
                far = max(map(_distance, found, first.setdefault(width, found)))
                if not far <= TOLERANCE:
                    return f"at width {width} a replayed pass is {far:.1e} away from the first one"
    except RuntimeError as exc:
        return str(exc).partition("\n")[0]
    finally:
        _restore(fixed, kept)
    if counters["inductor"]["cudagraph_skips"] > refused:
        return "PyTorch does not record them of this model"
    return None


def _pass(trainer: Trainer, fixed: list[Tensor], images: Tensor, labels: Tensor, width: Width) -> list[Tensor]:
    """Copies of all that a training pass gives: logits, gradients by pixels and by all parameters, and buffers after it.

    The gradients of all parameters are one vector: some of them are nothing but rounding, as of a bias before a batch norm.
    """
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    logits = trainer.forward(images, width)
    F.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
    learned = torch.cat([tensor.grad.flatten() for tensor in fixed if tensor.grad is not None])
    pixels = images.grad if images.grad is not None else torch.full_like(images, torch.nan)
    copies = [tensor.detach().clone() for tensor in (logits, pixels, learned, *trainer.model.buffers())]
    for tensor in fixed:
        tensor.grad = None
    return copies


def _restore(fixed: list[Tensor], kept: list[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(fixed, kept, strict=True):
            tensor.copy_(value)
            tensor.grad = None


def _distance(one: Tensor, other: Tensor) -> float:
    """Relative to the second; infinite where shapes differ, NaN where a value is."""
    if one.shape != other.shape:
        return float("inf")
    difference = (one.double() - other.double()).norm()
    return float(difference / other.double().norm().clamp_min(1e-12)) if float(difference) else 0.0
