"""One graph of an ONNX file, or one body of an If, Loop or Scan, as something to ask: who makes, who reads, what is constant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from edgeguard.export.kernels import live, subgraphs


@dataclass(frozen=True)
class Parameter:
    """A tensor that no input of the model reaches: what is stored for it, and the operations applied since.

    ops: nearest to the reader first.
    """

    tensor: onnx.TensorProto | None
    ops: tuple[onnx.NodeProto, ...]


class Scope:
    """Lookups over one graph; names that it does not know are those of the graph around it.

    Args:
        place: names of the If, Loop or Scan operations and of their bodies, from the outside in.
    """

    def __init__(self, graph: onnx.GraphProto, place: tuple[str, ...] = (), outer: Scope | None = None) -> None:
        self.place, self.outer = place, outer
        self.nodes = list(live(graph))[::-1]
        self.outputs = {value.name for value in graph.output}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.producers: dict[str, onnx.NodeProto] = {}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            values = [attribute.t for attribute in node.attribute if attribute.name == "value"]
            if node.op_type == "Constant" and values:
                self.constants[node.output[0]] = values[0]
            self.producers |= dict.fromkeys(node.output, node)
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.varying = self._varying({value.name for value in graph.input} - self.constants.keys())
        """Tensors that depend on an input."""

    def _varying(self, inputs: set[str]) -> set[str]:
        found = inputs | {name for node in self.nodes for name in node.output if any(True for _ in subgraphs(node))}
        if self.outer is not None:
            foreign = self.readers.keys() - self.producers.keys() - self.constants.keys()
            found |= {name for name in foreign if self.outer.varies(name)}
        pending = list(found)
        while pending:
            for node in self.readers.get(pending.pop(), []):
                made = {name for name in node.output if name} - found
                found |= made
                pending += made
        return found

    def varies(self, name: str) -> bool:
        if name in self.producers or name in self.constants or self.outer is None:
            return name in self.varying
        return name in self.varying or self.outer.varies(name)

    def constant(self, name: str) -> onnx.TensorProto | None:
        return self.constants.get(name) or (self.outer.constant(name) if self.outer else None)

    def producer(self, name: str) -> onnx.NodeProto | None:
        return self.producers.get(name) or (self.outer.producer(name) if self.outer else None)

    def parameter(self, name: str) -> Parameter | None:
        """What a tensor is made of when no input reaches it, else None; its largest constant is what is stored."""
        if self.varies(name):
            return None
        found: list[onnx.TensorProto] = []
        ops: list[onnx.NodeProto] = []
        pending, seen = [name], {name}
        while pending:
            current = pending.pop(0)
            constant, producer = self.constant(current), self.producer(current)
            if constant is not None:
                found.append(constant)
            elif producer is not None:
                ops.append(producer)
                pending += [item for item in producer.input if item and item not in seen]
                seen |= set(producer.input)
        return Parameter(max(found, key=elements, default=None), tuple(ops))

    def bodies(self) -> Iterator[Scope]:
        """This graph and every body within it."""
        yield self
        for node in self.nodes:
            for attribute in node.attribute:
                graphs = [attribute.g] if attribute.HasField("g") else []
                for number, graph in enumerate([*graphs, *attribute.graphs]):
                    label = attribute.name if not number else f"{attribute.name}{number}"
                    yield from Scope(graph, (*self.place, label_of(node), label), self).bodies()


def label_of(node: onnx.NodeProto) -> str:
    """The name of an operation, or of its first result where it has none."""
    return str(node.name or next((name for name in node.output if name), node.op_type))


def elements(tensor: onnx.TensorProto) -> int:
    count = 1
    for size in tensor.dims:
        count *= size
    return count
