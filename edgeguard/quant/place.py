"""Where quantizers go: a pure analysis of an fx graph, before anything is rewritten."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from edgeguard.errors import ExportError

MODULES: Mapping[type[nn.Module], str] = {
    nn.Conv2d: "conv",
    nn.Linear: "linear",
    nn.BatchNorm2d: "batchnorm",
    nn.ReLU: "relu",
    nn.ReLU6: "relu",
    nn.MaxPool2d: "maxpool",
    nn.AvgPool2d: "avgpool",
    nn.AdaptiveAvgPool2d: "avgpool",
    nn.Flatten: "flatten",
    nn.ConstantPad2d: "pad",
    nn.ZeroPad2d: "pad",
    nn.Identity: "identity",
}
FUNCTIONS: Mapping[Callable[..., Any], str] = {
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    torch.flatten: "flatten",
    F.pad: "pad",
    torch._C._nn.pad: "pad",
    torch.cat: "concat",
}
METHODS = {"flatten": "flatten", "add": "add", "contiguous": "identity"}
TRANSPARENT = frozenset({"maxpool", "pad", "flatten", "identity"})
"""Operations that only move integers: their output has the type and scale of their input."""
SUPPORTED = "convolution, linear, batch norm, ReLU, ReLU6, addition, max and average pooling, padding and flatten"


def kind(model: fx.GraphModule, node: fx.Node) -> str:
    """What a node computes, in our words.

    Raises:
        ExportError: naming the layer, the operation and what is supported.
    """
    if node.op in ("placeholder", "output"):
        return node.op
    found: str | None = None
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        found, what = MODULES.get(type(module)), type(module).__name__
    elif node.op == "call_function" and callable(node.target):
        found, what = FUNCTIONS.get(node.target), getattr(node.target, "__name__", str(node.target))
    else:
        found, what = METHODS.get(str(node.target)) if node.op == "call_method" else None, str(node.target)
    if found is None:
        raise ExportError(f"layer {node.name!r}: {what} cannot be quantized; supported are {SUPPORTED}")
    return found


@dataclass
class Point:
    """A place where an activation is quantized: the output of `tail`, computed by `head` and what is fused behind it."""

    head: fx.Node
    tail: fx.Node
    relu: fx.Node | None
    signed: bool
    ceiling: float | None
    role: str = "inner"
    group: int = 0


@dataclass
class Placement:
    """The analysis of one model: quantization points by tail, boundary layers, and the kind of every node."""

    kinds: dict[fx.Node, str]
    points: dict[fx.Node, Point] = field(default_factory=dict)
    first: fx.Node | None = None
    last: fx.Node | None = None

    def source(self, node: fx.Node) -> Point | None:
        """The point whose integers reach this node's output through operations that only move them."""
        while self.kinds[node] in TRANSPARENT and node not in self.points:
            node = node.all_input_nodes[0]
        return self.points.get(node)

    def consumers(self, node: fx.Node) -> list[fx.Node]:
        """The operations that read a node's integers, looking through those that only move them."""
        found: list[fx.Node] = []
        for user in node.users:
            found += self.consumers(user) if self.kinds[user] in TRANSPARENT else [user]
        return found


def place(model: fx.GraphModule) -> Placement:
    """Find every quantization point of a traced model.

    Raises:
        ExportError: an unsupported operation, or a structure that has no integer form, with the layer's name.
    """
    placement = Placement({node: kind(model, node) for node in model.graph.nodes})
    kinds = placement.kinds
    order = list(model.graph.nodes)
    compute = [node for node in order if kinds[node] in ("conv", "linear")]
    if not compute or kinds[compute[0]] != "conv" or kinds[compute[-1]] != "linear":
        raise ExportError("the model must begin with a convolution of the image and end in a linear layer")
    placement.first, placement.last = compute[0], compute[-1]
    if [kinds[user] for user in placement.last.users] != ["output"]:
        raise ExportError(f"layer {placement.last.name!r}: the last linear layer must give the logits")
    if kinds[placement.first.all_input_nodes[0]] != "placeholder":
        raise ExportError(f"layer {placement.first.name!r}: the first convolution must read the image itself")
    fused: set[fx.Node] = set()
    for node in order:
        if kinds[node] in ("conv", "linear", "add", "avgpool") and node is not placement.last:
            point = _point(model, placement, node)
            placement.points[point.tail] = point
            fused.update(_between(point))
        elif kinds[node] in ("batchnorm", "relu") and node not in fused:
            raise ExportError(f"layer {node.name!r}: a {kinds[node]} is supported right after a convolution or addition")
        elif kinds[node] == "concat":
            raise ExportError(f"layer {node.name!r}: concatenation cannot be quantized yet; supported are {SUPPORTED}")
    for point in placement.points.values():
        point.role = _role(placement, point)
    _group(placement)
    return placement


def _between(point: Point) -> list[fx.Node]:
    nodes, node = [], point.tail
    while node is not point.head:
        nodes.append(node)
        node = node.all_input_nodes[0]
    return nodes


def _point(model: fx.GraphModule, placement: Placement, head: fx.Node) -> Point:
    kinds, tail = placement.kinds, head

    def only_user(wanted: str) -> fx.Node | None:
        users = list(tail.users)
        return users[0] if len(users) == 1 and kinds[users[0]] == wanted else None

    if kinds[head] in ("conv", "linear"):
        tail = only_user("batchnorm") or tail
    relu = only_user("relu")
    tail = relu or tail
    ceiling = 6.0 if relu is not None and isinstance(model.get_submodule(str(relu.target)), nn.ReLU6) else None
    signed = relu is None
    if kinds[head] == "avgpool" and relu is None:
        below = placement.source(head.all_input_nodes[0])
        signed = below is None or below.signed
    return Point(head, tail, relu, signed, ceiling)


def _role(placement: Placement, point: Point) -> str:
    consumers = placement.consumers(point.tail)
    if all(node is placement.last for node in consumers):
        return "boundary"
    if all(placement.kinds[node] == "add" for node in consumers):
        return "residual"
    return "inner"


def _group(placement: Placement) -> None:
    """Number the groups: the two inputs and the output of an addition belong together."""
    points = list(placement.points.values())
    for index, point in enumerate(points):
        point.group = index
    for point in points:
        if placement.kinds[point.head] != "add":
            continue
        sources = [placement.source(node) for node in point.head.all_input_nodes]
        if len(sources) != 2 or None in sources:
            raise ExportError(f"layer {point.head.name!r}: an addition needs two quantized activations")
        joined = {point.group, *(source.group for source in sources if source is not None)}
        for other in points:
            if other.group in joined:
                other.group = min(joined)
