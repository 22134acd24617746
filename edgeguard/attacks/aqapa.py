"""A-QAPA: one patch for every image, place and bit-width. Needs torch.

A universal patch that maximizes the expected loss over images, random placements and quantized models of several
bit-widths, through their straight-through gradients. "Adaptive": the distribution over widths moves toward those where
the patch succeeds least. The definition is ours: the paper that named the attack (arXiv:2503.07058) gives the idea, and
we hold none of its equations.

Each step draws a width, a batch of images that this width classifies correctly and a place for each image, and moves
the patch along the sign of its accumulated gradient (momentum: Dong et al. 2018, arXiv:1710.06081). The patch is kept
in float32 between steps, but every gradient is taken at whole grey levels: what is optimized is what is deployed.

Where a search ends depends on where it starts far more than on how long it lasts, so several random starts race: in
each round every start takes a few steps, all are scored on the same images and places, and the best third goes on
(successive halving: Jamieson & Talwalkar 2016, arXiv:1502.07943). Exploring needs many steps rather than exact ones, so
a step of the race is two moves on half a batch each. All steps count: an attack shows steps * batch_size images.

Craft on images that the result is not judged on; nothing in here knows which those are, and nothing in here is a
result: `Crafted.selection` only chose among restarts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from edgeguard.attacks.api import Checkpoint, Differentiable, Found, Images, Labels, Progress, Victim
from edgeguard.attacks.losses import get_loss
from edgeguard.attacks.optimizers import get_optimizer
from edgeguard.attacks.search import CraftStep, Search
from edgeguard.attacks.transforms import PLAIN, Transforms
from edgeguard.errors import InputError
from edgeguard.patch import Patch, Positions, square

__all__ = ["AQAPA", "CraftStep", "Crafted", "craft"]

KEPT = 3
"""One start in so many survives a round of the race."""
SHORTEST = 5
"""Steps a start takes at least before it is judged."""


@dataclass(frozen=True)
class AQAPA:
    """How to craft.

    patch_size: side length in pixels. steps: of one search, its race included. batch_size: images of a step.
    starts: random starts that race. race: share of the steps spent on the race.
    step_size, final_step_size: in grey levels, falling along half a cosine. momentum: share of the accumulated gradient
    kept from step to step. loss: a name in `losses.LOSSES`. target: a class to reach; None is untargeted.
    restarts: independent searches, of which the best on the crafting images is returned.
    width_rate: how sharply the distribution over widths prefers those with little success; 0 is uniform.
    width_floor: probability shared equally by all widths. optimizer: a name in `optimizers.OPTIMIZERS`; `momentum` is
    Adam's first decay. average: every step takes the mean loss over all models instead of drawing one of them, as many
    times as expensive: for an engine that draws one of a pool itself. transforms: of the patch while it is crafted.
    """

    name = "aqapa"
    access = "gradients"
    per_image = False

    patch_size: int
    steps: int = 300
    batch_size: int = 100
    starts: int = 16
    race: float = 0.6
    step_size: float = 16.0
    final_step_size: float = 1.0
    momentum: float = 0.9
    loss: str = "bounded-margin"
    target: int | None = None
    restarts: int = 1
    seed: int = 0
    width_rate: float = 4.0
    width_floor: float = 0.2
    optimizer: str = "momentum-sign"
    average: bool = False
    transforms: Transforms = PLAIN

    def __post_init__(self) -> None:
        get_loss(self.loss)
        get_optimizer(self.optimizer)
        for name in ("patch_size", "steps", "batch_size", "starts", "restarts"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.final_step_size <= self.step_size <= 255:
            raise InputError(
                "step sizes are grey levels, 0 < final_step_size <= step_size <= 255, got "
                f"{self.final_step_size} and {self.step_size}"
            )
        if not (0 <= self.momentum < 1 and 0 <= self.race < 1):
            raise InputError(f"expected 0 <= momentum < 1 and 0 <= race < 1, got {self.momentum} and {self.race}")
        if not (0 <= self.width_floor <= 1 and 0 <= self.width_rate < math.inf):
            raise InputError(
                f"expected 0 <= width_floor <= 1 and width_rate >= 0, got {self.width_floor} and {self.width_rate}"
            )
        if self.seed < 0 or (self.target is not None and self.target < 0):
            raise InputError(f"seed and target cannot be negative, got {self.seed} and {self.target}")

    def rounds(self) -> list[tuple[int, int]]:
        """The race and the run of its winner: starts that take part in each round, and steps of each of them."""
        budget = int(self.race * self.steps)
        entrants = self.starts
        while entrants > 1 and budget < SHORTEST * sum(_survivors(entrants)):
            entrants -= 1
        field = _survivors(entrants)
        plan = [(alive, budget // sum(field)) for alive in field]
        return [*plan, (1, self.steps - sum(alive * each for alive, each in plan))]

    def run(
        self, victim: Victim, images: Images, labels: Labels, *, positions: Positions | None = None,
        progress: Progress | None = None, checkpoint: Checkpoint | None = None,
    ) -> Found:  # fmt: skip
        """One patch for all images and places; see `craft`. Takes no notice of positions and checkpoint."""

        def tick(step: CraftStep) -> None:
            if progress is not None:
                progress(step.restart * self.steps + step.step + 1, self.restarts * self.steps)

        crafted = craft(self, victim.models, images, labels, tick, victim.device)
        return Found(crafted.patch.pixels, crafted.patch.mask, gradients=crafted.gradients)


def _survivors(entrants: int) -> list[int]:
    """Starts in each round of a race: [16, 5] for 16; none for one start."""
    field = []
    while entrants > 1:
        field.append(entrants)
        entrants = max(1, entrants // KEPT)
    return field


@dataclass(frozen=True, eq=False)
class Crafted:
    """A patch and how it came about.

    history: every step of every restart. selection: one number per restart, the lowest success over widths on the
    crafting images; it chose among the restarts and says nothing about other images. gradients: images that gradients
    were taken of, each time and for each model.
    """

    patch: Patch
    history: tuple[CraftStep, ...]
    selection: tuple[float, ...]
    gradients: int = 0


def craft(
    config: AQAPA,
    models: Mapping[str, Differentiable],
    images: Images,
    labels: Labels,
    progress: Callable[[CraftStep], None] | None = None,
    device: str = "cpu",
) -> Crafted:
    """Search for a universal patch.

    Args:
        config: how.
        models: by the name of their width; one or several.
        images: (N, 3, H, W) uint8, to craft on; keep them apart from the images that the patch is judged on.
        labels: (N,) int64.
        progress: called after every step.
        device: where the models live.

    Raises:
        InputError: no models or images, a patch larger than the image, or a target outside the classes.
    """
    search = Search(config, models, images, labels, device)
    history: list[CraftStep] = []
    found: list[Images] = []
    for restart in range(config.restarts):
        for step in search.run(restart):
            history.append(step)
            if progress is not None:
                progress(step)
        found.append(search.winner.projected())
    if config.restarts == 1:
        return Crafted(square(found[0]), tuple(history), (), search.gradients)
    selection = [search.score(pixels) for pixels in found]
    return Crafted(square(found[int(np.argmax(selection))]), tuple(history), tuple(selection), search.gradients)
