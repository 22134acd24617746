"""From a run to an artifact: what `export` and `demo` share."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgeguard import files
from edgeguard.artifact import Artifact
from edgeguard.data import load_splits
from edgeguard.errors import InputError
from edgeguard.export import export_artifact
from edgeguard.export.lower import lower
from edgeguard.quant.width import parse_width
from edgeguard.run import Run


def export_run(run: Run, bits: str, target: str, out: Path, data: str | None = None, proof_images: int = 64,
               allow_float: bool = False) -> Artifact:  # fmt: skip
    """Lower, write and prove one width of a run.

    data: where the proof's images come from; by default the test images of the run's own data.

    Raises:
        InputError: a width the run was not trained at, or data of another image shape. ExportError: it does not lower, or
        the proof fails.
    """
    files.new_folder(out)
    width = parse_width(bits)
    if width not in run.widths:
        names = ", ".join(str(known) for known in run.widths)
        raise InputError(f"{run.path} was not trained at {width} bits; its widths are {names}")
    if proof_images < 1:
        raise InputError(f"the proof needs at least one image, got {proof_images}")
    shape = tuple(int(side) for side in run.config["data"]["image_shape"])
    training = run.config["training"]
    _, test = load_splits(data or training["data"], training["image_size"])
    if test.image_shape != shape:
        raise InputError(f"{data} has images of {test.image_shape}, the run was trained on {shape}")
    images = test.images(np.arange(min(proof_images, len(test))))
    graph = lower(run.load_model(), width, (shape[0], shape[1], shape[2]))
    patches = training["config"]["patches"]
    source = {
        "run_checkpoint_sha256": files.sha256(run.checkpoint),
        "method": training["config"]["method"],
        "model": run.config["model"],
        "data": run.config["data"],
        "patch_sizes": patches["sizes"] if patches else None,
        "seed": training["config"]["seed"],
        "versions": run.config["versions"],
    }
    return export_artifact(graph, out, target=target, width=str(width), weight_bits=width.weight,
                           activation_bits=width.activation, images=images, source=source,
                           allow_float=allow_float)  # fmt: skip
