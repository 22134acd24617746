"""The Open Inference Protocol over gRPC, asked of one server that may be slow, broken, or hostile. Needs the extra `grpc`.

Tensors travel as raw bytes; answers may also hold them as numbers. What is read goes through the checks of the same protocol
over HTTP.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from edgeguard.errors import EngineError, InputError, require
from edgeguard.open_inference import DTYPES, Bounds, Tensor, datatype_of, read_tensors
from edgeguard.targets.asking import METADATA, Address, Again, Client, Question, RemoteOptions, printable, trusted
from edgeguard.targets.grpc_messages import EXTRA, SERVICE, messages

LARGEST = 64 << 20
"""Bytes of an answer that are received at all; what an answer may have is less, and checked before it is parsed."""
AGAIN = ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED")
"""Status codes of a server that cannot answer now, or of a connection that is lost."""
TOO_LARGE, UNTRUSTED = "larger than max", "CERTIFICATE_VERIFY_FAILED"
"""What gRPC says in a status's details, for which there is no code."""
OPTIONS = {
    "grpc.enable_retries": 0, "grpc.enable_http_proxy": 0, "grpc.service_config_disable_resolution": 1,
    "grpc.use_local_subchannel_pool": 1, "grpc.max_receive_message_length": LARGEST, "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 1000,
}  # fmt: skip
"""Requests are repeated by `Client` alone, and go straight to the server; a lost one is looked for every second."""


class GrpcClient(Client):
    """One channel, on which all requests travel."""

    def __init__(self, address: Address, options: RemoteOptions) -> None:
        """Raises InputError where the file of trusted certificates cannot be read, MissingDependency without gRPC."""
        super().__init__(address, options)
        self._grpc = require("grpc", EXTRA)
        self._messages = messages()
        self._model = {"name": unquote(address.model), "version": unquote(address.version.removeprefix("/versions/"))}
        where, settings = f"dns:///{address.authority}", list(OPTIONS.items())
        if address.tls:
            trust = self._grpc.ssl_channel_credentials(_certificates(options.authority))
            self._channel = self._grpc.secure_channel(where, trust, settings)
        else:
            self._channel = self._grpc.insecure_channel(where, settings)

    def server(self) -> dict[str, Any]:
        found = self._call("ServerMetadata", {}, METADATA)
        return {"name": found.name, "version": found.version, "extensions": list(found.extensions)}

    def model(self) -> dict[str, Any]:
        found = self._call("ModelMetadata", self._model, METADATA)
        return {"platform": found.platform, "inputs": _specs(found.inputs), "outputs": _specs(found.outputs)}

    def infer(self, question: Question) -> list[Tensor]:
        values, datatype = question.values, datatype_of(question.values)
        tensor = {"name": question.name, "datatype": datatype, "shape": values.shape}
        request = {
            "model_name": self._model["name"], "model_version": self._model["version"], "inputs": [tensor],
            "raw_input_contents": [values.astype(DTYPES[datatype], order="C", copy=False).tobytes()],
        }  # fmt: skip
        found = self._call("ModelInfer", request, question.bounds, len(values))
        raw = list(found.raw_output_contents) or [_bytes(one.contents) for one in found.outputs]
        if len(raw) != len(found.outputs):
            raise InputError(f"{len(found.outputs)} tensors were announced, and the bytes of {len(raw)} follow")
        entries = [
            {"name": one.name, "datatype": one.datatype, "shape": list(one.shape), "parameters": {"binary_data_size": len(blob)}}
            for one, blob in zip(found.outputs, raw, strict=True)
        ]
        return read_tensors({"outputs": entries}, "outputs", memoryview(b"".join(raw)), question.bounds)

    def close(self) -> None:
        """Cancel every request, also those that are waited on."""
        super().close()
        self._channel.close()

    def _call(self, method: str, request: dict[str, Any], bounds: Bounds, cost: int = 0) -> Any:
        """The message that a method answers with, of at most `bounds.body` bytes; asked again where that is sensible."""
        body: bytes = self._messages[f"{method}Request"](**request).SerializeToString()
        answer = self._repeat(lambda: self._once(method, body), cost)
        if len(answer) > bounds.body:
            raise EngineError(f"{self._address.url} gave an answer of more than {bounds.body} bytes, which none can have")
        message = require("google.protobuf.message", EXTRA)
        try:
            return self._messages[f"{method}Response"].FromString(answer)
        except message.DecodeError as exc:
            raise EngineError(f"{self._address.url}: {method} was not answered in the protocol's messages") from exc

    def _once(self, method: str, body: bytes) -> bytes:
        token, seconds = self._options.token, self._options.timeout
        metadata = [("user-agent", "edgeguard"), *([] if token is None else [("authorization", f"Bearer {token}")])]
        if self._closing.is_set():
            raise self._closed()
        try:
            answer: bytes = self._channel.unary_unary(f"/{SERVICE}/{method}")(body, timeout=seconds, metadata=metadata)
        except self._grpc.RpcError as exc:
            raise self._failure(exc, method) from exc
        except ValueError as exc:  # the channel was closed
            raise self._closed() from exc
        return answer

    def _failure(self, exc: Any, method: str) -> Exception:
        """What a status means."""
        code, details = exc.code().name, exc.details() or ""
        said = f": {printable(details)}" if details else ""
        if self._closing.is_set():
            return self._closed()
        if code == "DEADLINE_EXCEEDED":
            return Again(f"no whole answer came within {self._options.timeout:g} s")
        if UNTRUSTED in details:
            reason = printable(details.partition(UNTRUSTED)[2])
            return EngineError(f"{self._address.url}: the server's certificate is not trusted{reason}")
        if code in AGAIN and TOO_LARGE not in details:
            return Again(f"{method} was answered {code}{said}")
        return EngineError(f"{self._address.url}: {method} was answered {code}{said}")


def _specs(found: Any) -> list[dict[str, Any]]:
    """As metadata in JSON names tensors."""
    return [{"name": one.name, "datatype": one.datatype, "shape": list(one.shape)} for one in found]


def _bytes(contents: Any) -> bytes:
    """Of numbers that were sent one by one."""
    return np.array(contents.fp32_contents, DTYPES["FP32"]).tobytes()


def _certificates(authority: Path | None) -> bytes | None:
    """PEM of what TLS trusts; None where only gRPC knows some."""
    context = trusted(authority)
    if authority is not None:
        return authority.read_bytes()
    found = "".join(map(ssl.DER_cert_to_PEM_cert, context.get_ca_certs(binary_form=True)))
    return found.encode() or None
