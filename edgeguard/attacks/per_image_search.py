"""The search of A-QAPA per image: many images in lockstep, each with its own patch and place. Needs torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from edgeguard.attacks.api import Differentiable, Images, Labels, Progress
from edgeguard.attacks.checks import check_labels
from edgeguard.attacks.losses import get_loss, margin
from edgeguard.attacks.optimizers import SMALLEST
from edgeguard.attacks.placement import extreme_pixels, neighbours, promising_places
from edgeguard.patch import Positions, apply_patch

if TYPE_CHECKING:
    from edgeguard.attacks.per_image import PerImage

LOSSES = ("scaled-cross-entropy", "bounded-margin", "cross-entropy")
"""What restarts take turns with, after the loss that was asked for."""
POLISH_MOVES = 4
"""One round of the random search in so many moves the patch instead of changing it."""
Indices = NDArray[np.int64]


class PerImageSearch:
    """Afterwards `pixels` (N, 3, s, s) uint8, `places` (N, 2) and `margins` (N,) hold the best iterate of each image.

    gradients, shown: images that gradients were taken of, and that models were shown without one, each time counted.
    last_restart: images that the last restart lost.
    """

    def __init__(
        self, config: PerImage, models: Mapping[str, Differentiable], images: Images, labels: Labels,
        positions: Positions | None, device: str,
    ) -> None:  # fmt: skip
        self._config, self._models, self._device = config, list(models.values()), device
        self._images, self._labels = images, labels
        size, count = config.patch_size, len(images)
        self._mask = np.ones((size, size), bool)
        self._limit = np.array([images.shape[2] - size, images.shape[3] - size], np.int64)
        self._rng = np.random.default_rng(config.seed)
        others = [name for name in LOSSES if name != config.loss]
        self._losses = [get_loss(name) for name in (config.loss, *others)]
        self.gradients = self.shown = self.last_restart = 0
        self.places: Positions = np.zeros((count, 2), np.int64) if positions is None else positions.copy()
        self.pixels: Images = np.zeros((count, 3, size, size), np.uint8)
        self.margins = np.full(count, -np.inf, np.float32)
        # (R, N, 2), (R, N, 3, s, s): where and with what each restart begins.
        self._openings: list[tuple[Positions, Images]] = []

    @property
    def open(self) -> Indices:
        """Images that are not lost yet."""
        return np.flatnonzero(~(self.margins > self._config.confidence))

    def run(self, progress: Progress | None = None) -> None:
        config = self._config
        total = config.restarts * config.steps + config.polish
        self._prepare()
        for restart in range(config.restarts):
            before = len(self.open)
            for step in self._restart(restart):
                if progress is not None:
                    progress(restart * config.steps + step, total)
            self.last_restart = before - len(self.open)
        for done in self._polish():
            if progress is not None:
                progress(config.restarts * config.steps + done, total)
        if progress is not None:
            progress(total, total)

    def _prepare(self) -> None:
        """Rank places by the clean image's gradient, look at the best of them, and set the openings of all restarts."""
        config, count = self._config, len(self._images)
        everything = np.arange(count)
        clean = torch.cat([self._tensor(self._images[batch]) for batch in self._batches(everything)])
        gradient = torch.cat([self._clean_gradient(batch) for batch in self._batches(everything)])
        if not config.move:
            start = extreme_pixels(gradient, config.patch_size, self.places)
            self._keep(everything, start, self.places, self._margin(everything, start, self.places))
            self._openings.append((self.places.copy(), _uint8(start)))
            return
        ranked = promising_places(clean, gradient, config.patch_size, max(1, config.patch_size // 2))
        ranked = ranked[:, : max(config.candidates, config.restarts)]
        reached = np.empty((count, ranked.shape[1]), np.float32)
        for number in range(ranked.shape[1]):
            start = extreme_pixels(gradient, config.patch_size, ranked[:, number])
            found = self._margin(everything, start, ranked[:, number])
            self._keep(everything, start, ranked[:, number], found)
            reached[:, number] = found.cpu().numpy()
        order = np.argsort(-reached, axis=1, kind="stable")
        for number in range(min(config.restarts, ranked.shape[1])):
            places = ranked[everything, order[:, number]]
            self._openings.append((places, _uint8(extreme_pixels(gradient, config.patch_size, places))))

    def _restart(self, restart: int) -> Iterator[int]:
        """Steps from one opening, of all images that are not lost yet. Yields the steps done."""
        config = self._config
        size, count = config.patch_size, len(self._images)
        places, start = self._openings[restart % len(self._openings)]
        if restart % 2:
            start = self._rng.integers(0, 256, (count, 3, size, size), np.uint8)
        active = self.open
        places, patch = places[active], self._tensor(start[active])
        velocity = torch.zeros_like(patch)
        for step in range(config.steps + 1):
            if not len(active):
                return
            rounded = patch.round()
            gradient, reached = self._gradient(active, rounded, places, restart, step < config.steps)
            self._keep(active, rounded, places, reached)
            if step == config.steps:
                return
            stay = ~(self.margins[active] > config.confidence)
            keep = torch.from_numpy(stay).to(self._device)
            active, places = active[stay], places[stay]
            patch, velocity, gradient = patch[keep], velocity[keep], gradient[keep]
            scale = gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(SMALLEST)
            velocity = config.momentum * velocity + gradient / scale
            step_size = 1 + (config.step_size - 1) * (1 - step / config.steps)
            patch = (patch + step_size * velocity.sign()).clamp(0, 255)
            if config.move and (step + 1) % config.move_every == 0 and len(active):
                places = self._moved(active, patch.round(), places, step / config.steps)
            yield step + 1

    def _moved(self, active: Indices, patch: torch.Tensor, places: Positions, progress: float) -> Positions:
        """The better of each place and its neighbours, (n, 2); the stride shrinks from half a patch to one pixel."""
        stride = max(1, round(self._config.patch_size / 2 * (1 - progress)))
        options = [places, *neighbours(places, stride, self._limit, self._config.directions)]
        reached = np.stack([self._margin(active, patch, option).cpu().numpy() for option in options])
        best = reached.argmax(0)
        chosen: Positions = np.stack(options)[best, np.arange(len(active))]
        self._keep(active, patch, chosen, torch.from_numpy(reached.max(0)))
        return chosen

    def _polish(self) -> Iterator[int]:
        """Random squares of an extreme colour, or a move, kept when the margin does not fall. Yields the rounds done."""
        config = self._config
        size = config.patch_size
        for done in range(config.polish):
            active = self.open
            if not len(active):
                return
            pixels, places = self.pixels[active].copy(), self.places[active].copy()
            left = 1 - done / config.polish
            if config.move and done % POLISH_MOVES == POLISH_MOVES - 1:
                reach = max(1, round(size * left / 2))
                places = (places + self._rng.integers(-reach, reach + 1, places.shape)).clip(0, self._limit)
            else:
                side = max(1, round(size * left**2 / 2))
                corners = self._rng.integers(0, size - side + 1, (len(active), 2))
                colours = self._rng.integers(0, 2, (len(active), 3), np.uint8) * np.uint8(255)
                squares = np.broadcast_to(colours[:, :, None, None], (len(active), 3, side, side))
                pixels = apply_patch(pixels, squares, np.ones((side, side), bool), corners)
            patch = self._tensor(pixels)
            self._keep(active, patch, places, self._margin(active, patch, places), ties=True)
            yield done + 1

    def _keep(
        self, indices: Indices, patch: torch.Tensor, places: Positions, reached: torch.Tensor, ties: bool = False
    ) -> None:
        """Remember iterates whose margin is the largest so far. patch: whole grey levels."""
        margins = reached.cpu().numpy()
        old = self.margins[indices]
        better = margins >= old if ties else margins > old
        chosen = indices[better]
        self.margins[chosen], self.places[chosen] = margins[better], places[better]
        self.pixels[chosen] = _uint8(patch)[better]

    def _gradient(
        self, indices: Indices, patch: torch.Tensor, places: Positions, restart: int, wanted: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient (n, 3, s, s) of the mean loss over models by the patches, and margins (n,) of the first model."""
        if not wanted:
            return torch.zeros_like(patch), self._margin(indices, patch, places)
        loss = self._losses[restart % len(self._losses)]
        gradients, margins = [], []
        for rows in self._batches(np.arange(len(indices))):
            batch = indices[rows]
            leaf = patch[rows].requires_grad_()
            truth = torch.from_numpy(self._labels[batch]).to(self._device)
            patched = apply_patch(self._tensor(self._images[batch]), leaf, self._mask, places[rows])
            logits = [model(patched) for model in self._models]
            value = torch.stack([loss(each, truth, self._config.target).sum() for each in logits]).mean()
            gradients.append(torch.autograd.grad(value, leaf)[0])
            margins.append(margin(logits[0].detach(), truth, self._config.target))
            self.gradients += len(batch) * len(self._models)
        return torch.cat(gradients), torch.cat(margins)

    def _margin(self, indices: Indices, patch: torch.Tensor, places: Positions) -> torch.Tensor:
        """Margins (n,) of the first model; above 0 it is fooled."""
        margins = []
        for rows in self._batches(np.arange(len(indices))):
            batch = indices[rows]
            with torch.no_grad():
                patched = apply_patch(self._tensor(self._images[batch]), patch[rows], self._mask, places[rows])
                logits = self._models[0](patched)
            margins.append(margin(logits, torch.from_numpy(self._labels[batch]).to(self._device), self._config.target))
            self.shown += len(batch)
        return torch.cat(margins)

    def _clean_gradient(self, batch: Indices) -> torch.Tensor:
        """Gradient (n, 3, H, W) of the first loss by the images, without a patch."""
        leaf = self._tensor(self._images[batch]).requires_grad_()
        truth = torch.from_numpy(self._labels[batch]).to(self._device)
        values = []
        for model in self._models:
            logits = model(leaf)
            check_labels(self._labels[batch], logits.shape[1])
            values.append(self._losses[0](logits, truth, self._config.target).sum())
        self.gradients += len(batch) * len(self._models)
        return torch.autograd.grad(torch.stack(values).mean(), leaf)[0]

    def _tensor(self, images: Images) -> torch.Tensor:
        return torch.from_numpy(images).to(self._device).float()

    def _batches(self, indices: Indices) -> Iterator[Indices]:
        for start in range(0, len(indices), self._config.batch_size):
            yield indices[start : start + self._config.batch_size]


def _uint8(patch: torch.Tensor) -> Images:
    pixels: Images = patch.detach().round().to(torch.uint8).cpu().numpy()
    return pixels
