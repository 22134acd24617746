from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgeguard.attacks.bpda import BPDA
from edgeguard.errors import EngineError

WEIGHT = torch.randn(48, 3, generator=torch.Generator().manual_seed(1)) / 255


def twin(images: torch.Tensor) -> torch.Tensor:
    return torch.tanh(images.flatten(1) @ WEIGHT)


def engine(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    with torch.no_grad():
        return twin(torch.from_numpy(images).float()).numpy()


def _gradient(model: Any, images: torch.Tensor) -> torch.Tensor:
    leaf = images.clone().requires_grad_()
    return torch.autograd.grad((model(leaf) ** 2).sum(), leaf)[0]


def test_equals_white_box_where_engine_and_twin_are_identical() -> None:
    images = torch.randint(0, 256, (5, 3, 4, 4), generator=torch.Generator().manual_seed(0)).float()
    live = BPDA(engine, twin)
    assert torch.equal(live(images), twin(images))
    assert torch.equal(_gradient(live, images), _gradient(twin, images))
    assert live.queries == 10


def test_values_come_from_the_engine_and_gradients_from_the_twin() -> None:
    images = torch.full((2, 3, 4, 4), 100.0)
    live = BPDA(lambda pixels: engine(pixels) + np.float32(7), twin)
    assert torch.equal(live(images), torch.from_numpy(engine(images.to(torch.uint8).numpy())) + 7)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(live(leaf).sum(), leaf)
    leaf = images.clone().requires_grad_()
    assert torch.equal(gradient, torch.autograd.grad(twin(leaf).sum(), leaf)[0])


def test_the_engine_sees_whole_grey_levels() -> None:
    seen = []

    def spy(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        seen.append(pixels)
        return engine(pixels)

    BPDA(spy, twin)(torch.full((1, 3, 4, 4), 99.6))
    assert seen[0].dtype == np.uint8
    assert (seen[0] == 100).all()


@pytest.mark.parametrize("answer", [np.full((2, 3), np.nan, np.float32), np.zeros((2, 4), np.float32)])
def test_an_engine_that_answers_nonsense(answer: NDArray[np.float32]) -> None:
    with pytest.raises(EngineError, match="finite logits"):
        BPDA(lambda pixels: answer, twin)(torch.zeros(2, 3, 4, 4))
