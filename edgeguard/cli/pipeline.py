"""From a run to an artifact: what `export` and `demo` share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeguard import folders
from edgeguard.artifact import Artifact
from edgeguard.data import load_splits
from edgeguard.errors import InputError
from edgeguard.export import export_artifact
from edgeguard.export.lower import lower
from edgeguard.quant.width import parse_width
from edgeguard.run import Run
from edgeguard.targets.profiles import TargetProfile


def export_run(run: Run, bits: str, target: str | TargetProfile, out: Path, data: str | None = None,
               proof_images: int = 64, allow_float: bool = False, onnx_only: bool = False,
               repeat: int = 1) -> Artifact:  # fmt: skip
    """Lower, write and prove one width of a run.

    target: a profile, or what `load_profile` takes. data: where the proof's images come from; by default the test images
    of the run's own data. repeat: builds of a TensorRT plan.

    Raises:
        InputError: a width the run was not made for, or data of another image shape. ExportError: it does not lower, or
        the proof fails.
    """
    folders.new_folder(out)
    width = parse_width(bits)
    if width not in run.widths:
        names = ", ".join(str(known) for known in run.widths)
        raise InputError(f"{run.path} was not trained at {width} bits; its widths are {names}")
    if proof_images < 1:
        raise InputError(f"the proof needs at least one image, got {proof_images}")
    checkpoint_sha256 = run.checkpoint_sha256()
    training, model = _Training.of(run), run.load_model()
    shape = training.image_shape
    _, test = load_splits(data or training.data, training.image_size)
    if test.image_shape != shape:
        raise InputError(f"{data or training.data} has images of {test.image_shape}, the run was made with {shape}")
    images = test.images(np.arange(min(proof_images, len(test))))
    graph = lower(model, width, shape)
    if run.checkpoint_sha256() != checkpoint_sha256:
        raise InputError(f"{run.path} was trained further while it was read; export it when its training has ended")
    source = {
        "run_checkpoint_sha256": checkpoint_sha256,
        "method": training.method,
        "model": run.config["model"],
        "data": run.config["data"],
        "patch_sizes": training.patch_sizes,
        "seed": training.seed,
        "widths": [str(one) for one in run.widths],
        "versions": run.config["versions"],
    }
    return export_artifact(graph, out, target=target, width=str(width), activation_bits=width.activation,
                           weight_bits=run.scheme().weight_type("inner", width).bits, images=images, source=source,
                           allow_float=allow_float, onnx_only=onnx_only, repeat=repeat)  # fmt: skip


@dataclass(frozen=True)
class _Training:
    """What an export needs of how a run came about, whether it was trained or calibrated."""

    data: str
    image_size: int | None
    image_shape: tuple[int, int, int]
    method: str
    seed: int
    patch_sizes: list[int] | None

    @staticmethod
    def of(run: Run) -> _Training:
        """Raises InputError when the run's configuration lacks something, and says what."""
        training = run.config["training"]
        try:
            config = training["config"]
            channels, height, width = (int(side) for side in run.config["data"]["image_shape"])
            return _Training(str(training["data"]), training["image_size"], (channels, height, width),
                             str(config["method"]), config["seed"], training["patch_sizes"])  # fmt: skip
        except (KeyError, TypeError, ValueError) as exc:
            raise InputError(f"{run.path}: the configuration of the run cannot be read: {exc}") from exc
