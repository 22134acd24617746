"""The judge: puts a patch on images, asks an engine, and computes success. Attacks only propose patches.

Untargeted, an image counts when the engine classifies it correctly without a patch, and is fooled when the engine
misclassifies it with one. Targeted, an image counts when it is not of the target's class, and is fooled when the engine
answers the target. The ASR is the share of counting images that are fooled. Robust accuracy is the share of *all*
judged images that the engine classifies correctly without the patch and at every place of it that was tried.
NumPy only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import EngineError, InputError
from edgeguard.patch import Patch, Positions, apply_patch, grid_positions, random_positions

Images = NDArray[np.uint8]
Flags = NDArray[np.bool_]
Classify = Callable[[Images], NDArray[np.float32]]
"""Images (N, 3, H, W) uint8 to logits (N, classes) float32: an engine, or a twin behind the same protocol."""
Tick = Callable[[int, int], None]


@runtime_checkable
class Streaming(Protocol):
    """A classifier that is far away, and does better when it is asked for several batches at a time."""

    def stream(self, batches: Iterable[Images]) -> Iterator[NDArray[np.float32]]:
        """The logits of each batch, in their order."""


def logits_of(classify: Classify, images: Images, batch_size: int) -> NDArray[np.float32]:
    """Logits (N, classes) float32, asked for batch by batch; of an engine that can, several batches at a time.

    Raises:
        EngineError: when they are not finite or of another shape.
    """
    parts = []
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    answers = classify.stream(batches) if isinstance(classify, Streaming) else map(classify, batches)
    for batch, answer in zip(batches, answers, strict=True):
        logits = np.asarray(answer)
        if logits.ndim != 2 or len(logits) != len(batch) or not np.isfinite(logits).all():
            raise EngineError(
                f"the engine must give finite logits ({len(batch)}, classes), got {logits.shape} with "
                f"{int((~np.isfinite(logits)).sum())} values that are not finite"
            )
        parts.append(logits)
    return np.concatenate(parts)


@dataclass(frozen=True, eq=False)
class Subject:
    """What is judged: one classifier on one set of images.

    images: (N, 3, H, W) uint8. labels: (N,) int64. clean: (N, classes) float32, the classifier's logits without a
    patch. target: the class to reach; None when untargeted.
    """

    classify: Classify
    images: Images
    labels: NDArray[np.int64]
    clean: NDArray[np.float32]
    target: int | None
    batch_size: int

    @staticmethod
    def of(
        classify: Classify, images: Images, labels: NDArray[np.int64], target: int | None = None, batch_size: int = 50
    ) -> Subject:
        """Ask for the clean logits.

        Raises:
            InputError: no images, or labels or a target outside the classes.
            EngineError: logits that are not finite.
        """
        if not len(images) or labels.shape != (len(images),):
            raise InputError(f"there must be labelled images to judge, got {len(images)} and labels {labels.shape}")
        clean = logits_of(classify, images, batch_size)
        classes = clean.shape[1]
        if labels.min() < 0 or labels.max() >= classes:
            raise InputError(f"labels run from {labels.min()} to {labels.max()}, but the model has {classes} classes")
        if target is not None and not 0 <= target < classes:
            raise InputError(f"target {target} is none of the model's {classes} classes")
        return Subject(classify, images, labels, clean, target, batch_size)

    def first(self, count: int) -> Subject:
        """The same classifier on the first images only."""
        images, labels, clean = self.images[:count], self.labels[:count], self.clean[:count]
        return Subject(self.classify, images, labels, clean, self.target, self.batch_size)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.images.shape[2], self.images.shape[3]

    @property
    def correct(self) -> Flags:
        """(N,) bool: classified correctly without a patch."""
        flags: Flags = self.clean.argmax(1) == self.labels
        return flags

    @property
    def eligible(self) -> Flags:
        """(N,) bool: counts for the ASR."""
        return self.correct if self.target is None else self.labels != self.target

    def fooled(self, logits: NDArray[np.float32], indices: NDArray[np.int64]) -> Flags:
        """Whether the logits (n, classes) of the images at `indices` (n,) are what the attacker wants."""
        wanted = self.labels[indices] if self.target is None else self.target
        flags: Flags = (logits.argmax(1) == wanted) == (self.target is not None)
        return flags


@dataclass(frozen=True, eq=False)
class Judged:
    """The verdict on one patch, image by image, in the order of the subject's images.

    eligible, fooled, robust: (N,) bool; an image that is not eligible is never fooled. logits: (N, classes) float32
    with the patch at `positions` (N, 2): where the image was fooled, else the last place tried. places: tried at most.
    """

    eligible: Flags
    fooled: Flags
    robust: Flags
    logits: NDArray[np.float32]
    positions: Positions
    places: int

    @property
    def n(self) -> int:
        """Images that count."""
        return int(self.eligible.sum())

    @property
    def successes(self) -> int:
        """Images that count and are fooled."""
        return int(self.fooled.sum())

    @property
    def asr(self) -> float:
        """Attack success rate.

        Raises:
            InputError: when no image counts, so that it has no value.
        """
        if not self.n:
            raise InputError(
                f"none of the {len(self.eligible)} judged images counts for the attack success rate: the engine "
                "classifies none of them correctly, or all are of the target's class; check the data and its labels"
            )
        return self.successes / self.n

    @property
    def robust_accuracy(self) -> float:
        return float(self.robust.mean())


def judge_at(subject: Subject, patch: Patch, positions: Positions) -> Judged:
    """Judge a patch at one place per image. positions: (N, 2)."""
    return judge_pixels(subject, patch.pixels, patch.mask, positions)


def judge_pixels(subject: Subject, pixels: Images, mask: Flags, positions: Positions) -> Judged:
    """Like `judge_at`, also for one patch per image: pixels (N, 3, h, w) or (3, h, w) uint8, mask (h, w) bool."""
    patched = apply_patch(subject.images, pixels, mask, positions)
    logits = logits_of(subject.classify, patched, subject.batch_size)
    fooled = subject.fooled(logits, np.arange(len(subject.images))) & subject.eligible
    robust = subject.correct & (logits.argmax(1) == subject.labels)
    return Judged(subject.eligible, fooled, robust, logits, positions, 1)


def random_places(subject: Subject, patch: Patch, seed: int) -> Positions:
    """One place per image, (N, 2). Equal seeds and sizes give equal places, so that patches are compared in pairs."""
    return places_of_size(subject, patch.size, seed)


def places_of_size(subject: Subject, size: tuple[int, int], seed: int) -> Positions:
    """As `random_places`, for any patch of a size."""
    return random_positions(len(subject.images), subject.shape, size, np.random.default_rng([seed, *size]))


def judge_worst(subject: Subject, patch: Patch, stride: int, tick: Tick | None = None) -> Judged:
    """Judge a patch at its worst place: an image is fooled when *any* place on the grid fools it. Exact on the grid.

    Images leave the search as soon as the outcome is settled, and those that remain fill the engine's batches.

    Args:
        stride: of the grid, in pixels; the last row and column are always on it.
        tick: called with the number of places done and their total.
    """
    grid = grid_positions(subject.shape, patch.size, stride)
    eligible = subject.eligible
    fooled, robust = np.zeros_like(eligible), subject.correct.copy()
    logits = subject.clean.copy()
    positions = np.zeros((len(eligible), 2), np.int64)
    done = 0
    while done < len(grid):
        active = np.flatnonzero((eligible & ~fooled) | (~eligible & robust))
        if not len(active):
            break
        places = grid[done : done + max(1, subject.batch_size // len(active))]
        answers = _at_places(subject, patch, active, places)
        for place, answer in zip(places, answers, strict=True):
            open_ = ~fooled[active]
            rows = active[open_]
            logits[rows], positions[rows] = answer[open_], place
            fooled[rows] = subject.fooled(answer[open_], rows) & eligible[rows]
            robust[rows] &= answer[open_].argmax(1) == subject.labels[rows]
        done += len(places)
        if tick is not None:
            tick(done, len(grid))
    if tick is not None and done < len(grid):
        tick(len(grid), len(grid))
    return Judged(eligible, fooled, robust, logits, positions, len(grid))


def judge_everywhere(subject: Subject, patch: Patch, stride: int, tick: Tick | None = None) -> tuple[Positions, Flags]:
    """Judge a patch at every place of a grid, without leaving out any.

    Returns: the places (P, 2), and whether each of the images that count is fooled there, (P, n).
    """
    grid, rows = grid_positions(subject.shape, patch.size, stride), np.flatnonzero(subject.eligible)
    fooled = np.zeros((len(grid), len(rows)), bool)
    for number, place in enumerate(grid):
        (logits,) = _at_places(subject, patch, rows, place[None])
        fooled[number] = subject.fooled(logits, rows)
        if tick is not None:
            tick(number + 1, len(grid))
    return grid, fooled


def _at_places(subject: Subject, patch: Patch, indices: NDArray[np.int64], places: Positions) -> NDArray[np.float32]:
    """Logits (P, n, classes) of the images at `indices` (n,) with the patch at each of `places` (P, 2)."""
    images = np.tile(subject.images[indices], (len(places), 1, 1, 1))
    patched = apply_patch(images, patch.pixels, patch.mask, np.repeat(places, len(indices), 0))
    logits = logits_of(subject.classify, patched, subject.batch_size)
    return logits.reshape(len(places), len(indices), -1)
