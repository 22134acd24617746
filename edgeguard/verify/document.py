"""The parts of `report.json` that describe rather than measure, and the definitions that are printed with it."""

from __future__ import annotations

import base64
import hashlib
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import edgeguard
from edgeguard import files
from edgeguard.artifact import MANIFEST, Artifact
from edgeguard.attacks.api import Found
from edgeguard.data.dataset import Dataset
from edgeguard.patch import apply_patch
from edgeguard.report import SCHEMA
from edgeguard.statistics import wilson
from edgeguard.verify.harness import Judged, Subject
from edgeguard.verify.options import VerifyOptions
from edgeguard.verify.propose import Proposal

EXAMPLES = 6
UNTARGETED = (
    "ASR = P[engine(x_adv) != y | engine(x) = y]: of the images classified correctly, the share the patch flips"
)
TARGETED = "ASR = P[engine(x_adv) = t | y != t]: of the images not of the target's class, the share that become it"


def definitions(options: VerifyOptions) -> dict[str, str]:
    """What each figure of the report means, in one sentence each."""
    return {
        "asr": UNTARGETED if options.target is None else TARGETED,
        "robust_accuracy": "share of all judged images classified correctly without the patch and at every place tried",
        "ci95": "Wilson score interval, 95 %",
        "random": "one uniformly drawn place per image, the same for every patch of a size",
        "worst": f"an image is fooled when any place on a grid of stride {options.stride} fools it; exact on that grid",
        "optimized": "the attack chose a place for each image",
        "per-image": "a patch of its own for each image, crafted on that image; n is smaller than for universal patches",
        "transfer": "crafted on twins, not on the engine; at 'all widths' on all of them, more often where it fails",
        "engine": "values of the live engine, gradients of its twin (BPDA)",
        "query": "no gradient: the engine's " + ("labels" if options.decision_only else "logits") + " only",
        "survival": "engine against its differentiable twin, paired per image: Newcombe interval of the ASR "
        "difference, McNemar's exact test; survived = the upper end is at most 2 points, or all logits are identical",
    }


def artifact_block(artifact: Artifact) -> dict[str, Any]:
    """What was attacked, with hashes."""
    manifest = artifact.manifest
    coverage = manifest["proof"].get("integer_mac_coverage")
    keys = ("target", "width", "weight_bits", "activation_bits", "num_classes", "input_shape", "source", "files")
    return {
        "name": artifact.path.resolve().name,
        **{key: manifest[key] for key in keys},
        "integer_mac_coverage": float(coverage) if isinstance(coverage, int | float) else None,
        "sha256": files.sha256(artifact.path / MANIFEST),
    }


def seen_sizes(artifact: Artifact) -> list[int] | None:
    """Side lengths of the patches the model was trained against, or None when its artifact does not say."""
    sizes = artifact.manifest["source"].get("patch_sizes")
    return [int(size) for size in sizes] if isinstance(sizes, list) else None


def environment(engine: Mapping[str, Any], options: VerifyOptions, command: Sequence[str]) -> dict[str, Any]:
    """Versions, machine, seeds and the command; engine: what `Engine.describe` returned. No clock, no user name."""
    versions: dict[str, str | None] = {
        "edgeguard": edgeguard.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    for name in ("torch", "onnxruntime"):
        module = sys.modules.get(name)
        versions[name] = str(module.__version__) if module is not None else None
    return {
        "versions": versions,
        "platform": platform.platform(),
        "engine": dict(engine),
        "threads": options.threads,
        "seed": options.seed,
        "command": list(command),
    }


def options_block(options: VerifyOptions) -> dict[str, Any]:
    """Every option, files by their names."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(options).items()}
    for key in ("replay", "surrogates"):
        plain[key] = [Path(path).name for path in plain[key]]
    plain["bundle"] = None if options.bundle is None else options.bundle.resolve().name
    return plain


def share(successes: int, n: int) -> tuple[float, list[float]]:
    """A share and its interval."""
    return successes / n, list(wilson(successes, n))


def accuracy_block(subject: Subject) -> dict[str, Any]:
    """Clean accuracy of an engine or a twin."""
    n = len(subject.images)
    accuracy, ci95 = share(int(subject.correct.sum()), n)
    return {"accuracy": accuracy, "n": n, "ci95": ci95}


def attack_row(
    proposal: Proposal, number: int | None, placement: str, judged: Judged, options: VerifyOptions, seen: list[int] | None
) -> dict[str, Any]:
    """One entry of `attacks`; `twin_asr` and `survival` are filled in where there is a twin.

    number: of the universal patch; None where every image has its own.
    """
    asr, plan = judged.asr, proposal.plan
    robust, robust_ci95 = share(int(judged.robust.sum()), len(judged.robust))
    size = max(proposal.found.mask.shape)
    return {
        "name": plan.name,
        "access": plan.access,
        "scope": "per-image" if proposal.found.per_image else "universal",
        "patch_size": size,
        "placement": placement,
        "seen": None if seen is None else size in seen,
        "asr": asr,
        "ci95": list(wilson(judged.successes, judged.n)),
        "robust_accuracy": robust,
        "robust_ci95": robust_ci95,
        "robust_n": len(judged.robust),
        "n": judged.n,
        "twin_asr": None,
        "queries": proposal.found.queries,
        "steps": proposal.steps,
        "last_restart": proposal.found.last_restart,
        "source": plan.source,
        "target": options.target,
        "places": judged.places,
        "stride": options.stride if placement == "worst" else None,
        "patch": number,
        "survival": None,
    }


def patch_block(proposal: Proposal) -> dict[str, Any]:
    """A patch with its pixels: base64 of (3, h, w) uint8 and of the (h, w) mask as 0 and 1."""
    patch = proposal.found.patch
    return {
        "height": patch.size[0],
        "width": patch.size[1],
        "pixels": _base64(patch.pixels.tobytes()),
        "mask": _base64(patch.mask.astype(np.uint8).tobytes()),
        "sha256": proposal.sha256,
    }


def examples(
    dataset: Dataset, indices: np.ndarray[Any, Any], subject: Subject, found: Found, engine: Judged, twin: Judged | None
) -> list[dict[str, Any]]:
    """The first images that count, patched, with what engine and twin say; pixels: base64 of (3, H, W) uint8.

    indices: (N,), of the subject's images in the data set.
    """
    chosen = np.flatnonzero(engine.eligible)[:EXAMPLES]
    pixels = found.pixels[chosen] if found.per_image else found.pixels
    patched = apply_patch(subject.images[chosen], pixels, found.mask, engine.positions[chosen])

    def named(label: int) -> dict[str, Any]:
        names = dataset.class_names
        return {"class": label, "name": names[label] if label < len(names) else str(label)}

    return [
        {
            "index": int(indices[row]),
            "height": image.shape[1],
            "width": image.shape[2],
            "pixels": _base64(image.tobytes()),
            "position": engine.positions[row].tolist(),
            "label": named(int(subject.labels[row])),
            "clean": named(int(subject.clean[row].argmax())),
            "engine": named(int(engine.logits[row].argmax())),
            "twin": None if twin is None else named(int(twin.logits[row].argmax())),
            "fooled": bool(engine.fooled[row]),
        }
        for row, image in zip(chosen, patched, strict=True)
    ]


def digest_of_indices(indices: np.ndarray[Any, Any]) -> str:
    """SHA-256 of which images, in which order: (N,) int64."""
    return hashlib.sha256(np.ascontiguousarray(indices, "<i8").tobytes()).hexdigest()


def header() -> dict[str, Any]:
    """Which schema the document is of, and who wrote it."""
    return {"schema": SCHEMA, "edgeguard": edgeguard.__version__}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
