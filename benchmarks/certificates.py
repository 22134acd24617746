"""Certified accuracy of deployed engines, and every attack of ours against the certificates.

    python benchmarks/certificates.py --artifact qadt-r-8=DIR --artifact qadt-r-4=DIR --data npz:cifar10-{split}.npz \\
        --out benchmarks/results/certificates.json

For each engine: PatchCleanser's double masking on --limit test images against patches of --patch-size, and then, on every
certified image, patches of that size made for the engine itself: A-QAPA per image at the place that it chooses, LaVAN,
Patch-RS per image, universal A-QAPA and GAP at random places, and random pixels. The undefended engine falls for most of
them; the defended prediction must be right on all, for that is what the certificate says.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard import files
from edgeguard.artifact import MANIFEST, Artifact
from edgeguard.attacks.api import Attack, Found, Victim
from edgeguard.attacks.aqapa import AQAPA
from edgeguard.attacks.gap import GAP
from edgeguard.attacks.lavan import LaVAN
from edgeguard.attacks.patch_rs import PatchRS
from edgeguard.attacks.per_image import PerImage
from edgeguard.certify import Defended, MaskSet, contradictions
from edgeguard.data import Dataset, load_splits
from edgeguard.patch import apply_patch, random_positions
from edgeguard.statistics import wilson
from edgeguard.targets import Engine, cpu_flags, open_engine
from edgeguard.targets.twin import Twin

CRAFT, STEPS, QUERIES = 1000, 100, 500


def attacks(size: int) -> list[Attack]:
    return [PerImage(size), LaVAN(size, STEPS), PatchRS(size, QUERIES), AQAPA(size, STEPS), GAP(size, STEPS)]


def rate(successes: int, n: int) -> dict[str, Any]:
    return {"share": successes / n, "n": n, "ci95": list(wilson(successes, n))}


def attacked(found: Found, images: NDArray[np.uint8], places: NDArray[np.int64]) -> NDArray[np.uint8]:
    return apply_patch(images, found.pixels, found.mask, places if found.positions is None else found.positions)


def study(artifact: Artifact, train: Dataset, test: Dataset, size: int, per_axis: int, limit: int) -> dict[str, Any]:
    """Certify one engine and attack what is certified."""
    chosen = np.random.default_rng(0).permutation(len(test))[:limit]
    images, labels = test.images(chosen), test.labels[chosen]
    crafting = np.random.default_rng(1).permutation(len(train))[:CRAFT]
    with open_engine(artifact, threads=1) as engine:
        defended = Defended(engine, MaskSet.of(images.shape[2:], (size, size), per_axis))
        begin = time.perf_counter()
        answers = defended.answer(images, labels)
        seconds = time.perf_counter() - begin
        certified = answers.certified & (answers.labels == labels)
        clean = np.concatenate([engine(images[start : start + 50]).argmax(1) for start in range(0, limit, 50)]) == labels
        result: dict[str, Any] = {
            "sha256": files.sha256(artifact.path / MANIFEST), "patch_size": size, "masks": len(defended.masks), "n": limit,
            "clean": rate(int(clean.sum()), limit), "defended": rate(int((answers.labels == labels).sum()), limit),
            "certified": rate(int(certified.sum()), limit), "seconds": seconds,
            "engine_calls": {"predicting": float(answers.predicting.mean()), "proving": float(answers.proving.mean())},
        }  # fmt: skip
        rows = np.flatnonzero(certified)
        result["attacks"] = against(
            engine, artifact, defended, (images[rows], labels[rows]), (train.images(crafting), train.labels[crafting]), size
        )
    return result


def against(engine: Engine, artifact: Artifact, defended: Defended, certified: tuple[Any, Any], crafting: tuple[Any, Any],
            size: int) -> list[dict[str, Any]]:  # fmt: skip
    """Each attack on the certified images: how often the engine alone and the defended prediction are wrong."""
    images, labels = certified
    places = random_positions(len(images), images.shape[2:], (size, size), np.random.default_rng(2))
    noise = np.random.default_rng(3).integers(0, 256, (len(images), 3, size, size), np.uint8)
    victims = {"gradients": Victim({artifact.width: Twin(artifact.graph()).eval()}), "logits": Victim(classify=engine)}
    found = [("random pixels", Found(noise, np.ones((size, size), bool)))]
    for attack in attacks(size):
        on = (images, labels) if attack.per_image else crafting
        proposal = attack.run(victims[attack.access], *on, positions=places if attack.per_image else None)
        found.append((attack.name + (", per image" if attack.per_image else ""), proposal))
    everyone, outcomes = np.ones(len(images), bool), []
    for name, proposal in found:
        patched = attacked(proposal, images, places)
        fooled = np.concatenate([engine(patched[i : i + 50]).argmax(1) for i in range(0, len(patched), 50)]) != labels
        beaten = contradictions(everyone, defended.predict, patched, labels)
        outcomes.append({"attack": name, "engine_alone_fooled": rate(int(fooled.sum()), len(images)),
                         "certificates_beaten": int(beaten.sum()), "n": len(images)})  # fmt: skip
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--data", required=True)
    parser.add_argument("--patch-size", type=int, default=5)
    parser.add_argument("--masks", type=int, default=6)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    train, test = load_splits(args.data)
    engines: dict[str, Any] = {}
    for name, _, folder in (entry.partition("=") for entry in args.artifact):
        engines[name] = study(Artifact.load(Path(folder)), train, test, args.patch_size, args.masks, args.limit)
        print(name, json.dumps({key: engines[name][key] for key in ("clean", "defended", "certified", "attacks")}), flush=True)
    document = {"schema": "edgeguard.benchmark.certificates/1", "cpu_flags": cpu_flags(), "engines": engines}
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
