"""Can the other numbers be believed? Checks that a sound evaluation passes, each able to fail.

Attacks that fail for the wrong reason look like robustness. The checks follow Athalye et al. 2018 (arXiv:1802.00420,
section 3.1) and Carlini et al. 2019 (arXiv:1902.06705): gradients that vanish, black-box attacks that beat white-box
ones, and unbounded attacks that do not reach 100 % all show masked gradients; an engine that is not deterministic, or
that answers differently at another batch size, makes every figure a matter of chance.

`passed` is True, False, or None where the check could not run; `detail` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeguard.patch import random_positions
from edgeguard.statistics import paired_difference
from edgeguard.verify.harness import Judged, Subject, judge_pixels, logits_of
from edgeguard.verify.judge import Findings
from edgeguard.verify.options import Progress, VerifyOptions

if TYPE_CHECKING:
    from edgeguard.attacks.api import Differentiable

SAMPLE = 64
"""Images that the checks of gradients, determinism and batch size use at most."""
LARGE_PATCH_ASR = 0.95
VANISHED_SHARE = 0.05
NAMES = (
    "white_box_strongest", "gradients_alive", "softmax_unsaturated", "large_patch_wins", "deterministic", "batch_one_agrees",
)  # fmt: skip


def run_all(
    subject: Subject, twin: Differentiable | None, findings: Findings, options: VerifyOptions, progress: Progress | None
) -> list[dict[str, Any]]:
    """Every check, in the order of the report."""
    model: Differentiable | None = None
    if twin is not None:
        from edgeguard.attacks.bpda import BPDA

        model = BPDA(subject.classify, twin)
    checks: list[Callable[[], dict[str, Any]]] = [
        lambda: strongest_of_findings(findings),
        lambda: gradients_alive(twin, subject, options.loss),
        lambda: softmax_unsaturated(twin, subject),
        lambda: large_patch_wins(model, subject, options.seed),
        lambda: deterministic(subject),
        lambda: batch_one_agrees(subject),
    ]
    outcomes = []
    for number, check in enumerate(checks):
        outcomes.append(check())
        if progress is not None:
            progress("trust checks", number + 1, len(checks))
    return outcomes


def not_run(reason: str) -> list[dict[str, Any]]:
    """The outcomes where the engine has failed."""
    return [_check(name, None, f"not run: {reason}") for name in NAMES]


def strongest_of_findings(findings: Findings) -> dict[str, Any]:
    """`white_box_strongest` for every size, scope and placement; the first failure, else the first that could run."""
    groups: dict[tuple[Any, ...], dict[bool, list[tuple[str, Judged]]]] = {}
    for row, proposal, judged in zip(findings.rows, findings.proposals, findings.engine, strict=True):
        key = (row["patch_size"], row["scope"], row["placement"], len(judged.eligible))
        sides = groups.setdefault(key, {True: [], False: []})
        sides[proposal.plan.white_box].append((f"{row['name']} ({row['access']})", judged))
    outcomes = [white_box_strongest(sides[True], sides[False]) for sides in groups.values()]
    failed = [outcome for outcome in outcomes if outcome["passed"] is False]
    ran = [outcome for outcome in outcomes if outcome["passed"]]
    return (failed or ran or outcomes or [white_box_strongest([], [])])[0]


def _check(name: str, passed: bool | None, detail: str) -> dict[str, Any]:
    return {"check": name, "passed": passed, "detail": detail}


def deterministic(subject: Subject) -> dict[str, Any]:
    """The same batch gives the same logits, bit for bit."""
    images, clean = subject.images[:SAMPLE], subject.clean[:SAMPLE]
    again = logits_of(subject.classify, images, subject.batch_size)
    different = int((again != clean).any(1).sum())
    detail = f"{len(images)} images twice: {different} with different logits"
    return _check("deterministic", different == 0, detail)


def batch_one_agrees(subject: Subject) -> dict[str, Any]:
    """Images one by one are classified as in the deployed batch; differences in logits alone are only reported."""
    images, clean = subject.images[:SAMPLE], subject.clean[:SAMPLE]
    alone = logits_of(subject.classify, images, 1)
    flips = int((alone.argmax(1) != clean.argmax(1)).sum())
    largest = float(np.abs(alone - clean).max())
    detail = (
        f"{len(images)} images alone and in batches of {subject.batch_size}: {flips} classified differently, "
        f"largest difference of a logit {largest:.3g}"
    )
    return _check("batch_one_agrees", flips == 0, detail)


def gradients_alive(model: Differentiable | None, subject: Subject, loss: str) -> dict[str, Any]:
    """Nearly every image has an input gradient of the attack's loss."""
    name = "gradients_alive"
    if model is None:
        return _check(name, None, "not run: gradients need the twin, and the twin needs torch")
    from edgeguard.attacks.per_image import vanished_gradients

    images, labels = subject.images[:SAMPLE], subject.labels[:SAMPLE]
    share = float(vanished_gradients(model, images, labels, loss).mean())
    detail = (
        f"{share:.1%} of {len(images)} images have a zero or infinite gradient of the {loss} loss; "
        f"at most {VANISHED_SHARE:.0%} may"
    )
    return _check(name, share <= VANISHED_SHARE, detail)


def softmax_unsaturated(model: Differentiable | None, subject: Subject) -> dict[str, Any]:
    """Plain cross-entropy has gradients too: logits are not so large that attacks on probabilities go blind.

    Ours do not, since their losses do not depend on the logits' scale; but a model whose softmax is saturated looks
    robust to everybody else, and a defence that scales its logits up masks its gradients.
    """
    name = "softmax_unsaturated"
    if model is None:
        return _check(name, None, "not run: gradients need the twin, and the twin needs torch")
    from edgeguard.attacks.per_image import vanished_gradients

    images, labels = subject.images[:SAMPLE], subject.labels[:SAMPLE]
    share = float(vanished_gradients(model, images, labels, "cross-entropy").mean())
    detail = (
        f"{share:.1%} of {len(images)} images have a zero or infinite gradient of the plain cross-entropy; "
        f"at most {VANISHED_SHARE:.0%} may"
    )
    return _check(name, share <= VANISHED_SHARE, detail)


def large_patch_wins(model: Differentiable | None, subject: Subject, seed: int) -> dict[str, Any]:
    """Patches of half the image's side, one per image, fool the engine nearly always."""
    name = "large_patch_wins"
    if model is None:
        return _check(name, None, "not run: crafting needs the twin, and the twin needs torch")
    from edgeguard.attacks.per_image import PerImage, craft_per_image

    chosen = np.flatnonzero(subject.eligible)[:SAMPLE]
    images, labels = subject.images[chosen], subject.labels[chosen]
    size = max(1, min(subject.shape) // 2)
    positions = random_positions(len(images), subject.shape, (size, size), np.random.default_rng(seed))
    config = PerImage(size, target=subject.target, seed=seed)
    pixels = craft_per_image(config, model, images, labels, positions)
    part = Subject(subject.classify, images, labels, subject.clean[chosen], subject.target, subject.batch_size)
    judged = judge_pixels(part, pixels, np.ones((size, size), bool), positions)
    detail = (
        f"one {size}x{size} patch per image fools {judged.successes} of {judged.n}; "
        f"at least {LARGE_PATCH_ASR:.0%} are expected of any honest gradient"
    )
    return _check(name, judged.asr >= LARGE_PATCH_ASR, detail)


def white_box_strongest(white: Sequence[tuple[str, Judged]], black: Sequence[tuple[str, Judged]]) -> dict[str, Any]:
    """No attack that knows less of the engine is stronger than the best that knows all of it.

    Fails when the 95 % interval of a paired ASR difference, black minus white, lies above zero.

    Args:
        white: the attacks through the engine or its own twin; black: the others. Name and outcome, all of one patch
            size and at the same places.
    """
    name = "white_box_strongest"
    if not white or not black:
        missing = "white-box" if not white else "black-box"
        return _check(name, None, f"not run: there is no {missing} attack to compare")
    best_white = max(white, key=lambda item: item[1].asr)
    best_black = max(black, key=lambda item: item[1].asr)
    left, right = (judged.fooled[judged.eligible] for _, judged in (best_black, best_white))
    low, high = paired_difference(
        int((left & right).sum()), int((left & ~right).sum()), int((~left & right).sum()), int((~left & ~right).sum())
    )
    detail = (
        f"white-box {best_white[0]} {best_white[1].asr:.1%}, black-box {best_black[0]} {best_black[1].asr:.1%}; "
        f"interval of black minus white {low:+.1%} to {high:+.1%}"
    )
    return _check(name, low <= 0, detail)
