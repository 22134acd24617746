"""`edgeguard attack`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edgeguard import folders
from edgeguard.artifact import Artifact
from edgeguard.attacks.api import Found
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
from edgeguard.cli.verify import Stages
from edgeguard.errors import require
from edgeguard.patch_files import save_pdf, save_png
from edgeguard.verify import VerifyOptions, accesses_of
from edgeguard.verify.bundle import write_bundle
from edgeguard.verify.catalog import entry
from edgeguard.verify.craft import craft
from edgeguard.verify.deployed import check_target
from edgeguard.verify.prepare import split_images

PNG_SIDE = 512
"""Pixels of the enlarged picture, about."""


def attack(
    artifact: TargetArgument,
    data: Annotated[str | None, typer.Option(help="Labelled images; by default what the model was trained on.")] = None,
    method: Annotated[
        str,
        typer.Option("--attack", help="a-qapa, a-qapa-per-image, gap, lavan, patch-rs, patch-rs-per-image; comma-separated."),
    ] = "a-qapa",
    access: Annotated[
        str | None, typer.Option(help="transfer, engine, query; comma-separated. The strongest of each attack by default.")
    ] = None,
    surrogate: Annotated[list[Path] | None, typer.Option(help="Artifact to craft on as well; may be repeated.")] = None,
    patch_size: Annotated[str, typer.Option(help="Sides in pixels, comma-separated.")] = "8",
    steps: Annotated[int, typer.Option(help="Gradient steps.")] = 300,
    restarts: Annotated[int, typer.Option(help="Fresh starts; the best on the crafting images is kept.")] = 1,
    loss: Annotated[str, typer.Option(help="The attack's loss.")] = VerifyOptions.loss,
    optimizer: Annotated[str | None, typer.Option(help="momentum-sign, adam or sgd; the attack's own by default.")] = None,
    target: Annotated[int | None, typer.Option(help="Class to push every image to; none: away from its own.")] = None,
    queries: Annotated[int, typer.Option(help="Images shown to the engine for a universal patch, at query access.")] = 50_000,
    image_queries: Annotated[int, typer.Option(help="Images shown to the engine for each image's own patch.")] = 1000,
    rotation: Annotated[float, typer.Option(help="Craft for rotations of up to so many degrees.")] = 0.0,
    scale: Annotated[float, typer.Option(help="Craft for sizes of 1 - SCALE to 1 + SCALE.")] = 0.0,
    brightness: Annotated[float, typer.Option(help="Craft for so many grey levels lighter or darker.")] = 0.0,
    noise: Annotated[float, typer.Option(help="Craft for camera noise of so many grey levels.")] = 0.0,
    side_mm: Annotated[float, typer.Option(help="Side of the printed patch in millimetres.")] = 80.0,
    limit: Annotated[int, typer.Option(help="Images to craft on at most.")] = 2000,
    judge_limit: Annotated[int, typer.Option(help="Images that the bundle is to be judged on at most; 0: all.")] = 1000,
    per_image_limit: Annotated[int, typer.Option(help="How many of them get patches of their own at most.")] = 200,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    runtime: Annotated[str | None, typer.Option(help="ort, reference or twin; the artifact's own by default.")] = None,
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
    """Craft patches, without a verdict: a bundle that `verify` replays on the device, without a training framework.

    The images that it is to be judged on are in it, by number; none of them is crafted on, but by attacks per image.
    A patch for all images is written as a PNG as well, and as a PDF to print at real size.
    """
    remote = {"timeout": timeout, "patience": patience, "in_flight": in_flight, "rate": rate, "pixel_max": pixel_max}
    methods = tuple(method.split(","))
    strongest = tuple(dict.fromkeys(accesses_of((name,))[-1] for name in methods if entry(name)))
    options = VerifyOptions(
        attacks=methods, accesses=tuple(access.split(",")) if access else strongest, steps=steps, restarts=restarts, loss=loss,
        patch_sizes=integers(patch_size, "--patch-size"), target=target, universal_queries=queries, queries=image_queries,
        craft_limit=limit, limit=judge_limit or None, per_image_limit=per_image_limit, seed=seed,
        surrogates=tuple(surrogate or ()), runtime=runtime, threads=threads,
    )  # fmt: skip
    transforms = {"rotation_degrees": rotation, "scale": scale, "brightness": brightness, "noise": noise}
    if options.universal:
        require("matplotlib", "report")
    source = opened(artifact, Artifact.load, twin, token_file, tls_ca, **remote)
    check_target(source, options)
    folder = folders.new_folder(output_folder(out, f"{name_of(source)}-attack"))
    if options.differentiates:
        require("torch", "train")
    split = split_images(*data_of(source, data, options.universal), options)
    with progress_bars() as progress:
        made = craft(source, split, options, transforms, optimizer, Stages(progress))
    names = ["patch"] if len(made) == 1 else [f"patch-{number}" for number in range(1, len(made) + 1)]
    with folders.folder_transaction(folder) as part:
        document = write_bundle(
            part, source, split, options,
            [(f"{name}.npz", one.plan, one.found, one.settings) for name, one in zip(names, made, strict=True)],
            ["edgeguard", *sys.argv[1:]],
        )  # fmt: skip
        for name, one in zip(names, made, strict=True):
            if not one.found.per_image:
                _pictures(part / name, one.found, side_mm)
    log(f"replay it, here or on the device: edgeguard verify ARTIFACT --bundle {folder}")
    lines = [
        f"{one.plan}: {folder / name}.npz" + ("" if one.found.per_image else f", .png, -large.png, and .pdf at {side_mm:g} mm")
        for name, one in zip(names, made, strict=True)
    ]
    emit(document, "\n".join(lines), as_json)


def _pictures(stem: Path, found: Found, side_mm: float) -> None:
    """A PNG to replay, a larger one to look at, and a page to print."""
    patch = found.patch
    save_png(patch, stem.with_name(f"{stem.name}.png"))
    save_png(patch, stem.with_name(f"{stem.name}-large.png"), max(1, PNG_SIDE // max(patch.size)))
    save_pdf(patch, stem.with_name(f"{stem.name}.pdf"), side_mm)
