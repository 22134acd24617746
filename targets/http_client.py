"""The Open Inference Protocol over HTTP, asked of one server that may be slow, broken, or hostile. Standard library only."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from edgeguard.errors import EngineError, InputError
from edgeguard.open_inference import HEADER, Bounds, Tensor, read_message, read_object, read_tensors, write_message
from edgeguard.targets.asking import METADATA, Address, Again, Client, Question, RemoteOptions, printable, trusted

AGAIN = (429, 502, 503)
"""Statuses of a server, or of what stands before it, that cannot answer now."""
PART = 1 << 18
ERROR_BYTES = 64 << 10


@dataclass(frozen=True)
class Reply:
    """An answer. headers: by names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def sentence(self) -> str:
        """What the server said went wrong, ready to be put behind a status."""
        try:
            error = read_object(self.body[:ERROR_BYTES], Bounds(10_000, 10_000, ERROR_BYTES)).get("error")
        except InputError:
            return ""
        return f": {printable(error)}" if isinstance(error, str) and error else ""


class HttpClient(Client):
    """Each thread takes a connection that rests, or makes one, and puts it back."""

    def __init__(self, address: Address, options: RemoteOptions) -> None:
        """Raises InputError where the file of trusted certificates cannot be read."""
        super().__init__(address, options)
        self._resting: list[http.client.HTTPConnection] = []
        self._using: set[http.client.HTTPConnection] = set()
        self._tls = trusted(options.authority) if address.tls else None

    def server(self) -> dict[str, Any]:
        return self._described(self._address.server_path)

    def model(self) -> dict[str, Any]:
        return self._described(self._address.model_path)

    def infer(self, question: Question) -> list[Tensor]:
        wanted = {"outputs": [{"name": question.output, "parameters": {"binary_data": True}}]}
        head: dict[str, Any] = wanted if question.binary else {}
        body, length = write_message(head, "inputs", {question.name: question.values}, question.binary)
        headers = {"Content-Type": "application/json"} if length is None else {
            "Content-Type": "application/octet-stream", HEADER: str(length)}  # fmt: skip
        count, bounds = len(question.values), question.bounds
        reply = self._exchange("POST", f"{self._address.model_path}/infer", bounds.body, body, headers, count)
        if reply.status != 200:
            what = f"a request of {count} images was answered {reply.status}"
            raise EngineError(f"{self._address.url}: {what}{reply.sentence()}")
        document, blob = read_message(reply.body, reply.headers.get(HEADER.lower()), bounds)
        return read_tensors(document, "outputs", blob, bounds)

    def _described(self, path: str) -> dict[str, Any]:
        reply = self._exchange("GET", path, METADATA.body)
        if reply.status != 200:
            raise EngineError(f"{self._address.url}: GET {path} was answered {reply.status}{reply.sentence()}")
        try:
            return read_object(reply.body, METADATA)
        except InputError as exc:
            raise InputError(f"GET {path}: {exc}") from exc

    def _exchange(
        self, method: str, path: str, limit: int, body: bytes | None = None, headers: dict[str, str] | None = None, cost: int = 0
    ) -> Reply:
        """Send a request and read its answer, of at most `limit` bytes; again where that is sensible."""
        return self._repeat(lambda: self._once(method, path, limit, body, headers or {}), cost)

    def _once(self, method: str, path: str, limit: int, body: bytes | None, headers: dict[str, str]) -> Reply:
        own = {"Accept": "*/*", "User-Agent": "edgeguard", **headers}
        if self._options.token is not None:
            own["Authorization"] = f"Bearer {self._options.token}"
        seconds = self._options.timeout
        with self._connection() as connection, _Deadline(connection, seconds) as deadline:
            try:
                connection.request(method, path, body, own)
                response = connection.getresponse()
                try:
                    payload = self._read(response, limit if response.status == 200 else ERROR_BYTES, response.status == 200)
                    reusable = response.isclosed() and not response.will_close
                finally:
                    response.close()
            except ssl.SSLCertVerificationError as exc:
                raise EngineError(f"{self._address.url}: the server's certificate is not trusted: {exc.verify_message}") from exc
            except (OSError, http.client.HTTPException, ValueError, Again) as exc:
                if deadline.passed or isinstance(exc, TimeoutError):  # whatever it looks like, its end was the cut
                    raise Again(f"no whole answer came within {seconds:g} s") from exc
                if isinstance(exc, Again):
                    raise
                raise _failure(exc, self._address.url) from exc
            if deadline.passed:  # its end was the cut
                raise Again(f"no whole answer came within {seconds:g} s")
            if not reusable:
                connection.close()
        found = {key.lower(): value for key, value in response.getheaders()}
        reply = Reply(response.status, found, payload)
        if response.status in AGAIN:
            wait = re.fullmatch("[0-9]{1,4}", found.get("retry-after", "0"))
            raise Again(f"the server answered {response.status}{reply.sentence()}", float(wait[0]) if wait else 0.0)
        return reply

    def _read(self, response: http.client.HTTPResponse, limit: int, whole: bool) -> bytes:
        """The body; whole: more than the limit is an error, else the rest is left where it is."""
        if whole and response.length is not None and response.length > limit:
            raise EngineError(f"{self._address.url} announced an answer of {response.length} bytes; at most {limit} are sensible")
        if whole and response.length is None and not response.chunked:
            raise Again("the answer came without a length, as if its head had broken off")
        parts, size = [], 0
        while part := response.read(min(PART, limit + 1 - size)):
            parts.append(part)
            size += len(part)
            if size > limit:
                if whole:
                    raise EngineError(f"{self._address.url} gave an answer of more than {limit} bytes, which none can have")
                break
        missing = response.length or 0
        if missing and size <= limit:
            raise http.client.IncompleteRead(b"".join(parts), missing)
        return b"".join(parts)

    @contextmanager
    def _connection(self) -> Iterator[http.client.HTTPConnection]:
        """One that nobody else uses; closed instead of put back when anything goes wrong with it."""
        with self._lock:
            if self._closing.is_set():
                raise self._closed()
            connection = self._resting.pop() if self._resting else self._new()
            self._using.add(connection)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        finally:
            with self._lock:
                self._using.discard(connection)
                if connection.sock is not None and not self._closing.is_set():
                    self._resting.append(connection)
                else:
                    connection.close()

    def _new(self) -> http.client.HTTPConnection:
        address, seconds = self._address, self._options.timeout
        if self._tls is not None:
            return http.client.HTTPSConnection(address.host, address.port, timeout=seconds, context=self._tls)
        return http.client.HTTPConnection(address.host, address.port, timeout=seconds)

    def close(self) -> None:
        """Cut every connection, also those that are waited on."""
        super().close()
        with self._lock:
            for connection in self._using:
                _cut(connection)
            for connection in self._resting:
                connection.close()
            self._resting.clear()


class _Deadline:
    """Cuts a connection after so many seconds, however little at a time arrives on it. passed: whether it did."""

    def __init__(self, connection: http.client.HTTPConnection, seconds: float) -> None:
        self._connection = connection
        self._timer = threading.Timer(seconds, self._fire)
        self._timer.daemon = True
        self.passed = False

    def _fire(self) -> None:
        self.passed = True
        _cut(self._connection)

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def _cut(connection: http.client.HTTPConnection) -> None:
    """End all reading and writing on a connection, in whichever thread."""
    if connection.sock is not None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)  # a TLS socket's own shutdown is not for other threads


def _failure(exc: Exception, where: str) -> Exception:
    """What an error on the way means: the connection is lost, or the server does not speak HTTP."""
    if isinstance(exc, http.client.RemoteDisconnected):
        return Again("the server closed the connection without an answer")
    if isinstance(exc, http.client.IncompleteRead):
        rest = f", {exc.expected} bytes before its end" if exc.expected else ""
        return Again(f"the answer broke off after {len(exc.partial)} bytes{rest}")
    if isinstance(exc, OSError):
        return Again(f"no connection: {exc.strerror or exc or type(exc).__name__}")
    return EngineError(f"{where} does not answer in HTTP: {type(exc).__name__} {printable(exc)}".rstrip())
