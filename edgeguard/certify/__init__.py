"""Certified robustness against patches by double masking, around any classifier. NumPy only.

    masks = MaskSet.of(image=(32, 32), patch=(5, 5), per_axis=6)
    defended = Defended(engine, masks)
    labels, certified = defended(images)

Source: Xiang, Mahloujifar & Mittal 2022, PatchCleanser, USENIX Security, arXiv:2108.09135.
"""

from edgeguard.certify.check import contradictions
from edgeguard.certify.document import DEFINITIONS, SCHEMA, certificate, format_certificate
from edgeguard.certify.double import Answers, Classify, Defended
from edgeguard.certify.masks import GREY, MaskSet

__all__ = [
    "DEFINITIONS",
    "GREY",
    "SCHEMA",
    "Answers",
    "Classify",
    "Defended",
    "MaskSet",
    "certificate",
    "contradictions",
    "format_certificate",
]
