"""Fair timing: everything that is compared takes turns, so that a busy machine slows all of it alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TURN = 5
"""Timed calls of one turn; one more before them warms the caches."""


@dataclass(frozen=True, eq=False)
class Times:
    """Seconds of every timed call, (turns, `TURN`) float64: on the clock, and of this thread's CPU time."""

    wall: NDArray[np.float64]
    cpu: NDArray[np.float64]


def interleave(calls: Mapping[str, Callable[[], object]], more: Callable[[int], bool]) -> dict[str, Times]:
    """Let every call take its turn, round after round.

    more: asked with the number of finished rounds whether to go on; the first round is always run.
    """
    found: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in calls}
    rounds = 0
    while rounds == 0 or more(rounds):
        for name, call in calls.items():
            call()
            found[name].append([_timed(call) for _ in range(TURN)])
        rounds += 1
    arrays = {name: np.array(turns) for name, turns in found.items()}
    return {name: Times(array[:, :, 0], array[:, :, 1]) for name, array in arrays.items()}


def _timed(call: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.thread_time()
    call()
    cpu_after = time.thread_time()
    return time.perf_counter() - wall, cpu_after - cpu


def speedup(times: Times, reference: Times) -> dict[str, object]:
    """How many times faster than the reference, turn by turn: median and quartiles."""
    low, middle, high = np.quantile(reference.wall.mean(1) / times.wall.mean(1), (0.25, 0.5, 0.75))
    return {"median": float(middle), "quartiles": [float(low), float(high)]}
