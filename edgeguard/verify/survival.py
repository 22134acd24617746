"""Did robustness survive the way from simulation to the engine? Paired, image by image.

The twin simulates what was trained; the engine is what ships. Both judge the same patch at the same places on the same
images, and only images that count for both are compared. delta = ASR on the engine - ASR on the twin. The verdict:

* **survived**: the upper end of the 95 % interval of delta is at most `MARGIN` (2 percentage points), so the engine is
  at most that much easier to attack than its simulation; or every logit of the two was bit-identical, with and without
  the patch, so that nothing could have been lost.
* **did not survive**: the interval lies above zero and reaches beyond the margin: the engine is easier to attack.
* **undecided**: anything else; more images decide.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeguard.errors import InputError
from edgeguard.statistics import mcnemar, paired_difference
from edgeguard.verify.harness import Judged

MARGIN = 0.02
SURVIVED, LOST, UNDECIDED = "survived", "did not survive", "undecided"


def survival(engine: Judged, twin: Judged, bit_identical: bool) -> dict[str, Any]:
    """Compare one patch on engine and twin.

    Returns: `delta_asr`, `ci95`, `mcnemar_p`, `verdict`, `margin`, `n`, `bit_identical` and `flips`, the four counts of
    images fooled on `both`, on the `engine_only`, on the `twin_only`, or on `neither`.

    Raises:
        InputError: when no image counts for both.
    """
    shared = engine.eligible & twin.eligible
    if not shared.any():
        raise InputError("no judged image counts for both engine and twin, so survival cannot be measured")
    left, right = engine.fooled[shared], twin.fooled[shared]
    both, neither = int(np.sum(left & right)), int(np.sum(~left & ~right))
    engine_only, twin_only = int(np.sum(left & ~right)), int(np.sum(~left & right))
    low, high = paired_difference(both, engine_only, twin_only, neither)
    return {
        "delta_asr": (engine_only - twin_only) / int(shared.sum()),
        "ci95": [low, high],
        "mcnemar_p": mcnemar(engine_only, twin_only),
        "verdict": SURVIVED if bit_identical else verdict(low, high),
        "margin": MARGIN,
        "n": int(shared.sum()),
        "bit_identical": bit_identical,
        "flips": {"both": both, "engine_only": engine_only, "twin_only": twin_only, "neither": neither},
    }


def verdict(low: float, high: float, margin: float = MARGIN) -> str:
    """The verdict that an interval of delta leads to; see the top of this file."""
    if high <= margin:
        return SURVIVED
    return LOST if low > 0 else UNDECIDED
