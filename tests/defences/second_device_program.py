"""Trains on the CPU and on `second_device`, and prints how far apart the two end, as JSON. A process of its own: PyTorch learns
of a device once, before its first backward pass.

    second_device_program.py steps FOLDER    a few batches of every method
    second_device_program.py run FOLDER      a whole run: pretraining, calibration, training, measuring, and going on
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from second_device import Far, second_device
from small_training import TRAIN, calibrated, fresh
from torch import Tensor

from edgeguard.defences import harden as hardening
from edgeguard.defences.config import METHODS, HardenConfig, preset
from edgeguard.defences.job import HardenJob
from edgeguard.defences.parts import PerImagePatches, UniversalPatches
from edgeguard.defences.trainer import Trainer
from edgeguard.models import load_model
from edgeguard.quant.view import CompiledView
from edgeguard.quant.width import parse_widths

BITS = "8,4,2"
CPU = torch.device("cpu")
OPTIONS: dict[str, dict[str, Any]] = {"pbat": {"attack_steps": 2}, "triqdef": {"penalty_every": 1}}


def stepped(method: str, device: torch.device, view: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and state after three batches; images of the third are known from the first."""
    config = preset(HardenConfig(method, parse_widths(BITS), epochs=2, batch_size=32), options=OPTIONS.get(method))
    model = fresh(BITS)
    model.load_state_dict(calibrated(BITS))
    trainer = Trainer(model, TRAIN, config, device, load_model("resnet8"))
    if view:
        trainer._forward = CompiledView(trainer.model, compiled=False)
    losses = [trainer.step(np.arange(32) + start).loss for start in (0, 32, 16)]
    state = {**trainer.model.state_dict(), **{k: torch.as_tensor(v) for k, v in trainer.defence.state().items()}}
    if device.type != "cpu":
        assert all(isinstance(parameter, Far) for parameter in trainer.model.parameters())
    return losses, {name: value.cpu().double() for name, value in state.items()}


class Silent:
    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def ran(folder: Path, device: torch.device, stop: bool) -> dict[str, Tensor]:
    """The checkpoint of a run of two epochs. stop: after the first step, and going on from there."""
    config = preset(HardenConfig(
        "qadt-r", parse_widths("8,2"), epochs=2, max_steps=4, batch_size=128, flip=False,
        universal=UniversalPatches(sizes=(3, 4), members=1), per_image=PerImagePatches(sizes=(3, 5), passes=1),
    ))  # fmt: skip
    job = HardenJob("resnet8", "digits", config, image_size=16, pretrain_epochs=1, calibration_images=32, eval_limit=60,
                    amp=False, compiled=False)  # fmt: skip
    hardening.choose_device = lambda *_: device  # type: ignore[assignment]

    class Stopping(Silent):
        def on_step(self, result: object) -> None:
            if stop:
                raise KeyboardInterrupt

    if stop:
        try:
            hardening.harden(job, folder, Stopping())
        except KeyboardInterrupt:
            hardening.resume(folder, Silent())
    else:
        hardening.harden(job, folder, Silent())
    return {name: value.double() for name, value in hardening.Run.load(folder).read_checkpoint()[0].items()}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def main() -> None:
    torch.set_num_threads(1)
    what, folder = sys.argv[1], Path(sys.argv[2])
    with second_device() as far:
        pass  # PyTorch has heard of it
    found: dict[str, dict[str, float]] = {}
    if what == "steps":
        for method, view in itertools.product(METHODS, (False, True)):
            losses, state = stepped(method, CPU, view)
            with second_device():
                other_losses, other = stepped(method, far, view)
            worst = float(np.abs(np.array(losses) - np.array(other_losses)).max())
            name = f"{method} {'view' if view else 'model'}"
            found[name] = {"loss": worst, "state": apart(state, other), "entries": len(state)}
    else:
        here = ran(folder / "cpu", CPU, stop=False)
        with second_device():
            there = ran(folder / "second", far, stop=False)
            again = ran(folder / "stopped", far, stop=True)
        found["run"] = {"state": apart(here, there), "stopped": apart(there, again), "entries": len(here)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
