"""One thread that has the engine to itself, and answers together what waits together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from edgeguard.errors import EdgeGuardError, EngineError
from edgeguard.targets import Engine, Images, Logits


class Overloaded(EngineError):  # noqa: N818
    """More requests wait than may."""


@dataclass(frozen=True, eq=False)
class _Job:
    images: Images
    answer: Future[Logits] = field(default_factory=Future)


class Worker:
    """The engine behind a queue; it never gets concurrent calls.

    Requests that wait are joined in their order up to `max_batch` images, and each gets its own rows of the answer. A
    request that was cancelled while it waited costs nothing.
    """

    def __init__(
        self, engine: Engine, max_batch: int, max_waiting: int, *, join: bool = True,
        observe: Callable[[int, int, float], None] | None = None,
    ) -> None:  # fmt: skip
        """join: whether several requests may be answered by one call; each call of a pool of engines is a draw of its own.

        observe: told requests, images and seconds of each call, in the worker's thread.
        """
        self._engine, self._max_batch, self._max_waiting = engine, max_batch, max_waiting
        self._join, self._observe = join, observe
        self._jobs: deque[_Job] = deque()
        self._change = threading.Condition()
        self._closing = False
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._jobs)

    @property
    def full(self) -> bool:
        return len(self._jobs) >= self._max_waiting

    @property
    def busy_seconds(self) -> float:
        """How long the present call of the engine has taken so far."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def submit(self, images: Images) -> Future[Logits]:
        """Queue images (N, 3, H, W) uint8, at most `max_batch` of them.

        Raises:
            Overloaded: the queue is full, or the worker was closed.
        """
        job = _Job(images)
        with self._change:
            if self._closing or not self._thread.is_alive():
                raise Overloaded("the server is shutting down")
            if self.full:
                raise Overloaded(f"{len(self._jobs)} requests wait for the engine already; try again later")
            self._jobs.append(job)
            self._change.notify()
        return job.answer

    def close(self, seconds: float) -> bool:
        """Let what waits be answered for at most so long. Returns: whether the worker has ended."""
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while jobs := self._take():
            self._answer([job for job in jobs if job.answer.set_running_or_notify_cancel()])

    def _take(self) -> list[_Job]:
        """The next jobs of one call; none when the worker is to end."""
        with self._change:
            while not self._jobs and not self._closing:
                self._change.wait()
            taken: list[_Job] = []
            images = 0
            while self._jobs and (not taken or (self._join and images + len(self._jobs[0].images) <= self._max_batch)):
                job = self._jobs.popleft()
                if not job.answer.cancelled():
                    images += len(job.images)
                taken.append(job)
            return taken

    def _answer(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        self._busy_since = begin = time.monotonic()
        try:
            images = jobs[0].images if len(jobs) == 1 else np.concatenate([job.images for job in jobs])
            logits = self._engine(images)
            if len(logits) != len(images):
                raise EngineError(f"the engine answered {len(logits)} of {len(images)} images")
        except Exception as exc:
            known = exc if isinstance(exc, EdgeGuardError) else EngineError(f"the engine failed: {type(exc).__name__}")
            for job in jobs:
                job.answer.set_exception(known)
            return
        finally:
            self._busy_since = None
        if self._observe is not None:
            self._observe(len(jobs), len(images), time.monotonic() - begin)
        start = 0
        for job in jobs:
            job.answer.set_result(logits[start : start + len(job.images)])
            start += len(job.images)
