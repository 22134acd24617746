"""Correct QDQ graphs keep every rule; each wrong graph breaks exactly the rule that it was made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graphs
import numpy as np
import pytest

from edgeguard.errors import ExportError, InputError
from edgeguard.inttype import IntType

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgeguard import graph as g  # noqa: E402
from edgeguard.export.trt_qdq_rules import QDQ_RULES  # noqa: E402
from edgeguard.export.trt_rules import RULES, check, require_rules  # noqa: E402

VERSIONS = [(8, 5), (8, 6), (10, 3), (10, 16), (11, 0), (11, 4)]
Mutation = Callable[["Net"], None]


class Net:
    """pixels -> Cast -> Mul -> Q -> DQ -> Conv -> Relu -> Q -> DQ, DQ -> Conv -> Q -> DQ -> Add -> ... -> Gemm."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 3, 8, 8])
        self.opset = 17
        self.node("Cast", "pixels", name="cast", to=TensorProto.FLOAT)
        self.node("Mul", "cast", self.constant("factor", np.float32(0.01)), name="scaled")
        self.quantized("scaled", "x")
        self.conv("x", "conv", 3)
        self.node("Relu", "conv", name="relu")
        self.quantized("relu", "y")
        self.conv("y", "branch", 4)
        self.node("Clip", "branch", self.constant("low", np.float32(-1)), self.constant("high", np.float32(1)),
                  name="clip")  # fmt: skip
        self.quantized("clip", "z")
        self.dequantize("y", "y2")
        self.node("Add", "y2", "z.dq", name="sum")
        self.quantized("sum", "s")
        self.node("MaxPool", "s.dq", name="pool", kernel_shape=[8, 8])
        self.node("Flatten", "pool", name="flat")
        self.quantized("flat", "f")
        weight = self.constant("fc.weight", np.full((10, 4), 3, np.int8))
        points = self.constant("fc.points", np.zeros(10, np.int8))
        scales = self.constant("fc.scales", np.full(10, 0.1, np.float32))
        self.node("DequantizeLinear", weight, scales, points, name="fc.dq", axis=0)
        bias = self.constant("fc.bias", np.zeros(10, np.float32))
        self.node("Gemm", "f.dq", "fc.dq", bias, name="logits", transB=1)

    def conv(self, source: str, name: str, channels: int) -> None:
        weight = self.constant(f"{name}.weight", np.full((4, channels, 3, 3), -127, np.int8))
        scales = self.constant(f"{name}.scales", np.full(4, 0.1, np.float32))
        self.node("DequantizeLinear", weight, scales, self.constant(f"{name}.points", np.zeros(4, np.int8)),
                  name=f"{name}.dq", axis=0)  # fmt: skip
        bias = self.constant(f"{name}.bias", np.zeros(4, np.float32))
        self.node("Conv", f"{source}.dq", f"{name}.dq", bias, name=name, kernel_shape=[3, 3], pads=[1] * 4)

    def quantized(self, source: str, name: str) -> None:
        scale, zero = self.constant(f"{name}.scale", np.float32(0.1)), self.constant(f"{name}.zero", np.int8(0))
        self.node("QuantizeLinear", source, scale, zero, name=f"{name}.q", output=name)
        self.dequantize(name, f"{name}.dq")

    def dequantize(self, name: str, output: str) -> None:
        self.node("DequantizeLinear", name, f"{name}.scale", f"{name}.zero", name=output)

    def constant(self, name: str, values: Any) -> str:
        self.constants[name] = numpy_helper.from_array(np.asarray(values), name)
        return name

    def node(self, op: str, *inputs: str, name: str, output: str = "", at: int | None = None, **attributes: Any) -> None:
        node = helper.make_node(op, inputs, [output or name], name=name, **attributes)
        self.nodes.insert(len(self.nodes) if at is None else at, node)

    def find(self, name: str) -> Any:
        return next(node for node in self.nodes if node.name == name)

    def set(self, name: str, **attributes: Any) -> None:
        node = self.find(name)
        kept = [a for a in node.attribute if a.name not in attributes]
        del node.attribute[:]
        node.attribute.extend([*kept, *(helper.make_attribute(key, value) for key, value in attributes.items())])

    def after(self, name: str, op: str, *more: str, new: str, **attributes: Any) -> None:
        """Insert an operation that reads a node's output, for the next node in the list."""
        index = self.nodes.index(self.find(name))
        output = self.nodes[index].output[0]
        for node in self.nodes[index + 1 :]:
            for position, read in enumerate(node.input):
                if read == output:
                    node.input[position] = new
        self.node(op, output, *more, name=new, at=index + 1, **attributes)

    def model(self) -> Any:
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])
        graph = helper.make_graph(self.nodes, "net", [self.pixels], [logits], list(self.constants.values()))
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.example", 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=8)


def broken(mutation: Mutation, version: tuple[int, int] = (10, 3)) -> tuple[set[str], str]:
    net = Net()
    mutation(net)
    found = check(net.model(), version)
    return {violation.rule for violation in found}, " ".join(map(str, found))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_correct_graph_keeps_every_rule(version: tuple[int, int]) -> None:
    assert check(Net().model(), version) == ()
    require_rules(Net().model(), version)


def signed_graph(bits: int) -> g.IntegerGraph:
    """A net with signed activations throughout, as for this target."""
    b = graphs.Builder(bits, (3, 12, 12), seed=3)
    x = b.conv(b.quantize(), 8, bits=8, signed=True)
    y = b.conv(x, 8, signed=True, groups=8, scale=b.tensors[x].scale)
    x = b.move(g.Clamp, b.add(x, y, signed=True), 0, IntType(bits, True).qmax)
    x = b.move(g.MaxPool, x, (2, 2), (2, 2), (0, 0, 0, 0))
    x = b.concat(x, b.move(g.Pad, x, (1, 1), (0, 0, 0, 0)))
    return b.finish(b.linear(b.move(g.Flatten, b.average(x)), 10, bits=8, accumulators=True))


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("version", [(8, 6), (10, 3), (11, 4)])
def test_the_writer_keeps_every_rule(bits: int, version: tuple[int, int]) -> None:
    from edgeguard.export.qdq_writer import to_qdq

    assert check(to_qdq(signed_graph(bits), signed=True), version) == ()


def _no_zero_point(net: Net) -> None:
    del net.find("x.q").input[2:]


def _uint8(net: Net) -> None:
    net.constant("y.zero", np.uint8(0))


def _per_channel_activation(net: Net) -> None:
    net.constant("y.scale", np.full(4, 0.1, np.float32))
    net.constant("y.zero", np.zeros(4, np.int8))
    for name in ("y.q", "y.dq", "y2"):
        net.set(name, axis=1)


def _float_weights(net: Net) -> None:
    net.constant("float", np.ones((4, 3, 3, 3), np.float32))
    net.find("conv").input[1] = "float"
    net.nodes.remove(net.find("conv.dq"))


def _weight_axis(net: Net) -> None:
    net.set("fc.dq", axis=1)
    net.constant("fc.scales", np.full(4, 0.1, np.float32))
    net.constant("fc.points", np.zeros(4, np.int8))


def _computed_bias(net: Net) -> None:
    net.constant("fc.int", np.zeros(10, np.int32))
    net.constant("fc.int.zero", np.zeros(10, np.int32))
    at = net.nodes.index(net.find("logits"))
    net.node("DequantizeLinear", "fc.int", "fc.scales", "fc.int.zero", name="fc.int.dq", axis=0, at=at)
    net.find("logits").input[2] = "fc.int.dq"


def _float_activation(net: Net) -> None:
    net.find("branch").input[0] = "relu"


def _shared_dequantize(net: Net) -> None:
    net.find("sum").input[0] = "y.dq"


def _float_branch(net: Net) -> None:
    net.find("sum").input[0] = "relu"


def _integer_clip(net: Net) -> None:
    at = net.nodes.index(net.find("y2"))
    net.node("Clip", "y", net.constant("l8", np.int8(-7)), net.constant("h8", np.int8(7)), name="clip8", at=at)
    net.find("y2").input[0] = "clip8"


def _integer_pool(net: Net) -> None:
    net.after("s.q", "MaxPool", new="pool8", kernel_shape=[1, 1])


def _unknown_operator(net: Net) -> None:
    net.after("relu", "Shrink", new="shrink")


def _foreign_domain(net: Net) -> None:
    net.after("relu", "Special", new="special", domain="com.example")


def _double(net: Net) -> None:
    net.after("cast", "Cast", new="up", to=TensorProto.DOUBLE)
    net.constant("factor", np.float64(0.01))
    net.after("scaled", "Cast", new="down", to=TensorProto.FLOAT)


def _int64(net: Net) -> None:
    net.after("cast", "Cast", new="long", to=TensorProto.INT64)
    net.after("long", "Add", net.constant("one", np.int64(1)), new="plus")
    net.after("plus", "Cast", new="back", to=TensorProto.FLOAT)


def _pixels_to_pool(net: Net) -> None:
    net.node("MaxPool", "pixels", name="first", at=0, kernel_shape=[1, 1])
    net.find("cast").input[0] = "first"


def _dynamic_height(net: Net) -> None:
    net.pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 3, "H", 8])


def _opset(net: Net) -> None:
    net.opset = 21


def _dilated_pool(net: Net) -> None:
    net.set("pool", dilations=[2, 2], kernel_shape=[4, 4])


def _clip_after_gemm(net: Net) -> None:
    net.find("logits").output[0] = "product"
    net.constant("zero", np.float32(0))
    net.node("Clip", "product", "zero", "high", name="last", output="logits")


def _constant(name: str, values: Any) -> Mutation:
    return lambda net: net.constant(name, values) and None


WRONG: dict[str, tuple[str, Mutation, str]] = {
    "zero point": ("symmetric", _constant("y.zero", np.int8(3)), "zero point is 3"),
    "no zero point": ("quantized_to_int8", _no_zero_point, "no zero point"),
    "uint8": ("quantized_to_int8", _uint8, "uint8"),
    "zero scale": ("sound_scales", _constant("y.scale", np.float32(0)), "0.0"),
    "negative scale": ("sound_scales", _constant("y.scale", np.float32(-0.1)), "-0.1"),
    "subnormal scale": ("sound_scales", _constant("y.scale", np.float32(1e-40)), "subnormal"),
    "infinite scale": ("sound_scales", _constant("y.scale", np.float32(np.inf)), "finite"),
    "one bad scale": ("sound_scales", _constant("conv.scales", np.array([1, 1, np.nan, 1], np.float32)), "conv.dq"),
    "activation per channel": ("activations_per_tensor", _per_channel_activation, "4 scales"),
    "float weights": ("stored_weights", _float_weights, "conv: its weights are float"),
    "wide weights": ("narrow_weights", _constant("fc.weight", np.full((10, 4), -128, np.int8)), "-128"),
    "weight axis": ("weight_axis", _weight_axis, "axis 1"),
    "float activation": ("quantized_inputs", _float_activation, "branch"),
    "shared DequantizeLinear": ("own_dequantize", _shared_dequantize, "2 operations"),
    "float branch": ("quantized_sums", _float_branch, "sum"),
    "computed bias": ("float_bias", _computed_bias, "logits"),
    "integer clip": ("float_clip", _integer_clip, "clip8"),
    "integer pool": ("integers_are_dequantized", _integer_pool, "pool8"),
    "unknown operator": ("supported_operators", _unknown_operator, "no Shrink"),
    "foreign domain": ("supported_operators", _foreign_domain, "com.example"),
    "double": ("data_types", _double, "double"),
    "int64": ("data_types", _int64, "int64"),
    "pixels to a pool": ("pixels_are_cast", _pixels_to_pool, "first"),
    "dynamic height": ("only_the_batch_varies", _dynamic_height, "axis 2"),
    "opset": ("opset", _opset, "opset 21"),
    "dilated pool": ("window_operations", _dilated_pool, "dilation"),
    "clip after a product": ("clip_after_product", _clip_after_gemm, "last"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_graph_breaks_its_own_rule_and_no_other(name: str) -> None:
    rule, mutation, text = WRONG[name]
    rules, message = broken(mutation)
    assert rules == {rule}, message
    assert text in message


def test_every_rule_has_a_wrong_graph_and_a_source() -> None:
    assert {rule for rule, _, _ in WRONG.values()} == {rule.__name__ for rule in RULES}
    assert set(QDQ_RULES) <= set(RULES)
    assert all("Source:" in (rule.__doc__ or "") for rule in RULES)


def test_rules_depend_on_the_version() -> None:
    assert broken(_opset, (10, 15))[0] == set()
    assert broken(_opset, (8, 6))[0] == {"opset"}
    assert broken(_clip_after_gemm, (8, 6))[0] == set()


@pytest.mark.parametrize("version", [(8, 4), (7, 2), (12, 0)])
def test_an_unknown_version_is_refused(version: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="no rules for TensorRT"):
        check(Net().model(), version)


def test_an_invalid_model_is_one_violation() -> None:
    net = Net()
    net.nodes.reverse()
    assert [violation.rule for violation in check(net.model(), (10, 3))] == ["valid_onnx"]


def test_require_rules_names_the_first_and_counts_the_rest() -> None:
    net = Net()
    for name in ("x.scale", "y.scale", "z.scale", "s.scale"):
        net.constant(name, np.float32(0))
    with pytest.raises(ExportError, match=r"x\.q: its scale holds 0\.0.*sound_scales.*and 6 more"):
        require_rules(net.model(), (10, 3))
