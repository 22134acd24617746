"""Universal patches of a pool on the images of a batch: how they get there, and how they climb afterwards."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from edgeguard.attacks.pool import PatchPool, PoolConfig
from edgeguard.defences.defence import Batch
from edgeguard.defences.parts import UniversalPatches
from edgeguard.patch import apply_patch, random_positions

Leaves = list[tuple[int, Tensor, slice]]
"""Of each universal patch in a batch: its number in the pool, the leaf that receives its gradient, and its images."""


def make_pool(part: UniversalPatches, gradient_noise: float, seed: int) -> PatchPool:
    """The pool of a run. gradient_noise: GIR, part (c)."""
    return PatchPool(PoolConfig(part.sizes, part.members, part.refresh_every, gradient_noise, seed))


def paste(batch: Batch, pool: PatchPool, part: UniversalPatches) -> tuple[Tensor, Leaves]:
    """Patches drawn from the pool at random places of the first `part.share` of the images.

    Returns: (n, 3, H, W) float32 that pass gradients on to the leaves, and these.
    """
    pixels, rng, count = batch.pixels, batch.rng("patch"), batch.first(part.share)
    members = pool.draw(rng, min(part.per_step, batch.leading(part.share)))
    ends = np.linspace(0, batch.leading(part.share), len(members) + 1).astype(int)
    bounds = np.array([len(range(end)[batch.rows]) for end in ends.tolist()])
    image = (pixels.shape[2], pixels.shape[3])
    pieces: list[Tensor] = []
    leaves: Leaves = []
    for member, start, stop in zip(members.tolist(), bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        leaf = torch.from_numpy(pool[member]).to(pixels.device).requires_grad_(True)
        side = leaf.shape[-1]
        places = batch.share(random_positions(batch.total, image, (side, side), rng))[start:stop]
        pieces.append(apply_patch(pixels[start:stop], leaf, np.ones((side, side), bool), places))
        leaves.append((member, leaf, slice(start, stop)))
    return torch.cat([*pieces, pixels[count:]]).contiguous(memory_format=torch.channels_last), leaves


def ascend(pool: PatchPool, leaves: Leaves, part: UniversalPatches, summed: Callable[[Tensor], Tensor]) -> None:
    """One signed step of every patch that was pasted, along the gradient that the training pass left in its leaf.

    summed: a gradient over the images of all processes, from that of this one.
    """
    for member, leaf, _ in leaves:
        if leaf.grad is not None:
            pool.ascend(member, summed(leaf.grad).cpu().numpy(), part.step_size)
