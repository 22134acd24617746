"""A labelled set of images behind one interface, whether it lies in memory or in a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeguard.artifact import MAX_CLASSES
from edgeguard.errors import InputError, shown

LONGEST_NAME = 255
"""Characters of a class name: what a folder's name may have."""
JOINERS = {0x200C: None, 0x200D: None}
"""Signs without a shape of their own that words of several scripts need."""
Images = NDArray[np.uint8]
Indices = Sequence[int] | NDArray[np.int64]
Crop = Callable[[NDArray[np.int64], NDArray[np.float64], bool], Images]
"""Valid (n,) indices, (n, draws) uniform numbers and whether to mirror, to (n, 3, H, W) uint8."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images of one size.

    labels: (N,) int64, each in [0, num_classes). class_names: one per class. image_shape: (3, H, W).
    sha256: of what the set holds: pixels, labels and class names, or for a folder its files' names, sizes and labels.
    read: valid (n,) int64 indices to (n, 3, H, W) uint8; use `images`, which checks them.
    crop: the same to random crops for training, where the set makes its own; use `augmented` or `cropped`.
    crop_draws: uniform numbers that it takes for each image.

    Raises:
        InputError: when the labels are not (N,) int64, are outside the classes, or there are none, or a class has no name that
            can be shown.
    """

    name: str
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    sha256: str
    read: Callable[[NDArray[np.int64]], Images]
    crop: Crop | None = None
    crop_draws: int = 0

    def __post_init__(self) -> None:
        check_label_array(self.name, self.labels)
        check_class_names(self.name, self.class_names)
        if int(self.labels.max()) >= self.num_classes:
            raise InputError(f"{self.name}: label {self.labels.max()} lies outside its {self.num_classes} class names")

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Indices) -> Images:
        """The images at `indices`, in that order: (n, 3, H, W) uint8 RGB, a fresh array.

        Raises:
            InputError: an index is outside [0, N), or an image file cannot be read.
        """
        checked = self._checked(indices)
        if not checked.size:
            return np.empty((0, *self.image_shape), np.uint8)
        return self.read(checked)

    def augmented(self, indices: Indices, rng: np.random.Generator, flip: bool) -> Images:
        """Random crops of the images at `indices`, in that order: (n, 3, H, W) uint8 RGB, a fresh array.

        Equal states of `rng` give equal bytes. flip: mirror half of the images.

        Raises:
            InputError: the set has no crops of its own (`crop` is None), or as `images`.
        """
        return self.cropped(indices, rng.random((len(indices), self.crop_draws)), flip)

    def cropped(self, indices: Indices, draws: NDArray[np.float64], flip: bool) -> Images:
        """As `augmented`, with what is drawn for each image given: (n, crop_draws) float64, uniform in [0, 1).

        Raises:
            InputError: as `augmented`; also draws of another shape.
        """
        if self.crop is None:
            raise InputError(f"{self.name} has no training crops of its own; they are made of its images")
        checked = self._checked(indices)
        if draws.shape != (len(checked), self.crop_draws):
            raise InputError(
                f"{self.name} takes {self.crop_draws} draws for each of {len(checked)} images, got {draws.shape}"
            )
        if not checked.size:
            return np.empty((0, *self.image_shape), np.uint8)
        return self.crop(checked, draws, flip)

    def subset(self, indices: Indices) -> Dataset:
        """The set of the images at `indices`, in that order; the classes stay the same.

        Raises:
            InputError: an index is outside [0, N), or there are none.
        """
        chosen = self._checked(indices).copy()
        digest = hashlib.sha256(self.sha256.encode() + chosen.astype("<i8").tobytes()).hexdigest()
        read, crop = self.read, self.crop
        return Dataset(
            self.name,
            self.labels[chosen],
            self.class_names,
            self.image_shape,
            digest,
            lambda wanted: read(chosen[wanted]),
            None if crop is None else lambda wanted, draws, flip: crop(chosen[wanted], draws, flip),
            self.crop_draws,
        )

    def _checked(self, indices: Indices) -> NDArray[np.int64]:
        array = np.asarray(indices)
        if not array.size:
            return np.empty(0, np.int64)
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"{self.name}: indices must be a list of integers, got {array.dtype} {array.shape}")
        if int(array.min()) < 0 or int(array.max()) >= len(self):
            raise InputError(
                f"{self.name} has {len(self)} images; the indices {array.min()} to {array.max()} are not all among them"
            )
        return array.astype(np.int64)


def check_class_names(name: str, class_names: tuple[str, ...]) -> None:
    """Raises InputError unless all are printable text of at most `LONGEST_NAME` characters: reports and terminals show them."""
    for class_name in class_names:
        if len(class_name) > LONGEST_NAME or not class_name.translate(JOINERS).isprintable():
            raise InputError(
                f"{name}: a class is called {shown(class_name)}; expected printable text of at most {LONGEST_NAME} characters"
            )


def check_label_array(name: str, labels: NDArray[np.int64]) -> None:
    """Raises InputError unless `labels` are (N,) int64, not negative, and at least one."""
    if labels.dtype != np.int64 or labels.ndim != 1:
        raise InputError(f"{name}: labels must be (N,) int64, got {labels.shape} {labels.dtype}")
    if not labels.size:
        raise InputError(f"{name} holds no images")
    if int(labels.min()) < 0:
        raise InputError(f"{name}: labels must not be negative, got {labels.min()}")
    if int(labels.max()) >= MAX_CLASSES:
        raise InputError(f"{name}: there can be {MAX_CLASSES} classes at most, got the label {labels.max()}")


def from_arrays(
    name: str, images: Images, labels: NDArray[np.int64], class_names: tuple[str, ...] | None = None
) -> Dataset:
    """A set that lies in memory.

    Args:
        name: what messages and reports call it.
        images: (N, H, W, 3) uint8 RGB; not copied.
        labels: (N,) int64.
        class_names: one per class; the numbers 0 to the largest label when None.

    Raises:
        InputError: wrong shapes or types, negative labels, or labels outside `class_names`.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
        raise InputError(f"{name}: images must be (N, H, W, 3) uint8, got {images.shape} {images.dtype}")
    check_label_array(name, labels)
    if len(images) != len(labels):
        raise InputError(f"{name}: {len(images)} images but {len(labels)} labels")
    if class_names is None:
        class_names = tuple(str(label) for label in range(int(labels.max()) + 1))
    digest = hashlib.sha256(json.dumps([images.shape, class_names]).encode())
    digest.update(np.ascontiguousarray(images).data)
    digest.update(labels.astype("<i8").tobytes())
    return Dataset(
        name,
        labels,
        class_names,
        (3, images.shape[1], images.shape[2]),
        digest.hexdigest(),
        lambda wanted: np.ascontiguousarray(images[wanted].transpose(0, 3, 1, 2)),
    )


def check_labels(dataset: Dataset, num_classes: int) -> None:
    """Raises InputError when the set has labels outside the model's classes."""
    largest = int(dataset.labels.max())
    if largest >= num_classes:
        raise InputError(
            f"{dataset.name}: labels outside the model's classes; the largest label is {largest}, "
            f"but the model has {num_classes} classes"
        )


def holdout(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split a set in two, class by class: (the rest, the held-out part), each in the set's own order.

    Args:
        fraction: share of every class that is held out, between 0 and 1; at least one image of a class that has two.
        seed: equal seeds give equal splits.

    Raises:
        InputError: the fraction is not between 0 and 1, or no class has two images.
    """
    if not 0 < fraction < 1:
        raise InputError(f"the held-out fraction must lie between 0 and 1, got {fraction}")
    rng = np.random.default_rng(seed)
    held = np.zeros(len(dataset), bool)
    for label in np.unique(dataset.labels):
        members = rng.permutation(np.nonzero(dataset.labels == label)[0])
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        held[members[:count]] = True
    if not held.any():
        raise InputError(f"{dataset.name} cannot be split: no class has two images")
    return dataset.subset(np.nonzero(~held)[0]), dataset.subset(np.nonzero(held)[0])
