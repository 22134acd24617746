"""The check on a certificate: no attack may break what was proven."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgeguard.certify.double import Labels
from edgeguard.certify.masks import Flags, Images
from edgeguard.errors import InputError


def contradictions(certified: Flags, predict: Callable[[Images], Labels], attacked: Images, labels: Labels) -> Flags:
    """Certified images whose attacked version the defended prediction gets wrong; there must be none.

    One means that the proof, its code or the engine is at fault: an engine that answers one image in two ways.

    Args:
        certified: (N,) bool, certified with the right label. predict: `Defended.predict`; asked about certified images only.
        attacked: (N, 3, H, W) uint8, each image with a patch of at most the certified size. labels: (N,) the right ones.

    Returns: (N,) bool.
    """
    if not len(certified) == len(attacked) == len(labels):
        raise InputError(
            f"one attacked version and label per image, got {len(certified)}, {len(attacked)}, {len(labels)}"
        )
    broken = np.zeros(len(certified), bool)
    rows = np.flatnonzero(certified)
    if len(rows):
        broken[rows] = predict(attacked[rows]) != labels[rows]
    return broken
