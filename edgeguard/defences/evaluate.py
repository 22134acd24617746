"""What a run reports about itself after every epoch. For monitoring: the verdict is `verify`'s, on the deployed engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from edgeguard.data import Dataset
from edgeguard.defences.trainer import Trainer
from edgeguard.patch import apply_patch, random_positions

BATCH = 256


@torch.no_grad()
def evaluate(trainer: Trainer, dataset: Dataset, limit: int, seed: int) -> dict[str, Any]:
    """Accuracy and attack success rate of the pool at every width, on the first `limit` images.

    Returns: per width name `{"accuracy", "n", "asr": {"6x6": ...}}`; asr is P[pred(x_adv) != y | pred(x) = y] at random
    placements, the highest over the pool's members of a size. Simulated, not deployed.
    """
    model, device = trainer.model, trainer.device
    model.eval()
    count = min(limit, len(dataset))
    images, labels = dataset.images(np.arange(count)), torch.from_numpy(dataset.labels[:count])
    result: dict[str, Any] = {}

    def correct(pixels: np.ndarray[Any, Any]) -> torch.Tensor:
        parts = []
        for start in range(0, count, BATCH):
            batch = torch.from_numpy(pixels[start : start + BATCH]).to(device).float()
            parts.append(model(batch.contiguous(memory_format=torch.channels_last)).argmax(1).cpu())
        return torch.cat(parts) == labels

    rng = np.random.default_rng([seed, trainer.step_index])
    attacked = []
    for patch in trainer.defence.patches():
        places = random_positions(count, (images.shape[2], images.shape[3]), patch.size, rng)
        attacked.append((f"{patch.size[0]}x{patch.size[1]}", apply_patch(images, patch.pixels, patch.mask, places)))
    for width in trainer.config.widths:
        with model.at(width):
            clean = correct(images)
            rates: dict[str, float] = {}
            for size, pixels in attacked:
                fooled = ~correct(pixels)[clean]
                rates[size] = max(rates.get(size, 0.0), float(fooled.float().mean()) if len(fooled) else 0.0)
        result[str(width)] = {"accuracy": float(clean.float().mean()), "n": count, "asr": rates}
    return result
