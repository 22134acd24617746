"""Sets of masks of which at least one hides the whole patch, wherever it is.

Source: Xiang et al. 2022, arXiv:2108.09135, section 3.2. Along an axis of n pixels, with patches of p pixels and k masks
wanted, the stride is s = ceil((n - p + 1) / k) and a mask has m = p + s - 1 pixels; masks begin at 0, s, 2s, ... and the
last one ends at the border. A patch that begins in [js, js + s) lies inside the mask that begins at js.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import InputError
from edgeguard.patch import check_fits

Images = NDArray[np.uint8]
Flags = NDArray[np.bool_]
Numbers = NDArray[np.int64]

GREY = (127, 127, 127)


@dataclass(frozen=True)
class MaskSet:
    """Rectangular masks that cover every place of every patch of at most `patch` pixels.

    image: (H, W). patch: (h, w); smaller patches, of any shape that fits into (h, w), are covered as well.
    size: (rows, columns) of a mask. starts: the rows and the columns at which masks begin; the set is all combinations.
    fill: RGB, 0..255, what a masked pixel becomes. It must not depend on the image, which is the attacker's.

    Raises:
        InputError: the masks leave a place uncovered, do not lie inside the image, or the fill is no colour.
    """

    image: tuple[int, int]
    patch: tuple[int, int]
    size: tuple[int, int]
    starts: tuple[tuple[int, ...], tuple[int, ...]]
    fill: tuple[int, int, int] = GREY

    def __post_init__(self) -> None:
        if len(self.fill) != 3 or not all(0 <= value <= 255 for value in self.fill):
            raise InputError(f"masks are filled with three values of 0 to 255, got {self.fill}")
        for axis in range(2):
            start, mask, whole = np.array(self.starts[axis], np.int64), self.size[axis], self.image[axis]
            if not len(start) or mask < 1 or start.min() < 0 or start.max() + mask > whole:
                raise InputError(
                    f"masks of {mask} pixels at {list(start)} do not lie inside an image of {whole} pixels"
                )
            place = np.arange(whole - self.patch[axis] + 1)[:, None]
            covered = ((start <= place) & (place + self.patch[axis] <= start + mask)).any(1)
            if not covered.all():
                missed = int(np.flatnonzero(~covered)[0])
                raise InputError(f"no mask covers a patch of {self.patch[axis]} pixels that begins at pixel {missed}")

    @staticmethod
    def of(
        image: tuple[int, int], patch: tuple[int, int], per_axis: int = 6, fill: tuple[int, int, int] = GREY
    ) -> MaskSet:
        """The published set, of at most per_axis**2 masks.

        Raises:
            InputError: a patch larger than the image, fewer than 1 mask, or masks as large as the image.
        """
        check_fits(patch, image)
        if min(patch) < 1 or per_axis < 1:
            raise InputError(
                f"a certificate needs a patch and masks of at least 1, got {patch} and {per_axis} masks an axis"
            )
        sizes, starts = [], []
        for whole, part in zip(image, patch, strict=True):
            stride = -(-(whole - part + 1) // per_axis)
            size = part + stride - 1
            sizes.append(size)
            starts.append(tuple(sorted({*range(0, whole - size + 1, stride), whole - size})))
        if tuple(sizes) == image:
            raise InputError(
                f"masks against a patch of {patch[0]}x{patch[1]} pixels would hide the whole image of {image[0]}x{image[1]}; "
                "certify smaller patches, or use more masks"
            )
        return MaskSet(image, patch, (sizes[0], sizes[1]), (starts[0], starts[1]), fill)

    def __len__(self) -> int:
        return len(self.starts[0]) * len(self.starts[1])

    @cached_property
    def hidden(self) -> Flags:
        """(masks, H, W) bool, True where a mask hides the image; ordered row by row."""
        table = np.zeros((len(self), *self.image), bool)
        corners = [(row, column) for row in self.starts[0] for column in self.starts[1]]
        for mask, (row, column) in zip(table, corners, strict=True):
            mask[row : row + self.size[0], column : column + self.size[1]] = True
        return table

    def apply(self, images: Images, first: Numbers, second: Numbers | None = None) -> Images:
        """Copies of the images, each behind one mask or two.

        images: (N, 3, H, W) uint8. first, second: (N,) numbers of masks.
        """
        hidden = self.hidden[first] if second is None else self.hidden[first] | self.hidden[second]
        return np.where(hidden[:, None], np.array(self.fill, np.uint8)[:, None, None], images)
