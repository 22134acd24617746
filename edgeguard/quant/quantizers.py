"""The quantizers that Brevitas layers carry: own `tensor_quant` modules behind Brevitas's proxies."""

from __future__ import annotations

from typing import Any

import brevitas.nn as qnn
import torch
from brevitas.inject import ExtendedInjector
from brevitas.proxy.parameter_quant import WeightQuantProxyFromInjector
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjector
from torch import Tensor, nn

from edgeguard.inttype import IntType
from edgeguard.quant.functions import QuantizeActivation, ReplaceValue, RoundStraightThrough
from edgeguard.quant.scheme import QuantScheme
from edgeguard.quant.width import Width, WidthControl

Quantized = tuple[Tensor, Tensor, Tensor, Tensor]
"""What a Brevitas `tensor_quant` returns: value, scale, zero point, bit-width."""

STEP_PER_MEAN = {2: 1.4, 3: 0.83, 4: 0.44}
"""Weight step over mean |w|, near the least squared error of bell-shaped weights (2 bits: ternary weight networks,
Li et al. 2016, arXiv:1605.04711). From 5 bits on, and never beyond, the step is max |w| / qmax."""

MIN_SCALE = 1e-12


class GradientNoise(nn.Module):
    """GIR, part (a): multiplicative noise on what activation quantizers pass backward, one factor per image and channel.

    One instance is shared by a model's quantizers; `sigma` 0 switches it off. It acts in training mode only.

    rank, world: this process and how many there are. Factors are drawn for the images of all and cut, image `n` of a
    batch being in process `n % world`, so that each image's noise is the same for any number of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sigma = 0.0
        self.rank, self.world = 0, 1
        self.generator = torch.Generator()

    def draw(self, x: Tensor) -> Tensor | None:
        """(N, C, 1, ...) factors around 1, or None when switched off."""
        if self.sigma == 0.0 or not self.training:
            return None
        return self.factors(len(x), x.shape[1]).view(len(x), x.shape[1], *[1] * (x.dim() - 2)).to(x.device)

    def factors(self, images: int, channels: int) -> Tensor:
        """The next (images, channels) of them, on the CPU."""
        drawn = torch.randn((images * self.world, channels), generator=self.generator).mul_(self.sigma).add_(1.0)
        return drawn[self.rank :: self.world]


class ScaleGroup(nn.Module):
    """Learned log2 scales, one per width, of quantizers whose scales stay powers of two apart."""

    def __init__(self, widths: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(widths))


class WeightQuantizer(nn.Module):
    """Symmetric narrow-range weights with one scale per output channel, computed from the weights at every call."""

    control: WidthControl

    def __init__(self, control: WidthControl, scheme: QuantScheme, role: str) -> None:
        super().__init__()
        self.__dict__["control"] = control
        self.scheme, self.role = scheme, role

    def dtype(self, width: Width) -> IntType:
        return self.scheme.weight_type(self.role, width)

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Integer weights (float32 storage) and their (O, 1, ...) scales at the current width."""
        dtype = self.dtype(self.control.current)
        flat = weight.detach().flatten(1)
        scale = flat.abs().amax(1) / dtype.qmax
        if dtype.bits in STEP_PER_MEAN:
            scale = torch.minimum(scale, flat.abs().mean(1) * STEP_PER_MEAN[dtype.bits])
        scale = scale.clamp_min(MIN_SCALE).view(-1, *[1] * (weight.dim() - 1))
        return (weight.detach() / scale).round_().clamp_(dtype.qmin, dtype.qmax), scale

    def forward(self, weight: Tensor) -> Quantized:
        integers, scale = self.integers(weight)
        value: Tensor = ReplaceValue.apply(weight, integers * scale)
        bits = float(self.dtype(self.control.current).bits)
        return value, scale, scale.new_zeros(()), scale.new_tensor(bits)


class ActivationQuantizer(nn.Module):
    """Activations with one learned scale per tensor and width; unsigned ones are their own ReLU.

    The scale is `2 ** group.log_scale[width] * 2 ** exponent[width]`. Quantizers of one group differ only in the integer
    exponents, which calibration sets, so sums of their outputs are exact in integers; those of one tie have equal ones.

    ceiling: the largest real value let through (6 for ReLU6), or None. wide: a signed type for values without sign.
    """

    exponent: Tensor
    control: WidthControl
    group: ScaleGroup
    noise: GradientNoise

    def __init__(
        self,
        control: WidthControl,
        scheme: QuantScheme,
        group: ScaleGroup,
        noise: GradientNoise,
        *,
        role: str,
        signed: bool,
        ceiling: float | None = None,
        wide: bool = False,
        tie: int = 0,
    ) -> None:
        super().__init__()
        self.__dict__.update(control=control, group=group, noise=noise)
        self.scheme, self.role, self.signed, self.ceiling = scheme, role, signed, ceiling
        self.wide, self.tie = wide, tie
        self.enabled = True
        self.observer: Any = None
        self.register_buffer("exponent", torch.zeros(len(control.widths), dtype=torch.int32))
        self._factors: list[float] | None = None

    def dtype(self, width: Width) -> IntType:
        return self.scheme.activation_type(self.role, self.signed or self.wide, width)

    def factor(self) -> float:
        """2 ** exponent at the current width, kept on the host."""
        if self._factors is None:
            self._factors = [2.0**k for k in self.exponent.tolist()]
        return self._factors[self.control.index]

    def set_exponent(self, index: int, exponent: int) -> None:
        self.exponent[index] = exponent
        self._factors = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._factors = None

    def scale(self) -> float:
        """The current scale, a float32 value."""
        log_scale = self.group.log_scale.detach()[self.control.index]
        return float(torch.exp2(log_scale) * self.factor())

    def limits(self) -> tuple[int, int]:
        """Smallest and largest integer let through at the current width: ReLU and ReLU6 are limits, not operations."""
        dtype = self.dtype(self.control.current)
        low = dtype.qmin if self.signed else 0
        if self.ceiling is None:
            return low, dtype.qmax
        return low, min(dtype.qmax, round(self.ceiling / self.scale()))

    def forward(self, x: Tensor) -> Quantized:
        zero = x.new_zeros(())
        if self.observer is not None:
            self.observer(x.detach())
        if not self.enabled:
            return x if self.signed else x.clamp(0.0, self.ceiling), zero, zero, zero
        low, high = self.limits()
        log_scale = self.group.log_scale[self.control.index]
        out: Tensor = QuantizeActivation.apply(
            x.float(), log_scale, self.factor(), float(low), float(high), self.noise.draw(x)
        )
        return out, zero, zero, zero


class InputQuantizer(nn.Module):
    """uint8 pixels to signed 8-bit integers with the model's normalization folded in.

    `q = clamp(round_half_even(p / scale[c]) + zero_point[c])`; the real value, about `(p / 255 - mean) / std`, is
    `q * step`. Nothing here is learned.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], bits: int) -> None:
        super().__init__()
        self.dtype = IntType(bits, signed=True)
        means, stds = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        reach = torch.maximum(means / stds, (1.0 - means) / stds).max()
        step = (reach / self.dtype.qmax).float()
        self.step = float(step)
        self.register_buffer("scale", (255.0 * stds * self.step).float().view(1, -1, 1, 1), persistent=False)
        zero_point = (-means / (stds * self.step)).round().float().view(1, -1, 1, 1)
        self.register_buffer("zero_point", zero_point, persistent=False)
        self.enabled = True

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) float32 pixel values 0 to 255 -> real values of that shape."""
        steps = pixels / self.scale
        if not self.enabled:
            return (steps + self.zero_point) * self.step
        low = self.dtype.qmin - self.zero_point
        high = self.dtype.qmax - self.zero_point
        rounded: Tensor = RoundStraightThrough.apply(steps, -1e9, 1e9)
        return (torch.minimum(torch.maximum(rounded, low), high) + self.zero_point) * self.step


class _WeightInjector(ExtendedInjector):  # type: ignore[misc]
    proxy_class = WeightQuantProxyFromInjector
    signed = True
    narrow_range = True


class _ActivationInjector(ExtendedInjector):  # type: ignore[misc]
    proxy_class = ActQuantProxyFromInjector
    signed = True
    narrow_range = False


def quant_identity(quantizer: ActivationQuantizer) -> nn.Module:
    """A Brevitas activation layer around an own quantizer."""
    layer = qnn.QuantIdentity(act_quant=_ActivationInjector.let(tensor_quant=quantizer))
    layer.act_quant.skip_create_quant_tensor = True
    module: nn.Module = layer
    return module


def quant_layer(layer: nn.Conv2d | nn.Linear, quantizer: WeightQuantizer) -> nn.Module:
    """The Brevitas counterpart of a convolution or linear layer, sharing its parameters."""
    injector = _WeightInjector.let(tensor_quant=quantizer)
    common = {"bias": layer.bias is not None, "weight_quant": injector, "device": "meta"}
    if isinstance(layer, nn.Linear):
        result = qnn.QuantLinear(layer.in_features, layer.out_features, **common)
    else:
        result = qnn.QuantConv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            padding_mode=layer.padding_mode,
            **common,
        )
    result.weight, result.bias = layer.weight, layer.bias
    result.weight_quant.skip_create_quant_tensor = True
    module: nn.Module = result
    return module
