"""Reading an ONNX file that anybody may have made: sizes are checked before memory is taken, paths before files are opened.

Messages quote names with `repr`, so that no control character of a file reaches a terminal.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from onnx import TensorProto

from edgeguard.errors import InputError
from edgeguard.export.kernels import BITS, subgraphs

LIMIT = 1 << 30
"""Bytes that a file and its external data may have together; the runtime's optimized copy must fit protobuf's 2 GiB."""
MAX_RANK = 32
FOREIGN_BITS = BITS | {
    TensorProto.UINT32: 32, TensorProto.INT64: 64, TensorProto.UINT64: 64, TensorProto.BOOL: 8,
    TensorProto.COMPLEX64: 64, TensorProto.COMPLEX128: 128, TensorProto.FLOAT4E2M1: 4, TensorProto.FLOAT8E4M3FN: 8,
    TensorProto.FLOAT8E4M3FNUZ: 8, TensorProto.FLOAT8E5M2: 8, TensorProto.FLOAT8E5M2FNUZ: 8,
    TensorProto.FLOAT8E8M0: 8,
}  # fmt: skip
"""Storage bits of every type that a foreign file may hold."""
TYPED = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
RUNTIME_MEMORY = "_ORT_MEM_ADDR_"
"""The runtime takes external data of this location for an address in its own memory."""


@dataclass(frozen=True)
class StoredFile:
    """A model as its file has it, external data not read.

    size: bytes of the file and of its external data. elements: numbers in all of its tensors.
    """

    path: Path
    model: onnx.ModelProto
    size: int
    elements: int


def file_size(path: Path) -> int:
    """Bytes of a plain file.

    Raises:
        InputError: not there, no plain file, empty, or larger than `LIMIT`.
    """
    try:
        status = path.stat()
    except OSError as exc:
        raise InputError(f"cannot read {str(path)!r}: {exc.strerror or exc}; expected an ONNX file") from exc
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{str(path)!r} is not a plain file; expected an ONNX file")
    if status.st_size == 0:
        raise InputError(f"{str(path)!r} is empty; expected an ONNX model")
    if status.st_size > LIMIT:
        raise InputError(f"{str(path)!r} has {status.st_size:,} bytes; at most {LIMIT:,} are read")
    return status.st_size


def read_model(path: Path) -> StoredFile:
    """Parse an ONNX file and hold everything that it declares against what is there.

    Raises:
        InputError: see `file_size`; no ONNX model; a tensor declares more or less than it holds; external data outside
            the model's folder, missing, or too short.
    """
    size = file_size(path)
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except OSError as exc:
        raise InputError(f"cannot read {str(path)!r}: {exc.strerror or exc}") from exc
    except MemoryError:
        raise
    except Exception as exc:  # protobuf's own, whose class depends on its implementation
        raise InputError(f"{str(path)!r} is not an ONNX model: it is truncated or another kind of file") from exc
    if not model.graph.node:
        raise InputError(f"{str(path)!r} is not an ONNX model: it has no operations")
    if not all(isinstance(text, str) for text in _texts(model)):  # protobuf hands out bytes then
        raise InputError(f"{str(path)!r} is not a valid ONNX model: a name in it is not UTF-8")
    external = sum(_check_tensor(tensor, path) for tensor in tensors(model))
    if size + external > LIMIT:
        raise InputError(f"{str(path)!r} and its external data have more than {LIMIT:,} bytes, which is the limit")
    return StoredFile(path, model, size + external, sum(math.prod(tensor.dims) for tensor in tensors(model)))


def _texts(model: onnx.ModelProto) -> Iterator[object]:
    """Every name that is looked at or shown."""
    graphs, nodes = [model.graph], [node for function in model.functions for node in function.node]
    for function in model.functions:
        yield from (function.name, function.domain)
    for tensor in tensors(model):
        yield tensor.name
        yield from (text for entry in tensor.external_data for text in (entry.key, entry.value))
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            nodes += graph.node
            yield from (value.name for value in (*graph.input, *graph.output))
            continue
        node = nodes.pop()
        graphs += subgraphs(node)
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a file stores: initializers and attributes, in subgraphs and functions too."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from _sparse_tensors(sparse)
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from _sparse_tensors(sparse)
    for body in subgraphs(node):
        yield from _graph_tensors(body)


def _sparse_tensors(sparse: onnx.SparseTensorProto) -> Iterator[onnx.TensorProto]:
    """The values and indices; the dense tensor that they stand for is bounded by their limit."""
    if not sparse.dims:
        return
    if _elements(sparse.values.name, sparse.dims) > LIMIT // 8:
        raise InputError(f"the sparse tensor {sparse.values.name!r:.100} of shape {_shape(sparse.dims)} is too large to unpack")
    yield sparse.values
    yield sparse.indices


def _elements(name: str, dims: list[int]) -> int:
    if len(dims) > MAX_RANK or min(dims, default=0) < 0:
        raise InputError(f"the tensor {name!r:.100} has an impossible shape {_shape(dims)}")
    return math.prod(dims)


def _shape(dims: list[int]) -> str:
    return f"({', '.join(map(str, dims[:8]))}{', ...' if len(dims) > 8 else ''})"


def _check_tensor(tensor: onnx.TensorProto, path: Path) -> int:
    """Refuse a tensor that is not what it declares. Returns: bytes of it that are in another file."""
    elements = _elements(tensor.name, tensor.dims)
    if tensor.data_type == TensorProto.STRING:
        if len(tensor.string_data) != elements:
            raise InputError(f"the tensor {tensor.name!r:.100} declares {elements:,} strings and holds "
                             f"{len(tensor.string_data):,}")  # fmt: skip
        return 0
    if tensor.data_type not in FOREIGN_BITS:
        raise InputError(f"the tensor {tensor.name!r:.100} has the unknown data type {tensor.data_type}")
    bits = FOREIGN_BITS[tensor.data_type]
    declared = (elements * bits + 7) // 8
    if tensor.data_location == TensorProto.EXTERNAL:
        return _check_external(tensor, declared, path)
    if tensor.HasField("raw_data"):
        held = len(tensor.raw_data)
    else:
        entries = max(len(getattr(tensor, field)) for field in TYPED)
        pairs = 2 if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else 1
        held = entries if bits < 8 else entries * bits // (8 * pairs)
    if held != declared:
        raise InputError(f"the tensor {tensor.name!r:.100} declares {declared:,} bytes of shape {_shape(tensor.dims)} "
                         f"and holds {held:,}")  # fmt: skip
    return 0


def _check_external(tensor: onnx.TensorProto, declared: int, path: Path) -> int:
    """Refuse external data that is not a plain file within the model's folder, or too short."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location, name = entries.get("location", ""), tensor.name
    parts = PurePosixPath(location).parts
    if (
        not location or "\0" in location or RUNTIME_MEMORY in location or ".." in parts or "\\" in location
        or PurePosixPath(location).is_absolute() or PureWindowsPath(location).drive
    ):  # fmt: skip
        raise InputError(f"the tensor {name!r:.100} keeps its data at {location!r:.200}; only files within the model's folder "
                         "are read")  # fmt: skip
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries.get("length") or declared)
    except ValueError as exc:
        raise InputError(f"the tensor {name!r:.100} has an offset or length that is not a number") from exc
    folder = path.parent.resolve()
    file = folder.joinpath(*parts)
    try:
        if file.resolve() != file:
            raise InputError(f"the tensor {name!r:.100} keeps its data at {location!r:.200}, which leads through a link; only "
                             "plain files within the model's folder are read")  # fmt: skip
        status = file.stat()
    except (OSError, RuntimeError) as exc:
        raise InputError(f"the tensor {name!r:.100} keeps its data at {location!r:.200}, which cannot be read; put that file "
                         "beside the model") from exc  # fmt: skip
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"the tensor {name!r:.100} keeps its data at {location!r:.200}, which is not a plain file")
    if length != declared or offset < 0 or offset + length > status.st_size:
        raise InputError(f"the tensor {name!r:.100} declares {declared:,} bytes from {offset:,} on in {location!r:.200}, which has "
                         f"{status.st_size:,}")  # fmt: skip
    return declared
