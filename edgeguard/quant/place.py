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
    nn.Hardswish: "function",
    nn.SiLU: "function",
    nn.Sigmoid: "function",
    nn.Hardsigmoid: "function",
    nn.MaxPool2d: "maxpool",
    nn.AvgPool2d: "avgpool",
    nn.AdaptiveAvgPool2d: "avgpool",
    nn.Flatten: "flatten",
    nn.ConstantPad2d: "pad",
    nn.ZeroPad2d: "pad",
    nn.ChannelShuffle: "shuffle",
    nn.Identity: "identity",
    nn.Dropout: "identity",
    nn.Dropout2d: "identity",
}
FUNCTIONS: Mapping[Callable[..., Any], str] = {
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    operator.mul: "multiply",
    operator.imul: "multiply",
    torch.mul: "multiply",
    torch.flatten: "flatten",
    F.pad: "pad",
    torch._C._nn.pad: "pad",
    torch.cat: "concat",
    torch.chunk: "chunk",
    operator.getitem: "slice",
}
METHODS = {"flatten": "flatten", "add": "add", "mul": "multiply", "chunk": "chunk", "contiguous": "identity"}
TRANSPARENT = frozenset({"maxpool", "pad", "flatten", "identity", "concat", "chunk", "slice", "shuffle"})
"""Operations that only move integers: their output has the type and scale of their inputs."""
ELEMENTWISE = frozenset({"add", "multiply", "function", "relu", "batchnorm"})
"""Operations that are cheap at 8 bits: what only they read is not narrowed."""
UNSIGNED = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid)
"""Functions whose values are never negative."""
HEADS = frozenset({"conv", "linear", "add", "multiply", "avgpool", "function", "relu", "batchnorm"})
"""Operations that make new values, which are quantized behind them."""
SUPPORTED = (
    "convolution, linear, batch norm, ReLU, ReLU6, Hardswish, SiLU, Sigmoid, Hardsigmoid, addition, multiplication, "
    "concatenation, chunk, channel shuffle, max and average pooling, padding, dropout and flatten"
)


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
    """A place where an activation is quantized: the output of `tail`, computed by `head` and what is fused behind it.

    signed: whether it can be negative. wide: has a signed type all the same, because it is concatenated with one that
    can. group: additions and concatenations join groups, which share one learned scale. tie: concatenations join ties,
    which share type and scale.
    """

    head: fx.Node
    tail: fx.Node
    relu: fx.Node | None
    signed: bool
    ceiling: float | None
    role: str = "inner"
    wide: bool = False
    group: int = 0
    tie: int = 0


@dataclass
class Placement:
    """The analysis of one model: quantization points by tail, boundary layers, and the kind of every node."""

    kinds: dict[fx.Node, str]
    points: dict[fx.Node, Point] = field(default_factory=dict)
    first: fx.Node | None = None
    last: fx.Node | None = None

    def sources(self, node: fx.Node) -> list[Point]:
        """The points whose integers reach this node's output through operations that only move them."""
        if node in self.points:
            return [self.points[node]]
        if self.kinds[node] not in TRANSPARENT:
            return []
        return [point for source in node.all_input_nodes for point in self.sources(source)]

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
    if not compute or kinds[compute[0]] != "conv":
        raise ExportError("the model has no convolution to begin with; it must start with one that reads the image")
    placement.first, placement.last = compute[0], compute[-1]
    if kinds[placement.first.all_input_nodes[0]] != "placeholder":
        raise ExportError(
            f"layer {placement.first.name!r}: the first convolution must read the image itself; take off what precedes it"
        )
    if kinds[placement.last] == "linear" and [kinds[user] for user in placement.last.users] != ["output"]:
        raise ExportError(
            f"layer {placement.last.name!r}: the last linear layer must give the logits; take off what follows it"
        )
    fused: set[fx.Node] = set()
    for node in order:
        if node in fused or kinds[node] not in HEADS or (node is placement.last and kinds[node] == "linear"):
            continue
        point = _point(model, placement, node)
        placement.points[point.tail] = point
        fused.update(_between(point))
    behind_last = set(order[order.index(placement.last) :])
    for point in placement.points.values():
        point.role = "boundary" if point.head in behind_last else _role(placement, point)
    _join(placement)
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

    inputs = [point for node in head.all_input_nodes for point in placement.sources(node)]
    if kinds[head] not in ("conv", "linear") and not inputs:
        raise ExportError(f"layer {head.name!r}: a {kinds[head]} must read the output of another layer")
    if kinds[head] in ("conv", "linear"):
        tail = only_user("batchnorm") or tail
    relu = head if kinds[head] == "relu" else None if kinds[head] == "function" else only_user("relu")
    tail = relu or tail
    module = model.get_submodule(str(relu.target)) if relu is not None else None
    ceiling = 6.0 if isinstance(module, nn.ReLU6) else None
    signed = relu is None
    if kinds[head] == "function":
        signed = not isinstance(model.get_submodule(str(head.target)), UNSIGNED)
    elif signed and kinds[head] in ("avgpool", "multiply"):
        signed = any(point.signed for point in inputs)
    return Point(head, tail, relu, signed, ceiling)


def _role(placement: Placement, point: Point) -> str:
    consumers = placement.consumers(point.tail)
    if all(node is placement.last for node in consumers):
        return "boundary"
    if all(placement.kinds[node] in ELEMENTWISE for node in consumers):
        return "residual"
    return "inner"


def _join(placement: Placement) -> None:
    """Number groups and ties: what an addition reads and writes belongs together, what is concatenated is alike."""
    points = list(placement.points.values())
    for index, point in enumerate(points):
        point.group = point.tie = index
    for node, kind_ in placement.kinds.items():
        if kind_ == "concat":
            sources = placement.sources(node)
            if not sources or any(not placement.sources(source) for source in node.all_input_nodes):
                raise ExportError(f"layer {node.name!r}: a concatenation needs quantized activations")
            _merge(points, sources, "group")
            _merge(points, sources, "tie")
    for point in points:
        kind_ = placement.kinds[point.head]
        if kind_ not in ("add", "multiply"):
            continue
        parts = [placement.sources(node) for node in point.head.all_input_nodes]
        if len(parts) != 2 or not all(parts):
            raise ExportError(
                f"layer {point.head.name!r}: {kind_} needs two quantized activations; fold constants into a layer"
            )
        if kind_ == "add":
            _merge(points, [point, *parts[0], *parts[1]], "group")
    for tie in {point.tie for point in points}:
        members = [point for point in points if point.tie == tie]
        roles, signed = {point.role for point in members}, any(point.signed for point in members)
        for point in members:
            point.role = next(role for role in ("inner", "boundary", "residual") if role in roles)
            point.wide = signed and not point.signed


def _merge(points: list[Point], joined: list[Point], attribute: str) -> None:
    numbers = {getattr(point, attribute) for point in joined}
    for point in points:
        if getattr(point, attribute) in numbers:
            setattr(point, attribute, min(numbers))
