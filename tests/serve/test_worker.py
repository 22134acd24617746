"""The thread that has the engine, without a server around it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from serving import TOY_CLASSES, TOY_SHAPE, toy_images, toy_logits

from edgeguard.errors import EngineError
from edgeguard.serve.worker import Overloaded, Worker
from edgeguard.targets import BaseEngine


class Gated(BaseEngine):
    """Counts calls, and waits in each of them until the gate is open."""

    name = "gated"

    def __init__(self) -> None:
        super().__init__(TOY_SHAPE, TOY_CLASSES)
        self.gate, self.calls, self.running = threading.Event(), [], 0

    def _logits(self, images: Any) -> Any:
        self.running += 1
        assert self.running == 1, "two calls at a time"
        assert self.gate.wait(10)
        self.calls.append(len(images))
        self.running -= 1
        return toy_logits(images)


def until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def started(engine: Gated, **options: Any) -> tuple[Worker, Any]:
    """A worker whose first call, of one image, is at the gate."""
    worker = Worker(engine, **{"max_batch": 8, "max_waiting": 10, **options})
    first = worker.submit(toy_images(1))
    until(lambda: engine.running == 1)
    return worker, first


@pytest.mark.parametrize(("join", "calls"), [(True, [1, 8, 6, 5]), (False, [1, 3, 3, 2, 6, 5])])
def test_what_waits_is_joined_in_order_up_to_the_batch(join: bool, calls: list[int]) -> None:
    engine, seen = Gated(), []
    worker, first = started(engine, join=join, observe=lambda requests, images, seconds: seen.append((requests, images)))
    batches = [toy_images(count, seed=count) for count in (3, 3, 2, 6, 5)]
    answers = [worker.submit(batch) for batch in batches]
    engine.gate.set()
    for batch, answer in zip(batches, answers, strict=True):
        np.testing.assert_array_equal(answer.result(10), toy_logits(batch))
    assert engine.calls == calls
    until(lambda: len(seen) == len(calls))
    assert [images for _, images in seen] == calls
    assert sum(requests for requests, _ in seen) == 6
    assert first.done()
    assert worker.close(10)


def test_a_full_queue_is_refused_and_a_cancelled_request_costs_nothing() -> None:
    engine = Gated()
    worker, _ = started(engine, max_waiting=2, join=False)
    waiting = [worker.submit(toy_images(1)) for _ in range(2)]
    assert worker.full
    with pytest.raises(Overloaded, match="2 requests wait"):
        worker.submit(toy_images(1))
    assert waiting[0].cancel()
    engine.gate.set()
    waiting[1].result(10)
    assert engine.calls == [1, 1]
    assert worker.close(10)


def test_closing_answers_what_waits_and_takes_no_more() -> None:
    engine = Gated()
    worker, first = started(engine)
    second = worker.submit(toy_images(2))
    assert not worker.close(0.05)
    with pytest.raises(Overloaded, match="shutting down"):
        worker.submit(toy_images(1))
    assert not worker.alive
    engine.gate.set()
    assert worker.close(10)
    assert first.done()
    np.testing.assert_array_equal(second.result(0), toy_logits(toy_images(2)))


def test_busy_seconds_tell_of_a_call_that_does_not_end() -> None:
    engine = Gated()
    worker, first = started(engine)
    time.sleep(0.05)
    assert worker.busy_seconds >= 0.05
    engine.gate.set()
    first.result(10)
    until(lambda: worker.busy_seconds == 0)
    worker.close(10)


def test_many_threads_and_no_answer_is_crossed() -> None:
    engine = Gated()
    engine.gate.set()
    worker = Worker(engine, max_batch=16, max_waiting=1000)

    def ask(number: int) -> bool:
        images = toy_images(1 + number % 5, seed=number)
        return np.array_equal(worker.submit(images).result(30), toy_logits(images))

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(500)))
    assert len(engine.calls) <= 500
    assert worker.close(10)


def test_errors_reach_everybody_who_was_joined_and_nobody_else() -> None:
    class Failing(Gated):
        def _logits(self, images: Any) -> Any:
            logits = super()._logits(images)
            if (images == 255).all((1, 2, 3)).any():
                raise EngineError("the device went away")
            return logits

    engine = Failing()
    worker, first = started(engine, max_batch=2)
    white = np.full((1, *TOY_SHAPE), 255, np.uint8)
    bad, beside, good = worker.submit(white), worker.submit(toy_images(1)), worker.submit(toy_images(2))
    engine.gate.set()
    first.result(10)
    for answer in (bad, beside):
        with pytest.raises(EngineError, match="went away"):
            answer.result(10)
    np.testing.assert_array_equal(good.result(10), toy_logits(toy_images(2)))
    assert worker.close(10)
