"""Crafting against a pool: with the expectation over its members, as an attacker does who knows the draw's probabilities.

Universal attacks with gradients take the mean of the members' losses, weighted by probability, in every step (expectation
over the draw: Athalye et al. 2018, arXiv:1802.00420, section 4.2). Attacks per image do so too, and keep the iterate
that the pool's mean answer says is best. Attacks that query see the mean answer, which anybody gets who asks often.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeguard.attacks.api import Attack, Found, Victim
from edgeguard.targets import Logits
from edgeguard.targets.random_precision import RandomPrecisionEngine
from edgeguard.verify.harness import Classify, Images, logits_of
from edgeguard.verify.options import Progress, VerifyOptions
from edgeguard.verify.propose import EVERY_WIDTH, Plan, Workshop
from edgeguard.verify.stages import StageCheckpoint

if TYPE_CHECKING:
    from edgeguard.attacks.api import Differentiable

GUIDE = "mean answer"


@dataclass(frozen=True, eq=False)
class PoolWorkshop(Workshop):
    """subject: a `PoolSubject`. twins: of all members. engine: the live pool. probabilities: by width."""

    engine: RandomPrecisionEngine
    probabilities: Mapping[str, float]

    def attack(self, plan: Plan, options: VerifyOptions) -> Attack:
        """The plan's attack; where it attacks several models, it goes on until all of them are lost."""
        attack: Any = super().attack(plan, options)
        if plan.source != EVERY_WIDTH:
            return attack  # type: ignore[no-any-return]
        changes: dict[str, Any] = {}
        known = {one.name for one in dataclasses.fields(attack)}
        least = min(self.probabilities.values())
        if "average" in known:
            changes["average"] = True
        if attack.name == "aqapa-per-image":
            # A member that is not lost gives the label at least 1 / classes: beyond this margin there is none.
            changes["confidence"] = math.log(self.engine.num_classes / least)
        if attack.name == "lavan":
            changes["confidence"] = max(attack.confidence, 1 - least / 2)
        changed: Attack = dataclasses.replace(attack, **changes)
        return changed

    def craft(
        self, plan: Plan, options: VerifyOptions, checkpoint: StageCheckpoint, progress: Progress | None,
        attack: Attack | None = None,
    ) -> Found:  # fmt: skip
        found = super().craft(plan, options, checkpoint, progress, attack)
        if plan.access != "query":
            return found
        return dataclasses.replace(found, queries=found.queries * len(self.probabilities))

    def victim(self, plan: Plan, options: VerifyOptions) -> Victim:
        if plan.access == "query" or (plan.access == "transfer" and plan.source != EVERY_WIDTH):
            return super().victim(plan, options)
        from edgeguard.verify.pool_models import Guide, Mixture, Weighted

        models = self.live(options) if plan.access == "engine" else self.twins
        count = len(models) + plan.per_image
        weighted: dict[str, Differentiable] = {
            width: Weighted(model, count * self.probabilities[width]) for width, model in models.items()
        }
        if not plan.per_image:
            return Victim(weighted)
        return Victim({GUIDE: Guide(Mixture(models, self.probabilities)), **weighted})

    def live(self, options: VerifyOptions) -> dict[str, Differentiable]:
        """Every live member with the gradient of its twin."""
        from edgeguard.attacks.bpda import BPDA

        def asks(width: str) -> Classify:
            def ask(images: Images) -> Logits:
                return logits_of(lambda batch: self.engine.ask(width, batch), images, options.batch_size)

            return ask

        return {width: BPDA(asks(width), twin) for width, twin in self.twins.items()}
