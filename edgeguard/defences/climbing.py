"""Patches of single images that climb, all in lockstep: where they lie, what they are, and how a gradient moves them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeguard.attacks.optimizers import SMALLEST
from edgeguard.defences.parts import PerImagePatches
from edgeguard.patch import Positions, apply_patch, window_index


class Climbing:
    """The patches of one batch, (n, 3, s, s) float32, at places (n, 2). The ascents that `part` plans end at half its step."""

    def __init__(self, patch: Tensor, places: Positions, part: PerImagePatches) -> None:
        self.part, self.places = part, places
        self._patch, self._velocity = patch, torch.zeros_like(patch)
        self._mask = np.ones(patch.shape[2:], bool)
        self._index = window_index(self._mask, places)
        self._done, self._planned = 0, part.passes * (part.ascents + 1)

    def pasted(self, clean: Tensor) -> Tensor:
        """Images (n, 3, H, W) under their patches, in whole grey levels."""
        return apply_patch(clean, self._patch.round(), self._mask, self.places)

    def window(self, gradient: Tensor) -> Tensor:
        """Of gradients by the pixels (N, 3, H, W), N >= n, the part under each patch: (n, 3, s, s)."""
        image, row, column = self._index
        return gradient[image, :, row, column].transpose(1, 2).reshape(self._patch.shape)

    def ascend(self, gradient: Tensor) -> None:
        """One signed step of every patch with momentum along a gradient (n, 3, s, s)."""
        part = self.part
        scale = gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(SMALLEST)
        self._velocity = part.momentum * self._velocity + gradient / scale
        step_size = part.step_size * (1 - 0.5 * self._done / max(1, self._planned - 1))
        self._patch = (self._patch + step_size * self._velocity.sign()).clamp_(0, 255)
        self._done += 1

    def pixels(self) -> NDArray[np.uint8]:
        """The patches as they are now."""
        rounded: NDArray[np.uint8] = self._patch.round().to(torch.uint8).cpu().numpy()
        return rounded
