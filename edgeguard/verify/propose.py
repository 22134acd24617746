"""Patches to judge: replayed from files, random pixels, or crafted. Torch only for attacks with gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.attacks.api import Attack, Found, Victim
from edgeguard.errors import InputError
from edgeguard.patch import Patch, Positions, check_fits, digest
from edgeguard.verify.catalog import Cost, entry
from edgeguard.verify.harness import Subject, logits_of, places_of_size
from edgeguard.verify.options import Progress, VerifyOptions
from edgeguard.verify.stages import StageCheckpoint

if TYPE_CHECKING:
    from edgeguard.attacks.api import Differentiable

EVERY_WIDTH = "all widths"
OPTIMIZED = "optimized"


@dataclass(frozen=True, eq=False)
class Plan:
    """A patch that will be proposed.

    name: of the attack in reports. attack: in the catalog; None for random pixels and replays that do not say. size: side in
    pixels. source: twins that it is crafted on, or the file it is read from. white_box: made with the gradient of the very
    model that is judged, perhaps among others. stream: tells random numbers of equal attacks apart. given: what needs no
    search.
    """

    name: str
    access: str
    size: int
    source: str | None = None
    white_box: bool = False
    attack: str | None = None
    stream: int = 0
    given: Found | None = None

    @property
    def per_image(self) -> bool:
        return self.attack is not None and entry(self.attack).per_image

    def placements(self, options: VerifyOptions) -> tuple[str, ...]:
        """Where the patch is judged."""
        if not self.per_image or self.attack is None:
            return options.placements
        return (OPTIMIZED,) if entry(self.attack).chooses_place else ("random",)

    def stage(self) -> dict[str, Any]:
        """What identifies the plan among those of one verification."""
        return {"attack": self.attack or self.name, "access": self.access, "size": self.size, "source": self.source}

    def __str__(self) -> str:
        source = f" from {self.source}" if self.access == "transfer" else ""
        return f"{self.attack or self.name} {self.size}x{self.size}, {self.access}{source}"


@dataclass(frozen=True, eq=False)
class Proposal:
    """What came of a plan.

    subset: number of judged images that an attack per image was run on; None for all. steps: of its gradient.
    """

    plan: Plan
    found: Found
    seconds: float = 0.0
    subset: int | None = None
    steps: int | None = None

    @property
    def sha256(self) -> str:
        """Of shape, mask and pixels."""
        return digest(self.found.pixels, self.found.mask)


def replayed(files: tuple[Path, ...], shape: tuple[int, int]) -> list[Plan]:
    """Patches from files, checked against images of `shape` (H, W).

    Raises:
        InputError: a file that is no patch, or a patch larger than the image.
    """
    from edgeguard.patch_files import load_patch

    found = []
    for path in files:
        patch = load_patch(path)
        try:
            check_fits(patch.size, shape)
        except InputError as exc:
            raise InputError(f"{path}: {exc}") from exc
        found.append(Plan("replay", "replay", max(patch.size), path.name, given=_found(patch)))
    return found


def _found(patch: Patch) -> Found:
    return Found(patch.pixels, patch.mask)


def noise(size: int, seed: int) -> Patch:
    """Random pixels: what any patch of this size does, crafted or not."""
    rng = np.random.default_rng([seed, size])
    return Patch(rng.integers(0, 256, (3, size, size), np.uint8), np.ones((size, size), bool))


def plans(options: VerifyOptions, widths: list[str], pool: bool = False) -> list[Plan]:
    """What will be crafted, in order. widths: names of the twins, the artifact's own first.

    pool: the twins are those of one pool's members, all of which are judged.

    Universal patches are crafted at the access `transfer` on each twin alone and, where there are several, on all of
    them with adaptive widths. Patches per image are transferred from the surrogates' twins, for the artifact's own is
    what the access `engine` differentiates; without surrogates, from the artifact's own. On a pool they, and all patches
    at the access `engine`, are crafted on all members at once.
    """
    found = []
    if options.crafts:
        found += [Plan("noise", "none", size, given=_found(noise(size, options.seed))) for size in options.patch_sizes]
    for size in options.patch_sizes if options.crafts else ():
        for name in options.attacks:
            kind = entry(name)
            for access in (access for access in options.accesses if access in kind.accesses):
                if access != "transfer":
                    stream = 1 if access == "engine" else 0
                    source = (EVERY_WIDTH if pool else widths[0]) if stream else None
                    found.append(Plan(kind.title, access, size, source, bool(stream), name, stream))
                    continue
                sources = [*widths, *([EVERY_WIDTH] if len(widths) > 1 else [])]
                if kind.per_image and len(widths) > 1:
                    sources = [EVERY_WIDTH] if pool else widths[1:]
                white = sources if pool else (widths[0], EVERY_WIDTH)
                found += [Plan(kind.title, access, size, source, source in white, name) for source in sources]
    return found


def cost(plan: Plan, options: VerifyOptions, judged: int) -> Cost:
    """What crafting costs. judged: number of judged images."""
    if plan.attack is None or plan.given is not None:
        return Cost()
    found = entry(plan.attack).cost(options, min(judged, options.per_image_limit))
    return Cost(found.gradients, found.queries + (found.gradients if plan.access == "engine" else 0))


@dataclass(frozen=True, eq=False)
class Workshop:
    """What crafting needs.

    subject: the live engine on the judged images. own: name of the judged artifact's twin. twins: by name, the
    artifact's own first, then its surrogates'. images, labels: (N, 3, H, W) uint8 and (N,) int64 for universal patches
    to be crafted on, apart from those that are judged.
    """

    subject: Subject
    own: str
    twins: Mapping[str, Differentiable]
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def attack(self, plan: Plan, options: VerifyOptions) -> Attack:
        """The plan's attack with its settings."""
        return entry(plan.attack or "").make(options, plan.size, 2 * options.seed + plan.stream)

    def subset(self, plan: Plan, options: VerifyOptions) -> int | None:
        return min(len(self.subject.images), options.per_image_limit) if plan.per_image else None

    def craft(
        self, plan: Plan, options: VerifyOptions, checkpoint: StageCheckpoint, progress: Progress | None,
        attack: Attack | None = None,
    ) -> Found:  # fmt: skip
        """Run the plan's attack, or that attack with other settings.

        Raises:
            InputError: nothing to attack, or settings that do not fit.
            EngineError: the engine fails.
        """
        attack, victim = attack or self.attack(plan, options), self.victim(plan, options)

        def tick(done: int, total: int) -> None:
            if progress is not None:
                progress(f"crafting {plan}", done, total)

        if not plan.per_image:
            found = attack.run(victim, self.images, self.labels, progress=tick, checkpoint=checkpoint)
        else:
            found = self._per_image(plan, attack, victim, options, checkpoint, tick)
        models = [model for model in victim.models.values() if hasattr(model, "queries")]
        return replace(found, queries=found.queries + sum(model.queries for model in models))

    def victim(self, plan: Plan, options: VerifyOptions) -> Victim:
        """What the plan's attack is let at."""
        def ask(images: NDArray[np.uint8]) -> NDArray[np.float32]:
            return logits_of(self.subject.classify, images, options.batch_size)

        if plan.access == "query":
            return Victim(classify=ask)
        if plan.access == "engine":
            from edgeguard.attacks.bpda import BPDA

            return Victim({self.own: BPDA(ask, self.twins[self.own])})
        chosen = self.twins if plan.source == EVERY_WIDTH else {str(plan.source): self.twins[str(plan.source)]}
        return Victim(chosen)

    def _per_image(self, plan: Plan, attack: Attack, victim: Victim, options: VerifyOptions,
                   checkpoint: StageCheckpoint, tick: Any) -> Found:  # fmt: skip
        """A patch for each of the first judged images; those that do not count get none that matters."""
        count = self.subset(plan, options) or 0
        rows = np.flatnonzero(self.subject.eligible[:count])
        places = places_of_size(self.subject, (plan.size, plan.size), options.seed)[:count]
        if not len(rows):
            raise InputError("none of the judged images counts for the attack success rate, so there is nothing to attack")
        found = attack.run(victim, self.subject.images[rows], self.subject.labels[rows], positions=places[rows],
                           progress=tick, checkpoint=checkpoint)  # fmt: skip
        pixels = np.zeros((count, *found.pixels.shape[-3:]), np.uint8)
        pixels[rows] = found.pixels
        positions: Positions = places.copy()
        if found.positions is not None:
            positions[rows] = found.positions
        return replace(found, pixels=pixels, positions=positions)
