"""Training a float model from scratch, for nets that come without weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from edgeguard.data import Dataset
from edgeguard.defences.augment import crop_and_flip
from edgeguard.defences.config import HardenConfig
from edgeguard.models import FloatModel

PEAK_LR = 0.05
STREAM = 5


def pretrain(model: FloatModel, dataset: Dataset, config: HardenConfig, epochs: int, device: torch.device,
             on_step: Callable[[float], None] | None = None) -> None:  # fmt: skip
    """Plain float training in place: SGD with a cosine schedule, the same crops and flips as hardening.

    on_step: called with the loss of every step.
    """
    module = model.module.to(device).train()
    mean = torch.tensor(model.mean, device=device).view(1, 3, 1, 1)
    std = torch.tensor(model.std, device=device).view(1, 3, 1, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=PEAK_LR, momentum=0.9, weight_decay=5e-4, nesterov=True)
    per_epoch = max(1, len(dataset) // config.batch_size)
    for step in range(per_epoch * epochs):
        rng = np.random.default_rng([config.seed, STREAM, step])
        if step % per_epoch == 0:
            order = rng.permutation(len(dataset))
        indices = order[(step % per_epoch) * config.batch_size :][: config.batch_size]
        if config.augment and dataset.crop is not None:
            images = dataset.augmented(indices, rng, config.flip)
        else:
            images = dataset.images(indices)
            images = crop_and_flip(images, rng, config.flip) if config.augment else images
        optimizer.param_groups[0]["lr"] = PEAK_LR * 0.5 * (1.0 + math.cos(math.pi * step / (per_epoch * epochs)))
        pixels = torch.from_numpy(images).to(device).float() / 255.0
        loss = F.cross_entropy(module((pixels - mean) / std), torch.from_numpy(dataset.labels[indices]).to(device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if on_step is not None:
            on_step(float(loss.detach()))
    module.eval().cpu()
