"""`edgeguard certify`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.progress import Progress

import edgeguard
from edgeguard import files, folders
from edgeguard.artifact import Artifact
from edgeguard.certify import SCHEMA, Defended, MaskSet, certificate, contradictions, format_certificate
from edgeguard.certify.document import share
from edgeguard.cli.console import ConfigOption, JsonOption, OutOption, emit, integers, log, output_folder, progress_bars
from edgeguard.cli.judged_data import data_of
from edgeguard.cli.remote import (
    AuthorityOption,
    InFlightOption,
    PatienceOption,
    PixelMaxOption,
    RateOption,
    TargetArgument,
    TimeoutOption,
    TokenOption,
    TwinOption,
    name_of,
    opened,
)
from edgeguard.data import check_labels
from edgeguard.errors import InputError
from edgeguard.patch import Patch, apply_patch, check_fits, grid_positions, random_positions, square
from edgeguard.targets import Engine
from edgeguard.verify.deployed import check_runtime, open_target, shape_of, target_block
from edgeguard.verify.harness import Subject, judge_worst

CONTRADICTED = 1
CERTIFICATE = "certificate.json"


@dataclass(frozen=True, eq=False)
class AttackCheck:
    """Which attacked versions of certified images are tried. patches: by name; None is fresh noise for every image.

    places: random ones for each image and patch; 0 tries every place there is.
    """

    patches: dict[str, Patch | None]
    places: int
    seed: int


def certify(
    artifact: TargetArgument,
    patch_size: Annotated[
        str, typer.Option(help="Largest patch to certify against, in pixels: 5, or 5x8 (rows x columns).")
    ] = "5",
    masks: Annotated[int, typer.Option(help="Masks along each axis; more are smaller, and take more calls.")] = 6,
    fill: Annotated[str, typer.Option(help="What masks paint: a grey level, or red,green,blue.")] = "127",
    data: Annotated[str | None, typer.Option(help="Labelled images; by default what the model was trained on.")] = None,
    patch: Annotated[
        list[Path] | None, typer.Option(help="Patch file (npz) to try at every place; may be repeated.")
    ] = None,
    attack_check: Annotated[
        bool, typer.Option("--attack-check", help="Attack certified images; a wrong answer gives exit code 1.")
    ] = False,
    attack_places: Annotated[int, typer.Option(help="Random places per image and patch of that check; 0: all.")] = 8,
    limit: Annotated[int, typer.Option(help="Images to judge at most; 0: all.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    batch_size: Annotated[int, typer.Option(help="The batch the engine is deployed with.")] = 50,
    runtime: Annotated[
        str | None, typer.Option(help="ort, openvino, trt, reference or twin; its own by default.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of the runtime; 0: its choice.")] = 0,
    twin: TwinOption = None,
    token_file: TokenOption = None,
    tls_ca: AuthorityOption = None,
    timeout: TimeoutOption = None,
    patience: PatienceOption = None,
    in_flight: InFlightOption = None,
    rate: RateOption = None,
    pixel_max: PixelMaxOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Prove for how many images no patch of a size, anywhere, changes the answer of the engine behind masks."""
    if min(limit, attack_places, seed) < 0 or batch_size < 1:
        raise InputError("--limit, --attack-places and --seed must be 0 or more, and --batch-size at least 1")
    remote = {"timeout": timeout, "patience": patience, "in_flight": in_flight, "rate": rate, "pixel_max": pixel_max}
    source = opened(artifact, Artifact.load, twin, token_file, tls_ca, **remote)
    check_runtime(source, runtime, threads)
    folder = folders.new_folder(output_folder(out, f"{name_of(source)}-certify"))
    dataset, _ = data_of(source, data, False)
    shape = shape_of(source, dataset.image_shape)
    if dataset.image_shape != shape:
        raise InputError(f"{dataset.name} has images of shape {dataset.image_shape}, but the artifact takes {shape}")
    _, height, width = shape
    mask_set = MaskSet.of((height, width), _sides(patch_size), masks, _colour(fill))
    patches = {path.name: Patch.load(path) for path in patch or ()}
    if len(patches) != len(patch or ()):
        raise InputError("two patch files have one name; rename one, so that the results can be told apart")
    for one in patches.values():
        check_fits(one.size if not attack_check else _certified_size(one, mask_set), (height, width))
    check = AttackCheck({**patches, "noise": None}, attack_places, seed) if attack_check else None
    order = np.random.default_rng(seed).permutation(len(dataset)).astype(np.int64)[: limit or None]
    with progress_bars() as progress, open_target(source, shape, runtime, threads) as engine:
        check_labels(dataset, engine.num_classes)
        subject = Subject.of(engine, dataset.images(order), dataset.labels[order], batch_size=batch_size)
        measured = _measure(subject, mask_set, patches, check, progress)
        document = {
            "schema": SCHEMA, "edgeguard": edgeguard.__version__, "artifact": target_block(source),
            "data": {"name": dataset.name, "sha256": dataset.sha256, "images": len(order), "seed": seed},
            **measured, "options": _options(patch_size, masks, fill, limit, seed, batch_size, attack_places, threads, patches),
            "environment": _environment(engine),
        }  # fmt: skip
    with folders.folder_transaction(folder) as target:
        files.write_json(target / CERTIFICATE, document)
    emit(document, f"{format_certificate(document)}\ncertificate: {folder / CERTIFICATE}", as_json)
    if check is not None and document["attack_check"]["contradictions"]:
        log("the certificate is contradicted: certified images were answered wrongly under an attack; check that the "
            "engine answers the same image always the same")  # fmt: skip
        raise typer.Exit(CONTRADICTED)


def _measure(
    subject: Subject, masks: MaskSet, patches: dict[str, Patch], check: AttackCheck | None, progress: Progress
) -> dict[str, Any]:
    """All that is measured: certificate, given patches at every place, and attacks on what is certified."""
    defended = Defended(subject.classify, masks, subject.batch_size)
    begin = time.perf_counter()
    bar = progress.add_task("certificate", total=len(subject.images), note="images")
    answers = defended.answer(subject.images, subject.labels, tick=lambda done, _: progress.update(bar, completed=done))
    proven = certificate(masks, subject.correct, answers, subject.labels)
    seconds = time.perf_counter() - begin
    rows = np.flatnonzero(answers.certified)
    return {
        **proven,
        "seconds": seconds,
        "every_place": [_every_place(subject, name, one, progress) for name, one in patches.items()],
        "attack_check": None if check is None else _attack(defended, subject, rows, check, progress),
    }


def _every_place(subject: Subject, name: str, patch: Patch, progress: Progress) -> dict[str, Any]:
    """The engine alone against one patch at every place there is: exact, and of this patch only."""
    bar = progress.add_task(f"{name} at every place", total=None, note="places")
    judged = judge_worst(subject, patch, 1, lambda done, total: progress.update(bar, completed=done, total=total))
    return {"file": name, "patch_size": list(patch.size), "places": judged.places, **share(judged.robust)}


def _attack(
    defended: Defended, subject: Subject, rows: NDArray[np.int64], check: AttackCheck, progress: Progress
) -> dict[str, Any]:
    """Count the attacked versions of certified images (those at `rows`) that the defended prediction gets wrong."""
    images, labels = subject.images[rows], subject.labels[rows]
    attacked, broken = 0, 0
    for number, (name, patch) in enumerate(check.patches.items()):
        size = defended.masks.patch if patch is None else patch.size
        rng = np.random.default_rng([check.seed, number])
        versions = check.places or len(grid_positions(subject.shape, size, 1))
        bar = progress.add_task(f"attack check, {name}", total=versions, note="versions")
        for positions in _placements(len(rows), subject.shape, size, check.places, rng) if len(rows) else ():
            used = square(rng.integers(0, 256, (3, *size), np.uint8)) if patch is None else patch
            patched = apply_patch(images, used.pixels, used.mask, positions)
            wrong = contradictions(np.ones(len(rows), bool), defended.predict, patched, labels)
            attacked, broken = attacked + len(rows), broken + int(wrong.sum())
            progress.update(bar, advance=1)
    return {
        "patches": list(check.patches), "places": check.places or "all", "seed": check.seed,
        "attacked": attacked, "contradictions": broken,
    }  # fmt: skip


def _placements(
    count: int, image: tuple[int, int], size: tuple[int, int], places: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Places (count, 2) of one attacked version after the other: random ones, or every one for all images."""
    if places:
        yield from (random_positions(count, image, size, rng) for _ in range(places))
    else:
        yield from (np.tile(place, (count, 1)) for place in grid_positions(image, size, 1))


def _certified_size(patch: Patch, masks: MaskSet) -> tuple[int, int]:
    """The size of a patch that the attack check may use."""
    if patch.size[0] > masks.patch[0] or patch.size[1] > masks.patch[1]:
        raise InputError(
            f"--attack-check takes patches of at most the certified {masks.patch[0]}x{masks.patch[1]} pixels, "
            f"got one of {patch.size[0]}x{patch.size[1]}; raise --patch-size"
        )
    return patch.size


def _sides(text: str) -> tuple[int, int]:
    sides = integers(text.replace("x", ","), "--patch-size")
    if len(sides) > 2:
        raise InputError(f"--patch-size {text!r} is neither a side, as 5, nor rows and columns, as 5x8")
    return sides[0], sides[-1]


def _colour(text: str) -> tuple[int, int, int]:
    values = integers(text, "--fill")
    if len(values) not in (1, 3):
        raise InputError(f"--fill {text!r} is neither a grey level, as 127, nor red,green,blue")
    return values[0], values[len(values) // 2], values[-1]


def _options(
    patch_size: str, masks: int, fill: str, limit: int, seed: int, batch_size: int, attack_places: int, threads: int,
    patches: dict[str, Patch],
) -> dict[str, Any]:  # fmt: skip
    return {
        "patch_size": patch_size, "masks": masks, "fill": fill, "limit": limit, "seed": seed, "batch_size": batch_size,
        "attack_places": attack_places, "threads": threads, "patch": list(patches),
    }  # fmt: skip


def _environment(engine: Engine) -> dict[str, Any]:
    versions = {"edgeguard": edgeguard.__version__, "numpy": np.__version__}
    return {"versions": versions, "engine": engine.describe(), "command": ["edgeguard", *sys.argv[1:]]}
