"""An engine somewhere else, behind the Open Inference Protocol: `edgeguard serve`, Triton, MLServer and others.

What a server says is not trusted: metadata and answers are bounded before they are read and checked before they are used, and
whatever is wrong with them is an `EngineError` of one sentence. Over HTTP standard library and NumPy only; gRPC is an extra.

What is asked of a server: a model with one input of three colours, (N, 3, H, W), as UINT8 or FP32, and one output (N, classes)
of FP32. FP32 gets grey levels from 0 to `RemoteOptions.pixel_max`. Images as (N, H, W, 3), normalized pixels, several
inputs or outputs, other datatypes, and text are not supported.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import EngineError, InputError
from edgeguard.open_inference import BINARY_EXTENSION, Bounds, Spec, Tensor, read_specs
from edgeguard.targets import BaseEngine, Images, Logits, check_images
from edgeguard.targets.asking import Address, Client, Question, RemoteOptions, printable
from edgeguard.targets.http_client import HttpClient

MOST_CLASSES = 1 << 20
DIGITS = 32
"""Bytes of a number in JSON."""


@dataclass(frozen=True)
class RemoteModel:
    """A model as its server describes it.

    pixels, logits: its input and output; -1 where the server leaves a size open. binary: whether the server takes tensors as
    bytes. server: its own name and version. claims: what an `edgeguard serve` says of the engine, plain text and numbers;
    empty for others.
    """

    address: Address
    pixels: Spec
    logits: Spec
    binary: bool
    server: str
    platform: str
    claims: dict[str, Any]

    @property
    def input_shape(self) -> tuple[int, int, int] | None:
        """(3, H, W), or None where the server leaves the size of images open."""
        channels, height, width = self.pixels.shape[1:]
        return None if min(height, width) < 1 else (channels, height, width)

    @property
    def transport(self) -> str:
        """How tensors travel."""
        return "gRPC" if self.address.grpc else "binary tensors" if self.binary else "JSON"

    @property
    def max_batch(self) -> int | None:
        """Images of one request that the server says it takes."""
        value = self.claims.get("max_batch_size")
        return value if type(value) is int and value > 0 else None

    def identity(self) -> dict[str, Any]:
        """What tells this model from others: its address and all that the server says of it."""
        tensors = [self.pixels.document(), self.logits.document()]
        return {
            "url": self.address.url, "server": self.server, "platform": self.platform, "tensors": tensors, "claims": self.claims,
        }  # fmt: skip


def read_remote(url: str, options: RemoteOptions | None = None) -> RemoteModel:
    """Ask a server for its description of a model.

    url: `http://HOST:PORT/v2/models/NAME`, or https, grpc, grpcs; `/versions/VERSION` behind the name may be there, and over
    HTTP a prefix before /v2.

    Raises:
        InputError: another URL. MissingDependency: gRPC is not installed.
        EngineError: the server cannot be reached or does not speak the protocol, or the model is not of images to logits.
    """
    options = options or RemoteOptions()
    address = Address.parse(url)
    with open_client(address, options) as client:
        try:
            server, found = client.server(), client.model()
            inputs, outputs = read_specs(found, "inputs"), read_specs(found, "outputs")
        except InputError as exc:
            raise EngineError(f"{address.url}: {printable(exc)}") from exc
    extensions = server.get("extensions")
    binary = address.grpc or (isinstance(extensions, list) and BINARY_EXTENSION in extensions)
    named = " ".join(str(server[key])[:60] for key in ("name", "version") if isinstance(server.get(key), str))
    claims = found.get("parameters") if server.get("name") == "edgeguard" else None
    plain = {printable(key): printable(value) if isinstance(value, str) else value
             for key, value in (claims if isinstance(claims, dict) else {}).items()
             if isinstance(value, str) or (type(value) is int and abs(value) < 1 << 53)}  # fmt: skip
    platform = found.get("platform")
    return RemoteModel(address, *_checked(inputs, outputs, address), binary, printable(named or "unnamed"),
                        printable(platform if isinstance(platform, str) else "unknown"), plain)  # fmt: skip


def open_client(address: Address, options: RemoteOptions) -> Client:
    """What asks over the address's protocol.

    Raises:
        InputError: certificates that cannot be read. MissingDependency: gRPC is not installed.
    """
    if not address.grpc:
        return HttpClient(address, options)
    from edgeguard.targets.grpc_client import GrpcClient

    return GrpcClient(address, options)


def _checked(inputs: list[Spec], outputs: list[Spec], address: Address) -> tuple[Spec, Spec]:
    """The model's input and output, if they are those of an image classifier."""
    def refuse(what: str, found: list[Spec], wanted: str) -> EngineError:
        listed = "; ".join(f"{one.name} {one.datatype} {list(one.shape)}" for one in found[:4]) or "none"
        return EngineError(f"{address.url}: the server's metadata names as {what}: {printable(listed)}; expected {wanted}")

    wanted = "one tensor (N, 3, H, W) of UINT8 or FP32"
    if len(inputs) != 1 or inputs[0].datatype not in ("UINT8", "FP32") or len(inputs[0].shape) != 4:
        raise refuse("inputs", inputs, wanted)
    if inputs[0].shape[1] not in (3, -1) or inputs[0].shape[0] not in (-1, 0):
        raise refuse("inputs", inputs, f"{wanted} with N open (-1)")
    if len(outputs) != 1 or outputs[0].datatype != "FP32" or len(outputs[0].shape) != 2 or outputs[0].shape[1] > MOST_CLASSES:
        raise refuse("outputs", outputs, "one tensor (N, classes) of FP32")
    batch, _, height, width = inputs[0].shape
    return replace(inputs[0], shape=(batch, 3, height, width)), outputs[0]


class RemoteEngine(BaseEngine):
    """A model on a server, behind the `Engine` protocol.

    A call is one request, or several where the server takes fewer images at a time. `stream` keeps several requests on their
    way, each on a connection of its own that is used again. Requests of a connection that is lost, and those that the server
    turns away for now, are repeated until `RemoteOptions.patience` is spent; an answer depends on the request alone, so that
    is safe.
    """

    name = "remote"

    def __init__(
        self, model: RemoteModel, options: RemoteOptions | None = None, input_shape: tuple[int, int, int] | None = None
    ) -> None:  # fmt: skip
        """input_shape: (3, H, W), needed where the server leaves the size of images open.

        Raises:
            InputError: images of another shape than the server's, or of none that is known.
            EngineError: the server does not answer as it should.
        """
        shape = model.input_shape or input_shape
        if shape is None:
            raise InputError(f"{model.address.url} leaves the size of images open; give images, or a twin, of one size")
        if input_shape is not None and shape != input_shape:
            raise InputError(f"{model.address.url} takes images of {shape}, and those at hand are of {input_shape}")
        super().__init__(shape, max(model.logits.shape[1], 0))
        self.model, self.options = model, options or RemoteOptions()
        self._client = open_client(model.address, self.options)
        self._pool = ThreadPoolExecutor(self.options.in_flight, "remote")
        if self.num_classes == 0:
            try:
                self.num_classes = self._ask(np.zeros((1, *shape), np.uint8)).shape[1]
            except BaseException:
                self.close()
                raise

    def stream(self, batches: Iterable[Images]) -> Iterator[Logits]:
        """The logits of each batch, in their order, with several requests on their way. Raises as a call."""
        waiting: deque[list[Future[Logits]]] = deque()
        try:
            for batch in batches:
                if self._closed:
                    raise EngineError(f"the {self.name} engine is closed")
                check_images(batch, self.input_shape)
                waiting.append(self._send(batch))
                while sum(map(len, waiting)) > self.options.in_flight:
                    yield self._received(waiting.popleft())
            while waiting:
                yield self._received(waiting.popleft())
        finally:
            for future in (one for futures in waiting for one in futures):
                future.cancel()

    def _logits(self, images: Images) -> Logits:
        return self._received(self._send(images))

    def _send(self, images: Images) -> list[Future[Logits]]:
        """Requests for checked images, as many at a time as the server takes."""
        step = self.model.max_batch or len(images)
        return [self._pool.submit(self._ask, images[start : start + step]) for start in range(0, len(images), step)]

    def _received(self, futures: list[Future[Logits]]) -> Logits:
        try:
            return np.concatenate([future.result() for future in futures])
        finally:
            for future in futures:
                future.cancel()

    def _ask(self, images: Images) -> Logits:
        """One request."""
        model = self.model
        values: NDArray[Any] = np.ascontiguousarray(images)
        if model.pixels.datatype == "FP32":
            values = values.astype(np.float32) * np.float32(self.options.pixel_max / 255)
        classes = self.num_classes or MOST_CLASSES
        bounds = Bounds.of((len(images), classes), DIGITS * len(images) * classes + (64 << 10))
        try:
            tensors = self._client.infer(Question(model.pixels.name, values, model.logits.name, model.binary, bounds))
        except InputError as exc:
            raise EngineError(f"{model.address.url} gave an answer that cannot be used: {printable(exc)}") from exc
        return self._checked(tensors, len(images))

    def _checked(self, tensors: list[Tensor], count: int) -> Logits:
        """The logits of an answer."""
        where = self.model.address.url
        if len(tensors) != 1 or tensors[0].name != self.model.logits.name:
            names = ", ".join(tensor.name for tensor in tensors[:4])
            raise EngineError(f"{where} answered with {printable(names)}, expected {printable(self.model.logits.name)} alone")
        values = tensors[0].values
        classes = self.num_classes or (values.shape[1] if values.ndim == 2 else 0)
        if values.dtype != np.float32 or values.shape != (count, classes) or classes < 2:
            raise EngineError(f"{where} answered {values.dtype.name} {list(values.shape)}, expected float32 "
                              f"[{count}, {self.num_classes or 'classes'}]")  # fmt: skip
        return values.astype(np.float32)

    def describe(self) -> dict[str, Any]:
        """Nothing of this machine: what the server says, which nothing here can check."""
        model = self.model
        return {
            "runtime": self.name, "url": model.address.url, "server": model.server, "platform": model.platform,
            "transport": model.transport, "tls": model.address.tls, "threads": None,
            "provider": "the server's own", "version": model.server, "claims": dict(model.claims),
        }  # fmt: skip

    def close(self) -> None:
        super().close()
        self._client.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
