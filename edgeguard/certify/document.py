"""`certificate.json`, and its summary for a person, made from the document alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgeguard.certify.double import Answers, Labels
from edgeguard.certify.masks import Flags, MaskSet
from edgeguard.statistics import wilson

SCHEMA = "edgeguard.certificate/1"
METHOD = "PatchCleanser double masking (Xiang et al. 2022, arXiv:2108.09135)"
DEFINITIONS = {
    "certified": "share of all judged images for which every pair of masks gives the right label; the defended prediction "
    "is then proven right for every patch of at most this size, with any pixels, at any place",
    "defended": "share of all judged images that the defended prediction classifies correctly, without a patch",
    "clean": "share of all judged images that the engine alone classifies correctly, without a patch",
    "every_place": "share of all judged images that the engine alone, without masks, classifies correctly without this "
    "patch and with it at every place; exact for this patch, and nothing is said of any other",
    "contradictions": "attacked versions of certified images that the defended prediction gets wrong; must be 0",
    "engine_calls": "masked images that the engine is shown, mean over images: for a defended prediction, and beyond "
    "those for the proof (wrong predictions are not proven)",
    "ci95": "Wilson score interval, 95 %",
}


def certificate(masks: MaskSet, correct: Flags, answers: Answers, labels: Labels) -> dict[str, Any]:
    """What was proven: the part of the document that says nothing of artifact, data and machine.

    correct: (N,) bool, classified correctly by the engine alone. answers: with proofs. labels: (N,) the right ones.
    """
    right = answers.labels == labels
    return {
        "method": METHOD,
        "definitions": DEFINITIONS,
        "patch_size": list(masks.patch),
        "masks": {
            "count": len(masks), "size": list(masks.size), "rows": list(masks.starts[0]),
            "columns": list(masks.starts[1]), "fill": list(masks.fill),
        },
        "n": len(labels),
        "clean": share(correct),
        "defended": share(right),
        "certified": share(answers.certified & right),
        "engine_calls": {
            "predicting": float(answers.predicting.mean()), "proving": float(answers.proving.mean()),
            "total": int(answers.predicting.sum() + answers.proving.sum()),
        },
    }  # fmt: skip


def share(flags: Flags) -> dict[str, Any]:
    """A share of all judged images, with its interval."""
    count = int(np.count_nonzero(flags))
    return {"accuracy": count / len(flags), "correct": count, "ci95": list(wilson(count, len(flags)))}


def format_certificate(document: Mapping[str, Any]) -> str:
    """The summary that the command line prints."""
    height, width = document["patch_size"]
    masks, calls = document["masks"], document["engine_calls"]
    lines = [
        f"{document['artifact']['name']}: certificate against any patch of at most {height}x{width} pixels, at any place",
        f"{document['n']} images of {document['data']['name']}; {masks['count']} masks of "
        f"{masks['size'][0]}x{masks['size'][1]} pixels; {document['method']}",
        "",
        _row("engine alone, no patch", document["clean"]),
        _row("defended, no patch", document["defended"]),
        _row("certified", document["certified"]),
        "",
        f"engine calls per image: {calls['predicting']:.1f} to predict, {calls['proving']:.1f} more to prove; "
        f"{document['seconds']:.1f} s",
    ]
    lines += [_row(f"{entry['file']} at every place, engine alone", entry) for entry in document["every_place"]]
    check = document["attack_check"]
    if check is not None:
        verdict = "no contradiction" if not check["contradictions"] else f"{check['contradictions']} CONTRADICTIONS"
        lines.append(f"attack check: {check['attacked']} attacked versions of certified images: {verdict}")
    return "\n".join(lines)


def _row(name: str, entry: Mapping[str, Any]) -> str:
    low, high = entry["ci95"]
    return f"{name:<32} {entry['accuracy']:7.2%}  ({low:.2%} to {high:.2%}, 95 %)"
