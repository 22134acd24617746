"""How a model is quantized."""

from __future__ import annotations

from dataclasses import dataclass

from edgeguard.errors import InputError
from edgeguard.inttype import MAX_BITS, MIN_BITS, IntType
from edgeguard.quant.width import Width


@dataclass(frozen=True)
class QuantScheme:
    """Types of every weight and activation, per width.

    Weights are symmetric, narrow range, one scale per output channel. Activations have one scale per tensor, unsigned
    where they cannot be negative. The first and the last layer (weights and inputs) use `boundary_bits`. A tensor that
    is only ever added to another (the residual branch before its sum) never enters a multiplication and is kept at
    `residual_bits`. A target may ask for signed activations everywhere (`signed_activations`) or for fewer bits of all
    weights (`max_weight_bits`); widths above 8, which are never deployed, are not cut by that.
    """

    widths: tuple[Width, ...]
    boundary_bits: int = 8
    residual_bits: int = 8
    signed_activations: bool = False
    max_weight_bits: int = MAX_BITS

    def __post_init__(self) -> None:
        if not self.widths:
            raise InputError("a quantization scheme needs at least one bit-width")
        if len(set(self.widths)) != len(self.widths):
            raise InputError("a quantization scheme names a width twice")
        for bits in (self.boundary_bits, self.residual_bits, self.max_weight_bits):
            if not MIN_BITS <= bits <= MAX_BITS:
                raise InputError(f"bit-width {bits} is not supported; expected {MIN_BITS} to {MAX_BITS}")

    def weight_type(self, role: str, width: Width) -> IntType:
        """role: "inner" or "boundary"."""
        bits = {"inner": width.weight, "boundary": self.boundary_bits}[role]
        if bits <= MAX_BITS:
            bits = min(bits, self.max_weight_bits)
        return IntType(bits, signed=True, narrow=True)

    def activation_type(self, role: str, signed: bool, width: Width) -> IntType:
        """role: "inner", "boundary" or "residual"."""
        bits = {"inner": width.activation, "boundary": self.boundary_bits, "residual": self.residual_bits}[role]
        return IntType(bits, signed=signed or self.signed_activations)
