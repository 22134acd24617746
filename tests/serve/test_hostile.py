"""Bodies and connections that try things: each gets a status of four hundred and one sentence, and the server lives on."""

from __future__ import annotations

import json
import random
import re
import socket
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Served, binary_request, json_request, logits_of_reply, serve_toy, toy_images, toy_logits

HEADER = "Inference-Header-Content-Length"
ONE = toy_images(1)


def tensor(**changes: Any) -> dict[str, Any]:
    """A request whose only tensor is changed; None takes a key away."""
    (entry,) = json_request(ONE)["inputs"]
    return {"inputs": [{key: value for key, value in {**entry, **changes}.items() if value is not None}]}


def alive(toy: Served) -> None:
    np.testing.assert_array_equal(logits_of_reply(toy.infer(json_request(ONE))), toy_logits(ONE))


DOCUMENTS: dict[str, Any] = {
    "not an object": [1, 2],
    "a number": 7,
    "no inputs": {},
    "inputs null": {"inputs": None},
    "inputs empty": {"inputs": []},
    "inputs of numbers": {"inputs": [1]},
    "inputs an object": {"inputs": {"name": "pixels"}},
    "two inputs": {"inputs": json_request(ONE)["inputs"] * 2},
    "no name": tensor(name=None),
    "another name": tensor(name="images"),
    "a name of 10,000 letters": tensor(name="p" * 10_000),
    "a name that is a list": tensor(name=["pixels"]),
    "no datatype": tensor(datatype=None),
    "datatype unknown": tensor(datatype="UINT9"),
    "datatype BYTES": tensor(datatype="BYTES", data=["x"]),
    "datatype FP32": tensor(datatype="FP32"),
    "datatype a list": tensor(datatype=["UINT8"]),
    "no shape": tensor(shape=None),
    "shape empty": tensor(shape=[]),
    "shape of text": tensor(shape="1,3,4,4"),
    "shape of floats": tensor(shape=[1.0, 3, 4, 4]),
    "shape of booleans": tensor(shape=[True, 3, 4, 4]),
    "shape negative": tensor(shape=[-1, 3, 4, 4]),
    "shape twice negative": tensor(shape=[-1, -3, 4, 4]),
    "shape huge": tensor(shape=[2**31 - 1, 2**31 - 1, 2**31 - 1, 2**31 - 1]),
    "shape beyond every integer": tensor(shape=[10**400, 3, 4, 4]),
    "shape of zero and huge": tensor(shape=[0, 3, 2**31 - 1, 2**31 - 1], data=[]),
    "bytes of a shape of zero and huge": tensor(shape=[0, 3, 2**31 - 1, 2**31 - 1], data=None, parameters={"binary_data_size": 0}),
    "shape of a thousand sizes": tensor(shape=[1] * 1000),
    "shape of zero images": tensor(shape=[0, 3, 4, 4], data=[]),
    "shape of too many images": json_request(toy_images(17)),
    "shape of channels last": tensor(shape=[1, 4, 4, 3]),
    "shape flat": tensor(shape=[48]),
    "no data": tensor(data=None),
    "data null": {"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [1, 3, 4, 4], "data": None}]},
    "data text": tensor(data="0" * 48),
    "data too short": tensor(data=[0] * 47),
    "data too long": tensor(data=[0] * 49),
    "data empty": tensor(data=[]),
    "data of floats": tensor(data=[0.5] * 48),
    "data of whole floats": tensor(data=[1.0] * 48),
    "data of booleans": tensor(data=[True] * 48),
    "data of nulls": tensor(data=[None] * 48),
    "data of text": tensor(data=["1"] * 48),
    "data above 255": tensor(data=[256] * 48),
    "data below 0": tensor(data=[-1] * 48),
    "data beyond every integer": tensor(data=[10**100] * 48),
    "data ragged": tensor(data=[[[[0] * 4] * 4] * 2, [0]]),
    "data half nested": tensor(data=[[0] * 16, [0] * 16, [0] * 16]),
    "data mixed": tensor(data=[0] * 47 + [[0]]),
    "data nested too deep": tensor(data=[[[[[0]] * 4] * 4] * 3]),
    "data of objects": tensor(data=[{}] * 48),
    "parameters a list": tensor(parameters=[1]),
    "binary size without bytes": tensor(data=None, parameters={"binary_data_size": 48}),
    "binary size negative": tensor(data=None, parameters={"binary_data_size": -48}),
    "binary size text": tensor(data=None, parameters={"binary_data_size": "48"}),
    "binary size true": tensor(data=None, parameters={"binary_data_size": True}),
    "binary size and data": tensor(parameters={"binary_data_size": 48}),
    "shared memory": tensor(data=None, parameters={"shared_memory_region": "x", "shared_memory_byte_size": 48}),
    "id a number": {**json_request(ONE), "id": 7},
    "id of 1,000 letters": {**json_request(ONE), "id": "i" * 1000},
    "outputs a number": {**json_request(ONE), "outputs": 7},
    "outputs unknown": {**json_request(ONE), "outputs": [{"name": "softmax"}]},
    "outputs twice": {**json_request(ONE), "outputs": [{"name": "logits"}] * 2},
    "outputs of classes": {**json_request(ONE), "outputs": [{"name": "logits", "parameters": {"classification": 3}}]},
    "outputs in shared memory": {
        **json_request(ONE), "outputs": [{"name": "logits", "parameters": {"shared_memory_region": "x"}}],
    },
    "parameters of an output a number": {**json_request(ONE), "outputs": [{"name": "logits", "parameters": 7}]},
    "binary output a number": {**json_request(ONE), "parameters": {"binary_data_output": 1}},
    "parameters of the request a list": {**json_request(ONE), "parameters": []},
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents(toy: Served, name: str) -> None:
    reply = toy.infer(DOCUMENTS[name])
    assert reply.status in (400, 413), name
    assert reply.error
    alive(toy)


WHOLE = json.dumps(json_request(ONE)).encode()
FLOATS = b'{"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 3, 4, 4], "data": ['
BODIES: dict[str, bytes] = {
    "empty": b"",
    "white space": b" \n\t ",
    "half": WHOLE[: len(WHOLE) // 2],
    "without its end": WHOLE[:-1],
    "with more behind it": WHOLE + b"x",
    "twice": WHOLE * 2,
    "not UTF-8": WHOLE.replace(b"pixels", b"pi\xff\xfels"),
    "UTF-16": WHOLE.decode().encode("utf-16"),
    "a zero byte": b"\x00" + WHOLE,
    "half a surrogate": WHOLE.replace(b'"pixels"', b'"\\ud800"'),
    "NaN": WHOLE.replace(b"[1, 3", b"[NaN, 3", 1),
    "data of NaN": FLOATS + b"NaN," * 47 + b"NaN]}]}",
    "data of Infinity": FLOATS + b"-Infinity," * 47 + b"1e999]}]}",
    "1e999": b'{"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1], "data": [1e999]}]}',
    "deep lists": b"[" * 50_000,
    "deep lists, closed": b'{"inputs": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "deep objects": b'{"a":' * 15_000,
    "twenty levels": b'{"inputs": ' + b"[" * 20 + b"]" * 20 + b"}",
    "many empty lists": b'{"inputs": [' + b"[]," * 30_000 + b"[]]}",
    "many numbers": b'{"inputs": [' + b"1," * 45_000 + b"1]}",
    "many strings": b'{"inputs": [' + b'"",' * 30_000 + b'""]}',
    "a number of 50,000 digits": b'{"inputs": ' + b"9" * 50_000 + b"}",
    "a shape of 5,000 digits": b'{"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [' + b"9" * 5000 + b"]}]}",
    "duplicate keys": b'{"inputs": 1, "inputs": [], "inputs": 2}',
    "comments": b"// no\n" + WHOLE,
    "a pickle": b"\x80\x04\x95\x0e\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
    "a zip": b"PK\x03\x04" + b"\x00" * 100,
    "an image": b"\xff\xd8\xff\xe0" + bytes(range(256)),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_bodies(toy: Served, name: str) -> None:
    reply = toy.infer(BODIES[name])
    assert reply.status in (400, 413), name
    assert reply.error
    alive(toy)


@pytest.mark.parametrize(
    "length", ["-1", "1e3", "0x10", "99999", "9" * 50, "10", "0", "+20", " ", "1.0", "twenty", "20, 20", "\u00b2"]
)
def test_wrong_lengths_of_the_json(toy: Served, length: str) -> None:
    body, _ = binary_request(ONE)
    reply = toy.infer(body, {HEADER: length})
    assert reply.status in (400, 413)
    assert reply.error
    alive(toy)


@pytest.mark.parametrize("change", [b"", b"x", b"x" * 48])
def test_wrong_lengths_of_bytes(toy: Served, change: bytes) -> None:
    body, headers = binary_request(ONE)
    spoiled = body + change if change else body[:-1]
    reply = toy.infer(spoiled, headers)
    assert reply.status == 400
    assert "bytes" in reply.error
    alive(toy)


def test_a_body_that_is_too_large_is_refused_before_it_is_read(toy: Served) -> None:
    for size in (100_001, 10**12):
        with socket.create_connection(toy.address, timeout=10) as connection:
            connection.sendall(f"POST {toy.path}/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n".encode())
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413 ")
    alive(toy)


def test_a_chunked_body_that_is_too_large_is_refused(toy: Served) -> None:
    reply = toy.request("POST", f"{toy.path}/infer", (b" " * 1000 for _ in range(200)))
    assert reply.status == 413
    assert "at most 100000 bytes" in reply.error
    alive(toy)


def test_compressed_bodies_are_refused(toy: Served) -> None:
    reply = toy.infer(b"\x1f\x8b" + b"\x00" * 50, {"Content-Encoding": "gzip"})
    assert reply.status == 415
    assert reply.error
    alive(toy)


HEADS: dict[str, bytes] = {
    "nonsense": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "no version": b"GET /v2\r\n\r\n",
    "version 9": b"GET /v2 HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "version 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no host": b"GET /v2 HTTP/1.1\r\n\r\n",
    "a length below 0": b"POST /v2 HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    "a length of text": b"POST /v2 HTTP/1.1\r\nHost: localhost\r\nContent-Length: many\r\n\r\n",
    "a length of 100 digits": b"POST /v2 HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 100 + b"\r\n\r\n",
    "two lengths": b"POST /v2 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
    "a head without end": b"GET /v2 HTTP/1.1\r\n" + b"X-Long: " + b"x" * 40_000,
    "many headers": b"GET /v2 HTTP/1.1\r\n" + b"X: y\r\n" * 10_000,
    "a folded header": b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n folded: yes\r\nX : y\r\n\r\n",
    "a bad chunk": b"POST /v2/models/toy/infer HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "an unknown coding": b"POST /v2/models/toy/infer HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
    "a path of bytes": b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


def whole_answer(connection: socket.socket) -> bytes:
    """What is received until a body as long as announced is there, or the connection ends."""
    received = b""
    while part := connection.recv(1 << 16):
        received += part
        head, end, body = received.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if end and length and len(body) >= int(length[1]):
            break
    return received


@pytest.mark.parametrize("name", HEADS)
def test_heads(toy: Served, name: str) -> None:
    with socket.create_connection(toy.address, timeout=10) as connection:
        try:
            connection.sendall(HEADS[name])
            answer = whole_answer(connection)
        except ConnectionError:  # it was cut while the rest was on its way
            answer = b""
    if answer:
        status = int(answer.split()[1])
        assert 400 <= status < 500 or status in (501, 505)
        document, _ = json.JSONDecoder().raw_decode(answer.split(b"\r\n\r\n", 1)[1].decode())  # more may be answered behind it
        assert document.keys() == {"error"}
    alive(toy)


def test_random_bytes_and_random_changes(toy: Served) -> None:
    """Changes of a request that is fine: whatever comes of them, an answer of two or four hundred, and no bug in the log."""
    rng = random.Random(0)
    body, headers = binary_request(ONE)
    for round_ in range(300):
        spoiled = bytearray(body if round_ % 2 else WHOLE)
        for _ in range(rng.randrange(1, 6)):
            spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
        reply = toy.infer(bytes(spoiled), headers if round_ % 2 else None)
        assert reply.status in (200, 400, 413), bytes(spoiled)
        if reply.status != 200:
            assert reply.error
    alive(toy)
    assert not [line for line in toy.lines() if line["event"] == "bug" or line.get("exception")]


def test_clients_that_hang_up(toy: Served) -> None:
    body, headers = binary_request(toy_images(16))
    head = f"POST {toy.path}/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n" + "".join(
        f"{key}: {value}\r\n" for key, value in headers.items()
    )
    whole = head.encode() + b"\r\n" + body
    for length in (3, len(head) // 2, len(head) + 2, len(whole) - 1, len(whole)):
        connection = socket.create_connection(toy.address, timeout=10)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets it
        connection.sendall(whole[:length])
        connection.close()
    alive(toy)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system does not tell how much memory a process has")
def test_large_hostile_bodies_take_little_memory(tmp_path: Path) -> None:
    """Of 60 MB each; parsed, some would be gigabytes."""
    size = 60_000_000
    bodies = {
        "lists": b'{"inputs": [' + b"[]," * (size // 3), "objects": b"[" + b"{}," * (size // 3), "depth": b"[" * size,
        "numbers": b'{"inputs": [' + b"1.5," * (size // 4), "strings": b"[" + b'"",' * (size // 3),
        "text": b'"' + b"x" * size + b'"', "digits": b"9" * size, "backslashes": b'"' + b"\\" * size + b'"',
        "quotes": b'"' + b'\\"' * (size // 2) + b'"', "half a text": b'"' + b"x" * size,
        "space": b" " * size + WHOLE, "zeros": b"\x00" * size,
    }  # fmt: skip
    with serve_toy(tmp_path) as server:
        for name, body in bodies.items():
            begin = time.monotonic()
            reply = server.infer(body, timeout=120)
            assert reply.status == (200 if name == "space" else reply.status)
            assert reply.status in (200, 400, 413), name
            assert time.monotonic() - begin < 60, name
            for wrong_length in ("5", str(size - 7)):
                assert server.infer(body[: size // 8], {HEADER: wrong_length}).status in (400, 413)
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        assert peak < 700_000, f"{peak} KiB"
        np.testing.assert_array_equal(logits_of_reply(server.infer(json_request(ONE))), toy_logits(ONE))
