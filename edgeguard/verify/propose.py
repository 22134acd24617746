"""Patches to judge: replayed from files, or crafted on twins and through the live engine. Torch only to craft."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import InputError
from edgeguard.patch import Patch, check_fits, square
from edgeguard.verify.harness import Classify, logits_of
from edgeguard.verify.options import Progress, VerifyOptions

if TYPE_CHECKING:
    from edgeguard.attacks.api import Differentiable

EVERY_WIDTH = "all widths"


@dataclass(frozen=True, eq=False)
class Proposal:
    """A patch and what its maker knew.

    access: replay, transfer, engine, or none for a patch of random pixels. source: the twins it was crafted on, or the
    file it was read from. white_box: made with the gradient of the very model that is judged, perhaps among others.
    queries: images that the engine was shown while it was made.
    """

    name: str
    access: str
    patch: Patch
    source: str | None
    white_box: bool
    queries: int

    @property
    def sha256(self) -> str:
        """Of shape, mask and pixels."""
        parts = (repr(self.patch.size).encode(), self.patch.mask.tobytes(), self.patch.pixels.tobytes())
        return hashlib.sha256(b"".join(parts)).hexdigest()


def replayed(files: tuple[Path, ...], shape: tuple[int, int]) -> list[Proposal]:
    """Patches from files, checked against images of `shape` (H, W).

    Raises:
        InputError: a file that is no patch, or a patch larger than the image.
    """
    found = []
    for path in files:
        patch = Patch.load(path)
        try:
            check_fits(patch.size, shape)
        except InputError as exc:
            raise InputError(f"{path}: {exc}") from exc
        found.append(Proposal("replay", "replay", patch, path.name, False, 0))
    return found


def noise(size: int, seed: int) -> Proposal:
    """Random pixels: what any patch of this size does, crafted or not."""
    rng = np.random.default_rng([seed, size])
    return Proposal("noise", "none", square(rng.integers(0, 256, (3, size, size), np.uint8)), None, False, 0)


@dataclass(frozen=True, eq=False)
class Workshop:
    """What crafting needs.

    engine: the live engine. own: name of the judged artifact's twin. twins: by name, the artifact's own first, then its
    surrogates'. images, labels: (N, 3, H, W) uint8 and (N,) int64 to craft on, apart from those that are judged.
    """

    engine: Classify
    own: str
    twins: Mapping[str, Differentiable]
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def crafted(workshop: Workshop, options: VerifyOptions, progress: Progress | None) -> Iterator[Proposal]:
    """A-QAPA patches of every size, for the accesses that are asked for.

    `transfer`: one patch on each twin alone and, where there are several, one on all of them with adaptive widths.
    `engine`: values of the live engine, gradient of its own twin (BPDA), from another random start.
    """
    from edgeguard.attacks.bpda import BPDA

    for size in options.patch_sizes:
        if "transfer" in options.accesses:
            for name, twin in workshop.twins.items():
                patch = _craft(workshop, options, size, {name: twin}, f"transfer from {name}", 0, progress)
                yield Proposal("aqapa", "transfer", patch, name, name == workshop.own, 0)
            if len(workshop.twins) > 1:
                patch = _craft(workshop, options, size, workshop.twins, f"transfer from {EVERY_WIDTH}", 0, progress)
                yield Proposal("aqapa", "transfer", patch, EVERY_WIDTH, True, 0)
        if "engine" in options.accesses:
            live = BPDA(
                lambda images: logits_of(workshop.engine, images, options.batch_size), workshop.twins[workshop.own]
            )
            patch = _craft(workshop, options, size, {workshop.own: live}, "engine", 1, progress)
            yield Proposal("aqapa", "engine", patch, workshop.own, True, live.queries)


def _craft(
    workshop: Workshop, options: VerifyOptions, size: int, models: Mapping[str, Differentiable], stage: str,
    stream: int, progress: Progress | None,
) -> Patch:  # fmt: skip
    from edgeguard.attacks.aqapa import AQAPA, CraftStep, craft

    config = AQAPA(
        size, options.steps, options.attack_batch, loss=options.loss, target=options.target, restarts=options.restarts,
        seed=2 * options.seed + stream,
    )  # fmt: skip

    def tick(step: CraftStep) -> None:
        if progress is not None:
            done = step.restart * config.steps + step.step + 1
            progress(f"crafting {size}x{size}, {stage}", done, config.steps * config.restarts)

    return craft(config, models, workshop.images, workshop.labels, tick).patch
