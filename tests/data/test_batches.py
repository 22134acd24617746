from __future__ import annotations

import threading
import time
from contextlib import closing

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeguard.data import batches
from edgeguard.errors import InputError

ORDER = np.random.default_rng(0).permutation(23)
Made = tuple[int, list[int]]


def make(number: int, indices: NDArray[np.int64]) -> Made:
    return number, indices.tolist()


@pytest.mark.parametrize("ahead", [0, 1, 2, 50])
def test_all_batches_in_order(ahead: int) -> None:
    made = list(batches(ORDER, 5, make, ahead))
    assert [number for number, _ in made] == [0, 1, 2, 3, 4]
    assert [len(indices) for _, indices in made] == [5, 5, 5, 5, 3]
    assert [index for _, indices in made for index in indices] == ORDER.tolist()
    assert list(batches(ORDER[:0], 5, make, ahead)) == []


@pytest.mark.parametrize("ahead", [1, 3])
def test_batches_are_made_while_the_caller_works_and_no_more_than_asked_for(ahead: int) -> None:
    started = [threading.Event() for _ in range(12)]
    here = threading.get_ident()

    def noted(number: int, indices: NDArray[np.int64]) -> bool:
        started[number].set()
        return threading.get_ident() != here

    with closing(batches(np.arange(12), 1, noted, ahead)) as made:
        for number in range(12 - ahead):
            assert next(made)
            assert started[number + ahead].wait(60)
            assert not any(event.is_set() for event in started[number + ahead + 1 :])


def test_without_batches_ahead_there_is_no_thread() -> None:
    assert set(batches(ORDER, 4, lambda number, indices: threading.get_ident(), 0)) == {threading.get_ident()}


def test_one_thread_makes_them_all() -> None:
    assert len(set(batches(ORDER, 2, lambda number, indices: threading.get_ident(), 4))) == 1


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_comes_in_the_place_of_its_batch(ahead: int) -> None:
    def fail(number: int, indices: NDArray[np.int64]) -> Made:
        if number == 2:
            raise InputError("batch 2 is broken")
        return make(number, indices)

    made = batches(ORDER, 5, fail, ahead)
    assert [next(made)[0], next(made)[0]] == [0, 1]
    with pytest.raises(InputError, match="batch 2 is broken"):
        next(made)
    assert list(made) == []


def test_leaving_early_cancels_what_is_not_begun() -> None:
    begun: list[int] = []
    second = threading.Event()

    def slow(number: int, indices: NDArray[np.int64]) -> int:
        begun.append(number)
        if number:
            second.set()
            time.sleep(0.3)
        return number

    made = batches(ORDER, 1, slow, 6)
    assert next(made) == 0
    assert second.wait(60)
    made.close()
    assert len(begun) < 7  # all that was asked for, were nothing cancelled
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("edgeguard-batches")]


@pytest.mark.parametrize(("batch_size", "ahead"), [(0, 2), (-1, 2), (4, -1)])
def test_impossible_batches(batch_size: int, ahead: int) -> None:
    with pytest.raises(InputError, match="1 or more images and 0 or more made ahead"):
        batches(ORDER, batch_size, make, ahead)
