"""Measures whose values are known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeguard.analysis.gradients import compare, edge_iou, hog, input_gradients, saliency, summary

RNG = np.random.default_rng(0)
GRADIENTS = RNG.normal(size=(12, 3, 16, 16)).astype(np.float32)


def test_equal_gradients_agree_entirely() -> None:
    found = compare(GRADIENTS, GRADIENTS, 0)
    for name in ("cosine", "hog_cosine", "edge_iou"):
        assert found[name]["mean"] == pytest.approx(1)
        assert found[name]["n"] == 12


def test_opposite_gradients_point_apart_but_lie_at_the_same_places() -> None:
    found = compare(GRADIENTS, -2 * GRADIENTS, 0)
    assert found["cosine"]["mean"] == pytest.approx(-1)
    assert found["hog_cosine"]["mean"] == pytest.approx(1)
    assert found["edge_iou"]["mean"] == pytest.approx(1)


def test_independent_gradients_are_orthogonal_within_the_interval() -> None:
    other = np.random.default_rng(1).normal(size=GRADIENTS.shape).astype(np.float32)
    found = compare(GRADIENTS, other, 0)
    low, high = found["cosine"]["ci95"]
    assert low < found["cosine"]["mean"] < high
    assert abs(found["cosine"]["mean"]) < 0.05
    assert found["edge_iou"]["mean"] < 0.2


def test_images_without_a_gradient_are_left_out() -> None:
    dead = GRADIENTS.copy()
    dead[:5] = 0
    assert compare(dead, GRADIENTS, 0)["cosine"]["n"] == 7
    assert compare(np.zeros_like(GRADIENTS), GRADIENTS, 0)["hog_cosine"] == {"mean": None, "ci95": None, "n": 0}


def test_hog_forgives_a_shift_within_a_cell_and_sees_a_turn() -> None:
    stripes = np.tile(np.repeat([0.0, 1.0], 4), 4)[None].repeat(32, 0)
    same, turned = hog(np.roll(stripes, 4, 1)), hog(stripes.T)
    assert hog(stripes) @ same / (np.linalg.norm(hog(stripes)) * np.linalg.norm(same)) > 0.95
    assert hog(stripes) @ turned / (np.linalg.norm(hog(stripes)) * np.linalg.norm(turned)) < 0.1


def test_edges_overlap_where_the_maps_have_steps() -> None:
    left, right = np.zeros((16, 16)), np.zeros((16, 16))
    left[:, :4] = 1
    right[:, 12:] = 1
    assert edge_iou(left, left) == 1
    assert edge_iou(left, right) == 0


def test_gradients_are_those_of_the_model() -> None:
    weight = torch.randn(3 * 4 * 4, 5, generator=torch.Generator().manual_seed(0))
    images = RNG.integers(0, 256, (7, 3, 4, 4), dtype=np.uint8)
    found = input_gradients(lambda x: x.flatten(1) @ weight, images, np.arange(7) % 5)
    assert found.shape == images.shape
    flat = torch.from_numpy(found).flatten(1)
    residual = flat - flat @ torch.linalg.pinv(weight.T) @ weight.T
    assert residual.abs().max() < 1e-4 * flat.abs().max(), "gradients of a linear model lie in the span of its weights"
    np.testing.assert_allclose(saliency(found.astype(float)), np.abs(found).sum(1), rtol=1e-6)


def test_the_interval_of_a_mean_shrinks_with_its_images() -> None:
    few, many = (summary(np.random.default_rng(0).normal(size=n), 0)["ci95"] for n in (20, 2000))
    assert many[1] - many[0] < (few[1] - few[0]) / 5
