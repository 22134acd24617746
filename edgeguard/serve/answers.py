"""From the body of an inference request to images, and from logits to the body of its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeguard.errors import InputError
from edgeguard.open_inference import Bounds, TooLarge, read_message, read_tensors, write_message
from edgeguard.serve.model import VERSION, Model
from edgeguard.targets import Images, Logits

LONGEST_ID = 200


@dataclass(frozen=True, eq=False)
class Request:
    """What a client asks for. id: given back as it came. binary: the logits as bytes."""

    images: Images
    id: str | None
    binary: bool


def read_request(body: bytes, header_length: str | None, model: Model, bounds: Bounds) -> Request:
    """Raises InputError for what the model cannot take, and `TooLarge` for too much of it."""
    document, blob = read_message(body, header_length, bounds)
    tensors = read_tensors(document, "inputs", blob, bounds)
    wanted = f"one tensor {model.pixels.name!r} of UINT8 {list(model.pixels.shape)}"
    if len(tensors) != 1 or tensors[0].name != model.pixels.name:
        raise InputError(f"the model takes {wanted}, got {', '.join(repr(tensor.name)[:60] for tensor in tensors[:4])}")
    images = tensors[0].values
    if images.dtype != np.uint8 or images.shape[1:] != model.pixels.shape[1:] or images.shape[0] < 1:
        raise InputError(f"the model takes {wanted} and at least one image, got {images.dtype.name} {list(images.shape)}")
    if len(images) > model.max_batch:
        raise TooLarge(f"{len(images)} images in one request; at most {model.max_batch} are taken")
    return Request(images, _id(document), _wants_bytes(document, model))


def write_answer(request: Request, logits: Logits, model: Model) -> tuple[bytes, int | None]:
    """The body, and the length of the JSON in it when bytes follow."""
    head = {"model_name": model.name, "model_version": VERSION, **({} if request.id is None else {"id": request.id})}
    return write_message(head, "outputs", {model.logits.name: logits}, request.binary)


def _id(document: Mapping[str, Any]) -> str | None:
    value = document.get("id")
    if value is not None and (not isinstance(value, str) or len(value) > LONGEST_ID):
        raise InputError(f"the id of a request must be text of at most {LONGEST_ID} characters, got {value!r:.60}")
    return value


def _wants_bytes(document: Mapping[str, Any], model: Model) -> bool:
    """What the request says of its outputs, as a whole and one by one."""
    binary = _flag(document, "binary_data_output")
    outputs = document.get("outputs")
    if outputs is None:
        return binary
    if not isinstance(outputs, list) or len(outputs) > 1 or any(not isinstance(entry, dict) for entry in outputs):
        raise InputError(f"'outputs' must be a list of at most one object, for the model has one output, got {outputs!r:.60}")
    for entry in outputs:
        if entry.get("name") != model.logits.name:
            raise InputError(f"the model's output is {model.logits.name!r}, got {entry.get('name')!r:.60}")
        own = entry.get("parameters")
        if own is not None and not isinstance(own, dict):
            raise InputError(f"the parameters of an output must be an object, got {type(own).__name__}")
        if isinstance(own, dict) and "classification" in own:
            raise InputError("the extension 'classification' is not supported; ask for the logits")
        if isinstance(own, dict) and "shared_memory_region" in own:
            raise InputError("the extension 'shared memory' is not supported; ask for the logits as bytes")
        if isinstance(own, dict) and "binary_data" in own:
            binary = _flag(entry, "binary_data")
    return binary


def _flag(holder: Mapping[str, Any], name: str) -> bool:
    parameters = holder.get("parameters")
    if parameters is None:
        return False
    value = parameters.get(name, False) if isinstance(parameters, dict) else parameters
    if type(value) is not bool:
        raise InputError(f"the parameter {name!r} must be true or false, got {value!r:.60}")
    return value
