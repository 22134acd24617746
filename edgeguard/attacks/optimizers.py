"""How a gradient moves a patch. Needs torch.

Each optimizer keeps its own state for one patch, is given the gradient of what is to be increased, and moves pixels
between 0 and 255 by steps in grey levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch

from edgeguard.errors import InputError

SMALLEST = 1e-30
"""What a mean or a root is divided by at least."""


class Optimizer(Protocol):
    def __init__(self, momentum: float) -> None: ...

    def step(self, patch: torch.Tensor, gradient: torch.Tensor, size: float) -> torch.Tensor:
        """The patch after one step, (..., 3, h, w) float32 in 0..255. size: in grey levels."""


class MomentumSign:
    """The sign of the accumulated gradient, each new one scaled to a mean magnitude of 1 (arXiv:1710.06081)."""

    def __init__(self, momentum: float) -> None:
        self._momentum = momentum
        self._velocity: torch.Tensor | None = None

    def step(self, patch: torch.Tensor, gradient: torch.Tensor, size: float) -> torch.Tensor:
        velocity = torch.zeros_like(patch) if self._velocity is None else self._velocity
        self._velocity = self._momentum * velocity + gradient / gradient.abs().mean().clamp_min(SMALLEST)
        return (patch + size * self._velocity.sign()).clamp(0, 255)


class Adam:
    """Adam on the pixels; `momentum` is its first decay, the second is 0.999 (Kingma & Ba 2015, arXiv:1412.6980)."""

    SECOND = 0.999

    def __init__(self, momentum: float) -> None:
        self._momentum = momentum
        self._taken = 0
        self._mean: torch.Tensor | None = None
        self._square: torch.Tensor | None = None

    def step(self, patch: torch.Tensor, gradient: torch.Tensor, size: float) -> torch.Tensor:
        mean = torch.zeros_like(patch) if self._mean is None else self._mean
        square = torch.zeros_like(patch) if self._square is None else self._square
        self._taken += 1
        self._mean = self._momentum * mean + (1 - self._momentum) * gradient
        self._square = self.SECOND * square + (1 - self.SECOND) * gradient**2
        first = self._mean / (1 - self._momentum**self._taken)
        second = (self._square / (1 - self.SECOND**self._taken)).sqrt()
        return (patch + size * first / second.clamp_min(SMALLEST)).clamp(0, 255)


class Gradient:
    """The accumulated gradient itself, without its sign, each new one scaled to a mean magnitude of 1.

    The scaling gives `size` the meaning it has elsewhere, whatever the scale of the logits.
    """

    def __init__(self, momentum: float) -> None:
        self._momentum = momentum
        self._velocity: torch.Tensor | None = None

    def step(self, patch: torch.Tensor, gradient: torch.Tensor, size: float) -> torch.Tensor:
        velocity = torch.zeros_like(patch) if self._velocity is None else self._velocity
        self._velocity = self._momentum * velocity + gradient / gradient.abs().mean().clamp_min(SMALLEST)
        return (patch + size * self._velocity).clamp(0, 255)


OPTIMIZERS: Mapping[str, type[Optimizer]] = MappingProxyType(
    {"momentum-sign": MomentumSign, "adam": Adam, "sgd": Gradient}
)


def get_optimizer(name: str) -> type[Optimizer]:
    """Look an optimizer up by name.

    Raises:
        InputError: unknown; says which exist.
    """
    if name not in OPTIMIZERS:
        raise InputError(f"unknown optimizer {name!r}; choose one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]
