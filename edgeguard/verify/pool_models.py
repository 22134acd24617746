"""What an attack on a pool differentiates: its members' twins, or its live members with their twins' gradients. Torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from edgeguard.attacks.api import Differentiable
from edgeguard.verify.pool_judge import steepness


class Mixture:
    """The pool's mean answer as `edgeguard.verify.pool_judge.mixed` defines it, with gradients."""

    def __init__(self, models: Mapping[str, Differentiable], probabilities: Mapping[str, float]) -> None:
        self._models, self._probabilities = dict(models), dict(probabilities)

    def __call__(self, images: torch.Tensor, /) -> torch.Tensor:
        """(N, classes) float32."""
        parts = []
        for width, model in self._models.items():
            logits = model(images)
            spread = (logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)).detach()
            scale = steepness(logits.shape[1]) / torch.where(spread > 0, spread, 1.0)
            chance = torch.tensor(self._probabilities[width], device=logits.device)
            parts.append(torch.log_softmax(logits * scale, 1) + chance.log())
        return torch.logsumexp(torch.stack(parts), 0)


class Guide:
    """The mean answer without a gradient: as the first model of an attack it decides what the attack keeps."""

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture

    def __call__(self, images: torch.Tensor, /) -> torch.Tensor:
        with torch.no_grad():
            return self._mixture(images)


class Weighted:
    """A model whose gradient is multiplied by a factor, so that a plain mean of losses is one by probabilities."""

    def __init__(self, model: Differentiable, factor: float) -> None:
        self._model, self._factor = model, factor

    @property
    def queries(self) -> int:
        """Images that a live engine behind it was shown."""
        return int(getattr(self._model, "queries", 0))

    def __call__(self, images: torch.Tensor, /) -> torch.Tensor:
        scaled: torch.Tensor = _Scaled.apply(self._model(images), self._factor)
        return scaled


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * ctx.factor, None
