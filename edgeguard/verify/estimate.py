"""How long a verification will take, from what the clean images took."""

from __future__ import annotations

from collections.abc import Sequence

from edgeguard.patch import grid_positions
from edgeguard.verify.harness import Subject
from edgeguard.verify.options import VerifyOptions
from edgeguard.verify.propose import Plan, cost

BACKWARD = 3.0
"""Time of a forward and backward pass in forward passes."""


def seconds(plans: Sequence[Plan], options: VerifyOptions, subject: Subject, engine_rate: float, twin_rate: float) -> float:
    """Crafting and judging of all plans.

    engine_rate, twin_rate: images per second, forward; twin_rate is 0 where there is no twin.
    """
    images, total = len(subject.images), 0.0
    per_image = 1 / engine_rate + (1 / twin_rate if twin_rate else 0.0)
    for plan in plans:
        price = cost(plan, options, images)
        total += price.queries / engine_rate
        total += BACKWARD * price.gradients / twin_rate if twin_rate else 0.0
        for placement in plan.placements(options):
            judged = min(images, options.per_image_limit) if plan.per_image else images
            places = len(grid_positions(subject.shape, (plan.size, plan.size), options.stride)) if placement == "worst" else 1
            total += judged * places * per_image
    return total


def sentence(plans: Sequence[Plan], estimate: float) -> str:
    """For a person, before the start."""
    crafted = sum(plan.given is None for plan in plans)
    minutes = estimate / 60
    duration = f"{estimate:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
    return f"{crafted} attacks to craft, {len(plans)} patches to judge: about {duration} on this machine"
