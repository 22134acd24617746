"""Verification: attack a deployed engine and report what happened. Replaying patches needs no torch.

    report = verify(Artifact.load("runs/x"), dataset, VerifyOptions(patch_sizes=(6, 8), placements=("random", "worst")))

crafts one patch per size and access and judges it at every placement. The document is plain JSON: `edgeguard.report`
renders it, `Gate` turns it into an exit code.
"""

from edgeguard.verify.gate import Gate, evaluate
from edgeguard.verify.options import ACCESSES, PLACEMENTS, Progress, VerifyOptions
from edgeguard.verify.run import verify

__all__ = ["ACCESSES", "PLACEMENTS", "Gate", "Progress", "VerifyOptions", "evaluate", "verify"]
