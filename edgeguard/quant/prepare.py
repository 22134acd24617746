"""Spellings of one operation, brought to one form: rewrites of a traced model before it is analysed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import fx, nn

VIEWS = ("view", "reshape")
FUNCTIONS: Mapping[Any, type[nn.Module]] = {
    torch.relu: nn.ReLU, F.relu: nn.ReLU, "relu": nn.ReLU, F.relu6: nn.ReLU6, F.silu: nn.SiLU,
    F.hardswish: nn.Hardswish, F.hardsigmoid: nn.Hardsigmoid, torch.sigmoid: nn.Sigmoid, F.sigmoid: nn.Sigmoid,
    "sigmoid": nn.Sigmoid,
}  # fmt: skip
"""Functions and methods of one tensor, and the module that does the same."""


def is_node(value: object) -> TypeGuard[fx.Node]:
    """Whether an argument is a node of a traced graph: of torch.fx, or of Brevitas's copy of it."""
    return hasattr(value, "all_input_nodes")


def unify(body: fx.GraphModule) -> None:
    """Make functions modules, and reshapes what they mean (flatten, channel shuffle); drop what is then unused."""
    for node in list(body.graph.nodes):
        if node.op in ("call_function", "call_method") and node.target in FUNCTIONS:
            _call(body, node, FUNCTIONS[node.target](), node.all_input_nodes[0])
        if node.op != "call_method" or node.target not in VIEWS:
            continue
        if (source := _flattened(node)) is not None:
            with body.graph.inserting_before(node):
                node.replace_all_uses_with(body.graph.call_function(torch.flatten, (source, 1)))
        elif (shuffle := _shuffled(node)) is not None:
            _call(body, node, nn.ChannelShuffle(shuffle[1]), shuffle[0])
    body.graph.eliminate_dead_code()
    body.recompile()


def _call(body: fx.GraphModule, node: fx.Node, module: nn.Module, source: fx.Node) -> None:
    """Call a new module on `source` in place of `node`."""
    name = f"{node.name}_{type(module).__name__.lower()}"
    body.add_submodule(name, module)
    with body.graph.inserting_before(node):
        node.replace_all_uses_with(body.graph.call_module(name, (source,)))


def _sizes(node: fx.Node) -> list[Any]:
    sizes = list(node.args[1:])
    return list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes


def _is_batch(value: object) -> bool:
    """Whether a size is the batch's: `x.size(0)`, `x.shape[0]` or `x.size()[0]`."""
    if not is_node(value):
        return False
    if value.op == "call_method" and value.target == "size":
        return tuple(value.args[1:]) == (0,)
    parent = value.args[0] if value.args else None
    whole = is_node(parent) and (
        (parent.op == "call_method" and parent.target == "size") or parent.target is getattr
    )
    return whole and tuple(value.args[1:]) == (0,)


def _flattened(node: fx.Node) -> fx.Node | None:
    """What `x.view(x.size(0), -1)` or `x.view(-1, features)` flattens; the layer behind knows its number of features."""
    sizes, source = _sizes(node), node.args[0]
    alike = len(sizes) == 2 and isinstance(sizes[1], int) and (_is_batch(sizes[0]) or (sizes[0] == -1 and sizes[1] > 0))
    return source if alike and is_node(source) else None


def _shuffled(node: fx.Node) -> tuple[fx.Node, int] | None:
    """Input and groups of `x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)`."""
    turned = node.args[0]
    while is_node(turned) and turned.op == "call_method" and turned.target == "contiguous":
        turned = turned.args[0]
    if not is_node(turned) or turned.target not in ("transpose", torch.transpose):
        return None
    parts = turned.args[0]
    if set(turned.args[1:]) != {1, 2} or not is_node(parts) or parts.target not in VIEWS:
        return None
    sizes, source = _sizes(parts), parts.args[0]
    if len(sizes) != 5 or not isinstance(sizes[1], int) or not is_node(source) or len(_sizes(node)) != 4:
        return None
    return source, sizes[1]
