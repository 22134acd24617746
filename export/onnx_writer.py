"""An `IntegerGraph` as ONNX in QOperator form: integer kernels from pixels to logits.

Every activation is uint8 in the file; a signed one has zero point 128, because the runtime's fast kernels and its
addition want one type. Below 8 bits an integer `Clip` follows. Weights are stored in the smallest ONNX type that holds
them and `Cast` to INT8, which the runtime folds when it loads the model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgeguard import files
from edgeguard import graph as g
from edgeguard.errors import ExportError
from edgeguard.export.onnx_builder import MICROSOFT, Builder
from edgeguard.graph import IntegerGraph
from edgeguard.inttype import zero_point_of

OPSETS = {2: (25, 13), 4: (21, 10), 8: (17, 8)}
"""(opset, IR version) that the smallest weights of a model need."""


def write_onnx(
    graph: IntegerGraph, path: Path, min_storage_bits: int = 2, newest: tuple[int, int] | None = None
) -> None:
    """Write a graph; equal graphs give equal bytes.

    Args:
        min_storage_bits: 4 or 8 for a runtime that cannot load ONNX INT2 or INT4.
        newest: (opset, IR version) that the runtime loads at most.

    Raises:
        ExportError: a node cannot be written.
    """
    files.write_bytes(path, to_onnx(graph, min_storage_bits, newest).SerializeToString(deterministic=True))


def to_onnx(
    graph: IntegerGraph, min_storage_bits: int = 2, newest: tuple[int, int] | None = None
) -> onnx.ModelProto:
    """The ONNX model of a graph: uint8 `pixels` (N, 3, H, W) to float32 `logits` (N, classes)."""
    writer = _Writer(graph, min_storage_bits)
    for node in graph.nodes:
        writer.write(node)
    opset, ir_version = map(min, OPSETS[writer.smallest], newest or OPSETS[writer.smallest])
    return writer.model([helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)], ir_version)


class _Writer(Builder):
    """Writes one operation of the graph after the other."""

    def __init__(self, graph: IntegerGraph, min_storage_bits: int) -> None:
        super().__init__(graph, min_storage_bits)
        self.readers = {name: [n for n in graph.nodes if name in g.node_inputs(n)] for name in graph.tensors}
        self.pooled: dict[str, str] = {}
        """(N, 1, 1, C) names of tensors (C, 1, 1) that exist in that layout only."""

    def write(self, node: g.Node) -> None:
        if isinstance(node, g.Quantize):
            self.quantize(node)
        elif isinstance(node, g.Conv):
            self.conv(node)
        elif isinstance(node, g.Linear):
            self.linear(node)
        elif isinstance(node, g.Add):
            self.add(node)
        elif isinstance(node, g.Multiply):
            inputs = [*self.quantized(node.input), *self.quantized(node.other), *self.quantized(node.output)[1:]]
            self.emit("QLinearMul", node, inputs, domain=MICROSOFT)
        elif isinstance(node, g.Lookup):
            self.lookup(node)
        elif isinstance(node, g.AveragePool):
            self.average(node)
        elif isinstance(node, g.Dequantize):
            self.dequantize(node)
        elif isinstance(node, g.MaxPool):
            if not self.is_subsampling(node):
                self.node("MaxPool", node.name, [node.input], node.output,
                          kernel_shape=node.kernel, strides=node.stride, pads=node.padding)  # fmt: skip
        elif isinstance(node, g.Pad):
            self.pad(node)
        elif isinstance(node, g.Concat):
            self.node("Concat", node.name, list(node.inputs), node.output, axis=1)
        elif isinstance(node, g.Slice):
            limits = [self.constant(f"int64/{value}", np.array([value])) for value in (node.start, node.stop, 1)]
            self.node("Slice", node.name, [node.input, *limits[:2], limits[2]], node.output)
        elif isinstance(node, g.Take):
            self.take(node, node.input, node.output)
        elif isinstance(node, g.Shuffle):
            self.shuffle(node)
        elif isinstance(node, g.Flatten):
            source = self.pooled.get(node.input, node.input)
            self.node("Flatten", node.name, [source], node.output, axis=1)
        else:
            self.clip(node.name, node.input, node.output, node.low, node.high)

    def quantize(self, node: g.Quantize) -> None:
        dtype = self.graph.tensors[node.output].dtype
        offset = zero_point_of(dtype)
        zero_point = node.zero_point + offset
        pixels = self.node("Cast", f"{node.name}/float", [node.input], to=TensorProto.FLOAT)
        if (zero_point == np.clip(zero_point, 0, 255)).all():
            scale = self.constant(f"{node.name}/scale", node.scale)
            point = self.constant(f"{node.name}/zero_point", zero_point.astype(np.uint8))
            self.emit("QuantizeLinear", node, [pixels, scale, point], axis=1)
            return
        # A zero point beyond uint8 (a range far off centre): the same formula, operation by operation.
        scale = self.constant(f"{node.name}/scale", node.scale.reshape(-1, 1, 1))
        point = self.constant(f"{node.name}/zero_point", zero_point.astype(np.float32).reshape(-1, 1, 1))
        rounded = self.node("Round", f"{node.name}/round", [self.node("Div", f"{node.name}/divide", [pixels, scale])])
        shifted = self.node("Add", f"{node.name}/shift", [rounded, point])
        limits = [self.constant(f"float/{q + offset}", np.float32(q + offset)) for q in (dtype.qmin, dtype.qmax)]
        clipped = self.node("Clip", f"{node.name}/clip", [shifted, *limits])
        self.node("Cast", node.name, [clipped], node.output, to=TensorProto.UINT8)

    def conv(self, node: g.Conv) -> None:
        source, target = self.quantized(node.input), self.quantized(node.output)[1:]
        weight = [self.weight(node, node.weight), *self.weight_quantization(node, node.weight_scale)]
        bias = self.constant(f"{node.name}/bias", node.bias)
        self.emit("QLinearConv", node, [*source, *weight, *target, bias], kernel_shape=node.weight.shape[2:],
                  strides=node.stride, pads=node.padding, dilations=node.dilation, group=node.groups)  # fmt: skip

    def linear(self, node: g.Linear) -> None:
        """The runtime's integer Gemm: per-channel scales, int32 bias; without an output scale it leaves float32."""
        weight = self.weight(node, node.weight)
        data, scale, zero_point = self.quantized(node.input)
        bias = self.constant(f"{node.name}/bias", node.bias)
        last = self.graph.nodes[-1]
        if self.graph.tensors[node.output].scale is not None or not isinstance(last, g.Dequantize):
            parameters = [weight, *self.weight_quantization(node, node.weight_scale), bias]
            inputs = [data, scale, zero_point, *parameters, *self.quantized(node.output)[1:]]
            self.emit("QGemm", node, inputs, domain=MICROSOFT, transB=1)
            return
        parameters = [weight, *self.weight_quantization(node, last.scale), bias]
        inputs = [data, self.constant("float/1.0", np.float32(1)), zero_point, *parameters]
        self.node("QGemm", node.name, inputs, last.output, domain=MICROSOFT, transB=1)

    def dequantize(self, node: g.Dequantize) -> None:
        source = self.graph.tensors[node.input]
        if source.scale is None:
            return  # the Gemm before it has done this
        zero_point = np.full(node.scale.shape, zero_point_of(source.dtype), np.uint8)
        inputs = [node.input, self.constant(f"{node.name}/scale", node.scale)]
        inputs.append(self.constant(f"{node.name}/zero_point", zero_point))
        self.node("DequantizeLinear", node.name, inputs, node.output, axis=1)

    def add(self, node: g.Add) -> None:
        """The runtime's QLinearAdd rounds ties to even on x86-64, away from zero on aarch64: here it never rounds."""
        ratios = self.graph.add_ratios(node)
        finest, dtype = min(ratios), self.graph.tensors[node.output].dtype
        first, second, output = (self.quantized(name) for name in (node.input, node.other, node.output))
        if finest >= 1:
            self.emit("QLinearAdd", node, [*first, *second, *output[1:]], domain=MICROSOFT)
            return
        if max(ratios) >= 2:
            self.add_halved(node, ratios)
            return
        if dtype.qmax / finest > 255 - zero_point_of(dtype):
            self.add_by_conv(node, ratios)
            return
        # The sum in units of the finest ratio, saturated where the result clamps; then a table halves it, to even. An
        # unsigned result is zero below zero, as a leaky ReLU without a leak.
        middle = zero_point_of(dtype) or 255 - round(dtype.qmax / finest)
        scales = [self.constant(f"float/{value!r}", np.float32(value)) for value in (*ratios, finest)]
        point = self.constant(f"uint8/{middle}", np.uint8(middle))
        inputs = [first[0], scales[0], first[2], second[0], scales[1], second[2], scales[2], point]
        total = self.node("QLinearAdd", f"{node.name}/sum", inputs, domain=MICROSOFT)
        inputs = [total, scales[2], point, self.constant("float/1.0", np.float32(1)), output[2]]
        if dtype.signed:
            self.emit("QLinearLeakyRelu", node, inputs, alpha=1.0, domain=MICROSOFT)
        else:
            self.node("QLinearLeakyRelu", node.name, inputs, node.output, alpha=0.0, domain=MICROSOFT)

    def add_halved(self, node: g.Add, ratios: tuple[float, float]) -> None:
        """One addend in whole even steps, the other finer: the finer is rounded alone, by a table, to the same integers.

        An even number does not move a tie: `round(2 b + a / 2) = 2 b + round(a / 2)` when halves go to even.
        """
        fine, coarse = (node.input, node.other) if ratios[0] < ratios[1] else (node.other, node.input)
        output = self.quantized(node.output)
        ones = [self.constant(f"float/{value!r}", np.float32(value)) for value in (min(ratios), max(ratios), 1.0)]
        points = [self.zero_point(self.graph.tensors[name].dtype) for name in (fine, coarse)]
        rounded = self.node("QLinearLeakyRelu", f"{node.name}/round", [fine, ones[0], points[0], ones[2], points[0]],
                            alpha=1.0, domain=MICROSOFT)  # fmt: skip
        inputs = [rounded, ones[2], points[0], coarse, ones[1], points[1], ones[2], output[2]]
        self.emit("QLinearAdd", node, inputs, domain=MICROSOFT)

    def add_by_conv(self, node: g.Add, ratios: tuple[float, float]) -> None:
        """An addition whose sum does not fit uint8 before it is rounded: a 1x1 convolution over both, side by side."""
        shape, finest = self.graph.tensors[node.output].shape, min(ratios)
        parts: list[tuple[str, int]] = []
        for name, ratio in zip((node.input, node.other), ratios, strict=True):
            copies = max(1, round(ratio / finest) // 64)
            parts += [(name, round(ratio / finest) // copies)] * copies
        if len(shape) != 3:
            raise ExportError(
                f"{node.name}: a sum of vectors at scales {ratios} apart has no form in ONNX Runtime; add before flattening"
            )
        eye = np.eye(shape[0], dtype=np.int8)
        weight = self.constant(f"{node.name}/weight", np.hstack([eye * w for _, w in parts])[:, :, None, None])
        points = [zero_point_of(self.graph.tensors[name].dtype) for name, _ in parts]
        offset = -sum(w * point for (_, w), point in zip(parts, points, strict=True))
        bias = self.constant(f"{node.name}/bias", np.full(shape[0], offset, np.int32))
        both = self.node("Concat", f"{node.name}/both", [name for name, _ in parts], axis=1)
        scale = self.weight_quantization(node, np.full(shape[0], finest, np.float32))
        one, zero = self.constant("float/1.0", np.float32(1)), self.constant("uint8/0", np.uint8(0))
        target = [one, self.zero_point(self.graph.tensors[node.output].dtype)]
        self.emit("QLinearConv", node, [both, one, zero, weight, *scale, *target, bias])

    def lookup(self, node: g.Lookup) -> None:
        """A `Gather` from 256 entries, which reads nothing but integers; what the input never holds is zero."""
        source, output = (self.graph.tensors[name].dtype for name in (node.input, node.output))
        values = np.full(256, zero_point_of(output), np.uint8)
        first = source.qmin + zero_point_of(source)
        values[first : first + len(node.table)] = node.table + zero_point_of(output)
        table = self.constant(f"{node.name}/table", values)
        index = self.node("Cast", f"{node.name}/index", [node.input], to=TensorProto.INT32)
        self.node("Gather", node.name, [table, index], node.output, axis=0)

    def shuffle(self, node: g.Shuffle) -> None:
        channels, height, width = self.graph.tensors[node.input].shape
        grouped = np.array([0, node.groups, channels // node.groups, height * width])
        whole = np.array([0, channels, height, width])
        parts = self.node("Reshape", f"{node.name}/group", [node.input, self.constant(f"{node.name}/groups", grouped)])
        swapped = self.node("Transpose", f"{node.name}/swap", [parts], perm=(0, 2, 1, 3))
        self.node("Reshape", node.name, [swapped, self.constant(f"{node.name}/shape", whole)], node.output)

    def average(self, node: g.AveragePool) -> None:
        source = self.graph.tensors[node.input]
        if source.shape[1:] != node.kernel:
            # The runtime's QLinearAveragePool averages in float; a depthwise convolution with ones is exact.
            channels = source.shape[0]
            ones = self.constant(f"{node.name}/ones", np.ones((channels, 1, *node.kernel), np.int8))
            factor = np.full(channels, self.graph.average_multiplier(node), np.float32)
            inputs = self.unscaled(node, node.input, ones, factor)
            self.emit("QLinearConv", node, inputs, strides=node.stride, group=channels)
            return
        # Written channels-last: the runtime does not move this operation into the layout of its convolutions.
        flat = all(isinstance(reader, g.Flatten) for reader in self.readers[node.output])
        image = self.node("Transpose", f"{node.name}/channels_last", [node.input], perm=(0, 2, 3, 1))
        inputs = [image, *self.quantized(node.input)[1:], *self.quantized(node.output)[1:]]
        pooled = f"{node.output}/channels_last"
        self.emit("QLinearGlobalAveragePool", node, inputs, pooled, domain=MICROSOFT, channels_last=1)
        if flat:
            self.pooled[node.output] = pooled
        else:
            self.node("Transpose", f"{node.name}/channels_first", [pooled], node.output, perm=(0, 3, 1, 2))

    def is_subsampling(self, node: g.Node) -> bool:
        """Whether a node drops pixels of a shortcut whose channels are padded next: written as one convolution."""
        readers = self.readers.get(node.output, [])
        padded = len(readers) == 1 and isinstance(readers[0], g.Pad) and not any(readers[0].padding)
        return padded and isinstance(node, g.MaxPool) and node.kernel == (1, 1)

    def pad(self, node: g.Pad) -> None:
        before = next((n for n in self.graph.nodes if n.output == node.input), None)
        if isinstance(before, g.MaxPool) and self.is_subsampling(before):
            channels = self.graph.tensors[before.input].shape[0]
            weight = np.zeros((channels + sum(node.channels), channels, 1, 1), np.int8)
            weight[node.channels[0] + np.arange(channels), np.arange(channels)] = 1
            select = self.stored(f"{node.name}/select", weight, self.smallest)
            inputs = self.unscaled(node, before.input, select, np.ones(len(weight), np.float32))
            self.node("QLinearConv", node.name, inputs, node.output, strides=before.stride)
            return
        top, left, bottom, right = node.padding
        pads = np.array([0, node.channels[0], top, left, 0, node.channels[1], bottom, right], np.int64)
        zero = self.zero_point(self.graph.tensors[node.output].dtype)
        self.node("Pad", node.name, [node.input, self.constant(f"{node.name}/pads", pads), zero], node.output)

    def unscaled(self, node: g.Node, source: str, weight: str, factor: NDArray[np.float32]) -> list[str]:
        """Inputs of a convolution without bias whose requantization factor is exactly `factor`."""
        one = self.constant("float/1.0", np.float32(1))
        points = [self.zero_point(self.graph.tensors[name].dtype) for name in (source, node.output)]
        return [source, one, points[0], weight, *self.weight_quantization(node, factor), one, points[1]]
