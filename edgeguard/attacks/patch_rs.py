"""Patch-RS: random search for patches through a live engine's answers, without any gradient. NumPy only.

A patch has pixels of 0 and 255 in each channel. Every iteration proposes one change (a square of another colour, a
single channel of one pixel once the squares are that small, or another place), shows it to the engine and keeps it
when the score does not fall. Half of the moves of a place carry the patch's pixels against it, so that the image stays
the same where the old and the new place overlap.
Source: Croce et al. 2022, "Sparse-RS", AAAI 2022, arXiv:2006.12834; the schedules are in `square_updates.py`. Ours are
that equal scores are accepted (logits of integer engines have plateaus), carrying, the score of a universal patch, and
the search per image with labels alone.

What one iteration compares:

* per image, logits: the margin of each image. A fooled image leaves the search.
* per image, labels: `rungs.py`, the distance of each image to the decision boundary.
* universal, logits: the mean over a batch of tanh(margin / scale), so that winning many images counts rather than
  winning a few by far. An image's scale is the standard deviation of its logits when the batch is drawn.
* universal, labels: the number of images in the batch that are fooled.

A universal search sees a batch of crafting images at random places, and draws both anew `batches` times.
Every random draw is derived from the seed and the number of the iteration, so a resumed search ends with the bytes of
an uninterrupted one; its queries are those of the uninterrupted one too, without what was asked and lost in between.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.attacks.api import Arrays, Checkpoint, Found, Images, Labels, Progress, Victim
from edgeguard.attacks.oracle import Goal, Oracle
from edgeguard.attacks.rungs import Margin, Rungs
from edgeguard.attacks.square_updates import (
    EXPLORED,
    INITIAL,
    Pixels,
    carry_pixels,
    change_pixels,
    change_places,
    initial_pixels,
    places_turn,
    side_of_square,
)
from edgeguard.errors import InputError
from edgeguard.patch import Positions, apply_patch, check_fits, random_positions

SCOPES = ("universal", "per-image")
MODES = ("logits", "labels")

START, MOVE, BATCH = range(3)
"""What random numbers are drawn for."""


@dataclass(frozen=True)
class PatchRS:
    """How to search.

    patch_size: side length in pixels. queries: the budget, in images that the engine is shown: per image, those of each
    image; universal, those of the whole search. It is never exceeded.
    scope: "universal" or "per-image". mode: what is read of the engine's answers, "logits" or "labels".
    target: a class to reach; None is untargeted. move_location: per image, search for places too, from the given
    positions or random ones; otherwise the given positions stay.
    area: of the first squares, as a share of the patch's. initial: "stripes" or "squares".
    batch_size: images shown at once; of a universal search, those that one change is judged on.
    batches: how often a universal search draws images and places. save_every: iterations between two checkpoints.
    """

    patch_size: int
    queries: int
    scope: str = "per-image"
    mode: str = "logits"
    target: int | None = None
    move_location: bool = True
    area: float = 0.4
    initial: str = "squares"
    batch_size: int = 100
    batches: int = 10
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("patch_size", "queries", "batch_size", "batches", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, known in (("scope", SCOPES), ("mode", MODES), ("initial", INITIAL)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not 0 < self.area <= 1:
            raise InputError(f"area is a share of the patch, above 0 and at most 1, got {self.area}")
        if self.seed < 0 or (self.target is not None and self.target < 0):
            raise InputError(f"seed and target cannot be negative, got {self.seed} and {self.target}")

    @property
    def name(self) -> str:
        return "patch-rs"

    @property
    def access(self) -> str:
        return self.mode

    @property
    def per_image(self) -> bool:
        return self.scope == "per-image"

    def run(
        self, victim: Victim, images: Images, labels: Labels, *, positions: Positions | None = None,
        progress: Progress | None = None, checkpoint: Checkpoint | None = None,
    ) -> Found:  # fmt: skip
        """Search; see `Attack.run`. Images of the target's class are left alone."""
        if victim.classify is None:
            raise InputError("patch-rs asks a live engine, and this victim has none; give it one, or take another attack")
        _check(self, images, labels, positions)
        oracle = Oracle(victim.classify, Goal(labels, self.target))
        search = _PerImage(self, oracle, images, positions) if self.per_image else _Universal(self, oracle, images)
        mark = np.frombuffer(_fingerprint(self, images, labels, positions), np.uint8)
        state = None if checkpoint is None else checkpoint.load()
        first = 0
        if state is not None:
            if "mark" not in state or not np.array_equal(state["mark"], mark):
                raise InputError("the checkpoint is of another search; remove it, or take that search's settings and data")
            search.restore(state)
            first, oracle.queries = int(state["iteration"]), int(state["queries"])
        for iteration in range(first, search.iterations):
            if search.done:
                break
            search.step(iteration)
            if progress is not None:
                progress(iteration + 1, search.iterations)
            if checkpoint is not None and (iteration + 1) % self.save_every == 0:
                counts = {"iteration": np.int64(iteration + 1), "queries": np.int64(oracle.queries)}
                checkpoint.save({**search.state(), **counts, "mark": mark})
        if progress is not None and search.done:
            progress(search.iterations, search.iterations)
        places = search.places if self.per_image and self.move_location else None
        mask = np.ones((self.patch_size, self.patch_size), bool)
        return Found(search.pixels if self.per_image else search.pixels[0], mask, places, queries=oracle.queries)


class _PerImage:
    """A patch and a place for each image. pixels: (N, 3, s, s). places: (N, 2). score: (N,), infinite once fooled."""

    def __init__(self, config: PatchRS, oracle: Oracle, images: Images, positions: Positions | None) -> None:
        self._config, self._shape = config, (images.shape[2], images.shape[3])
        kind = Margin if config.mode == "logits" else Rungs
        self._scorer = kind(oracle, images, config.patch_size, config.batch_size, config.seed)
        if config.queries < self._scorer.first_cost:
            raise InputError(
                f"a search per image with {config.mode} needs at least {self._scorer.first_cost} queries for each "
                f"image, got {config.queries}"
            )
        self.iterations = 1 + (config.queries - self._scorer.first_cost) // self._scorer.cost
        rng = np.random.default_rng([config.seed, START])
        size = config.patch_size
        self.pixels = initial_pixels(config.initial, len(images), size, rng)
        self.places = (
            positions.astype(np.int64)
            if positions is not None
            else random_positions(len(images), self._shape, (size, size), rng)
        )
        self.score = np.where(oracle.goal.open, -np.inf, np.inf)

    @property
    def done(self) -> bool:
        return bool(np.isposinf(self.score).all())

    def step(self, iteration: int) -> None:
        """Iteration 0 asks for the scores of the start; every other one proposes a change of each open image."""
        rows = np.flatnonzero(~np.isposinf(self.score))
        pixels, places, score = self.pixels[rows], self.places[rows], self.score[rows]
        if iteration == 0:
            self.score[rows] = self._scorer.first(rows, pixels, places)
            return
        config, spent = self._config, iteration / self.iterations
        rng = np.random.default_rng([config.seed, MOVE, iteration])
        size = config.patch_size
        if config.move_location and places_turn(iteration, spent):
            if spent < EXPLORED:
                places = random_positions(len(rows), self._shape, (size, size), rng)
            else:
                moved = change_places(places, self._shape, size, spent, rng)
                carried = rng.random(len(rows)) < 0.5
                pixels[carried] = carry_pixels(pixels[carried], (moved - places)[carried])
                places = moved
        elif spent < EXPLORED:
            pixels = initial_pixels(config.initial, len(rows), size, rng)
        else:
            side = side_of_square(config.area, size, (spent - EXPLORED) / (1 - EXPLORED))
            pixels = change_pixels(pixels, side, rng)
        reached = self._scorer.again(rows, pixels, places, score)
        kept = reached >= score
        rows = rows[kept]
        self.pixels[rows], self.score[rows] = pixels[kept], reached[kept]
        if config.move_location:
            self.places[rows] = places[kept]

    def state(self) -> dict[str, NDArray[np.generic]]:
        return {"pixels": self.pixels, "places": self.places, "score": self.score}

    def restore(self, state: Arrays) -> None:
        self.pixels, self.places, self.score = (np.array(state[name]) for name in ("pixels", "places", "score"))


class _Universal:
    """One patch for a batch of images. pixels: (1, 3, s, s). score: of the present batch."""

    done = False

    def __init__(self, config: PatchRS, oracle: Oracle, images: Images) -> None:
        self._config, self._oracle, self._images = config, oracle, images
        self._candidates = np.flatnonzero(oracle.goal.open)
        self._batch = min(config.batch_size, config.queries)
        self.iterations = config.queries // self._batch
        self._period = -(-self.iterations // config.batches)
        self._mask = np.ones((config.patch_size, config.patch_size), bool)
        self.pixels = initial_pixels(config.initial, 1, config.patch_size, np.random.default_rng([config.seed, START]))
        self.places = np.zeros((0, 2), np.int64)
        self.score = -np.inf
        self._scale = np.ones(self._batch)
        self._number = -1

    def step(self, iteration: int) -> None:
        """Ask for the score of the patch on a new batch, or propose a change."""
        config = self._config
        number = iteration // self._period
        if iteration % self._period == 0:
            logits = self._ask(number, self.pixels)
            spread = logits.std(1, dtype=np.float64)
            self._scale = np.where(spread > 0, spread, 1.0)
            self.score = self._score_of(logits)
            return
        rng = np.random.default_rng([config.seed, MOVE, iteration])
        side = side_of_square(config.area, config.patch_size, iteration / self.iterations)
        pixels = change_pixels(self.pixels, side, rng)
        reached = self._score_of(self._ask(number, pixels))
        if reached >= self.score:
            self.pixels, self.score = pixels, reached

    def _ask(self, number: int, pixels: Pixels) -> NDArray[np.float32]:
        """Logits of batch `number` with a patch."""
        if number != self._number:
            self._draw(number)
        return self._oracle(apply_patch(self._clean, pixels[0], self._mask, self.places))

    def _score_of(self, logits: NDArray[np.float32]) -> float:
        goal = self._oracle.goal
        if self._config.mode == "labels":
            return float(goal.fooled(logits, self._rows).sum())
        return float(np.tanh(goal.margin(logits, self._rows) / self._scale).mean())

    def _draw(self, number: int) -> None:
        """Every candidate appears as often as any other, give or take once."""
        rng = np.random.default_rng([self._config.seed, BATCH, number])
        repeats = -(-self._batch // len(self._candidates))
        order = np.concatenate([rng.permutation(self._candidates) for _ in range(repeats)])
        self._number, self._rows = number, order[: self._batch]
        self._clean = self._images[self._rows]
        height, width = self._images.shape[2:]
        self.places = random_positions(self._batch, (height, width), (self._config.patch_size,) * 2, rng)

    def state(self) -> dict[str, NDArray[np.generic]]:
        return {"pixels": self.pixels, "score": np.array([self.score]), "scale": self._scale}

    def restore(self, state: Arrays) -> None:
        self.pixels, self.score = np.array(state["pixels"]), float(state["score"][0])
        self._scale = np.array(state["scale"])


def _check(config: PatchRS, images: Images, labels: Labels, positions: Positions | None) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"images must be (N, 3, H, W) uint8, got {images.shape} {images.dtype}")
    if not len(images) or labels.shape != (len(images),):
        raise InputError(f"a search needs labelled images, got {len(images)} and labels of shape {labels.shape}")
    size, shape = (config.patch_size,) * 2, (images.shape[2], images.shape[3])
    check_fits(size, shape)
    if config.target is not None and (labels == config.target).all():
        raise InputError(f"all {len(images)} images are of the target's class {config.target}; give others")
    if not config.per_image:
        return
    if positions is None:
        if not config.move_location:
            raise InputError("a search that does not move its patches needs one position for each image")
        return
    limit = np.array(shape) - size
    if positions.shape != (len(images), 2) or (positions < 0).any() or (positions > limit).any():
        raise InputError(
            f"positions must be ({len(images)}, 2), between 0 and {limit.tolist()}, got {positions.shape} with values "
            f"between {positions.min(initial=0)} and {positions.max(initial=0)}"
        )


def _fingerprint(config: PatchRS, images: Images, labels: Labels, positions: Positions | None) -> bytes:
    """What a checkpoint belongs to."""
    digest = hashlib.sha256(repr(replace(config, save_every=1)).encode())
    arrays: list[NDArray[Any]] = [images, labels] if positions is None else [images, labels, positions]
    for array in arrays:
        digest.update(repr((array.shape, array.dtype.str)).encode() + np.ascontiguousarray(array).tobytes())
    return digest.digest()
