"""Servers that are not ours, and do what a test wants: in a thread, on loopback."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from serving import TOY_CLASSES, TOY_SHAPE, toy_logits

INPUT = {"name": "image", "datatype": "UINT8", "shape": [-1, *TOY_SHAPE]}
OUTPUT = {"name": "scores", "datatype": "FP32", "shape": [-1, TOY_CLASSES]}


@dataclass
class Fake:
    """A server of one model named `m`. It speaks JSON alone, and keeps connections.

    server, model: its metadata. answer: from the request's images to an answer, a document or bytes; None for one that is
    right. before: called with the handler and the number of the inference request; returns True when it has answered itself.
    """

    server: Any = field(default_factory=lambda: {"name": "other", "version": "7", "extensions": []})
    model: Any = field(default_factory=lambda: {"name": "m", "platform": "pytorch", "inputs": [INPUT], "outputs": [OUTPUT]})
    answer: Callable[[Any], Any] | None = None
    before: Callable[[Any, int], bool] | None = None
    requests: int = 0
    connections: int = 0
    open_now: int = 0
    most_open: int = 0
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


def right_answer(images: Any) -> dict[str, Any]:
    logits = toy_logits(images.astype(np.uint8))
    return {"model_name": "m", "outputs": [{**OUTPUT, "shape": list(logits.shape), "data": logits.ravel().tolist()}]}


def _handler(fake: Fake) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            with fake.lock:
                fake.connections += 1

        def log_message(self, format: str, *args: Any) -> None:
            return

        def do_GET(self) -> None:
            self.reply(fake.server if self.path == "/v2" else fake.model)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with fake.lock:
                number, fake.requests = fake.requests, fake.requests + 1
                fake.open_now += 1
                fake.most_open = max(fake.most_open, fake.open_now)
                fake.headers.append(dict(self.headers))
            try:
                if fake.before is not None and fake.before(self, number):
                    return
                (tensor,) = json.loads(body)["inputs"]
                images = np.array(tensor["data"]).reshape(tensor["shape"])
                self.reply((fake.answer or right_answer)(images))
            finally:
                with fake.lock:
                    fake.open_now -= 1

        def reply(self, value: Any, status: int = 200, **headers: str) -> None:
            body = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for key, text in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), text)
            self.end_headers()
            self.wfile.write(body)

        def drop(self) -> bool:
            """Hang up without an answer."""
            self.close_connection = True
            return True

        def raw(self, data: bytes, pause: float = 0.0) -> bool:
            """Write bytes, one by one with pauses where there are any, and hang up."""
            try:
                for part in [data] if not pause else (data[index : index + 1] for index in range(len(data))):
                    self.wfile.write(part)
                    self.wfile.flush()
                    time.sleep(pause)
            except OSError:
                pass
            return self.drop()

    return Handler


@contextmanager
def running(fake: Fake) -> Iterator[Fake]:
    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, request: Any, client_address: Any) -> None:
            return  # clients may hang up

    server = Server(("127.0.0.1", 0), _handler(fake))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}/v2/models/m"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
