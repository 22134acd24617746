"""Server processes on loopback for tests: `edgeguard serve`, or a toy engine behind the same server."""

from __future__ import annotations

import http.client
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeguard.errors import EngineError
from edgeguard.targets.remote import RemoteEngine

STARTUP = 60.0
TOY = Path(__file__).with_name("toy_server.py")
TOY_SHAPE, TOY_CLASSES = (3, 4, 4), 5


def toy_images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *TOY_SHAPE), np.uint8)


def assert_closing_ends(engine: RemoteEngine, images: NDArray[np.uint8]) -> None:
    """Closing an engine ends a request that its server does not answer, at once, and no other is sent."""
    failed: list[Exception] = []

    def ask() -> None:
        try:
            engine(images)
        except EngineError as exc:
            failed.append(exc)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.3)
    engine.close()
    thread.join(1)
    assert not thread.is_alive()
    assert len(failed) == 1
    with pytest.raises(EngineError, match="closed"):
        engine(images)
    with pytest.raises(EngineError, match="closed"):
        list(engine.stream([images]))


def toy_logits(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the toy engine answers: any two images that differ give other logits, nearly always."""
    weights = np.random.default_rng(123).integers(-9, 10, (images[0].size, TOY_CLASSES)).astype(np.float32)
    return images.reshape(len(images), -1).astype(np.float32) @ weights / np.float32(64)


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, signed by itself, and its key; skips without openssl."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    return folder / "cert.pem", folder / "key.pem"


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The one sentence of an error."""
        document = self.document
        assert list(document) == ["error"]
        sentence = document["error"]
        assert isinstance(sentence, str)
        assert "\n" not in sentence
        assert "Traceback" not in sentence
        return sentence


@dataclass
class Served:
    """A running server. url: of its model. log: the file of its stderr."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return str(parts.hostname), int(parts.port or 0)

    @property
    def path(self) -> str:
        return urlsplit(self.url).path

    def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, timeout: float = 30
    ) -> Reply:
        connection = http.client.HTTPConnection(*self.address, timeout=timeout)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return Reply(response.status, {key.lower(): value for key, value in response.getheaders()}, response.read())
        finally:
            connection.close()

    def infer(self, body: Any, headers: Mapping[str, str] | None = None, timeout: float = 30) -> Reply:
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", f"{self.path}/infer", payload, headers, timeout)

    def ready(self) -> bool:
        return self.request("GET", "/v2/health/ready").status == 200

    def lines(self) -> list[dict[str, Any]]:
        """The log; every line of it is JSON. One that is being written is not read yet."""
        return [json.loads(line) for line in self.log.read_text().rpartition("\n")[0].splitlines()]

    def stop(self, how: int = signal.SIGTERM, seconds: float = 30) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(seconds)


@contextmanager
def started(
    command: list[str], folder: Path, env: Mapping[str, str] | None = None, startup: float = STARTUP
) -> Iterator[Served]:  # fmt: skip
    """A server that prints the URL of its model as its first line. startup: seconds until then, at most."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"stderr-{time.monotonic_ns()}.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=stderr, text=True, env={**os.environ, **(env or {})}
        )
    assert process.stdout is not None
    lines: queue.Queue[str] = queue.Queue()
    reader = threading.Thread(target=lambda: lines.put(process.stdout.readline() if process.stdout else ""), daemon=True)
    reader.start()
    try:
        url = lines.get(timeout=startup).strip()
        assert url, f"the server did not start: {log.read_text()}"
        yield Served(process, url, log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join()
        process.stdout.close()


def serve_artifact(artifact: Path, folder: Path, *options: object) -> Any:
    """`edgeguard serve ARTIFACT` on a free port, as a context manager."""
    port = () if "--port" in options else ("--port", "0")
    return started([sys.executable, "-m", "edgeguard", "serve", str(artifact), *port, *map(str, options)], folder)


def serve_toy(folder: Path, **settings: Any) -> Any:
    """The toy engine. settings: fields of `ServeOptions`, and `delay`, `hang`, `fail`: see `toy_server.py`."""
    return started([sys.executable, str(TOY), json.dumps(settings)], folder)


def json_request(images: NDArray[np.uint8], **more: Any) -> dict[str, Any]:
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": list(images.shape), "data": images.ravel().tolist()}
    return {"inputs": [tensor], **more}


def binary_request(images: NDArray[np.uint8], **more: Any) -> tuple[bytes, dict[str, str]]:
    """Body and headers."""
    blob = images.tobytes()
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": list(images.shape), "parameters": {"binary_data_size": len(blob)}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}, **more}).encode()
    return head + blob, {"Inference-Header-Content-Length": str(len(head))}


def logits_of_reply(reply: Reply) -> NDArray[np.float32]:
    assert reply.status == 200, reply.body
    length = reply.headers.get("inference-header-content-length")
    head = json.loads(reply.body[: int(length)] if length else reply.body)
    (tensor,) = head["outputs"]
    assert tensor["name"] == "logits"
    assert tensor["datatype"] == "FP32"
    if length is None:
        return np.array(tensor["data"], np.float32).reshape(tensor["shape"])
    return np.frombuffer(reply.body[int(length) :], "<f4").reshape(tensor["shape"])
