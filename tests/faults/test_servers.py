"""Servers that break under `edgeguard verify`; the reader of answers itself is held in tests/targets/test_remote.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from jobs import Workshop
from servers import Broken, Served, broken, faults, kills


@pytest.fixture(scope="module")
def other(workshop: Workshop) -> Iterator[Broken]:
    with broken(workshop) as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tears the connection down in the body", "another shape", "503, come back in an hour"])
def test_a_sentence_and_after_it_is_mended_the_same_report(other: Broken, name: str) -> None:
    other.lost(faults(other.engine)[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["half a body", "503, come back in a moment"])
def test_what_passes_is_not_noticed(other: Broken, name: str) -> None:
    other.passing(name)


@pytest.mark.slow
def test_our_server_is_killed(workshop: Workshop) -> None:
    served = Served(workshop)
    for name, kill in kills(served, brief=True).items():
        assert served.url in kill(served), name
