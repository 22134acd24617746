"""The application: routes, limits and errors. ASGI without a framework, for a dozen routes need none."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import math
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from edgeguard.errors import EdgeGuardError, InputError
from edgeguard.open_inference import HEADER, TooLarge
from edgeguard.serve.answers import Request, read_request, write_answer
from edgeguard.serve.model import VERSION, Model, server_metadata
from edgeguard.serve.openapi import document
from edgeguard.serve.options import BODIES, ServeOptions
from edgeguard.serve.telemetry import Gauges, Log, Metrics
from edgeguard.serve.worker import Overloaded, Worker
from edgeguard.targets import Logits

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Value = TypeVar("Value")

RETRY_AFTER = 1
"""Seconds after which a client that was turned away should come back."""
INLINE = 64 << 10
"""JSON of more bytes is read and written in a thread, so that the loop stays free for others."""
MOST_DIGITS = 15
"""Of a content length that is worth reading."""
JSON, BYTES = "application/json", "application/octet-stream"
PUBLIC = ("live", "ready")


class Refusal(Exception):  # noqa: N818
    """An answer that is an error: status, and a sentence for the client."""

    def __init__(self, status: int, sentence: str, **headers: str) -> None:
        super().__init__(sentence)
        self.status, self.headers = status, headers


class Gone(Exception):  # noqa: N818
    """The client has hung up."""


@dataclass(frozen=True)
class Answer:
    """What goes back. headers: besides type and length."""

    body: bytes
    status: int = 200
    kind: str = JSON
    headers: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(value: dict[str, Any], status: int = 200, **headers: str) -> Answer:
        return Answer(json.dumps(value).encode(), status, headers=headers)


@dataclass(eq=False)
class _Call:
    """A request on its way. route: its name in metrics and logs. images: that it brought. status: 0 until answered."""

    scope: Scope
    receive: Receive
    send: Send
    headers: dict[str, str]
    route: str = "unknown"
    images: int = 0
    status: int = 0


class App:
    """One model behind the protocol. Create it before the loop runs; `close` it when the loop has ended."""

    def __init__(self, model: Model, worker: Worker, options: ServeOptions, metrics: Metrics, log: Log) -> None:
        self._model, self._worker, self._options = model, worker, options
        self._metrics, self._log = metrics, log
        self._bounds = model.bounds(options)
        self._codec = ThreadPoolExecutor(1, "codec")
        self._openapi = json.dumps(document(model, options)).encode()
        self._held = 0
        self.closing = False

    def close(self) -> None:
        self._codec.shutdown(wait=False, cancel_futures=True)

    @property
    def held(self) -> int:
        """Bytes of bodies that are held now."""
        return self._held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        call, begin = _Call(scope, receive, send, headers), time.perf_counter()
        try:
            await self._reply(call, await self._answered(call))
        except Gone:
            call.status = 499  # as others log it
        finally:
            seconds = time.perf_counter() - begin
            self._metrics.request(call.route, call.status, seconds)
            more = {"images": call.images} if call.images else {}
            failed = call.status >= 500 and call.status != 503  # being busy is no failure
            self._log("request", error=failed, method=scope["method"][:20], path=scope["path"][:200],
                      status=call.status, seconds=round(seconds, 6), **more)  # fmt: skip

    async def _answered(self, call: _Call) -> Answer:
        """The answer, whatever happens."""
        try:
            return await self._routed(call)
        except Refusal as exc:
            return Answer.of({"error": str(exc)}, exc.status, **exc.headers)
        except TooLarge as exc:
            return Answer.of({"error": str(exc)}, 413)
        except Overloaded as exc:
            return Answer.of({"error": str(exc)}, 503, **{"retry-after": str(RETRY_AFTER)})
        except InputError as exc:
            return Answer.of({"error": str(exc)}, 400)
        except EdgeGuardError as exc:
            return Answer.of({"error": str(exc)}, 500)
        except (Gone, asyncio.CancelledError):
            raise
        except Exception as exc:  # a bug of ours: clients get a sentence, the log its name
            self._log("bug", error=True, route=call.route, exception=type(exc).__name__, message=str(exc)[:300])
            return Answer.of({"error": "the server failed to answer this request"}, 500)

    async def _routed(self, call: _Call) -> Answer:
        route, methods, own = _route(call.scope["path"])
        call.route = route
        if call.scope["http_version"] not in ("1.0", "1.1"):
            raise Refusal(505, "this server speaks HTTP/1.1", connection="close")
        if "transfer-encoding" in call.headers and "content-length" in call.headers:
            raise Refusal(400, "a body has a length or comes in chunks, not both: another server may see another end of it",
                          connection="close")  # fmt: skip
        if route not in PUBLIC:
            self._authorize(call)
        elif self._options.token is None:
            self._check_host(call)
        if route == "unknown":
            raise Refusal(404, "there is nothing at this path; the protocol's begin with /v2, and /openapi.json lists them")
        if own is not None and own != self._model.name:
            raise Refusal(404, f"there is no model of that name here, but {self._model.name!r}")
        if call.scope["method"] not in methods:
            raise Refusal(405, f"this path takes {' and '.join(methods)}", allow=", ".join(methods))
        if route == "infer":
            return await self._infer(call)
        return self._told(route)

    def _told(self, route: str) -> Answer:
        """What needs no engine."""
        if route == "live":
            return Answer.of({"live": True})
        if route == "ready":
            self._check_ready()
            return Answer.of({"ready": True})
        if route == "model_ready":
            self._check_ready()
            return Answer.of({"name": self._model.name, "ready": True})
        if route == "server":
            return Answer.of(server_metadata())
        if route == "model":
            return Answer.of(self._model.metadata())
        if route == "metrics":
            return Answer(self._metrics.text().encode(), kind="text/plain; version=0.0.4; charset=utf-8")
        return Answer(self._openapi)

    def _authorize(self, call: _Call) -> None:
        token = self._options.token
        if token is None:
            self._check_host(call)
            return
        scheme, _, shown = call.headers.get("authorization", "").partition(" ")
        equal = hmac.compare_digest(shown.strip().encode("latin-1"), token.encode("latin-1"))
        if scheme.lower() != "bearer" or not equal:
            raise Refusal(401, "a token is needed: Authorization: Bearer TOKEN", **{"www-authenticate": "Bearer"})

    def _check_host(self, call: _Call) -> None:
        """Without a token, no web page may reach the server under a name that it made to point at this machine."""
        host = call.headers.get("host", "")
        name = host[1:].split("]")[0] if host.startswith("[") else host.split(":")[0]
        if name.lower() in ("", "localhost", self._options.host.lower()):
            return
        try:
            ipaddress.ip_address(name)
        except ValueError:
            raise Refusal(421, "without a token this server answers to localhost and to addresses, not to other names") from None

    def _check_ready(self) -> None:
        stuck = self._worker.busy_seconds > self._options.timeout
        if self.closing or stuck or not self._worker.alive:
            why = "the engine does not answer" if stuck else "the server is shutting down"
            raise Refusal(503, why, **{"retry-after": str(RETRY_AFTER)})

    async def _infer(self, call: _Call) -> Answer:
        if call.headers.get("content-encoding", "identity").lower() != "identity":
            raise Refusal(415, "compressed bodies are not taken; send them as they are")
        if self._worker.full or self.closing:
            raise Overloaded("the server is shutting down" if self.closing else "too many requests wait for the engine; try later")
        held = [0]
        try:
            request = await self._request(call, held)
            call.images = len(request.images)
            logits = await self._logits(call, self._worker.submit(request.images))
            many = not request.binary and logits.nbytes > INLINE
            payload, length = await self._maybe_in_thread(many, lambda: write_answer(request, logits, self._model))
        finally:
            self._held -= held[0]
        if length is None:
            return Answer(payload)
        return Answer(payload, kind=BYTES, headers={HEADER.lower(): str(length)})

    async def _request(self, call: _Call, held: list[int]) -> Request:
        body, header = await self._body(call, held), call.headers.get(HEADER.lower())
        small = header is not None and header.isdecimal() and len(header) <= MOST_DIGITS and int(header) <= INLINE
        large = len(body) > INLINE and not small
        return await self._maybe_in_thread(large, lambda: read_request(body, header, self._model, self._bounds))

    async def _body(self, call: _Call, held: list[int]) -> bytes:
        """The whole body, as far as all bodies that are held now leave room for it. held: what was taken of that room."""
        announced = call.headers.get("content-length", "")
        if len(announced) > MOST_DIGITS:
            raise TooLarge(f"a body has at most {self._options.max_body} bytes here")
        if announced:
            self._take(int(announced), held)
        try:
            return await asyncio.wait_for(self._parts(call, held), self._options.timeout)
        except asyncio.TimeoutError:
            raise Refusal(408, f"the body did not arrive within {self._options.timeout:g} s", connection="close") from None

    async def _parts(self, call: _Call, held: list[int]) -> bytes:
        parts, size = [], 0
        while True:
            message = await call.receive()
            if message["type"] == "http.disconnect":
                raise Gone
            part = message.get("body", b"")
            size += len(part)
            if size > held[0]:
                self._take(size - held[0], held)
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _take(self, size: int, held: list[int]) -> None:
        most = self._options.max_body
        if held[0] + size > most:
            raise TooLarge(f"a body has at most {most} bytes here")
        if self._held + size > BODIES * most:
            raise Overloaded("the bodies of other requests fill the memory that there is for them; try again later")
        self._held += size
        held[0] += size

    async def _logits(self, call: _Call, future: Future[Logits]) -> Logits:
        """Wait for the engine, but no longer than for the client."""
        answer = asyncio.wrap_future(future)
        gone = asyncio.ensure_future(call.receive())
        either: set[asyncio.Future[Any]] = {answer, gone}
        try:
            await asyncio.wait(either, timeout=self._options.timeout, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            if gone.done():
                raise Gone
            raise Refusal(504, f"the engine did not answer within {self._options.timeout:g} s")
        finally:
            answer.cancel()
            gone.cancel()

    async def _maybe_in_thread(self, wanted: bool, work: Callable[[], Value]) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._codec, work) if wanted else work()

    async def _reply(self, call: _Call, answer: Answer) -> None:
        call.status = answer.status
        headers = {
            "content-type": answer.kind, "content-length": str(len(answer.body)), "cache-control": "no-store",
            "x-content-type-options": "nosniff", **answer.headers,
        }  # fmt: skip
        pairs = [(key.encode("latin-1"), value.encode("latin-1")) for key, value in headers.items()]
        await call.send({"type": "http.response.start", "status": answer.status, "headers": pairs})
        await call.send({"type": "http.response.body", "body": answer.body})


def _route(path: str) -> tuple[str, tuple[str, ...], str | None]:
    """Name of the route, its methods, and the model that the path names."""
    get, post = ("GET", "HEAD"), ("POST",)
    fixed = {
        "/v2": "server", "/v2/": "server", "/v2/health/live": "live", "/v2/health/ready": "ready",
        "/metrics": "metrics", "/openapi.json": "openapi",
    }  # fmt: skip
    if path in fixed:
        return fixed[path], get, None
    match path.split("/")[1:]:
        case ["v2", "models", name, *rest] if rest[:1] != ["versions"] or rest[1:2] == [VERSION]:
            tail = rest[2:] if rest[:1] == ["versions"] else rest
            if tail == []:
                return "model", get, name
            if tail == ["ready"]:
                return "model_ready", get, name
            if tail == ["infer"]:
                return "infer", post, name
    return "unknown", get, None


def gauges(worker: Worker, held: Callable[[], int], connections: Callable[[], int]) -> Gauges:
    """What `Metrics` shows of the present."""
    return {
        "edgeguard_waiting_requests": ("Requests that wait for the engine.", lambda: worker.waiting),
        "edgeguard_held_bytes": ("Bytes of bodies that are held.", held),
        "edgeguard_connections": ("Clients that are connected.", connections),
        "edgeguard_busy_seconds": ("How long the present call of the engine has taken.", lambda: math.floor(worker.busy_seconds)),
    }
