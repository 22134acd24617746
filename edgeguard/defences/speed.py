"""What makes training quick on this machine: chosen when a run begins, written into its configuration."""

from __future__ import annotations

from dataclasses import replace

import torch

from edgeguard.defences.config import HardenConfig
from edgeguard.errors import MissingDependency
from edgeguard.quant.view import compiler_missing

WORTH_COMPILING = 2_000
"""Passes over a batch from which on the minute that compiling takes is won back."""
BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
"""Of CPUs that multiply bfloat16: a training pass of ResNet-20 takes two thirds of float32's time with the second."""


def settle(config: HardenConfig, amp: bool | None, compiled: bool | None, passes: int,
           device: torch.device) -> tuple[HardenConfig, list[str]]:  # fmt: skip
    """The configuration with `amp` and `compiled` decided; None leaves them to the machine.

    passes: over a batch, planned for the run. Returns: it, and sentences on what was decided without being asked for.

    Raises:
        MissingDependency: compiling is asked for and there is no compiler.
    """
    said = []
    missing = compiler_missing()
    if compiled and missing:
        raise MissingDependency(f"--compile: {missing}; install one, or train with --no-compile")
    if compiled is None:
        compiled = missing is None and passes >= WORTH_COMPILING
        if missing is not None and passes >= WORTH_COMPILING:
            said.append(f"training is not compiled, and slower: {missing}")
    if amp is None:
        amp = has_bfloat16_units(device)
        if amp:
            said.append("bfloat16 outside the quantizers: this machine has units for it (--no-amp for float32)")
    return replace(config, amp=amp, compiled=compiled), said


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether products of bfloat16 are quicker here than those of float32: on GPUs since Ampere, on CPUs by instruction."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in BFLOAT16_INSTRUCTIONS)
