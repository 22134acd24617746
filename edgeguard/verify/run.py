"""`verify`: attack a deployed artifact and write down what happened."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeguard import files
from edgeguard.artifact import MANIFEST, Artifact
from edgeguard.data.dataset import Dataset
from edgeguard.errors import EngineError
from edgeguard.graph import Dequantize
from edgeguard.patch import apply_patch
from edgeguard.targets import Engine
from edgeguard.targets.differences import logit_steps
from edgeguard.verify import breakdown, document, estimate, trust
from edgeguard.verify.bundle import Bundle, check_bundle
from edgeguard.verify.deployed import (
    Target,
    artifact_of,
    check_target,
    fingerprint,
    open_target,
    shape_of,
    target_block,
    width_of,
)
from edgeguard.verify.divergence import divergence
from edgeguard.verify.gate import Gate, evaluate
from edgeguard.verify.harness import Subject, random_places
from edgeguard.verify.judge import Court, Findings
from edgeguard.verify.options import Progress, VerifyOptions
from edgeguard.verify.prepare import (
    Split,
    build_twins,
    check_data,
    check_images_fit,
    classifier,
    load_surrogates,
    split_images,
)
from edgeguard.verify.propose import Plan, Proposal, Workshop, plans, replayed
from edgeguard.verify.stages import Store

if TYPE_CHECKING:
    from edgeguard.targets.twin import Twin

DIVERGENCE_IMAGES = 32


def verify(
    target: Target,
    dataset: Dataset,
    options: VerifyOptions,
    *,
    craft_data: Dataset | None = None,
    gate: Gate | None = None,
    baseline: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
    command: Sequence[str] = (),
    stages: Path | None = None,
    skipped: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    """Attack the engine of an artifact, or a remote one.

    Args:
        target: the artifact, or a model on a server; of that one, without a twin, only what needs no gradients.
        dataset: images to judge on, at most `options.limit` of them, drawn with the seed.
        craft_data: images to craft universal patches on, such as the training split. Without it `dataset` is split: at
            most half of it is judged, and patches are crafted on images that are not judged.
        gate: rules to hold the report against. baseline: an earlier report that this one must not fall behind.
        announce: told the estimated time before the first attack.
        command: what the user typed, for the record.
        stages: folder for what is finished; a second call with the same arguments goes on from there.
        skipped: what is not tried although it was to be expected, with `attack` and `reason`; the report says it.

    Returns: the document of schema `edgeguard.report/1`; apart from `timing`, equal arguments on one machine give equal
    documents. When the engine fails after the first attack, `status` says so and the rest is left out.

    Raises:
        InputError: data, patches or options that do not fit the artifact, or no image that counts.
        EngineError: the engine fails before there is any result.
        MissingDependency: crafting without torch, or the artifact's runtime is missing.
    """
    begin = time.perf_counter()
    check_target(target, options)
    artifact, shape = artifact_of(target), shape_of(target, dataset.image_shape)
    surrogates: list[Artifact] = []
    if artifact is not None:
        surrogates = load_surrogates(artifact, options)
        check_data(artifact, dataset, craft_data, options)
    given = replayed(options.replay, dataset.image_shape[1:]) if options.replay else []
    bundle = None if options.bundle is None else Bundle.load(options.bundle)
    if bundle is not None:
        check_bundle(bundle, target, dataset, options)
        given += bundle.plans()
    split = split_images(dataset, craft_data, options, None if bundle is None else bundle.indices)
    twins = build_twins(artifact, surrogates, options)
    own, seen = width_of(target), None if artifact is None else document.seen_sizes(artifact)
    store = Store(stages, [document.options_block(options), [*fingerprint(target), *map(_sha256, surrogates)],
                           data_block(split, options), None if bundle is None else bundle.sha256])  # fmt: skip
    with open_target(target, shape, options.runtime, options.threads) as engine:
        check_images_fit(shape, engine.num_classes, dataset, craft_data, options)
        twin = twins.get(own)
        subject, simulation, rates = _subjects(engine, twin, split, options)
        todo = [*given, *plans(options, list(twins) or [own])]
        if announce is not None:
            announce(estimate.sentence(todo, estimate.seconds(todo, options, subject, *rates)))
        court = Court(subject, simulation, options, seen, store, progress)
        findings = Findings()
        attack_all(todo, court, _workshop(own, split, twins, subject), options, findings)
        checks = measured(findings, "the trust checks", lambda: trust.run_all(subject, twin, findings, options, progress))
        places = measured(findings, "the heat map", lambda: breakdown.heat_map(findings, subject, progress))
        apart = measured(findings, "the comparison of layers", lambda: _divergence(artifact, engine, twin, subject, findings))
        report = {
            **document.header(),
            "status": {"complete": findings.reason is None, "reason": findings.reason},
            "artifact": target_block(target),
            "environment": document.environment(engine.describe(), options, command),
            "data": data_block(split, options),
            "bundle": None if bundle is None else bundle.block(),
            "options": document.options_block(options),
            "definitions": document.definitions(options),
            "clean": clean_block(subject, simulation, artifact),
            "attacks": findings.rows,
            "aggregated": breakdown.aggregated(findings.rows),
            "skipped": [dict(one) for one in skipped],
            "seen_unseen": breakdown.seen_unseen(findings.rows, seen, trained_widths(artifact)),
            "survival": headline_survival(findings),
            "trust": checks if checks is not None else trust.not_run(str(findings.reason)),
            "heat_map": places,
            "divergence": apart,
            "advice": [],
            "gate": None,
            "patches": findings.patches,
            "examples": _examples(split, subject, findings),
        }
    if gate is not None or baseline is not None:
        report["gate"] = evaluate(gate, report, baseline)
    report["advice"] = breakdown.advice(report)
    report["timing"] = {"attacks": findings.seconds, "total": time.perf_counter() - begin}
    return report


def _subjects(
    engine: Engine, twin: Twin | None, split: Split, options: VerifyOptions
) -> tuple[Subject, Subject | None, tuple[float, float]]:
    """Engine and twin on the judged images, and how many images a second each classified."""
    images, labels = split.judged_of.images(split.judged), split.judged_of.labels[split.judged]
    found: list[Subject] = []
    rates: list[float] = []
    for classify in (engine, *([] if twin is None else [classifier(twin)])):
        begin = time.perf_counter()
        found.append(Subject.of(classify, images, labels, options.target, options.batch_size))
        rates.append(len(images) / max(time.perf_counter() - begin, 1e-6))
    return found[0], found[1] if len(found) > 1 else None, (rates[0], rates[1] if len(rates) > 1 else 0.0)


def _sha256(artifact: Artifact) -> str:
    return files.sha256(artifact.path / MANIFEST)


def _workshop(own: str, split: Split, twins: Mapping[str, Twin], subject: Subject) -> Workshop:
    labels = split.crafted_of.labels[split.crafted]
    return Workshop(subject, own, twins, split.crafted_of.images(split.crafted), labels)


def attack_all(
    todo: Sequence[Plan], court: Court, workshop: Workshop, options: VerifyOptions, findings: Findings
) -> None:
    """Craft and judge one patch after the other; what an engine that fails has answered until then is kept."""
    for plan in todo:
        try:
            court.judge(propose(plan, court, workshop, options), findings)
        except EngineError as exc:
            if not findings.rows:
                raise
            findings.reason = f"the engine failed at {plan}: {exc}"
            break


def measured(findings: Findings, what: str, compute: Callable[[], Any]) -> Any:
    """A value, or None where the engine has failed or fails now."""
    if findings.reason is not None:
        return None
    try:
        return compute()
    except EngineError as exc:
        findings.reason = f"the engine failed at {what}: {exc}"
        return None


def propose(plan: Plan, court: Court, workshop: Workshop, options: VerifyOptions) -> Proposal:
    """The plan's patch: given, kept from before, or crafted now."""
    if plan.given is not None:
        return Proposal(plan, plan.given, subset=len(plan.given.pixels) if plan.given.per_image else None)
    found, seconds = court.store.found(
        plan.stage(), lambda checkpoint: workshop.craft(plan, options, checkpoint, court.progress)
    )
    steps = getattr(workshop.attack(plan, options), "steps", None)
    return Proposal(plan, found, seconds, workshop.subset(plan, options), steps)


def clean_block(subject: Subject, simulation: Subject | None, artifact: Artifact | None) -> dict[str, Any]:
    """Accuracy of an engine and its twin without a patch, and how they agree. artifact: the twin's."""
    if simulation is None or artifact is None:
        twin = agreement = identical = steps = None
    else:
        twin = document.accuracy_block(simulation)
        agreement = float((subject.clean.argmax(1) == simulation.clean.argmax(1)).mean())
        identical = bool(np.array_equal(subject.clean, simulation.clean))
        last = artifact.graph().nodes[-1]
        steps = logit_steps(subject.clean, simulation.clean, last.scale) if isinstance(last, Dequantize) else None
    return {
        "engine": document.accuracy_block(subject),
        "twin": twin,
        "agreement": agreement,
        "bit_identical": identical,
        "steps": steps,
    }


def trained_widths(artifact: Artifact | None) -> list[str] | None:
    """Widths that the model was trained at, or None when its artifact does not say or is not there."""
    if artifact is None:
        return None
    widths = artifact.manifest["source"].get("widths")
    return [str(width) for width in widths] if isinstance(widths, list) else None


def headline_survival(findings: Findings) -> dict[str, Any] | None:
    """Survival under the attack that is strongest on the engine."""
    found: dict[str, Any] | None = findings.rows[findings.strongest]["survival"]
    return None if found is None else {**found, "attack": findings.strongest}


def _divergence(
    artifact: Artifact | None, engine: Engine, twin: Twin | None, subject: Subject, findings: Findings
) -> dict[str, Any] | None:
    """Where engine and twin part, on clean images and under the strongest universal patch."""
    proposal = findings.strongest_universal()
    if artifact is None or twin is None or proposal is None:
        return None
    patch, images = proposal.found.patch, subject.images[:DIVERGENCE_IMAGES]
    places = random_places(subject, patch, 0)[: len(images)]
    patched = apply_patch(images, patch.pixels, patch.mask, places)
    return divergence(artifact, engine.name, twin, images, patched)


def _examples(split: Split, subject: Subject, findings: Findings) -> dict[str, Any]:
    index = findings.strongest
    found, engine, twin = findings.proposals[index].found, findings.engine[index], findings.twin[index]
    images = document.examples(split.judged_of, split.judged, subject, found, engine, twin)
    return {"attack": index, "images": images}


def data_block(split: Split, options: VerifyOptions) -> dict[str, Any]:
    """Which images were judged and crafted on."""
    def described(data: Dataset, n: int) -> dict[str, Any]:
        return {"name": data.name, "sha256": data.sha256, "n": n, "of": len(data)}

    crafting = None
    if options.universal:
        crafting = {**described(split.crafted_of, len(split.crafted)), "disjoint": True}
    judged = document.digest_of_indices(split.judged)
    return {**described(split.judged_of, len(split.judged)), "judged_sha256": judged, "crafting": crafting}
