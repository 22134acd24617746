"""SIGKILL at a few points; `benchmarks/faults.py` tries many more."""

from __future__ import annotations

import pytest
from jobs import EXPORT, HARDEN, VERIFY, Job, Workshop
from kill_points import Point, kill, points

POINTS = [
    (HARDEN, "named trained 1", False, "it begins again"),
    (HARDEN, "write checkpoint.safetensors 2", True, ""),
    (HARDEN, "named metrics.jsonl 2", False, ""),
    (EXPORT, "write model.onnx 1", True, ""),
    (VERIFY, "write a stage 4", True, "going on with what is finished in verified.unfinished"),
    (VERIFY, "named verified 1", False, "verified exists already"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("job", "at", "half", "said"), POINTS, ids=[f"{job.name}, {at}" for job, at, _, _ in POINTS])
def test_nothing_is_lost_and_the_end_is_the_same(workshop: Workshop, job: Job, at: str, half: bool, said: str) -> None:
    outcome = kill(workshop, Point(job, at, half))
    assert outcome.readable >= 2
    assert said in outcome.said


def test_points_are_found_in_what_a_job_does() -> None:
    operations = ("make x 1", "write a 1", "name a 1", "named a 1", "write a 2", "name a 2", "step 1", "step 2", "step 3", "end")
    found = list(points(HARDEN, operations))
    assert [(one.at, one.half) for one in found] == [
        ("make x 1", False), ("write a 2", True), ("name a 2", False), ("named a 1", False), ("step 1", False), ("step 3", False),
        ("end", False),
    ]  # fmt: skip
    assert len({one.words for one in found}) == len(found)
