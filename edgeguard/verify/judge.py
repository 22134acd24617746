"""Every proposal judged at every placement, on the engine and on its twin; what accumulates while that happens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeguard.verify import document
from edgeguard.verify.harness import Judged, Subject, judge_pixels, judge_worst, random_places
from edgeguard.verify.options import Progress, VerifyOptions
from edgeguard.verify.propose import Proposal
from edgeguard.verify.stages import Store
from edgeguard.verify.survival import survival


@dataclass(eq=False)
class Findings:
    """What accumulates while patches are judged; `rows`, `proposals`, `engine`, `twin` and `seconds` run in parallel.

    patches: the universal ones, as the report holds them. reason: why it ended before its time, or None.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    proposals: list[Proposal] = field(default_factory=list)
    engine: list[Judged] = field(default_factory=list)
    twin: list[Judged | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    patches: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None

    @property
    def strongest(self) -> int:
        """Index of the attack with the highest ASR on the engine; the first of equals."""
        return max(range(len(self.rows)), key=lambda index: float(self.rows[index]["asr"]))

    def strongest_universal(self) -> Proposal | None:
        """The universal patch with the highest ASR, random pixels left out where there are others."""
        chosen = [index for index, row in enumerate(self.rows) if row["scope"] == "universal"]
        if not chosen:
            return None
        return self.proposals[max(chosen, key=lambda i: (self.rows[i]["access"] != "none", float(self.rows[i]["asr"])))]


@dataclass(frozen=True, eq=False)
class Court:
    """Who is judged and how: the engine, its twin where there is one, and where finished verdicts are kept."""

    subject: Subject
    simulation: Subject | None
    options: VerifyOptions
    seen: list[int] | None
    store: Store
    progress: Progress | None

    def judge(self, proposal: Proposal, findings: Findings) -> None:
        """Add a row for every placement of the proposal."""
        number: int | None = None
        if not proposal.found.per_image:
            number = len(findings.patches)
            findings.patches.append(document.patch_block(proposal))
        for placement in proposal.plan.placements(self.options):
            judged, seconds = self._place(self.subject, proposal, placement, "engine")
            row = document.attack_row(proposal, number, placement, judged, self.options, self.seen)
            twin = None
            if self.simulation is not None:
                twin, _ = self._place(self.simulation, proposal, placement, "twin")
                count = len(judged.eligible)
                same_clean = np.array_equal(self.subject.clean[:count], self.simulation.clean[:count])
                same = np.array_equal(judged.logits, twin.logits) and np.array_equal(judged.positions, twin.positions)
                row["twin_asr"] = twin.asr
                row["survival"] = survival(judged, twin, same_clean and same)
            findings.rows.append(row)
            findings.proposals.append(proposal)
            findings.engine.append(judged)
            findings.twin.append(twin)
            findings.seconds.append(proposal.seconds + seconds)

    def _place(self, subject: Subject, proposal: Proposal, placement: str, who: str) -> tuple[Judged, float]:
        stage = {**proposal.plan.stage(), "judge": who, "placement": placement, "patch": proposal.sha256}

        def tick(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(f"judging {proposal.plan}, {placement} placement, {who}", done, total)

        def compute() -> Judged:
            found = proposal.found
            part = subject if proposal.subset is None else subject.first(proposal.subset)
            if placement == "worst":
                return judge_worst(part, found.patch, self.options.stride, tick)
            positions = found.positions
            if positions is None:
                positions = random_places(part, found.patch, self.options.seed)
            return judge_pixels(part, found.pixels, found.mask, positions)

        result = self.store.judged(stage, compute)
        tick(1, 1)
        return result
