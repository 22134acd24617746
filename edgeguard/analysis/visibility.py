"""How well can a patch be seen, and what does that cost it? Size, opacity, and the distance to what it covers. NumPy only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.patch import Patch, Positions, apply_patch, window_index
from edgeguard.statistics import wilson
from edgeguard.verify.harness import Judged, Subject, judge_at, logits_of, random_places

Images = NDArray[np.uint8]


def rate(judged: Judged) -> dict[str, Any]:
    """ASR with its Wilson interval and n."""
    return {"asr": judged.asr, "ci95": list(wilson(judged.successes, judged.n)), "n": judged.n}


def blended(images: Images, patch: Patch, positions: Positions, opacity: float) -> Images:
    """The patch laid over each image: `round(opacity * patch + (1 - opacity) * image)`; 0 is the image, 1 a plain paste."""
    pasted = apply_patch(images, patch.pixels, patch.mask, positions).astype(np.float32)
    mixed: Images = np.rint(opacity * pasted + (1 - opacity) * images.astype(np.float32)).astype(np.uint8)
    return mixed


def delta_e(first: Images, second: Images) -> NDArray[np.float64]:
    """Colour difference of pixels (..., 3) uint8 sRGB: Euclidean in CIELAB (CIE 1976), white point D65. About 2 is just seen."""
    lab = [_lab(each) for each in (first, second)]
    difference: NDArray[np.float64] = np.sqrt(((lab[0] - lab[1]) ** 2).sum(-1))
    return difference


def _lab(pixels: Images) -> NDArray[np.float64]:
    value = pixels.astype(np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
    xyz = linear @ matrix.T / np.array([0.95047, 1.0, 1.08883])
    limit = (6 / 29) ** 3
    root = np.where(xyz > limit, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * root[..., 1] - 16, 500 * (root[..., 0] - root[..., 1]), 200 * (root[..., 1] - root[..., 2])], -1)


def distance(images: Images, changed: Images, patch: Patch, positions: Positions) -> float:
    """Mean colour difference over all covered pixels of all images."""
    index, row, column = window_index(patch.mask, positions)
    pixels = (each[index, :, row, column] for each in (images, changed))
    return float(delta_e(*pixels).mean())


def by_opacity(subject: Subject, patch: Patch, opacities: tuple[float, ...], seed: int) -> list[dict[str, Any]]:
    """ASR at each opacity, all at the same random places, with the colour difference there."""
    places, found = random_places(subject, patch, seed), []
    for opacity in opacities:
        mixed = blended(subject.images, patch, places, opacity)
        logits = logits_of(subject.classify, mixed, subject.batch_size)
        eligible = subject.eligible
        fooled = subject.fooled(logits, np.arange(len(mixed))) & eligible
        robust = subject.correct & (logits.argmax(1) == subject.labels)
        judged = Judged(eligible, fooled, robust, logits, places, 1)
        found.append({"opacity": opacity, "delta_e": distance(subject.images, mixed, patch, places), **rate(judged)})
    return found


def by_size(subject: Subject, patches: dict[int, Patch], seed: int) -> list[dict[str, Any]]:
    """ASR of a patch of each size at random places, with the share of the image that it covers."""
    area = math.prod(subject.shape)
    return [
        {"patch_size": size, "share_of_image": float(patch.mask.sum() / area),
         **rate(judge_at(subject, patch, random_places(subject, patch, seed)))}
        for size, patch in sorted(patches.items())
    ]  # fmt: skip
