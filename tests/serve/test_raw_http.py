"""HTTP as no client library writes it: every request gets an error in the server's own form or a closed connection, in time."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Served, binary_request, json_request, serve_toy, toy_images

POST = b"POST /v2/models/toy/infer HTTP/1.1\r\nHost: localhost\r\n"
WHOLE = json.dumps(json_request(toy_images(1))).encode()
LENGTH = b"Content-Length: %d\r\n" % len(WHOLE)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNK = b"%x\r\n%s\r\n0\r\n\r\n" % (len(WHOLE), WHOLE)
HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
"""A request within another's body: it must never be answered with 404."""
SECONDS = 8.0


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A toy engine that waits for nobody longer than two seconds."""
    with serve_toy(tmp_path_factory.mktemp("quick"), max_body=100_000, max_batch=16, timeout=1.0, idle=1.0) as server:
        yield server


def converse(server: Served, *parts: bytes, pause: float = 0.0) -> bytes:
    """Everything that is answered until the server closes, which it must."""
    received, begin = b"", time.monotonic()
    with socket.create_connection(server.address, timeout=SECONDS) as connection:
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            while block := connection.recv(1 << 16):
                received += block
        except ConnectionError:  # cut while something was on its way
            pass
    assert time.monotonic() - begin < SECONDS + pause * len(parts), "the connection was never closed"
    return received


def answers(received: bytes) -> list[tuple[int, dict[str, object]]]:
    """Status and document of each answer."""
    found = []
    while received:
        head, end, rest = received.partition(b"\r\n\r\n")
        assert end, received
        line, *fields = head.decode("ascii").split("\r\n")
        headers = {key.lower(): value for key, _, value in (field.partition(": ") for field in fields)}
        size = int(headers["content-length"])
        assert len(rest) >= size, received
        found.append((int(line.split()[1]), json.loads(rest[:size])))
        received = rest[size:]
    return found


def unharmed(server: Served) -> None:
    assert server.ready()
    assert server.infer(json_request(toy_images(1))).status == 200
    text = server.log.read_text()
    assert "Traceback" not in text
    assert not [line for line in server.lines() if line["event"] == "bug" or line.get("exception")]


REFUSED: dict[str, bytes] = {
    # what two servers in a row could split at different places
    "length and chunks": POST + LENGTH + CHUNKED + b"\r\n" + CHUNK,
    "chunks and length": POST + CHUNKED + LENGTH + b"\r\n" + CHUNK,
    "a length that ends before the chunks": POST + b"Content-Length: 4\r\n" + CHUNKED + b"\r\n" + b"0\r\n\r\n" + HIDDEN,
    "two lengths": POST + b"Content-Length: 0\r\n" + LENGTH + b"\r\n" + WHOLE + HIDDEN,
    "two lengths in one header": POST + b"Content-Length: 0, %d\r\n\r\n" % len(WHOLE) + HIDDEN,
    "chunked twice": POST + CHUNKED + CHUNKED + b"\r\n" + CHUNK,
    "chunked, identity": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n" + CHUNK,
    "identity, chunked": POST + b"Transfer-Encoding: identity, chunked\r\n\r\n" + CHUNK,
    "xchunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNK,
    "chunked in a folded header": POST + b"Transfer-Encoding:\r\n chunked\r\n" + LENGTH + b"\r\n" + HIDDEN,
    "space before the colon": POST + b"Transfer-Encoding : chunked\r\n\r\n" + CHUNK,
    "tab in the name": POST + b"Transfer\tEncoding: chunked\r\n\r\n" + CHUNK,
    "vertical tab in the coding": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n" + CHUNK,
    "a zero byte in the coding": POST + b"Transfer-Encoding: chunked\0\r\n\r\n" + CHUNK,
    "a plus in the length": POST + b"Content-Length: +10\r\n\r\n" + WHOLE[:10],
    "an underscore in the length": POST + b"Content-Length: 1_0\r\n\r\n" + WHOLE[:10],
    "a length in hexadecimals": POST + b"Content-Length: 0xa\r\n\r\n" + WHOLE[:10],
    "a length in other digits": POST + "Content-Length: \u0661\u0660\r\n\r\n".encode() + WHOLE[:10],
    "an empty length": POST + b"Content-Length: \r\n\r\n" + WHOLE,
    # chunks
    "a chunk of no size": POST + CHUNKED + b"\r\n\r\n" + WHOLE,
    "a chunk of negative size": POST + CHUNKED + b"\r\n-1\r\n" + WHOLE,
    "a chunk of 0x1": POST + CHUNKED + b"\r\n0x1\r\n{\r\n0\r\n\r\n",
    "a chunk of 2^64": POST + CHUNKED + b"\r\nffffffffffffffffff\r\n" + WHOLE,
    "a chunk of many digits": POST + CHUNKED + b"\r\n" + b"0" * 50_000 + b"1\r\n{\r\n0\r\n\r\n",
    "a chunk that goes on": POST + CHUNKED + b"\r\n1\r\n" + WHOLE + b"\r\n0\r\n\r\n",
    "a chunk of a gigabyte": POST + CHUNKED + b"\r\n40000000\r\n" + b"x" * 200_000,
    "a chunk with a giant extension": POST + CHUNKED + b"\r\n1;" + b"x" * 100_000 + b"\r\n{\r\n",
    # headers
    "a zero byte in a header": POST + b"X: a\0b\r\n" + LENGTH + b"\r\n" + WHOLE,
    "a zero byte in a name": POST + b"X\0: a\r\n" + LENGTH + b"\r\n" + WHOLE,
    "a header without a name": POST + b": a\r\n" + LENGTH + b"\r\n" + WHOLE,
    "a header without a colon": POST + b"Nothing\r\n" + LENGTH + b"\r\n" + WHOLE,
    "a name in UTF-8": POST + "L\u00e4nge: 1\r\n".encode() + LENGTH + b"\r\n" + WHOLE,
    "a lone carriage return": POST + b"X: a\rTransfer-Encoding: chunked\r\n" + LENGTH + b"\r\n" + WHOLE,
    "two hosts": POST + b"Host: localhost\r\n" + LENGTH + b"\r\n" + WHOLE,
    "another host": POST.replace(b"localhost", b"example.com") + LENGTH + b"\r\n" + WHOLE,
    "a host of bytes": POST.replace(b"localhost", b"\xff\xfe") + LENGTH + b"\r\n" + WHOLE,
    "a head of a megabyte": POST + b"X: " + b"x" * (1 << 20) + b"\r\n\r\n",
    "a hundred thousand headers": POST + b"X: x\r\n" * 100_000 + b"\r\n",
    "a path of a megabyte": b"GET /" + b"x" * (1 << 20) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a whole URL as path": b"GET http://example.com/v2 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a path with dots": b"GET /v2/../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "a path with escapes": b"GET /v2/%2e%2e/%00%ff HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "a method of nobody": b"BREW /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "CONNECT": b"CONNECT example.com:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "two spaces in the line": b"GET  /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a line of text": b"hello\r\n\r\n",
    "a TLS greeting": bytes.fromhex("16030100c8010000c40303") + bytes(190),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "an upgrade to a socket": POST + b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 0\r\n\r\n",
    # bodies of inference
    "no body": POST + b"\r\n",
    "a body of which half comes": POST + LENGTH + b"\r\n" + WHOLE[:100],
    "deep lists": POST + b"Content-Length: 90000\r\n\r\n" + b"[" * 90_000,
    "a giant product of a shape": POST + b"Content-Length: 83\r\n\r\n"
    + b'{"inputs":[{"name":"pixels","datatype":"UINT8","shape":[2147483647,2147483647,9]}]}',
    "NaN": POST + b"Content-Length: 15\r\n\r\n" + b'{"inputs": NaN}',
    "keys twice": POST + b"Content-Length: 27\r\n\r\n" + b'{"inputs": [], "inputs": 1}',
    "text of no Unicode": POST + b"Content-Length: 16\r\n\r\n" + b'{"id": "\xed\xa0\x80"}  ',
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_closed(quick: Served, name: str) -> None:
    found = answers(converse(quick, REFUSED[name]))
    for status, document in found:
        assert 400 <= status <= 505, (name, status, document)
        assert list(document) == ["error"], (name, document)
    assert len(found) <= 1, found
    assert "there is nothing at this path" not in str(found) or b"/hidden" not in REFUSED[name], "a hidden request was answered"
    unharmed(quick)


def test_what_is_unusual_and_right_is_answered(quick: Served) -> None:
    fine = {
        "chunks": POST + CHUNKED + b"Connection: close\r\n\r\n" + CHUNK,
        "chunks of a byte": POST + CHUNKED + b"Connection: close\r\n\r\n"
        + b"".join(b"1\r\n%c\r\n" % byte for byte in WHOLE) + b"0\r\n\r\n",
        "an extension of a chunk": POST + CHUNKED + b"Connection: close\r\n\r\n" + CHUNK.replace(b"\r\n", b";a=b\r\n", 1),
        "trailers": POST + CHUNKED + b"Connection: close\r\n\r\n" + CHUNK[:-2] + b"X: y\r\n\r\n",
        "a length twice, and equal": POST + LENGTH + LENGTH + b"Connection: close\r\n\r\n" + WHOLE,
        "HTTP/1.0": POST.replace(b"1.1", b"1.0") + LENGTH + b"\r\n" + WHOLE,
    }
    for name, raw in fine.items():
        ((status, _),) = answers(converse(quick, raw))
        assert status == 200, name


def test_requests_in_a_row_are_answered_in_their_order(quick: Served) -> None:
    bad = POST + b"Content-Length: 2\r\n\r\n{}"
    last = POST + LENGTH + b"Connection: close\r\n\r\n" + WHOLE
    found = answers(converse(quick, (POST + LENGTH + b"\r\n" + WHOLE + bad) * 3 + last))
    assert [status for status, _ in found] == [200, 400] * 3 + [200]


def test_byte_by_byte(quick: Served) -> None:
    """A request that arrives slowly and whole is answered; one that never ends is cut, as are many at a time."""
    raw = POST + LENGTH + b"Connection: close\r\n\r\n" + WHOLE
    ((status, _),) = answers(converse(quick, *(raw[at : at + 40] for at in range(0, len(raw), 40)), pause=0.002))
    assert status == 200
    slow = [socket.create_connection(quick.address, timeout=SECONDS) for _ in range(50)]
    for connection in slow:
        connection.sendall(POST + b"X-Slow: ")
    end = time.monotonic() + SECONDS
    open_ones = list(slow)
    while open_ones and time.monotonic() < end:
        for connection in list(open_ones):
            try:
                connection.sendall(b"x")
            except OSError:
                open_ones.remove(connection)
        assert quick.ready()
        time.sleep(0.1)
    for connection in slow:
        connection.close()
    assert not open_ones
    unharmed(quick)


def test_mutations_of_whole_requests(quick: Served) -> None:
    """Bytes of the head and the body changed, taken away, doubled: the same ones every time."""
    rng = random.Random(0)
    body, headers = binary_request(toy_images(2))
    fields = b"".join(f"{key}: {value}\r\n".encode() for key, value in headers.items())
    close = b"Connection: close\r\n"
    seeds = [POST + close + LENGTH + b"\r\n" + WHOLE, POST + close + CHUNKED + b"\r\n" + CHUNK,
             POST + close + fields + b"Content-Length: %d\r\n\r\n" % len(body) + body]  # fmt: skip
    places = b"\0\r\n\t :;,-+0179azAZ\x7f\x80\xff[]{}\""
    statuses = set()
    for _ in range(80):
        raw = bytearray(rng.choice(seeds))
        for _ in range(rng.randrange(1, 5)):
            at, size = rng.randrange(len(raw)), rng.randrange(0, 8)
            kind = rng.randrange(4)
            new = (bytes([rng.choice(places)]), b"", bytes(raw[at : at + size]) * 2, rng.randbytes(size))[kind]
            raw[at : at + (1 if kind == 0 else size)] = new
        received = converse(quick, bytes(raw))
        if received.startswith(b"HTTP/1.1 200 "):
            statuses.add(200)
            continue
        for status, document in answers(received):
            assert 400 <= status <= 505, bytes(raw)
            assert list(document) == ["error"], bytes(raw)
            statuses.add(status)
    assert statuses >= {200, 400}
    unharmed(quick)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system does not tell how much memory a process has")
def test_memory_after_all_of_it(quick: Served) -> None:
    for raw in REFUSED.values():
        if len(raw) > 50_000:
            for _ in range(2):
                converse(quick, raw)
    status = Path(f"/proc/{quick.process.pid}/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert peak < 250_000, f"{peak} KiB"
    unharmed(quick)
