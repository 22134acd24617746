"""An `IntegerGraph` as ONNX with QuantizeLinear/DequantizeLinear pairs, for TensorRT and OpenVINO.

Every quantized tensor is written by one QuantizeLinear, under the tensor's own name, and read through a
DequantizeLinear of each reader: per tensor, zero point 0. Weights are int8 initializers behind a DequantizeLinear per
output channel. Below 8 bits the values are clipped in float before they are quantized, because TensorRT has no integer
`Clip`. Biases are float32, since TensorRT refuses int32 at a DequantizeLinear (NVIDIA/TensorRT issue 3360); they are
shifted by less than one accumulator step, to where no order of float operations meets a tie (`bias_shift`), and float32
moves them by 2**-24 of their own size at most.

**Scales are powers of two.** What a layer computes depends on `m = s_x * s_w / s_y` alone. So each activation's scale
is replaced by a power of two next to it and the weights' scales take the difference: `s_w' = m * s_y' / s_x'`, which is
exact. The real values between layers then differ from the trained model's by a constant factor below two; the integers
and the logits do not. In return, dequantizing is exact, an addition is exact with its ties where they belong, and a
runtime that multiplies all three scales arrives at the reference's own `m`. Scales that are a power of two apart stay
so.

**Two detours for OpenVINO** (2026.4; seen on its CPU, with unsigned activations): where a convolution absorbs its own
quantizer and the addition behind it, the first rounding is lost, which moves half of the sum's ties; so what an
addition that rounds or a product reads is rounded explicitly before it is quantized. And limits behind a pool, which
are no whole numbers of the pool's input, come out wrong; so a pool is quantized to 8 bits first and clipped then.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgeguard import files
from edgeguard import graph as g
from edgeguard.errors import ExportError, InputError
from edgeguard.export.onnx_builder import Collector
from edgeguard.export.qdq_numbers import bias_shift, file_scale, is_robust
from edgeguard.graph import IntegerGraph
from edgeguard.inttype import IntType

OPSET = 17
MIN_OPSET = 13
"""The first with per-channel DequantizeLinear."""
SIGNED, UNSIGNED = IntType(8, signed=True), IntType(8, signed=False)
"""What a file holds: int8 and uint8."""


def write_qdq(graph: IntegerGraph, path: Path, *, signed: bool, opset: int = OPSET) -> None:
    """Write a graph; equal graphs give equal bytes. Arguments and errors as of `to_qdq`."""
    files.write_bytes(path, to_qdq(graph, signed=signed, opset=opset).SerializeToString(deterministic=True))


def to_qdq(graph: IntegerGraph, *, signed: bool, opset: int = OPSET) -> onnx.ModelProto:
    """The ONNX model of a graph: uint8 `pixels` (N, 3, H, W) to float32 `logits` (N, classes).

    Args:
        signed: int8 for every activation (TensorRT); otherwise unsigned tensors are uint8 (OpenVINO).

    Raises:
        InputError: the opset has no per-channel DequantizeLinear, or this onnx does not know it.
        ExportError: a tensor does not fit int8, or a node cannot be written; says which and what to do.
    """
    newest = onnx.defs.onnx_opset_version()
    if not MIN_OPSET <= opset <= newest:
        raise InputError(f"opset {opset} cannot hold this model; expected {MIN_OPSET} to {newest}")
    writer = _Writer(graph, signed)
    for node in graph.nodes:
        writer.write(node)
    imports = [helper.make_opsetid("", opset)]
    return writer.model(imports, helper.find_min_ir_version_for(imports))


class _Writer(Collector):
    """Writes one operation of the graph after the other."""

    def __init__(self, graph: IntegerGraph, signed: bool) -> None:
        super().__init__(graph)
        self.detours = not signed
        self.containers = {
            name: _container(name, tensor.dtype, signed)
            for name, tensor in graph.tensors.items() if tensor.scale is not None
        }  # fmt: skip
        self.rounded = {name for node in graph.nodes if self.detours and self.rounds(node) for name in g.node_inputs(node)}
        """Tensors whose rounding must not be left to the QuantizeLinear."""

    def rounds(self, node: g.Node) -> bool:
        """Whether an operation on two tensors leaves more than whole numbers of its output's scale."""
        return isinstance(node, g.Multiply) or (isinstance(node, g.Add) and min(self.graph.add_ratios(node)) < 1)

    def write(self, node: g.Node) -> None:
        handler = HANDLERS.get(type(node))
        if handler is None:
            raise ExportError(f"{node.name}: {type(node).__name__} cannot be written as QDQ; export for the target ort")
        handler(self, node)

    def quantize(self, node: g.Quantize) -> None:
        """Pixels to real values on the grid of the first tensor's scale, or next to it: both quantize alike."""
        scale = np.float32(self.scale(node.output))
        real = self.node("Cast", f"{node.name}/float", [node.input], to=TensorProto.FLOAT)
        shape = (1, -1, 1, 1)
        if is_robust(node, self.graph.tensors[node.output].dtype):
            factor, offset = scale / node.scale, scale * node.zero_point.astype(np.float32)
            real = self.binary("Mul", f"{node.name}/multiply", real, factor.reshape(shape))
            real = self.binary("Add", node.name, real, offset.reshape(shape))
        else:
            real = self.binary("Div", f"{node.name}/divide", real, node.scale.reshape(shape))
            real = self.node("Round", f"{node.name}/round", [real])
            real = self.binary("Add", f"{node.name}/shift", real, node.zero_point.astype(np.float32).reshape(shape))
            real = self.binary("Mul", node.name, real, scale)
        self.requantize_late(node, real)

    def conv(self, node: g.Conv) -> None:
        inputs = [*self.real(node), *self.parameters(node, self.product_scale(node))]
        self.requantize(node, self.node("Conv", node.name, inputs, kernel_shape=node.weight.shape[2:],
                        strides=node.stride, pads=node.padding, dilations=node.dilation, group=node.groups))  # fmt: skip

    def linear(self, node: g.Linear) -> None:
        """A matrix product; the last one leaves accumulators, and one multiplication rounds each logit.

        Accumulators are whole numbers; that they are rounded keeps runtimes from moving the scale before the bias.
        """
        last = self.graph.nodes[-1]
        if self.graph.tensors[node.output].scale is not None or not isinstance(last, g.Dequantize):
            inputs = [*self.real(node), *self.parameters(node, self.product_scale(node))]
            self.requantize(node, self.node("Gemm", node.name, inputs, transB=1))
            return
        inputs = [*self.real(node), *self.parameters(node, np.full(len(node.bias), 1 / self.scale(node.input)))]
        product = self.node("Gemm", node.name, inputs, transB=1)
        accumulators = self.node("Round", f"{node.name}/whole", [product])
        scale = self.constant(f"{last.name}/scale", self.float32(last, last.scale.astype(np.float64)))
        self.node("Mul", last.name, [accumulators, scale], last.output)

    def dequantize(self, node: g.Dequantize) -> None:
        tensor = self.graph.tensors[node.input]
        if tensor.scale is None:
            return  # written with the Gemm before it
        factor = self.float32(node, node.scale.astype(np.float64) / self.scale(node.input))
        self.node("Mul", node.name, [*self.real(node), self.constant(f"{node.name}/scale", factor)], node.output)

    def add(self, node: g.Add) -> None:
        self.requantize(node, self.node("Add", node.name, self.real(node)))

    def multiply(self, node: g.Multiply) -> None:
        product = self.node("Mul", node.name, self.real(node))
        factor = float(self.graph.product_multiplier(node)) * self.scale(node.output)
        factor /= self.scale(node.input) * self.scale(node.other)
        product = self.binary("Mul", f"{node.name}/rescale", product, self.float32(node, np.array(factor)))
        self.requantize(node, product)

    def lookup(self, node: g.Lookup) -> None:
        """Whole numbers as indices of a table of real values."""
        (real,) = self.real(node)
        index = self.binary("Mul", f"{node.name}/unscale", real, np.float32(1 / self.scale(node.input)))
        lowest = self.graph.tensors[node.input].dtype.qmin
        if lowest:
            index = self.binary("Sub", f"{node.name}/shift", index, np.float32(lowest))
        index = self.node("Cast", f"{node.name}/index", [index], to=TensorProto.INT32)
        table = self.constant(f"{node.name}/table", (node.table * self.scale(node.output)).astype(np.float32))
        self.quantized(node, self.node("Gather", node.name, [table, index], axis=0))

    def concat(self, node: g.Concat) -> None:
        self.quantized(node, self.node("Concat", node.name, self.real(node), axis=1))

    def slice(self, node: g.Slice) -> None:
        limits = {"start": node.start, "stop": node.stop, "axis": 1}
        operands = [self.constant(f"{node.name}/{key}", np.array([value], np.int64)) for key, value in limits.items()]
        self.quantized(node, self.node("Slice", node.name, [*self.real(node), *operands]))

    def select(self, node: g.Take) -> None:
        self.quantized(node, self.take(node, *self.real(node)))

    def shuffle(self, node: g.Shuffle) -> None:
        channels, height, width = self.graph.tensors[node.input].shape
        split = np.array([0, node.groups, channels // node.groups, height, width], np.int64)
        merged = np.array([0, channels, height, width], np.int64)
        real = self.node("Reshape", f"{node.name}/split", [*self.real(node), self.constant(f"{node.name}/groups", split)])
        real = self.node("Transpose", node.name, [real], perm=(0, 2, 1, 3, 4))
        shape = self.constant(f"{node.name}/shape", merged)
        self.quantized(node, self.node("Reshape", f"{node.name}/merge", [real, shape]))

    def max_pool(self, node: g.MaxPool) -> None:
        self.quantized(node, self.node("MaxPool", node.name, self.real(node),
                       kernel_shape=node.kernel, strides=node.stride, pads=node.padding))  # fmt: skip

    def average(self, node: g.AveragePool) -> None:
        """A mean, times what the powers of two leave of the ratio between both scales."""
        source, target = self.graph.tensors[node.input], self.graph.tensors[node.output]
        if source.shape[1:] == node.kernel:
            real = self.node("GlobalAveragePool", node.name, self.real(node))
        else:
            real = self.node("AveragePool", node.name, self.real(node), kernel_shape=node.kernel, strides=node.stride)
        ratio = (source.scale or 0.0) / self.scale(node.input) * self.scale(node.output) / (target.scale or 1.0)
        if ratio != 1:
            real = self.binary("Mul", f"{node.name}/rescale", real, np.float32(ratio))
        self.requantize_late(node, real)

    def pad(self, node: g.Pad) -> None:
        top, left, bottom, right = node.padding
        pads = np.array([0, node.channels[0], top, left, 0, node.channels[1], bottom, right], np.int64)
        inputs = [*self.real(node), self.constant(f"{node.name}/pads", pads), self.constant("float/0.0", np.float32(0))]
        self.quantized(node, self.node("Pad", node.name, inputs))

    def flatten(self, node: g.Flatten) -> None:
        self.quantized(node, self.node("Flatten", node.name, self.real(node), axis=1))

    def clamp(self, node: g.Clamp) -> None:
        dtype = self.graph.tensors[node.output].dtype
        limits = max(node.low, dtype.qmin), min(node.high, dtype.qmax)
        (real,) = self.real(node)
        self.quantized(node, self.clip(node.name, real, node.output, limits))

    def scale(self, tensor: str) -> float:
        scale = self.graph.tensors[tensor].scale
        if scale is None:
            raise ExportError(f"tensor {tensor!r} has no scale and cannot be written as QDQ")
        return file_scale(scale)

    def product_scale(self, node: g.Conv | g.Linear) -> NDArray[np.float64]:
        """(O,) scales of the weights with which the scales in the file give the graph's own multiplier."""
        return self.graph.multiplier(node).astype(np.float64) * self.scale(node.output) / self.scale(node.input)

    def parameters(self, node: g.Conv | g.Linear, weight_scale: NDArray[np.float64]) -> list[str]:
        """Names of the dequantized weights and of the float32 bias."""
        stored = [
            self.constant(f"{node.name}/weight", node.weight),
            self.constant(f"{node.name}/weight_scale", self.float32(node, weight_scale)),
            self.constant(f"{node.name}/weight_zero_point", np.zeros(len(weight_scale), np.int8)),
        ]
        weight = self.node("DequantizeLinear", f"{node.name}/weight/dequantize", stored, axis=0)
        bias = node.bias.astype(np.float64)
        tensors = self.graph.tensors
        if tensors[node.output].scale is not None:
            bound = g.accumulator_bound(node, tensors[node.input].dtype)
            bias += bias_shift(self.graph.multiplier(node), tensors[node.output].dtype, bound)
        bias *= self.scale(node.input) * weight_scale
        return [weight, self.constant(f"{node.name}/bias", bias.astype(np.float32))]

    def float32(self, node: g.Node, scales: NDArray[np.float64]) -> NDArray[np.float32]:
        limits = np.finfo(np.float32)
        if (scales < float(limits.tiny)).any() or (scales > float(limits.max)).any():
            raise ExportError(
                f"{node.name}: its scales span {scales.min():.3g} to {scales.max():.3g}, beyond normal float32 numbers; "
                "the calibration or the training of this layer went wrong"
            )
        return scales.astype(np.float32)

    def real(self, node: g.Node) -> list[str]:
        """The inputs of a node, each through a DequantizeLinear of its own, which runtimes fuse into the reader."""
        return [
            self.node("DequantizeLinear", f"{node.name}/input{index}", [name, *self.quantization(name)])
            for index, name in enumerate(g.node_inputs(node))
        ]

    def requantize(self, node: g.Node, real: str) -> None:
        """Real values to the integers of a node's output, whose type may be narrower than int8 or uint8."""
        real = self.clip(f"{node.name}/clip", real, node.output, self.limits(node.output))
        self.quantized(node, real)

    def requantize_late(self, node: g.Node, real: str) -> None:
        """As `requantize`; for OpenVINO by way of 8 bits, so that the limits meet whole numbers."""
        container = self.containers[node.output]
        if self.detours and self.limits(node.output) != (container.qmin, container.qmax):
            quantization = self.quantization(node.output)
            wide = self.node("QuantizeLinear", f"{node.name}/wide", [real, *quantization])
            real = self.node("DequantizeLinear", f"{node.name}/wide/real", [wide, *quantization])
        self.requantize(node, real)

    def limits(self, tensor: str) -> tuple[int, int]:
        dtype = self.graph.tensors[tensor].dtype
        return dtype.qmin, dtype.qmax

    def clip(self, name: str, real: str, tensor: str, limits: tuple[int, int]) -> str:
        """Real values limited to those of the integers `limits`; where the file's type does that, nothing.

        Not before an explicit rounding, whose scales OpenVINO would move into the product.
        """
        container = self.containers[tensor]
        if limits == (container.qmin, container.qmax) and tensor not in self.rounded:
            return real
        if limits == (0, container.qmax):
            return self.node("Relu", name, [real])
        bounds = [self.constant(f"float/{q * self.scale(tensor)!r}", np.float32(q * self.scale(tensor))) for q in limits]
        if limits[0] == 0 and not self.detours and self.nodes[-1].op_type == "Gemm":
            # TensorRT 10 drops the upper limit of a Clip from 0 behind a matrix product (NVIDIA/TensorRT issue 4606).
            return self.node("Min", f"{name}/high", [self.node("Relu", name, [real]), bounds[1]])
        return self.node("Clip", name, [real, *bounds])

    def quantized(self, node: g.Node, real: str) -> None:
        if node.output in self.rounded:  # by powers of two: exact
            scale = np.float32(self.scale(node.output))
            real = self.binary("Mul", f"{node.name}/whole/unscale", real, 1 / scale)
            real = self.node("Round", f"{node.name}/whole", [real])
            real = self.binary("Mul", f"{node.name}/whole/scale", real, scale)
        self.node("QuantizeLinear", f"{node.name}/quantize", [real, *self.quantization(node.output)], node.output)

    def quantization(self, tensor: str) -> list[str]:
        """Names of a tensor's scale and zero point."""
        scale = self.constant(f"{tensor}/scale", np.float32(self.scale(tensor)))
        container = self.containers[tensor]
        return [scale, self.constant(f"{container}/0", np.zeros((), container.container))]

    def binary(self, op: str, name: str, real: str, operand: Any) -> str:
        return self.node(op, name, [real, self.constant(f"{name}/operand", operand)])


HANDLERS: dict[type[Any], Callable[[_Writer, Any], None]] = {
    g.Quantize: _Writer.quantize, g.Conv: _Writer.conv, g.Linear: _Writer.linear, g.Add: _Writer.add,
    g.Multiply: _Writer.multiply, g.Lookup: _Writer.lookup, g.Concat: _Writer.concat, g.Slice: _Writer.slice,
    g.Take: _Writer.select, g.Shuffle: _Writer.shuffle, g.MaxPool: _Writer.max_pool, g.AveragePool: _Writer.average,
    g.Pad: _Writer.pad, g.Flatten: _Writer.flatten, g.Clamp: _Writer.clamp, g.Dequantize: _Writer.dequantize,
}  # fmt: skip


def _container(tensor: str, dtype: IntType, signed: bool) -> IntType:
    container = SIGNED if signed or dtype.signed else UNSIGNED
    if dtype.qmax > container.qmax:
        raise ExportError(
            f"tensor {tensor!r} is {dtype} ({dtype.qmin} to {dtype.qmax}), and this target stores int8 only; harden or "
            "calibrate the model for this target, with signed activations"
        )
    return container
