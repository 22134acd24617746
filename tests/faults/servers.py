"""`edgeguard verify http://...` on servers that break: ours, killed at named points, and others that answer wrongly."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from commands import Begun, Ended
from fake_server import Fake, running
from jobs import DATA, SIDE, VERIFY, Job, Workshop, contents, leftovers

from edgeguard.targets import Engine

ASKED = (
    "--data", DATA, "--attack", "patch-rs,patch-rs-per-image", "--access", "query", "--patch-size", "4", "--placement",
    "random,worst", "--stride", "4", "--universal-queries", "300", "--queries", "8", "--per-image-limit", "6", "--limit", "40",
    "--batch-size", "20",
)  # fmt: skip
IMPATIENT = ("--timeout", "1", "--patience", "0.5")
LOST, UNUSABLE = r"tried \d+ times in [\d.]+ s", "gave an answer that cannot be used|answered"


def remote(url: str, *options: str) -> Job:
    return Job("verify a server", ("verify", url, *ASKED, *(options or IMPATIENT), "--out", "far"), ("data",), "far")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as placeholder:
        return int(placeholder.getsockname()[1])


class Served:
    """`edgeguard serve` of the workshop's artifact on one port, started as often as wanted."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop, self.port, self.calls = workshop, free_port(), 0
        self.folder = workshop.bench(VERIFY)
        self.before = contents(self.folder)
        self.url = f"http://127.0.0.1:{self.port}/v2/models/artifact"
        self.job = remote(self.url)
        with self.begun():
            folder = workshop.bench(self.job)
            ended = workshop.nursery.run(folder, *self.job.command)
            assert ended.code == 0, ended.stderr
            self.whole = contents(folder / self.job.out)

    def start(self, fault: dict[str, str] | None = None, wait: bool = True) -> Begun:
        begun = self.workshop.nursery.start(self.folder, "serve", "artifact", "--port", self.port, fault=fault, listed=True)
        deadline = time.monotonic() + 60
        while wait and not begun.output():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return begun

    def kill(self, begun: Begun, how: int = signal.SIGKILL) -> Ended:
        os.kill(begun.pid, how)
        return self.workshop.nursery.wait(begun)

    @contextmanager
    def begun(self) -> Iterator[Begun]:
        begun = self.start()
        yield begun
        ended = self.kill(begun, signal.SIGTERM)
        assert ended.code == 0, ended
        self.calls = len([one for one in ended.operations if one.startswith("ask")])

    def end_as_whole(self, folder: Path) -> None:
        """The server is there again: the same command ends as if nothing had been."""
        with self.begun():
            ended = self.workshop.nursery.run(folder, *self.job.command)
            assert ended.code == 0, ended.stderr
            assert contents(folder / self.job.out) == self.whole
        assert not leftovers(folder)
        assert contents(self.folder) == self.before
        shutil.rmtree(folder)


def killed_at_call(served: Served, call: int) -> str:
    """The server is killed before it calls its engine for the n-th time, while the attack waits for the answer."""
    begun = served.start({"at": f"ask {call}", "act": "kill"})
    folder = served.workshop.bench(served.job)
    lost = served.workshop.nursery.run(folder, *served.job.command)
    if lost.code == 0:
        served.kill(begun, signal.SIGTERM)
    assert lost.code == 3, lost
    assert served.workshop.nursery.wait(begun).code == -signal.SIGKILL
    assert re.search(LOST, lost.sentence), lost.sentence
    served.end_as_whole(folder)
    return lost.sentence


def killed_before_it_listens(served: Served) -> str:
    begun = served.start({"at": "ask 1", "act": "kill"}, wait=False)
    assert served.workshop.nursery.wait(begun).code == -signal.SIGKILL
    return _nobody_there(served)


def killed_at_rest(served: Served) -> str:
    served.kill(served.start())
    return _nobody_there(served)


def _nobody_there(served: Served) -> str:
    """What is said of a server that is gone; after that it is started again, and the same command ends as undisturbed."""
    folder = served.workshop.bench(served.job)
    lost = served.workshop.nursery.run(folder, *served.job.command)
    assert lost.code == 3
    assert "Connection refused" in lost.sentence
    served.end_as_whole(folder)
    return lost.sentence


def _body() -> bytes:
    pixels = np.zeros((8, 3, SIDE, SIDE), np.uint8)
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": list(pixels.shape), "data": pixels.ravel().tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


def _connected(served: Served, sent: float) -> socket.socket:
    """A client that has sent a part of a request."""
    body = _body()
    head = f"POST /v2/models/artifact/infer HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    client = socket.create_connection(("127.0.0.1", served.port), 30)
    client.sendall(head + body[: int(sent * len(body))])
    return client


def killed_with_half_a_request(served: Served) -> str:
    begun = served.start()
    with _connected(served, 0.5) as client:
        time.sleep(0.2)
        served.kill(begun)
        try:
            answer = client.recv(100)
        except ConnectionResetError:
            answer = b""
    assert answer == b""
    served.end_as_whole(served.workshop.bench(served.job))
    return "the connection is closed without an answer"


def killed_while_requests_wait(served: Served) -> str:
    """Eight requests have arrived and none is answered: the process does not run any more when it is killed."""
    begun = served.start()
    os.kill(begun.pid, signal.SIGSTOP)
    clients = [_connected(served, 1.0) for _ in range(8)]
    served.kill(begun)
    for client in clients:
        with client, suppress(ConnectionResetError):
            assert client.recv(100) == b""
    served.end_as_whole(served.workshop.bench(served.job))
    return "eight connections are closed without an answer"


def kills(served: Served, brief: bool) -> dict[str, Callable[[Served], str]]:
    """By name in words. brief: one of them."""
    calls = served.calls  # about: requests that wait are joined, as many as happen to
    spread = [1 + before for before in (calls // 8, calls // 4, calls // 2, 3 * calls // 4)]
    found: dict[str, Callable[[Served], str]] = {
        f"serve: before call {call} of the engine": lambda served, call=call: killed_at_call(served, call)  # type: ignore[misc]
        for call in dict.fromkeys(spread[2:3] if brief else spread)
    }
    if not brief:
        found["serve: before it listens"] = killed_before_it_listens
        found["serve: when it listens"] = killed_at_rest
        found["serve: half of a request has arrived"] = killed_with_half_a_request
        found["serve: eight requests wait"] = killed_while_requests_wait
    return found


@dataclass(frozen=True)
class Fault:
    """What a server does instead of answering. said: a pattern of the sentence."""

    said: str
    act: Callable[[Any], bool] | None = None
    answer: Callable[[Any], Any] | None = None


OK = b"HTTP/1.1 200 OK\r\n"


def _reset(handler: Any) -> bool:
    """Half a body, and the connection is torn down rather than closed."""
    handler.wfile.write(OK + b"Content-Length: 500\r\n\r\n{'outputs': ")
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    return bool(handler.drop())


def _busy(seconds: str) -> Callable[[Any], bool]:
    def act(handler: Any) -> bool:
        handler.reply({"error": "too much waits"}, 503, Retry_After=seconds)
        return True

    return act


def _status(status: int, **headers: str) -> Callable[[Any], bool]:
    def act(handler: Any) -> bool:
        handler.reply({"error": "out of order"}, status, **headers)
        return True

    return act


def _changed(engine: Engine, **changes: Any) -> Callable[[Any], Any]:
    def answer(images: Any) -> Any:
        document = right(engine)(images)
        document["outputs"][0].update(changes)
        return document

    return answer


def right(engine: Engine) -> Callable[[Any], Any]:
    def answer(images: Any) -> Any:
        logits = engine(images.astype(np.uint8))
        output = {"name": "scores", "datatype": "FP32", "shape": list(logits.shape), "data": logits.ravel().tolist()}
        return {"model_name": "m", "outputs": [output]}

    return answer


def faults(engine: Engine) -> dict[str, Fault]:
    """What is tried, by name in words."""
    nan = b'{"outputs": [{"name": "scores", "datatype": "FP32", "shape": [1, 10], "data": [' + b"NaN," * 9 + b"NaN]}]}"
    return {
        "hangs up without an answer": Fault(LOST, lambda handler: handler.drop()),
        "stalls": Fault(f"no whole answer came within 1 s; {LOST}", lambda handler: time.sleep(1.5) is not None or handler.drop()),
        "drips": Fault(f"no whole answer came within 1 s; {LOST}",
                       lambda handler: handler.raw(OK + b"Content-Length: 60\r\n\r\n" + b" " * 60, 0.05)),
        "garbage": Fault("does not answer in HTTP", lambda handler: handler.raw(b"\x00\xff" * 100 + b"\r\n\r\n")),
        "half a head": Fault(LOST, lambda handler: handler.raw(OK + b"Content-Le")),
        "half a body": Fault(f"broke off after 12 bytes, 488 bytes before its end; {LOST}",
                             lambda handler: handler.raw(OK + b"Content-Length: 500\r\n\r\n{'outputs': ")),
        "tears the connection down in the body": Fault(LOST, _reset),
        "a body without end": Fault("gave an answer of more than", lambda handler: handler.raw(
            OK + b"Transfer-Encoding: chunked\r\n\r\n" + (b"1000\r\n" + b" " * 4096 + b"\r\n") * 99)),
        "announces a gigabyte": Fault("announced an answer of 1073741824 bytes",
                                      lambda handler: handler.raw(OK + b"Content-Length: 1073741824\r\n\r\n ")),
        "a page instead of JSON": Fault(UNUSABLE, None, lambda images: b"<html>it works</html>"),
        "too few rows": Fault(UNUSABLE, None, _few(engine)),
        "another shape": Fault(UNUSABLE, None, _changed(engine, shape=[2**40, 10])),
        "another datatype": Fault(UNUSABLE, None, _changed(engine, datatype="INT64")),
        "another output": Fault("expected scores alone", None, _changed(engine, name="other")),
        "not a number": Fault(UNUSABLE, None, lambda images: nan),
        "a redirect": Fault("answered 302", _status(302, Location="http://127.0.0.1:1/")),
        "500": Fault("answered 500: out of order", _status(500)),
        "503, come back in an hour": Fault(f"503: too much waits; {LOST}", _busy("3600")),
        "401": Fault("answered 401: out of order", _status(401)),
    }  # fmt: skip


def _few(engine: Engine) -> Callable[[Any], Any]:
    def answer(images: Any) -> Any:
        return right(engine)(images[:-1]) if len(images) > 1 else {"outputs": []}

    return answer


PASSING = (
    "hangs up without an answer", "stalls", "half a body", "tears the connection down in the body", "503, come back in a moment",
)  # fmt: skip
"""What happens twice and is over then: it is not even noticed."""


class Broken:
    """A server that is not ours, with the workshop's artifact as its engine; right until `fault` is set."""

    def __init__(self, workshop: Workshop, fake: Fake, engine: Engine) -> None:
        self.workshop, self.fake, self.engine = workshop, fake, engine
        self.fault: Fault | None = None
        self.first, self.last = 0, 0
        self.job = remote(fake.url)
        fake.before, fake.answer = self._before, self._answer
        folder = workshop.bench(self.job)
        ended = workshop.nursery.run(folder, *self.job.command)
        assert ended.code == 0, ended.stderr
        self.whole, self.requests = contents(folder / self.job.out), fake.requests
        self.report = json.loads((folder / self.job.out / "report.json").read_text())

    def _before(self, handler: Any, number: int) -> bool:
        return bool(self._wrong(number) and self.fault and self.fault.act and self.fault.act(handler))

    def _answer(self, images: Any) -> Any:
        if self._wrong(self.fake.requests - 1) and self.fault and self.fault.answer:
            return self.fault.answer(images)
        return right(self.engine)(images)

    def _wrong(self, number: int) -> bool:
        return self.fault is not None and self.first <= number < self.last

    def lost(self, fault: Fault) -> str:
        """It breaks in the middle of an attack and for good; then it is mended and the same command is typed again."""
        self.fault, self.first, self.last = fault, self.fake.requests + self.requests // 3, 1 << 62
        folder = self.workshop.bench(self.job)
        lost = self.workshop.nursery.run(folder, *self.job.command)
        assert lost.code == 3, lost
        assert re.search(fault.said, lost.sentence), lost.sentence
        assert self.fake.url in lost.sentence
        assert "\n" not in lost.sentence
        assert not (folder / self.job.out).exists()
        self.fault, before = None, self.fake.requests
        again = self.workshop.nursery.run(folder, *self.job.command)
        assert again.code == 0, again.stderr
        assert "going on with what is finished" in again.stderr
        assert self.fake.requests - before < self.requests
        assert contents(folder / self.job.out) == self.whole
        assert not leftovers(folder)
        shutil.rmtree(folder)
        return lost.sentence

    def passing(self, name: str) -> str:
        """It breaks twice: nobody notices."""
        fault = Fault("", _busy("1")) if name.startswith("503") else faults(self.engine)[name]
        first = self.fake.requests + self.requests // 3
        self.fault, self.first, self.last = fault, first, first + 2
        folder = self.workshop.bench(self.job)
        job = remote(self.fake.url, "--timeout", "1", "--patience", "20")
        ended = self.workshop.nursery.run(folder, *job.command)
        self.fault = None
        assert ended.code == 0, ended.stderr
        found = json.loads((folder / job.out / "report.json").read_text())
        assert all(found[part] == self.report[part] for part in ("clean", "attacks", "patches", "trust"))
        shutil.rmtree(folder)
        return "not noticed"


@contextmanager
def broken(workshop: Workshop) -> Iterator[Broken]:
    from edgeguard.artifact import Artifact
    from edgeguard.targets import open_engine

    artifact = Artifact.load(workshop.bench(VERIFY) / "artifact")
    tensor = {"name": "image", "datatype": "UINT8", "shape": [-1, 3, SIDE, SIDE]}
    logits = {"name": "scores", "datatype": "FP32", "shape": [-1, artifact.manifest["num_classes"]]}
    model = {"name": "m", "platform": "other", "inputs": [tensor], "outputs": [logits]}
    with open_engine(artifact, "reference") as engine, running(Fake(model=model)) as fake:
        yield Broken(workshop, fake, engine)
