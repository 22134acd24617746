"""Why a layer of an ONNX file is computed in float: read from the file, in words that its maker can act on."""

from __future__ import annotations

import onnx
from onnx import TensorProto

from edgeguard.export.kernels import CONVOLUTIONS, KNOWN, WEIGHT_INPUT
from edgeguard.export.onnx_read import FOREIGN_BITS
from edgeguard.export.onnx_scope import Parameter, Scope, label_of

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
FARTHEST = 8
"""Operations between a layer and its quantized input beyond which the input counts as float."""
BLOCKWISE = "MatMulNBits"


def why_float(scope: Scope, node: onnx.NodeProto, kernel: str) -> str:
    """One clause about a layer that is known to run in a float kernel."""
    if BLOCKWISE in (node.op_type, kernel):
        return f"weights below 8 bits are expanded within {BLOCKWISE}; the graph does not say that integers are multiplied"
    index = WEIGHT_INPUT[node.op_type]
    weight = scope.parameter(node.input[index]) if index < len(node.input) else None
    if weight is None:
        return "both operands are computed at run time, and they are not both quantized where they are multiplied"
    return _weights(weight, _quantized_input(scope, node)) or _input(scope, node) or _output(scope, node) or (
        "quantized on both sides, but the runtime has no integer kernel for it; look at the types, zero points and axes"
    )  # fmt: skip


def _weights(weight: Parameter, quantized: bool) -> str:
    """What is wrong with the weights, or nothing."""
    kinds = [node.op_type for node in weight.ops]
    stored = weight.tensor.data_type if weight.tensor is not None else TensorProto.FLOAT
    name = TensorProto.DataType.Name(stored)
    if "DequantizeLinear" not in kinds:
        if stored in FLOATS:
            return "plain float weights" + (", though its input is quantized" if quantized else "")
        return f"weights stored as {name} are converted to float by {kinds[0] if kinds else 'the runtime'}"
    if FOREIGN_BITS[stored] < 8:
        return f"weights stored as {name} are dequantized to float"
    between = kinds[: kinds.index("DequantizeLinear")]
    return f"{' and '.join(between)} between DequantizeLinear and its weights" if between else ""


def _trace(scope: Scope, name: str) -> tuple[list[str], onnx.NodeProto | None]:
    """Operations between a layer and the nearest DequantizeLinear before it, and that; None where there is none."""
    passed: list[str] = []
    while len(passed) < FARTHEST:
        producer = scope.producer(name)
        if producer is None or producer.op_type == "DequantizeLinear":
            return passed, producer
        if producer.op_type in KNOWN:
            break
        passed.append(producer.op_type)
        name = next((item for item in producer.input if scope.varies(item)), "")
    return passed, None


def _quantized_input(scope: Scope, node: onnx.NodeProto) -> bool:
    return _trace(scope, node.input[0])[1] is not None


def _input(scope: Scope, node: onnx.NodeProto) -> str:
    """What is wrong with the activation that a layer with dequantized weights reads, or nothing."""
    passed, source = _trace(scope, node.input[0])
    if source is None:
        producer = scope.producer(node.input[0])
        origin = "an input of the model" if producer is None else f"{producer.op_type} {label_of(producer)!r}"
        return f"weights are dequantized and no quantized activation reaches it: it reads {origin}"
    if passed:
        return f"{' and '.join(reversed(passed))} between DequantizeLinear and it, which the runtime does not fold"
    return ""


def _output(scope: Scope, node: onnx.NodeProto) -> str:
    """What is wrong with what follows a convolution whose operands are both dequantized, or nothing."""
    if node.op_type not in CONVOLUTIONS:
        return ""
    name, passed = node.output[0], list[str]()
    while True:
        readers = scope.readers.get(name, [])
        if name in scope.outputs or not readers:
            return "its result leaves the model without being quantized"
        others = [reader for reader in readers if reader.op_type != "QuantizeLinear"]
        if not others:
            break
        if len(readers) > 1 or len(passed) == FARTHEST or others[0].op_type not in ("Relu", "Clip"):
            return f"its result is not quantized before {others[0].op_type} {label_of(others[0])!r} reads it"
        passed.append(others[0].op_type)
        name = others[0].output[0]
    if passed:
        return f"{' and '.join(passed)} between it and QuantizeLinear, which the runtime does not fold"
    return "" if len(scope.readers[name]) == 1 else "its result is quantized more than once"
