"""What to verify and how hard to attack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgeguard.errors import InputError

ACCESSES = ("replay", "transfer", "engine")
PLACEMENTS = ("random", "worst")

Progress = Callable[[str, int, int], None]
"""Called with a stage, what is done and the total."""


@dataclass(frozen=True)
class VerifyOptions:
    """How `verify` attacks an engine.

    accesses: what the attacker has: `replay` given patches, `transfer` twins, `engine` the live engine and its twin.
    patch_sizes: side lengths in pixels of the patches to craft.
    placements: `random` (one seeded place per image), `worst` (every place on a grid; exact for that grid).
    stride: of the grid, in pixels; 1 tries every place there is.
    steps, restarts, attack_batch, loss, target: of the crafting; see `edgeguard.attacks.aqapa.AQAPA`.
    limit: images judged at most; None takes all that are there. craft_limit: images crafted on at most.
    batch_size: the batch at which the engine is deployed, and at which it is judged.
    replay: patch files. surrogates: artifacts whose twins the transferred patches are crafted on, besides the
    artifact's own. runtime, threads: passed to `open_engine`.

    Raises:
        InputError: when an option is out of range or options contradict each other.
    """

    accesses: tuple[str, ...] = ("transfer", "engine")
    patch_sizes: tuple[int, ...] = (6,)
    placements: tuple[str, ...] = ("random",)
    stride: int = 4
    steps: int = 300
    restarts: int = 1
    attack_batch: int = 100
    loss: str = "bounded-margin"
    target: int | None = None
    limit: int | None = 1000
    craft_limit: int = 2000
    seed: int = 0
    batch_size: int = 50
    replay: tuple[Path, ...] = ()
    surrogates: tuple[Path, ...] = ()
    runtime: str | None = None
    threads: int = 0

    def __post_init__(self) -> None:
        _subset("access", self.accesses, ACCESSES)
        _subset("placement", self.placements, PLACEMENTS)
        positive = {
            "patch size": min(self.patch_sizes, default=0), "stride": self.stride, "steps": self.steps,
            "restarts": self.restarts, "attack batch": self.attack_batch, "batch size": self.batch_size,
            "limit": 1 if self.limit is None else self.limit, "craft limit": self.craft_limit,
        }  # fmt: skip
        if not self.crafts:
            del positive["patch size"]
        for name, value in positive.items():
            if value < 1:
                raise InputError(f"the {name} must be at least 1, got {value}")
        if min(self.seed, self.threads, 0 if self.target is None else self.target) < 0:
            raise InputError(
                f"seed, threads and target cannot be negative, got {self.seed}, {self.threads}, {self.target}"
            )
        if len(set(self.patch_sizes)) != len(self.patch_sizes):
            raise InputError(f"a patch size is named twice: {self.patch_sizes}")
        if ("replay" in self.accesses) != bool(self.replay):
            raise InputError("the access 'replay' and patch files to replay go together; give both or neither")
        if self.surrogates and "transfer" not in self.accesses:
            raise InputError("surrogates are for the access 'transfer'; add it or leave them out")

    @property
    def crafts(self) -> bool:
        """Whether patches have to be crafted, which needs torch and images to craft on."""
        return bool(set(self.accesses) - {"replay"})


def _subset(what: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown or not given or len(set(given)) != len(given):
        raise InputError(
            f"{what} must be one or more of {', '.join(known)}, each once; got {', '.join(given) or 'none'}"
        )
