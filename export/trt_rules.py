"""A QDQ ONNX model held against what TensorRT publishes about the models it takes, without TensorRT.

The rules say what would be refused, computed in float, or read differently than ONNX defines it. Sources are in their
docstrings; those about quantization are in `trt_qdq_rules.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from edgeguard.errors import ExportError, InputError
from edgeguard.export.trt_qdq_rules import QDQ_RULES, Found, View, attribute, label, type_name

OPSETS = {(8, 5): 17, (10, 0): 20, (10, 15): 24, (11, 0): 24, (11, 4): 25}
"""Newest ONNX opset from a TensorRT version on. Sources: `docs/operators.md` of onnx-tensorrt for 8.5, 8.6 and 10.15;
release notes of 10.0; ONNX Opset Guide of 11.4."""
OLDEST_OPSET = 13
"""The first with per-channel DequantizeLinear; TensorRT itself goes back to 9."""
NEWEST_MAJOR = 11

OPERATORS = """
Abs Add ArgMax ArgMin AveragePool BatchNormalization Cast Ceil Celu Clip Concat Conv ConvTranspose DepthToSpace
DequantizeLinear Div Dropout Elu Equal Erf Exp Expand Flatten Floor Gather Gemm GlobalAveragePool GlobalMaxPool Greater
GreaterOrEqual HardSigmoid HardSwish Identity InstanceNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LRN MatMul
Max MaxPool Mean Min Mul Neg Pad Pow PRelu QuantizeLinear Reciprocal ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin
ReduceProd ReduceSum Relu Reshape Resize Round Selu Shape Sigmoid Sign Slice Softmax Softplus Softsign SpaceToDepth
Split Sqrt Squeeze Sub Sum Tanh ThresholdedRelu Tile TopK Transpose Unsqueeze Where
"""
"""What feed-forward networks use of the operators that onnx-tensorrt has had since release 8.5."""
SUPPORTED = frozenset(OPERATORS.split())
SINCE_10 = frozenset({"CastLike", "Gelu", "GroupNormalization", "LayerNormalization", "Mish", "RMSNormalization"})
ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Min", "Max", "Clip", "Relu", "Conv", "Gemm", "MatMul"})
WINDOWS = ("Conv", "ConvTranspose", "MaxPool", "AveragePool")


@dataclass(frozen=True)
class Violation:
    """A rule that a model breaks.

    rule: name of the rule. node: the node or tensor. text: one sentence, what is wrong there.
    """

    rule: str
    node: str
    text: str

    def __str__(self) -> str:
        return f"{self.node}: {self.text} ({self.rule})"


def check(model: onnx.ModelProto, version: tuple[int, int]) -> tuple[Violation, ...]:
    """Everything in a model that a TensorRT of that (major, minor) version would refuse or misread.

    Raises:
        InputError: a version that the rules do not know.
    """
    newest_opset(version)
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as exc:
        return (Violation("valid_onnx", model.graph.name or "model", f"it is not valid ONNX: {first_line(exc)}"),)
    view = View(model, version)
    return tuple(Violation(rule.__name__, node, text) for rule in RULES for node, text in rule(view))


def require_rules(model: onnx.ModelProto, version: tuple[int, int]) -> None:
    """Refuse a model that breaks a rule.

    Raises:
        ExportError: the first violations, and how many there are.
    """
    found = check(model, version)
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        text = "; ".join(map(str, found[:3]))
        raise ExportError(f"TensorRT {version[0]}.{version[1]} would not take this model as it is meant: {text}{more}")


def newest_opset(version: tuple[int, int]) -> int:
    """The newest opset that a TensorRT version reads."""
    known = [opset for since, opset in OPSETS.items() if since <= version]
    if not known or version[0] > NEWEST_MAJOR:
        raise InputError(f"no rules for TensorRT {version[0]}.{version[1]}; expected 8.5 to {NEWEST_MAJOR}")
    return known[-1]


def first_line(exc: Exception) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0]


def opset(view: View) -> Found:
    """The opset is one that the parser reads. Source: `OPSETS`."""
    versions = [entry.version for entry in view.model.opset_import if entry.domain in ("", "ai.onnx")]
    newest = newest_opset(view.version)
    for version in versions:
        if not OLDEST_OPSET <= version <= newest:
            yield "model", f"it is of opset {version}; expected {OLDEST_OPSET} to {newest}"


def supported_operators(view: View) -> Found:
    """Every operation has an importer. Source: `docs/operators.md` of onnx-tensorrt, releases 8.5 and 10.15; others,
    and other domains, need a plugin.
    """
    supported = SUPPORTED | SINCE_10 if view.version >= (10, 0) else SUPPORTED
    for node in view.nodes:
        if node.domain not in ("", "ai.onnx"):
            yield label(node), f"{node.domain}.{node.op_type} is of a domain that needs a plugin"
        elif node.op_type not in supported:
            yield label(node), f"TensorRT has no {node.op_type}"


def data_types(view: View) -> Found:
    """Tensors are of types that TensorRT computes with. Source: operators.md: float64 is cast down, uint8 is for the
    network's inputs and outputs alone, int16 is unknown, before release 10 int64 is cut to int32.
    """
    allowed = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.INT32, TensorProto.INT64,
               TensorProto.BOOL}  # fmt: skip
    for name, tensor in view.constants.items():
        readers = view.readers.get(name, ())
        is_zero_point = any(index == 2 and node.op_type.endswith("Linear") for node, index in readers)
        if tensor.data_location == TensorProto.EXTERNAL:
            yield name, "its data is in another file"
        elif tensor.data_type not in allowed and not is_zero_point:  # the rule `quantized_to_int8` reads zero points
            yield name, f"it is {type_name(tensor.data_type)}, which TensorRT does not compute with"
        elif tensor.data_type == TensorProto.INT64:
            for node, _ in readers:
                if node.op_type in ARITHMETIC:
                    yield label(node), f"it computes with the int64 tensor {name!r}"
    for node in view.ops("Cast"):
        kind = int(str(attribute(node, "to")))
        if kind not in allowed - {TensorProto.INT8}:
            yield label(node), f"it casts to {type_name(kind)}, which TensorRT does not compute with"
    for value in view.graph.output:
        kind = value.type.tensor_type.elem_type
        if kind != TensorProto.FLOAT:
            yield value.name, f"this output is {type_name(kind)}, expected float32"


def pixels_are_cast(view: View) -> Found:
    """uint8 pixels are first cast to float. Source: Python API, `DataType.UINT8`: convert network-level inputs to
    float32 or float16 prior to use with other layers.
    """
    for value in inputs(view):
        kind = value.type.tensor_type.elem_type
        if kind not in (TensorProto.UINT8, TensorProto.FLOAT):
            yield value.name, f"this input is {type_name(kind)}, expected uint8 or float32"
        for node, _ in view.readers.get(value.name, ()) if kind == TensorProto.UINT8 else ():
            floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
            if node.op_type != "Cast" or attribute(node, "to") not in floats:
                yield label(node), f"{node.op_type} reads the uint8 input {value.name!r}; only Cast to float may"


def only_the_batch_varies(view: View) -> Found:
    """Shapes of inputs are fixed but for the batch, which the optimization profile bounds. Source: guide, "Working with
    Dynamic Shapes"; the profile of the builder here varies the batch alone.
    """
    for value in inputs(view):
        dims = value.type.tensor_type.shape.dim
        for axis, dim in enumerate(dims):
            if axis > 0 and dim.dim_value < 1:
                yield value.name, f"axis {axis} of this input has no fixed size; only the batch may vary"
        if not dims:
            yield value.name, "this input has no shape"


def window_operations(view: View) -> Found:
    """Windows are two- or three-dimensional; pools have no dilation and give no indices. Source: operators.md."""
    for node in view.ops(*WINDOWS):
        kernel, dilations = attribute(node, "kernel_shape") or (), attribute(node, "dilations") or ()
        if isinstance(kernel, list) and len(kernel) not in (2, 3):
            yield label(node), f"its window has {len(kernel)} dimensions, expected 2 or 3"
        if node.op_type.endswith("Pool") and isinstance(dilations, list) and any(d != 1 for d in dilations):
            yield label(node), "it is a pool with dilation"
        if node.op_type == "MaxPool" and len(node.output) > 1 and node.output[1]:
            yield label(node), "it gives indices, which TensorRT does not"


def clip_after_product(view: View) -> Found:
    """No Clip from 0 right after a matrix product. Source: NVIDIA/TensorRT issue 4606 (open; seen in 10.12 and 10.13):
    MatMul, Add, Clip(0, max) is built as a ReLU, without the upper limit. A Gemm is imported as MatMul and Add.
    """
    if view.version < (10, 0):
        return
    for node in view.ops("Clip"):
        low, high, source = view.values(node, 1), view.values(node, 2), view.producer(node, 0)
        if source is not None and source.op_type == "Add":
            source = next((p for p in (view.producer(source, 0), view.producer(source, 1)) if p is not None), None)
        if low is None or high is None or source is None or source.op_type not in ("Gemm", "MatMul"):
            continue
        if (low == 0).all():
            yield label(node), "TensorRT 10 ignores the upper limit of a Clip from 0 after a product; use Relu and Min"


def inputs(view: View) -> Iterator[onnx.ValueInfoProto]:
    return (value for value in view.graph.input if value.name not in view.constants)


RULES: tuple[Callable[[View], Found], ...] = (
    opset, supported_operators, data_types, pixels_are_cast, only_the_batch_varies, window_operations,
    clip_after_product, *QDQ_RULES,
)  # fmt: skip
