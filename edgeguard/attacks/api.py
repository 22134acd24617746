"""What every attack takes and gives: one protocol over all of them. NumPy only.

An attack proposes, the harness judges: `Found` is pixels and where to put them, never a success rate. Attacks are
frozen dataclasses of their settings with the method `run`. What one may use is in its `access`:

* `gradients`: it differentiates `Victim.models`: twins (transfer), or a live engine with its twin's gradient (BPDA);
* `logits`: it asks `Victim.classify` and reads all logits;
* `labels`: it asks `Victim.classify` and reads nothing but the largest logit's index.

A universal attack gets images to craft on, which are not the images that it is judged on, and returns one patch. An
attack per image gets the judged images themselves, in the order in which they are judged, and returns a patch for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import InputError
from edgeguard.patch import Patch, Positions

if TYPE_CHECKING:
    import torch

Images = NDArray[np.uint8]
"""(N, 3, H, W)."""
Labels = NDArray[np.int64]
"""(N,)."""
Logits = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Images (N, 3, H, W) uint8 to logits (N, classes) float32, without a gradient: what an engine is to an attack."""
Progress = Callable[[int, int], None]
"""What is done, and the total."""
Arrays = Mapping[str, NDArray[Any]]

ACCESSES = ("gradients", "logits", "labels")


class Differentiable(Protocol):
    """Images (N, 3, H, W) float32, grey levels 0..255, to logits (N, classes) float32, with gradients."""

    def __call__(self, images: torch.Tensor, /) -> Any: ...


class Checkpoint(Protocol):
    """Where a long attack keeps its state, so that it can go on after a crash. Arrays only."""

    def load(self) -> Arrays | None:
        """What was saved last, or None."""

    def save(self, state: Arrays) -> None: ...


@dataclass(frozen=True, eq=False)
class Victim:
    """What is attacked.

    models: what can be differentiated, by the name of its width; empty where there are no gradients. classify: the live
    engine, (N, 3, H, W) uint8 to (N, classes) float32; None where the attacker has no access to it.
    device: where the models live.
    """

    models: Mapping[str, Differentiable] = field(default_factory=dict)
    classify: Logits | None = None
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class Found:
    """What an attack proposes.

    pixels: (3, h, w) uint8 for one patch on all images, or (N, 3, h, w): one for each. mask: (h, w) bool.
    positions: (N, 2) row and column where the attack wants the patch of each image; None leaves that to the judge.
    queries: images that the engine was shown. gradients: images that gradients were taken of, each time counted.
    last_restart: images that only the last restart fooled the attacked model with; None without restarts for single images.
    """

    pixels: Images
    mask: NDArray[np.bool_]
    positions: Positions | None = None
    queries: int = 0
    gradients: int = 0
    last_restart: int | None = None

    @property
    def per_image(self) -> bool:
        return self.pixels.ndim == 4

    @property
    def patch(self) -> Patch:
        """The universal patch.

        Raises:
            InputError: there is one patch for each image.
        """
        if self.per_image:
            raise InputError("there is one patch for each image, not one for all")
        return Patch(self.pixels, self.mask)


class Attack(Protocol):
    """Settings of an attack, and the attack."""

    @property
    def name(self) -> str:
        """As reports and the command line spell it."""

    @property
    def access(self) -> str:
        """One of `ACCESSES`."""

    @property
    def per_image(self) -> bool: ...

    def run(
        self, victim: Victim, images: Images, labels: Labels, *, positions: Positions | None = None,
        progress: Progress | None = None, checkpoint: Checkpoint | None = None,
    ) -> Found:  # fmt: skip
        """Search for patches.

        Args:
            positions: (N, 2), where the judge puts the patches; an attack per image that does not choose places itself
                needs them, others take no notice.
            checkpoint: where an attack that can be resumed keeps its state; others take no notice.

        Raises:
            InputError: images, labels, positions or settings that do not fit, or a victim without the access it needs.
            EngineError: the engine fails in the middle.
        """
