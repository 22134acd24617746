"""`verify`: attack a deployed artifact and write down what happened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeguard.artifact import Artifact
from edgeguard.data.dataset import Dataset
from edgeguard.graph import Dequantize
from edgeguard.targets import open_engine
from edgeguard.targets.differences import logit_steps
from edgeguard.verify import document, trust
from edgeguard.verify.gate import Gate, evaluate
from edgeguard.verify.harness import Judged, Subject, judge_at, judge_worst, random_places
from edgeguard.verify.options import Progress, VerifyOptions
from edgeguard.verify.prepare import Split, build_twins, check_data, classifier, load_surrogates, split_images
from edgeguard.verify.propose import Proposal, Workshop, crafted, noise, replayed
from edgeguard.verify.survival import survival

if TYPE_CHECKING:
    from edgeguard.attacks.api import Differentiable


@dataclass(eq=False)
class _Findings:
    """What accumulates while patches are judged; the lists run in parallel with `rows`."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    proposals: list[Proposal] = field(default_factory=list)
    engine: list[Judged] = field(default_factory=list)
    twin: list[Judged | None] = field(default_factory=list)
    patches: list[dict[str, Any]] = field(default_factory=list)


def verify(
    artifact: Artifact,
    dataset: Dataset,
    options: VerifyOptions,
    *,
    craft_data: Dataset | None = None,
    gate: Gate | None = None,
    progress: Progress | None = None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Attack the engine of an artifact.

    Args:
        dataset: images to judge on, at most `options.limit` of them, drawn with the seed.
        craft_data: images to craft on, such as the training split. Without it `dataset` is split: at most half of it is
            judged, and patches are crafted on images that are not judged.
        gate: rules to hold the report against.
        command: what the user typed, for the record.

    Returns: the document of schema `edgeguard.report/1`; equal arguments on one machine give equal documents.

    Raises:
        InputError: data, patches or options that do not fit the artifact, or no image that counts.
        EngineError: the engine fails or answers with something other than finite logits.
        MissingDependency: crafting without torch, or the artifact's runtime is missing.
    """
    surrogates = load_surrogates(artifact, options)
    check_data(artifact, dataset, craft_data, options)
    replays = replayed(options.replay, dataset.image_shape[1:]) if options.replay else []
    split = split_images(dataset, craft_data, options)
    twins = build_twins(artifact, surrogates, options)
    images, labels = dataset.images(split.judged), dataset.labels[split.judged]
    with open_engine(artifact, options.runtime, options.threads) as engine:
        subject = Subject.of(engine, images, labels, options.target, options.batch_size)
        simulation = None
        if twins:
            simulation = Subject.of(
                classifier(twins[artifact.width]), images, labels, options.target, options.batch_size
            )
        proposals = _proposals(artifact, split, options, replays, twins, subject, progress)
        findings = _judge(proposals, subject, simulation, options, document.seen_sizes(artifact), progress)
        checks = _trust(subject, twins.get(artifact.width), findings, options, progress)
        report = {
            **document.header(),
            "artifact": document.artifact_block(artifact),
            "environment": document.environment(engine.describe(), options, command),
            "data": _data_block(split, options),
            "options": document.options_block(options),
            "definitions": document.definitions(options),
            "clean": _clean(subject, simulation, artifact),
            "attacks": findings.rows,
            "aggregated": _aggregated(findings),
            "survival": _headline_survival(findings),
            "trust": checks,
            "gate": None,
            "patches": findings.patches,
            "examples": _examples(split, subject, findings),
        }
    if gate is not None:
        report["gate"] = evaluate(gate, report)
    return report


def _proposals(
    artifact: Artifact, split: Split, options: VerifyOptions, replays: list[Proposal],
    twins: Mapping[str, Differentiable], subject: Subject, progress: Progress | None,
) -> list[Proposal]:  # fmt: skip
    if not options.crafts:
        return replays
    labels = split.crafted_of.labels[split.crafted]
    images = split.crafted_of.images(split.crafted)
    workshop = Workshop(subject.classify, artifact.width, twins, images, labels)
    baseline = [noise(size, options.seed) for size in options.patch_sizes]
    return [*replays, *baseline, *crafted(workshop, options, progress)]


def _judge(
    proposals: list[Proposal], subject: Subject, simulation: Subject | None, options: VerifyOptions,
    seen: list[int] | None, progress: Progress | None,
) -> _Findings:  # fmt: skip
    """Judge every patch at every placement, on the engine and, where there is one, on its twin."""
    findings = _Findings()
    same_clean = simulation is not None and np.array_equal(subject.clean, simulation.clean)
    for number, proposal in enumerate(proposals):
        findings.patches.append(document.patch_block(proposal))
        for placement in options.placements:
            judged = _place(subject, proposal, placement, options, "engine", progress)
            row = document.attack_row(proposal, number, placement, judged, options, seen)
            twin = None
            if simulation is not None:
                twin = _place(simulation, proposal, placement, options, "twin", progress)
                same = np.array_equal(judged.logits, twin.logits) and np.array_equal(judged.positions, twin.positions)
                row["twin_asr"] = twin.asr
                row["survival"] = survival(judged, twin, same_clean and same)
            findings.rows.append(row)
            findings.proposals.append(proposal)
            findings.engine.append(judged)
            findings.twin.append(twin)
    return findings


def _place(
    subject: Subject, proposal: Proposal, placement: str, options: VerifyOptions, who: str, progress: Progress | None
) -> Judged:
    size = max(proposal.patch.size)
    stage = f"judging {proposal.name} {size}x{size}, {placement} placement, {who}"

    def tick(done: int, total: int) -> None:
        if progress is not None:
            progress(stage, done, total)

    if placement == "worst":
        return judge_worst(subject, proposal.patch, options.stride, tick)
    judged = judge_at(subject, proposal.patch, random_places(subject, proposal.patch, options.seed))
    tick(1, 1)
    return judged


def _trust(
    subject: Subject,
    twin: Differentiable | None,
    findings: _Findings,
    options: VerifyOptions,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Every trust check, in the order of the report."""
    model: Differentiable | None = None
    if twin is not None:
        from edgeguard.attacks.bpda import BPDA

        model = BPDA(subject.classify, twin)
    checks: list[Callable[[], dict[str, Any]]] = [
        lambda: _white_box_strongest(findings, options),
        lambda: trust.gradients_alive(twin, subject, options.loss),
        lambda: trust.large_patch_wins(model, subject, options.seed),
        lambda: trust.deterministic(subject),
        lambda: trust.batch_one_agrees(subject),
    ]
    outcomes = []
    for number, check in enumerate(checks):
        outcomes.append(check())
        if progress is not None:
            progress("trust checks", number + 1, len(checks))
    return outcomes


def _white_box_strongest(findings: _Findings, options: VerifyOptions) -> dict[str, Any]:
    """The check for every crafted size, at the first placement; the first failure, else the last outcome."""
    placement = options.placements[0]
    outcome = trust.white_box_strongest([], [])
    for size in options.patch_sizes if options.crafts else ():
        sides: dict[bool, list[tuple[str, Judged]]] = {True: [], False: []}
        for row, proposal, judged in zip(findings.rows, findings.proposals, findings.engine, strict=True):
            if proposal.patch.size == (size, size) and row["placement"] == placement:
                sides[proposal.white_box].append((f"{proposal.name} ({proposal.access})", judged))
        outcome = trust.white_box_strongest(sides[True], sides[False])
        if outcome["passed"] is False:
            break
    return outcome


def _clean(subject: Subject, simulation: Subject | None, artifact: Artifact) -> dict[str, Any]:
    if simulation is None:
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


def _aggregated(findings: _Findings) -> list[dict[str, Any]]:
    """The strongest transferred patch of each size and placement: the maximum of the ASR over surrogates."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in findings.rows:
        if row["access"] == "transfer":
            groups.setdefault((row["patch_size"], row["placement"]), []).append(row)
    found = []
    for (size, placement), rows in groups.items():
        best = max(rows, key=lambda row: float(row["asr"]))
        entry = {key: best[key] for key in ("asr", "ci95", "n", "source")}
        found.append(
            {"patch_size": size, "placement": placement, **entry, "surrogates": [row["source"] for row in rows]}
        )
    return found


def _strongest(findings: _Findings) -> int:
    """Index of the attack with the highest ASR on the engine; the first of equals."""
    return max(range(len(findings.rows)), key=lambda index: float(findings.rows[index]["asr"]))


def _headline_survival(findings: _Findings) -> dict[str, Any] | None:
    """Survival under the attack that is strongest on the engine."""
    index = _strongest(findings)
    found: dict[str, Any] | None = findings.rows[index]["survival"]
    return None if found is None else {**found, "attack": index}


def _examples(split: Split, subject: Subject, findings: _Findings) -> dict[str, Any]:
    index = _strongest(findings)
    patch, engine, twin = findings.proposals[index].patch, findings.engine[index], findings.twin[index]
    images = document.examples(split.judged_of, split.judged, subject, patch, engine, twin)
    return {"attack": index, "images": images}


def _data_block(split: Split, options: VerifyOptions) -> dict[str, Any]:
    def described(data: Dataset, n: int) -> dict[str, Any]:
        return {"name": data.name, "sha256": data.sha256, "n": n, "of": len(data)}

    crafting = None
    if options.crafts:
        crafting = {**described(split.crafted_of, len(split.crafted)), "disjoint": True}
    return {**described(split.judged_of, len(split.judged)), "crafting": crafting}
