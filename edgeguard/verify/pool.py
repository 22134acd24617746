"""`verify_pool`: attack a pool of engines of which one, drawn at random, answers each batch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeguard import files
from edgeguard.artifact import MANIFEST
from edgeguard.data.dataset import Dataset
from edgeguard.errors import InputError
from edgeguard.pool_artifact import Pool
from edgeguard.targets import open_pool
from edgeguard.targets.random_precision import RandomPrecisionEngine
from edgeguard.verify import breakdown, document, estimate, pool_trust
from edgeguard.verify.gate import Gate, evaluate
from edgeguard.verify.harness import Images, Subject
from edgeguard.verify.judge import Findings
from edgeguard.verify.options import Progress, VerifyOptions
from edgeguard.verify.pool_judge import PoolCourt, PoolSubject, Side, expected_share, mixed
from edgeguard.verify.pool_workshop import PoolWorkshop
from edgeguard.verify.prepare import Split, build_twins, check_data, classifier, split_images
from edgeguard.verify.propose import plans, replayed
from edgeguard.verify.run import attack_all, clean_block, data_block, headline_survival, measured, trained_widths
from edgeguard.verify.stages import Store

if TYPE_CHECKING:
    from edgeguard.targets.twin import Twin

EVERY = "pool"
"""What the workshop calls the model it attacks; no member has that name."""
MEANINGS = {
    "pool": "for each batch one of the widths is drawn, so decisions are random by design; every member judges every patch, "
    "and a rate is its exact expectation over the draw, one draw answering an image without and with the patch",
    "transfer": "crafted on the twins of members: of one, or at 'all widths' on the mean over all",
    "engine": "values of the live members, gradients of their twins (BPDA), as the mean over the draw",
}
ADDED = {
    "worst": "on a pool for each member by itself, which is no less than any place reaches that is chosen before the draw",
    "query": "on a pool the mean answer of its members, as asking often gives it, counted once for each of them",
    "survival": "of a pool the member that lost most, against its own twin",
}


def verify_pool(
    pool: Pool,
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
) -> dict[str, Any]:
    """Attack a pool. Arguments, the document and what is raised are those of `edgeguard.verify.verify`.

    Attacks know the members and their probabilities, and not what is drawn. Rates are expectations over the draw, so a
    pool whose seed is fresh entropy gives the same rates again; only the check `random_by_design` counts draws. The
    members' own figures are under `members` of `clean` and of each attack.

    Raises:
        InputError: surrogates as well; a pool's members are its surrogates. Or a bundle.
    """
    begin = time.perf_counter()
    artifacts = pool.artifacts
    if options.bundle is not None:
        raise InputError("a bundle is made for one integer graph; replay its patches on a pool one by one, as patch files")
    if options.surrogates:
        raise InputError("patches for a pool are crafted on all of its members; leave the surrogates out")
    check_data(artifacts[0], dataset, craft_data, options)
    given = replayed(options.replay, dataset.image_shape[1:]) if options.replay else []
    split = split_images(dataset, craft_data, options)
    twins = build_twins(artifacts[0], list(artifacts[1:]), options)
    store = Store(stages, [document.options_block(options), pool.sha256, data_block(split, options)])
    with open_pool(pool, options.runtime, options.threads) as engine:
        sides, rates = _sides(pool, engine, twins, split, options)
        subject = PoolSubject.over(sides, _mean_answer(engine))
        todo = [*given, *plans(options, list(pool.widths), pool=True)]
        if announce is not None:
            announce(estimate.sentence(todo, estimate.seconds(todo, options, subject, *rates)))
        court = PoolCourt(subject, None, options, document.seen_sizes(artifacts[0]), store, progress, sides)
        chances = dict(zip(pool.widths, pool.probabilities, strict=True))
        crafted_of = split.crafted_of
        workshop = PoolWorkshop(
            subject, EVERY, twins, crafted_of.images(split.crafted), crafted_of.labels[split.crafted], engine, chances
        )
        findings = Findings()
        attack_all(todo, court, workshop, options, findings)
        live = workshop.live(options) if twins else {}
        checks = measured(findings, "the trust checks", lambda: pool_trust.run_all(
            engine, sides, live, twins, findings, court.verdicts, options, progress))  # fmt: skip
        places = measured(findings, "the heat map", lambda: _heat_map(findings, sides, progress))
        report = {
            **document.header(),
            "status": {"complete": findings.reason is None, "reason": findings.reason},
            "artifact": _pool_block(pool),
            "environment": document.environment(engine.describe(), options, command),
            "data": data_block(split, options),
            "options": document.options_block(options),
            "definitions": _definitions(options),
            "clean": _clean(pool, sides),
            "attacks": findings.rows,
            "aggregated": breakdown.aggregated(findings.rows),
            "seen_unseen": breakdown.seen_unseen(
                findings.rows, document.seen_sizes(artifacts[0]), trained_widths(artifacts[0])
            ),
            "survival": headline_survival(findings),
            "trust": checks if checks is not None else pool_trust.not_run(str(findings.reason)),
            "heat_map": places,
            "divergence": _no_divergence(pool),
            "advice": [],
            "gate": None,
            "patches": findings.patches,
            "examples": _examples(split, sides, court, findings),
        }
    if gate is not None or baseline is not None:
        report["gate"] = evaluate(gate, report, baseline)
    report["advice"] = breakdown.advice(report)
    report["timing"] = {"attacks": findings.seconds, "total": time.perf_counter() - begin}
    return report


def _sides(
    pool: Pool, engine: RandomPrecisionEngine, twins: Mapping[str, Twin], split: Split, options: VerifyOptions
) -> tuple[tuple[Side, ...], tuple[float, float]]:
    """Every member on the judged images, and how many images a second all engines, and all twins, classified."""
    images, labels = split.judged_of.images(split.judged), split.judged_of.labels[split.judged]
    spent = [0.0, 0.0]

    def subject(classify: Callable[[Images], NDArray[np.float32]], who: int) -> Subject:
        begin = time.perf_counter()
        made = Subject.of(classify, images, labels, options.target, options.batch_size)
        spent[who] += time.perf_counter() - begin
        return made

    sides = []
    for width, probability in zip(pool.widths, pool.probabilities, strict=True):
        own = subject(_member(engine, width), 0)
        simulation = subject(classifier(twins[width]), 1) if width in twins else None
        sides.append(Side(width, probability, own, simulation))
    rates = [len(images) / max(seconds, 1e-6) if seconds else 0.0 for seconds in spent]
    return tuple(sides), (rates[0], rates[1])


def _member(engine: RandomPrecisionEngine, width: str) -> Callable[[Images], NDArray[np.float32]]:
    def classify(images: Images) -> NDArray[np.float32]:
        return engine.ask(width, images)

    return classify


def _mean_answer(engine: RandomPrecisionEngine) -> Callable[[Images], NDArray[np.float32]]:
    def classify(images: Images) -> NDArray[np.float32]:
        return mixed([engine.ask(width, images) for width in engine.members], engine.probabilities)

    return classify


def _pool_block(pool: Pool) -> dict[str, Any]:
    """What was attacked: the pool as if it were one artifact, and each member."""
    members = [document.artifact_block(artifact) for artifact in pool.artifacts]
    coverages = [member["integer_mac_coverage"] for member in members]
    return {
        **members[0],
        "name": pool.path.resolve().name,
        "width": ", ".join(pool.widths),
        "weight_bits": max(member["weight_bits"] for member in members),
        "activation_bits": max(member["activation_bits"] for member in members),
        "files": {
            f"{artifact.path.name}/{MANIFEST}": files.sha256(artifact.path / MANIFEST) for artifact in pool.artifacts
        },
        "integer_mac_coverage": None if None in coverages else min(coverages),
        "sha256": pool.sha256,
        "pool": {
            "widths": list(pool.widths), "probabilities": list(pool.probabilities), "seed": pool.seed, "members": members,
        },
    }  # fmt: skip


def _definitions(options: VerifyOptions) -> dict[str, str]:
    own = document.definitions(options)
    return {**own, **MEANINGS, **{key: f"{own[key]}; {more}" for key, more in ADDED.items()}}


def _clean(pool: Pool, sides: Sequence[Side]) -> dict[str, Any]:
    """Accuracies expected over the draw; what engine and twin share, for every member against its own twin."""
    blocks = {
        side.width: clean_block(side.subject, side.simulation, artifact)
        for side, artifact in zip(sides, pool.artifacts, strict=True)
    }

    def mean(values: Sequence[float]) -> float:
        return sum(side.probability * value for side, value in zip(sides, values, strict=True))

    def accuracy(who: str) -> dict[str, Any]:
        n = len(sides[0].subject.images)
        share, _, ci95 = expected_share(mean([block[who]["accuracy"] for block in blocks.values()]), n)
        return {"accuracy": share, "n": n, "ci95": ci95}

    if any(side.simulation is None for side in sides):
        return {"engine": accuracy("engine"), "twin": None, "agreement": None, "bit_identical": None, "steps": None,
                "members": blocks}  # fmt: skip
    steps: Counter[str] = Counter()
    for block in blocks.values():
        steps.update(block["steps"] or {})
    known = all(block["steps"] is not None for block in blocks.values())
    return {
        "engine": accuracy("engine"),
        "twin": accuracy("twin"),
        "agreement": min(1.0, mean([block["agreement"] for block in blocks.values()])),
        "bit_identical": all(block["bit_identical"] for block in blocks.values()),
        "steps": dict(steps) if known else None,
        "members": blocks,
    }


def _heat_map(findings: Findings, sides: Sequence[Side], progress: Progress | None) -> dict[str, Any] | None:
    """ASR by place, expected over the draw."""
    found = [(side.probability, breakdown.heat_map(findings, side.subject, progress)) for side in sides]
    maps = [(chance, one) for chance, one in found if one is not None]
    if not maps:
        return None
    counting = sum(chance * one["n"] for chance, one in maps)
    asr = sum(chance * one["n"] * np.array(one["asr"]) for chance, one in maps) / counting
    return {**maps[0][1], "asr": np.clip(asr, 0, 1).tolist(), "n": max(1, round(counting))}


def _no_divergence(pool: Pool) -> dict[str, Any]:
    reason = (
        "each member of a pool has layers of its own; verify one by itself to compare them, for example "
        f"{pool.path.resolve().name}/{pool.artifacts[0].path.name}"
    )
    return {"n": 0, "reason": reason, "layers": [], "first": {"clean": None, "patched": None}, "skipped": [],
            "undisturbed": None}  # fmt: skip


def _examples(split: Split, sides: Sequence[Side], court: PoolCourt, findings: Findings) -> dict[str, Any]:
    """Pictures of the strongest attack, with the answers of one member, which is named."""
    index = findings.strongest
    side = sides[court.verdicts[index].shown]
    engine, twin = findings.engine[index], findings.twin[index]
    images = document.examples(
        split.judged_of, split.judged, side.subject, findings.proposals[index].found, engine, twin
    )
    return {"attack": index, "images": images, "member": side.width}
