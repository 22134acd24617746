"""What a server says of the model that it serves."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import edgeguard
from edgeguard.errors import InputError
from edgeguard.open_inference import BINARY_EXTENSION, Bounds, Spec
from edgeguard.serve.options import ServeOptions
from edgeguard.targets import Engine

VERSION = "1"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Model:
    """A model as clients see it.

    pixels, logits: its input (N, 3, H, W) and output (N, classes). claims: what else its metadata says, plain values.
    """

    name: str
    runtime: str
    pixels: Spec
    logits: Spec
    max_batch: int
    claims: Mapping[str, Any]

    @staticmethod
    def of(name: str, engine: Engine, options: ServeOptions, claims: Mapping[str, Any] | None = None) -> Model:
        """The model that an engine executes. claims: what is known of it besides what the engine tells.

        Raises:
            InputError: a name that no path can carry, or a limit of bodies below a single image.
        """
        if not NAME.fullmatch(name):
            raise InputError(f"a model is served under 1 to 100 letters, digits, '.', '_' and '-', got {name!r:.60}; give --name")
        pixels = Spec("pixels", "UINT8", (-1, *engine.input_shape))
        logits = Spec("logits", "FP32", (-1, engine.num_classes))
        described = engine.describe()
        told = {key: described[key] for key in ("runtime", "version", "provider", "machine") if isinstance(described.get(key), str)}
        model = Model(name, engine.name, pixels, logits, options.max_batch, {**told, **(claims or {})})
        if options.max_body < math.prod(engine.input_shape):
            raise InputError(f"a body of {options.max_body} bytes cannot hold a single image of {engine.input_shape}")
        return model

    def bounds(self, options: ServeOptions) -> Bounds:
        """What a request may hold."""
        return Bounds.of((self.max_batch, *self.pixels.shape[1:]), options.max_body)

    def metadata(self) -> dict[str, Any]:
        return {
            "name": self.name, "versions": [VERSION], "platform": f"edgeguard_{self.runtime}",
            "inputs": [self.pixels.document()], "outputs": [self.logits.document()],
            "parameters": {"max_batch_size": self.max_batch, **self.claims},
        }  # fmt: skip


def server_metadata() -> dict[str, Any]:
    return {"name": "edgeguard", "version": edgeguard.__version__, "extensions": [BINARY_EXTENSION]}
