"""Patches without a verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeguard.artifact import Artifact
from edgeguard.attacks.api import Attack, Found
from edgeguard.data.dataset import Dataset
from edgeguard.errors import InputError
from edgeguard.verify.deployed import Target, artifact_of, check_target, open_target, shape_of, width_of
from edgeguard.verify.harness import Subject
from edgeguard.verify.options import Progress, VerifyOptions
from edgeguard.verify.prepare import Split, build_twins, check_images_fit, load_surrogates
from edgeguard.verify.propose import EVERY_WIDTH, Plan, Workshop, plans
from edgeguard.verify.stages import Store


@dataclass(frozen=True, eq=False)
class Made:
    """What came of a plan: settings of the attack, as plain values, and what it found."""

    plan: Plan
    settings: dict[str, Any]
    found: Found


def craft(
    target: Target, split: Split, options: VerifyOptions, transforms: Mapping[str, float], optimizer: str | None = None,
    progress: Progress | None = None,
) -> list[Made]:  # fmt: skip
    """Craft patches for each attack, size and access of the options; universal ones at the access `transfer` on all twins at once.

    split: universal patches are crafted on its images for that, those per image on the first of the judged.
    transforms: fields of `edgeguard.attacks.transforms.Transforms`. optimizer: a name in
    `edgeguard.attacks.optimizers.OPTIMIZERS`, or None for the attack's own. Only attacks with gradients know these two.

    Raises:
        InputError: as `verify`, or transforms or an optimizer for an attack that does not know them.
        EngineError: the engine fails.
    """
    check_target(target, options)
    artifact, shape = artifact_of(target), shape_of(target, split.judged_of.image_shape)
    surrogates = [] if artifact is None else load_surrogates(artifact, options)
    twins = build_twins(artifact, surrogates, options) if options.differentiates else {}
    own = width_of(target)
    changes = {key: value for key, value in transforms.items() if value}
    chosen = _chosen(plans(options, list(twins) or [own]))
    with open_target(target, shape, options.runtime, options.threads) as engine:
        check_images_fit(shape, engine.num_classes, split.judged_of, split.crafted_of, options)
        shown = split.judged if any(plan.per_image for plan in chosen) else split.judged[: options.batch_size]
        images, labels = split.judged_of.images(shown), split.judged_of.labels[shown]
        subject = Subject.of(engine, images, labels, options.target, options.batch_size)
        crafted, classes = split.crafted_of.images(split.crafted), split.crafted_of.labels[split.crafted]
        workshop = Workshop(subject, own, twins, crafted, classes)
        attacks = [_changed(workshop.attack(plan, options), changes, optimizer) for plan in chosen]
        made = []
        for plan, attack in zip(chosen, attacks, strict=True):
            found = workshop.craft(plan, options, Store(None, None).checkpoint(plan.stage()), progress, attack)
            settings: Any = attack
            made.append(Made(plan, {"name": attack.name, **dataclasses.asdict(settings)}, found))
    return made


def craft_universal(
    artifact: Artifact, dataset: Dataset, options: VerifyOptions, transforms: Mapping[str, float],
    optimizer: str | None = None, progress: Progress | None = None,
) -> tuple[Plan, Made]:  # fmt: skip
    """Craft the patch of the options' only attack, size and access on images that nothing is judged on.

    dataset: at most `options.craft_limit` of its images, drawn with the seed, are crafted on. The rest is as `craft`.
    """
    chosen = np.random.default_rng(options.seed).permutation(len(dataset))[: options.craft_limit].astype(np.int64)
    made = craft(artifact, Split(dataset, chosen, dataset, chosen), options, transforms, optimizer, progress)[0]
    return made.plan, made


def _chosen(found: list[Plan]) -> list[Plan]:
    """Of universal patches that differ in what they are crafted on alone, the one that is crafted on everything."""
    kept: dict[Any, Plan] = {}
    for plan in found:
        if plan.attack is None:
            continue
        key = (plan.attack, plan.size, plan.access, plan.source if plan.per_image else None)
        if key not in kept or plan.source == EVERY_WIDTH:
            kept[key] = plan
    return list(kept.values())


def _changed(attack: Attack, transforms: dict[str, float], optimizer: str | None) -> Attack:
    """The attack with other transforms or another optimizer, where they are given."""
    wanted = {"transforms": ", ".join(transforms), "optimizer": optimizer or ""}
    changes: dict[str, Any] = {key: value for key, value in wanted.items() if value}
    known: set[str] = {field.name for field in dataclasses.fields(attack)} if dataclasses.is_dataclass(attack) else set()
    missing = [value for key, value in changes.items() if key not in known]
    if missing:
        raise InputError(f"the attack {attack.name} cannot craft for {missing[0]}; a-qapa and gap can")
    if transforms:
        from edgeguard.attacks.transforms import Transforms

        changes["transforms"] = Transforms(**transforms)
    settings: Any = attack
    changed: Attack = dataclasses.replace(settings, **changes) if changes else attack
    return changed
