"""Verification: attack a deployed engine and report what happened. Replaying patches and asking for labels or logits
needs no torch.

    report = verify(Artifact.load("runs/x"), dataset, VerifyOptions(patch_sizes=(6, 8), placements=("random", "worst")))

crafts a patch for each attack, size and access and judges it at every placement. The document is plain JSON:
`edgeguard.report` renders it, `Gate` turns it into an exit code. `verify_pool` does the same to a pool of engines of which
one, drawn at random, answers each batch. In place of the artifact, `Remote` names a model on a server.
"""

from edgeguard.verify.budget import BUDGETS, budget
from edgeguard.verify.deployed import Remote, without_gradients
from edgeguard.verify.gate import Gate, evaluate
from edgeguard.verify.options import (
    ACCESSES,
    ATTACKS,
    PLACEMENTS,
    Progress,
    VerifyOptions,
    accesses_of,
    allowed_attacks,
)
from edgeguard.verify.pool import verify_pool
from edgeguard.verify.run import verify

__all__ = [
    "ACCESSES", "ATTACKS", "BUDGETS", "PLACEMENTS", "Gate", "Progress", "Remote", "VerifyOptions",
    "accesses_of", "allowed_attacks", "budget", "evaluate", "verify", "verify_pool", "without_gradients",
]  # fmt: skip
