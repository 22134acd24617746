"""The whole state of a training run in one file, from which it goes on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from edgeguard import folders
from edgeguard.defences.trainer import Trainer
from edgeguard.run import MODEL, PATCHES, Run, restore_model

TEACHER, DEFENCE = "teacher.", "defence."
"""Prefixes of a checkpoint's tensors, beside `MODEL` and the optimizers'."""


def save(run: Run, trainer: Trainer, losses: Sequence[float] = ()) -> None:
    """Write the whole state of a training run, and its patches as files; only the first process does.

    losses: of the steps of an epoch that has not ended.
    """
    if not trainer.processes.first:
        return
    tensors: dict[str, Tensor] = {MODEL + name: value for name, value in trainer.model.state_dict().items()}
    if trainer.teacher is not None:
        tensors.update({TEACHER + name: value for name, value in trainer.teacher.module.state_dict().items()})
    for prefix, optimizer in trainer.optimizers().items():
        for index, entry in optimizer.state_dict()["state"].items():
            for name, value in entry.items():
                if value is not None:
                    tensors[f"{prefix}.{index}.{name}"] = torch.as_tensor(value)
    defence = trainer.defence.state()
    numbers = {key: value for key, value in defence.items() if isinstance(value, int)}
    tensors.update({DEFENCE + k: torch.from_numpy(v) for k, v in defence.items() if k not in numbers})
    patches = trainer.defence.patches()
    if patches:
        folder = run.path / PATCHES
        folders.make_folder(folder)
        for number, patch in enumerate(patches):
            patch.save(folder / f"{patch.size[0]}x{patch.size[1]}-{number}.npz")
    begun = {"losses": list(losses)} if losses else {}
    run.write_checkpoint(tensors, {"step": trainer.step_index, "defence": numbers, **begun})


def load(run: Run, trainer: Trainer) -> list[float]:
    """Put a checkpoint's state into a fresh trainer of the same configuration. Returns: the losses that `save` was given."""
    tensors, state = run.read_checkpoint()
    restore_model(trainer.model, tensors, run.checkpoint)
    if trainer.teacher is not None:
        trainer.teacher.module.load_state_dict(_part(tensors, TEACHER))
    for prefix, optimizer in trainer.optimizers().items():
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in _part(tensors, prefix + ".").items():
            index, _, key = name.partition(".")
            entries.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
    trainer.step_index = int(state["step"])
    trainer.defence.load_state({**{k: v.numpy() for k, v in _part(tensors, DEFENCE).items()}, **state["defence"]})
    return [float(loss) for loss in state.get("losses", [])]


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
