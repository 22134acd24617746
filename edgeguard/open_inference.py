"""Messages of the Open Inference Protocol, version 2: tensors as JSON or as bytes behind it. NumPy only.

What servers and clients share. A message is a JSON object, and with the binary tensor data extension the bytes of tensors
after it; the HTTP header `HEADER` then says where the JSON ends. Whatever is read was written by somebody else: sizes are
bounded before anything is built from them, and what is wrong is an `InputError` of one sentence.

Sources: KServe, "Open Inference Protocol (V2)"; Triton Inference Server, "Binary Tensor Data Extension".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import InputError

HEADER = "Inference-Header-Content-Length"
BINARY_EXTENSION = "binary_tensor_data"
DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType({"UINT8": np.dtype("u1"), "FP32": np.dtype("<f4")})
"""The datatypes that are understood, and how their bytes lie."""
DEEPEST, MOST_DIMENSIONS, LONGEST_NAME, MOST_QUOTES = 16, 8, 200, 20_000
SPARE = 256
"""Values and lists that a message may have besides those of its tensors."""
_STRUCTURE = re.compile(rb'"[^"]*"|[\[\]{}]')
"""Of text without escapes. A pattern that knew them would remember every one of its steps: gigabytes for a long string."""


class TooLarge(InputError):  # noqa: N818
    """A message is larger than what it could be about."""


@dataclass(frozen=True)
class Spec:
    """A tensor as a model's metadata names it. shape: -1 where any size fits."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def document(self) -> dict[str, Any]:
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of a message. parameters: as they stood beside it."""

    name: str
    values: NDArray[Any]
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Bounds:
    """What a message may hold at most, known before it is read.

    values: numbers of all its tensors. lists: arrays and objects within each other or side by side. body: bytes.
    """

    values: int
    lists: int
    body: int

    @staticmethod
    def of(shape: Sequence[int], body: int) -> Bounds:
        """For one tensor of at most this shape, nested or flat."""
        lists = sum(math.prod(shape[:axis]) for axis in range(len(shape)))
        return Bounds(math.prod(shape), lists, body)


def datatype_of(values: NDArray[Any]) -> str:
    """How the protocol calls the type of an array."""
    return next(name for name, dtype in DTYPES.items() if dtype == values.dtype.newbyteorder("<"))


def write_message(
    document: Mapping[str, Any], key: str, tensors: Mapping[str, NDArray[Any]], binary: bool | Sequence[str] = False
) -> tuple[bytes, int | None]:
    """A body, and the length of the JSON in it when bytes follow.

    Args:
        document: what stands beside the tensors. key: `inputs` or `outputs`, where they are put.
        binary: all of them as bytes, none, or those of these names.
    """
    entries: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for name, values in tensors.items():
        entry: dict[str, Any] = {"name": name, "datatype": datatype_of(values), "shape": list(values.shape)}
        if binary is True or (binary is not False and name in binary):
            blobs.append(values.astype(DTYPES[entry["datatype"]], order="C", copy=False).tobytes())
            entry["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            entry["data"] = values.ravel().tolist()
        entries.append(entry)
    head = json.dumps({**document, key: entries}, separators=(",", ":"), allow_nan=False).encode()
    return b"".join([head, *blobs]), len(head) if blobs else None


def read_message(body: bytes, header_length: str | None, bounds: Bounds) -> tuple[dict[str, Any], memoryview]:
    """The JSON object of a body, and the bytes behind it.

    header_length: the value of `HEADER`, or None where the body is JSON alone.

    Raises:
        InputError: not JSON, not an object, or a length that does not fit; `TooLarge` where it exceeds the bounds.
    """
    if len(body) > bounds.body:
        raise TooLarge(f"the body has {len(body)} bytes; at most {bounds.body} are taken")
    size = len(body)
    if header_length is not None:
        if not re.fullmatch(r"[0-9]{1,12}", header_length) or int(header_length) > len(body):
            raise InputError(f"{HEADER} must be a number of at most the {len(body)} bytes of the body, got {header_length!r:.40}")
        size = int(header_length)
    view = memoryview(body)
    return read_object(body if size == len(body) else bytes(view[:size]), bounds), view[size:]


def read_object(text: bytes, bounds: Bounds) -> dict[str, Any]:
    """A JSON object whose size is bounded before it is built; raises as `read_message`."""
    lists, commas = text.count(b"[") + text.count(b"{"), text.count(b",")
    if lists > bounds.lists + SPARE or commas > bounds.values + bounds.lists + SPARE or text.count(b"\"") > MOST_QUOTES:
        raise TooLarge(f"the JSON holds more than the {bounds.values} numbers that it can be about, or too many lists or strings")
    _check_depth(text)
    try:
        document = json.loads(text.decode(), parse_constant=_refuse)  # given bytes, it would guess other encodings
    except (ValueError, RecursionError) as exc:  # not UTF-8 is a ValueError, too
        raise InputError(f"the body is not valid JSON: {exc!s:.120}") from exc
    if not isinstance(document, dict):
        raise InputError(f"the body must be a JSON object, got {type(document).__name__}")
    return document


def read_tensors(document: Mapping[str, Any], key: str, blob: memoryview, bounds: Bounds) -> list[Tensor]:
    """The tensors of a message that was read.

    Raises:
        InputError: a name, datatype, shape, size or value that is wrong, or bytes that belong to no tensor.
    """
    entries = document.get(key)
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{key!r} must be a list of at least one tensor")
    found, start, total = [], 0, 0
    for entry in entries:
        name, dtype, shape, parameters = _head(entry, key)
        count = math.prod(shape)
        total += math.prod(max(size, 1) for size in shape)  # NumPy bounds the product of the others, beside a zero too
        if total > bounds.values:
            raise TooLarge(f"{key} of {total} values were announced; at most {bounds.values} are taken")
        size = parameters.get("binary_data_size")
        if size is None:
            values = _from_json(entry.get("data"), name, dtype, shape)
        else:
            if type(size) is not int or size != count * dtype.itemsize or "data" in entry:
                raise InputError(f"tensor {name!r}: {shape} {dtype.name} has {count * dtype.itemsize} bytes and no 'data', "
                                 f"got binary_data_size {size!r:.30}")  # fmt: skip
            if start + size > len(blob):
                raise InputError(f"tensor {name!r}: {size} bytes were announced, {len(blob) - start} follow")
            values = np.frombuffer(blob[start : start + size], dtype).reshape(shape)
            start += size
        if dtype.kind == "f" and not np.isfinite(values).all():
            raise InputError(f"tensor {name!r} holds values that are not finite")
        found.append(Tensor(name, values, parameters))
    if start != len(blob):
        raise InputError(f"{len(blob) - start} bytes of the body belong to no tensor")
    return found


def read_specs(document: Mapping[str, Any], key: str) -> list[Spec]:
    """The tensors that a model's metadata names under `inputs` or `outputs`; raises InputError where they are malformed."""
    entries = document.get(key)
    if not isinstance(entries, list):
        raise InputError(f"{key!r} of the metadata is not a list")
    found = []
    for entry in entries:
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS or any(type(size) is not int or size < -1 for size in shape):
            raise InputError(f"a tensor among the {key} of the metadata has no shape: {entry!r:.80}")
        if not isinstance(entry.get("name"), str) or not isinstance(entry.get("datatype"), str):
            raise InputError(f"a tensor among the {key} of the metadata has no name or datatype: {entry!r:.80}")
        found.append(Spec(entry["name"], entry["datatype"], tuple(shape)))
    return found


def _check_depth(text: bytes) -> None:
    depth = 0
    if b"\\" in text:
        text = text.replace(rb"\\", b"").replace(rb'\"', b"")
    for match in _STRUCTURE.finditer(text):
        sign = match[0]
        if sign in b"[{":
            depth += 1
            if depth > DEEPEST:
                raise TooLarge(f"the JSON is nested deeper than {DEEPEST} levels")
        elif sign in b"]}":
            depth -= 1


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _head(entry: Any, key: str) -> tuple[str, np.dtype[Any], tuple[int, ...], dict[str, Any]]:
    """Name, type, shape and parameters of a tensor."""
    if not isinstance(entry, dict):
        raise InputError(f"an entry of {key!r} must be an object, got {type(entry).__name__}")
    name, datatype, shape, parameters = (entry.get(part) for part in ("name", "datatype", "shape", "parameters"))
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME:
        raise InputError(f"a tensor of {key!r} needs a name of 1 to {LONGEST_NAME} characters, got {name!r:.60}")
    if not isinstance(datatype, str) or datatype not in DTYPES:
        raise InputError(f"tensor {name!r:.60}: datatype must be {' or '.join(DTYPES)}, got {datatype!r:.40}")
    if not isinstance(shape, list) or not 0 < len(shape) <= MOST_DIMENSIONS:
        raise InputError(f"tensor {name!r:.60}: shape must be a list of 1 to {MOST_DIMENSIONS} sizes, got {shape!r:.60}")
    if any(type(size) is not int or not 0 <= size < 1 << 31 for size in shape):
        raise InputError(f"tensor {name!r:.60}: sizes must be whole numbers of at least 0, got {shape!r:.60}")
    if parameters is not None and not isinstance(parameters, dict):
        raise InputError(f"tensor {name!r:.60}: parameters must be an object, got {type(parameters).__name__}")
    return name, DTYPES[datatype], tuple(shape), parameters or {}


def _from_json(data: Any, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Numbers in a flat list, or in lists nested as the shape is."""
    if not isinstance(data, list):
        raise InputError(f"tensor {name!r:.60}: it has neither 'data' nor 'binary_data_size'")
    values = data
    if values and isinstance(values[0], list):
        if len(values) != shape[0]:
            raise InputError(f"tensor {name!r:.60}: {len(values)} lists, where the shape {shape} asks for {shape[0]}")
        for size in shape[1:]:
            if set(map(type, values)) != {list} or set(map(len, values)) != {size}:
                raise InputError(f"tensor {name!r:.60}: its lists are not nested as the shape {shape} is")
            values = list(chain.from_iterable(values))
    if len(values) != math.prod(shape):
        raise InputError(f"tensor {name!r:.60}: {len(values)} values, where the shape {shape} asks for {math.prod(shape)}")
    kinds = set(map(type, values))
    try:
        if dtype.kind == "u" and kinds <= {int}:
            return np.frombuffer(bytes(values), dtype).reshape(shape)
        if dtype.kind == "f" and kinds <= {int, float}:
            with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused as such
                return np.array(values, np.float64).astype(dtype).reshape(shape)
    except (ValueError, OverflowError) as exc:
        raise InputError(f"tensor {name!r:.60}: a value is out of the range of {dtype.name}") from exc
    expected, got = "whole numbers from 0 to 255" if dtype.kind == "u" else "numbers", sorted(kind.__name__ for kind in kinds)
    raise InputError(f"tensor {name!r:.60}: {dtype.name} takes {expected}, got {', '.join(got)}")
