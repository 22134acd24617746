"""What a model is while a defence crafts its attack on it, between two updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from edgeguard.defences.gir import frozen_statistics


@contextmanager
def attacked(model: nn.Module) -> Iterator[None]:
    """Batch norms keep their running statistics, and only pixels get gradients, for the length of a block."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        with frozen_statistics(model):
            yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
