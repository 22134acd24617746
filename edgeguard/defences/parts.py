"""What a method trains with besides the loop that all share: its parts, each as one frozen value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgeguard.errors import InputError
from edgeguard.quant.width import Width, parse_width


def _check_sizes(sizes: tuple[int, ...]) -> None:
    if not sizes or min(sizes) < 1:
        raise InputError(f"patch sizes must be positive, got {sizes}")


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
class UniversalPatches:
    """A-QAPA inside training: a pool of universal patches that grow on the gradient of the training step itself.

    sizes: side lengths in pixels. members: patches of each size. share: part of each batch that is patched.
    per_step: patches in one batch. step_size: signed ascent in grey levels.
    refresh_every: ascents until the member trained longest starts anew.
    """

    sizes: tuple[int, ...] = (5, 6, 8)
    members: int = 2
    share: float = 0.25
    per_step: int = 3
    step_size: float = 8.0
    refresh_every: int = 600

    def __post_init__(self) -> None:
        _check_sizes(self.sizes)
        if not 0.0 < self.share <= 1.0 or self.members < 1 or self.per_step < 1:
            raise InputError("universal patches need 0 < share <= 1, members and per_step >= 1")


@dataclass(frozen=True)
class PerImagePatches:
    """A-QAPA for single images inside training: a batch is trained on `passes` times more, and its patches climb meanwhile.

    Each image gets a patch of its own. Its gradient comes out of the training step itself, so one ascent a pass is free;
    the first pass, over clean images, tells where a patch would do most.

    sizes: side lengths in pixels, one drawn for each batch. share: part of the batch that is patched. passes: over each
    batch after the clean one. ascents: of the patches alone before each of these passes, besides the free one.
    step_size: signed ascent in grey levels, halved towards the last one. momentum: share of the accumulated gradient
    kept. candidates: places compared by the clean gradient, at random; 1 takes any.
    keep: share of the patches that go on from where the image's last one ended, an epoch before; needs crops that the
    training loop makes itself, and is 0 for data sets with crops of their own.
    """

    sizes: tuple[int, ...] = (5, 6, 8, 10)
    share: float = 0.75
    passes: int = 3
    ascents: int = 0
    step_size: float = 48.0
    momentum: float = 0.5
    candidates: int = 8
    keep: float = 0.8

    def __post_init__(self) -> None:
        _check_sizes(self.sizes)
        if not 0.0 < self.share <= 1.0 or self.passes < 1 or self.candidates < 1 or self.ascents < 0:
            raise InputError("patches per image need 0 < share <= 1, passes and candidates >= 1 and ascents >= 0")
        if not 0.0 <= self.keep <= 1.0:
            raise InputError(f"keep is a share between 0 and 1, got {self.keep}")
        if not 0.5 <= self.step_size <= 255 or not 0.0 <= self.momentum < 1.0:
            raise InputError(
                f"expected 0.5 <= step size <= 255 and 0 <= momentum < 1, got {self.step_size} and {self.momentum}"
            )


MOVES = {"full": 4, "random": 1, "none": 0}
"""Places that a move of a patch compares with its own."""


@dataclass(frozen=True)
class LocatedPatches:
    """What `pbat` trains against: a patch of each image's own, crafted at one fixed width, whose place is optimized.

    sizes: side lengths in pixels, one drawn for each batch. share: part of each batch that is patched.
    attack_steps: signed ascents of a patch, and as many moves of its place. step_size: of an ascent, in grey levels.
    moves: of the place, one with every ascent: "full" compares the four neighbours with it, "random" one of them, "none"
    leaves it where it was drawn. stride: of a move, in pixels.
    attack_width: the width attacked; None is the largest. single_width: train the weights at that width alone.
    """

    sizes: tuple[int, ...] = (8,)
    share: float = 0.5
    attack_steps: int = 25
    step_size: float = 25.5
    moves: str = "full"
    stride: int = 2
    attack_width: Width | None = None
    single_width: bool = False

    def __post_init__(self) -> None:
        _check_sizes(self.sizes)
        if not 0.0 < self.share <= 1.0 or self.attack_steps < 1 or self.stride < 1:
            raise InputError(
                "pbat needs 0 < share <= 1, attack steps and stride >= 1, got "
                f"{self.share}, {self.attack_steps} and {self.stride}"
            )
        if not 0.5 <= self.step_size <= 255:
            raise InputError(f"pbat's step size must be 0.5 to 255 grey levels, got {self.step_size}")
        if self.moves not in MOVES:
            raise InputError(f"unknown moves {self.moves!r} of pbat's patches; expected one of {', '.join(MOVES)}")


@dataclass(frozen=True)
class RandomPrecision:
    """What `dwq` trains against: images perturbed everywhere, by one signed step from a random start.

    epsilon: largest change of a pixel, in grey levels. step: of the attack, as a multiple of epsilon.
    """

    epsilon: float = 8.0
    step: float = 1.25

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= 255 or not (math.isfinite(self.step) and self.step > 0):
            raise InputError(
                f"dwq needs 0 < epsilon <= 255 grey levels and a step above 0, got {self.epsilon} and {self.step}"
            )


@dataclass(frozen=True)
class Disalignment:
    """What `triqdef` trains with: universal patches, and penalties on what two widths have in common under them.

    patches: as of qadt-r. feature_penalty, gradient_penalty: weights of the two, beside 1 of the loss; 0 switches one off.
    penalty_every: batches from one with penalties to the next. penalty_images: how many patched images they are computed on.
    layers: how many stages of the net count as features, from the last one back.
    curriculum: part of the run in which the lower widths join the two highest, one after the other; 0 has all at once.
    """

    patches: UniversalPatches = UniversalPatches(sizes=(6,), share=0.5)
    feature_penalty: float = 0.8
    gradient_penalty: float = 0.5
    penalty_every: int = 4
    penalty_images: int = 16
    layers: int = 2
    curriculum: float = 0.5

    def __post_init__(self) -> None:
        penalties = (self.feature_penalty, self.gradient_penalty)
        if any(not math.isfinite(value) or value < 0 for value in penalties):
            raise InputError(f"the penalties of triqdef must be finite and not negative, got {penalties}")
        if self.penalty_every < 1 or self.layers < 1:
            raise InputError(
                f"triqdef needs penalty every and layers of at least 1, got {self.penalty_every} and {self.layers}"
            )
        if self.penalty_images < 2:
            raise InputError(f"the penalties of triqdef need at least 2 images, got {self.penalty_images}")
        if not 0.0 <= self.curriculum <= 1.0:
            raise InputError(f"the curriculum is a part of the run, 0 to 1, got {self.curriculum}")


def part_to_json(part: Any) -> dict[str, Any]:
    """A part of a configuration as plain JSON values."""
    entry = asdict(part)
    if entry.get("attack_width") is not None:
        entry["attack_width"] = str(part.attack_width)
    return entry


def part_from_json(kind: Any, entry: Mapping[str, Any]) -> Any:
    """The part of class `kind` that `part_to_json` wrote.

    Raises:
        KeyError, TypeError: a key is missing or unknown. InputError: a value that the part refuses.
    """
    values = dict(entry)
    if "sizes" in values:
        values["sizes"] = tuple(values["sizes"])
    if values.get("attack_width") is not None:
        values["attack_width"] = parse_width(values["attack_width"])
    if "patches" in values:
        values["patches"] = part_from_json(UniversalPatches, values["patches"])
    return kind(**values)
