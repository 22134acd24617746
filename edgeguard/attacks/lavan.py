"""LaVAN: localized noise at a fixed place, for each image or for all. Needs torch.

Plain gradient steps, of a size proportional to the gradient and without its sign, on the logit of a target minus that
of the source class, before the softmax; noise replaces the pixels under the mask. Source: Karmon et al. 2018,
arXiv:1801.02608. Where ours differs: pixels are grey levels and stay between 0 and 255 (the paper's image domain), and
every gradient is taken at whole ones; the noise begins at middle grey; of each image the iterate with the largest margin
is kept, and an image rests once the target's probability has reached `confidence`; without a target, the aim is the
strongest class besides the true one, chosen anew in every step, and the source is the true class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edgeguard.attacks.api import Checkpoint, Differentiable, Found, Images, Labels, Progress, Victim
from edgeguard.attacks.checks import check_labels, check_material, need_positions
from edgeguard.attacks.losses import aimed_at, margin
from edgeguard.errors import InputError
from edgeguard.patch import Positions, apply_patch, random_positions

GREY = 255.0
MIDDLE = 127.5


def logit_gap(logits: torch.Tensor, labels: torch.Tensor, target: int | None = None) -> torch.Tensor:
    """Logit of the target, or of the strongest other class, minus that of the source, the true label. Returns: (N,).

    With a target, an image of the target's own class has no source to leave; its gap is the target's logit alone.
    """
    own = logits.gather(1, labels[:, None])[:, 0]
    if target is None:
        return margin(logits, labels)
    wanted = aimed_at(logits, labels, target)
    reached = logits.gather(1, wanted[:, None])[:, 0]
    return torch.where(labels == wanted, reached, reached - own)


@dataclass(frozen=True)
class LaVAN:
    """How to craft.

    patch_size: side length in pixels. steps: at most. epsilon: what the gradient by pixels between 0 and 1 is multiplied
    by. target: the class to reach; None is untargeted. confidence: probability of the aim at which an image rests; 1
    never. universal: one noise for all images and random places, with batches of `batch_size` images. place: row and
    column of the patch on every image, else the judge's positions, or random ones where it is universal.
    """

    access = "gradients"

    patch_size: int
    steps: int = 300
    epsilon: float = 0.05
    target: int | None = None
    seed: int = 0
    confidence: float = 0.9
    universal: bool = False
    batch_size: int = 100
    place: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("patch_size", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (self.epsilon > 0 and 0 < self.confidence <= 1):
            raise InputError(f"expected epsilon > 0 and 0 < confidence <= 1, got {self.epsilon} and {self.confidence}")
        if self.seed < 0 or (self.target is not None and self.target < 0):
            raise InputError(f"seed and target cannot be negative, got {self.seed} and {self.target}")

    @property
    def name(self) -> str:
        return "lavan-universal" if self.universal else "lavan"

    @property
    def per_image(self) -> bool:
        return not self.universal

    def run(
        self, victim: Victim, images: Images, labels: Labels, *, positions: Positions | None = None,
        progress: Progress | None = None, checkpoint: Checkpoint | None = None,
    ) -> Found:  # fmt: skip
        """Noise for each image at its position, or for all. The mean over all models is differentiated."""
        check_material(victim.models, images, labels, self.patch_size)
        mask = np.ones((self.patch_size, self.patch_size), bool)
        work = _Work(self, victim.models, images, labels, mask, victim.device)
        if self.universal:
            return Found(work.universal(progress), mask, gradients=work.gradients)
        fixed = self._fixed(len(images))
        wanted = positions if fixed is None else fixed
        places = need_positions(wanted, images, self.patch_size, f"{self.name} without a place")
        return Found(work.per_image(places, progress), mask, places, gradients=work.gradients)

    def _fixed(self, count: int) -> Positions | None:
        """`place` for so many images, (count, 2)."""
        return None if self.place is None else np.tile(np.array(self.place, np.int64), (count, 1))


class _Work:
    """One run: the material, and how many images gradients were taken of."""

    def __init__(
        self, config: LaVAN, models: Mapping[str, Differentiable], images: Images, labels: Labels,
        mask: NDArray[np.bool_], device: str,
    ) -> None:  # fmt: skip
        self._config, self._models, self._device = config, list(models.values()), device
        self._images, self._labels, self._mask = images, labels, mask
        self.gradients = 0

    def universal(self, progress: Progress | None) -> Images:
        """(3, s, s)."""
        config = self._config
        rng = np.random.default_rng(config.seed)
        counting = np.arange(len(self._images))
        if config.target is not None:
            counting = np.flatnonzero(self._labels != config.target)
        if not len(counting):
            raise InputError(f"all crafting images are of the target's class, {config.target}; give images of others")
        noise = torch.full((3, *self._mask.shape), MIDDLE, device=self._device)
        shape = (self._images.shape[2], self._images.shape[3])
        for step in range(config.steps):
            batch = rng.choice(counting, min(config.batch_size, len(counting)), replace=False)
            fixed = config._fixed(len(batch))
            places = random_positions(len(batch), shape, self._mask.shape, rng) if fixed is None else fixed
            gradient, _, _ = self._gradient(batch, noise, places)
            noise = self._moved(noise, gradient / len(batch))
            if progress is not None:
                progress(step + 1, config.steps)
        pixels: Images = noise.round().to(torch.uint8).cpu().numpy()
        return pixels

    def per_image(self, positions: Positions, progress: Progress | None) -> Images:
        """(N, 3, s, s)."""
        size = self._config.batch_size
        found = []
        for start in range(0, len(self._images), size):
            batch = np.arange(start, min(start + size, len(self._images)))
            found.append(self._search(batch, positions[batch]))
            if progress is not None:
                progress(int(batch[-1]) + 1, len(self._images))
        return np.concatenate(found)

    def _search(self, batch: NDArray[np.int64], places: Positions) -> Images:
        """Noise (n, 3, s, s) for the images of one batch; those that have reached the confidence leave it."""
        best = np.full((len(batch), 3, *self._mask.shape), round(MIDDLE), np.uint8)
        highest = np.full(len(batch), -np.inf, np.float32)
        active = np.arange(len(batch))
        noise = torch.full(best.shape, MIDDLE, device=self._device)
        for _ in range(self._config.steps + 1):
            gradient, margins, sure = self._gradient(batch[active], noise, places[active])
            better = margins > highest[active]
            best[active[better]] = noise.round().to(torch.uint8).cpu().numpy()[better]
            highest[active[better]] = margins[better]
            stay = sure < self._config.confidence if self._config.confidence < 1 else np.ones(len(active), bool)
            if not stay.any():
                break
            keep = torch.from_numpy(stay).to(self._device)
            active, noise = active[stay], self._moved(noise[keep], gradient[keep])
        return best

    def _moved(self, noise: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        # A pixel is 255 times as large in grey levels, and the gradient by it 255 times as small.
        return (noise + self._config.epsilon * GREY * GREY * gradient).clamp(0, GREY)

    def _gradient(
        self, batch: NDArray[np.int64], noise: torch.Tensor, places: Positions
    ) -> tuple[torch.Tensor, NDArray[np.float32], NDArray[np.float32]]:
        """Gradient of the summed gap by the noise, margins (n,) of the first model, and its probability of the aim."""
        target = self._config.target
        leaf = noise.round().requires_grad_()
        truth = torch.from_numpy(self._labels[batch]).to(self._device)
        clean = torch.from_numpy(self._images[batch]).to(self._device).float()
        patched = apply_patch(clean, leaf, self._mask, places)
        logits = [model(patched) for model in self._models]
        check_labels(self._labels[batch], logits[0].shape[1])
        value = torch.stack([logit_gap(each, truth, target).sum() for each in logits]).mean()
        (gradient,) = torch.autograd.grad(value, leaf)
        self.gradients += len(batch) * len(logits)
        first = logits[0].detach()
        others = first.scatter(1, truth[:, None], -torch.inf)
        aim = others.argmax(1) if target is None else aimed_at(first, truth, target)
        sure = first.softmax(1).gather(1, aim[:, None])[:, 0]
        return gradient, margin(first, truth, target).cpu().numpy(), sure.cpu().numpy()
