from __future__ import annotations

import time

import numpy as np
import pytest

from edgeguard.targets.timing import TURN, Times, interleave, speedup


def test_calls_take_turns() -> None:
    order: list[str] = []
    asked: list[int] = []

    def more(rounds: int) -> bool:
        asked.append(rounds)
        return rounds < 3

    times = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, more)
    assert "".join(order) == ("a" * (TURN + 1) + "b" * (TURN + 1)) * 3
    assert asked == [1, 2, 3]
    assert times["a"].wall.shape == times["b"].cpu.shape == (3, TURN)


def test_wall_time_and_cpu_time_differ_where_a_call_sleeps() -> None:
    times = interleave({"sleep": lambda: time.sleep(0.01)}, lambda rounds: False)["sleep"]
    assert times.wall.min() >= 0.01
    assert times.cpu.max() < 0.01


def test_a_speedup_is_of_the_same_turn() -> None:
    slow = np.array([[2.0] * TURN, [20.0] * TURN, [6.0] * TURN])
    fast = Times(np.array([[1.0] * TURN, [10.0] * TURN, [2.0] * TURN]), slow)
    gain = speedup(fast, Times(slow, slow))
    assert gain["median"] == pytest.approx(2.0)
    assert gain["quartiles"] == pytest.approx([2.0, 2.5])
