"""Before anything is attacked: check that everything fits, split the images, and build the twins."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.artifact import Artifact
from edgeguard.data.dataset import Dataset, check_labels
from edgeguard.errors import InputError, require
from edgeguard.patch import check_fits
from edgeguard.verify.options import VerifyOptions

if TYPE_CHECKING:
    from edgeguard.targets.twin import Twin


BLOCK = 256


@dataclass(frozen=True, eq=False)
class Split:
    """Where the images come from: indices into `judged_of` and `crafted_of`, which may be one data set."""

    judged_of: Dataset
    judged: NDArray[np.int64]
    crafted_of: Dataset
    crafted: NDArray[np.int64]


def check_data(artifact: Artifact, dataset: Dataset, craft_data: Dataset | None, options: VerifyOptions) -> None:
    """Raises InputError when images, labels, target or patch sizes do not fit the artifact."""
    channels, height, width = artifact.manifest["input_shape"]
    check_images_fit((channels, height, width), int(artifact.manifest["num_classes"]), dataset, craft_data, options)


def check_images_fit(
    shape: tuple[int, int, int], classes: int, dataset: Dataset, craft_data: Dataset | None, options: VerifyOptions
) -> None:
    """As `check_data`, for a model that takes images of a shape and knows so many classes."""
    for data in (dataset, craft_data):
        if data is None:
            continue
        if data.image_shape != shape:
            raise InputError(f"{data.name} has images of shape {data.image_shape}, but the artifact takes {shape}")
        check_labels(data, classes)
    if options.target is not None and options.target >= classes:
        raise InputError(f"target {options.target} is none of the artifact's {classes} classes")
    if options.crafts:
        for size in options.patch_sizes:
            check_fits((size, size), (shape[1], shape[2]))


def load_surrogates(artifact: Artifact, options: VerifyOptions) -> list[Artifact]:
    """Load the surrogates and check that they take the same images and know the same classes."""
    loaded = [Artifact.load(path) for path in options.surrogates]
    for other in loaded:
        for key in ("input_shape", "num_classes"):
            if other.manifest[key] != artifact.manifest[key]:
                raise InputError(
                    f"the surrogate {other.path} has {key} {other.manifest[key]}, the artifact {artifact.manifest[key]}"
                )
    widths = [artifact.width, *(other.width for other in loaded)]
    if len(set(widths)) != len(widths):
        raise InputError(f"artifact and surrogates must be of different widths, got {', '.join(widths)}")
    return loaded


def split_images(
    dataset: Dataset, craft_data: Dataset | None, options: VerifyOptions, given: NDArray[np.int64] | None = None
) -> Split:
    """Draw the judged images and, from all others, those to craft on; no image is among both, not even as a copy.

    given: (N,) the images to judge, which then are not drawn.

    Raises:
        InputError: when nothing is left to craft on.
    """
    rng = np.random.default_rng(options.seed)
    order = rng.permutation(len(dataset)).astype(np.int64)
    limit, half = options.limit or len(dataset), len(dataset) // 2
    if given is not None:
        order, limit, half = np.concatenate([given, order[~np.isin(order, given)]]), len(given), len(given)
    if not options.universal:
        return Split(dataset, order[:limit], dataset, order[:0])
    if craft_data is None or craft_data.sha256 == dataset.sha256:
        judged = order[: min(limit, half)]
        source, pool = dataset, order[len(judged) :]
    else:
        judged = order[:limit]
        source, pool = craft_data, rng.permutation(len(craft_data)).astype(np.int64)
    pool = pool[: options.craft_limit]
    taken = set(_digests(dataset, judged))
    chosen = pool[[digest not in taken for digest in _digests(source, pool)]]
    if not len(chosen) or not len(judged):
        raise InputError(
            f"{dataset.name} has too few images: crafting and judging need different ones, at least one each"
        )
    return Split(dataset, judged, source, chosen)


def _digests(dataset: Dataset, indices: NDArray[np.int64]) -> list[bytes]:
    """SHA-256 of the pixels of every image."""
    parts = [indices[start : start + BLOCK] for start in range(0, len(indices), BLOCK)]
    return [hashlib.sha256(image.tobytes()).digest() for part in parts for image in dataset.images(part)]


def build_twins(artifact: Artifact | None, surrogates: list[Artifact], options: VerifyOptions) -> dict[str, Twin]:
    """The twins by the name of their width, the artifact's own first; none without torch when nothing is crafted.

    artifact: None where there is none, and then no twin.
    """
    if artifact is None:
        return {}
    if options.differentiates:
        require("torch", "train")
    elif importlib.util.find_spec("torch") is None:
        return {}
    from edgeguard.targets.twin import Twin

    return {one.width: Twin(one.graph()).eval().requires_grad_(False) for one in (artifact, *surrogates)}


def classifier(twin: Twin) -> Any:
    """A twin as the harness asks it."""
    import torch

    def classify(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = twin(torch.from_numpy(images).float()).numpy()
        return logits

    return classify
