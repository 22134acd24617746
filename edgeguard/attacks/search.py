"""The search of A-QAPA: starts that race, the step each of them takes, and how they are scored. Needs torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from edgeguard.attacks.api import Differentiable, Images, Labels
from edgeguard.attacks.checks import check_labels, check_material
from edgeguard.attacks.losses import get_loss
from edgeguard.attacks.optimizers import get_optimizer
from edgeguard.attacks.transforms import paste
from edgeguard.attacks.widths import WidthChooser
from edgeguard.patch import random_positions

if TYPE_CHECKING:
    from edgeguard.attacks.aqapa import AQAPA

MOVES = 2
"""Moves in a step of the race."""
RACE_IMAGES = 300
"""Images on which the starts of a race are compared; restarts are compared on all."""
EVERY = "all"
"""The width of a step that takes the mean over all models."""


@dataclass(frozen=True)
class CraftStep:
    """One step of one start. loss, success: means over its images, before each move. width: the model drawn, or `EVERY`.

    step: counted over all starts of a restart, from 0.
    """

    restart: int
    start: int
    step: int
    width: str
    loss: float
    success: float


class _Start:
    """One random start of a race and how far it has come."""

    def __init__(self, config: AQAPA, names: list[str], restart: int, number: int, device: str) -> None:
        self.number, self.taken = number, 0
        self.rng = np.random.default_rng([config.seed, restart, number])
        pixels = self.rng.integers(0, 256, (3, config.patch_size, config.patch_size)).astype(np.float32)
        self.patch = torch.from_numpy(pixels).to(device)
        self.optimizer = get_optimizer(config.optimizer)(config.momentum)
        self.chooser = WidthChooser(names, config.width_rate, config.width_floor)

    def move(self, gradient: torch.Tensor, step_size: float) -> None:
        self.patch = self.optimizer.step(self.patch, gradient, step_size)

    def projected(self) -> Images:
        """The patch in uint8."""
        pixels: Images = self.patch.round().to(torch.uint8).cpu().numpy()
        return pixels


class Search:
    """What all starts of a `craft` share: the models, and the images that each of them can lose.

    gradients: images that gradients were taken of so far, once for each model.
    """

    def __init__(
        self, config: AQAPA, models: Mapping[str, Differentiable], images: Images, labels: Labels, device: str
    ) -> None:
        check_material(models, images, labels, config.patch_size)
        self._config, self._models, self._device = config, dict(models), device
        self._images, self._labels = images, labels
        self._loss = get_loss(config.loss)
        self._mask = np.ones((config.patch_size, config.patch_size), bool)
        self._eligible = {name: self._attackable(name) for name in self._models}
        self.gradients = 0

    def run(self, restart: int) -> Iterator[CraftStep]:
        """One race and the run of its winner; afterwards `winner` holds the patch."""
        config = self._config
        rounds = config.rounds()
        path = sum(each for _, each in rounds)
        starts = [_Start(config, list(self._models), restart, k, self._device) for k in range(rounds[0][0])]
        taken = 0
        for alive, each in rounds:
            if alive < len(starts):
                starts.sort(key=lambda start: -self.score(start.projected(), RACE_IMAGES))
                starts = starts[:alive]
            for start in starts:
                for _ in range(each):
                    name, loss, success = self._step(start, start.taken / path, MOVES if alive > 1 else 1)
                    yield CraftStep(restart, start.number, taken, name, loss, success)
                    taken += 1
        self.winner = starts[0]

    def score(self, pixels: Images, limit: int | None = None) -> float:
        """Lowest success over widths of a projected patch, on at most `limit` crafting images at the same places."""
        lowest = 1.0
        patch = torch.from_numpy(pixels.astype(np.float32)).to(self._device)
        for name, eligible in self._eligible.items():
            rng = np.random.default_rng(self._config.seed)
            chosen, fooled = rng.permutation(eligible)[:limit], 0.0
            for batch in _batches(chosen, self._config.batch_size):
                with torch.no_grad():
                    logits = self._models[name](self._patched(batch, patch, rng))
                fooled += float(self._fooled(logits, batch).sum())
            lowest = min(lowest, fooled / len(chosen))
        return lowest

    def _step_size(self, progress: float) -> float:
        first, last = self._config.step_size, self._config.final_step_size
        return last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))

    def _step(self, start: _Start, progress: float, moves: int) -> tuple[str, float, float]:
        """One step in so many moves; a width is drawn for all of them. Returns: width, mean loss, share of success."""
        name = EVERY if self._config.average else start.chooser.draw(start.rng)
        losses, successes = [], []
        for _ in range(moves):
            gradient, loss, success = self._gradient(name, start, max(1, self._config.batch_size // moves))
            start.move(gradient, self._step_size(progress))
            losses.append(loss)
            successes.append(success)
        start.taken += 1
        if not self._config.average:
            start.chooser.update(name, sum(successes) / moves)
        return name, sum(losses) / moves, sum(successes) / moves

    def _gradient(self, name: str, start: _Start, size: int) -> tuple[torch.Tensor, float, float]:
        """Gradient (3, s, s), mean loss and share of success of one batch of at most `size` images."""
        names = list(self._models) if self._config.average else [name]
        eligible = self._shared() if self._config.average else self._eligible[name]
        batch = start.rng.choice(eligible, min(size, len(eligible)), replace=False)
        leaf = start.patch.round().requires_grad_()
        patched = self._patched(batch, leaf, start.rng)
        labels = torch.from_numpy(self._labels[batch]).to(self._device)
        losses, successes = [], []
        for each in names:
            logits = self._models[each](patched)
            losses.append(self._loss(logits, labels, self._config.target).mean())
            successes.append(float(self._fooled(logits.detach(), batch).float().mean()))
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        (gradient,) = torch.autograd.grad(loss, leaf)
        self.gradients += len(batch) * len(names)
        return gradient, float(loss.detach()), sum(successes) / len(successes)

    def _shared(self) -> NDArray[np.int64]:
        """Images that every model can lose; where there are none, those that any can."""
        sets = list(self._eligible.values())
        counts = np.bincount(np.concatenate(sets), minlength=len(self._images))
        everywhere = np.flatnonzero(counts == len(sets))
        return everywhere if len(everywhere) else np.flatnonzero(counts)

    def _patched(self, batch: NDArray[np.int64], patch: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        images = torch.from_numpy(self._images[batch]).to(self._device).float()
        shape = (self._images.shape[2], self._images.shape[3])
        positions = random_positions(len(batch), shape, self._mask.shape, rng)
        return paste(images, patch, self._mask, positions, self._config.transforms, rng)

    def _fooled(self, logits: torch.Tensor, batch: NDArray[np.int64]) -> torch.Tensor:
        predicted = logits.argmax(1).cpu()
        if self._config.target is not None:
            return predicted == self._config.target
        return predicted != torch.from_numpy(self._labels[batch])

    def _attackable(self, name: str) -> NDArray[np.int64]:
        """Images that count: classified correctly, or not of the target's class. All of them when none counts."""
        everything = np.arange(len(self._images))
        if self._config.target is not None:
            chosen = np.flatnonzero(self._labels != self._config.target)
        else:
            chosen = np.concatenate([batch[self._correct(name, batch)] for batch in _batches(everything, 256)])
        return chosen if len(chosen) else everything

    def _correct(self, name: str, batch: NDArray[np.int64]) -> NDArray[np.bool_]:
        with torch.no_grad():
            logits = self._models[name](torch.from_numpy(self._images[batch]).to(self._device).float())
        check_labels(self._labels[batch], logits.shape[1])
        correct: NDArray[np.bool_] = logits.argmax(1).cpu().numpy() == self._labels[batch]
        return correct


def _batches(indices: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
