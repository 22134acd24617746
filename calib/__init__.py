"""Calibration: set the scale of every activation quantizer, at every width, from a few real images."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeguard.calib.estimators import ENTROPY_SAMPLES_PER_BATCH, ESTIMATORS, SAMPLES_PER_BATCH, Observer, merge
from edgeguard.errors import InputError
from edgeguard.quant.model import QuantizedModel
from edgeguard.quant.place import FUNCTIONS
from edgeguard.quant.quantizers import ActivationQuantizer, ScaleGroup
from edgeguard.quant.width import Width

FRACTIONS = 64


def calibration_indices(size: int, count: int, seed: int) -> NDArray[np.int64]:
    """`count` different indices below `size` (all of them when there are fewer), sorted, the same for the same seed.

    Raises:
        InputError: nothing to choose from.
    """
    if size < 1 or count < 1:
        raise InputError(f"calibration needs at least one image, got {min(size, count)}")
    chosen = np.random.default_rng(seed).permutation(size)[:count]
    return np.sort(chosen).astype(np.int64)


@torch.no_grad()
def calibrate(
    model: QuantizedModel, images: NDArray[np.uint8], estimator: str = "mse", batch_size: int = 64,
    on_batch: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Observe the unquantized activations of `images` once, then set scales and exponents for every width, in place.

    images: (N, 3, H, W) uint8. estimator: one of `ESTIMATORS`. on_batch: called with the number of images of each batch.

    Raises:
        InputError: an unknown estimator or no images.
    """
    if estimator not in ESTIMATORS:
        raise InputError(f"unknown estimator {estimator!r}; expected one of {', '.join(ESTIMATORS)}")
    quantizers = list(model.activation_quantizers().values())
    per_batch = ENTROPY_SAMPLES_PER_BATCH if estimator == "entropy" else SAMPLES_PER_BATCH
    observers = [
        Observer(per_batch, -math.inf if q.signed else 0.0, math.inf if q.ceiling is None else q.ceiling) for q in quantizers
    ]
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    model.enable_quantization(False)
    for quantizer, observer in zip(quantizers, observers, strict=True):
        quantizer.observer = observer
    try:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            model(torch.from_numpy(batch).to(device).float())
            if on_batch is not None:
                on_batch(len(batch))
    finally:
        for quantizer in quantizers:
            quantizer.observer = None
        model.enable_quantization(True)
        model.train(training)
    seen = dict(zip(quantizers, observers, strict=True))
    branches = _branches(model)
    for index, width in enumerate(model.control.widths):
        for group in model.groups():
            _set_group(group, {q: seen[q] for q in model.members(group)}, width, index, estimator)
        for branch in branches:
            _round_once(*branch, index)


def _branches(model: QuantizedModel) -> list[tuple[ActivationQuantizer, ActivationQuantizer, list[ActivationQuantizer]]]:
    """Residual branches that only one addition reads: the sum's quantizer, the branch's, and those of the other addend."""
    quantizers = model.activation_quantizers()
    ties = Counter(quantizer.tie for quantizer in quantizers.values())

    def own(node: Any) -> ActivationQuantizer | None:
        return quantizers.get(str(node.target)) if node.op == "call_module" else None

    def sources(node: Any) -> list[ActivationQuantizer]:
        found = own(node)
        return [found] if found is not None else [q for source in node.all_input_nodes for q in sources(source)]

    found = []
    for node in model.body.graph.nodes:
        output, head = own(node), next(iter(node.all_input_nodes), None)
        if output is None or head is None or FUNCTIONS.get(head.target) != "add" or len(head.all_input_nodes) != 2:
            continue
        for addend, other in itertools.permutations(head.all_input_nodes):
            branch = own(addend)
            if branch is not None and branch.role == "residual" and len(addend.users) == 1 == ties[branch.tie]:
                found.append((output, branch, sources(other)))
    return found


def _round_once(
    output: ActivationQuantizer, branch: ActivationQuantizer, others: list[ActivationQuantizer], index: int
) -> None:
    """Give a residual branch the scale of its sum, where the shortcut lies on that grid already.

    The sum of whole numbers is whole, so the branch is rounded once, to the same integers as if the sum alone were; on a
    finer grid it would be rounded twice, and the runtime would need a second operation for it.
    """
    grid = int(output.exponent[index])
    if int(branch.exponent[index]) < grid <= min(int(other.exponent[index]) for other in others):
        branch.set_exponent(index, grid)


def _set_group(
    group: ScaleGroup, members: dict[ActivationQuantizer, Observer], width: Width, index: int, estimator: str
) -> None:
    """Choose the group's scale so that power-of-two multiples of it come nearest to what each tie wants.

    A tie is one quantizer, or those whose outputs are concatenated: they get one scale for all they have seen together.
    Tensors that are only added are kept at a finer type, so their scale is rounded up: they must not clip.
    """
    ties: dict[int, list[ActivationQuantizer]] = {}
    for quantizer in members:
        ties.setdefault(quantizer.tie, []).append(quantizer)
    firsts = [tied[0] for tied in ties.values()]
    wanted = [
        math.log2(ESTIMATORS[estimator](merge([members[q] for q in tied]), tied[0].dtype(width))) for tied in ties.values()
    ]
    residual = [quantizer.role == "residual" for quantizer in firsts]

    def exponent(number: int, base: float) -> int:
        distance = wanted[number] - base
        return math.ceil(distance) if residual[number] else round(distance)

    def misfit(base: float) -> float:
        counted = (n for n in range(len(wanted)) if not residual[n] or len(wanted) == 1)
        return sum((wanted[n] - base - exponent(n, base)) ** 2 for n in counted)

    base = wanted[0]
    if len(wanted) > 1:
        base = min((wanted[0] + step / FRACTIONS for step in range(FRACTIONS)), key=misfit)
    group.log_scale[index] = base
    for number, tied in enumerate(ties.values()):
        for quantizer in tied:
            quantizer.set_exponent(index, exponent(number, base))
