"""What to verify and how hard to attack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgeguard.errors import InputError

GRADIENT_ACCESSES = ("transfer", "engine")
ACCESSES = ("replay", *GRADIENT_ACCESSES, "query")
PLACEMENTS = ("random", "worst")
GRADIENT_ATTACKS = ("a-qapa", "a-qapa-per-image", "gap", "lavan")
QUERY_ATTACKS = ("patch-rs", "patch-rs-per-image")
ATTACKS = (*GRADIENT_ATTACKS, *QUERY_ATTACKS)

Progress = Callable[[str, int, int], None]
"""Called with a stage, what is done and the total."""


@dataclass(frozen=True)
class VerifyOptions:
    """How `verify` attacks an engine.

    attacks: names in `ATTACKS`. accesses: what the attacker has: `replay` given patches, `transfer` twins, `engine` the
    live engine and its twin's gradient, `query` the live engine's outputs. Every attack is tried at every access it can use.
    patch_sizes: side lengths in pixels of the patches to craft.
    placements: of universal patches: `random` (one seeded place per image), `worst` (every place on a grid; exact for
    that grid). Attacks per image choose their places themselves.
    stride: of the grid, in pixels; 1 tries every place there is.
    steps, restarts, attack_batch, loss, target: of the crafting; see `edgeguard.attacks.aqapa.AQAPA`.
    limit: images judged at most; None takes all that are there. craft_limit: images crafted on at most.
    per_image_limit: of the judged images, how many get patches of their own.
    queries: images that the engine is shown for each image's own patch. universal_queries: for a universal patch.
    decision_only: query attacks see labels instead of logits.
    batch_size: the batch at which the engine is deployed, and at which it is judged.
    replay: patch files. bundle: what `edgeguard attack` wrote: patches to replay, on the images that it names.
    surrogates: artifacts whose twins the transferred patches are crafted on, besides the artifact's own.
    runtime, threads: passed to `open_engine`.

    Raises:
        InputError: when an option is out of range or options contradict each other.
    """

    attacks: tuple[str, ...] = ("a-qapa",)
    accesses: tuple[str, ...] = GRADIENT_ACCESSES
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
    per_image_limit: int = 200
    queries: int = 1000
    universal_queries: int = 50_000
    decision_only: bool = False
    seed: int = 0
    batch_size: int = 50
    replay: tuple[Path, ...] = ()
    bundle: Path | None = None
    surrogates: tuple[Path, ...] = ()
    runtime: str | None = None
    threads: int = 0

    def __post_init__(self) -> None:
        _subset("access", self.accesses, ACCESSES)
        _subset("placement", self.placements, PLACEMENTS)
        if self.crafts:
            _subset("attack", self.attacks, ATTACKS)
            self._check_accesses()
        positive = {
            "patch size": min(self.patch_sizes, default=0), "stride": self.stride, "steps": self.steps,
            "restarts": self.restarts, "attack batch": self.attack_batch, "batch size": self.batch_size,
            "limit": 1 if self.limit is None else self.limit, "craft limit": self.craft_limit,
            "limit of images with patches of their own": self.per_image_limit, "number of queries": self.queries,
            "number of queries of a universal patch": self.universal_queries,
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
        if self.bundle is not None and self.limit is not None:
            raise InputError("a bundle says which images are judged; leave the limit out")
        if ("replay" in self.accesses) != bool(self.replay or self.bundle):
            raise InputError("the access 'replay' and patch files to replay go together; give both or neither")
        if self.surrogates and "transfer" not in self.accesses:
            raise InputError("surrogates are for the access 'transfer'; add it or leave them out")

    def _check_accesses(self) -> None:
        gradients, queries = set(self.attacks) & set(GRADIENT_ATTACKS), set(self.attacks) & set(QUERY_ATTACKS)
        given = set(self.accesses)
        if queries and "query" not in given:
            raise InputError(f"{min(queries)} attacks through queries; add the access 'query'")
        if gradients and not given & set(GRADIENT_ACCESSES):
            raise InputError(f"{min(gradients)} needs gradients; add the access 'transfer' or 'engine'")
        if "query" in given and not queries:
            raise InputError(f"the access 'query' is for the attacks {' and '.join(QUERY_ATTACKS)}; add one of them")
        if given & set(GRADIENT_ACCESSES) and not gradients:
            raise InputError(f"the accesses transfer and engine are for {', '.join(GRADIENT_ATTACKS)}; add one of them")

    @property
    def crafts(self) -> bool:
        """Whether patches have to be crafted, which needs images to craft on."""
        return bool(set(self.accesses) - {"replay"})

    @property
    def differentiates(self) -> bool:
        """Whether patches are crafted with gradients, which needs torch."""
        return bool(set(self.accesses) & set(GRADIENT_ACCESSES))

    @property
    def universal(self) -> bool:
        """Whether a universal patch is crafted, which needs other images than those that are judged."""
        return self.crafts and any(not name.endswith("-per-image") and name != "lavan" for name in self.attacks)


def accesses_of(attacks: tuple[str, ...]) -> tuple[str, ...]:
    """All accesses that the attacks can use."""
    gradients = GRADIENT_ACCESSES if set(attacks) & set(GRADIENT_ATTACKS) else ()
    return (*gradients, *(("query",) if set(attacks) & set(QUERY_ATTACKS) else ()))


def allowed_attacks(attacks: tuple[str, ...], accesses: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the attacks that can use one of the accesses."""
    return tuple(name for name in attacks if set(accesses_of((name,))) & set(accesses))


def _subset(what: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown or not given or len(set(given)) != len(given):
        raise InputError(
            f"{what} must be one or more of {', '.join(known)}, each once; got {', '.join(given) or 'none'}"
        )
