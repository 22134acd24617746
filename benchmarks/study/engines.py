"""Exported engines and what is measured on them: the proof, clean accuracy, the certificate, and every attack."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard import files
from edgeguard.artifact import MANIFEST, Artifact
from edgeguard.attacks.api import Attack, Found
from edgeguard.attacks.lavan import LaVAN
from edgeguard.attacks.patch_rs import PatchRS
from edgeguard.attacks.per_image import PerImage
from edgeguard.certify import Defended, MaskSet, certificate
from edgeguard.cli.pipeline import export_run
from edgeguard.data import Dataset
from edgeguard.errors import InputError
from edgeguard.inspection import inspect_artifact
from edgeguard.patch import Patch
from edgeguard.run import CHECKPOINT, Run
from edgeguard.statistics import wilson
from edgeguard.targets import open_engine
from edgeguard.targets.twin import Twin
from edgeguard.verify import VerifyOptions
from edgeguard.verify.craft import craft_universal
from edgeguard.verify.harness import (
    Judged,
    Subject,
    judge_at,
    judge_everywhere,
    judge_pixels,
    judge_worst,
    logits_of,
    random_places,
)
from edgeguard.verify.prepare import split_images
from edgeguard.verify.propose import Plan, Workshop, noise
from edgeguard.verify.stages import Store
from study.cells import Cache, Cell
from study.grid import SEARCHES

BATCH = 100
SEED = 0
"""Of the judged images, their places and the attacks: the same for every engine, so that engines are compared in pairs."""
PROOF_IMAGES = 256
RUNTIME = "ort"
CATALOG = {"per-image": "a-qapa-per-image", "lavan": "lavan", "patch-rs": "patch-rs-per-image"}
"""Names of attacks per image in the catalog of `edgeguard verify`."""


@dataclass(frozen=True, eq=False)
class Bench:
    """Where engines are made and judged. data: where both data sets come from, as `--data` takes it."""

    cache: Cache
    work: Path
    train: Dataset
    test: Dataset
    data: str
    threads: int = 0

    def artifact(self, export: Cell, run: Path) -> Artifact:
        """The engine of an export's cell, exported anew where it is not on disk.

        run: the packed run of its training, or the run itself.

        Raises:
            InputError: that is not there either, or is another than the cell's.
        """
        folder = self.work / "artifacts" / f"{export.name}.{str(export.key)[:16]}"
        if folder.is_dir():
            return Artifact.load(folder)
        training = export.needs[0]
        wanted = export.inputs["checkpoint_sha256"]
        if not (run / CHECKPOINT).is_file() or files.sha256(Run.load(run).checkpoint) != wanted:
            raise InputError(
                f"the run of {training.name} is not at {run}, or is not the one that was measured; "
                f"delete {self.cache.path(training)} to train it again"
            )
        try:
            return export_run(
                Run.load(run), export.width, export.inputs["target"], folder, self.data, proof_images=PROOF_IMAGES
            )
        except InputError:
            if folder.is_dir():  # another worker was faster
                return Artifact.load(folder)
            raise

    def export(self, cell: Cell, run: Path) -> dict[str, Any]:
        """What the export has proved."""
        artifact = self.artifact(cell, run)
        described, source = inspect_artifact(artifact.path), artifact.manifest["source"]
        keys = ("integer_mac_coverage", "identical_to_reference", "macs", "file_bytes")
        return {
            **{key: described[key] for key in keys}, "manifest_sha256": files.sha256(artifact.path / MANIFEST),
            "patch_sizes": source.get("patch_sizes"), "proof_images": PROOF_IMAGES,
        }  # fmt: skip

    def accuracy(self, artifact: Artifact) -> dict[str, Any]:
        """On all test images."""
        correct = 0
        with open_engine(artifact, RUNTIME, self.threads) as engine:
            for start in range(0, len(self.test), BATCH):
                indices = np.arange(start, min(start + BATCH, len(self.test)))
                answers = logits_of(engine, self.test.images(indices), BATCH).argmax(1)
                correct += int((answers == self.test.labels[indices]).sum())
        return {"accuracy": correct / len(self.test), **share(correct, len(self.test))}

    def certificate(self, artifact: Artifact, inputs: dict[str, Any]) -> dict[str, Any]:
        """Double masking on the first judged images."""
        images, labels = self._judged(inputs["limit"])
        masks = MaskSet.of(images.shape[2:], (inputs["size"], inputs["size"]), inputs["masks"])
        with open_engine(artifact, RUNTIME, self.threads) as engine:
            subject = Subject.of(engine, images, labels, batch_size=BATCH)
            answers = Defended(subject.classify, masks, BATCH).answer(images, labels)
        found = certificate(masks, subject.correct, answers, labels)
        return {key: found[key] for key in ("n", "patch_size", "clean", "defended", "certified", "engine_calls")}

    def craft(self, artifact: Artifact, inputs: dict[str, Any]) -> dict[str, Any]:
        """One universal patch through the engine, on training images that are not among the judged ones."""
        options = VerifyOptions(
            attacks=(inputs["method"],), accesses=("engine",), patch_sizes=(inputs["size"],), steps=inputs["steps"],
            attack_batch=inputs["attack_batch"], restarts=inputs["restarts"], craft_limit=inputs["craft_limit"],
            limit=inputs["reserved"], seed=SEED, batch_size=BATCH, runtime=RUNTIME, threads=self.threads,
        )  # fmt: skip
        split = split_images(self.test, self.train, options)
        plan, made = craft_universal(artifact, split.crafted_of.subset(split.crafted), options, {})
        patch = made.found.patch
        return {
            "pixels": _base64(patch.pixels.tobytes()), "mask": _base64(patch.mask.astype(np.uint8).tobytes()),
            "size": inputs["size"], "sha256": patch.sha256, "access": plan.access, "queries": made.found.queries,
            "gradients": made.found.gradients,
            "settings": {key: value for key, value in made.settings.items() if not dataclasses.is_dataclass(value)},
        }  # fmt: skip

    def attack(self, artifact: Artifact, inputs: dict[str, Any], patches: dict[str, Patch]) -> dict[str, Any]:
        """The verdict on one attack. patches: the universal ones, by the width that each was crafted at.

        Returns: `asr`, `successes`, `n` (images that count), `ci95` and `robust_accuracy` of the strongest source;
        `rows` of all sources; `judged` images; and `eligible` and `fooled`, flags of these images as hexadecimal bits.
        """
        images, labels = self._judged(inputs["limit"])
        with open_engine(artifact, RUNTIME, self.threads) as engine:
            subject = Subject.of(engine, images, labels, batch_size=BATCH)
            if inputs["method"] in SEARCHES:
                found = _searched(subject, artifact, inputs)
                verdicts = [("own", judge_pixels(subject, found.pixels, found.mask, _places(found)), {})]
                spent = {"queries": found.queries, "gradients": found.gradients}
            else:
                given = patches or {"random pixels": noise(inputs["size"], SEED)}
                verdicts = [(source, *_placed(subject, patch, inputs)) for source, patch in given.items()]
                spent = {}
        return _verdict(verdicts) | spent | {"judged": len(images)}

    def _judged(self, limit: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The first of the test images in the order that `edgeguard verify` draws with the seed."""
        order = np.random.default_rng(SEED).permutation(len(self.test))[:limit]
        return self.test.images(order), self.test.labels[order]


def share(successes: int, n: int) -> dict[str, Any]:
    return {"successes": successes, "n": n, "ci95": list(wilson(successes, n))}


def decode_patch(result: dict[str, Any]) -> Patch:
    """The patch of a `craft` cell."""
    size = int(result["size"])
    pixels = np.frombuffer(base64.b64decode(result["pixels"]), np.uint8).reshape(3, size, size)
    mask = np.frombuffer(base64.b64decode(result["mask"]), np.uint8).reshape(size, size).astype(bool)
    return Patch(pixels, mask)


def _searched(subject: Subject, artifact: Artifact, inputs: dict[str, Any]) -> Found:
    """A patch for each judged image that counts, through the engine's values and its twin's gradients, or queries."""
    method, size = inputs["method"], inputs["size"]
    attack: Attack
    if method == "per-image":
        attack = PerImage(
            size, inputs["steps"], restarts=inputs["restarts"], batch_size=inputs["attack_batch"], seed=SEED
        )
    elif method == "lavan":
        attack = LaVAN(size, inputs["steps"], seed=SEED)
    else:
        attack = PatchRS(size, inputs["queries"], batch_size=inputs["attack_batch"], seed=SEED)
    access = "query" if method == "patch-rs" else "engine"
    name = CATALOG[method]
    options = VerifyOptions(attacks=(name,), accesses=(access,), patch_sizes=(size,), limit=len(subject.images),
                            per_image_limit=len(subject.images), seed=SEED, batch_size=BATCH)  # fmt: skip
    twins = {} if access == "query" else {artifact.width: Twin(artifact.graph()).eval().requires_grad_(False)}
    workshop = Workshop(subject, artifact.width, twins, subject.images[:0], subject.labels[:0])
    plan = Plan(attack.name, access, size, artifact.width, access == "engine", name)
    return workshop.craft(plan, options, Store(None, None).checkpoint(plan.stage()), None, attack)


def _places(found: Found) -> NDArray[np.int64]:
    if found.positions is None:
        raise InputError("an attack per image must say where its patches go")
    return found.positions


def _placed(subject: Subject, patch: Patch, inputs: dict[str, Any]) -> tuple[Judged, dict[str, Any]]:
    """A universal patch at the places of the attack; for corners besides that the mean over them."""
    if inputs["placement"] == "random":
        return judge_at(subject, patch, random_places(subject, patch, SEED)), {}
    if inputs["placement"] == "worst":
        return judge_worst(subject, patch, inputs["stride"]), {}
    stride = max(1, *(big - small for big, small in zip(subject.shape, patch.size, strict=True)))
    judged = judge_worst(subject, patch, stride)
    _, fooled = judge_everywhere(subject, patch, stride)
    return judged, {"mean_over_corners": float(fooled.mean())}


def _verdict(verdicts: Sequence[tuple[str, Judged, dict[str, Any]]]) -> dict[str, Any]:
    """Aggregated over sources: the largest ASR, the first of equals."""
    rows = [
        {"source": source, "asr": judged.asr, **share(judged.successes, judged.n),
         "robust_accuracy": judged.robust_accuracy, "places": judged.places, **more}
        for source, judged, more in verdicts
    ]  # fmt: skip
    best = max(range(len(rows)), key=lambda index: float(rows[index]["asr"]))
    judged = verdicts[best][1]
    return {**rows[best], "rows": rows, "eligible": _bits(judged.eligible), "fooled": _bits(judged.fooled)}


def _bits(flags: NDArray[np.bool_]) -> str:
    """Flags as hexadecimal, eight to a byte, the first in the highest bit."""
    return np.packbits(flags).tobytes().hex()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
