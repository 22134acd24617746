"""Quantization with straight-through gradients, written as few passes over memory as autograd allows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

LN2 = math.log(2.0)


def _inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Sum of the elementwise product, in one pass where both tensors lie alike in memory."""
    if a.stride() == b.stride() and (
        a.is_contiguous() or (a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last))
    ):
        shape = (a.numel(),)
        return torch.dot(a.as_strided(shape, (1,)), b.as_strided(shape, (1,)))
    return (a * b).sum()


class QuantizeActivation(torch.autograd.Function):
    """`clamp(round_half_even(x / s), low, high) * s` with `s = 2 ** log_scale * factor`.

    Backward: the gradient passes to `x` strictly inside the range, times `noise` where given; `log_scale` receives the
    gradient of learned step sizes (LSQ, Esser et al. 2020, arXiv:1902.08153) by the chain rule.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_scale: Tensor, factor: float, low: float, high: float, noise: Tensor | None
    ) -> Tensor:
        scale = torch.exp2(log_scale.detach()) * factor
        steps = x * scale.reciprocal()
        out = steps.round().clamp_(low, high).mul_(scale)
        ctx.save_for_backward(steps, out, scale, noise)
        ctx.limits = (low, high)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        steps, out, scale, noise = ctx.saved_tensors
        gradient = gradients[0]
        passed = torch.ops.aten.hardtanh_backward(gradient, steps, *ctx.limits)
        slope = None
        if ctx.needs_input_grad[1]:
            slope = LN2 * (_inner_product(gradient, out) - scale * _inner_product(passed, steps))
        if noise is not None:
            passed = passed * noise
        return passed, slope, None, None, None, None


class RoundStraightThrough(torch.autograd.Function):
    """`clamp(round_half_even(x), low, high)`; the gradient passes strictly inside the range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limits = (low, high)
        return x.round().clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradients[0], x, *ctx.limits), None, None


class ReplaceValue(torch.autograd.Function):
    """The value of `replacement` with the gradient of `x`: a straight-through estimator without a mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, replacement: Tensor) -> Tensor:
        return replacement.view_as(replacement)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None
