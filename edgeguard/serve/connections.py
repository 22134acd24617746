"""What uvicorn is told and what it lacks: a deadline for every connection, a sentence for every error, quiet signals."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgeguard.errors import InputError
from edgeguard.serve.app import RETRY_AFTER, App, gauges
from edgeguard.serve.model import Model
from edgeguard.serve.options import ServeOptions
from edgeguard.serve.telemetry import Forwarded, Log, Metrics
from edgeguard.serve.worker import Worker
from edgeguard.targets import Engine
from edgeguard.targets.random_precision import NAME as POOL

HEAD_BYTES = 16 << 10
"""Of the head of a request: its line and all headers."""
BACKLOG = 512
GRACE = 5.0
"""Seconds that a connection may outlast the timeouts of its request, and that an engine has to end a call at shutdown."""


def listen(options: ServeOptions) -> tuple[socket.socket, str]:
    """A listening socket, and the URL of the server's root.

    Raises:
        InputError: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        found = socket.create_server((options.host, options.port), family=family, backlog=BACKLOG)
    except OSError as exc:
        raise InputError(f"cannot listen on {options.host} port {options.port}: {exc.strerror or exc}") from exc
    host = f"[{options.host}]" if ":" in options.host else options.host
    return found, f"{'http' if options.certificate is None else 'https'}://{host}:{found.getsockname()[1]}"


def run(engine: Engine, model: Model, options: ServeOptions, listening: socket.socket | None = None) -> bool:
    """Serve until SIGTERM or SIGINT, then answer what has arrived and end. Closes neither engine nor standard streams.

    Returns: whether the engine ended its last call; else nobody may wait for it.

    Raises:
        InputError: certificate, key or address are wrong.
    """
    encrypted = options.tls() is not None
    if listening is None:
        listening, _ = listen(options)
    log = Log(sys.stderr, options.quiet)
    server: _Server | None = None
    metrics = Metrics()
    worker = Worker(engine, options.max_batch, options.max_waiting, join=engine.name != POOL, observe=metrics.call)
    app = App(model, worker, options, metrics, log)
    metrics.show(gauges(worker, lambda: app.held, lambda: 0 if server is None else len(server.server_state.connections)))
    config = uvicorn.Config(
        app, http=_protocol(options), loop="asyncio", ws="none", lifespan="off", interface="asgi3", log_config=None,
        access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=max(1, round(options.idle)),
        timeout_graceful_shutdown=max(1, round(options.timeout + GRACE)), h11_max_incomplete_event_size=HEAD_BYTES,
        ssl_certfile=options.certificate, ssl_keyfile=options.key,
    )  # fmt: skip
    logger = logging.getLogger("uvicorn.error")
    handler = Forwarded(log)
    logger.addHandler(handler)
    logger.propagate = False
    server = _Server(config, app, log)
    with _signals(server):
        try:
            log("listening", address=list(listening.getsockname()[:2]), tls=encrypted, token=options.token is not None,
                model=model.name, engine=engine.name)  # fmt: skip
            asyncio.run(server.serve(sockets=[listening]))
        finally:
            ended = worker.close(GRACE)
            app.close()
            logger.removeHandler(handler)
            log("stopped", engine_ended=ended)
            log.close()
            listening.close()
    return ended


class _Server(uvicorn.Server):
    """A server for which being told to stop is no failure."""

    def __init__(self, config: uvicorn.Config, app: App, log: Log) -> None:
        super().__init__(config)
        self._app, self._log = app, log

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()  # `_signals` does, for longer

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._app.closing = True  # and nothing that takes a lock: the main thread may be holding it
        if self.should_exit:  # told twice: at once
            self.force_exit = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.closing = True
        self._log("stopping", connections=len(self.server_state.connections))
        await super().shutdown(sockets)


@contextmanager
def _signals(server: _Server) -> Iterator[None]:
    """Let the server be told to stop, and nothing interrupt its end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.signal(one, server.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _protocol(options: ServeOptions) -> type[asyncio.Protocol]:
    """uvicorn's protocol for a server of these options."""
    return type("Connection", (_Connection,), {"options": options})


class _Connection(H11Protocol):
    """A connection that cannot be held open by saying nothing, or little at a time.

    One timer runs: while the head of a request is awaited `idle` seconds, and from there to the end of the answer as long as
    the body and the answer may take. When it fires, the connection is cut.
    """

    options: ServeOptions
    _timer: asyncio.TimerHandle | None = None
    _awaiting: bool | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio does not, for sockets of `socket.create_server`: without it the body of an answer, written after its head, waits
        # for the client to acknowledge the head, which Linux delays by 40 ms
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self.connections) > self.options.max_connections:
            self._turn_away(503, "too many clients are connected; try again later", f"retry-after: {RETRY_AFTER}\r\n")
            return
        self._watch()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._awaiting = None  # the next request, which may have arrived already, has a time of its own
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP; the request, if there is one, was not understood up to its end."""
        if self.cycle is not None and not self.cycle.response_complete and self.cycle.response_started:
            self.transport.abort()
        else:
            self._turn_away(400, "this is not an HTTP/1.1 request")

    def _turn_away(self, status: int, sentence: str, headers: str = "") -> None:
        body = json.dumps({"error": sentence})
        reason = {400: "Bad Request", 503: "Service Unavailable"}[status]
        self.transport.write(
            f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"connection: close\r\n{headers}\r\n{body}".encode()
        )
        self.transport.close()

    def _watch(self) -> None:
        awaiting = self.cycle is None or self.cycle.response_complete
        if awaiting is self._awaiting or self.transport.is_closing():
            return
        if self._timer is not None:
            self._timer.cancel()
        self._awaiting = awaiting
        seconds = self.options.idle if awaiting else 2 * self.options.timeout + GRACE
        self._timer = self.loop.call_later(seconds, self._cut)

    def _cut(self) -> None:
        self.transport.abort()
