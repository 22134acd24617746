"""Multiply-accumulates of the operations of an ONNX file, from shapes that the runtime infers for one image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import onnx
from onnx import TensorProto, helper

from edgeguard import folders
from edgeguard.errors import EngineError
from edgeguard.export.kernels import CONVOLUTIONS, KNOWN, RECURRENT, TRANSPOSED, WEIGHT_INPUT
from edgeguard.export.onnx_scope import elements
from edgeguard.targets.ort import open_session

Shape = Sequence[int | str | None]
ShapeOf = Callable[[str], Shape | None]
SMALL = 4096
"""Elements up to which a constant may decide a shape; larger ones are declared to the runtime, not given to it."""


def infer_shapes(model: onnx.ModelProto, wanted: Iterable[str]) -> dict[str, Shape] | None:
    """Shapes of tensors of the outermost graph, as the runtime infers them for a batch of one image.

    Returns: sizes, or a name or None where the runtime knows none; None when it cannot load the model so.
    """
    skeleton = _skeleton(model, wanted)
    with folders.temporary_folder() as folder:
        file = folder / "shapes.onnx"
        file.write_bytes(skeleton.SerializeToString())
        try:
            session = open_session(file, threads=1)
        except EngineError:
            return None
        return {value.name: value.shape for value in session.get_outputs() if value.shape is not None}


def _skeleton(model: onnx.ModelProto, wanted: Iterable[str]) -> onnx.ModelProto:
    """The model without its large constants, of batch 1, with the wanted tensors as its outputs."""
    graph = onnx.GraphProto(name="shapes")
    graph.node.extend(model.graph.node)
    stored = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name in stored:
            continue
        graph.input.append(value)
        dims = graph.input[-1].type.tensor_type.shape.dim
        if dims and not dims[0].dim_value:
            dims[0].dim_value = 1
    for tensor in model.graph.initializer:
        if elements(tensor) <= SMALL and tensor.data_location != TensorProto.EXTERNAL:
            graph.initializer.append(tensor)
        else:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    given = {value.name for value in (*graph.input, *graph.initializer)}
    graph.sparse_initializer.extend(model.graph.sparse_initializer)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(set(wanted) - given - {""}))
    return onnx.ModelProto(ir_version=model.ir_version, graph=graph, opset_import=model.opset_import,
                           functions=model.functions)  # fmt: skip


def count_macs(node: onnx.NodeProto, shape_of: ShapeOf) -> tuple[int, bool]:
    """Multiply-accumulates of an operation, and whether that is the number or only a lower bound.

    An unknown batch is 1. Other unknown sizes count as 1, and the number is a lower bound. An operation that may or may
    not multiply counts as many as its largest operand has elements.
    """
    if node.op_type not in KNOWN:
        return max((_product(shape_of(name))[0] for name in node.input if name), default=1), False
    try:
        return _count(node, shape_of)
    except (_UnknownError, IndexError, KeyError):  # malformed where the runtime tolerates it
        return _weight_size(node, shape_of), False


class _UnknownError(Exception):
    """The rank of a tensor is not known."""


def _count(node: onnx.NodeProto, shape_of: ShapeOf) -> tuple[int, bool]:
    def known(index: int) -> Shape:
        shape = shape_of(node.input[index])
        if shape is None:
            raise _UnknownError
        return shape

    out = shape_of(node.output[0])
    weight = known(WEIGHT_INPUT[node.op_type])
    if node.op_type in RECURRENT:
        parts = [_product(known(0)[:2], batch=1), _product(weight), _product(known(2))]
        return parts[0][0] * (parts[1][0] + parts[2][0]), all(exact for _, exact in parts)
    if node.op_type in TRANSPOSED:
        out = known(0)
    if out is None:
        raise _UnknownError
    outputs, exact = _product(out, batch=0)
    if node.op_type in CONVOLUTIONS | TRANSPOSED:
        inner, known_inner = _product(weight[1:])
    else:
        inner, known_inner = _inner(node, weight, out)
    return outputs * inner, exact and known_inner


def _inner(node: onnx.NodeProto, weight: Shape, out: Shape) -> tuple[int, bool]:
    """The length of the sums of a matrix product."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "MatMulNBits":
        return int(attributes["K"]), True
    transposed = bool(attributes.get("transB"))
    size = weight[-1] if transposed or len(weight) == 1 else weight[-2]
    return (size, True) if isinstance(size, int) else (1, False)


def _weight_size(node: onnx.NodeProto, shape_of: ShapeOf) -> int:
    index = WEIGHT_INPUT[node.op_type]
    return _product(shape_of(node.input[index]))[0] if index < len(node.input) else 1


def _product(shape: Shape | None, batch: int | None = None) -> tuple[int, bool]:
    """Number of elements, unknown sizes as 1, and whether all were known or the batch's."""
    if shape is None:
        return 1, False
    unknown = [axis for axis, size in enumerate(shape) if not isinstance(size, int) and axis != batch]
    return math.prod(size for size in shape if isinstance(size, int)), not unknown
