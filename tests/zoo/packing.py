"""A small calibrated run with what a training leaves in its checkpoint, and the script that packs it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

from edgeguard.defences.ptq import CalibrateJob, quantize
from edgeguard.quant.width import parse_widths
from edgeguard.run import Run

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "make_zoo.py"
NAME = "resnet8-digits-ptq"


class Silent:
    """A listener without a screen."""

    def on_phase(self, name: str, total: int) -> None:
        pass

    def on_images(self, count: int) -> None:
        pass


def load_script() -> ModuleType:
    """benchmarks/make_zoo.py as a module."""
    spec = importlib.util.spec_from_file_location("make_zoo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def calibrated_run(folder: Path, seed: int = 0) -> Run:
    """resnet8 on digits of 16x16 pixels at 8 and 2 bits, whose checkpoint also holds tensors of an optimizer."""
    job = CalibrateJob("resnet8", "digits", parse_widths("8,2"), image_size=16, estimator="minmax", calibration_images=16,
                       eval_limit=20, seed=seed)  # fmt: skip
    run = quantize(
        job, folder, Silent(), "edgeguard calibrate --weights '/home/me/my nets/w.pt' --data=npz:/data/d.npz"
    )
    tensors, state = run.read_checkpoint()
    momenta = {f"optimizer.{number}.momentum_buffer": torch.ones(1000) for number in range(9)}
    run.write_checkpoint({**tensors, **momenta}, {**state, "success": [0.5, 0.5]})
    return run
