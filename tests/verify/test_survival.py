from __future__ import annotations

import numpy as np
import pytest

from edgeguard.errors import InputError
from edgeguard.verify.harness import Judged
from edgeguard.verify.survival import survival, verdict


def judged(fooled: list[bool], eligible: list[bool] | None = None) -> Judged:
    flags = np.array(fooled)
    count = np.ones_like(flags) if eligible is None else np.array(eligible)
    zeros = np.zeros((len(flags), 2))
    return Judged(count, flags & count, ~flags, zeros.astype(np.float32), zeros.astype(np.int64), 1)


def pairs(both: int, engine_only: int, twin_only: int, neither: int) -> tuple[Judged, Judged]:
    engine = [True] * (both + engine_only) + [False] * (twin_only + neither)
    twin = [True] * both + [False] * engine_only + [True] * twin_only + [False] * neither
    return judged(engine), judged(twin)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ((400, 2, 3, 595), "survived"),
        ((400, 60, 5, 535), "did not survive"),
        ((40, 3, 2, 55), "undecided"),
        ((100, 0, 200, 700), "survived"),
        ((0, 0, 0, 1000), "survived"),
    ],
)
def test_verdicts(table: tuple[int, int, int, int], expected: str) -> None:
    found = survival(*pairs(*table), bit_identical=False)
    assert found["verdict"] == expected
    assert tuple(found["flips"].values()) == table
    assert found["delta_asr"] == pytest.approx((table[1] - table[2]) / sum(table))
    assert found["ci95"][0] <= found["delta_asr"] <= found["ci95"][1]
    assert found["n"] == sum(table)


def test_identical_logits_leave_nothing_to_lose() -> None:
    assert survival(*pairs(4, 0, 0, 6), bit_identical=False)["verdict"] == "undecided"
    assert survival(*pairs(4, 0, 0, 6), bit_identical=True)["verdict"] == "survived"


def test_the_edges_of_the_verdict() -> None:
    assert verdict(-0.5, 0.02) == "survived"
    assert verdict(0.001, 0.02) == "survived"
    assert verdict(0.001, 0.021) == "did not survive"
    assert verdict(0.0, 0.021) == "undecided"


def test_only_images_that_count_for_both_are_compared() -> None:
    engine = judged([True, True, False], [True, True, False])
    twin = judged([True, False, True], [True, False, True])
    found = survival(engine, twin, bit_identical=False)
    assert found["n"] == 1
    assert found["flips"]["both"] == 1
    with pytest.raises(InputError, match="counts for both"):
        survival(judged([True], [True]), judged([True], [False]), bit_identical=False)
