"""One universal patch without a verdict."""

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
from edgeguard.targets import open_engine
from edgeguard.verify.harness import Subject
from edgeguard.verify.options import Progress, VerifyOptions
from edgeguard.verify.prepare import build_twins, check_data, load_surrogates
from edgeguard.verify.propose import EVERY_WIDTH, Plan, Workshop, plans
from edgeguard.verify.stages import Store


@dataclass(frozen=True, eq=False)
class Made:
    """Settings of the attack, as plain values, and what it found."""

    settings: dict[str, Any]
    found: Found


def craft_universal(
    artifact: Artifact, dataset: Dataset, options: VerifyOptions, transforms: Mapping[str, float],
    optimizer: str | None = None, progress: Progress | None = None,
) -> tuple[Plan, Made]:  # fmt: skip
    """Craft the patch of the options' only attack, size and access; at the access `transfer` on all twins at once.

    dataset: at most `options.craft_limit` of its images, drawn with the seed, are crafted on.
    transforms: fields of `edgeguard.attacks.transforms.Transforms`. optimizer: a name in
    `edgeguard.attacks.optimizers.OPTIMIZERS`, or None for the attack's own. Only attacks with gradients know these two.

    Raises:
        InputError: as `verify`, or transforms or an optimizer for an attack that does not know them.
    """
    surrogates = load_surrogates(artifact, options)
    check_data(artifact, dataset, None, options)
    twins = build_twins(artifact, surrogates, options) if options.differentiates else {}
    chosen = np.random.default_rng(options.seed).permutation(len(dataset))[: options.craft_limit]
    images, labels = dataset.images(chosen), dataset.labels[chosen]
    candidates = [plan for plan in plans(options, list(twins) or [artifact.width]) if plan.attack is not None]
    plan = next((plan for plan in candidates if plan.source == EVERY_WIDTH), candidates[0])
    with open_engine(artifact, options.runtime, options.threads) as engine:
        first = slice(0, options.batch_size)
        subject = Subject.of(engine, images[first], labels[first], options.target, options.batch_size)
        workshop = Workshop(subject, artifact.width, twins, images, labels)
        attack = _changed(workshop.attack(plan, options), {key: value for key, value in transforms.items() if value}, optimizer)
        checkpoint = Store(None, None).checkpoint(plan.stage())
        found = workshop.craft(plan, options, checkpoint, progress, attack)
    settings: Any = attack
    return plan, Made({"name": attack.name, **dataclasses.asdict(settings)}, found)


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
