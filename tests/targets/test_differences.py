from __future__ import annotations

import numpy as np

from edgeguard.targets.differences import logit_steps


def test_steps_are_counted_by_classes_that_double() -> None:
    scale = np.array([0.5, 0.25], np.float32)
    expected = np.zeros((5, 2), np.float32)
    steps = np.array([[0, 1], [-2, 3], [4, 5], [8, -9], [0, 0]])
    got = (steps * scale).astype(np.float32)
    assert logit_steps(got, expected, scale) == {"0": 3, "1": 1, "2": 1, "3-4": 2, "5-8": 2, "9-16": 1}
    assert sum(logit_steps(got, expected, scale).values()) == got.size
