"""GAP: the universal adversarial patch as it was first published. Needs torch.

A disc that maximizes the expected log probability of one class over images, places, rotations and scales, on the mean
over all models at hand. Source: Brown et al. 2017, arXiv:1712.09665. Where ours differs: pixels are grey levels, every
gradient is taken at whole ones (straight through the rounding), and they are kept between 0 and 255 by clipping;
rotation and scale vary little unless more is asked for, since a plain paste of a given size is what is judged;
without a target, the cross-entropy of the true label is raised instead, which the paper does not do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edgeguard.attacks.api import Checkpoint, Differentiable, Found, Images, Labels, Progress, Victim
from edgeguard.attacks.checks import check_labels, check_material
from edgeguard.attacks.losses import cross_entropy
from edgeguard.attacks.optimizers import get_optimizer
from edgeguard.attacks.transforms import Transforms, paste
from edgeguard.errors import InputError
from edgeguard.patch import Positions, random_positions

MIDDLE = 127.5
VIEWS = Transforms(rotation_degrees=22.5, scale=0.1)


def disc(size: int) -> NDArray[np.bool_]:
    """(size, size) bool: pixels whose centre lies within the inscribed circle."""
    axis = np.arange(size) + 0.5 - size / 2
    inside: NDArray[np.bool_] = axis[:, None] ** 2 + axis**2 <= (size / 2) ** 2
    return inside


@dataclass(frozen=True)
class GAP:
    """How to craft.

    patch_size: diameter in pixels. steps, batch_size: gradients, and images of each. step_size: in grey levels.
    target: the class to reach; None raises the loss of the true label. circular: a disc as published, or a square.
    optimizer: a name in `optimizers.OPTIMIZERS`; its momentum is `momentum`. transforms: besides the random place.
    """

    name = "gap"
    access = "gradients"
    per_image = False

    patch_size: int
    steps: int = 500
    batch_size: int = 100
    step_size: float = 4.0
    target: int | None = None
    seed: int = 0
    optimizer: str = "adam"
    momentum: float = 0.9
    circular: bool = True
    transforms: Transforms = VIEWS

    def __post_init__(self) -> None:
        get_optimizer(self.optimizer)
        for name in ("patch_size", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (0 < self.step_size <= 255 and 0 <= self.momentum < 1):
            raise InputError(
                f"expected 0 < step_size <= 255 and 0 <= momentum < 1, got {self.step_size} and {self.momentum}"
            )
        if self.seed < 0 or (self.target is not None and self.target < 0):
            raise InputError(f"seed and target cannot be negative, got {self.seed} and {self.target}")

    def run(
        self, victim: Victim, images: Images, labels: Labels, *, positions: Positions | None = None,
        progress: Progress | None = None, checkpoint: Checkpoint | None = None,
    ) -> Found:  # fmt: skip
        """One patch for all images and places. Takes no notice of positions and checkpoint."""
        check_material(victim.models, images, labels, self.patch_size)
        mask = disc(self.patch_size) if self.circular else np.ones((self.patch_size, self.patch_size), bool)
        counting = np.arange(len(images)) if self.target is None else np.flatnonzero(labels != self.target)
        if not len(counting):
            raise InputError(f"all crafting images are of the target's class, {self.target}; give images of others")
        rng = np.random.default_rng(self.seed)
        patch = torch.full((3, *mask.shape), MIDDLE, device=victim.device)
        optimizer = get_optimizer(self.optimizer)(self.momentum)
        gradients = 0
        for step in range(self.steps):
            batch = rng.choice(counting, min(self.batch_size, len(counting)), replace=False)
            gradient = self._gradient(victim.models, images[batch], labels[batch], patch, mask, rng)
            patch = optimizer.step(patch, gradient, self.step_size)
            gradients += len(batch) * len(victim.models)
            if progress is not None:
                progress(step + 1, self.steps)
        return Found(patch.round().to(torch.uint8).cpu().numpy(), mask, gradients=gradients)

    def _gradient(
        self, models: Mapping[str, Differentiable], images: Images, labels: Labels, patch: torch.Tensor,
        mask: NDArray[np.bool_], rng: np.random.Generator,
    ) -> torch.Tensor:  # fmt: skip
        """(3, s, s), of the mean loss over images and models, at one draw of place and transform for each image."""
        leaf = patch.round().requires_grad_()
        clean = torch.from_numpy(images).to(patch.device).float()
        truth = torch.from_numpy(labels).to(patch.device)
        places = random_positions(len(images), (images.shape[2], images.shape[3]), mask.shape, rng)
        patched = paste(clean, leaf, mask, places, self.transforms, rng)
        values = []
        for model in models.values():
            logits = model(patched)
            check_labels(labels, logits.shape[1])
            values.append(cross_entropy(logits, truth, self.target).mean())
        return torch.autograd.grad(torch.stack(values).mean(), leaf)[0]
