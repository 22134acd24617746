"""The goals of the study, each with its figure: reached, not reached or not measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from study.figures import Share, Study
from study.grid import OURS, READY

CLEAN = {"8": 0.915, "4": 0.91, "2": 0.87}
BELOW_QAT = 0.01
BELOW = {"dwq": 0.25, "pbat": 0.10}
PER_IMAGE = {"per-image-8": {"8": 0.5, "4": 0.5, "2": 0.6}, "per-image-5": {"8": 0.3, "4": 0.3, "2": 0.4}}
QUERY = "patch-rs-8"
IMAGES = 1000
"""Judged images that the goals for patches per image ask for."""


@dataclass(frozen=True)
class Goal:
    """text: what is asked. figure: what was measured, in words. reached: None where something is not measured."""

    text: str
    figure: str
    reached: bool | None


def goals(study: Study) -> list[Goal]:
    """All goals, in the order of the tables."""
    return [*_clean(study), *_unseen(study), *_query(study), *_per_image(study)]


def unseen(study: Study) -> list[str]:
    """Attacks on configurations that no defence is meant to train on; random pixels, queries and patches per image apart."""
    return [one["name"] for one in study.attacks
            if not one["seen"] and one["method"] not in ("noise", "patch-rs", "per-image")]  # fmt: skip


def _clean(study: Study) -> list[Goal]:
    found = []
    for width, least in CLEAN.items():
        share = study.accuracy(OURS, width)
        text = f"clean accuracy of QADT-R at {width} bits at least {least:.1%}"
        found.append(Goal(text, _share(share), None if share is None else share.value >= least))
    parts: list[tuple[float, str] | None] = []
    for width in study.widths:
        ours, qat = study.accuracy(OURS, width), study.accuracy("qat", width)
        parts.append(None if ours is None or qat is None else (ours.value - qat.value, f"{width} bits"))
    found.append(
        _all("clean accuracy of QADT-R within 1 point of QAT at every width", parts, lambda gap: gap >= -BELOW_QAT)
    )
    return found


def _unseen(study: Study) -> list[Goal]:
    """Differences at the width and attack where they are smallest."""
    found = []
    for other, points in BELOW.items():
        parts = [_part(study.gap(OURS, other, width, attack), f"{attack}, {width} bits")
                 for width in study.widths for attack in unseen(study)]  # fmt: skip
        text = f"ASR of QADT-R at least {100 * points:.0f} points below {other.upper()} on every unseen configuration and width"
        found.append(_all(text, parts, lambda gap, points=points: gap <= -points, largest=True))  # type: ignore[misc]
    return found


def _query(study: Study) -> list[Goal]:
    return [
        _all(
            f"ASR of QADT-R below {other.upper()} under Patch-RS at every width",
            [_part(study.gap(OURS, other, width, QUERY), f"{width} bits") for width in study.widths],
            lambda gap: gap < 0, largest=True,
        )
        for other in BELOW
    ]  # fmt: skip


def _per_image(study: Study) -> list[Goal]:
    found = []
    for attack, limits in PER_IMAGE.items():
        size = attack.rpartition("-")[2]
        for width, most in limits.items():
            share = study.asr(READY, width, attack)
            text = (
                f"ASR of the ready QADT-R model under A-QAPA per image {size}x{size} at {width} bits at most {most:.0%}, "
                f"on {IMAGES:,} images"
            )
            few = share is not None and share.judged < IMAGES
            figure = _share(share) + (f"; only {share.judged} images judged" if share is not None and few else "")
            found.append(Goal(text, figure, _at_most(share, most, few)))
        others = [one["name"] for one in study.defences if one["name"] not in (OURS, READY)]
        parts = [_part(study.gap(OURS, other, width, attack), f"{other}, {width} bits")
                 for width in study.widths for other in others]  # fmt: skip
        text = f"QADT-R the best of all defences under A-QAPA per image {size}x{size} at every width, at an equal budget"
        found.append(_all(text, parts, lambda gap: gap < 0, largest=True))
    return found


def _at_most(share: Share | None, most: float, few: bool) -> bool | None:
    """Missed on few images is missed; reached on few images is open."""
    if share is None:
        return None
    return False if share.value > most else None if few else True


def _part(gap: float | None, where: str) -> tuple[float, str] | None:
    return None if gap is None else (gap, where)


def _all(
    text: str, parts: Sequence[tuple[float, str] | None], holds: Callable[[float], bool], largest: bool = False
) -> Goal:
    """A goal that must hold everywhere, told by the place where it holds least; open while a place is not measured."""
    known = [part for part in parts if part is not None]
    if not known:
        return Goal(text, "not measured", None)
    value, where = (max if largest else min)(known)
    missed = sum(not holds(gap) for gap, _ in known)
    missing = len(parts) - len(known)
    figure = f"{100 * value:+.1f} points where it is least ({where}); {missed} of {len(known)} comparisons miss it"
    if missing:
        figure += f"; {missing} not measured"
    return Goal(text, figure, False if missed else None if missing else True)


def _share(share: Share | None) -> str:
    if share is None:
        return "not measured"
    low, high = share.ci95
    return f"{share.value:.1%} [{low:.1%}, {high:.1%}], n = {share.n:,}"
