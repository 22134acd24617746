"""Passes recorded as CUDA graphs are tried before they are relied on. No GPU is needed to see what a trial finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_training import small_trainer
from torch import Tensor

from edgeguard.defences import graphs
from edgeguard.defences.graphs import ROUNDS, TOLERANCE, graphs_fail, settle_graphs
from edgeguard.defences.trainer import Trainer
from edgeguard.quant.view import CompiledView, compiler_missing

WIDTHS = 3


class Replayed:
    """The trainer's forward, but for one pass, whose pixels and logits go through `damage`."""

    def __init__(self, trainer: Trainer, number: int, damage: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        self._forward, self._number, self._damage = trainer._forward, number, damage
        self.passes = 0

    def __call__(self, pixels: Tensor) -> Tensor:
        self.passes += 1
        if self.passes == self._number:
            return self._damage(self._forward(self._damage(pixels, None)), pixels)
        return self._forward(pixels)


def trainer() -> Trainer:
    return small_trainer("qat", {}, batch_size=16)


def state(subject: Trainer) -> list[Tensor]:
    return [tensor.clone() for tensor in subject.model.state_dict().values()]


def test_passes_that_agree_pass_and_the_model_stays_what_it_was() -> None:
    subject = trainer()
    before = state(subject)
    subject._forward = forward = Replayed(subject, 0, lambda value, _: value)
    assert graphs_fail(subject) is None
    assert forward.passes == ROUNDS * WIDTHS
    assert all(torch.equal(one, other) for one, other in zip(before, state(subject), strict=True))
    assert all(parameter.grad is None for parameter in subject.model.parameters())


def stale(value: Tensor, pixels: Tensor | None) -> Tensor:
    """The pass is of the pixels of the pass before: what a graph replays whose input was not renewed."""
    return value.roll(1, 0) if pixels is None else value


def scaled(value: Tensor, pixels: Tensor | None) -> Tensor:
    return value if pixels is None else value * (1 + 3 * TOLERANCE)


def missing(value: Tensor, pixels: Tensor | None) -> Tensor:
    return value if pixels is None else value * float("nan")


@pytest.mark.parametrize("damage", [stale, scaled, missing])
@pytest.mark.parametrize("number", [WIDTHS + 1, 2 * WIDTHS + 2, ROUNDS * WIDTHS])
def test_a_pass_that_differs_is_found(damage: Callable[[Tensor, Tensor | None], Tensor], number: int) -> None:
    subject = trainer()
    before = state(subject)
    subject._forward = Replayed(subject, number, damage)
    reason = str(graphs_fail(subject))
    width = subject.config.widths[(number - 1) % WIDTHS]
    assert f"at width {width} a replayed pass is" in reason
    assert all(torch.equal(one, other) for one, other in zip(before, state(subject), strict=True))


def test_statistics_that_are_not_moved_are_found() -> None:
    subject = trainer()
    plain = subject._forward

    def forward(pixels: Tensor) -> Tensor:
        forward.passes += 1  # type: ignore[attr-defined]
        kept = [buffer.clone() for buffer in subject.model.buffers()]
        logits = plain(pixels)
        if forward.passes > WIDTHS:  # type: ignore[attr-defined]
            for buffer, value in zip(subject.model.buffers(), kept, strict=True):
                buffer.data = value
        return logits

    forward.passes = 0  # type: ignore[attr-defined]
    subject._forward = forward
    assert "a replayed pass is" in str(graphs_fail(subject))


def test_what_pytorch_says_is_passed_on() -> None:
    subject = trainer()

    def forward(pixels: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore of it.")

    subject._forward = forward
    assert graphs_fail(subject) == "CUDA out of memory."


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.skipif(compiler_missing() is not None, reason=str(compiler_missing()))
def test_passes_that_are_not_recorded_are_found() -> None:
    """PyTorch itself, on a device of which it records nothing."""
    subject = trainer()
    subject._forward = CompiledView(subject.model, compiled=True, graphs=True)
    assert graphs_fail(subject) == "PyTorch does not record them of this model"
    pixels = torch.from_numpy(subject.dataset.images(np.arange(4))).float()
    with torch.no_grad():
        logits = subject._forward(pixels)
        again = subject._forward(255 - pixels)
    assert logits.data_ptr() != again.data_ptr()


def test_a_run_goes_on_without_them_and_says_why() -> None:
    subject = trainer()
    assert settle_graphs(subject) is None
    subject.config = replace(subject.config, cuda_graphs=True, compiled=True)
    assert settle_graphs(subject) == "this run is on cpu, and only passes on a CUDA device can be recorded"
    subject.step(np.arange(16))


def test_a_run_whose_trial_fails_is_compiled_anew_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = trainer()
    subject.config = replace(subject.config, cuda_graphs=True, compiled=True)
    monkeypatch.setattr(graphs, "unrecordable", lambda *_: None)
    monkeypatch.setattr(graphs, "graphs_fail", lambda _: "no memory")
    before = subject._forward
    assert settle_graphs(subject) == "no memory"
    assert isinstance(subject._forward, CompiledView)
    assert subject._forward is not before
    assert not subject._forward._graphs


def test_several_processes_go_on_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that one GPU began, resumed by two."""
    subject = trainer()
    subject.config = replace(subject.config, cuda_graphs=True, compiled=True)
    subject.processes = replace(subject.processes, world=2)
    subject.device = torch.device("cuda", 0)
    assert "train with one" in str(settle_graphs(subject))
