"""Batches made ahead: while one is trained on, the next are read, in the background and in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import InputError

T = TypeVar("T")
Make = Callable[[int, NDArray[np.int64]], T]
"""Makes a batch from its number, counted from 0, and its indices."""


def batches(order: NDArray[np.int64], batch_size: int, make: Make[T], ahead: int = 2) -> Generator[T, None, None]:
    """What `make` makes of `order`, `batch_size` indices at a time, in order; the last batch may be smaller.

    `make` runs in one background thread, never twice at once, and gets all it draws from the number of the batch: so what
    comes out does not depend on `ahead` or on timing. What it raises is raised here, in the place of its batch. A loop that
    leaves early closes the generator (`contextlib.closing`), which waits for the batch that is being made and no other.

    Args:
        order: (N,) int64.
        ahead: batches made or being made while the caller works on one; each takes its memory. 0: no thread at all.

    Raises:
        InputError: a batch size below 1 or a negative `ahead`.
    """
    if batch_size < 1 or ahead < 0:
        raise InputError(f"batches need 1 or more images and 0 or more made ahead, got {batch_size} and {ahead}")
    parts = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    if not ahead:
        return (make(number, part) for number, part in enumerate(parts))
    return _ahead(parts, make, ahead)


def _ahead(parts: Iterator[NDArray[np.int64]], make: Make[T], ahead: int) -> Generator[T, None, None]:
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(1, "edgeguard-batches") as thread:
        try:
            for number, part in enumerate(parts):
                waiting.append(thread.submit(make, number, part))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
