"""Overload, timeouts, secrets and the end of a server."""

from __future__ import annotations

import asyncio
import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from serving import (
    TOY,
    Served,
    binary_request,
    json_request,
    logits_of_reply,
    make_certificate,
    serve_artifact,
    serve_toy,
    toy_images,
    toy_logits,
)
from uvicorn import Config
from uvicorn.server import ServerState

from edgeguard.artifact import Artifact
from edgeguard.errors import InputError
from edgeguard.serve import ServeOptions, connections

TOKEN = "a-secret-of-the-tests-alone"


def test_overload_answers_503_and_nothing_hangs(tmp_path: Path) -> None:
    with serve_toy(tmp_path, delay=0.5, max_batch=1, max_waiting=2) as server:
        def ask(number: int) -> tuple[int, float, bool]:
            images = toy_images(1, seed=number)
            begin = time.monotonic()
            reply = server.infer(json_request(images))
            seconds = time.monotonic() - begin
            if reply.status == 503:
                assert int(reply.headers["retry-after"]) >= 1
                return 503, seconds, bool(reply.error)
            return reply.status, seconds, np.array_equal(logits_of_reply(reply), toy_logits(images))

        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(ask, range(12)))
        assert {status for status, _, _ in answers} == {200, 503}
        answered = sum(status == 200 for status, _, _ in answers)
        assert 2 <= answered <= 5, "those that may wait, and what the engine has taken from them meanwhile"
        assert all(right for _, _, right in answers)
        assert max(seconds for _, seconds, _ in answers) < 10
        assert ask(99)[0] == 200


def test_bodies_together_have_a_limit(tmp_path: Path) -> None:
    """Four bodies of the largest size are held at most; who sends a fifth is told to come back."""
    with serve_toy(tmp_path, max_body=1000, timeout=5.0) as server:
        head = f"POST {server.path}/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n".encode()
        waiting = [socket.create_connection(server.address, timeout=10) for _ in range(4)]
        for connection in waiting:
            connection.sendall(head)
        time.sleep(0.5)
        reply = server.infer(json_request(toy_images(1)))
        assert reply.status == 503
        assert "memory" in reply.error
        for connection in waiting:
            connection.close()
        deadline = time.monotonic() + 10
        while server.infer(json_request(toy_images(1))).status != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_clients_beyond_the_limit_are_turned_away(tmp_path: Path) -> None:
    with serve_toy(tmp_path, max_connections=3) as server:
        waiting = [socket.create_connection(server.address, timeout=10) for _ in range(3)]
        time.sleep(0.3)
        with socket.create_connection(server.address, timeout=10) as late:
            answer = late.recv(4096)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 1" in answer
        for connection in waiting:
            connection.close()
        time.sleep(0.3)
        assert server.ready()


def test_slow_clients_are_cut(tmp_path: Path) -> None:
    with serve_toy(tmp_path, timeout=1.0, idle=1.0) as server:
        with socket.create_connection(server.address, timeout=10) as silent:
            assert silent.recv(1) == b""
        with socket.create_connection(server.address, timeout=10) as drip:
            begin, cut = time.monotonic(), False
            for letter in b"GET /v2 HTTP/1.1\r\nX-Slow: " + b"x" * 1000:
                try:
                    drip.sendall(bytes([letter]))
                except OSError:  # reset, or a broken pipe
                    cut = True
                    break
                time.sleep(0.05)
            assert cut
            assert time.monotonic() - begin < 10
        with socket.create_connection(server.address, timeout=10) as body:
            body.sendall(f"POST {server.path}/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nhalf".encode())
            assert body.recv(4096).startswith(b"HTTP/1.1 408 ")
        assert server.ready()


def test_an_engine_that_hangs_gives_504_and_is_not_ready(tmp_path: Path) -> None:
    with serve_toy(tmp_path, hang=True, timeout=1.0, max_waiting=2) as server:
        fatal = toy_images(1)
        fatal[0, 0, 0, 0] = 255
        reply = server.infer(json_request(fatal))
        assert reply.status == 504
        assert "1 s" in reply.error
        assert server.infer(json_request(toy_images(1))).status == 504
        assert not server.ready()
        assert server.request("GET", "/v2/health/live").status == 200
        assert server.stop(seconds=40) == 3
        assert server.lines()[-1] == {**server.lines()[-1], "event": "stopped", "engine_ended": False}


@pytest.mark.parametrize(
    ("fail", "sentence"), [("error", "the device went away"), ("bug", "ZeroDivisionError"), ("nan", "not finite")]
)
def test_an_engine_that_fails_gives_500_and_goes_on(tmp_path: Path, fail: str, sentence: str) -> None:
    with serve_toy(tmp_path, fail=fail) as server:
        fatal = toy_images(1)
        fatal[0, 0, 0, 0] = 255
        reply = server.infer(json_request(fatal))
        assert reply.status == 500
        assert sentence in reply.error
        assert "secret" not in reply.error
        images = toy_images(2, seed=3)
        np.testing.assert_array_equal(logits_of_reply(server.infer(json_request(images))), toy_logits(images))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_has_arrived_be_answered(tmp_path: Path, how: int) -> None:
    with serve_toy(tmp_path, delay=1.0, max_batch=1) as server:
        images = [toy_images(1, seed=number) for number in range(3)]
        with ThreadPoolExecutor(3) as pool:
            answers = [pool.submit(server.infer, json_request(one)) for one in images]
            time.sleep(0.5)
            server.process.send_signal(how)
            for one, answer in zip(images, answers, strict=True):
                np.testing.assert_array_equal(logits_of_reply(answer.result()), toy_logits(one))
        assert server.stop(how) == 0
        assert server.lines()[-1]["event"] == "stopped"
        with pytest.raises(ConnectionRefusedError):
            server.ready()


def test_nobody_reads_the_log(tmp_path: Path) -> None:
    """A full pipe on stderr stops a program that writes to it; this one must go on."""
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, str(TOY), "{}"], stdout=subprocess.PIPE, stderr=write, text=True)
    try:
        assert process.stdout is not None
        server = Served(process, process.stdout.readline().strip(), tmp_path / "none")
        for _ in range(400):  # of 65,536 bytes of a pipe
            assert server.request("GET", f"/v2/{'x' * 300}").status == 404
        assert server.ready()
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        os.close(read)
        os.close(write)


def test_a_token_opens_everything_but_health(ort_artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    with serve_artifact(ort_artifact.path, tmp_path / "run", "--token-file", tmp_path / "token") as server:
        for path in ("/v2", server.path, f"{server.path}/ready", "/metrics", "/openapi.json", "/nothing"):
            wrong = ("", "Bearer", "Bearer ", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, "Bearer \xff")
            for shown in (None, *wrong):
                reply = server.request("GET", path, headers={} if shown is None else {"Authorization": shown})
                assert reply.status == 401
                assert reply.headers["www-authenticate"] == "Bearer"
                assert reply.error
        assert server.request("POST", f"{server.path}/infer", b"{}").status == 401
        assert server.request("GET", "/v2", headers={"Authorization": f"bearer {TOKEN}"}).status == 200
        assert server.request("GET", "/v2", headers={"Authorization": f"Bearer {TOKEN}"}).status == 200
        assert server.ready()
        assert TOKEN not in server.log.read_text()


def test_without_a_token_other_names_are_refused(toy: Served) -> None:
    hosts = {"localhost": 200, "127.0.0.1:80": 200, "[::1]:9": 200, "rebound.example": 421, "a@localhost": 421}
    for host, status in hosts.items():
        assert toy.request("GET", "/v2", headers={"Host": host}).status == status


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """For 127.0.0.1, signed by itself."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


def test_tls(ort_artifact: Artifact, tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    with serve_artifact(ort_artifact.path, tmp_path, "--tls-cert", cert, "--tls-key", key) as server:
        assert server.url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=cert)
        connection = http.client.HTTPSConnection(*server.address, timeout=10, context=context)
        connection.request("GET", "/v2")
        assert connection.getresponse().status == 200
        connection.close()
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            server.request("GET", "/v2")
        old = ssl.create_default_context(cafile=cert)
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)), socket.create_connection(server.address, timeout=10) as plain:
            old.wrap_socket(plain, server_hostname="127.0.0.1")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", "localhost.example.com"])
def test_other_machines_need_a_token(host: str) -> None:
    with pytest.raises(InputError, match="no token protects it"):
        ServeOptions(host)
    assert not ServeOptions(host, token=TOKEN).local


def test_this_machine_needs_none() -> None:
    assert all(ServeOptions(host).local for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"port": -1}, "port"), ({"port": 65536}, "port"), ({"max_batch": 0}, "max-batch"), ({"max_waiting": 0}, "max-waiting"),
        ({"max_body": 0}, "max-body"), ({"max_connections": 0}, "max-connections"), ({"timeout": 0.0}, "timeouts"),
        ({"idle": float("nan")}, "timeouts"), ({"certificate": Path("c")}, "both"), ({"key": Path("k")}, "both"),
    ],
)  # fmt: skip
def test_options_out_of_range(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ServeOptions(**changes)  # type: ignore[arg-type]


def test_files_that_are_no_certificate(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("nothing")
    with pytest.raises(InputError, match="are not a certificate and its key"):
        ServeOptions(certificate=tmp_path / "c", key=tmp_path / "c").tls()
    with pytest.raises(InputError, match="are not a certificate and its key"):
        ServeOptions(certificate=tmp_path / "missing", key=tmp_path / "c").tls()


def test_answers_do_not_wait_for_acknowledgements() -> None:
    """Head and body of an answer are two writes: with Nagle's algorithm the second waits for the client, 40 ms on Linux."""
    options = ServeOptions(port=0)

    async def no_delay() -> bool:
        state = ServerState()
        config = Config(lambda *_: None, log_config=None, interface="asgi3")  # type: ignore[arg-type]
        config.load()
        listening, _ = connections.listen(options)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: connections._protocol(options)(config, state, {}), sock=listening)  # type: ignore[call-arg]
        _, writer = await asyncio.open_connection(*listening.getsockname())
        while not state.connections:
            await asyncio.sleep(0.01)
        (connection,) = state.connections
        accepted = connection.transport.get_extra_info("socket")
        writer.close()
        server.close()
        return bool(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    assert asyncio.run(no_delay())


def test_keeping_a_connection_busy_is_fine(tmp_path: Path) -> None:
    """Many requests on one connection outlast every timer of a single one."""
    with serve_toy(tmp_path, timeout=0.5, idle=1.0) as server:
        connection = http.client.HTTPConnection(*server.address, timeout=10)
        body, headers = binary_request(toy_images(1))
        end = time.monotonic() + 8
        while time.monotonic() < end:
            connection.request("POST", f"{server.path}/infer", body, headers)
            assert len(connection.getresponse().read()) > 20
            time.sleep(0.3)
        connection.close()
