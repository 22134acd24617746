"""From a Brevitas model to one graph of plain tensors, whose arguments are all that changes from pass to pass."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from edgeguard.errors import InputError
from edgeguard.quant.batchnorm import SwitchableBatchNorm2d
from edgeguard.quant.model import QuantizedModel, activation_quantizer, weight_quantizer
from edgeguard.quant.plain import every, quantize_activation, quantize_weight
from edgeguard.quant.prepare import is_node
from edgeguard.quant.quantizers import ActivationQuantizer

TABLES = ("pixels", "scales", "limits", "weights", "noise", "training")
"""Arguments of the graph before those of single layers."""
LAYER, NORM = ("weight", "bias"), ("weight", "bias", "mean", "var")
"""Arguments of each layer, and of each batch norm."""


@dataclass(frozen=True, eq=False)
class PlainGraph:
    """module: called with `TABLES`, then `LAYER` of every layer, then `NORM` of every batch norm; returns logits.

    quantizers, layers, norms: those of the model, in the order in which tables and arguments hold theirs.
    """

    module: fx.GraphModule
    quantizers: list[ActivationQuantizer]
    layers: list[Any]
    norms: list[SwitchableBatchNorm2d]


def plain_graph(model: QuantizedModel, batch_norm: Callable[..., Tensor], world: int = 1) -> PlainGraph:
    """The model's graph with every quantized module as plain operations on arguments.

    batch_norm: `normalize` or `normalize_eagerly`. world: processes that share batch statistics.

    Raises:
        InputError: a batch norm without a momentum.
    """
    return _Rewriter(model, batch_norm, world).run()


class _Rewriter:
    def __init__(self, model: QuantizedModel, batch_norm: Callable[..., Tensor], world: int) -> None:
        self._body, self._batch_norm, self._world = model.body, batch_norm, world
        self._graph = fx.Graph()
        self._root = nn.Module()
        self._root.add_module("input_quantizer", model.input_quantizer)
        self._tables = {name: self._graph.placeholder(name) for name in TABLES}
        called = [node for node in self._body.graph.nodes if node.op == "call_module"]
        self._layers = [node for node in called if weight_quantizer(self._module(node)) is not None]
        self._norms = [node for node in called if isinstance(self._module(node), SwitchableBatchNorm2d)]
        self._arguments = {
            node: [self._graph.placeholder(f"{node.name}_{part}") for part in parts]
            for nodes, parts in ((self._layers, LAYER), (self._norms, NORM)) for node in nodes
        }  # fmt: skip
        self._quantizers: list[ActivationQuantizer] = []
        self._new: dict[fx.Node, fx.Node] = {}

    def run(self) -> PlainGraph:
        for node in self._body.graph.nodes:
            self._new[node] = self._rewritten(node)
        self._graph.lint()
        layers = [self._module(node) for node in self._layers]
        norms = [norm for node in self._norms if isinstance(norm := self._module(node), SwitchableBatchNorm2d)]
        return PlainGraph(fx.GraphModule(self._root, self._graph), self._quantizers, layers, norms)

    def _module(self, node: fx.Node) -> nn.Module:
        return self._body.get_submodule(str(node.target))

    def _rewritten(self, node: fx.Node) -> fx.Node:
        if node.op == "placeholder":
            return self._graph.call_module("input_quantizer", (self._tables["pixels"],))
        if node.op != "call_module":
            return self._copied(node, node.target)
        module = self._module(node)
        quantizer = activation_quantizer(module)
        if quantizer is not None:
            return self._activation(self._source(node), quantizer)
        if node in self._layers:
            return self._layer(node, module)
        if isinstance(module, SwitchableBatchNorm2d):
            return self._norm(node, module.current())
        if isinstance(module, nn.MaxPool2d) and _pair(module.kernel_size) == (1, 1):
            return self._graph.call_function(every, (self._source(node), _pair(module.stride)))
        target = f"plain_{len(self._new)}"
        self._root.add_module(target, module)
        return self._copied(node, target)

    def _copied(self, node: fx.Node, target: Any) -> fx.Node:
        args, kwargs = _mapped(node.args, self._new), _mapped(node.kwargs, self._new)
        return self._graph.create_node(node.op, target, args, kwargs)

    def _source(self, node: fx.Node) -> fx.Node:
        """What a module of one input is called with."""
        source: fx.Node = _mapped(node.args[0], self._new)
        return source

    def _entry(self, table: str, *index: int) -> fx.Node:
        """One value of a table, a scalar tensor."""
        found = self._tables[table]
        for number in index:
            found = self._graph.call_function(torch.select, (found, 0, number))
        return found

    def _activation(self, source: fx.Node, quantizer: ActivationQuantizer) -> fx.Node:
        number = len(self._quantizers)
        self._quantizers.append(quantizer)
        noise = self._graph.call_function(_item, (self._tables["noise"], number))
        low, high = self._entry("limits", number, 0), self._entry("limits", number, 1)
        return self._graph.call_function(
            quantize_activation, (source, self._entry("scales", number), low, high, quantizer.ceiling, noise)
        )

    def _layer(self, node: fx.Node, module: Any) -> fx.Node:
        number, (weight, bias) = self._layers.index(node), self._arguments[node]
        limits = self._entry("weights", number, 0), self._entry("weights", number, 1)
        plain = self._graph.call_function(quantize_weight, (weight, *limits))
        given = (self._source(node), plain, bias)
        if isinstance(module, nn.Linear):
            return self._graph.call_function(F.linear, given)
        return self._graph.call_function(
            F.conv2d, (*given, module.stride, module.padding, module.dilation, module.groups)
        )

    def _norm(self, node: fx.Node, norm: nn.BatchNorm2d) -> fx.Node:
        if norm.momentum is None:
            raise InputError(
                f"layer {node.name!r}: a batch norm that averages over all batches (momentum None) cannot be "
                "compiled; give it a momentum, or train with --no-compile"
            )
        weight, bias, mean, var = self._arguments[node]
        live = self._graph.call_function(operator.getitem, (self._tables["training"], self._norms.index(node)))
        shared: dict[str, Any] = {"world": self._world} if self._world > 1 else {}
        return self._graph.call_function(
            self._batch_norm, (self._source(node), mean, var, weight, bias, live, norm.momentum, norm.eps), shared
        )


def _item(values: Sequence[Tensor] | None, number: int) -> Tensor | None:
    return None if values is None else values[number]


fx.wrap("_item")


def _mapped(value: Any, new: dict[fx.Node, fx.Node]) -> Any:
    """Arguments of a node (of torch.fx or of Brevitas's copy of it) with every node replaced."""
    if is_node(value):
        return new[value]
    if isinstance(value, tuple | list):
        return type(value)(_mapped(entry, new) for entry in value)
    if isinstance(value, dict):
        return {key: _mapped(entry, new) for key, entry in value.items()}
    if isinstance(value, slice):
        return slice(*(_mapped(entry, new) for entry in (value.start, value.stop, value.step)))
    return value


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
