"""The clock is set while a job runs, or between two parts of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from clocks import SCENARIOS, clocked
from jobs import Workshop

BRIEF = [name for name in SCENARIOS if name.split(":")[0] in ("harden", "verify", "serve") and "trains" not in name]


@pytest.mark.slow
@pytest.mark.parametrize("name", BRIEF)
def test_results_know_no_clock(workshop: Workshop, tmp_path: Path, name: str) -> None:
    with clocked(workshop, tmp_path) as (clock, nursery):
        assert SCENARIOS[name](workshop, clock, nursery)
