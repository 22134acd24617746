"""A bit-width as a value: its limits, its test and its storage, computed in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import InputError

MIN_BITS, MAX_BITS = 2, 8
"""Of what integer engines multiply."""
MAX_TRAINED_BITS = 16
"""Of what training simulates; the types above `MAX_BITS` enter no integer graph."""


@dataclass(frozen=True)
class IntType:
    """An integer type of 2 to 8 bits, of 9 to 16 in training alone, or of 32 for accumulators.

    narrow: a signed type without its most negative value, so that negation never overflows (weights).
    """

    bits: int
    signed: bool
    narrow: bool = False

    def __post_init__(self) -> None:
        if not (MIN_BITS <= self.bits <= MAX_TRAINED_BITS or (self.bits == 32 and self.signed)):
            raise InputError(f"bit-width {self.bits} is not supported; expected {MIN_BITS} to {MAX_TRAINED_BITS}")
        if self.narrow and not self.signed:
            raise InputError("a narrow range is only defined for signed types")

    @property
    def qmin(self) -> int:
        if not self.signed:
            return 0
        return -(1 << (self.bits - 1)) + int(self.narrow)

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - int(self.signed))) - 1

    @property
    def storage_bits(self) -> int:
        """Bits per value in a file: ONNX has INT2, INT4, INT8, INT16 and INT32."""
        return next(size for size in (2, 4, 8, 16, 32) if self.bits <= size)

    @property
    def container(self) -> np.dtype[Any]:
        """The smallest NumPy integer dtype that holds every value."""
        if self.bits > MAX_TRAINED_BITS:
            return np.dtype(np.int32)
        if self.bits > MAX_BITS:
            return np.dtype(np.int16 if self.signed else np.uint16)
        return np.dtype(np.int8 if self.signed else np.uint8)

    def allowed(self, values: NDArray[Any]) -> bool:
        """Whether every value is an integer within [qmin, qmax]: the executable definition of the type."""
        if values.size == 0:
            return True
        if not np.issubdtype(values.dtype, np.integer):
            return False
        return bool(int(values.min()) >= self.qmin and int(values.max()) <= self.qmax)

    def __str__(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.bits}"


PIXEL = IntType(8, signed=False)
ACCUMULATOR = IntType(32, signed=True)


def zero_point_of(dtype: IntType) -> int:
    """What an activation's uint8 in a QOperator file exceeds its integer by."""
    return 128 if dtype.signed else 0
