"""The smooth measures against the hard ones of `edgeguard.analysis`, and on maps whose likeness is known."""

import numpy as np
import pytest
import torch

from edgeguard.analysis import gradients
from edgeguard.defences import similarity


def maps(seed, count=6, side=16):
    rng = np.random.default_rng(seed)
    rough = torch.from_numpy(rng.standard_normal((count, 3, side, side)))
    return similarity.saliency(torch.nn.functional.avg_pool2d(rough, 3, 1, 1)).double()


def test_saliency_is_free_of_scale_and_sign():
    gradient = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = similarity.saliency(gradient)
    assert found.shape == (2, 1, 8, 8)
    assert torch.allclose(found.mean((2, 3)), torch.ones(2, 1, dtype=torch.float64))
    assert torch.allclose(found, similarity.saliency(-1e-6 * gradient))
    assert torch.allclose(found[0, 0] / found[0, 0, 0, 0], gradient[0].abs().sum(0) / gradient[0, :, 0, 0].abs().sum())


@pytest.mark.parametrize("measure", [similarity.edge_iou, similarity.hog_cosine])
def test_equal_maps_are_alike_and_others_less(measure):
    first, second = maps(0), maps(1)
    assert measure(first, first).numpy() == pytest.approx(np.ones(6), abs=1e-6)
    apart = measure(first, second)
    assert apart.shape == (6,)
    assert (apart < 0.9).all()
    assert (apart >= 0).all()
    between = measure(first, 0.8 * first + 0.2 * second)
    assert (between > apart).all()


def test_smooth_measures_rank_pairs_as_the_hard_ones_do():
    first, second = maps(0, 40), maps(1, 40)
    mixed = torch.linspace(0, 1, 40, dtype=torch.float64).view(-1, 1, 1, 1)
    other = (1 - mixed) * first + mixed * second
    pairs = [(a[0].numpy(), b[0].numpy()) for a, b in zip(first, other, strict=True)]
    hard_edges = np.array([gradients.edge_iou(a, b) for a, b in pairs])
    hogs = [(gradients.hog(a), gradients.hog(b)) for a, b in pairs]
    hard_hogs = np.array([float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in hogs])
    soft_edges, soft_hogs = similarity.edge_iou(first, other).numpy(), similarity.hog_cosine(first, other).numpy()
    assert np.corrcoef(hard_edges, soft_edges)[0, 1] > 0.9
    assert np.corrcoef(hard_hogs, soft_hogs)[0, 1] > 0.9


def test_orientations_fall_into_the_two_bins_next_to_them():
    ramp = torch.arange(16.0).repeat(16, 1)[None, None]  # rises to the right: orientation 0
    for image, strongest in ((ramp, 0), (-ramp, 0), (ramp.mT, None)):
        cells = similarity.hog(image).view(similarity.BINS, similarity.BLOCK**2, -1)[:, :, 4].sum(1)
        used = [index for index, value in enumerate(cells) if value > 1e-3]
        assert used == [strongest] if strongest is not None else used == [4, 5]


@pytest.mark.parametrize("measure", [similarity.edge_iou, similarity.hog_cosine])
def test_gradients_follow_finite_differences_and_survive_flat_maps(measure):
    first, second = maps(2, 2, 8), maps(3, 2, 8)
    step = torch.randn(first.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaf = first.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(measure(leaf, second).sum(), leaf)
    # across, so that the limit of the edges, which passes no gradient on, hardly moves
    size = 1e-6
    with torch.no_grad():
        high, low = measure(first + size * step, second), measure(first - size * step, second)
    if measure is similarity.hog_cosine:
        assert float((gradient * step).sum()) == pytest.approx(float((high - low).sum() / (2 * size)), rel=1e-3)
    assert float(gradient.abs().sum()) > 0
    flat = torch.zeros(2, 1, 8, 8, requires_grad=True)
    (nothing,) = torch.autograd.grad(measure(flat, maps(3, 2, 8).float()).sum(), flat)
    assert torch.isfinite(nothing).all()


def test_feature_cosine_is_a_mean_over_layers():
    a = [torch.tensor([[1.0, 0.0]]), torch.tensor([[[1.0], [1.0]]])]
    b = [torch.tensor([[0.0, 1.0]]), torch.tensor([[[2.0], [2.0]]])]
    assert float(similarity.feature_cosine(a, b)) == pytest.approx(0.5)
    assert float(similarity.feature_cosine(a, a)) == pytest.approx(1.0)
