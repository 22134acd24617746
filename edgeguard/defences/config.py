"""What `harden` does, as one frozen value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from edgeguard.defences.parts import (
    GIR,
    MOVES,
    Disalignment,
    LocatedPatches,
    PerImagePatches,
    RandomPrecision,
    UniversalPatches,
)
from edgeguard.errors import InputError
from edgeguard.quant.width import Width

Part = TypeVar("Part", UniversalPatches, PerImagePatches)
Baseline = LocatedPatches | RandomPrecision | Disalignment
BASELINES: Mapping[str, type[Baseline]] = {"pbat": LocatedPatches, "dwq": RandomPrecision, "triqdef": Disalignment}
"""Methods that have one part of their own and nothing else."""
METHODS = ("qadt-r", "qat", *BASELINES)


@dataclass(frozen=True)
class HardenConfig:
    """One training run. What a method does not have is None: see `preset`.

    batch_size: images a step, over all processes. accumulate: parts in which a batch is passed, to save memory; an update
    follows after as many passes, from the sum of their gradients, so there are as many updates as with one part.
    lr: peak of a cosine schedule with a linear warm-up. scale_lr: the same for log2 scales.
    max_steps: stop after so many batches in all (0: never). flip: mirror images in augmentation.
    distillation: weight of what the float model says of the clean image, against the label's; temperature: of both.
    amp: bfloat16 outside the quantizers. compiled: train on one compiled graph for all widths. cuda_graphs: record its passes
    and replay them, where a GPU does that right.
    pbat, dwq, triqdef: the part of the method of that name.
    """

    method: str
    widths: tuple[Width, ...]
    epochs: int = 8
    max_steps: int = 0
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 0.05
    scale_lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 2e-4
    warmup_steps: int = 100
    clip_norm: float = 2.0
    seed: int = 0
    augment: bool = True
    flip: bool = True
    distillation: float = 0.5
    temperature: float = 2.0
    amp: bool = False
    compiled: bool = False
    cuda_graphs: bool = False
    universal: UniversalPatches | None = field(default_factory=UniversalPatches)
    per_image: PerImagePatches | None = field(default_factory=PerImagePatches)
    gir: GIR = field(default_factory=GIR)
    pbat: LocatedPatches | None = None
    dwq: RandomPrecision | None = None
    triqdef: Disalignment | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or self.max_steps < 0 or self.seed < 0 or self.accumulate < 1:
            raise InputError("training needs epochs and accumulate >= 1, batch size >= 2, max steps and seed >= 0")
        if self.batch_size // self.accumulate < 2:
            raise InputError(f"each of {self.accumulate} parts of a batch of {self.batch_size} needs at least 2 images")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"the learning rate must be positive, got {self.lr}")
        if not 0.0 <= self.distillation <= 1.0 or not self.temperature > 0:
            raise InputError(
                f"expected 0 <= distillation <= 1 and a temperature above 0, got {self.distillation}, {self.temperature}"
            )
        attacked = self.pbat.attack_width if self.pbat is not None else None
        if attacked is not None and attacked not in self.widths:
            names = ", ".join(str(width) for width in self.widths)
            raise InputError(f"pbat attacks width {attacked}, which is not trained; choose one of {names}")
        if self.triqdef is not None and len(self.widths) < 2:
            raise InputError("triqdef compares two widths; train at two or more, for example --bits 8,4,2")

    def width_probabilities(self) -> list[float]:
        """DBWT draws each pass's width in proportion to 1 / weight bits: the lower the width, the more it must learn."""
        shares = [1.0 / width.weight for width in self.widths]
        return [share / sum(shares) for share in shares]

    def patch_sizes(self) -> list[int] | None:
        """Sides of the patches trained against, ascending; None without any."""
        patches = self.triqdef.patches if self.triqdef is not None else None
        parts = [part.sizes for part in (self.universal, self.per_image, self.pbat, patches) if part is not None]
        return sorted({side for sizes in parts for side in sizes}) or None


def against(part: Part, sizes: tuple[int, ...] | None) -> Part:
    """The part with patches of other sizes; None leaves its own."""
    return part if sizes is None else replace(part, sizes=sizes)


QADT_R_GIR = GIR(backward_noise=0.1, alignment=0.1, alignment_every=16, patch_noise=0.5)


def preset(
    config: HardenConfig, gir: Mapping[str, Any] | None = None, options: Mapping[str, Any] | None = None
) -> HardenConfig:
    """The parts that the configuration's method switches on, and no others.

    gir: overrides single parts of the regularization. options: of a baseline's part, by the names of its fields; `sizes`
    are those of its patches.

    Raises:
        InputError: an unknown method, or a part or option that the method does not have.
    """
    method, given = config.method, dict(options or {})
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    if method == "qat" and (gir or given):
        raise InputError(f"method qat is the undefended baseline: it has no {', '.join([*(gir or {}), *given])}")
    none: dict[str, Any] = dict.fromkeys(BASELINES)
    if method == "qadt-r":
        _refuse(method, given)
        return replace(config, gir=replace(QADT_R_GIR, **(gir or {})), **none)
    plain = replace(config, universal=None, per_image=None, gir=GIR(), **none)
    if method == "qat":
        return plain
    _refuse(method, gir or {})
    kind = BASELINES[method]
    if kind is Disalignment and "sizes" in given:
        given["patches"] = against(Disalignment.patches, given.pop("sizes"))
    _refuse(method, given.keys() - {entry.name for entry in fields(kind)})
    part: dict[str, Any] = {method: kind(**given)}
    return replace(plain, **part)


def _refuse(method: str, names: Iterable[str]) -> None:
    surplus = sorted(names)
    if surplus:
        raise InputError(f"method {method} has no {', '.join(surplus)}; leave that out")


def passes_per_batch(config: HardenConfig) -> float:
    """Forward and backward passes of the whole net over a whole batch that one step takes, for budgets and progress.

    A forward pass alone counts a third; passes over fewer images count as many of them as there are. A penalty on input
    gradients counts twice, for it is differentiated once more.
    """
    pbat, triqdef = config.pbat, config.triqdef
    if pbat is not None:
        return 1.0 + pbat.share * pbat.attack_steps * (1.0 + MOVES[pbat.moves] / 3.0)
    if config.dwq is not None:
        return 2.0
    if triqdef is not None:
        penalized = triqdef.feature_penalty > 0 or triqdef.gradient_penalty > 0
        passes = 2.0 * (2.0 if triqdef.gradient_penalty else 1.0) if penalized else 0.0
        images = min(triqdef.penalty_images, max(1, round(triqdef.patches.share * config.batch_size)))
        return 1.0 + passes * images / config.batch_size / triqdef.penalty_every
    part = config.per_image
    return 1.0 if part is None else 1.0 + part.passes * (1.0 + part.ascents * part.share)
