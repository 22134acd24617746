"""Universal patches that grow stronger while a model trains against them. NumPy only.

Training pastes a member on part of each batch, takes the member's gradient out of the same backward pass and calls
`ascend`: one signed step, projected back to whole grey levels in 0..255, so that what is trained against is always a
patch that a camera could see. The definition is ours; signed ascent shared with training follows Shafahi et al. 2020,
"Universal Adversarial Training", arXiv:1811.11304.

Everything random in here is a function of the seed and of how often the pool was asked, so `state` is a few plain
arrays and integers, and a resumed run repeats an uninterrupted one exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import InputError
from edgeguard.patch import Patch, square

GREY_MAX = 255.0
_INIT, _NOISE = 0, 1


@dataclass(frozen=True)
class PoolConfig:
    """sizes: side lengths in pixels, one or more. members: patches of each size.

    refresh_every: after this many ascents of the whole pool its stalest member starts anew; 0 never refreshes.
    gradient_noise: standard deviation of Gaussian noise added to each gradient before its sign is taken, in units of
        the gradient's own root mean square (part c of gradient-inconsistent regularization); 0 adds none.
    """

    sizes: tuple[int, ...] = (5, 6, 8)
    members: int = 2
    refresh_every: int = 0
    gradient_noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise InputError(f"a patch pool needs sizes of at least 1 pixel, got {self.sizes}")
        if self.members < 1 or self.refresh_every < 0 or self.seed < 0:
            raise InputError(
                "a patch pool needs members >= 1, refresh_every >= 0 and seed >= 0, got "
                f"{self.members}, {self.refresh_every} and {self.seed}"
            )
        if not (np.isfinite(self.gradient_noise) and self.gradient_noise >= 0):
            raise InputError(f"gradient_noise must be 0 or more, got {self.gradient_noise}")


class PatchPool:
    """`config.members` universal patches of every size in `config.sizes`, members of one size side by side."""

    def __init__(self, config: PoolConfig) -> None:
        self.config = config
        self.sizes: tuple[int, ...] = tuple(size for size in config.sizes for _ in range(config.members))
        self._births = 0
        self._ascents = 0
        self._age = np.zeros(len(self.sizes), np.int64)
        self._pixels: list[NDArray[np.float32]] = [self._new(size) for size in self.sizes]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> NDArray[np.float32]:
        """Copy of one member: (3, s, s) float32, whole grey levels in 0..255."""
        pixels: NDArray[np.float32] = self._pixels[index].copy()
        return pixels

    def draw(self, rng: np.random.Generator, k: int) -> NDArray[np.int64]:
        """Indices (k,) int64 of members, uniformly, none twice before every member was drawn once."""
        if k < 1:
            raise InputError(f"draw at least one patch, got {k}")
        rounds = [rng.permutation(len(self)) for _ in range(-(-k // len(self)))]
        return np.concatenate(rounds)[:k].astype(np.int64)

    def ascend(self, index: int, gradient: NDArray[np.floating[Any]], step_size: float) -> None:
        """Move one member along the sign of its gradient, then refresh the stalest member if it is time.

        Args:
            index: which member.
            gradient: (3, s, s), of the attack's loss (to be increased) by the member's pixels. A pixel whose gradient
                is zero stays, so an all-zero gradient changes nothing.
            step_size: in grey levels, rounded to whole ones.

        Raises:
            InputError: a wrong shape, a gradient that is not finite, or a step of less than half a grey level.
        """
        pixels = self._pixels[index]
        gradient = np.asarray(gradient, np.float64)
        if gradient.shape != pixels.shape:
            raise InputError(f"the gradient of patch {index} must be {pixels.shape}, got {gradient.shape}")
        if not np.isfinite(gradient).all():
            raise InputError(f"the gradient of patch {index} is not finite")
        if not step_size >= 0.5:
            raise InputError(f"step_size must be at least half a grey level, got {step_size}")
        scale = float(np.sqrt(np.mean(gradient**2)))
        if self.config.gradient_noise and scale > 0:
            noise = self._generator(_NOISE, self._ascents).standard_normal(gradient.shape)
            gradient = gradient / scale + self.config.gradient_noise * noise
        moved = np.rint(pixels + np.rint(step_size) * np.sign(gradient))
        self._pixels[index] = np.clip(moved, 0.0, GREY_MAX).astype(np.float32)
        self._age[index] += 1
        self._ascents += 1
        if self.config.refresh_every and self._ascents % self.config.refresh_every == 0:
            self.refresh()

    def refresh(self) -> int:
        """Start the member with the most ascents anew from random pixels. Returns: its index."""
        index = int(np.argmax(self._age))
        self._pixels[index] = self._new(self.sizes[index])
        self._age[index] = 0
        return index

    def patches(self) -> list[Patch]:
        """The members as patches of uint8 pixels."""
        return [square(pixels.astype(np.uint8)) for pixels in self._pixels]

    def state(self) -> dict[str, Any]:
        """Arrays and integers from which `load_state` continues exactly: `pixels.I` (3, s, s) uint8 and counters."""
        arrays: dict[str, Any] = {f"pixels.{i}": pixels.astype(np.uint8) for i, pixels in enumerate(self._pixels)}
        return {**arrays, "age": self._age.copy(), "ascents": self._ascents, "births": self._births}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state()` of a pool with the same configuration; nothing changes if it does not fit.

        Raises:
            InputError: when a key is missing or unknown, or a shape or type does not fit.
        """
        expected = {f"pixels.{i}" for i in range(len(self))} | {"age", "ascents", "births"}
        if set(state) != expected:
            raise InputError(f"a patch pool's state has keys {sorted(expected)}, got {sorted(state)}")
        pixels = [np.asarray(state[f"pixels.{i}"]) for i in range(len(self))]
        for i, (array, size) in enumerate(zip(pixels, self.sizes, strict=True)):
            if array.shape != (3, size, size) or array.dtype != np.uint8:
                raise InputError(f"pixels.{i} must be (3, {size}, {size}) uint8, got {array.shape} {array.dtype}")
        age = np.asarray(state["age"])
        if age.shape != (len(self),) or not np.issubdtype(age.dtype, np.integer):
            raise InputError(f"age must be ({len(self)},) integers, got {age.shape} {age.dtype}")
        self._pixels = [array.astype(np.float32) for array in pixels]
        self._age = age.astype(np.int64)
        self._ascents, self._births = int(state["ascents"]), int(state["births"])

    def _new(self, size: int) -> NDArray[np.float32]:
        generator = self._generator(_INIT, self._births)
        self._births += 1
        return generator.integers(0, 256, (3, size, size)).astype(np.float32)

    def _generator(self, purpose: int, count: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, purpose, count])
