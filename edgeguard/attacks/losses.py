"""What an attack increases: one value per image, higher is more adversarial. Needs torch.

Every loss takes `logits` (N, classes) float32, `labels` (N,) int64 and optionally `target`, a class. Without a target
the true label is to be left; with one, the target is to be reached, and the labels do not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch.nn import functional as F

from edgeguard.errors import InputError

Loss = Callable[[torch.Tensor, torch.Tensor, "int | None"], torch.Tensor]

RESIDUAL = 0.01


def aimed_at(logits: torch.Tensor, labels: torch.Tensor, target: int | None) -> torch.Tensor:
    """The classes (N,) int64 that a loss is about: the labels, or the target of all images.

    Raises:
        InputError: a target that is none of the model's classes.
    """
    if target is None:
        return labels
    if not 0 <= target < logits.shape[1]:
        raise InputError(f"target {target} is none of the model's {logits.shape[1]} classes")
    return torch.full_like(labels, target)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, target: int | None = None) -> torch.Tensor:
    """Negative log likelihood of the label, or log likelihood of the target. Returns: (N,)."""
    if target is None:
        return F.cross_entropy(logits, labels, reduction="none")
    return -F.cross_entropy(logits, aimed_at(logits, labels, target), reduction="none")


def margin(logits: torch.Tensor, labels: torch.Tensor, target: int | None = None) -> torch.Tensor:
    """Largest other logit minus the label's; with a target, the target's minus the largest other. Returns: (N,).

    Positive exactly when the attack succeeds. Source: Carlini & Wagner 2017, arXiv:1608.04644, f6 without its hinge.
    """
    reference = aimed_at(logits, labels, target)
    own = logits.gather(1, reference[:, None])[:, 0]
    others = logits.scatter(1, reference[:, None], -math.inf).amax(1)
    return others - own if target is None else own - others


def bounded_margin(logits: torch.Tensor, labels: torch.Tensor, target: int | None = None) -> torch.Tensor:
    """The margin divided by the spread of the logits and squashed by tanh. Returns: (N,), within -1 and 1.

    A universal patch has to win many images rather than a few by far: an image that is already lost, or far from
    being lost, weighs little. Dividing by the detached standard deviation of each image's logits makes the loss, and so
    the gradient's share of every image, independent of the logits' scale.
    """
    return torch.tanh(margin(logits, labels, target) / _positive(logits.detach().std(1)))


def scaled_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, target: int | None = None) -> torch.Tensor:
    """Cross-entropy at a temperature, per image, at which the softmax is not saturated. Returns: (N,).

    The logits a are multiplied by `beta = -log(rho / ((d - 1) (1 - rho))) / (max a - min a)`, d classes, so that the
    largest probability stays below 1 - rho and the gradient cannot vanish; rho is `RESIDUAL`. Plain cross-entropy
    underflows on nets with large logits, as low-bit nets often have, and makes them look robust.
    Source: Gupta & Ajanthan 2020, arXiv:2003.13511, the softmax part of their temperature; the Jacobian part is not
    needed by attacks that take the sign of the gradient.
    """
    spread = logits.detach().amax(1) - logits.detach().amin(1)
    limit = -math.log(RESIDUAL / ((logits.shape[1] - 1) * (1 - RESIDUAL)))
    return cross_entropy(logits * (limit / _positive(spread))[:, None], labels, target)


def _positive(spread: torch.Tensor) -> torch.Tensor:
    """The spread itself, or 1 where all logits of an image are equal."""
    return torch.where(spread > 0, spread, 1.0)


LOSSES: Mapping[str, Loss] = MappingProxyType(
    {
        "cross-entropy": cross_entropy,
        "margin": margin,
        "bounded-margin": bounded_margin,
        "scaled-cross-entropy": scaled_cross_entropy,
    }
)


def get_loss(name: str) -> Loss:
    """Look a loss up by name.

    Raises:
        InputError: unknown; says which exist.
    """
    if name not in LOSSES:
        raise InputError(f"unknown attack loss {name!r}; choose one of {', '.join(LOSSES)}")
    return LOSSES[name]
