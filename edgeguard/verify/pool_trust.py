"""The trust checks of a pool: those of an engine, member by member or on the expectation, and one of the draw itself.

A pool is random by design, so that it is not deterministic is no finding, and that it is random no excuse. What must
hold instead: every answer is bit for bit that of the member that was drawn, members are deterministic, and they are
drawn as often as their probabilities say. Then the rates of a report, which are expectations, are those of the engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeguard.patch import random_positions
from edgeguard.statistics import Z95
from edgeguard.targets.random_precision import RandomPrecisionEngine
from edgeguard.verify import trust
from edgeguard.verify.harness import Subject, judge_pixels
from edgeguard.verify.judge import Findings
from edgeguard.verify.options import Progress, VerifyOptions
from edgeguard.verify.pool_judge import PoolVerdict, Side

if TYPE_CHECKING:
    from edgeguard.attacks.api import Differentiable

RANDOM = "random_by_design"
NAMES = tuple(RANDOM if name == "deterministic" else name for name in trust.NAMES)
CALLS, BATCH = 200, 4
"""Draws that are watched, and images of each."""
SIGMAS, SLACK = 5.0, 3.0
"""By how many standard deviations, and draws besides, a member's count may miss what its probability says."""
Check = dict[str, Any]


def run_all(
    engine: RandomPrecisionEngine, sides: Sequence[Side], live: Mapping[str, Differentiable], twins: Mapping[str, Differentiable],
    findings: Findings, verdicts: Sequence[PoolVerdict], options: VerifyOptions, progress: Progress | None,
) -> list[Check]:  # fmt: skip
    """Every check, in the order of the report. live, twins: by width, of all members; empty without torch."""
    checks: list[Callable[[], Check]] = [
        lambda: strongest_of_findings(findings, verdicts),
        lambda: of_members(
            sides, lambda side: trust.gradients_alive(twins.get(side.width), side.subject, options.loss)
        ),
        lambda: of_members(sides, lambda side: trust.softmax_unsaturated(twins.get(side.width), side.subject)),
        lambda: large_patch_wins(sides, live, options.seed),
        lambda: random_by_design(engine, sides),
        lambda: of_members(sides, lambda side: trust.batch_one_agrees(side.subject)),
    ]
    outcomes = []
    for number, check in enumerate(checks):
        outcomes.append(check())
        if progress is not None:
            progress("trust checks", number + 1, len(checks))
    return outcomes


def not_run(reason: str) -> list[Check]:
    """The outcomes where the pool has failed."""
    return [_check(name, None, f"not run: {reason}") for name in NAMES]


def of_members(sides: Sequence[Side], check: Callable[[Side], Check]) -> Check:
    """A check of every member: the first that fails, else the first that could not run, else all of them."""
    outcomes = [(side.width, check(side)) for side in sides]
    for state in (False, None):
        for width, outcome in outcomes:
            if outcome["passed"] is state:
                return {**outcome, "detail": f"member {width}: {outcome['detail']}"}
    detail = "; ".join(f"member {width}: {outcome['detail']}" for width, outcome in outcomes)
    return {**outcomes[0][1], "detail": detail}


def random_by_design(engine: RandomPrecisionEngine, sides: Sequence[Side]) -> Check:
    """The pool is its members, drawn as it says, and nothing else."""
    for side in sides:
        steady = trust.deterministic(side.subject)
        if not steady["passed"]:
            return _check(RANDOM, False, f"member {side.width} itself is not deterministic: {steady['detail']}")
    images = sides[0].subject.images[:BATCH]
    expected = {side.width: engine.ask(side.width, images) for side in sides}
    counts = dict.fromkeys(expected, 0)
    strange = 0
    for _ in range(CALLS):
        logits = engine(images)
        width = str(engine.last)
        counts[width] += 1
        strange += not np.array_equal(logits, expected[width])
    off = [
        side.width for side in sides if abs(counts[side.width] - CALLS * side.probability) > _slack(side.probability)
    ]
    drawn = ", ".join(
        f"{side.width} {counts[side.width]} times (expected {CALLS * side.probability:.1f})" for side in sides
    )
    detail = (
        f"random by design: a width is drawn for each batch, so equal batches get different logits; in {CALLS} calls "
        f"{CALLS - strange} answers were bit for bit the drawn member's, drawn were {drawn}; rates are exact expectations "
        "over the draw"
    )
    if off:
        detail += f"; the draw of {', '.join(off)} does not follow its probability"
    return _check(RANDOM, not strange and not off, detail)


def _slack(probability: float) -> float:
    return SIGMAS * math.sqrt(CALLS * probability * (1 - probability)) + SLACK


def large_patch_wins(sides: Sequence[Side], live: Mapping[str, Differentiable], seed: int) -> Check:
    """Patches of half the image's side, one per image and for all members together, fool the drawn member nearly always."""
    name = "large_patch_wins"
    if not live:
        return _check(name, None, "not run: crafting needs the twins, and the twins need torch")
    from edgeguard.attacks.per_image import PerImage, craft_per_image
    from edgeguard.verify.pool_models import Mixture

    one = sides[0].subject
    chosen = np.flatnonzero(np.any([side.subject.eligible for side in sides], axis=0))[: trust.SAMPLE]
    images, labels = one.images[chosen], one.labels[chosen]
    size = max(1, min(one.shape) // 2)
    positions = random_positions(len(images), one.shape, (size, size), np.random.default_rng(seed))
    mixture = Mixture(live, {side.width: side.probability for side in sides})
    pixels = craft_per_image(PerImage(size, target=one.target, seed=seed), mixture, images, labels, positions)
    judged = []
    for side in sides:
        own = side.subject
        part = Subject(own.classify, images, labels, own.clean[chosen], own.target, own.batch_size)
        judged.append(judge_pixels(part, pixels, np.ones((size, size), bool), positions))
    verdict = PoolVerdict(tuple(judged), tuple(side.probability for side in sides))
    detail = (
        f"one {size}x{size} patch per image, for all members together, fools {verdict.asr:.1%} of {len(chosen)} images, "
        f"expected over the draw; at least {trust.LARGE_PATCH_ASR:.0%} are expected of any honest gradient"
    )
    return _check(name, verdict.asr >= trust.LARGE_PATCH_ASR, detail)


def strongest_of_findings(findings: Findings, verdicts: Sequence[PoolVerdict]) -> Check:
    """`white_box_strongest` for every size, scope and placement; the first failure, else the first that could run."""
    groups: dict[tuple[Any, ...], dict[bool, list[tuple[str, PoolVerdict]]]] = {}
    for row, proposal, verdict in zip(findings.rows, findings.proposals, verdicts, strict=True):
        key = (row["patch_size"], row["scope"], row["placement"], len(verdict.fooled))
        sides = groups.setdefault(key, {True: [], False: []})
        sides[proposal.plan.white_box].append((f"{row['name']} ({row['access']})", verdict))
    outcomes = [white_box_strongest(sides[True], sides[False]) for sides in groups.values()]
    failed = [outcome for outcome in outcomes if outcome["passed"] is False]
    ran = [outcome for outcome in outcomes if outcome["passed"]]
    return (failed or ran or outcomes or [white_box_strongest([], [])])[0]


def white_box_strongest(white: Sequence[tuple[str, PoolVerdict]], black: Sequence[tuple[str, PoolVerdict]]) -> Check:
    """No attack that knows less of the pool is stronger than the best that knows its members.

    Fails when the 95 % interval of a paired difference of expected ASR, black minus white, lies above zero; it is that
    of a mean over images (normal approximation), since an image is fooled for a part of the draws.
    """
    name = "white_box_strongest"
    if not white or not black:
        missing = "white-box" if not white else "black-box"
        return _check(name, None, f"not run: there is no {missing} attack to compare")
    best_white = max(white, key=lambda item: item[1].asr)
    best_black = max(black, key=lambda item: item[1].asr)
    apart = best_black[1].fooled - best_white[1].fooled
    counting = best_white[1].expected_n
    delta = float(apart.sum()) / counting
    half = Z95 * float(apart.std()) * math.sqrt(len(apart)) / counting
    detail = (
        f"white-box {best_white[0]} {best_white[1].asr:.1%}, black-box {best_black[0]} {best_black[1].asr:.1%}; "
        f"interval of black minus white {delta - half:+.1%} to {delta + half:+.1%}"
    )
    return _check(name, delta - half <= 0, detail)


def _check(name: str, passed: bool | None, detail: str) -> Check:
    return {"check": name, "passed": passed, "detail": detail}
