"""Every trust check passes on a sound model and fails on a planted fault."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgeguard.attacks.bpda import BPDA
from edgeguard.verify import trust
from edgeguard.verify.harness import Judged, Subject
from edgeguard.verify.judge import Findings
from edgeguard.verify.options import VerifyOptions

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
WEIGHT = torch.randn(192, 3, generator=torch.Generator().manual_seed(0)) / 300


def twin(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1) @ WEIGHT


def engine(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    with torch.no_grad():
        return twin(torch.from_numpy(images).float()).double().float().numpy()


LABELS = engine(IMAGES).argmax(1)
SUBJECT = Subject.of(engine, IMAGES, LABELS, batch_size=8)


def test_deterministic() -> None:
    assert trust.deterministic(SUBJECT)["passed"]
    counter = itertools.count()
    unstable = Subject.of(lambda x: engine(x) + np.float32(next(counter) * 1e-3), IMAGES, LABELS, batch_size=8)
    assert trust.deterministic(unstable)["passed"] is False


def test_batch_one_agrees() -> None:
    assert trust.batch_one_agrees(SUBJECT)["passed"]
    flipping = Subject.of(lambda x: engine(x) * (1 if len(x) > 1 else -1), IMAGES, LABELS, batch_size=8)
    assert trust.batch_one_agrees(flipping)["passed"] is False
    wavering = Subject.of(lambda x: engine(x) + np.float32(len(x) * 1e-3), IMAGES, LABELS, batch_size=8)
    found = trust.batch_one_agrees(wavering)
    assert found["passed"]
    assert "0.007" in found["detail"]


def test_gradients_alive() -> None:
    assert trust.gradients_alive(twin, SUBJECT, "margin")["passed"]
    dead = trust.gradients_alive(lambda x: twin(x.round() * 0 + x.detach()), SUBJECT, "margin")
    assert dead["passed"] is False
    assert "100.0%" in dead["detail"]
    assert trust.gradients_alive(None, SUBJECT, "margin")["passed"] is None


def test_large_patch_wins() -> None:
    assert trust.large_patch_wins(BPDA(engine, twin), SUBJECT, 0)["passed"]
    masked = BPDA(engine, lambda x: twin(x.detach()) + 0 * x.flatten(1)[:, :3])
    assert trust.large_patch_wins(masked, SUBJECT, 0)["passed"] is False
    assert trust.large_patch_wins(None, SUBJECT, 0)["passed"] is None


def judged(successes: int, n: int = 200) -> Judged:
    fooled = np.arange(n) < successes
    zeros = np.zeros((n, 2))
    return Judged(np.ones(n, bool), fooled, ~fooled, zeros.astype(np.float32), zeros.astype(np.int64), 1)


@pytest.mark.parametrize(("white", "black", "passed"), [(100, 50, True), (100, 101, True), (100, 130, False)])
def test_white_box_strongest(white: int, black: int, passed: bool) -> None:
    weak = ("weak", judged(3))
    found = trust.white_box_strongest([weak, ("white", judged(white))], [("black", judged(black)), weak])
    assert found["passed"] is passed
    assert "white-box white" in found["detail"]


def test_white_box_strongest_needs_both_sides() -> None:
    found = trust.white_box_strongest([], [("noise", judged(1))])
    assert found["passed"] is None
    assert "white-box" in found["detail"]
    assert trust.white_box_strongest([("white", judged(1))], [])["passed"] is None


class Hidden:
    """Two layers; `noise` is added to the activations between them, `scale` multiplies the logits."""

    def __init__(self, noise: float = 0.0, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(1)
        self.first = torch.randn(192, 32, generator=generator) / 300
        self.second = torch.randn(32, 3, generator=generator)
        self.noise, self.scale = noise, scale

    def twin(self, images: torch.Tensor) -> torch.Tensor:
        return (images.flatten(1) @ self.first).relu() @ self.second * self.scale

    def engine(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.no_grad():
            hidden = (torch.from_numpy(images).float().flatten(1) @ self.first).relu()
            hidden = hidden + self.noise * torch.randn(hidden.shape)
            return (hidden.double() @ self.second.double() * self.scale).float().numpy()

    def checks(self) -> dict[str, bool | None]:
        labels = self.engine(IMAGES).argmax(1)
        subject = Subject.of(self.engine, IMAGES, labels, batch_size=8)
        found = trust.run_all(subject, self.twin, Findings(), VerifyOptions(), None)
        return {check["check"]: check["passed"] for check in found}


def test_planted_gradient_masking_is_caught_and_an_honest_model_is_not() -> None:
    honest = Hidden().checks()
    assert list(honest) == list(trust.NAMES)
    assert False not in honest.values()
    saturated = Hidden(scale=1e4).checks()
    assert saturated["softmax_unsaturated"] is False
    assert saturated["large_patch_wins"], "our own losses do not depend on the logits' scale"
    noisy = Hidden(noise=0.5).checks()
    assert noisy["deterministic"] is False


def test_nothing_is_checked_on_an_engine_that_failed() -> None:
    found = trust.not_run("it died")
    assert [check["check"] for check in found] == list(trust.NAMES)
    assert all(check["passed"] is None and "it died" in check["detail"] for check in found)
