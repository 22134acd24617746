"""What `edgeguard attack` writes on the workstation and `verify` replays on the device: patches, and what they are judged on.

A folder of `bundle.json`, which has the SHA-256 of every other file, of the artifact, its integer graph and the data;
`images.npz`, the images to judge by their number in the data, with their labels; and an npz for each patch. NumPy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgeguard
from edgeguard import files
from edgeguard.attacks.api import Found
from edgeguard.data.dataset import Dataset
from edgeguard.errors import InputError, shown
from edgeguard.patch import check_fits, digest
from edgeguard.report.identity import UNKNOWN, Executed
from edgeguard.report.read import LARGEST, Maybe, Missing, Within, check_shape
from edgeguard.verify.catalog import CATALOG, entry
from edgeguard.verify.deployed import Target, target_block
from edgeguard.verify.document import definitions
from edgeguard.verify.options import VerifyOptions
from edgeguard.verify.prepare import Split
from edgeguard.verify.propose import Plan

SCHEMA = "edgeguard.bundle/1"
BUNDLE, IMAGES = "bundle.json", "images.npz"
MOST_BYTES = 1 << 30
"""Of the arrays of one file."""
_COUNT = Within(0, LARGEST, whole=True)
_SIDE = Within(1, 1 << 16, whole=True)
SHAPE: dict[str, Any] = {
    "schema": str, "edgeguard": str,
    "artifact": {
        "name": str, "target": str, "width": str, "sha256": str, "graph_sha256": Missing(str), "num_classes": _COUNT,
        "input_shape": [Within(-1, 1 << 16, whole=True)],
    },
    "data": {"name": str, "sha256": str, "of": _COUNT, "n": _COUNT}, "target": Maybe(_COUNT), "seed": _COUNT,
    "definitions": dict,
    "patches": [{
        "file": str, "attack": tuple(CATALOG), "access": ("transfer", "engine", "query"), "source": Maybe(str), "height": _SIDE,
        "width": _SIDE, "sha256": str, "queries": _COUNT, "gradients": _COUNT, "settings": dict,
    }],
    "command": [str], "files": dict,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Carried:
    """A patch of a bundle, or one for each of its first images. entry: its own of `patches` in `bundle.json`."""

    entry: Mapping[str, Any]
    found: Found


@dataclass(frozen=True, eq=False)
class Bundle:
    """A bundle that was read. document: `bundle.json`. indices, labels: (N,) int64, of the images to judge, in order.

    sha256: of `bundle.json`.
    """

    document: Mapping[str, Any]
    sha256: str
    indices: NDArray[np.int64]
    labels: NDArray[np.int64]
    carried: tuple[Carried, ...]

    @staticmethod
    def load(path: Path) -> Bundle:
        """Read a bundle's folder.

        Raises:
            InputError: not a bundle, of another schema, or a file is missing, altered or does not hold what it should.
        """
        if not (path / BUNDLE).is_file():
            raise InputError(f"{path} is not a bundle: it has no {BUNDLE}; make one with `edgeguard attack`")
        document = files.read_json(path / BUNDLE)
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise InputError(f"{path / BUNDLE} is not of schema {SCHEMA!r}")
        try:
            check_shape(document, SHAPE, BUNDLE)
            for name, expected in document["files"].items():
                if not files.has_plain_file(path, name):
                    raise InputError(f"{shown(name)} is missing or not a plain file of this folder")
                if files.sha256(path / name) != expected:
                    raise InputError(f"{shown(name)} was changed after it was written: its SHA-256 is not that of {BUNDLE}")
            indices, labels = _read_images(path, document)
            carried = tuple(_read_patch(path, document, one, indices) for one in document["patches"])
        except InputError as exc:
            raise InputError(f"{path}: {exc}") from exc
        if not carried or len({one.entry["file"] for one in carried}) != len(carried):
            raise InputError(f"{path}: a bundle holds at least one patch, and each has a file of its own")
        return Bundle(document, files.sha256(path / BUNDLE), indices, labels, carried)

    def plans(self) -> list[Plan]:
        """The patches as replays, named by the attacks that made them."""
        return [
            Plan(entry(one.entry["attack"]).title, "replay", max(one.found.mask.shape), one.entry["file"],
                 attack=one.entry["attack"], given=one.found)
            for one in self.carried
        ]  # fmt: skip

    def block(self) -> dict[str, Any]:
        """What a report says of it."""
        keys = ("file", "attack", "access", "source", "sha256")
        return {"sha256": self.sha256, "patches": [{key: one.entry[key] for key in keys} for one in self.carried]}


def check_bundle(bundle: Bundle, target: Target, dataset: Dataset, options: VerifyOptions) -> None:
    """Hold a bundle against what it is replayed on; the engine of a server that does not say what it executes may be any.

    Raises:
        InputError: an artifact of another integer graph, other data or labels, another seed or target.
    """
    named, data = bundle.document["artifact"], bundle.document["data"]
    here, made = Executed.of(target_block(target)), Executed(named["sha256"], named.get("graph_sha256", UNKNOWN))
    if not here.is_model(made) and UNKNOWN not in (here.artifact, made.artifact):
        words = f"{shown(named['name'])} of SHA-256 {shown(named['sha256'][:12])}, and this one is {here.artifact[:12]}..."
        raise InputError(f"the bundle was made for the artifact {words}; {here.why_not(made)}; replay its patch files with --patch "
                         "to try them on another")  # fmt: skip
    if (dataset.sha256, len(dataset)) != (data["sha256"], data["of"]):
        wanted = f"{shown(data['name'])}, {data['of']} images of SHA-256 {shown(data['sha256'][:12])}"
        raise InputError(f"the bundle is judged on {wanted}, and {dataset.name} holds others: {len(dataset)} of "
                         f"{dataset.sha256[:12]}...")  # fmt: skip
    if not np.array_equal(dataset.labels[bundle.indices], bundle.labels):
        raise InputError(f"the labels of {dataset.name} are not those of the bundle")
    if (options.target, options.seed) != (bundle.document["target"], bundle.document["seed"]):
        raise InputError(f"the bundle is of target {bundle.document['target']} and seed {bundle.document['seed']}, got "
                         f"{options.target} and {options.seed}; leave --target and --seed out")  # fmt: skip


def write_bundle(
    folder: Path, target: Target, split: Split, options: VerifyOptions, made: Sequence[tuple[str, Plan, Found, Mapping[str, Any]]],
    command: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Write a bundle into a folder that is there, and return its document.

    made: of each patch the name of its file, what it came of, the patch, and the settings of its attack.
    """
    block = target_block(target)
    executed = Executed.of(block)
    kept = {**block, "sha256": executed.artifact, "graph_sha256": executed.graph}
    dataset = split.judged_of
    files.write_npz(folder / IMAGES, {"indices": split.judged, "labels": dataset.labels[split.judged]})
    entries = []
    for name, plan, found, settings in made:
        places = {} if found.positions is None else {"positions": found.positions}
        files.write_npz(folder / name, {"pixels": found.pixels, "mask": found.mask, **places})
        height, width = found.mask.shape
        entries.append({
            "file": name, "attack": plan.attack, "access": plan.access, "source": plan.source, "height": height, "width": width,
            "sha256": digest(found.pixels, found.mask), "queries": found.queries, "gradients": found.gradients,
            "settings": dict(settings),
        })  # fmt: skip
    document = {
        "schema": SCHEMA, "edgeguard": edgeguard.__version__,
        "artifact": {key: kept[key] for key in SHAPE["artifact"]},
        "data": {"name": dataset.name, "sha256": dataset.sha256, "of": len(dataset), "n": len(split.judged)},
        "target": options.target, "seed": options.seed, "definitions": definitions(options), "patches": entries,
        "command": list(command),
        "files": {name: files.sha256(folder / name) for name in (IMAGES, *(one["file"] for one in entries))},
    }  # fmt: skip
    files.write_json(folder / BUNDLE, document)
    return document


def _arrays(path: Path, document: Mapping[str, Any], name: str, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """The arrays of a file that was hashed."""
    if name not in document["files"]:
        raise InputError(f"{shown(name)} is not among the bundle's files")
    return files.read_npz(path / name, MOST_BYTES, names)


def _read_images(path: Path, document: Mapping[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    arrays, data = _arrays(path, document, IMAGES, ("indices", "labels")), document["data"]
    for name, limit in (("indices", data["of"]), ("labels", document["artifact"]["num_classes"] or LARGEST)):
        found = arrays.get(name)
        if found is None or found.dtype != np.int64 or found.shape != (data["n"],) or not len(found):
            raise InputError(f"{IMAGES} must hold {name!r}: {data['n']} numbers of 64 bits, at least one")
        if found.min() < 0 or found.max() >= limit:
            raise InputError(f"{IMAGES}: {name!r} run from {found.min()} to {found.max()}, beyond what there is")
    if len(np.unique(arrays["indices"])) != data["n"]:
        raise InputError(f"{IMAGES} names an image twice")
    return arrays["indices"], arrays["labels"]


def _read_patch(path: Path, document: Mapping[str, Any], one: Mapping[str, Any], indices: NDArray[np.int64]) -> Carried:
    arrays = _arrays(path, document, one["file"], ("pixels", "mask", "positions"))
    kind, shape, name = entry(one["attack"]), (one["height"], one["width"]), shown(one["file"])
    pixels, mask, positions = (arrays.get(key) for key in ("pixels", "mask", "positions"))
    count = pixels.shape[:1] if kind.per_image and pixels is not None else ()
    if pixels is None or pixels.dtype != np.uint8 or pixels.shape != (*count, 3, *shape):
        raise InputError(f"{name} must hold pixels of a patch of {shape[0]}x{shape[1]}, uint8")
    if mask is None or mask.dtype != np.bool_ or mask.shape != shape or not mask.any():
        raise InputError(f"{name} must hold a mask of {shape[0]}x{shape[1]}, boolean and not all False")
    size = [int(side) for side in document["artifact"]["input_shape"][-2:]]
    if len(size) == 2 and min(size) > 0:
        check_fits(shape, (size[0], size[1]))
    if kind.per_image and (
        not 0 < len(pixels) <= len(indices) or positions is None or positions.dtype != np.int64
        or positions.shape != (len(pixels), 2)
    ):  # fmt: skip
        raise InputError(f"{name} must hold a patch and a place for each of the first images, at most {len(indices)}")
    if digest(pixels, mask) != one["sha256"]:
        raise InputError(f"{name} is not the patch that {BUNDLE} describes: its SHA-256 is another")
    return Carried(one, Found(pixels, mask, positions if kind.per_image else None))
