"""What users write after --model: a name of ours, torchvision/NAME, or package.module:factory."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeguard.artifact import MAX_CLASSES
from edgeguard.errors import InputError, require
from edgeguard.models import resnet
from edgeguard.models.weights import apply_weights, read_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": resnet.resnet8,
    "resnet20": resnet.resnet20,
    "resnet32": resnet.resnet32,
    "resnet44": resnet.resnet44,
    "resnet56": resnet.resnet56,
}
Triple = tuple[float, float, float]
Constructor = Callable[[int | None], nn.Module]
"""Makes a model for so many classes, or for its own default."""


@dataclass(frozen=True, eq=False)
class FloatModel:
    """A classifier and how its input is normalized: logits = module((pixels / 255 - mean) / std).

    module: in evaluation mode, on the CPU; (N, 3, H, W) float32 to (N, num_classes). spec: what the user wrote.
    mean, std: per RGB channel, for pixels in [0, 1]. input_size: the usual height and width; None when unknown.
    """

    module: nn.Module
    spec: str
    mean: Triple
    std: Triple
    num_classes: int
    input_size: int | None


def load_model(spec: str, num_classes: int | None = None, weights: Path | None = None, seed: int = 0) -> FloatModel:
    """Make a float model and, if given, load trained weights into it.

    Args:
        spec: a key of `MODELS`, `torchvision/NAME`, or `package.module:factory` (also from the current folder), called
            with `num_classes` if it takes that. A factory's module may have attributes `mean` and `std` (3 numbers for
            pixels in [0, 1]), `input_size` and `num_classes`.
        num_classes: None takes the weights' last layer's, or without weights the model's default.
        weights: see `edgeguard.models.weights.read_weights`.
        seed: of the initial weights; the global generator is left as it was.

    Raises:
        InputError: an unknown model, a factory that fails, or weights that cannot be read or do not fit.
        MissingDependency: torchvision or safetensors is not installed.
    """
    if num_classes is not None and num_classes < 2:
        raise InputError(f"a classifier needs at least 2 classes, got {num_classes}")
    if num_classes is not None and num_classes > MAX_CLASSES:
        raise InputError(f"a classifier has at most {MAX_CLASSES} classes, got {num_classes}")
    build, input_size = _constructor(spec)
    state = None if weights is None else read_weights(weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build(num_classes)
        if num_classes is None and state is not None:
            wanted = _classes_in(state, module)
            if wanted not in (None, _head_classes(module)):
                torch.manual_seed(seed)
                module = build(wanted)
    if state is not None:
        apply_weights(module, state, str(weights))
    module.eval()
    if input_size is None:
        input_size = _input_size(module, spec)
    classes = _num_classes(module, spec, input_size)
    if num_classes is not None and classes != num_classes:
        raise InputError(f"{spec} makes a model of {classes} classes, but {num_classes} are needed")
    mean, std = _triple(module, "mean", IMAGENET_MEAN, spec), _triple(module, "std", IMAGENET_STD, spec)
    if min(std) <= 0:
        raise InputError(f"{spec}: std must be positive, got {std}")
    return FloatModel(module, spec, mean, std, classes, input_size)


def is_code(spec: str) -> bool:
    """Whether to make a model of this name is to import and run a module that is not of EdgeGuard or torchvision."""
    return ":" in spec and not spec.startswith("torchvision/")


def _constructor(spec: str) -> tuple[Constructor, int | None]:
    """What makes the model, and its input size where that is known beforehand."""
    if spec in MODELS:
        return lambda classes: MODELS[spec]() if classes is None else MODELS[spec](classes), None
    if spec.startswith("torchvision/"):
        return _torchvision(spec)
    if is_code(spec):
        return _factory(spec), None
    raise InputError(
        f"unknown model {spec!r:.80}; expected {', '.join(MODELS)}, torchvision/NAME or package.module:factory"
    )


def _torchvision(spec: str) -> tuple[Constructor, int | None]:
    models = require("torchvision.models", "train")
    name = spec.removeprefix("torchvision/")
    known = models.list_models(module=models)
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, 3)) or "resnet18, mobilenet_v2"
        raise InputError(f"torchvision has no classifier {name!r:.80}; expected a name such as {near}")
    fixed: dict[str, Any] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        fixed |= {"aux_logits": False, "init_weights": False}

    def build(classes: int | None) -> nn.Module:
        module: nn.Module = models.get_model(name, **fixed, **({} if classes is None else {"num_classes": classes}))
        return module

    presets = models.get_model_weights(name).DEFAULT.transforms()
    return build, int(presets.crop_size[0])


def _factory(spec: str) -> Constructor:
    """Import a factory; the current folder comes last on the search path, so it hides no installed package."""
    module_name, _, name = spec.partition(":")
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except Exception as exc:  # the user's own code, or a name that is none
        raise InputError(f"cannot import {name!r} from {module_name!r}: {exc}") from exc
    finally:
        sys.path.remove(folder)
    if not callable(factory):
        raise InputError(f"{spec} is a {type(factory).__name__}; expected a function that returns a torch module")
    takes_classes = _takes_classes(factory)

    def build(classes: int | None) -> nn.Module:
        try:
            module = factory(num_classes=classes) if takes_classes and classes is not None else factory()
        except Exception as exc:  # the user's own code
            raise InputError(f"{spec} failed: {type(exc).__name__}: {exc}") from exc
        if not isinstance(module, nn.Module):
            raise InputError(f"{spec} returned a {type(module).__name__}; expected a torch module")
        return module

    return build


def _takes_classes(factory: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # written in C
        return False
    return "num_classes" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _head(module: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d] | None:
    """The last linear layer or convolution in the order of registration."""
    found = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return found[-1] if found else None


def _head_classes(module: nn.Module) -> int | None:
    head = _head(module)
    return None if head is None else int(head[1].weight.shape[0])


def _classes_in(state: Mapping[str, Tensor], module: nn.Module) -> int | None:
    """Classes of the trained weights: rows of what they hold for the model's last layer."""
    head = _head(module)
    weight = None if head is None else state.get(f"{head[0]}.weight".removeprefix("."))
    return None if weight is None or weight.ndim == 0 else int(weight.shape[0])


def _input_size(module: nn.Module, spec: str) -> int | None:
    size = getattr(module, "input_size", None)
    if size is not None and (type(size) is not int or size < 1):
        raise InputError(f"{spec}: input_size must be a number of pixels, got {size!r}")
    return size


def _num_classes(module: nn.Module, spec: str, input_size: int | None) -> int:
    """From the model's last layer; for a factory that names its input's size, from what the model really returns."""
    stated = getattr(module, "num_classes", None)
    if type(stated) is int:
        return stated
    if ":" in spec and input_size is not None:
        try:
            with torch.no_grad():
                logits = module(torch.zeros(1, 3, input_size, input_size))
        except Exception as exc:  # the user's own code
            raise InputError(f"{spec} cannot run on one image of {input_size} pixels: {exc}") from exc
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise InputError(f"{spec} must return logits (N, classes) for images (N, 3, H, W)")
        return int(logits.shape[1])
    classes = _head_classes(module)
    if classes is None:
        raise InputError(f"{spec} has no linear layer to count its classes by; set its attribute num_classes")
    return classes


def _triple(module: nn.Module, name: str, default: Triple, spec: str) -> Triple:
    value = getattr(module, name, None)
    if value is None:
        return default
    try:
        numbers = [float(number) for number in value]
    except (TypeError, ValueError) as exc:
        raise InputError(f"{spec}: {name} must be three numbers, got {value!r}") from exc
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise InputError(f"{spec}: {name} must be three finite numbers, got {numbers}")
    return numbers[0], numbers[1], numbers[2]
