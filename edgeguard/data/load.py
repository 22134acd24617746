"""What users write after --data: digits, cifar10[:DIR], imagefolder:DIR, npz:FILE."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from edgeguard.data.cifar10 import load_cifar10
from edgeguard.data.dataset import Dataset, holdout
from edgeguard.data.digits import load_digits
from edgeguard.data.folder import load_folder, split_folders
from edgeguard.data.npz import load_npz
from edgeguard.errors import InputError, shown
from edgeguard.files import expanded

Split = Literal["train", "test"]
SPECS = ("digits", "cifar10", "cifar10:DIR", "imagefolder:DIR", "npz:FILE")
PLACEHOLDER = "{split}"


def load_dataset(spec: str, split: Split, image_size: int | None = None, threads: int | None = None) -> Dataset:
    """Open one split of a data set.

    Args:
        spec: one of `SPECS`. `{split}` in the file of `npz:` stands for train or test.
        split: ignored where the spec has no splits of its own (see `has_splits`): then the whole set is returned.
        image_size: height and width to resize to; digits and image folders only.
        threads: that decode an image folder, see `load_folder`; other data have nothing to decode.

    Raises:
        InputError: an unknown spec, or whatever is wrong with the data, in one sentence.
        MissingDependency: the spec needs Pillow or torchvision.
    """
    if split not in ("train", "test"):
        raise InputError(f"unknown split {split!r}; expected train or test")
    kind, path = _parse(spec)
    if kind == "digits":
        return load_digits(split, image_size)
    if kind == "imagefolder":
        return load_folder(_path(path), split, image_size, threads)
    dataset = load_npz(_path(path.replace(PLACEHOLDER, split))) if kind == "npz" else load_cifar10(_folder(path), split)
    if image_size is not None and dataset.image_shape[1:] != (image_size, image_size):
        height, width = dataset.image_shape[1:]
        raise InputError(f"{spec} holds {width}x{height} pixels; only digits and image folders can be resized")
    return dataset


def has_splits(spec: str) -> bool:
    """Whether a spec has training and test images of its own; where not, `holdout` makes them.

    Raises:
        InputError: an unknown spec.
    """
    kind, path = _parse(spec)
    if kind == "imagefolder":
        return len(split_folders(_path(path))) == 2
    return kind != "npz" or PLACEHOLDER in path


def load_splits(
    spec: str, image_size: int | None = None, fraction: float = 0.1, seed: int = 0, threads: int | None = None
) -> tuple[Dataset, Dataset]:
    """Training and test images: the spec's own splits, or `fraction` of the training images held out.

    threads: as of `load_dataset`.

    Raises:
        InputError: as `load_dataset` and `holdout`; also when the two splits differ in their images' size.
        MissingDependency: as `load_dataset`.
    """
    train = load_dataset(spec, "train", image_size, threads)
    if not has_splits(spec):
        return holdout(train, fraction, seed)
    test = load_dataset(spec, "test", image_size, threads)
    if train.image_shape != test.image_shape:
        raise InputError(f"{spec}: training images are {train.image_shape}, test images {test.image_shape}")
    return train, test


def _parse(spec: str) -> tuple[str, str]:
    """The kind of a spec and what follows its colon."""
    kind, colon, path = spec.partition(":")
    known = (kind in ("digits", "cifar10") and not colon) or (kind in ("cifar10", "imagefolder", "npz") and path)
    if not known:
        raise InputError(f"unknown data {shown(spec)}; expected one of {', '.join(SPECS)}")
    return kind, path


def _path(text: str) -> Path:
    return expanded(text)


def _folder(text: str) -> Path | None:
    return _path(text) if text else None
