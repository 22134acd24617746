from __future__ import annotations

import numpy as np
import pytest

from edgeguard.errors import InputError
from edgeguard.inttype import ACCUMULATOR, PIXEL, IntType


@pytest.mark.parametrize(
    ("dtype", "qmin", "qmax", "storage", "container", "text"),
    [
        (IntType(8, True), -128, 127, 8, np.int8, "int8"),
        (IntType(8, True, narrow=True), -127, 127, 8, np.int8, "int8"),
        (IntType(8, False), 0, 255, 8, np.uint8, "uint8"),
        (IntType(6, False), 0, 63, 8, np.uint8, "uint6"),
        (IntType(5, True, narrow=True), -15, 15, 8, np.int8, "int5"),
        (IntType(4, True), -8, 7, 4, np.int8, "int4"),
        (IntType(3, False), 0, 7, 4, np.uint8, "uint3"),
        (IntType(2, True, narrow=True), -1, 1, 2, np.int8, "int2"),
        (IntType(2, True), -2, 1, 2, np.int8, "int2"),
        (IntType(9, False), 0, 511, 16, np.uint16, "uint9"),
        (IntType(12, True, narrow=True), -2047, 2047, 16, np.int16, "int12"),
        (IntType(16, True), -(2**15), 2**15 - 1, 16, np.int16, "int16"),
        (IntType(16, False), 0, 2**16 - 1, 16, np.uint16, "uint16"),
        (IntType(32, True), -(2**31), 2**31 - 1, 32, np.int32, "int32"),
    ],
)
def test_limits(dtype: IntType, qmin: int, qmax: int, storage: int, container: type, text: str) -> None:
    assert (dtype.qmin, dtype.qmax, dtype.storage_bits, dtype.container, str(dtype)) == (
        qmin, qmax, storage, np.dtype(container), text,
    )  # fmt: skip
    assert np.iinfo(dtype.container).min <= qmin
    assert qmax <= np.iinfo(dtype.container).max
    assert dtype.allowed(np.array([qmin, 0, qmax], np.int64))
    assert not dtype.allowed(np.array([qmin - 1], np.int64))
    assert not dtype.allowed(np.array([qmax + 1], np.int64))


def test_allowed_takes_integers_only() -> None:
    assert not PIXEL.allowed(np.array([1.0]))
    assert not PIXEL.allowed(np.array([True]))
    assert PIXEL.allowed(np.array([], np.float32)), "nothing breaks no rule"
    assert not ACCUMULATOR.allowed(np.array([2**63], np.uint64))


@pytest.mark.parametrize("bits", [-1, 0, 1, 17, 24, 31, 33])
def test_unsupported_widths(bits: int) -> None:
    with pytest.raises(InputError, match=f"bit-width {bits} is not supported; expected 2 to 16"):
        IntType(bits, True)


def test_unsupported_combinations() -> None:
    with pytest.raises(InputError, match="narrow"):
        IntType(8, signed=False, narrow=True)
    with pytest.raises(InputError, match="32"):
        IntType(32, signed=False)
