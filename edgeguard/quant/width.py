"""The widths a model is trained at, and the one module from which every quantizer reads the current one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from edgeguard.errors import InputError
from edgeguard.inttype import MAX_BITS, MAX_TRAINED_BITS, MIN_BITS


@dataclass(frozen=True, order=True)
class Width:
    """Bits of the weights and of the activations between the first and the last layer.

    Widths above 8 exist in training alone, as random-precision training draws them; no integer engine runs them.
    """

    weight: int
    activation: int

    def __post_init__(self) -> None:
        for bits in (self.weight, self.activation):
            if not MIN_BITS <= bits <= MAX_TRAINED_BITS:
                raise InputError(
                    f"bit-width {bits} is not supported; expected {MIN_BITS} to {MAX_BITS}, or up to "
                    f"{MAX_TRAINED_BITS} for training alone"
                )

    @property
    def deployable(self) -> bool:
        """Whether integer engines can run it."""
        return max(self.weight, self.activation) <= MAX_BITS

    def __str__(self) -> str:
        if self.weight == self.activation:
            return str(self.weight)
        return f"w{self.weight}a{self.activation}"


def parse_width(text: str) -> Width:
    """`4` or `w4a8`.

    Raises:
        InputError: anything else, or bits outside 2 to 16.
    """
    text = text.strip().lower()
    match = re.fullmatch(r"w([0-9]{1,3})a([0-9]{1,3})", f"w{text}a{text}" if text.isdecimal() else text)
    if match is None:
        raise InputError(f"{text!r:.60} is not a bit-width; write for example 4, or w4a8")
    return Width(int(match[1]), int(match[2]))


def parse_widths(text: str) -> tuple[Width, ...]:
    """A comma-separated list such as `8,4,2`, in the order given.

    Raises:
        InputError: an empty entry, a repeated one, or one that is no width.
    """
    entries = text.split(",")
    if any(not entry.strip() for entry in entries):
        raise InputError(f"--bits {text!r} has an empty entry; write for example 8,4,2")
    widths = tuple(parse_width(entry) for entry in entries)
    if len(set(widths)) != len(widths):
        raise InputError(f"--bits {text!r} names a width twice")
    return widths


class WidthControl(nn.Module):
    """The current width of a whole model. Every quantizer and batch norm holds a reference to the one instance.

    It has no parameters and no state to save; switching is one attribute write, without any device synchronization.
    """

    def __init__(self, widths: Sequence[Width]) -> None:
        super().__init__()
        if not widths:
            raise InputError("a model needs at least one bit-width")
        self.widths = tuple(widths)
        self.index = 0

    @property
    def current(self) -> Width:
        return self.widths[self.index]

    def select(self, width: Width) -> None:
        """Switch the model.

        Raises:
            InputError: a width it was not made for.
        """
        if width not in self.widths:
            names = ", ".join(str(w) for w in self.widths)
            raise InputError(f"the model was not trained at {width} bits; its widths are {names}")
        self.index = self.widths.index(width)

    @contextmanager
    def at(self, width: Width) -> Iterator[None]:
        """Switch for the length of a block."""
        before = self.index
        self.select(width)
        try:
            yield
        finally:
            self.index = before
