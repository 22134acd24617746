"""Target profiles: what a runtime can load and execute, as a TOML file. A user adds a target by writing one."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edgeguard import files
from edgeguard.errors import InputError, shown
from edgeguard.inttype import MAX_BITS, MIN_BITS

BUILT_IN = ("ort", "ort-legacy", "ort-avx2", "openvino", "trt")
FOLDER = Path(__file__).parent
FORMATS = {"ort": "qoperator", "openvino": "qdq", "trt": "qdq"}
"""Runtimes, and the form of ONNX in which each executes our models in integers."""
NEEDS = {2: (25, 13), 4: (21, 10), 8: (13, 7)}
"""(opset, IR version) at which ONNX has weights of so many bits; 13 is the first with per-channel quantization."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LIMIT = 1 << 16
UNSATURATED_BITS = 7
"""Two products of uint8 and a weight of 7 bits fit 16 bits: 2 * 255 * 63 = 32130."""
KINDS = {"str": str, "int": int, "bool": bool}


@dataclass(frozen=True)
class TargetProfile:
    """A runtime as the exporter sees it.

    name: how `--target`, manifests and reports call it. summary: one line for people.
    runtime, format: a key and its value of `FORMATS`.
    opset, ir_version: the newest that the runtime loads; a model uses the oldest that its weights need.
    storage_bits: the smallest weights it can load: 2, 4 or 8.
    signed_activations: whether activations must be signed everywhere.
    weight_bits: at most so many bits for any weight; a wider width is trained and calibrated with fewer.
    saturates: whether kernels of x86-64 CPUs without VNNI may saturate products of this target's weights in 16 bits.

    Raises:
        InputError: a value out of range, or values that contradict each other.
    """

    name: str
    summary: str
    runtime: str
    format: str
    opset: int
    ir_version: int
    storage_bits: int
    signed_activations: bool
    weight_bits: int
    saturates: bool

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise InputError(f"'name' is {self.name!r:.80}; expected up to 64 letters, digits, '.', '_' and '-'")
        if not self.summary.isprintable():
            raise InputError("'summary' holds characters that cannot be printed; expected one line of text")
        if self.runtime not in FORMATS:
            raise InputError(f"'runtime' is {self.runtime!r:.60}; expected one of {', '.join(FORMATS)}")
        if self.format != FORMATS[self.runtime]:
            raise InputError(f"'format' is {self.format!r:.60}; runtime {self.runtime!r} expects {FORMATS[self.runtime]!r}")
        if self.storage_bits not in NEEDS:
            raise InputError(f"'storage_bits' is {self.storage_bits}; expected one of {', '.join(map(str, NEEDS))}")
        if not MIN_BITS <= self.weight_bits <= MAX_BITS:
            raise InputError(f"'weight_bits' is {self.weight_bits}; expected {MIN_BITS} to {MAX_BITS}")
        opset, ir_version = NEEDS[self.storage_bits]
        if self.opset < opset or self.ir_version < ir_version:
            raise InputError(
                f"'opset' {self.opset} and 'ir_version' {self.ir_version} are too old for 'storage_bits' "
                f"{self.storage_bits}; expected at least {opset} and {ir_version}"
            )
        if self.runtime == "ort" and not self.saturates and self.weight_bits > UNSATURATED_BITS:
            raise InputError(f"'saturates' is false; expected 'weight_bits' of at most {UNSATURATED_BITS} with it")

    def to_json(self) -> dict[str, Any]:
        """As it is recorded in a manifest."""
        return asdict(self)


def load_profile(target: str) -> TargetProfile:
    """A built-in target by name, or the one that a TOML file describes.

    Args:
        target: one of `BUILT_IN`, or the path of a file that ends in `.toml`.

    Raises:
        InputError: an unknown name, or a file that is missing, too large, not TOML, or has unknown, missing or wrong keys.
    """
    if target in BUILT_IN:
        return _read(FOLDER / f"{target}.toml")
    if not target.endswith(".toml"):
        raise InputError(f"unknown target {target!r:.200}; expected {', '.join(BUILT_IN)} or a path that ends in .toml")
    profile = _read(files.expanded(target))
    if profile.name in BUILT_IN:
        raise InputError(f"{target}: 'name' is {profile.name!r}, which is built in; choose another")
    return profile


def _read(path: Path) -> TargetProfile:
    try:
        values = files.read_toml(path, LIMIT)
    except InputError as exc:
        raise InputError(f"cannot read the target profile: {exc}") from exc
    try:
        return profile_of(values)
    except InputError as exc:
        raise InputError(f"{path}: {exc}") from exc


def profile_of(values: dict[str, Any]) -> TargetProfile:
    """A profile of plain values, as a TOML file or a manifest holds them.

    Raises:
        InputError: naming the key, what was got and what was expected.
    """
    kinds = {entry.name: KINDS[str(entry.type)] for entry in fields(TargetProfile)}
    keys = ", ".join(kinds)
    for key in sorted(values.keys() - kinds.keys()):
        raise InputError(f"unknown key {key!r:.60}; expected {keys}")
    for key, kind in kinds.items():
        if key not in values:
            raise InputError(f"the key {key!r} is missing; expected {keys}")
        if type(values[key]) is not kind:
            raise InputError(f"{key!r} is {shown(values[key])} ({type(values[key]).__name__}); expected {kind.__name__}")
    return TargetProfile(**values)
