"""A pool judged: every member judges every patch, and a rate is the expectation over the draw of the member.

The draw is part of what is random, and its probabilities are known: no draw is sampled, the expectation is exact. One
draw answers an image without and with the patch, so members that disagree without any patch add nothing to the ASR:

    ASR = sum of p_k * (images that fool member k) / sum of p_k * (images that count for member k)

Survival is judged member by member, each engine against its own twin; the pool's is that of its worst member. NumPy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.statistics import wilson
from edgeguard.verify import document
from edgeguard.verify.harness import Flags, Judged, Subject
from edgeguard.verify.judge import Court, Findings
from edgeguard.verify.propose import Proposal
from edgeguard.verify.survival import LOST, SURVIVED, UNDECIDED, survival

CERTAINTY = 0.99
"""Largest probability that a member gives a class when answers are mixed: none of them can drown the others."""


def mixed(logits: Sequence[NDArray[np.float32]], probabilities: Sequence[float]) -> NDArray[np.float32]:
    """The pool's mean answer: the logarithm of the members' mean class probabilities, (N, classes) float32.

    Each member's softmax has, for each image, the temperature at which it is not saturated (as the scaled cross-entropy
    of the attacks); that changes no member's class. logits: (N, classes) of each member.
    """
    total: NDArray[np.float64] = np.zeros(logits[0].shape)
    for own, probability in zip(logits, probabilities, strict=True):
        values = own.astype(np.float64)
        values -= values.max(1, keepdims=True)
        spread = -values.min(1, keepdims=True)
        scaled = np.exp(values * (steepness(values.shape[1]) / np.where(spread > 0, spread, 1)))
        total += probability * scaled / scaled.sum(1, keepdims=True)
    return np.log(total).astype(np.float32)


def steepness(classes: int) -> float:
    """Difference of the largest and the smallest logit at which no class has more than `CERTAINTY`."""
    return float(np.log(CERTAINTY * max(1, classes - 1) / (1 - CERTAINTY)))


@dataclass(frozen=True, eq=False)
class Side:
    """One member: its live engine on the judged images, and its twin on them where there is torch."""

    width: str
    probability: float
    subject: Subject
    simulation: Subject | None


@dataclass(frozen=True, eq=False)
class PoolSubject(Subject):
    """The judged images as an attacker of the whole pool sees them: `classify` gives the mean answer.

    counts: (N,) bool, images that count for any member.
    """

    counts: Flags

    @staticmethod
    def over(sides: Sequence[Side], classify: Any) -> PoolSubject:
        one = sides[0].subject
        clean = mixed([side.subject.clean for side in sides], [side.probability for side in sides])
        counts = np.any([side.subject.eligible for side in sides], axis=0)
        return PoolSubject(classify, one.images, one.labels, clean, one.target, one.batch_size, counts)

    @property
    def eligible(self) -> Flags:
        return self.counts


@dataclass(frozen=True, eq=False)
class PoolVerdict:
    """One patch judged by all members. judged, probabilities: in the members' order."""

    judged: tuple[Judged, ...]
    probabilities: tuple[float, ...]

    @property
    def shown(self) -> int:
        """Index of the member that stands for the pool in pictures: that for which most images count."""
        return max(range(len(self.judged)), key=lambda index: self.judged[index].n)

    @property
    def expected_n(self) -> float:
        """Images that count, expected over the draw; above 0."""
        return self._expected([float(one.n) for one in self.judged])

    @property
    def asr(self) -> float:
        return self._expected([float(one.successes) for one in self.judged]) / self.expected_n

    @property
    def robust_accuracy(self) -> float:
        return self._expected([one.robust_accuracy for one in self.judged])

    @property
    def fooled(self) -> NDArray[np.float64]:
        """(N,): how likely the drawn member counts the image and is fooled."""
        weighted = [chance * one.fooled for chance, one in zip(self.probabilities, self.judged, strict=True)]
        total: NDArray[np.float64] = np.sum(weighted, axis=0, dtype=np.float64)
        return total

    def _expected(self, values: Sequence[float]) -> float:
        return sum(chance * value for chance, value in zip(self.probabilities, values, strict=True))


def expected_share(share: float, n: float) -> tuple[float, int, list[float]]:
    """A share expected over the draw, the number of images to report with it, and its interval.

    An expectation over the draw varies less from image to image than one draw would, so the interval is no too short one.
    """
    count = max(1, round(n))
    bounded = min(max(share, 0.0), 1.0)
    return bounded, count, list(wilson(min(count, round(bounded * count)), count))


@dataclass(frozen=True, eq=False)
class PoolCourt(Court):
    """Judges every proposal on every member. subject: a `PoolSubject`; simulation: None, the members have their own.

    verdicts: of all members, one for each row; the findings' `engine` and `twin` hold those of the member that is shown.
    """

    sides: tuple[Side, ...]
    verdicts: list[PoolVerdict] = field(default_factory=list)

    def judge(self, proposal: Proposal, findings: Findings) -> None:
        number: int | None = None
        if not proposal.found.per_image:
            number = len(findings.patches)
            findings.patches.append(document.patch_block(proposal))
        for placement in proposal.plan.placements(self.options):
            found = [self._place(side.subject, proposal, placement, f"engine {side.width}") for side in self.sides]
            verdict = self._verdict([judged for judged, _ in found])
            shown = verdict.shown
            row = document.attack_row(proposal, number, placement, verdict.judged[shown], self.options, self.seen)
            row["asr"], row["n"], row["ci95"] = expected_share(verdict.asr, verdict.expected_n)
            robust = expected_share(verdict.robust_accuracy, row["robust_n"])
            row["robust_accuracy"], _, row["robust_ci95"] = robust
            row["members"] = {
                side.width: judged.asr if judged.n else None
                for side, judged in zip(self.sides, verdict.judged, strict=True)
            }
            twins = self._twins(proposal, placement)
            if twins:
                row["twin_asr"] = expected_share(self._verdict(twins).asr, 1)[0]
                row["survival"] = self._survival(verdict.judged, twins)
            findings.rows.append(row)
            findings.proposals.append(proposal)
            findings.engine.append(verdict.judged[shown])
            findings.twin.append(twins[shown] if twins else None)
            findings.seconds.append(proposal.seconds + sum(seconds for _, seconds in found))
            self.verdicts.append(verdict)

    def _verdict(self, judged: Sequence[Judged]) -> PoolVerdict:
        return PoolVerdict(tuple(judged), tuple(side.probability for side in self.sides))

    def _twins(self, proposal: Proposal, placement: str) -> list[Judged]:
        """The verdicts of all twins; none without torch."""
        return [
            self._place(side.simulation, proposal, placement, f"twin {side.width}")[0]
            for side in self.sides
            if side.simulation is not None
        ]

    def _survival(self, engines: Sequence[Judged], twins: Sequence[Judged]) -> dict[str, Any] | None:
        """That of the member which lost most; None where no image counts for a member and its twin."""
        found = []
        for side, engine, twin in zip(self.sides, engines, twins, strict=True):
            if side.simulation is None or not (engine.eligible & twin.eligible).any():
                continue
            count = len(engine.eligible)
            same = (
                np.array_equal(side.subject.clean[:count], side.simulation.clean[:count])
                and np.array_equal(engine.logits, twin.logits)
                and np.array_equal(engine.positions, twin.positions)
            )
            found.append({**survival(engine, twin, same), "member": side.width})
        order = (SURVIVED, UNDECIDED, LOST)
        return max(found, key=lambda one: (order.index(one["verdict"]), one["delta_asr"]), default=None)
