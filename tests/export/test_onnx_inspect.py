"""Foreign ONNX files: which layers really run in integers, and why the others do not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest

from edgeguard.inspection import format_inspection

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgeguard.export.onnx_inspect import examine, printable  # noqa: E402
from edgeguard.export.onnx_writer import to_onnx  # noqa: E402

RNG = np.random.default_rng(0)


class Net:
    """Nodes and constants of a small file."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.functions: list[Any] = []

    def constant(self, name: str, values: Any, dtype: Any = np.float32) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def node(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [f"{name}.out"], name=name, **attributes))
        return f"{name}.out"

    def quantized(self, x: str, name: str, bits: int = 8) -> str:
        """QuantizeLinear, Clip below 8 bits, DequantizeLinear: an activation in QCDQ form."""
        scale, zero = self.constant(f"{name}.scale", 0.1), self.constant(f"{name}.zero", 0, np.uint8)
        x = self.node("QuantizeLinear", [x, scale, zero], f"{name}.quantize")
        if bits < 8:
            top = self.constant(f"{name}.top", (1 << bits) - 1, np.uint8)
            x = self.node("Clip", [x, zero, top], f"{name}.clip")
        return self.node("DequantizeLinear", [x, scale, zero], f"{name}.dequantize")

    def weight(self, name: str, shape: tuple[int, ...], bits: int = 4) -> str:
        """An int8 initializer, Clip, DequantizeLinear per channel: a weight in QCDQ form."""
        top = (1 << (bits - 1)) - 1
        x = self.constant(f"{name}.weight", RNG.integers(-top, top + 1, shape), np.int8)
        low, high = self.constant(f"{name}.low", -top, np.int8), self.constant(f"{name}.high", top, np.int8)
        x = self.node("Clip", [x, low, high], f"{name}.weight.clip")
        scale = self.constant(f"{name}.weight.scale", np.full(shape[0], 0.02))
        zero = self.constant(f"{name}.weight.zero", np.zeros(shape[0]), np.int8)
        return self.node("DequantizeLinear", [x, scale, zero], f"{name}.weight.dequantize", axis=0)

    def model(self, output: str, shape: Sequence[int | str] = ("N", 3, 8, 8), opset: int = 21) -> Any:
        graph = helper.make_graph(
            self.nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [onnx.ValueInfoProto(name=output)], self.constants,
        )  # fmt: skip
        graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1),
                  helper.make_opsetid("local", 1)]  # fmt: skip
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=self.functions)


def inspected(model: Any, folder: Path) -> dict[str, Any]:
    onnx.save(model, folder / "model.onnx")
    return examine(folder / "model.onnx")


def by_name(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {layer["name"]: layer for layer in document["layers"]}


def qcdq() -> Any:
    """A 4-bit QCDQ net: the first convolution can be fused, each of the others is spoiled as exporters spoil them."""
    net = Net()
    x = net.quantized("x", "in")
    x = net.quantized(net.node("Conv", [x, net.weight("fused", (8, 3, 3, 3))], "fused", pads=[1] * 4), "act1", 4)
    y = net.node("Conv", [x, net.weight("summed", (8, 8, 3, 3))], "summed", pads=[1] * 4)
    x = net.quantized(net.node("Add", [x, y], "sum"), "act2", 4)
    x = net.node("Clip", [x, net.constant("low", 0.0), net.constant("high", 0.7)], "relu6")
    x = net.quantized(net.node("Conv", [x, net.weight("clipped", (8, 1, 3, 3))], "clipped", group=8), "act3", 4)
    x = net.node("Gemm", [net.node("Flatten", [x], "flatten"), net.weight("fc", (10, 288))], "fc", transB=1)
    return net.model(x)


def test_a_qcdq_export_names_its_float_layers_and_says_why(tmp_path: Path) -> None:
    document = inspected(qcdq(), tmp_path)
    layers = by_name(document)
    macs = {"fused": 64 * 8 * 27, "summed": 64 * 8 * 72, "clipped": 36 * 8 * 9, "fc": 2880}
    assert {name: layer["macs"] for name, layer in layers.items()} == macs
    assert document["float_layers"] == ["summed", "clipped", "fc"]
    assert layers["fused"]["kernel"] == "QLinearConv (CPUExecutionProvider)"
    assert (layers["fused"]["storage_bits"], layers["fused"]["compute_bits"], layers["fused"]["reason"]) == (8, 8, None)
    assert layers["summed"]["reason"] == "its result is not quantized before Add 'sum' reads it"
    assert layers["clipped"]["reason"] == "Clip between DequantizeLinear and it, which the runtime does not fold"
    assert layers["fc"]["reason"] == "Flatten between DequantizeLinear and it, which the runtime does not fold"
    assert document["integer_mac_coverage"] == macs["fused"] / sum(macs.values())
    weights = 8 * 27 + 8 * 72 + 8 * 9 + 2880
    assert document["float32_bytes"] == document["file_bytes"] + 3 * weights
    text = format_inspection(document)
    assert "  summed: its result is not quantized before Add 'sum' reads it" in text


def test_a_dynamically_quantized_model_names_its_float_convolutions(tmp_path: Path) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    net = Net()
    x = net.node("Conv", ["x", net.constant("w1", RNG.normal(size=(8, 3, 3, 3)))], "first")
    x = net.node("Relu", [x], "relu")
    x = net.node("Conv", [x, net.constant("w2", RNG.normal(size=(8, 8, 3, 3)))], "second")
    x = net.node("Gemm", [net.node("Flatten", [x], "flatten"), net.constant("w3", RNG.normal(size=(128, 10)))], "fc")
    onnx.save(net.model(x, opset=17), tmp_path / "float.onnx")
    logging.getLogger().disabled, before = True, logging.getLogger().disabled
    try:
        quantization.quantize_dynamic(
            str(tmp_path / "float.onnx"), str(tmp_path / "model.onnx"), op_types_to_quantize=["MatMul", "Gemm"]
        )
    finally:
        logging.getLogger().disabled = before
    document = examine(tmp_path / "model.onnx")
    assert document["float_layers"] == ["first", "second"]
    assert {layer["reason"] for layer in document["layers"]} == {"plain float weights", None}
    assert [layer["macs"] for layer in document["layers"]] == [36 * 8 * 27, 16 * 8 * 72, 1280]
    assert [layer["storage_bits"] for layer in document["layers"]] == [32, 32, 8]
    assert document["integer_mac_coverage"] == 1280 / document["macs"]


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_our_own_export_is_all_integer(tmp_path: Path, bits: int) -> None:
    graph = graphs.every_op(bits)
    document = inspected(to_onnx(graph), tmp_path)
    layers = by_name(document)
    ours = {node.name: node for node in graph.nodes if hasattr(node, "weight")}
    assert document["integer_mac_coverage"] == 1
    assert document["float_layers"] == document["unknown_ops"] == []
    for name, node in ours.items():
        assert layers[name]["macs"] == graph.macs(node)
        assert layers[name]["storage_bits"] == node.weight_type.storage_bits
    assert "100% of" in format_inspection(document)


def test_low_bit_weights_that_are_dequantized(tmp_path: Path) -> None:
    net = Net()
    int4 = helper.tensor_dtype_to_np_dtype(TensorProto.INT4)
    weight = net.constant("w", RNG.integers(-7, 8, (8, 3, 3, 3)).astype(np.int8), int4)
    real = net.node("DequantizeLinear", [weight, net.constant("scale", 0.1), net.constant("zero", 0, int4)], "real")
    x = net.node("Conv", [net.quantized("x", "in"), real], "conv")
    (layer,) = inspected(net.model(net.quantized(x, "out")), tmp_path)["layers"]
    assert (layer["storage_bits"], layer["compute_bits"]) == (4, 32)
    assert layer["reason"] == "weights stored as INT4 are dequantized to float"


def test_other_reasons(tmp_path: Path) -> None:
    net = Net()
    x = net.node("Conv", [net.node("Sigmoid", ["x"], "gate"), net.weight("lonely", (8, 3, 1, 1))], "lonely")
    x = net.node("Conv", [net.quantized(x, "q"), net.constant("w", RNG.normal(size=(8, 8, 1, 1)))], "plain")
    x = net.node("MatMul", [x, x], "squared")
    x = net.node("ConvTranspose", [x, net.constant("t", RNG.normal(size=(8, 4, 2, 2)))], "up", strides=[2, 2])
    layers = by_name(inspected(net.model(x), tmp_path))
    assert "no quantized activation reaches it: it reads Sigmoid 'gate'" in layers["lonely"]["reason"]
    assert layers["plain"]["reason"] == "plain float weights, though its input is quantized"
    assert "both operands are computed at run time" in layers["squared"]["reason"]
    assert (layers["squared"]["macs"], layers["squared"]["storage_bits"]) == (8 * 64 * 8, 0)
    assert layers["up"]["macs"] == 8 * 64 * 4 * 4


def test_an_unknown_operation_is_counted_as_float_and_named(tmp_path: Path) -> None:
    net = Net()
    x = net.node("Einsum", ["x", net.constant("w", RNG.normal(size=(8, 5)))], "sum", equation="nchw,wk->nchk")
    document = inspected(net.model(x), tmp_path)
    assert document["unknown_ops"] == ["Einsum"]
    assert document["float_layers"] == ["sum"]
    assert document["integer_mac_coverage"] == 0
    assert "not known whether Einsum multiplies integers" in document["layers"][0]["reason"]
    assert any("lower bounds" in note for note in document["notes"])


def test_layers_inside_an_if_are_counted(tmp_path: Path) -> None:
    net = Net()
    branches = []
    for name in ("then", "else"):
        net.constant(f"{name}.w", RNG.normal(size=(4, 3, 1, 1)))
        node = helper.make_node("Conv", ["x", f"{name}.w"], [f"{name}.y"], name="same")
        branches.append(helper.make_graph([node], name, [], [
            helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, None)
        ]))  # fmt: skip
    total = net.node("ReduceSum", ["x"], "total", keepdims=0)
    wanted = net.node("Greater", [total, net.constant("limit", 0.0)], "wanted")
    x = net.node("If", [wanted], "choice", then_branch=branches[0], else_branch=branches[1])
    document = inspected(net.model(x), tmp_path)
    assert document["float_layers"] == ["choice/else_branch/same", "choice/then_branch/same"]
    assert document["macs"] == 2 * 12
    assert any("inside If, Loop or Scan" in note for note in document["notes"])


def test_layers_of_a_local_function_are_named_as_the_runtime_does(tmp_path: Path) -> None:
    net = Net()
    body = helper.make_node("MatMul", ["a", "b"], ["c"], name="product")
    net.functions.append(helper.make_function("local", "Twice", ["a", "b"], ["c"], [body],
                                              [helper.make_opsetid("", 21)]))  # fmt: skip
    x = net.node("Twice", ["x", net.constant("w", RNG.normal(size=(8, 5)))], "call", domain="local")
    document = inspected(net.model(x), tmp_path)
    assert len(document["float_layers"]) == 1
    assert document["macs"] >= 40
    assert any("belong to no layer of the file" in note for note in document["notes"])


def test_unknown_sizes_make_a_lower_bound_but_an_unknown_batch_is_one(tmp_path: Path) -> None:
    net = Net()
    x = net.node("Conv", ["x", net.constant("w", RNG.normal(size=(4, 3, 1, 1)))], "conv")
    (known,) = inspected(net.model(x), tmp_path)["layers"]
    (unknown,) = inspected(net.model(x, ("N", 3, "H", 8)), tmp_path)["layers"]
    assert (known["macs"], known["macs_exact"]) == (64 * 12, True)
    assert (unknown["macs"], unknown["macs_exact"]) == (8 * 12, False)


def test_constant_and_dead_operations_are_no_layers(tmp_path: Path) -> None:
    net = Net()
    square = net.constant("square", RNG.normal(size=(8, 8)))
    weight = net.node("MatMul", [square, square], "folded")
    net.node("MatMul", ["x", square], "dead")
    document = inspected(net.model(net.node("MatMul", ["x", weight], "used")), tmp_path)
    assert [layer["name"] for layer in document["layers"]] == ["used"]


def test_a_model_without_products(tmp_path: Path) -> None:
    net = Net()
    document = inspected(net.model(net.node("Relu", ["x"], "relu")), tmp_path)
    assert (document["macs"], document["integer_mac_coverage"], document["layers"]) == (0, None, [])
    assert "no multiply-accumulates" in format_inspection(document)


def test_names_cannot_steer_the_terminal(tmp_path: Path) -> None:
    net = Net()
    evil = "größe\x1b[31m\x9b2J\u202e\n"
    x = net.node("Conv", ["x", net.constant("w", RNG.normal(size=(4, 3, 1, 1)))], evil)
    document = inspected(net.model(x), tmp_path)
    assert document["float_layers"] == ["größe\\x1b[31m\\x9b2J\\u202e\\n"]
    assert all(line.isprintable() for line in format_inspection(document).splitlines())


def test_long_names_are_cut() -> None:
    assert printable("a" * 1000) == "a" * 160 + "…"


def test_a_brevitas_export(tmp_path: Path) -> None:
    """The real exporter, where `onnxoptimizer` is installed."""
    pytest.importorskip("onnxoptimizer")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch")
        from brevitas import nn as qnn
        from brevitas.export import export_onnx_qcdq

        net = torch.nn.Sequential(
            qnn.QuantIdentity(return_quant_tensor=True),
            qnn.QuantConv2d(3, 8, 3, weight_bit_width=4), torch.nn.BatchNorm2d(8),
            qnn.QuantReLU(bit_width=4, return_quant_tensor=True),
            qnn.QuantConv2d(8, 8, 3, weight_bit_width=4), qnn.QuantReLU(bit_width=4, return_quant_tensor=True),
            torch.nn.Flatten(), qnn.QuantLinear(128, 10, bias=True, weight_bit_width=4),
        )  # fmt: skip
        net(torch.randn(4, 3, 8, 8))
        export_onnx_qcdq(net.eval(), args=torch.randn(1, 3, 8, 8), export_path=str(tmp_path / "model.onnx"),
                         opset_version=17, dynamo=False)  # fmt: skip
    document = examine(tmp_path / "model.onnx")
    assert document["float_layers"] == ["/1/Conv", "/7/Gemm"]
    assert "before BatchNormalization" in document["layers"][0]["reason"]
    assert [layer["macs"] for layer in document["layers"]] == [36 * 8 * 27, 16 * 8 * 72, 1280]
