"""Reading trained weights. No code from the file is ever run, and every mismatch is named."""

from __future__ import annotations

import mmap
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeguard import files
from edgeguard.errors import InputError, require

MAX_BYTES = 8 << 30
MEMORY = b"bytearray"
"""A name that torch's reader would call, with as many bytes as the file asks for; no tensor needs it."""
COUNTER = "num_batches_tracked"
"""Batch norms count their batches; old files lack the counter, and nothing but training with momentum None reads it."""
OLD_DENSE_LAYER = re.compile(r"(.*denselayer\d+\.(?:norm|conv))\.([12]\..+)")
"""torchvision's DenseNet files are older than the names of its layers: norm.1 is norm1 now."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a state dict that torch saved, plain or under the key `state_dict`.

    The prefix `module.`, which data-parallel training leaves on every name, is removed.

    Raises:
        InputError: missing, too large, truncated, holding code or anything but named tensors.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    try:
        state: Any = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except InputError:
        raise
    except Exception as exc:  # a damaged file may raise anything
        raise InputError(f"{path} is truncated or not a weights file{_reason(exc)}") from exc
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not state:
        raise InputError(f"{path} holds no state dict; save the model's state_dict()")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise InputError(f"{path} is not a state dict: {key!r:.80} names no tensor; save the model's state_dict()")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_nested:
            raise InputError(f"{path}: {key!r:.80} is no plain tensor but sparse, nested or without values")
    prefix = "module." if all(key.startswith("module.") for key in state) else ""
    return {key[len(prefix) :]: value for key, value in state.items()}


def apply_weights(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy the tensors into a module, strictly; nothing is copied when anything is wrong.

    The names in torchvision's own DenseNet files, which its current layers no longer have, are brought up to date.

    Args:
        source: where they are from, for the message.

    Raises:
        InputError: keys are missing, unexpected, or of another shape or kind, or values are not finite.
    """
    own = module.state_dict()
    state = {_current(key, own): value for key, value in state.items()}
    missing = [key for key in own if key not in state and not key.endswith(COUNTER)]
    if missing:
        raise InputError(f"{source} is of another architecture: it lacks {_some(missing)}")
    unexpected = [key for key in state if key not in own]
    if unexpected:
        raise InputError(f"{source} is of another architecture: the model has no {_some(unexpected)}")
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if shapes:
        raise InputError(f"{source} does not fit the model: {_some(shapes)}")
    for key, value in state.items():
        if value.is_floating_point() != own[key].is_floating_point() or value.is_complex():
            raise InputError(f"{source}: {key} is {value.dtype}, expected {own[key].dtype}")
        if not bool(torch.isfinite(value.to(own[key].dtype)).all()):
            raise InputError(f"{source}: {key} holds NaN or infinity")
    module.load_state_dict({**{key: own[key] for key in own if key.endswith(COUNTER)}, **state})


def _current(key: str, own: Mapping[str, Tensor]) -> str:
    """The model's name of what an older file calls `key`; a name that the model has stays."""
    found = None if key in own else OLD_DENSE_LAYER.fullmatch(key)
    return found[1] + found[2] if found and found[1] + found[2] in own else key


def _read_safetensors(path: Path) -> Any:
    return require("safetensors.torch", "train").load_file(str(path))


def _read_torch(path: Path) -> Any:
    size, members = path.stat().st_size, []
    if zipfile.is_zipfile(path):
        files.check_directory(path)
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        size = max(size, sum(member.file_size for member in members))
    if size > MAX_BYTES:
        raise InputError(f"{path} unpacks to {size} bytes; at most {MAX_BYTES} are read")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise InputError(f"{path} is a compressed archive, as torch writes none; save the model's state_dict()")
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(MEMORY) >= 0:
            raise InputError(f"{path} asks for memory by {MEMORY.decode()!r} and is refused; save the model's state_dict()")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on foreign pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as exc:
        if "GLOBAL" not in str(exc):
            raise
        raise InputError(
            f"{path} holds Python objects, which can run code and are refused; save the model's state_dict()"
        ) from exc


def _some(names: list[str]) -> str:
    """The first three and how many there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more ({len(names)} in all)" if len(names) > 3 else "")


def _reason(exc: Exception) -> str:
    """The first sentence of a message; none of torch's that advise to load the file with code and all."""
    text = str(exc).strip()
    return "" if not text or "weights_only" in text else ": " + text.splitlines()[0].split(". ")[0]
