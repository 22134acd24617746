"""A remote engine against servers that are not ours: some right, most wrong."""

from __future__ import annotations

import copy
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_server import INPUT, OUTPUT, Fake, right_answer, running
from serving import TOY_CLASSES, TOY_SHAPE, assert_closing_ends, serve_toy, toy_images, toy_logits

from edgeguard.errors import EngineError, InputError, MissingDependency
from edgeguard.targets import Engine
from edgeguard.targets.asking import Address, RemoteOptions
from edgeguard.targets.remote import RemoteEngine, read_remote

QUICK = RemoteOptions(timeout=2.0, patience=0.5)


def opened(fake: Fake, options: RemoteOptions = QUICK, shape: Any = None) -> RemoteEngine:
    return RemoteEngine(read_remote(fake.url, options), options, shape)


def sentence(caught: pytest.ExceptionInfo[Exception], fake_url: str) -> str:
    """Errors say where, in one line."""
    text = str(caught.value)
    assert fake_url in text
    assert "\n" not in text
    assert len(text) < 700
    return text


def test_a_server_that_speaks_json_alone() -> None:
    images = toy_images(7)
    with running(Fake()) as fake, opened(fake) as engine:
        assert isinstance(engine, Engine)
        assert (engine.name, engine.input_shape, engine.num_classes) == ("remote", TOY_SHAPE, TOY_CLASSES)
        np.testing.assert_array_equal(engine(images), toy_logits(images))
        described = engine.describe()
        assert described["runtime"] == "remote"
        assert described["url"] == fake.url
        assert described["transport"] == "JSON"
        assert described["server"] == "other 7"
        assert described["claims"] == {}


def test_our_own_server_with_bytes(tmp_path: Path) -> None:
    images = toy_images(50)
    with serve_toy(tmp_path, max_batch=16) as served:
        model = read_remote(served.url)
        assert model.binary
        assert model.max_batch == 16
        with RemoteEngine(model) as engine:
            np.testing.assert_array_equal(engine(images), toy_logits(images))  # in four requests
            assert engine.describe()["transport"] == "binary tensors"
            batches = [toy_images(1 + number, seed=number) for number in range(40)]
            for batch, logits in zip(batches, engine.stream(batches), strict=True):
                np.testing.assert_array_equal(logits, toy_logits(batch))


def test_float_pixels_are_scaled_as_asked() -> None:
    seen: list[Any] = []

    def answer(images: Any) -> Any:
        seen.append(images)
        return right_answer(np.round(images * (255 / images.max()) if images.max() <= 1 else images))

    model = {"inputs": [{**INPUT, "datatype": "FP32"}], "outputs": [OUTPUT]}
    images = toy_images(3)
    images[0, 0, 0, 0] = 255
    for white in (255.0, 1.0):
        options = RemoteOptions(pixel_max=white)
        with running(Fake(model=model, answer=answer)) as fake, opened(fake, options) as engine:
            np.testing.assert_array_equal(engine(images), toy_logits(images))
            assert seen[-1].max() == white
            np.testing.assert_array_equal(seen[-1].astype(np.float32), images.astype(np.float32) * np.float32(white / 255))


def test_sizes_that_the_server_leaves_open() -> None:
    model = {"inputs": [{**INPUT, "shape": [-1, -1, -1, -1]}], "outputs": [{**OUTPUT, "shape": [-1, -1]}]}
    with running(Fake(model=model)) as fake:
        with pytest.raises(InputError, match="leaves the size of images open"):
            opened(fake)
        with opened(fake, shape=TOY_SHAPE) as engine:
            assert engine.num_classes == TOY_CLASSES
            np.testing.assert_array_equal(engine(toy_images(2)), toy_logits(toy_images(2)))
    message = r"takes images of \(3, 4, 4\), and those at hand are of \(3, 8, 8\)"
    with running(Fake()) as fake, pytest.raises(InputError, match=message):
        opened(fake, shape=(3, 8, 8))


def test_connections_are_used_again_and_requests_overlap() -> None:
    def slow(handler: Any, number: int) -> bool:
        time.sleep(0.05)
        return False

    batches = [toy_images(2, seed=number) for number in range(24)]
    with running(Fake(before=slow)) as fake, opened(fake, RemoteOptions(in_flight=4)) as engine:
        before, begin = fake.connections, time.monotonic()
        answers = list(engine.stream(batches))
        assert time.monotonic() - begin < 24 * 0.05
        assert fake.most_open == 4
        assert fake.connections - before <= 4
        for batch, logits in zip(batches, answers, strict=True):
            np.testing.assert_array_equal(logits, toy_logits(batch))
        for _ in range(3):
            engine(batches[0])
        assert fake.connections - before <= 4


def test_the_rate_is_limited() -> None:
    with running(Fake()) as fake, opened(fake, RemoteOptions(rate=100, in_flight=4)) as engine:
        begin = time.monotonic()
        list(engine.stream([toy_images(10)] * 6))
        assert 0.5 <= time.monotonic() - begin < 5


def test_the_token_is_shown_and_never_told() -> None:
    options = RemoteOptions(token="a-secret-of-the-tests-alone")
    with running(Fake()) as fake, opened(fake, options) as engine:
        engine(toy_images(1))
        assert fake.headers[-1]["Authorization"] == "Bearer a-secret-of-the-tests-alone"
        assert "secret" not in str(engine.describe())


@pytest.mark.parametrize("fault", ["drop", "503", "429", "half", "garbage after an answer"])
def test_what_passes_is_tried_again(fault: str) -> None:
    def before(handler: Any, number: int) -> bool:
        if number not in (1, 2):
            return False
        if fault == "drop":
            return bool(handler.drop())
        if fault == "half":
            return bool(handler.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"))
        if fault == "garbage after an answer":
            handler.reply(right_answer(toy_images(3, seed=1)))
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\nmore")
            return bool(handler.drop())
        handler.reply({"error": "later"}, int(fault), Retry_After="0")
        return True

    with running(Fake(before=before)) as fake, opened(fake, RemoteOptions(patience=10, in_flight=1)) as engine:
        for _ in range(4):
            np.testing.assert_array_equal(engine(toy_images(3, seed=1)), toy_logits(toy_images(3, seed=1)))


def test_a_server_that_comes_back_is_found_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as placeholder:
        port = placeholder.getsockname()[1]
    url, found = f"http://127.0.0.1:{port}/v2/models/toy", []

    def late(folder: Path) -> None:
        with serve_toy(folder, port=port) as served:
            found.append(served)
            stop.wait(60)

    stop = threading.Event()
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        thread = threading.Thread(target=late, args=(Path(folder),))
        thread.start()
        try:
            assert read_remote(url, RemoteOptions(patience=60)).server.startswith("edgeguard")
        finally:
            stop.set()
            thread.join()


def changed(**changes: Any) -> Callable[[Any], Any]:
    """A right answer with its output changed; None takes a key away."""
    def answer(images: Any) -> Any:
        document = right_answer(images)
        (output,) = document["outputs"]
        document["outputs"] = [{key: value for key, value in {**output, **changes}.items() if value is not None}]
        return document

    return answer


def numbers(*values: str) -> Callable[[Any], bytes]:
    text = ",".join(values).encode()
    return lambda images: (
        b'{"outputs": [{"name": "scores", "datatype": "FP32", "shape": [2, 5], "data": [' + text + b"]}]}"
    )


ANSWERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "not JSON": (lambda images: b"<html>", "not valid JSON"),
    "empty": (lambda images: b"", "not valid JSON"),
    "a list": (lambda images: [], "must be a JSON object"),
    "no outputs": (lambda images: {}, "'outputs' must be a list"),
    "another output": (changed(name="other"), "expected scores alone"),
    "two outputs": (lambda images: {"outputs": right_answer(images)["outputs"] * 2}, "at most 10 are taken"),
    "another datatype": (changed(datatype="INT64"), "datatype must be"),
    "bytes of pixels": (changed(datatype="UINT8", data=[1] * 10), r"answered uint8 \[2, 5\]"),
    "too few": (changed(shape=[1, 5], data=[0.0] * 5), r"answered float32 \[1, 5\], expected float32 \[2, 5\]"),
    "too many": (changed(shape=[3, 5], data=[0.0] * 15), "at most 10 are taken"),
    "other classes": (changed(shape=[2, 4], data=[0.0] * 8), r"\[2, 4\]"),
    "a shape that lies": (changed(shape=[2, 500]), "at most 10 are taken"),
    "a huge shape": (changed(shape=[2**40, 2**40]), "whole numbers of at least 0"),
    "a negative shape": (changed(shape=[-2, 5]), "whole numbers of at least 0"),
    "text": (changed(data=["0"] * 10), "got str"),
    "NaN": (numbers(*["NaN"] * 10), "NaN is not JSON"),
    "infinity": (numbers(*["1e999"] * 10), "not finite"),
    "beyond float32": (numbers(*["1e39"] * 10), "not finite"),
    "a hundred digits": (numbers(*["9" * 100] * 10), "not finite"),
    "far beyond": (numbers(*["9" * 400] * 10), "out of the range"),
    "bytes that do not follow": (changed(data=None, parameters={"binary_data_size": 40}), "40 bytes were announced, 0 follow"),
    "deep": (lambda images: b'{"outputs":' + b"[" * 200, "nested deeper"),
    "many lists": (lambda images: b'{"outputs":[' + b"[]," * 20_000 + b"[]]}", "more than the 10 numbers"),
    "a megabyte": (lambda images: b" " * (1 << 20), "announced an answer of 1048576 bytes"),
    "control characters": (changed(name="\x1b[31m\n"), "expected scores alone"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_that_cannot_be_used(name: str) -> None:
    answer, message = ANSWERS[name]
    with running(Fake(answer=answer)) as fake, opened(fake) as engine:
        with pytest.raises(EngineError, match=message) as caught:
            engine(toy_images(2))
        assert "\x1b" not in sentence(caught, fake.url)
        assert fake.requests == 1, "what is wrong stays wrong"


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
WIRES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "garbage": (lambda handler: handler.raw(b"\x00\xff" * 100 + b"\r\n\r\n"), "does not answer in HTTP"),
    "another protocol": (lambda handler: handler.raw(b"SSH-2.0-OpenSSH_9.9\r\n"), "does not answer in HTTP"),
    "nothing": (lambda handler: handler.drop(), "closed the connection without an answer"),
    "half a head": (lambda handler: handler.raw(OK + b"Content-Le"), "as if its head had broken off"),
    "half a body": (lambda handler: handler.raw(OK + b"Content-Length: 500\r\n\r\n{'outputs': ["), "broke off after 13 bytes, 487"),
    "half a chunk": (lambda handler: handler.raw(CHUNKED + b"64\r\n{}"), "broke off"),
    "a bad chunk": (lambda handler: handler.raw(CHUNKED + b"zz\r\n{}"), "broke off|does not answer"),
    "a head without end": (lambda handler: handler.raw(OK + b"X: y\r\n" * 500), "does not answer in HTTP"),
    "a line without end": (lambda handler: handler.raw(OK + b"X: " + b"y" * 100_000), "does not answer in HTTP"),
    "a body without end": (lambda handler: handler.raw(OK + b"\r\n" + b" " * (1 << 20)), "without a length"),
    "chunks without end": (
        lambda handler: handler.raw(CHUNKED + (b"1000\r\n" + b" " * 4096 + b"\r\n") * 99),
        "gave an answer of more than",
    ),
    "silence": (lambda handler: time.sleep(3) is not None or handler.drop(), "within 0.5 s"),
    "a head that drips": (lambda handler: handler.raw(OK + b"X: y\r\n" * 9, 0.05), "within 0.5 s"),
    "a head that is cut as it drips": (lambda handler: handler.raw(OK + b"Content-Length: 60\r\n", 0.03), "within 0.5 s"),
    "a body that drips": (lambda handler: handler.raw(OK + b"Content-Length: 60\r\n\r\n" + b" " * 60, 0.05), "within 0.5 s"),
    "a redirect": (lambda handler: handler.reply(b"", 302, Location="http://127.0.0.1:1/") or True, "answered 302"),
    "not found": (lambda handler: handler.reply({"error": "no\nsuch"}, 404) or True, "answered 404: no.such"),
    "a failure": (lambda handler: handler.reply({"error": "x" * 5000}, 500) or True, "answered 500: xxx"),
    "a failure without words": (lambda handler: handler.reply(b"<html>" * 50_000, 500) or True, "answered 500$"),
    "always busy": (lambda handler: handler.reply({"error": "later"}, 503, Retry_After="3600") or True, "503: later; tried"),
}  # fmt: skip


@pytest.mark.parametrize("name", WIRES)
def test_what_is_no_answer(name: str) -> None:
    wire, message = WIRES[name]
    options = RemoteOptions(timeout=0.5, patience=0.4)
    with running(Fake(before=lambda handler, number: wire(handler))) as fake, opened(fake, options) as engine:
        begin = time.monotonic()
        with pytest.raises(EngineError, match=message) as caught:
            engine(toy_images(2))
        assert time.monotonic() - begin < 4
        sentence(caught, fake.url)


METADATA: dict[str, tuple[Any, str]] = {
    "nothing": ({}, "'inputs' of the metadata is not a list"),
    "no tensors": ({"inputs": [], "outputs": []}, "as inputs: none; expected one tensor"),
    "two inputs": ({"inputs": [INPUT, INPUT], "outputs": [OUTPUT]}, "as inputs: image UINT8"),
    "two outputs": ({"inputs": [INPUT], "outputs": [OUTPUT, OUTPUT]}, "as outputs"),
    "channels last": ({"inputs": [{**INPUT, "shape": [-1, 4, 4, 3]}], "outputs": [OUTPUT]}, "as inputs"),
    "one image at a time": ({"inputs": [{**INPUT, "shape": [1, 3, 4, 4]}], "outputs": [OUTPUT]}, "N open"),
    "grey": ({"inputs": [{**INPUT, "shape": [-1, 1, 4, 4]}], "outputs": [OUTPUT]}, "as inputs"),
    "text": ({"inputs": [{**INPUT, "datatype": "BYTES"}], "outputs": [OUTPUT]}, "BYTES"),
    "half floats": ({"inputs": [INPUT], "outputs": [{**OUTPUT, "datatype": "FP16"}]}, "FP16"),
    "a map": ({"inputs": [INPUT], "outputs": [{**OUTPUT, "shape": [-1, 5, 7, 7]}]}, "as outputs"),
    "a billion classes": ({"inputs": [INPUT], "outputs": [{**OUTPUT, "shape": [-1, 10**9]}]}, "as outputs"),
    "no shape": ({"inputs": [{"name": "x", "datatype": "UINT8"}], "outputs": [OUTPUT]}, "has no shape"),
    "no name": ({"inputs": [{"datatype": "UINT8", "shape": [-1, 3, 4, 4]}], "outputs": [OUTPUT]}, "no name"),
    "a list": ([], "must be a JSON object"),
    "not JSON": (b"\xff", "not valid JSON"),
    "deep": (b"[" * 100_000, "nested deeper"),
}


@pytest.mark.parametrize("name", METADATA)
def test_models_that_are_not_supported(name: str) -> None:
    model, message = METADATA[name]
    with running(Fake(model=copy.deepcopy(model))) as fake:
        with pytest.raises(EngineError, match=message) as caught:
            read_remote(fake.url, QUICK)
        sentence(caught, fake.url)


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v2/models/m"
    with pytest.raises(EngineError, match=r"no connection: Connection refused; tried \d+ times"):
        read_remote(url, QUICK)


def test_claims_of_others_are_not_taken() -> None:
    model = {"inputs": [INPUT], "outputs": [OUTPUT], "parameters": {"artifact_sha256": "x", "max_batch_size": 1}}
    with running(Fake(model=model)) as fake:
        assert read_remote(fake.url).claims == {}
    ours = {"name": "edgeguard", "version": "\x1b[2J", "extensions": "binary_tensor_data"}
    model["parameters"] = {"width": "\x1b[31m4", "max_batch_size": -3, "list": [1], "huge": 10**30, "text": "x" * 5000}
    with running(Fake(server=ours, model=model)) as fake:
        found = read_remote(fake.url)
        assert "\x1b" not in str(found.claims) + found.server
        assert found.max_batch is None
        assert not found.binary
        assert len(str(found.claims)) < 600


def test_closing_ends_what_is_on_its_way() -> None:
    def hang(handler: Any, number: int) -> bool:
        time.sleep(3)
        return bool(handler.drop())

    with running(Fake(before=hang)) as fake:
        assert_closing_ends(opened(fake, RemoteOptions(timeout=60, patience=60)), toy_images(1))


def test_wrong_images_are_refused_before_they_are_sent() -> None:
    with running(Fake()) as fake, opened(fake) as engine:
        wrong: list[Any] = [np.zeros((1, 3, 5, 4), np.uint8), np.zeros((0, 3, 4, 4), np.uint8), np.zeros((1, 3, 4, 4), np.float32)]
        for images in wrong:
            with pytest.raises(InputError, match="tensor 'pixels'"):
                engine(images)
            with pytest.raises(InputError, match="tensor 'pixels'"):
                list(engine.stream([images]))
        assert fake.requests == 0


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://h:8000/v2/models/m", "http://h:8000/v2/models/m"),
        ("https://h/v2/models/m/", "https://h:443/v2/models/m"),
        ("http://[::1]:1/a/b/v2/models/m.n-1/versions/3", "http://[::1]:1/a/b/v2/models/m.n-1/versions/3"),
        ("grpc://h:1/v2/models/m", "grpc://h:1/v2/models/m"), ("grpcs://[::1]:9/v2/models/m%20n/versions/3/",
                                                               "grpcs://[::1]:9/v2/models/m%20n/versions/3"),
    ],
)
def test_addresses(url: str, shown: str) -> None:
    assert Address.parse(url).url == shown


@pytest.mark.parametrize(
    "url",
    [
        "http://h", "http://h/v2", "http://h/v2/models/", "ftp://h/v2/models/m", "h:80/v2/models/m", "http:///v2/models/m",
        "http://h/v2/models/m?x=1", "http://h/v2/models/m#x", "http://u:p@h/v2/models/m", "http://u@h/v2/models/m",
        "http://h:99999/v2/models/m", "http://h:x/v2/models/m", "http://h/v2/models/m\r\nX: y", "http://h/v2/models/m m",
        "grpc://h/v2/models/m", "grpc://h:1/m", "grpc://h:1/a/v2/models/m", "grpc://h:0/v2/models/m",
        "http://[::1/v2/models/m", "http://h/v2/models/m/infer", "http://h/v2/models/\u00e9",
    ],
)  # fmt: skip
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(InputError, match=re.escape("expected http(s)://HOST:PORT/v2/models/NAME")):
        Address.parse(url)


@pytest.mark.parametrize(
    "changes",
    [
        {"timeout": 0}, {"timeout": float("nan")}, {"patience": -1}, {"in_flight": 0}, {"in_flight": 65}, {"rate": -1},
        {"rate": float("inf")}, {"pixel_max": 0},
    ],
)  # fmt: skip
def test_options_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        RemoteOptions(**changes)


@pytest.mark.parametrize("token", ["", "short", "with-a-line\nX-Injected: yes", "with a space in it", "\u00fc" * 20, "x" * 5000])
def test_tokens_that_no_header_carries_are_refused_and_not_shown(token: str) -> None:
    with pytest.raises(InputError, match="the token for the server must have 16 to 1024") as caught:
        RemoteOptions(token=token)
    assert not token or token not in str(caught.value)


def test_a_file_that_holds_no_certificates(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    with pytest.raises(InputError, match="holds no certificates"):
        read_remote("https://127.0.0.1:1/v2/models/m", RemoteOptions(authority=tmp_path / "ca.pem"))


def test_without_grpc_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(MissingDependency, match=r'grpc is not installed; run: pip install "edgeguard\[grpc\]"'):
        read_remote("grpc://127.0.0.1:1/v2/models/m", QUICK)
