"""Double masking: a prediction that patches cannot change, and the proof for which images it holds.

Prediction: every mask alone is tried. Where all agree, that is the answer. Else each mask that disagrees with the
majority is tried together with every mask; when all those agree with it, it hides the patch, and its label is the answer.
Where none does, the majority is.

Proof: when every pair of masks gives the label y on an image, the prediction is y on every version of that image with a
patch. Let c be the mask that covers the patch: behind c and any second mask, an attacked image is the clean one, so the
answer is y. So c itself stands its second round, and a mask with another label fails its own, in which c takes part.

Source: Xiang et al. 2022, arXiv:2108.09135, algorithms 1 and 2, theorem 1. The order in which pairs are tried is ours;
it changes what is asked, not what comes out. The proof takes an engine whose answer to an image is always the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeguard.certify.masks import Flags, Images, MaskSet, Numbers
from edgeguard.errors import EngineError, InputError

Labels = NDArray[np.int64]
Classify = Callable[[Images], NDArray[np.float32]]
"""Images (N, 3, H, W) uint8 to logits (N, classes) float32."""
Tick = Callable[[int, int], None]
"""Images done, and their total."""


@dataclass(frozen=True, eq=False)
class Answers:
    """What the defended prediction says.

    labels: (N,) int64. certified: (N,) bool, whether no patch of the masks' size, anywhere on this image, changes its
    label; all False where no proof was asked for. predicting, proving: (N,) int64, masked images that the engine was
    shown for the label, and beyond those for the proof.
    """

    labels: Labels
    certified: Flags
    predicting: Numbers
    proving: Numbers


@dataclass(frozen=True)
class Defended:
    """A classifier behind masks. batch_size: images the engine is shown at a time, and images worked on at a time."""

    classify: Classify
    masks: MaskSet
    batch_size: int = 50

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"the batch size must be at least 1, got {self.batch_size}")

    def __call__(self, images: Images) -> tuple[Labels, Flags]:
        """Labels (N,) of the images (N, 3, H, W) uint8, and for which a proof holds that no patch changes them, (N,)."""
        answers = self.answer(images)
        return answers.labels, answers.certified

    def predict(self, images: Images) -> Labels:
        """The labels alone, (N,), which takes far fewer calls than the proof."""
        return self.answer(images, prove=False).labels

    def answer(
        self, images: Images, labels: Labels | None = None, *, prove: bool = True, tick: Tick | None = None
    ) -> Answers:
        """Predict, and prove where that is possible.

        Args:
            labels: (N,) the right ones, where they are known: a wrong prediction is then not worth a proof, and its
                `certified` is False.

        Raises:
            InputError: images of another size than the masks are for, or none. EngineError: logits that are not finite.
        """
        if images.ndim != 4 or images.shape[2:] != self.masks.image or not len(images):
            raise InputError(f"the masks are for images of {self.masks.image}, got an array of shape {images.shape}")
        parts = []
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            parts.append(self._block(images[rows], None if labels is None else labels[rows], prove))
            if tick is not None:
                tick(min(start + self.batch_size, len(images)), len(images))
        fields = zip(*((part.labels, part.certified, part.predicting, part.proving) for part in parts), strict=True)
        joined = [np.concatenate(field) for field in fields]
        return Answers(joined[0], joined[1], joined[2], joined[3])

    def _block(self, images: Images, wanted: Labels | None, prove: bool) -> Answers:
        singles, margins = self._singles(images)
        agreed = (singles == singles[:, :1]).all(1)
        labels = singles[:, 0].copy()
        predicting = np.full(len(images), len(self.masks), np.int64)
        split = np.flatnonzero(~agreed)
        if len(split):
            labels[split], asked = self._second_round(images[split], singles[split])
            predicting[split] += asked
        certified, proving = np.zeros(len(images), bool), np.zeros(len(images), np.int64)
        # A pair may be one mask twice, so where single masks disagree there is nothing to prove.
        worth = np.flatnonzero(agreed if wanted is None else agreed & (labels == wanted)) if prove else split[:0]
        if len(worth):
            certified[worth], proving[worth] = self._prove(images[worth], labels[worth], margins[worth])
        return Answers(labels, certified, predicting, proving)

    def _singles(self, images: Images) -> tuple[Labels, NDArray[np.float32]]:
        """Labels and margins of the largest logit over the next, (N, masks) each, of every image behind every mask."""
        count = len(self.masks)
        number = np.tile(np.arange(count), len(images))
        source = np.repeat(np.arange(len(images)), count)
        logits = self._logits(images, source, number, None)
        top = np.sort(logits, 1)[:, -2:]
        return logits.argmax(1).reshape(-1, count), (top[:, -1] - top[:, 0]).reshape(-1, count)

    def _second_round(self, images: Images, singles: Labels) -> tuple[Labels, Numbers]:
        """Labels of images on which single masks disagree, and what was asked for each; singles: (N, masks)."""
        majority = np.array([np.bincount(row).argmax() for row in singles], np.int64)
        dissent = singles != majority[:, None]
        answer, open_ = majority.copy(), np.ones(len(images), bool)
        asked = np.zeros(len(images), np.int64)
        for rank in range(int(dissent.sum(1).max())):
            rows = np.flatnonzero(open_ & (dissent.sum(1) > rank))
            if not len(rows):
                break
            mask = np.array([np.flatnonzero(dissent[row])[rank] for row in rows], np.int64)
            label = singles[rows, mask]
            # Masks that gave another label alone are the likeliest to give one now, so they come first.
            others = np.argsort(singles[rows] == label[:, None], axis=1, kind="stable")
            stands, calls = self._all_agree(images[rows], label, np.repeat(mask[:, None], len(self.masks), 1), others)
            asked[rows] += calls
            answer[rows[stands]] = label[stands]
            open_[rows[stands]] = False
        return answer, asked

    def _prove(self, images: Images, labels: Labels, margins: NDArray[np.float32]) -> tuple[Flags, Numbers]:
        """Whether every pair of different masks gives the label, least certain pairs first."""
        one, other = np.triu_indices(len(self.masks), 1)
        order = np.argsort(margins[:, one] + margins[:, other], axis=1, kind="stable")
        return self._all_agree(images, labels, one[order], other[order])

    def _all_agree(self, images: Images, wanted: Labels, first: Numbers, second: Numbers) -> tuple[Flags, Numbers]:
        """Whether all pairs (N, P) of masks give the wanted label (N,), and how many were tried; stops at the first no."""
        active, asked, done = np.arange(len(images)), np.zeros(len(images), np.int64), 0
        while len(active) and done < first.shape[1]:
            block = slice(done, done + max(1, self.batch_size // len(active)))
            one, other = first[active, block], second[active, block]
            source = np.repeat(active, one.shape[1])
            labels = self._logits(images, source, one.ravel(), other.ravel()).argmax(1).reshape(one.shape)
            asked[active] += one.shape[1]
            done += one.shape[1]
            active = active[(labels == wanted[active, None]).all(1)]
        agree = np.zeros(len(images), bool)
        agree[active] = True
        return agree, asked

    def _logits(self, images: Images, source: Numbers, first: Numbers, second: Numbers | None) -> NDArray[np.float32]:
        """Logits of images[source] behind masks, in batches of at most the batch size."""
        parts = []
        for start in range(0, len(source), self.batch_size):
            rows = slice(start, start + self.batch_size)
            masked = self.masks.apply(images[source[rows]], first[rows], None if second is None else second[rows])
            logits = np.asarray(self.classify(masked))
            if logits.ndim != 2 or len(logits) != len(masked) or logits.shape[1] < 2 or not np.isfinite(logits).all():
                raise EngineError(f"the engine must give finite logits ({len(masked)}, classes), got {logits.shape}")
            parts.append(logits)
        return np.concatenate(parts)
