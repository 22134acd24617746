"""Steps of the twin that work element by element: products of tensors and tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeguard import graph as g
from edgeguard.graph import IntegerGraph


class Multiply(nn.Module):
    """A product depends on both inputs, so it is written in operations that autograd knows, rounding passed through."""

    def __init__(self, graph: IntegerGraph, node: g.Multiply) -> None:
        super().__init__()
        dtype = graph.tensors[node.output].dtype
        self.limits, self.multiplier = (dtype.qmin, dtype.qmax), float(graph.product_multiplier(node))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        low, high = self.limits
        exact = x * other * self.multiplier
        if not exact.requires_grad:
            return exact.round_().clamp_(low, high)
        rounded = exact + (exact.round() - exact).detach()
        inside = (rounded >= low) & (rounded <= high)  # limits included, unlike the gradient of `torch.clamp`
        return torch.where(inside, rounded, rounded.detach().clamp(low, high))


class TableLookup(torch.autograd.Function):
    """A table's entries forward, its slopes backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, slope: Tensor, low: int) -> Tensor:
        index = x.long().sub_(low)
        ctx.save_for_backward(index, slope)
        return table[index]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        index, slope = ctx.saved_tensors
        return gradient * slope[index], None, None, None


class Lookup(nn.Module):
    table: Tensor
    slope: Tensor

    def __init__(self, graph: IntegerGraph, node: g.Lookup) -> None:
        super().__init__()
        self.low = graph.tensors[node.input].dtype.qmin
        self.register_buffer("table", torch.from_numpy(node.table.astype(np.float32)), persistent=False)
        self.register_buffer("slope", torch.from_numpy(node.slope.copy()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return TableLookup.apply(x, self.table, self.slope, self.low)  # type: ignore[no-any-return]
