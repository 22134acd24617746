from __future__ import annotations

from typing import Any

import pytest

from edgeguard.verify.breakdown import advice


def row(**changes: Any) -> dict[str, Any]:
    return {"name": "aqapa-per-image", "patch_size": 8, "access": "engine", "asr": 0.914, "ci95": [0.9, 0.93], "n": 200,
            "last_restart": None, **changes}  # fmt: skip


@pytest.mark.parametrize(("late", "said"), [(None, False), (0, False), (1, False), (2, True), (7, True)])
def test_a_search_that_was_still_finding_images_is_a_floor(late: int | None, said: bool) -> None:
    found = advice({"gate": None, "attacks": [row(), row(asr=0.5, last_restart=late)]})
    assert bool(found) is said
    if said:
        assert f"only the last restart fooled {late} of 200 images" in found[0]
        assert "50.0% is a floor" in found[0]


def test_a_search_on_a_surrogate_says_nothing_of_the_engine() -> None:
    assert advice({"gate": None, "attacks": [row(access="transfer", last_restart=9)]}) == []


def test_rows_of_older_reports_say_nothing_of_it() -> None:
    old = row()
    del old["last_restart"]
    assert advice({"gate": None, "attacks": [old]}) == []


def test_a_vague_figure_asks_for_images() -> None:
    (found,) = advice({"gate": None, "attacks": [row(asr=0.5, ci95=[0.4, 0.6], n=90)]})
    assert "is known to 40.0% to 60.0% from 90 images; about 1,100 images" in found
