from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeguard.errors import InputError
from edgeguard.verify import VerifyOptions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accesses": ()}, "access must be"),
        ({"accesses": ("query?",)}, "access must be"),
        ({"accesses": ("engine", "engine")}, "each once"),
        ({"placements": ("corner",)}, "placement must be"),
        ({"patch_sizes": ()}, "patch size"),
        ({"patch_sizes": (0,)}, "patch size"),
        ({"patch_sizes": (6, 6)}, "twice"),
        ({"stride": 0}, "stride"),
        ({"steps": 0}, "steps"),
        ({"restarts": 0}, "restarts"),
        ({"limit": 0}, "limit"),
        ({"craft_limit": 0}, "craft limit"),
        ({"batch_size": 0}, "batch size"),
        ({"attack_batch": 0}, "attack batch"),
        ({"seed": -1}, "negative"),
        ({"threads": -1}, "negative"),
        ({"target": -1}, "negative"),
        ({"accesses": ("replay",)}, "go together"),
        ({"replay": (Path("p.npz"),)}, "go together"),
        ({"accesses": ("engine",), "surrogates": (Path("a"),)}, "surrogates"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VerifyOptions(**change)


def test_replay_needs_no_patch_size() -> None:
    options = VerifyOptions(accesses=("replay",), replay=(Path("p.npz"),), patch_sizes=())
    assert not options.crafts
    assert VerifyOptions().crafts
    assert VerifyOptions(limit=None).limit is None
