"""A-QAPA: one patch for every image, place and bit-width. Needs torch.

A universal patch that maximizes the expected loss over images, random placements and quantized models of several
bit-widths, through their straight-through gradients. "Adaptive": the distribution over widths moves toward those where
the patch succeeds least. The definition is ours: the paper that named the attack (arXiv:2503.07058) gives the idea, and
we hold none of its equations.

Each step draws a width, a batch of images that this width classifies correctly and a place for each image, and moves
the patch along the sign of its accumulated gradient (momentum: Dong et al. 2018, arXiv:1710.06081). The patch is kept
in float32 between steps, but every gradient is taken at whole grey levels: what is optimized is what is deployed.

Where a search ends depends on where it starts far more than on how long it lasts, so several random starts race: in
each round every start takes a few steps, all are scored on the same images and places, and the best third goes on
(successive halving: Jamieson & Talwalkar 2016, arXiv:1502.07943). Exploring needs many steps rather than exact ones, so
a step of the race is two moves on half a batch each. All steps count: an attack shows steps * batch_size images.

Craft on images that the result is not judged on; nothing in here knows which those are, and nothing in here is a
result: `Crafted.selection` only chose among restarts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edgeguard.attacks.api import Differentiable
from edgeguard.attacks.losses import get_loss
from edgeguard.attacks.widths import WidthChooser
from edgeguard.errors import InputError
from edgeguard.patch import Patch, apply_patch, check_fits, random_positions, square

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

KEPT = 3
"""One start in so many survives a round of the race."""
SHORTEST = 5
"""Steps a start takes at least before it is judged."""
MOVES = 2
"""Moves in a step of the race."""
RACE_IMAGES = 300
"""Images on which the starts of a race are compared; restarts are compared on all."""


@dataclass(frozen=True)
class AQAPA:
    """How to craft.

    patch_size: side length in pixels. steps: of one search, its race included. batch_size: images of a step.
    starts: random starts that race. race: share of the steps spent on the race.
    step_size, final_step_size: in grey levels, falling along half a cosine. momentum: share of the accumulated gradient
    kept from step to step. loss: a name in `losses.LOSSES`. target: a class to reach; None is untargeted.
    restarts: independent searches, of which the best on the crafting images is returned.
    width_rate: how sharply the distribution over widths prefers those with little success; 0 is uniform.
    width_floor: probability shared equally by all widths.
    """

    patch_size: int
    steps: int = 300
    batch_size: int = 100
    starts: int = 16
    race: float = 0.6
    step_size: float = 16.0
    final_step_size: float = 1.0
    momentum: float = 0.9
    loss: str = "bounded-margin"
    target: int | None = None
    restarts: int = 1
    seed: int = 0
    width_rate: float = 4.0
    width_floor: float = 0.2

    def __post_init__(self) -> None:
        get_loss(self.loss)
        for name in ("patch_size", "steps", "batch_size", "starts", "restarts"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.final_step_size <= self.step_size <= 255:
            raise InputError(
                "step sizes are grey levels, 0 < final_step_size <= step_size <= 255, got "
                f"{self.final_step_size} and {self.step_size}"
            )
        if not (0 <= self.momentum < 1 and 0 <= self.race < 1):
            raise InputError(f"expected 0 <= momentum < 1 and 0 <= race < 1, got {self.momentum} and {self.race}")
        if not (0 <= self.width_floor <= 1 and 0 <= self.width_rate < math.inf):
            raise InputError(
                f"expected 0 <= width_floor <= 1 and width_rate >= 0, got {self.width_floor} and {self.width_rate}"
            )
        if self.seed < 0 or (self.target is not None and self.target < 0):
            raise InputError(f"seed and target cannot be negative, got {self.seed} and {self.target}")

    def rounds(self) -> list[tuple[int, int]]:
        """The race and the run of its winner: starts that take part in each round, and steps of each of them."""
        budget = int(self.race * self.steps)
        entrants = self.starts
        while entrants > 1 and budget < SHORTEST * sum(_survivors(entrants)):
            entrants -= 1
        field = _survivors(entrants)
        plan = [(alive, budget // sum(field)) for alive in field]
        return [*plan, (1, self.steps - sum(alive * each for alive, each in plan))]


def _survivors(entrants: int) -> list[int]:
    """Starts in each round of a race: [16, 5] for 16; none for one start."""
    field = []
    while entrants > 1:
        field.append(entrants)
        entrants = max(1, entrants // KEPT)
    return field


@dataclass(frozen=True)
class CraftStep:
    """One step of one start. loss, success: means over its images, before each move. width: the model drawn.

    step: counted over all starts of a restart, from 0.
    """

    restart: int
    start: int
    step: int
    width: str
    loss: float
    success: float


@dataclass(frozen=True, eq=False)
class Crafted:
    """A patch and how it came about.

    history: every step of every restart. selection: one number per restart, the lowest success over widths on the
    crafting images; it chose among the restarts and says nothing about other images.
    """

    patch: Patch
    history: tuple[CraftStep, ...]
    selection: tuple[float, ...]


def craft(
    config: AQAPA,
    models: Mapping[str, Differentiable],
    images: Images,
    labels: Labels,
    progress: Callable[[CraftStep], None] | None = None,
    device: str = "cpu",
) -> Crafted:
    """Search for a universal patch.

    Args:
        config: how.
        models: by the name of their width; one or several.
        images: (N, 3, H, W) uint8, to craft on; keep them apart from the images that the patch is judged on.
        labels: (N,) int64.
        progress: called after every step.
        device: where the models live.

    Raises:
        InputError: no models or images, a patch larger than the image, or a target outside the classes.
    """
    search = _Search(config, models, images, labels, device)
    history: list[CraftStep] = []
    found: list[Images] = []
    for restart in range(config.restarts):
        for step in search.run(restart):
            history.append(step)
            if progress is not None:
                progress(step)
        found.append(search.winner.projected())
    if config.restarts == 1:
        return Crafted(square(found[0]), tuple(history), ())
    selection = [search.score(pixels) for pixels in found]
    return Crafted(square(found[int(np.argmax(selection))]), tuple(history), tuple(selection))


class _Start:
    """One random start of a race and how far it has come."""

    def __init__(self, config: AQAPA, names: list[str], restart: int, number: int, device: str) -> None:
        self.number, self.taken = number, 0
        self.rng = np.random.default_rng([config.seed, restart, number])
        pixels = self.rng.integers(0, 256, (3, config.patch_size, config.patch_size)).astype(np.float32)
        self.patch = torch.from_numpy(pixels).to(device)
        self.velocity = torch.zeros_like(self.patch)
        self.chooser = WidthChooser(names, config.width_rate, config.width_floor)

    def move(self, gradient: torch.Tensor, step_size: float, momentum: float) -> None:
        self.velocity = momentum * self.velocity + gradient / gradient.abs().mean().clamp_min(1e-30)
        self.patch = (self.patch + step_size * self.velocity.sign()).clamp(0, 255)

    def projected(self) -> Images:
        """The patch in uint8."""
        pixels: Images = self.patch.round().to(torch.uint8).cpu().numpy()
        return pixels


class _Search:
    """What all starts of a `craft` share: the models, and the images that each of them can lose."""

    def __init__(
        self, config: AQAPA, models: Mapping[str, Differentiable], images: Images, labels: Labels, device: str
    ) -> None:
        if not models or not len(images) or labels.shape != (len(images),):
            raise InputError(
                f"crafting needs models and labelled images, got {len(models)} models, {len(images)} images "
                f"and labels of shape {labels.shape}"
            )
        size = config.patch_size
        check_fits((size, size), (images.shape[2], images.shape[3]))
        self._config, self._models, self._device = config, dict(models), device
        self._images, self._labels = images, labels
        self._loss = get_loss(config.loss)
        self._mask = np.ones((size, size), bool)
        self._eligible = {name: self._attackable(name) for name in self._models}

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
        name = start.chooser.draw(start.rng)
        losses, successes = [], []
        for _ in range(moves):
            gradient, loss, success = self._gradient(name, start, max(1, self._config.batch_size // moves))
            start.move(gradient, self._step_size(progress), self._config.momentum)
            losses.append(loss)
            successes.append(success)
        start.taken += 1
        start.chooser.update(name, sum(successes) / moves)
        return name, sum(losses) / moves, sum(successes) / moves

    def _gradient(self, name: str, start: _Start, size: int) -> tuple[torch.Tensor, float, float]:
        """Gradient (3, s, s), mean loss and share of success of one batch of at most `size` images."""
        eligible = self._eligible[name]
        batch = start.rng.choice(eligible, min(size, len(eligible)), replace=False)
        leaf = start.patch.round().requires_grad_()
        logits = self._models[name](self._patched(batch, leaf, start.rng))
        labels = torch.from_numpy(self._labels[batch]).to(self._device)
        loss = self._loss(logits, labels, self._config.target).mean()
        (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient, float(loss.detach()), float(self._fooled(logits.detach(), batch).float().mean())

    def _patched(self, batch: NDArray[np.int64], patch: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        images = torch.from_numpy(self._images[batch]).to(self._device).float()
        shape = (self._images.shape[2], self._images.shape[3])
        positions = random_positions(len(batch), shape, self._mask.shape, rng)
        return apply_patch(images, patch, self._mask, positions)

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
        correct: NDArray[np.bool_] = logits.argmax(1).cpu().numpy() == self._labels[batch]
        return correct


def _batches(indices: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
