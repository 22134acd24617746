"""How much an attacker may spend: three named sets of options, from a first look to everything there is."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from edgeguard.errors import InputError
from edgeguard.verify.options import ATTACKS, PLACEMENTS

BUDGETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "quick": {"attacks": ("a-qapa",), "placements": ("random",), "steps": 100, "restarts": 1, "limit": 300},
    "standard": {
        "attacks": ("a-qapa", "a-qapa-per-image", "gap", "patch-rs"), "placements": PLACEMENTS, "stride": 8, "steps": 300,
        "restarts": 1, "limit": 1000, "per_image_limit": 200, "universal_queries": 20_000,
    },
    "exhaustive": {
        "attacks": ATTACKS, "placements": PLACEMENTS, "stride": 1, "steps": 500, "restarts": 3, "limit": None,
        "per_image_limit": 1000, "queries": 5000, "universal_queries": 200_000,
    },
})  # fmt: skip
"""Options that each budget sets; whatever is given by itself wins."""


def budget(name: str) -> dict[str, Any]:
    """The options of a budget.

    Raises:
        InputError: unknown; says which exist.
    """
    if name not in BUDGETS:
        raise InputError(f"unknown budget {name!r}; expected one of {', '.join(BUDGETS)}")
    return dict(BUDGETS[name])
