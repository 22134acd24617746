"""The folder that `harden` and `calibrate` write: `config.json`, `checkpoint.safetensors`, `metrics.jsonl` and the patches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from edgeguard import files, folders
from edgeguard.errors import InputError, shown
from edgeguard.models import FloatModel, is_code, load_model
from edgeguard.quant.model import Normalization, QuantizedModel, quantize_model
from edgeguard.quant.scheme import QuantScheme
from edgeguard.quant.width import Width, parse_width

SCHEMA = "edgeguard.run/1"
CONFIG, CHECKPOINT, METRICS, PATCHES = "config.json", "checkpoint.safetensors", "metrics.jsonl", "patches"
MODEL = "model."
LARGEST = 1e6
"""Of the mean and deviation of pixels, which lie in [0, 1]."""
STATE = "edgeguard"
"""The one metadata key of a checkpoint: several keys would be written in an order that changes from run to run."""
SCHEME = {"boundary_bits": int, "residual_bits": int, "signed_activations": bool, "max_weight_bits": int}
REQUIRED = {"schema": str, "model": dict, "scheme": dict, "data": dict, "training": dict, "versions": dict}


@dataclass(frozen=True)
class Run:
    """A hardening run on disk. config: the resolved configuration; its keys are those of `REQUIRED`.

    trust_code: a model `package.module:factory` that the configuration names may be imported, which runs it.
    """

    path: Path
    config: dict[str, Any]
    trust_code: bool = False

    @staticmethod
    def create(path: Path, config: dict[str, Any]) -> Run:
        """Make the folder, which must not exist yet, and write the configuration, whose model is the caller's own."""
        with folders.folder_transaction(path) as folder:
            Run.begin(folder, config)
        return Run.load(path, trust_code=True)

    @staticmethod
    def begin(folder: Path, config: dict[str, Any]) -> Run:
        """Write the configuration, whose model is the caller's own, into a folder that is there."""
        document = {"schema": SCHEMA, **config}
        files.write_json(folder / CONFIG, document)
        return Run(folder, document, trust_code=True)

    @staticmethod
    def load(path: Path | str, trust_code: bool = False) -> Run:
        """Open a run.

        trust_code: whoever asks for it knows the run's own code, if it names any, and wants it to be imported.

        Raises:
            InputError: no run, another schema, or a key of its configuration is missing.
        """
        path = Path(path)
        if not (path / CONFIG).is_file():
            raise InputError(f"{path} is not a run: it has no {CONFIG}; make one with `edgeguard harden` or `edgeguard calibrate`")
        config = files.read_json(path / CONFIG)
        if not isinstance(config, dict) or config.get("schema") != SCHEMA:
            raise InputError(f"{path / CONFIG} is not of schema {SCHEMA!r}")
        for key, kind in REQUIRED.items():
            if type(config.get(key)) is not kind:
                raise InputError(f"{path / CONFIG}: {key!r} is missing or not a {kind.__name__}")
        return Run(path, config, trust_code)

    @property
    def names_code(self) -> bool:
        """Whether the run's model is code of somebody's own, which is imported only where it is trusted."""
        return is_code(str(self.config["model"].get("spec")))

    @property
    def checkpoint(self) -> Path:
        return self.path / CHECKPOINT

    @property
    def widths(self) -> tuple[Width, ...]:
        """The widths the run was trained at."""
        widths = self.config["scheme"].get("widths", [])
        if not isinstance(widths, list):
            raise InputError(f"{self.path / CONFIG}: the widths must be a list, got {shown(widths)}")
        return tuple(parse_width(str(width)) for width in widths)

    def scheme(self) -> QuantScheme:
        """The quantization scheme of the run's model."""
        entry = self.config["scheme"]
        for key, kind in SCHEME.items():
            if key in entry and type(entry[key]) is not kind:
                raise InputError(f"{self.path / CONFIG}: {key!r} of the scheme must be {kind.__name__}, got {shown(entry[key])}")
        absent = [key for key in ("boundary_bits", "residual_bits", "signed_activations") if key not in entry]
        if absent:
            raise InputError(f"{self.path / CONFIG}: the scheme has no {absent[0]!r}")
        limit = entry.get("max_weight_bits", QuantScheme.max_weight_bits)  # runs of version 0.1.0 have none
        return QuantScheme(self.widths, entry["boundary_bits"], entry["residual_bits"], entry["signed_activations"], limit)

    def check_trust(self) -> None:
        """Raises InputError where making the run's model would import code that is not trusted."""
        if self.names_code and not self.trust_code:
            raise InputError(
                f"{self.path / CONFIG} names its model by code, {shown(self.config['model']['spec'])}, which would be imported "
                "and run; if you know that code and trust it, add --trust-code"
            )

    def float_model(self) -> FloatModel:
        """The run's float model with untrained weights: its architecture alone.

        Raises:
            InputError: the configuration names a model that cannot be made, or by code that is not trusted.
        """
        entry = self.config["model"]
        try:
            spec, classes, mean, std = entry["spec"], entry["num_classes"], entry["mean"], entry["std"]
        except KeyError as exc:
            raise InputError(f"{self.path / CONFIG} does not describe a model: it has no {exc}") from exc
        if not isinstance(spec, str) or type(classes) is not int:
            raise InputError(f"{self.path / CONFIG} does not describe a model: spec {shown(spec)}, classes {shown(classes)}")
        self.check_trust()
        model = load_model(spec, classes)
        return replace(model, mean=self._colours("mean", mean), std=self._colours("std", std))

    def _colours(self, name: str, values: Any) -> tuple[float, float, float]:
        """Three numbers of the normalization; deviations are positive."""
        numbers = values if isinstance(values, list) and all(type(value) in (int, float) for value in values) else []
        if len(numbers) != 3 or max(map(abs, numbers)) > LARGEST or (name == "std" and min(numbers) <= 0):
            raise InputError(f"{self.path / CONFIG}: the model's {name} must be three numbers, got {shown(values)}")
        return numbers[0], numbers[1], numbers[2]

    def build(self) -> QuantizedModel:
        """The run's quantized model with untrained weights.

        Raises:
            InputError: the configuration names a model that cannot be made.
        """
        model = self.float_model()
        try:
            scheme = self.scheme()
        except (KeyError, TypeError) as exc:
            raise InputError(f"{self.path / CONFIG} does not describe a model: {exc}") from exc
        return quantize_model(model.module, scheme, Normalization(model.mean, model.std))

    def load_model(self) -> QuantizedModel:
        """The hardened model, in evaluation mode.

        Raises:
            InputError: the checkpoint is missing, truncated, of another architecture, or holds NaN or infinity.
        """
        tensors, _ = self.read_checkpoint()
        model = self.build()
        restore_model(model, tensors, self.checkpoint)
        return model.eval()

    def write_checkpoint(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Replace the checkpoint atomically; equal contents give equal bytes.

        tensors: by name; the model's begin with `MODEL`. state: anything JSON can hold.
        """
        plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        data = safetensors.torch.save(plain, {STATE: json.dumps(state, sort_keys=True)})
        files.write_bytes(self.checkpoint, data)

    def checkpoint_sha256(self) -> str:
        """Hexadecimal SHA-256 of the last checkpoint. Raises InputError where there is none, or it cannot be read."""
        return files.sha256(self._there())

    def _there(self) -> Path:
        if not self.checkpoint.is_file():
            raise InputError(f"{self.checkpoint} does not exist: the run has not come to its first checkpoint; "
                             f"wait for it, or go on with: edgeguard harden --resume {self.path}")  # fmt: skip
        return self.checkpoint

    def read_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and state of the last checkpoint.

        Raises:
            InputError: missing, truncated or not a checkpoint of this project.
        """
        path = self._there()
        try:
            with safe_open(path, framework="pt") as handle:
                metadata = handle.metadata() or {}
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            state = files.parse_json(metadata[STATE].encode())
        except Exception as exc:  # a damaged file may raise anything
            raise InputError(f"{path} is truncated or not a checkpoint: {exc!s:.200}") from exc
        if not isinstance(state, dict):
            raise InputError(f"{path} is not a checkpoint: its state is {shown(state)}")
        return tensors, state


def restore_model(model: QuantizedModel, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Load a checkpoint's model tensors, strictly.

    Raises:
        InputError: missing or unexpected keys (which), other shapes, NaN or infinity.
    """
    own = model.state_dict()
    given = {name.removeprefix(MODEL): value for name, value in tensors.items() if name.startswith(MODEL)}
    wrong = sorted(own.keys() ^ given.keys()) or sorted(k for k in own if own[k].shape != given[k].shape)
    if wrong:
        raise InputError(f"{source} is of another architecture: {wrong[:3]!s:.300} and {max(0, len(wrong) - 3)} more differ")
    for name, value in given.items():
        if value.dtype != own[name].dtype:
            raise InputError(f"{source}: {name} is {value.dtype}, expected {own[name].dtype}")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"{source}: {name} holds NaN or infinity")
    model.load_state_dict(given)
