"""The attacks that `verify` knows: how each is made from the options, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from edgeguard.attacks.api import Attack
from edgeguard.errors import InputError
from edgeguard.verify.options import GRADIENT_ACCESSES, VerifyOptions

SHORTER = 5
"""An attack per image takes so many times fewer steps than a universal one: each of its steps serves all its images."""
RETRIES = 3
"""Restarts that an attack per image has besides the first, each for the images that are left."""


@dataclass(frozen=True)
class Cost:
    """Images that gradients are taken of, and images that the attack shows the engine besides those."""

    gradients: int = 0
    queries: int = 0


@dataclass(frozen=True)
class Entry:
    """An attack.

    title: its name in reports. accesses: those it can use. per_image: a patch for each judged image. chooses_place:
    of an attack per image; False leaves that to the judge's random places. make: from options, patch size and seed.
    cost: from options and the number of images that it attacks.
    """

    title: str
    accesses: tuple[str, ...]
    per_image: bool
    chooses_place: bool
    make: Callable[[VerifyOptions, int, int], Attack]
    cost: Callable[[VerifyOptions, int], Cost]


def _aqapa(options: VerifyOptions, size: int, seed: int) -> Attack:
    from edgeguard.attacks.aqapa import AQAPA

    return AQAPA(
        size, options.steps, options.attack_batch, loss=options.loss, target=options.target,
        restarts=options.restarts, seed=seed,
    )  # fmt: skip


def _per_image_steps(options: VerifyOptions) -> int:
    return max(10, options.steps // SHORTER)


def _aqapa_per_image(options: VerifyOptions, size: int, seed: int) -> Attack:
    from edgeguard.attacks.per_image import PerImage

    return PerImage(
        size, _per_image_steps(options), restarts=options.restarts + RETRIES, target=options.target, seed=seed, move=True,
        batch_size=options.attack_batch,
    )  # fmt: skip


def _gap(options: VerifyOptions, size: int, seed: int) -> Attack:
    from edgeguard.attacks.gap import GAP

    return GAP(size, options.steps, options.attack_batch, target=options.target, seed=seed)


def _lavan(options: VerifyOptions, size: int, seed: int) -> Attack:
    from edgeguard.attacks.lavan import LaVAN

    return LaVAN(size, options.steps, target=options.target, seed=seed)


def _patch_rs(options: VerifyOptions, size: int, seed: int) -> Attack:
    from edgeguard.attacks.patch_rs import PatchRS

    return PatchRS(size, options.universal_queries, scope="universal", mode=_mode(options), target=options.target,
                   batch_size=options.attack_batch, seed=seed)  # fmt: skip


def _patch_rs_per_image(options: VerifyOptions, size: int, seed: int) -> Attack:
    from edgeguard.attacks.patch_rs import PatchRS

    return PatchRS(size, options.queries, scope="per-image", mode=_mode(options), target=options.target,
                   batch_size=options.attack_batch, seed=seed)  # fmt: skip


def _mode(options: VerifyOptions) -> str:
    return "labels" if options.decision_only else "logits"


CATALOG: Mapping[str, Entry] = MappingProxyType({
    "a-qapa": Entry(
        "aqapa", GRADIENT_ACCESSES, False, False, _aqapa,
        lambda options, _: Cost(options.restarts * options.steps * options.attack_batch),
    ),
    "a-qapa-per-image": Entry(
        "aqapa-per-image", GRADIENT_ACCESSES, True, True, _aqapa_per_image,
        lambda options, n: Cost((options.restarts + RETRIES) * _per_image_steps(options) * n // 2),
    ),
    "gap": Entry(
        "gap", GRADIENT_ACCESSES, False, False, _gap, lambda options, _: Cost(options.steps * options.attack_batch)
    ),
    "lavan": Entry("lavan", GRADIENT_ACCESSES, True, False, _lavan, lambda options, n: Cost(options.steps * n)),
    "patch-rs": Entry(
        "patch-rs", ("query",), False, False, _patch_rs, lambda options, _: Cost(queries=options.universal_queries)
    ),
    "patch-rs-per-image": Entry(
        "patch-rs", ("query",), True, True, _patch_rs_per_image, lambda options, n: Cost(queries=options.queries * n)
    ),
})  # fmt: skip


def entry(name: str) -> Entry:
    """Look an attack up.

    Raises:
        InputError: unknown; says which exist.
    """
    if name not in CATALOG:
        raise InputError(f"unknown attack {name!r}; expected one of {', '.join(CATALOG)}")
    return CATALOG[name]
