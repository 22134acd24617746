"""A remote engine over gRPC, against servers that are not ours: some right, most wrong."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import TOY_CLASSES, TOY_SHAPE, assert_closing_ends, make_certificate, toy_images, toy_logits

grpc = pytest.importorskip("grpc")
pytest.importorskip("tritonclient.grpc")

from grpc_server import INPUT, OUTPUT, Fake, Output, Response, right_answer, running  # noqa: E402

from edgeguard.errors import EngineError  # noqa: E402
from edgeguard.targets import Engine  # noqa: E402
from edgeguard.targets.asking import RemoteOptions  # noqa: E402
from edgeguard.targets.grpc_client import LARGEST  # noqa: E402
from edgeguard.targets.grpc_messages import FIELDS, SERVICE  # noqa: E402
from edgeguard.targets.remote import RemoteEngine, read_remote  # noqa: E402

QUICK = RemoteOptions(timeout=2.0, patience=0.5)
Code = grpc.StatusCode


def opened(fake: Fake, options: RemoteOptions = QUICK, shape: Any = None) -> RemoteEngine:
    return RemoteEngine(read_remote(fake.url, options), options, shape)


def sentence(caught: pytest.ExceptionInfo[Exception], url: str) -> str:
    """Errors say where, in one line."""
    text = str(caught.value)
    assert url in text
    assert "\n" not in text
    assert len(text) < 700
    return text


def test_our_messages_are_the_published_ones() -> None:
    from tritonclient.grpc import service_pb2

    published = service_pb2.DESCRIPTOR
    inner = {
        "TensorMetadata": published.message_types_by_name["ModelMetadataResponse"].nested_types_by_name["TensorMetadata"],
        "InferTensor": published.message_types_by_name["ModelInferRequest"].nested_types_by_name["InferInputTensor"],
    }
    outputs = published.message_types_by_name["ModelInferResponse"].nested_types_by_name["InferOutputTensor"]
    field_type = type(outputs.fields_by_name["name"])
    types = {"string": field_type.TYPE_STRING, "int64": field_type.TYPE_INT64, "float": field_type.TYPE_FLOAT,
             "bytes": field_type.TYPE_BYTES}  # fmt: skip
    for name, fields in FIELDS.items():
        theirs = inner.get(name) or published.message_types_by_name[name]
        for field, (number, kind) in fields.items():
            for side in (theirs, outputs) if name == "InferTensor" else (theirs,):
                found = side.fields_by_name[field]
                assert found.number == number
                assert found.type == types.get(kind.rstrip("*"), field_type.TYPE_MESSAGE)
                assert found.is_repeated == kind.endswith("*")
    service = published.services_by_name["GRPCInferenceService"]
    assert service.full_name == SERVICE
    assert {"ServerMetadata", "ModelMetadata", "ModelInfer"} <= set(service.methods_by_name)


def test_a_server_of_raw_bytes() -> None:
    images = toy_images(7)
    with running(Fake()) as fake, opened(fake) as engine:
        assert isinstance(engine, Engine)
        assert (engine.name, engine.input_shape, engine.num_classes) == ("remote", TOY_SHAPE, TOY_CLASSES)
        np.testing.assert_array_equal(engine(images), toy_logits(images))
        described = engine.describe()
        assert described["url"] == fake.url
        assert described["transport"] == "gRPC"
        assert described["server"] == "other 7"
        assert described["platform"] == "p"
        assert described["tls"] is False
        assert described["claims"] == {}
        with RemoteEngine(read_remote(f"{fake.url}/versions/3", QUICK), QUICK) as versioned:
            np.testing.assert_array_equal(versioned(images), toy_logits(images))


def test_numbers_one_by_one_are_taken_as_well() -> None:
    def answer(images: Any) -> Any:
        logits = toy_logits(images)
        output = Output(**{**OUTPUT, "shape": logits.shape})
        output.contents.fp32_contents.extend(logits.ravel().tolist())
        return Response(outputs=[output])

    with running(Fake(answer=answer)) as fake, opened(fake) as engine:
        np.testing.assert_array_equal(engine(toy_images(3)), toy_logits(toy_images(3)))


def test_float_pixels_and_open_sizes() -> None:
    inputs, outputs = [{**INPUT, "datatype": "FP32", "shape": [-1] * 4}], [{**OUTPUT, "shape": [-1, -1]}]
    seen: list[Any] = []

    def answer(images: Any) -> Any:
        seen.append(images)
        return right_answer(np.round(images * 255))

    options = RemoteOptions(timeout=2.0, patience=0.5, pixel_max=1.0)
    with running(Fake(inputs=inputs, outputs=outputs, answer=answer)) as fake, opened(fake, options, TOY_SHAPE) as engine:
        assert engine.num_classes == TOY_CLASSES
        np.testing.assert_array_equal(engine(toy_images(3)), toy_logits(toy_images(3)))
        assert seen[-1].dtype == np.float32
        assert seen[-1].max() <= 1.0


def test_requests_overlap_on_one_channel() -> None:
    batches = [toy_images(2, seed=number) for number in range(24)]
    with running(Fake(before=lambda number, context: time.sleep(0.05))) as fake:
        with opened(fake, RemoteOptions(in_flight=4)) as engine:
            answers = list(engine.stream(batches))
        assert fake.most_open == 4
        for batch, logits in zip(batches, answers, strict=True):
            np.testing.assert_array_equal(logits, toy_logits(batch))


def test_the_rate_is_limited() -> None:
    with running(Fake()) as fake, opened(fake, RemoteOptions(rate=100)) as engine:
        begin = time.monotonic()
        list(engine.stream([toy_images(10)] * 6))
        assert 0.5 <= time.monotonic() - begin < 5


def test_the_token_is_shown_and_a_wrong_one_refused() -> None:
    right = "a-secret-of-the-tests-alone"
    with running(Fake(token=right)) as fake:
        for token in (None, "another-secret-of-the-tests"):
            with pytest.raises(EngineError, match="ServerMetadata was answered UNAUTHENTICATED: a token is needed") as caught:
                read_remote(fake.url, RemoteOptions(token=token))
            assert "secret" not in sentence(caught, fake.url)
        with opened(fake, RemoteOptions(token=right)) as engine:
            np.testing.assert_array_equal(engine(toy_images(1)), toy_logits(toy_images(1)))
            assert "secret" not in str(engine.describe())


@pytest.mark.parametrize("code", ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED"])
def test_what_passes_is_tried_again(code: str) -> None:
    def before(number: int, context: Any) -> None:
        if number in (1, 2):
            context.abort(Code[code], "later")

    with running(Fake(before=before)) as fake, opened(fake, RemoteOptions(patience=10, in_flight=1)) as engine:
        for _ in range(4):
            np.testing.assert_array_equal(engine(toy_images(3)), toy_logits(toy_images(3)))
        assert fake.requests == 6


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "INTERNAL", "UNIMPLEMENTED", "PERMISSION_DENIED"])
def test_what_stays_wrong_is_not_tried_again(code: str) -> None:
    def before(number: int, context: Any) -> None:
        context.abort(Code[code], "x" * 5000 + "\x1b[31m")

    with running(Fake(before=before)) as fake, opened(fake, RemoteOptions(patience=10)) as engine:
        with pytest.raises(EngineError, match=f"ModelInfer was answered {code}: xxx") as caught:
            engine(toy_images(1))
        assert "\x1b" not in sentence(caught, fake.url)
        assert fake.requests == 1


def test_a_model_that_is_not_there() -> None:
    with running(Fake()) as fake:
        for url, shown in ((f"{fake.url}x", "'m nx' of version ''"), (f"{fake.url}/versions/4", "'m n' of version '4'")):
            with pytest.raises(EngineError, match=f"ModelMetadata was answered NOT_FOUND: no model {shown}") as caught:
                read_remote(url, QUICK)
            sentence(caught, url)


def test_an_answer_that_does_not_come_in_time() -> None:
    options = RemoteOptions(timeout=0.3, patience=0.4)
    with running(Fake(before=lambda number, context: time.sleep(1.0))) as fake, opened(fake, options) as engine:
        begin = time.monotonic()
        with pytest.raises(EngineError, match=r"no whole answer came within 0.3 s; tried \d times"):
            engine(toy_images(1))
        assert time.monotonic() - begin < 3


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"grpc://127.0.0.1:{server.getsockname()[1]}/v2/models/m"
    with pytest.raises(EngineError, match=r"ServerMetadata was answered UNAVAILABLE: .*; tried \d+ times in") as caught:
        read_remote(url, QUICK)
    sentence(caught, url)


def test_a_server_that_speaks_something_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        def greet() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=greet, daemon=True)
        thread.start()
        url = f"grpc://127.0.0.1:{server.getsockname()[1]}/v2/models/m"
        with pytest.raises(EngineError, match="ServerMetadata was answered UNAVAILABLE") as caught:
            read_remote(url, QUICK)
        sentence(caught, url)
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)


@contextmanager
def process(port: int) -> Iterator[subprocess.Popen[bytes]]:
    script = Path(__file__).parents[1] / "grpc_server.py"
    one = subprocess.Popen([sys.executable, str(script), str(port)])
    try:
        yield one
    finally:
        one.kill()
        one.wait()


def test_a_server_that_is_killed_and_comes_back() -> None:
    """In the middle of a stream, every answer its own; and without patience a sentence."""
    with socket.create_server(("127.0.0.1", 0)) as placeholder:
        port = placeholder.getsockname()[1]
    url, options = f"grpc://127.0.0.1:{port}/v2/models/m%20n", RemoteOptions(timeout=10, patience=60)
    batches = [toy_images(3, seed=number) for number in range(60)]
    answers = []
    with process(port) as first:
        model = read_remote(url, options)
        with RemoteEngine(model, options) as engine:
            stream = engine.stream(batches)
            answers += [next(stream) for _ in range(20)]
            first.kill()
            first.wait()
            with process(port):
                answers += list(stream)
            with RemoteEngine(model, QUICK) as lost, pytest.raises(EngineError, match=r"UNAVAILABLE.*; tried") as caught:
                lost(batches[0])
    sentence(caught, url)
    for batch, logits in zip(batches, answers, strict=True):
        np.testing.assert_array_equal(logits, toy_logits(batch))


def changed(raw: bytes | None = None, **changes: Any) -> Callable[[Any], Any]:
    """A right answer with its output or its bytes changed."""
    def answer(images: Any) -> Any:
        found = right_answer(images)
        for key, value in changes.items():
            if key == "shape":
                found.outputs[0].shape[:] = value
            else:
                setattr(found.outputs[0], key, value)
        if raw is not None:
            found.raw_output_contents[0] = raw
        return found

    return answer


def twice(images: Any) -> Any:
    found = right_answer(images)
    found.MergeFrom(right_answer(images))
    return found


def numbers(value: float, count: int = 10) -> bytes:
    return np.full(count, value, "<f4").tobytes()


ANSWERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "empty": (lambda images: Response(), "'outputs' must be a list"),
    "another output": (changed(name="other"), "expected scores alone"),
    "two outputs": (twice, "at most 10 are taken"),
    "another datatype": (changed(datatype="INT64"), "datatype must be"),
    "bytes of pixels": (changed(datatype="UINT8", raw=b"x" * 10), r"answered uint8 \[2, 5\]"),
    "too few": (changed(shape=[1, 5], raw=numbers(0, 5)), r"answered float32 \[1, 5\], expected float32 \[2, 5\]"),
    "too many": (changed(shape=[3, 5], raw=numbers(0, 15)), "at most 10 are taken"),
    "other classes": (changed(shape=[2, 4], raw=numbers(0, 8)), r"\[2, 4\]"),
    "a shape that lies": (changed(shape=[2, 500]), "at most 10 are taken"),
    "a huge shape": (changed(shape=[2**40, 2**40]), "whole numbers of at least 0"),
    "a negative shape": (changed(shape=[-2, 5]), "whole numbers of at least 0"),
    "NaN": (changed(raw=numbers(np.nan)), "not finite"),
    "infinity": (changed(raw=numbers(np.inf)), "not finite"),
    "half of the bytes": (changed(raw=numbers(0, 5)), "has 40 bytes"),
    "bytes of nothing": (lambda images: Response(raw_output_contents=[b"x"]), "0 tensors were announced, and the bytes of 1"),
    "a megabyte": (changed(raw=b"x" * (1 << 20)), "more than 65856 bytes"),
    "too much to receive": (changed(raw=b"x" * (LARGEST + 1)), "larger than max"),
    "control characters": (changed(name="\x1b[31m\n"), "expected scores alone"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_that_cannot_be_used(name: str) -> None:
    answer, message = ANSWERS[name]
    options = RemoteOptions(timeout=20.0, patience=0.5)
    with running(Fake(answer=answer)) as fake, opened(fake, options) as engine:
        with pytest.raises(EngineError, match=message) as caught:
            engine(toy_images(2))
        assert "\x1b" not in sentence(caught, fake.url)
        assert fake.requests == 1, "what is wrong stays wrong"


def test_bytes_that_are_no_message() -> None:
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: b"\xff\xff\xff\xff")
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"ServerMetadata": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(EngineError, match="ServerMetadata was not answered in the protocol's messages"):
            read_remote(f"grpc://127.0.0.1:{port}/v2/models/m", QUICK)
    finally:
        server.stop(0).wait(10)


METADATA: dict[str, tuple[Any, Any, str]] = {
    "nothing": ([], [], "as inputs: none; expected one tensor"),
    "two inputs": ([INPUT, INPUT], [OUTPUT], "as inputs: image UINT8"),
    "channels last": ([{**INPUT, "shape": [-1, 4, 4, 3]}], [OUTPUT], "as inputs"),
    "text": ([{**INPUT, "datatype": "BYTES"}], [OUTPUT], "BYTES"),
    "half floats": ([INPUT], [{**OUTPUT, "datatype": "FP16"}], "FP16"),
    "a negative size": ([{**INPUT, "shape": [-1, -7, 4, 4]}], [OUTPUT], "has no shape"),
}


@pytest.mark.parametrize("name", METADATA)
def test_models_that_are_not_supported(name: str) -> None:
    inputs, outputs, message = METADATA[name]
    with running(Fake(inputs=inputs, outputs=outputs)) as fake:
        with pytest.raises(EngineError, match=message) as caught:
            read_remote(fake.url, QUICK)
        sentence(caught, fake.url)


def test_closing_ends_what_is_on_its_way() -> None:
    with running(Fake(before=lambda number, context: time.sleep(1.5))) as fake:
        assert_closing_ends(opened(fake, RemoteOptions(timeout=60, patience=60)), toy_images(1))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """For 127.0.0.1, signed by itself."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


def test_tls(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    with running(Fake(), tls=(key.read_bytes(), cert.read_bytes())) as fake:
        options = RemoteOptions(timeout=5.0, patience=5.0, authority=cert)
        assert fake.url.startswith("grpcs://")
        with opened(fake, options) as engine:
            np.testing.assert_array_equal(engine(toy_images(2)), toy_logits(toy_images(2)))
            assert engine.describe()["tls"] is True
        with pytest.raises(EngineError, match="certificate is not trusted: self") as caught:
            read_remote(fake.url, QUICK)
        sentence(caught, fake.url)
        with pytest.raises(EngineError, match="UNAVAILABLE"):
            read_remote(fake.url.replace("grpcs", "grpc"), QUICK)
