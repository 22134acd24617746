"""A gRPC server of the published protocol (the generated code of tritonclient) that does what a test wants, on loopback.

As a script it serves the toy engine on a port until it is killed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from serving import TOY_CLASSES, TOY_SHAPE, toy_logits
from tritonclient.grpc import service_pb2, service_pb2_grpc

Response, Output = service_pb2.ModelInferResponse, service_pb2.ModelInferResponse.InferOutputTensor
INPUT = {"name": "image", "datatype": "UINT8", "shape": [-1, *TOY_SHAPE]}
OUTPUT = {"name": "scores", "datatype": "FP32", "shape": [-1, TOY_CLASSES]}


@dataclass
class Fake:
    """A server of one model, `m n`, of version 3.

    inputs, outputs: its metadata. answer: from the request's images to the answer; None for one that is right, as raw bytes.
    before: called with the number of the inference request and the call's context, which it may end.
    """

    inputs: Any = field(default_factory=lambda: [INPUT])
    outputs: Any = field(default_factory=lambda: [OUTPUT])
    answer: Callable[[Any], Any] | None = None
    before: Callable[[int, Any], None] | None = None
    token: str | None = None
    requests: int = 0
    open_now: int = 0
    most_open: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


def right_answer(images: Any) -> Any:
    logits = toy_logits(images)
    return Response(outputs=[Output(**{**OUTPUT, "shape": logits.shape})], raw_output_contents=[logits.astype("<f4").tobytes()])


class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, fake: Fake) -> None:
        self.fake = fake

    def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.check(context)
        return service_pb2.ServerMetadataResponse(name="other", version="7", extensions=["x"])

    def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.check(context)
        self.named(request.name, request.version, context)
        tensor = service_pb2.ModelMetadataResponse.TensorMetadata
        inputs, outputs = ([tensor(**one) for one in side] for side in (self.fake.inputs, self.fake.outputs))
        return service_pb2.ModelMetadataResponse(name="m n", versions=["3"], platform="p", inputs=inputs, outputs=outputs)

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        fake = self.fake
        self.check(context)
        self.named(request.model_name, request.model_version, context)
        with fake.lock:
            number, fake.requests = fake.requests, fake.requests + 1
            fake.open_now += 1
            fake.most_open = max(fake.most_open, fake.open_now)
        try:
            if fake.before is not None:
                fake.before(number, context)
            (tensor,), (raw,) = request.inputs, request.raw_input_contents
            dtype = {"UINT8": np.uint8, "FP32": np.dtype("<f4")}[tensor.datatype]
            images = np.frombuffer(raw, dtype).reshape(tensor.shape)
            return (fake.answer or right_answer)(images)
        finally:
            with fake.lock:
                fake.open_now -= 1

    def check(self, context: Any) -> None:
        shown = dict(context.invocation_metadata()).get("authorization")
        if self.fake.token is not None and shown != f"Bearer {self.fake.token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "a token is needed")

    def named(self, name: str, version: str, context: Any) -> None:
        if (name, version) not in (("m n", ""), ("m n", "3")):
            context.abort(grpc.StatusCode.NOT_FOUND, f"no model {name!r} of version {version!r}\n")


def started(fake: Fake, port: int = 0, tls: tuple[bytes, bytes] | None = None) -> Any:
    """tls: key and certificate, PEM."""
    server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(fake), server)
    where = f"127.0.0.1:{port}"
    bound = server.add_secure_port(where, grpc.ssl_server_credentials([tls])) if tls else server.add_insecure_port(where)
    fake.url = f"grpc{'s' if tls else ''}://127.0.0.1:{bound}/v2/models/m%20n"
    server.start()
    return server


@contextmanager
def running(fake: Fake, tls: tuple[bytes, bytes] | None = None) -> Iterator[Fake]:
    server = started(fake, tls=tls)
    try:
        yield fake
    finally:
        server.stop(0).wait(10)


if __name__ == "__main__":
    started(Fake(), int(sys.argv[1])).wait_for_termination()
