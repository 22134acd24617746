"""`edgeguard serve` under load, on loopback: errors, lost and crossed answers, memory, latency, overload, throughput.

    python benchmarks/serve_load.py ARTIFACT --seconds 60 --clients 64 --out results/serve_load.json

Every client has a connection of its own, sends one image after the other and holds each answer against what the same engine
says in this process: it must be the same bits. Overload is a server that lets few requests wait, asked by all clients at once.
Throughput is that of batches of 64 through loopback, several requests on their way, over that of the same engine in this
process; both take turns, with one thread each. Exit code 1 where an answer was wrong, lost, or refused under load.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from edgeguard import files
from edgeguard.artifact import Artifact
from edgeguard.errors import EdgeGuardError, EngineError, InputError
from edgeguard.open_inference import HEADER, Bounds, read_message, read_tensors, write_message
from edgeguard.targets import cpu_flags, open_engine
from edgeguard.targets.asking import RemoteOptions
from edgeguard.targets.remote import RemoteEngine, read_remote
from edgeguard.targets.timing import interleave

SCHEMA = "edgeguard.serve_load/1"
IMAGES, BATCH, BATCHES, TURNS = 512, 64, 8, 5
SETTLED = 0.2
"""Share of the time after which memory is taken as settled, and later growth counts."""
OVERLOAD_SECONDS = 5.0


class Clients:
    """What all clients found: counts of outcomes, and seconds of every right answer."""

    def __init__(self, url: str, images: NDArray[np.uint8], expected: NDArray[np.float32]) -> None:
        self.url, self.images, self.expected = urlsplit(url), images, expected
        self.outcomes: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.slowest = 0.0
        self._lock = threading.Lock()
        head, bodies = {"parameters": {"binary_data_output": True}}, []
        for index in range(len(images)):
            bodies.append(write_message(head, "inputs", {"pixels": images[index : index + 1]}, True))
        self._bodies, self._bounds = bodies, Bounds.of(expected[:1].shape, 1 << 20)

    def run(self, clients: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        threads = [threading.Thread(target=self._ask, args=(number, end)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + 120)
            if thread.is_alive():
                self.outcomes["hung"] += 1

    def _ask(self, number: int, end: float) -> None:
        rng, outcomes, times = np.random.default_rng(number), Counter[str](), []
        connection = http.client.HTTPConnection(str(self.url.hostname), self.url.port or 80, timeout=60)
        while time.monotonic() < end:
            index, begin = int(rng.integers(len(self.images))), time.perf_counter()
            try:
                outcome = self._one(connection, index)
            except (OSError, http.client.HTTPException) as exc:
                outcome = f"lost: {type(exc).__name__}"
                connection.close()
            spent = time.perf_counter() - begin
            outcomes[outcome] += 1
            if outcome == "right":
                times.append(spent)
            elif outcome == "503":
                time.sleep(0.02)  # a polite client would wait longer
            self.slowest = max(self.slowest, spent)
        connection.close()
        with self._lock:
            self.outcomes.update(outcomes)
            self.seconds += times

    def _one(self, connection: http.client.HTTPConnection, index: int) -> str:
        body, length = self._bodies[index]
        connection.request("POST", f"{self.url.path}/infer", body, {HEADER: str(length)})
        response = connection.getresponse()
        payload = response.read()
        if response.status != 200:
            return str(response.status)
        try:
            document, blob = read_message(payload, response.getheader(HEADER), self._bounds)
            (logits,) = read_tensors(document, "outputs", blob, self._bounds)
        except InputError:
            return "unreadable"
        if np.array_equal(logits.values[0], self.expected[index]):
            return "right"
        return "crossed" if (self.expected == logits.values[0]).all(1).any() else "wrong"


@contextmanager
def serving(artifact: Path, *options: object, python: str = sys.executable) -> Iterator[tuple[str, int]]:
    """URL and process number of a server. python: of the environment that it runs in."""
    command = [python, "-m", "edgeguard", "serve", str(artifact), "--port", "0", "--threads", "1", "--quiet", "--json"]
    with subprocess.Popen([*command, *map(str, options)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            text = ""
            while not text.rstrip().endswith("}"):
                line = process.stdout.readline()
                if not line:
                    raise EngineError("the server did not start")
                text += line
            document = json.loads(text)
            yield document["url"], document["pid"]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def resident(pid: int) -> int:
    """Kibibytes of memory of a process; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)


def load(artifact: Path, images: NDArray[np.uint8], expected: NDArray[np.float32], clients: int, seconds: float) -> dict[str, Any]:
    """Clients at a server that takes them all."""
    with serving(artifact) as (url, pid):
        found, memory, stop = Clients(url, images, expected), [(0.0, resident(pid))], threading.Event()
        begin = time.monotonic()

        def watch() -> None:
            while not stop.wait(0.5):
                memory.append((time.monotonic() - begin, resident(pid)))

        watcher = threading.Thread(target=watch)
        watcher.start()
        found.run(clients, seconds)
        stop.set()
        watcher.join()
        after = resident(pid)
    settled = next((kib for at, kib in memory if at >= SETTLED * seconds), after)
    times = np.array(found.seconds or [np.nan]) * 1e3
    return {
        "clients": clients, "seconds": seconds, "requests": sum(found.outcomes.values()), "outcomes": dict(found.outcomes),
        "requests_per_second": found.outcomes["right"] / seconds,
        "latency_ms": {f"p{share}": float(np.percentile(times, share)) for share in (50, 99)} | {"max": float(times.max())},
        "resident_mib": {"before": memory[0][1] / 1024, "settled": settled / 1024, "after": after / 1024,
                         "most": max(kib for _, kib in memory) / 1024, "growth_once_settled": (after - settled) / 1024},
    }  # fmt: skip


def overload(artifact: Path, images: NDArray[np.uint8], expected: NDArray[np.float32], clients: int) -> dict[str, Any]:
    """The same clients at a server that lets four requests wait, and answers one at a time."""
    with serving(artifact, "--max-waiting", 4, "--max-batch", 1) as (url, _):
        found = Clients(url, images, expected)
        found.run(clients, OVERLOAD_SECONDS)
    return {"clients": clients, "outcomes": dict(found.outcomes), "slowest_ms": found.slowest * 1e3}


def throughput(artifact: Path, images: NDArray[np.uint8]) -> dict[str, Any]:
    """Images a second in this process, through loopback with requests in flight, and with one at a time."""
    batches = [np.roll(images, number, 0)[:BATCH] for number in range(BATCHES)]
    with serving(artifact) as (url, _), open_engine(artifact, threads=1) as local:
        settings = RemoteOptions(in_flight=3)
        with RemoteEngine(read_remote(url), settings) as remote:
            calls = {
                "in process": lambda: [local(batch) for batch in batches],
                "served": lambda: list(remote.stream(batches)),
                "served, one at a time": lambda: [remote(batch) for batch in batches],
            }
            answers = {name: np.concatenate(call()) for name, call in calls.items()}
            times = interleave(calls, lambda rounds: rounds < TURNS)
    base = times["in process"].wall
    rows = []
    for name, entry in times.items():
        shares = (base / entry.wall).ravel()
        low, middle, high = np.quantile(shares, (0.25, 0.5, 0.75))
        rows.append({
            "engine": name, "images_per_second": float(BATCH * BATCHES / np.median(entry.wall)),
            "share": {"median": float(middle), "quartiles": [float(low), float(high)]},
            "bit_identical": bool(np.array_equal(answers[name], answers["in process"])),
        })  # fmt: skip
    return {"batch": BATCH, "in_flight": settings.in_flight, "turns": TURNS, "rows": rows}


def machine() -> dict[str, Any]:
    """What the figures depend on; the load shows what else it was busy with at the start."""
    return {"platform": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count(),
            "load_average": os.getloadavg()[0], "cpu_flags": cpu_flags()}  # fmt: skip


def table(document: dict[str, Any]) -> str:
    found, memory, times = document["load"], document["load"]["resident_mib"], document["load"]["latency_ms"]
    lines = [
        f"{found['clients']} clients for {found['seconds']:g} s: {found['requests']:,} requests, {found['outcomes']}, "
        f"{found['requests_per_second']:,.0f} a second",
        f"latency: p50 {times['p50']:.1f} ms, p99 {times['p99']:.1f} ms, longest {times['max']:.1f} ms",
        f"memory of the server: {memory['before']:.1f} MiB before, {memory['settled']:.1f} settled, {memory['after']:.1f} after "
        f"({memory['growth_once_settled']:+.1f} once settled), {memory['most']:.1f} at most",
        f"overload, {document['overload']['clients']} clients: {document['overload']['outcomes']}, "
        f"slowest answer {document['overload']['slowest_ms']:.0f} ms",
    ]
    for row in document["throughput"]["rows"]:
        low, high = row["share"]["quartiles"]
        lines.append(f"batch {BATCH}, {row['engine']}: {row['images_per_second']:,.0f} images/s, "
                     f"{row['share']['median']:.1%} of in process ({low:.1%} to {high:.1%})")  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not 1 <= options.clients <= 256 or not 0 < options.seconds <= 600:
        parser.error("from 1 to 256 clients, for at most 600 seconds")
    try:
        artifact = Artifact.load(options.artifact)
        images = np.random.default_rng(0).integers(0, 256, (IMAGES, *artifact.manifest["input_shape"]), np.uint8)
        with open_engine(artifact) as engine:
            expected = np.concatenate([engine(images[start : start + BATCH]) for start in range(0, IMAGES, BATCH)])
        document = {
            "schema": SCHEMA, "machine": machine(), "artifact": {"target": artifact.target, "width": artifact.width,
                                                                   "model": artifact.manifest["source"].get("model")},
            "load": load(options.artifact, images, expected, options.clients, options.seconds),
            "overload": overload(options.artifact, images, expected, options.clients),
            "throughput": throughput(options.artifact, images),
        }  # fmt: skip
        if options.out is not None:
            files.write_json(options.out, document)
    except EdgeGuardError as exc:
        print(f"serve_load: {exc}", file=sys.stderr)
        return exc.exit_code
    print(table(document))
    wrong = set(document["load"]["outcomes"]) - {"right"} | set(document["overload"]["outcomes"]) - {"right", "503"}
    return 1 if wrong or not all(row["bit_identical"] for row in document["throughput"]["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
