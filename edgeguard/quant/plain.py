"""The arithmetic of a quantized model in training, as functions of plain tensors: what `CompiledView` compiles.

Scales, limits and statistics are arguments, so that one compiled graph serves every width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from edgeguard.quant.functions import ReplaceValue
from edgeguard.quant.quantizers import MIN_SCALE


def _rows(x: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H * W, C), without a copy where channels lie last; (N, C) as (N, 1, C)."""
    return x[:, None] if x.dim() == 2 else x.permute(0, 2, 3, 1).flatten(1, 2)


def _unrows(rows: Tensor, like: torch.Size) -> Tensor:
    return rows[:, 0] if len(like) == 2 else rows.reshape(like[0], *like[2:], like[1]).permute(0, 3, 1, 2)


class _Quantize(torch.autograd.Function):
    """`QuantizeActivation` with its scale and limits in tensors, so that one graph serves every width.

    noise: (N, 1, C) or None. Sums are taken of each image first: quick, and accurate in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, noise: Tensor | None) -> Tensor:
        steps = _rows(x).float() * scale.reciprocal()
        ctx.save_for_backward(x, scale, low, high, noise)
        return _unrows(torch.minimum(torch.maximum(steps.round(), low), high) * scale, x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, scale, low, high, noise = ctx.saved_tensors
        gradient = _rows(gradients[0]).float()
        steps = _rows(x).float() * scale.reciprocal()
        passed = torch.where((steps > low) & (steps < high), gradient, 0.0)
        slope = gradient * torch.minimum(torch.maximum(steps.round(), low), high) - passed * steps
        if noise is not None:
            passed = passed * noise
        return _unrows(passed, x.shape).to(x.dtype), slope.sum(1).sum(), None, None, None


def _pooled(mean: Tensor, variance: Tensor, world: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) over all processes, from those of this one; all have equally many values."""
    own = torch.stack([mean, variance])
    every = own.new_empty(world * 2, own.shape[1])
    dist.all_gather_into_tensor(every, own)
    means, variances = every.view(world, 2, -1).unbind(1)
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square().mean(0)


class _Normalize(torch.autograd.Function):
    """Batch norm with the batch's statistics. Returns the result, the mean and the biased variance of each channel.

    world: processes over which the batch is spread. The loss of each is a mean over its own images, and what they pass
    backward to weight and bias is the mean over the processes, the same in all.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, world: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = _rows(x).float()
        variances, means = torch.var_mean(rows, 1, correction=0)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        if world > 1:
            mean, variance = _pooled(mean, variance, world)
        inverse = torch.rsqrt(variance + eps)
        ctx.world = world
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.mark_non_differentiable(mean, variance)
        return _unrows((rows - mean) * (inverse * weight) + bias, x.shape).to(x.dtype), mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, mean, inverse = ctx.saved_tensors
        gradient = _rows(gradients[0]).float()
        centred = (_rows(x).float() - mean) * inverse
        shift, slope = gradient.sum(1).sum(0), (gradient * centred).sum(1).sum(0)
        if ctx.world > 1:
            sums = torch.stack([shift, slope])
            dist.all_reduce(sums)
            shift, slope = (sums / ctx.world).unbind(0)
        count = centred.shape[0] * centred.shape[1]
        back = (gradient - shift / count - centred * (slope / count)) * (inverse * weight)
        return _unrows(back, x.shape).to(x.dtype), slope, shift, None, None


def quantize_activation(
    x: Tensor, scale: Tensor, low: Tensor, high: Tensor, ceiling: float | None, noise: Tensor | None
) -> Tensor:
    """A fake-quantized activation; scale, low and high are scalars, noise is (N, C) or None."""
    if ceiling is not None:
        high = torch.minimum(high, (ceiling / scale.detach().double()).round().float())
    if noise is not None:
        noise = noise[:, None]
    out: Tensor = _Quantize.apply(x, scale, low, high, noise)
    return out


def quantize_weight(weight: Tensor, qmax: Tensor, step_per_mean: Tensor) -> Tensor:
    """Fake-quantized weights (O, ...), symmetric and of narrow range, as `WeightQuantizer` computes them."""
    flat = weight.detach().flatten(1).abs()
    scale = torch.minimum(flat.amax(1) / qmax, flat.mean(1) * step_per_mean).clamp_min(MIN_SCALE)
    scale = scale.view(-1, *[1] * (weight.dim() - 1))
    integers = torch.minimum(torch.maximum((weight.detach() / scale).round(), -qmax), qmax)
    out: Tensor = ReplaceValue.apply(weight, integers * scale)
    return out


def normalize(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, training: bool, momentum: float, eps: float,
    world: int = 1,
) -> Tensor:  # fmt: skip
    """Batch norm; in training with the statistics of the batch over all processes, which also move `mean` and `var`."""
    if not training:
        return F.batch_norm(x, mean, var, weight, bias, False, momentum, eps)
    out, centre, spread = _Normalize.apply(x, weight, bias, eps, world)
    count = x.numel() // x.shape[1] * world
    with torch.no_grad():
        mean.lerp_(centre, momentum)
        var.lerp_(spread * (count / (count - 1)), momentum)
    result: Tensor = out
    return result


def normalize_eagerly(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, training: bool, momentum: float, eps: float
) -> Tensor:
    """`normalize` by PyTorch's own operation: quicker where nothing is compiled, and bit for bit what Brevitas runs."""
    return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)


def every(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Every so-many-th row and column: what a max pool of one pixel takes, without its search for the largest."""
    return x[:, :, :: stride[0], :: stride[1]]
