"""What a quantized model computes while it trains, on plain tensors and in one compiled graph for all widths.

Brevitas wraps every weight and activation in modules and proxies that neither fuse nor compile. `CompiledView` writes
the same arithmetic as one function of tensors: weights, batch norms, scales and limits of the current width are its
arguments, so another width needs no other graph. Parameters, scales and statistics stay those of the Brevitas model:
gradients arrive there and running statistics are updated there.
"""

from __future__ import annotations

import operator
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn

from edgeguard.errors import InputError
from edgeguard.quant.batchnorm import SwitchableBatchNorm2d
from edgeguard.quant.functions import ReplaceValue
from edgeguard.quant.model import QuantizedModel, activation_quantizer, weight_quantizer
from edgeguard.quant.prepare import is_node
from edgeguard.quant.quantizers import MIN_SCALE, STEP_PER_MEAN, ActivationQuantizer

NO_MEAN_STEP = 3e38
"""Stands for widths whose weight step does not depend on the mean: a finite number, for 0 times infinity is NaN."""


def _rows(x: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H * W, C), without a copy where channels lie last; (N, C) as (N, 1, C)."""
    return x[:, None] if x.dim() == 2 else x.permute(0, 2, 3, 1).flatten(1, 2)


def _unrows(rows: Tensor, like: torch.Size) -> Tensor:
    return rows[:, 0] if len(like) == 2 else rows.unflatten(1, like[2:]).permute(0, 3, 1, 2)


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


class CompiledView:
    """Call it with pixels (N, 3, H, W) float32, 0 to 255; returns logits at the model's current width.

    The model decides everything else, as in its own forward: its width, training mode and gradient noise. Gradients of
    gradients are not supported; use the model for them.

    Raises:
        InputError: a batch norm without a momentum.

    compiled False runs the same graph operation by operation, for comparison.

    world: processes over which each batch is spread, in equal parts. Batch norms then take their statistics over all of
    it, compiled or not: every process makes the same passes at the same widths.
    """

    def __init__(self, model: QuantizedModel, compiled: bool = True, world: int = 1) -> None:
        self.model, self.world = model, world
        self._quantizers: list[ActivationQuantizer] = []
        self._layers: list[Any] = []
        self._norms: list[SwitchableBatchNorm2d] = []
        self._channels: list[int] | None = None
        graph = self._rewrite(normalize if compiled or world > 1 else normalize_eagerly)
        # automatic dynamic shapes would compile every part twice: there are few batch sizes.
        self._run: Any = torch.compile(graph, dynamic=False) if compiled else graph
        self._tables: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._tables_of: tuple[Any, ...] = ()
        groups = model.groups()
        self._groups = groups
        self._group_of = [next(n for n, group in enumerate(groups) if group is q.group) for q in self._quantizers]

    def __call__(self, pixels: Tensor) -> Tensor:
        index = self.model.control.index
        factors, limits, weights, which = self._at(index, pixels.device)
        scales = torch.exp2(torch.stack([group.log_scale[index] for group in self._groups]))[which] * factors
        norms = [norm.norms[index] for norm in self._norms]
        training = [norm.training for norm in norms]
        noise = self._noise(pixels)
        tensors: list[Tensor | None] = []
        for layer in self._layers:
            tensors += [layer.weight, layer.bias]
        for norm in norms:
            tensors += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        for norm in norms:
            if norm.training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
        logits: Tensor = self._run(pixels, scales, limits, weights, noise, training, *tensors)
        return logits

    def _at(self, index: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Exponents' factors (A,), limits (A, 2), weight limits (L, 2) and groups (A,) of one width, on the device."""
        state = (device, *(quantizer.exponent._version for quantizer in self._quantizers))
        if state != self._tables_of:
            self._tables = [self._table(n, device) for n in range(len(self.model.control.widths))]
            self._tables_of = state
        return self._tables[index]

    def _table(self, index: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        width = self.model.control.widths[index]
        factors = [2.0 ** int(q.exponent[index]) for q in self._quantizers]
        limits = []
        for quantizer in self._quantizers:
            dtype = quantizer.dtype(width)
            limits.append([dtype.qmin if quantizer.signed else 0, dtype.qmax])
        weights = []
        for layer in self._layers:
            found = weight_quantizer(layer)
            if found is None:
                raise TypeError(f"{type(layer).__name__} has no weight quantizer")
            dtype = found.dtype(width)
            weights.append([dtype.qmax, STEP_PER_MEAN.get(dtype.bits, NO_MEAN_STEP)])
        return (
            torch.tensor(factors, device=device), torch.tensor(limits, dtype=torch.float32, device=device),
            torch.tensor(weights, dtype=torch.float32, device=device), torch.tensor(self._group_of, device=device),
        )  # fmt: skip

    def _noise(self, pixels: Tensor) -> list[Tensor] | None:
        """One factor for every image and channel of every quantizer, drawn in the order in which the model draws."""
        noise = self.model.noise
        if noise.sigma == 0.0 or not noise.training:
            return None
        if self._channels is None:
            self._channels = self._count_channels(pixels)
        drawn = [noise.draw(pixels.new_empty(len(pixels), channels)) for channels in self._channels]
        return [factors for factors in drawn if factors is not None]

    def _count_channels(self, pixels: Tensor) -> list[int]:
        seen: dict[int, int] = {}
        handles = [
            q.register_forward_pre_hook(lambda _, args, n=n: seen.__setitem__(n, args[0].shape[1]))  # type: ignore[misc]
            for n, q in enumerate(self._quantizers)
        ]
        training = {module: module.training for module in self.model.modules()}
        try:
            with torch.no_grad():
                self.model.eval()(pixels[:1])
        finally:
            for module, before in training.items():
                module.training = before
            for handle in handles:
                handle.remove()
        return [seen[n] for n in range(len(self._quantizers))]

    def _rewrite(self, batch_norm: Callable[..., Tensor]) -> fx.GraphModule:
        """The model's graph with every quantized module as plain operations on arguments."""
        body = self.model.body
        graph = fx.Graph()
        names = ("pixels", "scales", "limits", "weights", "noise", "training")
        pixels, scales, limits, weights, noise, training = (graph.placeholder(name) for name in names)
        layers = [
            n for n in body.graph.nodes if n.op == "call_module" and weight_quantizer(body.get_submodule(n.target))
        ]
        norms = [
            n for n in body.graph.nodes
            if n.op == "call_module" and isinstance(body.get_submodule(n.target), SwitchableBatchNorm2d)
        ]  # fmt: skip
        arguments = {n: [graph.placeholder(f"{n.name}_{part}") for part in ("weight", "bias")] for n in layers}
        for n in norms:
            arguments[n] = [graph.placeholder(f"{n.name}_{part}") for part in ("weight", "bias", "mean", "var")]
        self._layers = [body.get_submodule(n.target) for n in layers]
        self._norms = [body.get_submodule(n.target) for n in norms]
        root = nn.Module()
        root.add_module("input_quantizer", self.model.input_quantizer)
        new: dict[fx.Node, fx.Node] = {}

        def row(table: fx.Node, *index: int) -> fx.Node:
            return (
                graph.call_function(torch.select, (table, 0, index[0]))
                if len(index) == 1
                else graph.call_function(torch.select, (row(table, index[0]), 0, index[1]))
            )

        for node in body.graph.nodes:
            if node.op == "placeholder":
                new[node] = graph.call_module("input_quantizer", (pixels,))
                continue
            module = body.get_submodule(str(node.target)) if node.op == "call_module" else None
            quantizer = activation_quantizer(module) if module is not None else None
            source = new[node.args[0]] if module is not None else None
            if quantizer is not None:
                number = len(self._quantizers)
                self._quantizers.append(quantizer)
                picked = graph.call_function(_item, (noise, number))
                new[node] = graph.call_function(
                    quantize_activation,
                    (
                        source,
                        row(scales, number),
                        row(limits, number, 0),
                        row(limits, number, 1),
                        quantizer.ceiling,
                        picked,
                    ),
                )
            elif node in layers:
                number, (weight, bias) = layers.index(node), arguments[node]
                plain = graph.call_function(quantize_weight, (weight, row(weights, number, 0), row(weights, number, 1)))
                new[node] = _layer(graph, module, source, plain, bias)
            elif node in norms:
                norm = module.current()
                if norm.momentum is None:
                    raise InputError(
                        f"layer {node.name!r}: a batch norm that averages over all batches (momentum None) cannot be "
                        "compiled; give it a momentum, or train with --no-compile"
                    )
                weight, bias, mean, var = arguments[node]
                live = graph.call_function(operator.getitem, (training, norms.index(node)))
                new[node] = graph.call_function(
                    batch_norm, (source, mean, var, weight, bias, live, norm.momentum, norm.eps),
                    {"world": self.world} if self.world > 1 else {},
                )  # fmt: skip
            else:
                target = node.target
                if isinstance(module, nn.MaxPool2d) and _pair(module.kernel_size) == (1, 1):
                    new[node] = graph.call_function(every, (source, _pair(module.stride)))
                    continue
                if module is not None:
                    target = f"plain_{len(new)}"
                    root.add_module(target, module)
                args, kwargs = _mapped(node.args, new), _mapped(node.kwargs, new)
                new[node] = graph.create_node(node.op, target, args, kwargs)
        graph.lint()
        return fx.GraphModule(root, graph)


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


def _layer(graph: fx.Graph, module: Any, source: fx.Node, weight: fx.Node, bias: fx.Node) -> fx.Node:
    if isinstance(module, nn.Linear):
        return graph.call_function(F.linear, (source, weight, bias))
    return graph.call_function(
        F.conv2d, (source, weight, bias, module.stride, module.padding, module.dilation, module.groups)
    )


def compiler_missing() -> str | None:
    """Why `torch.compile` cannot be used here, or None."""
    if sys.platform == "win32":
        return "torch.compile needs a C++ compiler that is not looked for on Windows"
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        return "no C++ compiler (g++ or clang++) is installed"
    return None
