"""`edgeguard attack`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeguard import files, folders
from edgeguard.artifact import Artifact
from edgeguard.cli.console import ConfigOption, JsonOption, OutOption, emit, log, output_folder, progress_bars
from edgeguard.cli.judged_data import judged_data
from edgeguard.cli.verify import Stages
from edgeguard.errors import InputError, require
from edgeguard.patch_files import save_pdf, save_png
from edgeguard.verify import VerifyOptions, accesses_of
from edgeguard.verify.craft import craft_universal

SCHEMA = "edgeguard.attack/1"
UNIVERSAL = ("a-qapa", "gap", "patch-rs")
PNG_SIDE = 512
"""Pixels of the enlarged picture, about."""


def attack(
    artifact: Annotated[Path, typer.Argument(help="The folder that `edgeguard export` wrote.")],
    data: Annotated[str | None, typer.Option(help="Images to craft on; by default what the model was trained on.")] = None,
    method: Annotated[str, typer.Option("--attack", help="a-qapa, gap or patch-rs.")] = "a-qapa",
    access: Annotated[str | None, typer.Option(help="transfer, engine or query; the strongest by default.")] = None,
    surrogate: Annotated[list[Path] | None, typer.Option(help="Artifact to craft on as well; may be repeated.")] = None,
    patch_size: Annotated[int, typer.Option(help="Side in pixels.")] = 8,
    steps: Annotated[int, typer.Option(help="Gradient steps.")] = 300,
    restarts: Annotated[int, typer.Option(help="Fresh starts; the best on the crafting images is kept.")] = 1,
    loss: Annotated[str, typer.Option(help="The attack's loss.")] = VerifyOptions.loss,
    optimizer: Annotated[str | None, typer.Option(help="momentum-sign, adam or sgd; the attack's own by default.")] = None,
    target: Annotated[int | None, typer.Option(help="Class to push every image to; none: away from its own.")] = None,
    queries: Annotated[int, typer.Option(help="Images shown to the engine, at query access.")] = 50_000,
    rotation: Annotated[float, typer.Option(help="Craft for rotations of up to so many degrees.")] = 0.0,
    scale: Annotated[float, typer.Option(help="Craft for sizes of 1 - SCALE to 1 + SCALE.")] = 0.0,
    brightness: Annotated[float, typer.Option(help="Craft for so many grey levels lighter or darker.")] = 0.0,
    noise: Annotated[float, typer.Option(help="Craft for camera noise of so many grey levels.")] = 0.0,
    side_mm: Annotated[float, typer.Option(help="Side of the printed patch in millimetres.")] = 80.0,
    limit: Annotated[int, typer.Option(help="Images to craft on at most.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    runtime: Annotated[str | None, typer.Option(help="ort, reference or twin; the artifact's own by default.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of the runtime; 0: its choice.")] = 0,
    out: OutOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Craft a universal patch, without a verdict: an npz to replay, a PNG, and a PDF to print at real size."""
    if method not in UNIVERSAL:
        raise InputError(f"unknown attack {method!r}; attacks with one patch for all images are {', '.join(UNIVERSAL)}")
    transforms = {"rotation_degrees": rotation, "scale": scale, "brightness": brightness, "noise": noise}
    options = VerifyOptions(
        attacks=(method,), accesses=(access or accesses_of((method,))[-1],), patch_sizes=(patch_size,), steps=steps,
        restarts=restarts, loss=loss, target=target, universal_queries=queries, craft_limit=limit, seed=seed,
        surrogates=tuple(surrogate or ()), runtime=runtime, threads=threads,
    )  # fmt: skip
    require("matplotlib", "report")
    source = Artifact.load(artifact)
    folder = folders.new_folder(output_folder(out, f"{source.path.resolve().name}-attack"))
    if options.differentiates:
        require("torch", "train")
    judged, crafted_of = judged_data(source, data, crafts=True)
    begin = time.perf_counter()
    with progress_bars() as progress:
        plan, made = craft_universal(source, crafted_of or judged, options, transforms, optimizer, Stages(progress))
    document: dict[str, Any] = {
        "schema": SCHEMA, "artifact": source.path.resolve().name, "plan": str(plan), "sha256": None, "patch_sha256": None,
        "attack": made.settings, "queries": made.found.queries, "gradients": made.found.gradients,
        "seconds": time.perf_counter() - begin, "command": ["edgeguard", *sys.argv[1:]],
    }  # fmt: skip
    patch = made.found.patch
    with folders.folder_transaction(folder) as part:
        patch.save(part / "patch.npz")
        save_png(patch, part / "patch.png")
        save_png(patch, part / "patch-large.png", max(1, PNG_SIDE // patch_size))
        save_pdf(patch, part / "patch.pdf", side_mm)
        document["sha256"], document["patch_sha256"] = files.sha256(part / "patch.npz"), patch.sha256
        files.write_json(part / "attack.json", document)
    log(f"replay it: edgeguard verify ARTIFACT --patch {folder / 'patch.npz'}")
    emit(document, f"{plan}: {folder / 'patch.npz'}, patch.png, patch-large.png, and patch.pdf at {side_mm:g} mm", as_json)
