"""How good a patch on an image is, from an engine's logits or from its labels alone. NumPy only.

From labels: an image is mixed with an *anchor*, another of the given images that is of the target's class (without a
target, of another class than the image). Rung j of `RUNGS` is the mix of j parts anchor and RUNGS - j parts image, with
the patch pasted on top unmixed. The score of a patch is minus the lowest rung at which it fools the engine; rung 0 is
the image itself, rung RUNGS is never asked and counts as fooled. The fewer parts of the anchor a patch needs, the nearer
it has brought the image to the decision boundary. A start finds its rung by bisection. Afterwards a change is asked at
the rung below, and then at the rung itself where that fails, or at three quarters of it where it succeeds.
The definition is ours; walking between an image and one of another class is that of decision-based attacks (Brendel et
al. 2018, arXiv:1712.04248).

Scores are infinite for images that are fooled.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeguard.attacks.api import Images
from edgeguard.attacks.oracle import Oracle
from edgeguard.attacks.square_updates import Pixels
from edgeguard.patch import Positions, apply_patch

Rows = NDArray[np.int64]
Scores = NDArray[np.float64]

DEPTH = 6
RUNGS = 2**DEPTH
ANCHOR = 3
"""What random numbers are drawn for; 0 to 2 are of `patch_rs`."""


class Margin:
    """Score from logits: the margin.

    first_cost, cost: queries of an image's first score and, at most, of each further one.
    """

    first_cost = 1
    cost = 1

    def __init__(self, oracle: Oracle, images: Images, size: int, batch_size: int, seed: int) -> None:
        self._oracle, self._images, self._batch = oracle, images, batch_size
        self._mask = np.ones((size, size), bool)

    def first(self, rows: Rows, pixels: Pixels, places: Positions) -> Scores:
        """Scores (n,) of patches (n, 3, s, s) at places (n, 2) on the images with the indices `rows` (n,)."""
        score = np.empty(len(rows))
        for start in range(0, len(rows), self._batch):
            part = slice(start, start + self._batch)
            shown = apply_patch(self._images[rows[part]], pixels[part], self._mask, places[part])
            logits = self._oracle(shown)
            goal = self._oracle.goal
            score[part] = np.where(goal.fooled(logits, rows[part]), np.inf, goal.margin(logits, rows[part]))
        return score

    def again(self, rows: Rows, pixels: Pixels, places: Positions, score: Scores) -> Scores:
        """Scores of changed patches; score: of those before."""
        return self.first(rows, pixels, places)


class Rungs:
    """Score from labels: minus the rung. The attributes and methods are those of `Margin`."""

    first_cost = 1 + DEPTH
    cost = 2

    def __init__(self, oracle: Oracle, images: Images, size: int, batch_size: int, seed: int) -> None:
        self._oracle, self._images, self._batch = oracle, images, batch_size
        self._mask = np.ones((size, size), bool)
        rng = np.random.default_rng([seed, ANCHOR])
        self._noise = rng.integers(0, 256, images.shape[1:], dtype=np.uint8)
        self._anchors = _anchors(oracle, rng)

    def first(self, rows: Rows, pixels: Pixels, places: Positions) -> Scores:
        low, high = np.zeros(len(rows), np.int64), np.full(len(rows), RUNGS)
        fooled = self._fooled(rows, low, pixels, places)
        high[fooled] = 0
        open_ = np.flatnonzero(~fooled)
        while len(open_) and high[open_[0]] - low[open_[0]] > 1:  # all open ones halve together
            middle = (low[open_] + high[open_]) // 2
            fooled = self._fooled(rows[open_], middle, pixels[open_], places[open_])
            high[open_[fooled]], low[open_[~fooled]] = middle[fooled], middle[~fooled]
        return _score(high)

    def again(self, rows: Rows, pixels: Pixels, places: Positions, score: Scores) -> Scores:
        """Minus infinity where the rung rose."""
        rung = (-score).astype(np.int64)
        below = self._fooled(rows, rung - 1, pixels, places)
        reached = np.where(below, rung - 1, rung)
        second = np.where(below, (rung - 1) * 3 // 4, rung)
        asked = np.flatnonzero((below & (second < reached)) | (~below & (rung < RUNGS)))
        fooled = self._fooled(rows[asked], second[asked], pixels[asked], places[asked])
        reached[asked[fooled]] = second[asked[fooled]]
        worse = np.zeros(len(rows), bool)
        worse[asked[~fooled]] = ~below[asked[~fooled]]
        return np.where(worse, -np.inf, _score(reached))

    def _fooled(self, rows: Rows, rung: Rows, pixels: Pixels, places: Positions) -> NDArray[np.bool_]:
        flags = np.zeros(len(rows), bool)
        for start in range(0, len(rows), self._batch):
            part = slice(start, start + self._batch)
            shown = apply_patch(self._mixed(rows[part], rung[part]), pixels[part], self._mask, places[part])
            flags[part] = self._oracle.goal.fooled(self._oracle(shown), rows[part])
        return flags

    def _mixed(self, rows: Rows, rung: Rows) -> Images:
        share = rung.astype(np.uint16)[:, None, None, None]
        anchors = self._anchors[rows]
        other = np.where((anchors < 0)[:, None, None, None], self._noise, self._images[anchors])
        mixed: Images = ((self._images[rows] * (RUNGS - share) + other * share) // RUNGS).astype(np.uint8)
        return mixed


def _score(rung: Rows) -> Scores:
    return np.where(rung == 0, np.inf, -rung.astype(np.float64))


def _anchors(oracle: Oracle, rng: np.random.Generator) -> Rows:
    """(N,) index of each image's anchor; -1 for noise, where no given image will do."""
    labels, target = oracle.goal.labels, oracle.goal.target
    anchors = np.full(len(labels), -1, np.int64)
    for label in np.unique(labels):
        others = np.flatnonzero(labels == target if target is not None else labels != label)
        of_label = np.flatnonzero(labels == label)
        if len(others):
            anchors[of_label] = rng.choice(others, len(of_label))
    return anchors
