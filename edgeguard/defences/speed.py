"""What makes training quick on this machine: chosen when a run begins, written into its configuration."""

from __future__ import annotations

from dataclasses import replace

import torch

from edgeguard.defences.config import HardenConfig
from edgeguard.errors import InputError, MissingDependency
from edgeguard.quant.view import compiler_missing

WORTH_COMPILING = 2_000
"""Passes over a batch from which on the minute that compiling takes is won back."""
BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
"""Of CPUs that multiply bfloat16: a training pass of ResNet-20 takes two thirds of float32's time with the second."""


def settle(config: HardenConfig, amp: bool | None, compiled: bool | None, cuda_graphs: bool | None, passes: int,
           device: torch.device, world: int = 1) -> tuple[HardenConfig, list[str]]:  # fmt: skip
    """The configuration with `amp`, `compiled` and `cuda_graphs` decided; None leaves them to the machine.

    passes: over a batch, planned for the run. world: processes that train together. Returns: it, and sentences on what was
    decided without being asked for.

    Raises:
        MissingDependency: compiling is asked for and there is no compiler. InputError: CUDA graphs are asked for and cannot
            be recorded of this run.
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
    config = replace(config, amp=amp, compiled=compiled)
    obstacle = unrecordable(config, device, world)
    if cuda_graphs and obstacle:
        raise InputError(f"--cuda-graphs: {obstacle}")
    return replace(config, cuda_graphs=obstacle is None if cuda_graphs is None else cuda_graphs), said


def unrecordable(config: HardenConfig, device: torch.device, world: int) -> str | None:
    """Why the passes of a run cannot be recorded as CUDA graphs, or None. Whether they hold is tried when it begins."""
    if device.type != "cuda":
        return f"this run is on {device.type}, and only passes on a CUDA device can be recorded"
    if not config.compiled:
        return "passes are recorded as they are compiled; use --compile"
    if world > 1:
        return "processes exchange statistics in the middle of a pass; train with one, or without --cuda-graphs"
    if config.accumulate > 1:
        return "a recorded pass overwrites the gradients of the one before, and --accumulate adds them up"
    return None


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether products of bfloat16 are quicker here than those of float32: on GPUs since Ampere, on CPUs by instruction."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in BFLOAT16_INSTRUCTIONS)
