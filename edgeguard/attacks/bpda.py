"""What an attack differentiates: a torch model, or a live engine with its twin's gradient. Needs torch.

BPDA (backward pass differentiable approximation): an engine executes integers and gives no gradient, its twin computes
the same function with straight-through gradients. The forward value comes from the engine, the gradient from the twin.
Source: Athalye et al. 2018, arXiv:1802.00420, section 4.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from edgeguard.attacks.api import Differentiable, Logits
from edgeguard.errors import EngineError


class BPDA:
    """A `Differentiable` with the values of `forward` and the gradient of `backward`: white-box access to an engine.

    queries: images shown to `forward` so far.
    """

    def __init__(self, forward: Logits, backward: Differentiable) -> None:
        self._forward = forward
        self._backward = backward
        self._classes: int | None = None
        self.queries = 0

    def __call__(self, images: torch.Tensor, /) -> torch.Tensor:
        """Logits (N, classes). Pixels are rounded to whole grey levels before the engine sees them.

        Raises:
            EngineError: when the engine's logits are not finite or not of the twin's shape.
        """
        # The twin only tells the gradient, and once how many classes there are: engines are several times as fast.
        blind = self._classes is not None and not (images.requires_grad and torch.is_grad_enabled())
        approximate: torch.Tensor | None = None if blind else self._backward(images)
        if approximate is not None:
            self._classes = approximate.shape[1]
        pixels = images.detach().round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        values = np.asarray(self._forward(pixels))
        self.queries += len(pixels)
        expected = (len(pixels), self._classes)
        if values.shape != expected or not np.isfinite(values).all():
            raise EngineError(
                f"the engine must give finite logits {expected}, got {values.shape} with "
                f"{int((~np.isfinite(values)).sum())} values that are not finite"
            )
        exact = torch.from_numpy(values.astype(np.float32)).to(images.device)
        if approximate is None:
            return exact
        return _Straight.apply(exact, approximate)  # type: ignore[no-any-return]


class _Straight(torch.autograd.Function):
    """Value of the first argument, gradient of the second: `b + (a - b).detach()` without its rounding."""

    @staticmethod
    def forward(ctx: Any, exact: torch.Tensor, approximate: torch.Tensor) -> torch.Tensor:
        return exact.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, gradients[0]
