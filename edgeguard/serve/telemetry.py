"""What a server tells while it runs: JSON lines on stderr, and figures for Prometheus."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, TextIO

LINES = 10_000
"""Lines that wait to be written at most; a reader that is slower loses some, and never stops the server."""
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
Gauges = dict[str, tuple[str, Callable[[], float]]]
"""By name, what a figure means and how it is read."""


class Log:
    """One JSON object a line, written by a thread of its own."""

    def __init__(self, stream: TextIO, quiet: bool = False) -> None:
        """quiet: only what is marked as an error."""
        self._stream, self._quiet = stream, quiet
        self._lines: queue.Queue[str | None] = queue.Queue(LINES)
        self._lost = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def __call__(self, event: str, *, error: bool = False, **fields: Any) -> None:
        if self._quiet and not error:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        lost = {"lines_lost": self._lost} if self._lost else {}
        line = json.dumps({"time": now, "level": "error" if error else "info", "event": event, **fields, **lost})
        try:
            self._lines.put_nowait(line)
            self._lost = 0
        except queue.Full:
            self._lost += 1

    def close(self, seconds: float = 2.0) -> None:
        """Write what waits, for at most so long."""
        try:
            self._lines.put(None, timeout=seconds)
        except queue.Full:
            return
        self._thread.join(seconds)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._stream.write(line + "\n")
                if self._lines.empty():
                    self._stream.flush()
            except (OSError, ValueError):  # nobody reads any more, or the stream was closed
                continue
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return


class Forwarded(logging.Handler):
    """What the HTTP library logs, as lines of ours."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        kind = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
        self._log("http", error=record.levelno >= logging.ERROR, message=record.getMessage()[:300],
                  **({"exception": kind} if kind else {}))  # fmt: skip


class Histogram:
    """Counts by upper bound, as Prometheus wants them."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> list[str]:
        found, total = [], 0
        for bound, count in zip((*map(repr, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            found.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*found, f"{name}_sum {self.sum!r}", f"{name}_count {total}"]


class Metrics:
    """Figures since the start. Requests are counted by route, which is one of few, and never by path."""

    def __init__(self) -> None:
        self._gauges: Gauges = {}
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds, self._engine, self._batch = Histogram(SECONDS), Histogram(SECONDS), Histogram(IMAGES)
        self._joined = 0
        self._started = time.time()

    def show(self, gauges: Gauges) -> None:
        """Add figures of the present."""
        self._gauges = {**self._gauges, **gauges}

    def request(self, route: str, status: int, seconds: float) -> None:
        with self._lock:
            self._requests[route, status] += 1
            if route == "infer":
                self._seconds.observe(seconds)

    def call(self, requests: int, images: int, seconds: float) -> None:
        """One call of the engine."""
        with self._lock:
            self._engine.observe(seconds)
            self._batch.observe(images)
            self._joined += requests - 1

    def text(self) -> str:
        """The exposition format, version 0.0.4."""
        with self._lock:
            blocks = [
                ("edgeguard_requests_total", "counter", "Requests by route and status.",
                 [f'edgeguard_requests_total{{route="{route}",status="{status}"}} {count}'
                  for (route, status), count in sorted(self._requests.items())]),
                ("edgeguard_infer_seconds", "histogram", "From the head of a request to its answer.",
                 self._seconds.lines("edgeguard_infer_seconds")),
                ("edgeguard_engine_seconds", "histogram", "Calls of the engine.", self._engine.lines("edgeguard_engine_seconds")),
                ("edgeguard_batch_images", "histogram", "Images of each call of the engine.",
                 self._batch.lines("edgeguard_batch_images")),
                ("edgeguard_joined_requests_total", "counter", "Requests that shared a call with an earlier one.",
                 [f"edgeguard_joined_requests_total {self._joined}"]),
                ("edgeguard_start_time_seconds", "gauge", "When the server started, Unix time.",
                 [f"edgeguard_start_time_seconds {self._started:.3f}"]),
            ]  # fmt: skip
        blocks += [(name, "gauge", meaning, [f"{name} {read()!r}"]) for name, (meaning, read) in self._gauges.items()]
        return "".join(
            f"# HELP {name} {meaning}\n# TYPE {name} {kind}\n" + "".join(f"{line}\n" for line in lines)
            for name, kind, meaning, lines in blocks
        )
