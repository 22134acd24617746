"""One patch for each image, at the place where it does most: what gradients can do without universality. Needs torch.

A-QAPA per image. Every restart begins at another promising place, takes signed steps with momentum on the loss of each
image alone, and every few steps tries to move the patch by a stride that shrinks to one pixel. Of each image the iterate
with the largest margin is kept, and images leave as soon as they are lost. Restarts use different losses. What gradients
leave over, a random search may still find. The definition is ours, as that of A-QAPA is; its parts are signed steps
(Madry et al. 2018, arXiv:1706.06083) on a local noise (Karmon et al. 2018, arXiv:1801.02608), momentum (Dong et al.
2018, arXiv:1710.06081) and moves of the place (Rao et al. 2020, arXiv:2005.02313).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edgeguard.attacks.api import Checkpoint, Differentiable, Found, Images, Labels, Progress, Victim
from edgeguard.attacks.checks import check_material, need_positions
from edgeguard.attacks.losses import get_loss, margin
from edgeguard.attacks.per_image_search import PerImageSearch
from edgeguard.errors import InputError
from edgeguard.patch import Positions, apply_patch, check_fits


@dataclass(frozen=True)
class PerImage:
    """How to craft.

    patch_size: side length in pixels. steps: of one restart. step_size: in grey levels, falls to 1.
    loss: of the first restart, a name in `losses.LOSSES`; the next ones take turns. target: a class; None is untargeted.
    restarts: at most, for images that are not lost before. momentum: share of the accumulated gradient kept.
    move: choose the places; else they are given. candidates: places compared before the first step. move_every: steps
    between moves. directions: of a move, 4 or 8. confidence: an image is lost, and left alone, when its margin exceeds
    this; inf never. polish: rounds of random search, one image shown to the model in each, for what is not lost then.
    batch_size: images that a model sees at once.
    """

    name = "aqapa-per-image"
    access = "gradients"
    per_image = True

    patch_size: int
    steps: int = 40
    step_size: float = 24.0
    loss: str = "scaled-cross-entropy"
    target: int | None = None
    seed: int = 0
    restarts: int = 4
    momentum: float = 0.7
    move: bool = True
    candidates: int = 12
    move_every: int = 4
    directions: int = 8
    confidence: float = 0.0
    polish: int = 0
    batch_size: int = 100

    def __post_init__(self) -> None:
        get_loss(self.loss)
        if self.patch_size < 1 or self.steps < 1 or not 1 <= self.step_size <= 255 or self.seed < 0:
            raise InputError(
                "expected patch_size >= 1, steps >= 1, 1 <= step_size <= 255 and seed >= 0, got "
                f"{self.patch_size}, {self.steps}, {self.step_size} and {self.seed}"
            )
        for name in ("restarts", "candidates", "move_every", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.directions not in (4, 8) or not 0 <= self.momentum < 1:
            raise InputError(
                f"expected 4 or 8 directions and 0 <= momentum < 1, got {self.directions}, {self.momentum}"
            )
        if not self.confidence >= 0 or self.polish < 0 or (self.target is not None and self.target < 0):
            raise InputError(
                "expected confidence >= 0, polish >= 0 and no negative target, got "
                f"{self.confidence}, {self.polish} and {self.target}"
            )

    def run(
        self, victim: Victim, images: Images, labels: Labels, *, positions: Positions | None = None,
        progress: Progress | None = None, checkpoint: Checkpoint | None = None,
    ) -> Found:  # fmt: skip
        """Patches (N, 3, s, s) and their places.

        Several models are attacked at once, by the mean of their losses; an image is lost when *the first* of them loses
        it, so put the judged one first and surrogates, whose gradients may lead further, after it. `positions` are
        needed without `move`, and else not used.
        """
        check_material(victim.models, images, labels, self.patch_size)
        fixed = None if self.move else need_positions(positions, images, self.patch_size, f"{self.name} without moves")
        search = PerImageSearch(self, victim.models, images, labels, fixed, victim.device)
        search.run(progress)
        mask = np.ones((self.patch_size, self.patch_size), bool)
        late = search.last_restart if self.restarts > 1 else None
        return Found(search.pixels, mask, search.places, gradients=search.gradients, last_restart=late)


def craft_per_image(
    config: PerImage,
    model: Differentiable,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    positions: Positions,
    device: str = "cpu",
) -> NDArray[np.uint8]:
    """Search for one patch per image at a given place: one random start, plain signed steps, no image leaves early.

    Args:
        config: its size, steps, step size, loss, target and seed; the rest plays no part.
        images: (N, 3, H, W) uint8, in one batch. labels: (N,) int64. positions: (N, 2), where each patch will be.

    Returns: (N, 3, s, s) uint8.
    """
    size = config.patch_size
    check_fits((size, size), (images.shape[2], images.shape[3]))
    loss, mask = get_loss(config.loss), np.ones((size, size), bool)
    rng = np.random.default_rng(config.seed)
    start = rng.integers(0, 256, (len(images), 3, size, size)).astype(np.float32)
    patch = torch.from_numpy(start).to(device)
    clean = torch.from_numpy(images).to(device).float()
    truth = torch.from_numpy(labels).to(device)
    best, best_margin = patch.clone(), torch.full((len(images),), -torch.inf, device=device)
    for step in range(config.steps + 1):
        leaf = patch.round().requires_grad_()
        logits = model(apply_patch(clean, leaf, mask, positions))
        reached = margin(logits.detach(), truth, config.target)
        better = reached > best_margin
        best[better], best_margin[better] = leaf.detach()[better], reached[better]
        if step == config.steps:
            break
        (gradient,) = torch.autograd.grad(loss(logits, truth, config.target).sum(), leaf)
        size_now = 1 + (config.step_size - 1) * (1 - step / config.steps)
        patch = (patch + size_now * gradient.sign()).clamp(0, 255)
    pixels: NDArray[np.uint8] = best.to(torch.uint8).cpu().numpy()
    return pixels


def vanished_gradients(
    model: Differentiable, images: NDArray[np.uint8], labels: NDArray[np.int64], loss: str, device: str = "cpu"
) -> NDArray[np.bool_]:
    """Which images (N,) have an input gradient of the loss that is zero everywhere, or not finite somewhere."""
    leaf = torch.from_numpy(images).to(device).float().requires_grad_()
    value = get_loss(loss)(model(leaf), torch.from_numpy(labels).to(device), None).sum()
    (gradient,) = torch.autograd.grad(value, leaf)
    flat = gradient.flatten(1)
    gone: NDArray[np.bool_] = ((flat == 0).all(1) | ~torch.isfinite(flat).all(1)).cpu().numpy()
    return gone
