"""Rules of TensorRT about quantization: where QuantizeLinear and DequantizeLinear stand, and what they hold.

A rule is a function that yields the node it objects to and one sentence. "Importer" below is `QuantDequantLinearHelper`
and its neighbours in onnx-tensorrt (`onnxOpImporters.cpp`, release 10), "guide" NVIDIA's TensorRT documentation,
chapters "Working with Quantized Types" and "Explicit Quantization" (in the developer guide of 8.6: "Working with INT8").
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Found = Iterator[tuple[str, str]]
"""Name of a node or tensor, and one sentence."""

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operations with multiply-accumulates; their first two inputs are multiplied."""
Q, DQ = "QuantizeLinear", "DequantizeLinear"


class View:
    """An ONNX graph with what every rule asks: constants, who produces a tensor, who reads it."""

    def __init__(self, model: onnx.ModelProto, version: tuple[int, int]) -> None:
        self.model, self.graph, self.version = model, model.graph, version
        self.nodes = [node for node in model.graph.node if node.op_type != "Constant"]
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            value = attribute(node, "value")
            if node.op_type == "Constant" and isinstance(value, TensorProto):
                self.constants[node.output[0]] = value
        self.producers = {output: node for node in self.nodes for output in node.output}
        self.readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        for node in self.nodes:
            for index, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((node, index))

    def ops(self, *types: str) -> Iterator[onnx.NodeProto]:
        return (node for node in self.nodes if node.op_type in types)

    def values(self, node: onnx.NodeProto, index: int) -> NDArray[np.generic] | None:
        """The values of a constant input; None when it is no constant of this file."""
        tensor = self.constants.get(node.input[index]) if index < len(node.input) else None
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return None
        values: NDArray[np.generic] = numpy_helper.to_array(tensor)
        return values

    def producer(self, node: onnx.NodeProto, index: int) -> onnx.NodeProto | None:
        return self.producers.get(node.input[index]) if index < len(node.input) else None

    def is_constant(self, node: onnx.NodeProto, index: int) -> bool:
        return index < len(node.input) and node.input[index] in self.constants

    def dequantized(self, node: onnx.NodeProto, index: int) -> onnx.NodeProto | None:
        """The DequantizeLinear that makes an input, or None."""
        producer = self.producer(node, index)
        return producer if producer is not None and producer.op_type == DQ else None


def attribute(node: onnx.NodeProto, name: str, default: object = None) -> object:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def label(node: onnx.NodeProto) -> str:
    return str(node.name or f"{node.op_type} of {', '.join(node.output)}")


def symmetric(view: View) -> Found:
    """Zero points are constants, and zero. Source: importer ("only supports symmetric quantization"); operators.md."""
    for node in view.ops(Q, DQ):
        if len(node.input) < 3 or not node.input[2]:
            continue
        point = view.values(node, 2)
        if point is None:
            yield label(node), "its zero point is not a constant; TensorRT takes a constant 0 only"
        elif (point != 0).any():
            yield label(node), f"its zero point is {point.reshape(-1)[0]}; TensorRT quantizes symmetrically, around 0"


def quantized_to_int8(view: View) -> Found:
    """The integers are int8, said by the zero point. Source: importer: uint8 is read as int8, with a warning, and a
    missing zero point, uint8 in ONNX, as well; guide: INT4 is for weights of matrix products only.
    """
    for node in view.ops(Q, DQ):
        stored = view.constants.get(node.input[0])
        point = view.constants.get(node.input[2]) if len(node.input) > 2 else None
        kind = point.data_type if point is not None else attribute(node, "output_dtype") or None
        if kind is None and node.op_type == DQ:
            producer = view.producer(node, 0)
            kind = stored.data_type if stored is not None else None if producer is None else TensorProto.INT8
        if kind is None:
            yield label(node), "it has no zero point, which means uint8 in ONNX and int8 in TensorRT; add an int8 zero"
        elif kind == TensorProto.INT32 and node.op_type == DQ:
            continue  # the rule `float_bias`
        elif kind != TensorProto.INT8:
            yield label(node), f"it quantizes to {type_name(int(str(kind)))}; TensorRT computes with int8 only"


def sound_scales(view: View) -> Found:
    """Scales are constant, positive, finite, normal float32 numbers. Source: importer ("must all be positive"); guide:
    scales are build-time constants; GPUs flush subnormal numbers to zero.
    """
    smallest = float(np.finfo(np.float32).tiny)
    for node in view.ops(Q, DQ):
        scale = view.values(node, 1)
        if scale is None:
            yield label(node), "its scale is not a constant"
        elif scale.dtype != np.float32:
            yield label(node), f"its scale is {scale.dtype}, expected float32"
        elif not np.isfinite(scale).all() or not (scale >= np.float32(smallest)).all():
            worst = scale.reshape(-1)[np.argmin(np.where(np.isfinite(scale), scale, -np.inf))]
            yield label(node), f"its scale holds {worst}; expected positive, finite and not subnormal numbers"


def activations_per_tensor(view: View) -> Found:
    """One scale for an activation. Source: importer ("Activations-quantization does not support per-axis")."""
    for node in view.ops(Q, DQ):
        scale = view.constants.get(node.input[1])
        if scale is not None and not view.is_constant(node, 0) and np.prod(scale.dims) != 1:
            yield label(node), f"it has {int(np.prod(scale.dims))} scales; an activation has one for the whole tensor"


def stored_weights(view: View) -> Found:
    """Weights are int8 constants behind a DequantizeLinear. Source: guide, "Quantized Weights"."""
    for node in view.ops(*WEIGHTED):
        if view.is_constant(node, 1):
            kind = type_name(view.constants[node.input[1]].data_type)
            yield label(node), f"its weights are {kind} without DequantizeLinear: this layer would compute in float"
            continue
        dequantize = view.dequantized(node, 1)
        source = view.producer(dequantize, 0) if dequantize is not None else None
        if dequantize is None or view.is_constant(dequantize, 0) or (source is not None and source.op_type == Q):
            continue
        yield label(node), "its second factor is neither a stored int8 weight nor a quantized tensor"


def narrow_weights(view: View) -> Found:
    """Weights are within -127 to 127. Source: developer guide of TensorRT 7 and 8, "Working with quantized networks"."""
    for node in view.ops(*WEIGHTED):
        dequantize = view.dequantized(node, 1)
        values = view.values(dequantize, 0) if dequantize is not None else None
        if values is not None and values.dtype == np.int8 and (values == -128).any():
            yield label(node), "its weights hold -128; TensorRT's weights are within -127 to 127"


def weight_axis(view: View) -> Found:
    """Scales of weights lie along the output channels. Source: importer (number of scales against the axis); guide,
    per-channel quantization: axis 0 for convolutions, for a matrix product the axis of its result's columns.
    """
    for node in view.ops(*WEIGHTED):
        dequantize = view.dequantized(node, 1)
        if dequantize is None or not view.is_constant(dequantize, 0):
            continue
        shape = tuple(view.constants[dequantize.input[0]].dims)
        scale = view.constants.get(dequantize.input[1])
        count = int(np.prod(scale.dims)) if scale is not None else 1
        if count == 1 or not shape:
            continue
        axis = int(str(attribute(dequantize, "axis", 1))) % len(shape)
        expected = output_axis(node, len(shape))
        if axis != expected:
            yield label(dequantize), f"its scales lie along axis {axis} of the weights {shape}, expected {expected}"
        elif shape[axis] != count:
            yield label(dequantize), f"it has {count} scales for {shape[axis]} output channels"


def output_axis(node: onnx.NodeProto, rank: int) -> int:
    """The axis of the weights that counts output channels."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        return 0
    return 1 if node.op_type in ("ConvTranspose", "Gemm") else rank - 1


def quantized_inputs(view: View) -> Found:
    """Every convolution and matrix product reads quantized activations. Source: guide, Q/DQ layer-placement
    recommendations ("quantize all inputs of weighted operations"); without it the layer is float.
    """
    for node in view.ops(*WEIGHTED):
        dequantize = view.dequantized(node, 0)
        source = view.producer(dequantize, 0) if dequantize is not None else None
        if source is None or source.op_type != Q:
            yield label(node), "its input does not come from QuantizeLinear and DequantizeLinear: it computes in float"


def own_dequantize(view: View) -> Found:
    """A DequantizeLinear has one reader. Source: ONNX Runtime's quantizer, option DedicatedQDQPair, made for TensorRT,
    which cannot share a pair; a shared one keeps TensorRT from fusing it into either reader.
    """
    outputs = {value.name for value in view.graph.output}
    for node in view.ops(DQ):
        readers = len(view.readers.get(node.output[0], ())) + (node.output[0] in outputs)
        if readers > 1:
            yield label(node), f"{readers} operations read it; give each a DequantizeLinear of its own"


def quantized_sums(view: View) -> Found:
    """Both branches of a sum are quantized. Source: guide, Q/DQ layer-placement recommendations (quantize the residual
    input of skip connections, so that the addition fuses into the convolution's integer kernel).
    """
    for node in view.ops("Add"):
        if any(view.is_constant(node, index) for index in (0, 1)):
            continue
        if any(view.dequantized(node, index) is None for index in (0, 1)):
            yield label(node), "a branch of this sum does not come from DequantizeLinear, so it would not fuse"


def float_bias(view: View) -> Found:
    """Biases are float32 constants. Source: NVIDIA/TensorRT issue 3360, onnxruntime issue 14229: an int32 bias behind
    DequantizeLinear is refused ("only activation types allowed as input to this layer").
    """
    for node in view.ops("Conv", "ConvTranspose", "Gemm"):
        if len(node.input) < 3 or not node.input[2]:
            continue
        bias = view.constants.get(node.input[2])
        if bias is None:
            yield label(node), "its bias is computed, expected a float32 constant"
        elif bias.data_type != TensorProto.FLOAT:
            yield label(node), f"its bias is {type_name(bias.data_type)}, expected float32"


def float_clip(view: View) -> Found:
    """Clip limits floats, by constants. Source: importer of Clip ("only supports floating-point, INT32, or INT64");
    operators.md of release 10: FP32, FP16, BF16.
    """
    for node in view.ops("Clip"):
        producer, stored = view.producer(node, 0), view.constants.get(node.input[0])
        if (producer is not None and producer.op_type == Q) or (stored is not None and stored.data_type != 1):
            yield label(node), "it limits integers, which TensorRT cannot; put it before QuantizeLinear"
            continue
        limits = [view.constants.get(name) for name in node.input[1:] if name]
        if any(limit is None or limit.data_type != TensorProto.FLOAT for limit in limits):
            yield label(node), "its limits are not float32 constants"


def integers_are_dequantized(view: View) -> Found:
    """Only DequantizeLinear reads int8. Source: operators.md of release 10: INT8 is a quantized type, and no other
    operation lists it.
    """
    integers = {node.output[0] for node in view.ops(Q)}
    integers |= {name for name, tensor in view.constants.items() if tensor.data_type == TensorProto.INT8}
    for name in sorted(integers):
        for node, index in view.readers.get(name, ()):
            if node.op_type != "Clip" and not (node.op_type in (Q, DQ) and (index == 2 or node.op_type == DQ)):
                yield label(node), f"{node.op_type} reads the int8 tensor {name!r}; only DequantizeLinear may"


def type_name(kind: int) -> str:
    return str(TensorProto.DataType.Name(kind)).lower()


QDQ_RULES = (
    symmetric, quantized_to_int8, sound_scales, activations_per_tensor, stored_weights, narrow_weights, weight_axis,
    quantized_inputs, own_dequantize, quantized_sums, float_bias, float_clip, integers_are_dequantized,
)  # fmt: skip
