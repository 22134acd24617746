"""Training on a device that is not the CPU, without one: every tensor lies where it should, and the numbers are the CPU's.

`second_device` computes on the CPU what lies there and refuses what CUDA would refuse.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from edgeguard.defences.config import METHODS

PROGRAM = Path(__file__).parent / "second_device_program.py"


def printed(*arguments: str) -> dict[str, dict[str, float]]:
    done = subprocess.run([sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


def test_every_method_trains_on_another_device_as_on_the_cpu(tmp_path: Path) -> None:
    found = printed("steps", str(tmp_path))
    assert found.keys() == {f"{method} {forward}" for method in METHODS for forward in ("model", "view")}
    for entry in found.values():
        assert entry["entries"] > 50
        assert entry["loss"] < 1e-5
        assert entry["state"] < 1e-5


def test_a_whole_run_ends_there_as_on_the_cpu_and_goes_on_when_stopped(tmp_path: Path) -> None:
    found = printed("run", str(tmp_path))["run"]
    assert found["entries"] > 50
    assert found["state"] < 1e-5
    assert found["stopped"] == 0.0


def test_tensors_of_both_devices_do_not_meet() -> None:
    code = """
import torch
from second_device import second_device
with second_device() as far:
    here, there = torch.ones(2, 3), torch.ones(2, 3, device=far)
    assert there.device.type == "second" and (there + there).device == there.device
    assert (there * torch.tensor(2.0)).sum().item() == 12 and there[torch.tensor([1])].shape == (1, 3)
    assert there.cpu().device.type == "cpu" and here.to(far).sub(there).abs().sum().item() == 0
    for operation in (lambda: here + there, lambda: there @ here.T, lambda: torch.cat([here, there])):
        try:
            operation()
        except RuntimeError as exc:
            print("two devices" in str(exc))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PROGRAM.parent, timeout=600
    )
    assert done.stdout.split() == ["True"] * 3, done.stderr[-3000:]
