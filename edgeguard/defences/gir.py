"""GIR, part (b): a penalty on the similarity of input gradients at two widths. The definition is ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeguard.quant.model import QuantizedModel
from edgeguard.quant.width import Width


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms use and keep their running statistics for the length of a block."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d) and module.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


def gradient_alignment(model: QuantizedModel, pixels: Tensor, labels: Tensor, widths: tuple[Width, Width]) -> Tensor:
    """Mean over images of the squared cosine between the input gradients of the loss at two widths, differentiable.

    pixels: (N, 3, H, W) float32. Returns: a scalar in [0, 1].
    """
    gradients = []
    with frozen_statistics(model):
        for width in widths:
            inputs = pixels.detach().requires_grad_(True)
            with model.at(width):
                loss = F.cross_entropy(model(inputs), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, inputs, create_graph=True)
            gradients.append(gradient.flatten(1))
    return F.cosine_similarity(gradients[0], gradients[1], dim=1).square().mean()
