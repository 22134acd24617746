"""HTTP requests to one server that may be slow, broken, or hostile: bounded in size and time, repeated where that is safe."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from edgeguard.errors import EngineError, InputError
from edgeguard.open_inference import Bounds, read_object
from edgeguard.secrets import check_token

AGAIN = (429, 502, 503)
"""Statuses of a server, or of what stands before it, that cannot answer now."""
FIRST_DELAY, LONGEST_DELAY = 0.1, 5.0
PART = 1 << 18
ERROR_BYTES = 64 << 10
PATH = re.compile(r"(?P<prefix>(?:/[A-Za-z0-9._~%-]+)*)/v2/models/(?P<name>[^/]+)(?P<version>/versions/[^/]+)?/?")
UNSAFE = re.compile(r"[^\x21-\x7e]")


@dataclass(frozen=True)
class RemoteOptions:
    """How a server is asked.

    token: shown to it. authority: PEM file of certificates to trust instead of the system's. timeout: seconds for one request,
    from its first byte to the last of its answer. patience: seconds for which a request is repeated that fails because the
    connection is lost or the server cannot answer now. in_flight: requests on their way at the same time. rate: images a
    second at most; 0 sets no limit. pixel_max: what white is to a server that takes FP32.

    Raises:
        InputError: out of range.
    """

    token: str | None = None
    authority: Path | None = None
    timeout: float = 60.0
    patience: float = 30.0
    in_flight: int = 4
    rate: float = 0.0
    pixel_max: float = 255.0

    def __post_init__(self) -> None:
        if self.token is not None:
            check_token(self.token, "the token for the server")
        if not 0 < self.timeout <= 86400 or not 0 <= self.patience <= 86400:
            raise InputError(f"timeout and patience are seconds, at most a day, got {self.timeout:g} and {self.patience:g}")
        if not 1 <= self.in_flight <= 64:
            raise InputError(f"from 1 to 64 requests can be on their way at once, got {self.in_flight}")
        if not 0 <= self.rate < 1e9 or not 0 < self.pixel_max <= 65535:
            raise InputError(f"rate and the value of white cannot be {self.rate:g} and {self.pixel_max:g}")


@dataclass(frozen=True)
class Address:
    """Where a model is. prefix: of the path, before /v2."""

    tls: bool
    host: str
    port: int
    prefix: str
    model: str
    version: str

    @staticmethod
    def parse(url: str) -> Address:
        """Raises InputError for anything but http(s)://HOST[:PORT][/PREFIX]/v2/models/NAME[/versions/VERSION]."""
        wanted = "expected http(s)://HOST:PORT/v2/models/NAME"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as exc:
            raise InputError(f"{printable(url)} is not a URL: {exc}; {wanted}") from exc
        if parts.username is not None or parts.password is not None:
            raise InputError(f"a URL with a password ends in logs and reports; name a file that holds a token instead, {wanted}")
        found = PATH.fullmatch(parts.path)
        more = parts.query or parts.fragment or UNSAFE.search(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not found or more:
            raise InputError(f"{printable(url)} is not the URL of a model; {wanted}")
        tls = parts.scheme == "https"
        return Address(tls, parts.hostname, port or (443 if tls else 80), found["prefix"], found["name"], found["version"] or "")

    @property
    def server_path(self) -> str:
        return f"{self.prefix}/v2"

    @property
    def model_path(self) -> str:
        return f"{self.prefix}/v2/models/{self.model}{self.version}"

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.model_path}"


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


class _Again(Exception):  # noqa: N818
    """The request can be repeated. wait: seconds that the server asked for."""

    def __init__(self, sentence: str, wait: float = 0.0) -> None:
        super().__init__(sentence)
        self.wait = wait


class Client:
    """A server; threads may share it. Each takes a connection that rests, or makes one, and puts it back."""

    def __init__(self, address: Address, options: RemoteOptions) -> None:
        """Raises InputError where the file of trusted certificates cannot be read."""
        self._address, self._options = address, options
        self._resting: list[http.client.HTTPConnection] = []
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._using: set[http.client.HTTPConnection] = set()
        self._next_turn = 0.0
        self._tls: ssl.SSLContext | None = None
        if address.tls:
            try:
                self._tls = ssl.create_default_context(cafile=options.authority)
            except (OSError, ValueError) as exc:
                raise InputError(f"{options.authority} holds no certificates in PEM: {exc}") from exc

    def exchange(
        self, method: str, path: str, limit: int, body: bytes | None = None, headers: dict[str, str] | None = None, cost: int = 0
    ) -> Reply:
        """Send a request and read its answer; repeated while the server cannot be reached or says that it cannot answer now.

        limit: bytes of the answer at most. cost: images, for the limit of the rate.

        Raises:
            EngineError: no answer, or one that is no HTTP or too large; or the client was closed.
        """
        where, delay, first_failure, tries = self._address.url, FIRST_DELAY, None, 0
        while True:
            self._take_turn(cost)
            tries += 1
            begin = time.monotonic()
            try:
                return self._once(method, path, limit, body, headers or {})
            except _Again as exc:
                now = time.monotonic()
                first_failure = begin if first_failure is None else first_failure
                wait = max(delay, min(exc.wait, LONGEST_DELAY))
                if self._closing.is_set() or now + wait - first_failure > self._options.patience:
                    raise EngineError(f"{where}: {exc}; tried {tries} times in {now - first_failure:.1f} s") from exc
            if self._closing.wait(wait):
                raise EngineError(f"{where}: the engine was closed")
            delay = min(2 * delay, LONGEST_DELAY)

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
            except (OSError, http.client.HTTPException, ValueError, _Again) as exc:
                if deadline.passed or isinstance(exc, TimeoutError):  # whatever it looks like, its end was the cut
                    raise _Again(f"no whole answer came within {seconds:g} s") from exc
                if isinstance(exc, _Again):
                    raise
                raise _failure(exc, self._address.url) from exc
            if deadline.passed:  # its end was the cut
                raise _Again(f"no whole answer came within {seconds:g} s")
            if not reusable:
                connection.close()
        found = {key.lower(): value for key, value in response.getheaders()}
        reply = Reply(response.status, found, payload)
        if response.status in AGAIN:
            wait = re.fullmatch("[0-9]{1,4}", found.get("retry-after", "0"))
            raise _Again(f"the server answered {response.status}{reply.sentence()}", float(wait[0]) if wait else 0.0)
        return reply

    def _read(self, response: http.client.HTTPResponse, limit: int, whole: bool) -> bytes:
        """The body; whole: more than the limit is an error, else the rest is left where it is."""
        if whole and response.length is not None and response.length > limit:
            raise EngineError(f"{self._address.url} announced an answer of {response.length} bytes; at most {limit} are sensible")
        if whole and response.length is None and not response.chunked:
            raise _Again("the answer came without a length, as if its head had broken off")
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
                raise EngineError(f"{self._address.url}: the engine was closed")
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

    def _take_turn(self, cost: int) -> None:
        """Wait until so many images may be sent."""
        if not cost or not self._options.rate:
            return
        with self._lock:
            turn = max(self._next_turn, time.monotonic())
            self._next_turn = turn + cost / self._options.rate
        if self._closing.wait(turn - time.monotonic()):
            raise EngineError(f"{self._address.url}: the engine was closed")

    def close(self) -> None:
        """Cut every connection, also those that are waited on."""
        self._closing.set()
        with self._lock:
            for connection in self._using:
                _cut(connection)
            for connection in self._resting:
                connection.close()
            self._resting.clear()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


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
        return _Again("the server closed the connection without an answer")
    if isinstance(exc, http.client.IncompleteRead):
        rest = f", {exc.expected} bytes before its end" if exc.expected else ""
        return _Again(f"the answer broke off after {len(exc.partial)} bytes{rest}")
    if isinstance(exc, OSError):
        return _Again(f"no connection: {exc.strerror or exc or type(exc).__name__}")
    return EngineError(f"{where} does not answer in HTTP: {type(exc).__name__} {printable(exc)}".rstrip())


def printable(value: object, limit: int = 200) -> str:
    """Text from elsewhere, on one line, without control characters, and not too long."""
    text = "".join(character if character.isprintable() else "?" for character in str(value)[: limit + 1])
    return text if len(text) <= limit else f"{text[:limit]}..."
