"""Two processes, one place: one writes, the other is told."""

from __future__ import annotations

import pytest
from jobs import EXPORT, HARDEN, PAGE, RESUME, VERIFY, Job, Workshop
from two_writers import Meeting, meet


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "at", "said"),
    [
        (EXPORT, "make artifact-2 1", "exists already"), (EXPORT, "named model.onnx 1", "another process is writing artifact-2"),
        (HARDEN, "step 20", "trained exists already, a run"), (RESUME, "step 4", "another process is writing begun"),
        (VERIFY, "write a stage 1", "another process is writing verified.unfinished"), (PAGE, "name page.html 1", "exists already"),
    ],
)  # fmt: skip
def test_one_writes_and_the_other_is_told(workshop: Workshop, job: Job, at: str, said: str) -> None:
    assert said in meet(workshop, Meeting(job, at))
