"""What asking a server has in common, whatever carries it: where a model is, how it is asked, and when it is asked again.

A server may be slow, broken, or hostile: requests are bounded in time, and repeated where that is safe.
"""

from __future__ import annotations

import re
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

from numpy.typing import NDArray

from edgeguard.errors import EngineError, InputError
from edgeguard.open_inference import Bounds, Tensor
from edgeguard.secrets import check_token

FIRST_DELAY, LONGEST_DELAY = 0.1, 5.0
METADATA = Bounds(values=100_000, lists=100_000, body=4 << 20)
"""Of a server's own description."""
PATH = re.compile(r"(?P<prefix>(?:/[A-Za-z0-9._~%-]+)*)/v2/models/(?P<name>[^/]+)(?P<version>/versions/[^/]+)?/?")
UNSAFE = re.compile(r"[^\x21-\x7e]")
SCHEMES = {"http": 80, "https": 443, "grpc": None, "grpcs": None}
"""Of URLs, with the port where none is named."""
Value = TypeVar("Value")
Own = TypeVar("Own", bound="Client")


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
    """Where a model is. scheme: of `SCHEMES`. prefix: of the path, before /v2; empty with gRPC, which has no paths."""

    scheme: str
    host: str
    port: int
    prefix: str
    model: str
    version: str

    @staticmethod
    def parse(url: str) -> Address:
        """Raises InputError for anything but http(s)://HOST[:PORT][/PREFIX]/v2/models/NAME[/versions/VERSION], or the same
        with grpc(s), a port and no prefix.
        """
        wanted = "expected http(s)://HOST:PORT/v2/models/NAME or grpc(s)://HOST:PORT/v2/models/NAME"
        try:
            parts = urlsplit(url)
            port = parts.port or SCHEMES.get(parts.scheme)
        except ValueError as exc:
            raise InputError(f"{printable(url)} is not a URL: {exc}; {wanted}") from exc
        if parts.username is not None or parts.password is not None:
            raise InputError(f"a URL with a password ends in logs and reports; name a file that holds a token instead, {wanted}")
        found = PATH.fullmatch(parts.path)
        more = parts.query or parts.fragment or UNSAFE.search(url)
        if parts.scheme not in SCHEMES or not parts.hostname or not found or more:
            raise InputError(f"{printable(url)} is not the URL of a model; {wanted}")
        address = Address(parts.scheme, parts.hostname, port or 0, found["prefix"], found["name"], found["version"] or "")
        if not address.port:
            raise InputError(f"{printable(url)} names no port, and gRPC has none of its own; {wanted}")
        if address.grpc and address.prefix:
            raise InputError(f"{printable(url)} has a path before /v2, and gRPC knows no paths; {wanted}")
        return address

    @property
    def grpc(self) -> bool:
        return self.scheme.startswith("grpc")

    @property
    def tls(self) -> bool:
        return self.scheme.endswith("s")

    @property
    def server_path(self) -> str:
        return f"{self.prefix}/v2"

    @property
    def model_path(self) -> str:
        return f"{self.prefix}/v2/models/{self.model}{self.version}"

    @property
    def authority(self) -> str:
        """Host and port."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.model_path}"


@dataclass(frozen=True, eq=False)
class Question:
    """Images for a model. name: of its input. values: (N, 3, H, W) uint8 or float32. output: what is asked for.

    binary: as bytes instead of JSON. bounds: of the answer.
    """

    name: str
    values: NDArray[Any]
    output: str
    binary: bool
    bounds: Bounds


class Again(Exception):  # noqa: N818
    """The request can be repeated. wait: seconds that the server asked for."""

    def __init__(self, sentence: str, wait: float = 0.0) -> None:
        super().__init__(sentence)
        self.wait = wait


class Client(ABC):
    """A model on a server; threads may share it.

    A protocol implements `server`, `model`, `infer` and `close`, each request of theirs as something that `_repeat` may call
    again. They raise EngineError where there is no answer or the client was closed, and InputError for what cannot be read.
    """

    def __init__(self, address: Address, options: RemoteOptions) -> None:
        self._address, self._options = address, options
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._next_turn = 0.0

    @abstractmethod
    def server(self) -> dict[str, Any]:
        """What the server says of itself: `name`, `version`, `extensions`."""

    @abstractmethod
    def model(self) -> dict[str, Any]:
        """What it says of the model: `platform`, `inputs`, `outputs`, and more."""

    @abstractmethod
    def infer(self, question: Question) -> list[Tensor]:
        """The tensors of its answer, of which only what `read_tensors` checks is sure."""

    def close(self) -> None:
        """End what is on its way; `_repeat` then raises EngineError."""
        self._closing.set()

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _repeat(self, once: Callable[[], Value], cost: int = 0) -> Value:
        """What a request gives that is sent again while it raises `Again`, until the patience is spent.

        cost: images, for the limit of the rate.
        """
        where, delay, first_failure, tries = self._address.url, FIRST_DELAY, None, 0
        while True:
            self._take_turn(cost)
            tries += 1
            begin = time.monotonic()
            try:
                return once()
            except Again as exc:
                now = time.monotonic()
                first_failure = begin if first_failure is None else first_failure
                wait = max(delay, min(exc.wait, LONGEST_DELAY))
                if self._closing.is_set() or now + wait - first_failure > self._options.patience:
                    raise EngineError(f"{where}: {exc}; tried {tries} times in {now - first_failure:.1f} s") from exc
            if self._closing.wait(wait):
                raise self._closed()
            delay = min(2 * delay, LONGEST_DELAY)

    def _take_turn(self, cost: int) -> None:
        """Wait until so many images may be sent."""
        if not cost or not self._options.rate:
            return
        with self._lock:
            turn = max(self._next_turn, time.monotonic())
            self._next_turn = turn + cost / self._options.rate
        if self._closing.wait(turn - time.monotonic()):
            raise self._closed()

    def _closed(self) -> EngineError:
        return EngineError(f"{self._address.url}: the engine was closed")


def trusted(authority: Path | None) -> ssl.SSLContext:
    """What TLS trusts: the system's certificates, or those of a PEM file alone.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        return ssl.create_default_context(cafile=authority)
    except (OSError, ValueError) as exc:
        raise InputError(f"{authority} holds no certificates in PEM: {exc}") from exc


def printable(value: object, limit: int = 200) -> str:
    """Text from elsewhere, on one line, without control characters, and not too long."""
    text = "".join(character if character.isprintable() else "?" for character in str(value)[: limit + 1])
    return text if len(text) <= limit else f"{text[:limit]}..."
