"""What ONNX operations are to an arithmetic unit: integer products, float products, or none; and how to read a graph."""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx
from onnx import TensorProto

INTEGER_KERNELS = frozenset({"QLinearConv", "QGemm", "QLinearMatMul", "QLinearMul", "MatMulInteger", "ConvInteger"})
"""Operations whose kernels multiply integers by integers that the file holds or another kernel made."""

DYNAMIC_KERNELS = frozenset({"DynamicQuantizeMatMul", "MatMulIntegerToFloat"})
"""Operations that multiply integers between float tensors, scaled from image to image."""

CONVOLUTIONS = frozenset({"Conv", "FusedConv", "NhwcFusedConv", "ConvInteger", "QLinearConv"})
TRANSPOSED = frozenset({"ConvTranspose"})
PRODUCTS = frozenset({
    "Gemm", "MatMul", "FusedGemm", "FusedMatMul", "TransposeMatMul", "MatMulInteger", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "MatMulNBits",
})  # fmt: skip
RECURRENT = frozenset({"RNN", "GRU", "LSTM"})
KNOWN = CONVOLUTIONS | TRANSPOSED | PRODUCTS | RECURRENT
"""Operations whose multiply-accumulates follow from shapes."""

WEIGHT_INPUT = {
    "QLinearConv": 3, "QGemm": 3, "QLinearMatMul": 3, "MatMulInteger": 1, "ConvInteger": 1, "Conv": 1, "Gemm": 1,
    "MatMul": 1, "FusedConv": 1, "NhwcFusedConv": 1, "ConvTranspose": 1, "FusedGemm": 1, "FusedMatMul": 1,
    "TransposeMatMul": 1, "MatMulIntegerToFloat": 1, "DynamicQuantizeMatMul": 1, "MatMulNBits": 1, "RNN": 1, "GRU": 1,
    "LSTM": 1, "DeformConv": 1, "Attention": 1, "QAttention": 1,
}  # fmt: skip
"""Which input is the weight."""

PARAMETER_OPS = frozenset({
    "Cast", "Clip", "DequantizeLinear", "Identity", "QuantizeLinear", "Reshape", "Transpose", "Unsqueeze",
})  # fmt: skip
"""What may stand between a stored weight and the operation that uses it."""

BITS: dict[int, int] = {
    TensorProto.INT2: 2, TensorProto.UINT2: 2, TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.INT8: 8,
    TensorProto.UINT8: 8, TensorProto.INT16: 16, TensorProto.UINT16: 16, TensorProto.FLOAT16: 16,
    TensorProto.BFLOAT16: 16, TensorProto.INT32: 32, TensorProto.FLOAT: 32, TensorProto.DOUBLE: 64,
}  # fmt: skip
"""Storage bits of the types that weights of an export may have."""
FLOAT_BITS, INTEGER_BITS = 32, 8

RENAMED = re.compile(r"(_token_\d+|_nchwc|_nhwc)+$")
"""What the runtime appends to names of nodes and tensors it rewrites."""

NO_MACS = frozenset({
    "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "AveragePool",
    "BatchNormalization", "Bernoulli", "BiasAdd", "BiasGelu", "BiasSoftmax", "BiasSplitGelu", "Binarizer", "BitShift",
    "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "BlackmanWindow", "Cast", "CastLike", "Ceil", "Celu",
    "CenterCropPad", "Clip", "Col2Im", "Compress", "Concat", "ConcatFromSequence", "Constant", "ConstantOfShape",
    "Cos", "Cosh", "CumProd", "CumSum", "DepthToSpace", "DequantizeLinear", "Div", "Dropout", "DynamicQuantizeLinear",
    "Elu", "Equal", "Erf", "Exp", "Expand", "EyeLike", "FastGelu", "Flatten", "Floor", "Gather", "GatherElements",
    "GatherND", "Gelu", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "Greater", "GreaterOrEqual",
    "GridSample", "GroupNorm", "GroupNormalization", "HammingWindow", "HannWindow", "HardSigmoid", "HardSwish",
    "Hardmax", "Identity", "If", "ImageDecoder", "InstanceNormalization", "IsInf", "IsNaN", "LRN",
    "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "Loop", "LpNormalization",
    "LpPool", "Max", "MaxPool", "MaxRoiPool", "MaxUnpool", "Mean", "MeanVarianceNormalization", "Min", "Mish", "Mod",
    "Mul", "Multinomial", "Neg", "NhwcMaxPool", "NonMaxSuppression", "NonZero", "Normalizer", "Not", "OneHot",
    "Optional", "OptionalGetElement", "OptionalHasElement", "Or", "PRelu", "Pad", "Pow", "QLinearAdd",
    "QLinearAveragePool", "QLinearConcat", "QLinearGlobalAveragePool", "QLinearLeakyRelu", "QLinearMul",
    "QLinearReduceMean", "QLinearSigmoid", "QLinearSoftmax", "QLinearWhere", "QuantizeLinear", "QuickGelu",
    "RMSNormalization", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Range",
    "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSum", "ReduceSumSquare", "RegexFullMatch", "Relu", "ReorderInput", "ReorderOutput",
    "Reshape", "Resize", "ReverseSequence", "RoiAlign", "Round", "Scaler", "Scan", "Scatter", "ScatterElements",
    "ScatterND", "Selu", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert",
    "SequenceLength", "Shape", "Shrink", "Sigmoid", "Sign", "SimplifiedLayerNormalization", "Sin", "Sinh", "Size",
    "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Slice", "Softmax", "Softplus", "Softsign",
    "SpaceToDepth", "Split", "SplitToSequence", "Sqrt", "Squeeze", "StringNormalizer", "Sub", "Sum", "Swish", "Tan",
    "Tanh", "TensorScatter", "ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu", "Unique", "Unsqueeze",
    "Upsample", "Where", "Xor", "ZipMap",
})  # fmt: skip
"""Operations of foreign models without multiply-accumulates; If, Loop and Scan count by what is inside them.
Any operation that is neither here nor in `KNOWN` is reported as unknown, never as nothing."""


def live(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes that the outputs depend on, last first; a decoy that feeds nothing counts for nothing."""
    producers = {output: node for node in graph.node for output in node.output if output}
    pending = [output.name for output in graph.output]
    needed = set(pending)
    while pending:
        producer = producers.get(pending.pop())
        if producer is not None:
            read = {*producer.input, *(name for body in subgraphs(producer) for name in outer_names(body))} - needed
            needed |= read
            pending += read
    return (node for node in reversed(graph.node) if needed & set(node.output) - {""})


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of an If, Loop or Scan."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def outer_names(graph: onnx.GraphProto) -> Iterator[str]:
    """Every tensor name that a body reads, those of the graph around it among them."""
    yield from (output.name for output in graph.output)
    for node in graph.node:
        yield from node.input
        for body in subgraphs(node):
            yield from outer_names(body)
