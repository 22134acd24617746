from __future__ import annotations

import pytest
import torch

from edgeguard.attacks.losses import LOSSES, bounded_margin, cross_entropy, get_loss, margin, scaled_cross_entropy
from edgeguard.errors import InputError

LOGITS = torch.tensor([[4.0, 1.0, 0.0], [0.0, 3.0, 3.5]])
LABELS = torch.tensor([0, 1])


def test_margin_is_positive_exactly_when_the_attack_succeeds() -> None:
    assert margin(LOGITS, LABELS).tolist() == [-3.0, 0.5]
    assert margin(LOGITS, LABELS, 2).tolist() == [-4.0, 0.5]


def test_cross_entropy() -> None:
    expected = -torch.log_softmax(LOGITS, 1)[[0, 1], LABELS]
    assert torch.allclose(cross_entropy(LOGITS, LABELS), expected)
    assert torch.allclose(cross_entropy(LOGITS, LABELS, 2), torch.log_softmax(LOGITS, 1)[:, 2])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("target", [None, 2])
def test_values_per_image_that_climb_toward_success(name: str, target: int | None) -> None:
    logits = (torch.randn(20, 3, generator=torch.Generator().manual_seed(0)) * 3).requires_grad_()
    labels = torch.zeros(20, dtype=torch.int64)
    values = get_loss(name)(logits, labels, target)
    assert values.shape == (20,)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    if target is None:
        assert (gradient[:, 0] < 0).all()
    else:
        assert (gradient[:, target] > 0).all()


@pytest.mark.parametrize("name", ["bounded-margin", "scaled-cross-entropy"])
def test_the_scale_of_the_logits_does_not_matter(name: str) -> None:
    loss = get_loss(name)
    assert torch.allclose(loss(LOGITS, LABELS, None), loss(LOGITS * 1e4, LABELS, None), atol=1e-5)


def test_large_logits_kill_plain_cross_entropy_only() -> None:
    def gradient(loss: object) -> float:
        leaf = torch.tensor([[1.0, 0.3, 0.0]], requires_grad=True)
        value = loss(leaf * 1e4, torch.tensor([0]), None).sum()  # type: ignore[operator]
        return float(torch.autograd.grad(value, leaf)[0].abs().max())

    assert gradient(cross_entropy) == 0
    assert gradient(scaled_cross_entropy) > 1e-3
    assert gradient(bounded_margin) > 1e-3


def test_scaled_probabilities_are_never_saturated() -> None:
    logits = torch.tensor([[1e5, 0.0, -1e5], [1e-6, 0.0, 0.0]])
    labels = torch.tensor([0, 0])
    assert (scaled_cross_entropy(logits, labels) >= -torch.log(torch.tensor(0.99)) - 1e-4).all()


def test_equal_logits_are_finite() -> None:
    for name in LOSSES:
        leaf = torch.zeros(2, 3, requires_grad=True)
        value = get_loss(name)(leaf, torch.tensor([0, 1]), None)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert torch.isfinite(value).all()
        assert torch.isfinite(gradient).all(), name


def test_unknown_loss() -> None:
    with pytest.raises(InputError, match="margin"):
        get_loss("mse")
