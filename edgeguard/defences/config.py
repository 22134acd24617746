"""What `harden` does, as one frozen value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgeguard.errors import InputError
from edgeguard.quant.width import Width


@dataclass(frozen=True)
class GIR:
    """Gradient-inconsistent regularization; each part is switched off by 0. None of it exists at inference.

    backward_noise: (a) standard deviation of the factor on what activation quantizers pass backward.
    alignment: (b) weight of the squared cosine between input gradients at two widths.
    alignment_every: steps from one such penalty to the next; it costs a second backward pass.
    alignment_images: how many clean images of the batch it is computed on.
    patch_noise: (c) noise on the patch gradient before its sign is taken, relative to the gradient's own size.
    """

    backward_noise: float = 0.0
    alignment: float = 0.0
    alignment_every: int = 16
    alignment_images: int = 16
    patch_noise: float = 0.0

    def __post_init__(self) -> None:
        values = (self.backward_noise, self.alignment, self.patch_noise)
        if any(not math.isfinite(value) or value < 0 for value in values):
            raise InputError(f"the parts of GIR must be finite and not negative, got {values}")
        if self.alignment_every < 1 or self.alignment_images < 2:
            raise InputError("GIR's alignment penalty needs at least every 1 step and at least 2 images")


@dataclass(frozen=True)
class PatchTraining:
    """A-QAPA inside training: a pool of universal patches that grow on the gradient of the training step itself.

    sizes: side lengths in pixels. members: patches of each size. share: part of each batch that is patched.
    per_step: patches in one batch. step_size: signed ascent in grey levels.
    refresh_every: ascents until the member trained longest starts anew. inner_steps: extra ascents before a training
    step, each one more forward and backward pass at a width drawn where the pool is weakest.
    """

    sizes: tuple[int, ...] = (5, 6, 8)
    members: int = 2
    share: float = 0.5
    per_step: int = 3
    step_size: float = 8.0
    refresh_every: int = 600
    inner_steps: int = 0

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise InputError(f"patch sizes must be positive, got {self.sizes}")
        if not 0.0 < self.share <= 1.0 or self.members < 1 or self.per_step < 1 or self.inner_steps < 0:
            raise InputError("patch training needs 0 < share <= 1, members and per_step >= 1, inner_steps >= 0")


@dataclass(frozen=True)
class HardenConfig:
    """One training run. patches None: no defence (the `qat` baseline).

    batch_size: images a step. lr: peak of a cosine schedule with a linear warm-up. scale_lr: the same for log2 scales.
    max_steps: stop after so many steps in all (0: never). amp: bfloat16 outside the quantizers (CUDA only).
    """

    method: str
    widths: tuple[Width, ...]
    epochs: int = 8
    max_steps: int = 0
    batch_size: int = 128
    lr: float = 0.02
    scale_lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int = 100
    clip_norm: float = 2.0
    seed: int = 0
    augment: bool = True
    flip: bool = True
    amp: bool = False
    patches: PatchTraining | None = None
    gir: GIR = GIR()

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or self.max_steps < 0 or self.seed < 0:
            raise InputError("training needs epochs >= 1, batch size >= 2, max steps >= 0 and seed >= 0")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"the learning rate must be positive, got {self.lr}")

    def width_probabilities(self) -> list[float]:
        """DBWT draws each step's width in proportion to 1 / weight bits: the lower the width, the more it must learn."""
        shares = [1.0 / width.weight for width in self.widths]
        return [share / sum(shares) for share in shares]


QADT_R_GIR = GIR(backward_noise=0.1, alignment=0.1, alignment_every=16, patch_noise=0.5)


def preset(config: HardenConfig, gir: Mapping[str, Any] | None = None) -> HardenConfig:
    """The parts that the configuration's method switches on; `gir` overrides single parts of the regularization.

    Raises:
        InputError: an unknown method, or a part that the method does not have.
    """
    if config.method == "qat":
        if gir:
            raise InputError(f"method qat is the undefended baseline: it has no {', '.join(gir)}")
        return replace(config, patches=None, gir=GIR())
    if config.method == "qadt-r":
        return replace(config, patches=config.patches or PatchTraining(), gir=replace(QADT_R_GIR, **(gir or {})))
    raise InputError(f"unknown method {config.method!r}; expected qadt-r or qat")
