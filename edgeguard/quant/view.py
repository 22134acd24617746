"""What a quantized model computes while it trains, on plain tensors and in one compiled graph for all widths.

Brevitas wraps every weight and activation in modules and proxies that neither fuse nor compile. `CompiledView` writes
the same arithmetic as one function of tensors: weights, batch norms, scales and limits of the current width are its
arguments, so another width needs no other graph. Parameters, scales and statistics stay those of the Brevitas model:
gradients arrive there and running statistics are updated there.
"""

from __future__ import annotations

import shutil
import sys
from typing import Any

import torch
from torch import Tensor, nn

from edgeguard.quant.model import QuantizedModel, weight_quantizer
from edgeguard.quant.plain import normalize, normalize_eagerly
from edgeguard.quant.quantizers import STEP_PER_MEAN
from edgeguard.quant.rewrite import plain_graph

NO_MEAN_STEP = 3e38
"""Stands for widths whose weight step does not depend on the mean: a finite number, for 0 times infinity is NaN."""


class CompiledView:
    """Call it with pixels (N, 3, H, W) float32, 0 to 255; returns logits at the model's current width.

    The model decides everything else, as in its own forward: its width, training mode and gradient noise. Gradients of
    gradients are not supported; use the model for them.

    Raises:
        InputError: a batch norm without a momentum.

    compiled False runs the same graph operation by operation, for comparison.

    world: processes over which each batch is spread, in equal parts. Batch norms then take their statistics over all of
    it, compiled or not: every process makes the same passes at the same widths.

    graphs: record compiled passes as CUDA graphs and replay them, so that the host launches one thing instead of
    hundreds. A pass overwrites the gradients of the one before, those by parameters and by pixels: use them, and let go of
    them, before the next. Parameters and buffers must stay where they are.
    """

    def __init__(self, model: QuantizedModel, compiled: bool = True, world: int = 1, graphs: bool = False) -> None:
        self.model, self.world, self._graphs = model, world, graphs
        self._channels: list[int] | None = None
        plain = plain_graph(model, normalize if compiled or world > 1 else normalize_eagerly, world)
        self._quantizers, self._layers, self._norms = plain.quantizers, plain.layers, plain.norms
        # automatic dynamic shapes would compile every part twice: there are few batch sizes.
        options: dict[str, Any] | None = {"triton.cudagraphs": True} if graphs else None
        self._run: Any = torch.compile(plain.module, dynamic=False, options=options) if compiled else plain.module
        if graphs:
            for tensor in (*model.parameters(), *model.buffers()):
                torch._dynamo.mark_static_address(tensor)  # read and moved in place, not copied for every pass
        self._tables: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._tables_of: tuple[Any, ...] = ()
        groups = model.groups()
        self._groups = groups
        self._group_of = [next(n for n, group in enumerate(groups) if group is q.group) for q in self._quantizers]

    def __call__(self, pixels: Tensor) -> Tensor:
        index = self.model.control.index
        factors, limits, weights, which = self._at(index, pixels.device)
        scales = torch.exp2(torch.stack([group.log_scale[index] for group in self._groups]))[which] * factors
        norms = [norm.current() for norm in self._norms]
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
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        logits: Tensor = self._run(pixels, scales, limits, weights, noise, training, *tensors)
        return logits.clone() if self._graphs else logits

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
        drawn = torch.cat([noise.factors(len(pixels), channels) for channels in self._channels], 1)
        return list(torch.split(drawn.to(pixels.device), self._channels, 1))

    def _count_channels(self, pixels: Tensor) -> list[int]:
        seen: dict[nn.Module, int] = {}

        def note(quantizer: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[quantizer] = args[0].shape[1]

        handles = [quantizer.register_forward_pre_hook(note) for quantizer in self._quantizers]
        training = {module: module.training for module in self.model.modules()}
        try:
            with torch.no_grad():
                self.model.eval()(pixels[:1])
        finally:
            for module, before in training.items():
                module.training = before
            for handle in handles:
                handle.remove()
        return [seen[quantizer] for quantizer in self._quantizers]


def compiler_missing() -> str | None:
    """Why `torch.compile` cannot be used here, or None."""
    if sys.platform == "win32":
        return "torch.compile needs a C++ compiler that is not looked for on Windows"
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        return "no C++ compiler (g++ or clang++) is installed"
    return None
