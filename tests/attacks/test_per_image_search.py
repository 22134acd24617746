"""A-QAPA per image: places, moves, restarts, who leaves, and what gradients cannot find."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from known_optima import IMAGES, LABELS, by_channel, network, of, window

from edgeguard.attacks.per_image import PerImage
from edgeguard.attacks.per_image_search import PerImageSearch
from edgeguard.attacks.placement import extreme_pixels, neighbours, promising_places
from edgeguard.errors import InputError

DARK = np.zeros((4, 3, 12, 12), np.uint8)
ZEROS = np.zeros(4, np.int64)


@pytest.mark.parametrize("place", [(3, 5), (0, 0), (8, 8), (7, 2)])
def test_moves_find_the_only_place_that_counts(place: tuple[int, int]) -> None:
    """The first places lie on a grid of stride 2, and only one of them is looked at."""
    attack = PerImage(4, candidates=1, restarts=1, confidence=np.inf, loss="margin")
    found = attack.run(of(window(*place, 4, 1e-3, 20.0)), DARK, ZEROS)
    assert found.positions is not None
    assert (found.positions == place).all()
    assert (found.pixels[:, 0] == 255).all()


def test_directions_bound_the_moves() -> None:
    assert neighbours(np.array([[0, 0], [5, 5]]), 2, np.array([6, 6]), 4).tolist() == [
        [[0, 0], [3, 5]], [[2, 0], [6, 5]], [[0, 0], [5, 3]], [[0, 2], [5, 6]],
    ]  # fmt: skip
    for directions, last in ((4, 7), (8, 8)):
        attack = PerImage(4, steps=4, move_every=4, directions=directions, candidates=1, restarts=1, confidence=np.inf)
        found = attack.run(of(window(3, 5, 4, 1e-3, 2.0)), DARK, ZEROS)
        assert found.positions is not None
        assert found.positions.sum(1).tolist() == [last] * 4
    assert neighbours(np.array([[3, 3]]), 1, np.array([6, 6]), 8).shape == (8, 1, 2)


def basins(images: torch.Tensor) -> torch.Tensor:
    """The top left draws with a steep slope that soon ends, the bottom right has what it takes."""
    red = images[:, 0] / 255
    steep = (10 * red[:, :3, :3].mean((1, 2))).clamp(max=1)
    score = steep + 2 * red[:, 9:, 9:].mean((1, 2))
    return torch.stack([torch.full_like(score, 1.5), score], 1)


def test_candidates_lead_out_of_the_wrong_basin() -> None:
    places = []
    for candidates in (1, 36):
        attack = PerImage(3, candidates=candidates, restarts=1, loss="margin")
        found = attack.run(of(basins), DARK, ZEROS)
        assert found.positions is not None
        places.append(found.positions[0].tolist())
    assert places == [[0, 0], [9, 9]]


def hills(images: torch.Tensor) -> torch.Tensor:
    """Dark red is a low hill, which the first start is drawn to; bright red is the high one."""
    red = images[:, 0].amax((1, 2)) / 255
    score = torch.maximum(0.3 - red, 3 * red - 2)
    return torch.stack([torch.full_like(score, 0.5), score], 1)


def test_restarts_leave_a_local_optimum() -> None:
    reds = []
    for restarts in (1, 12):
        found = PerImage(1, restarts=restarts, loss="margin", steps=20).run(of(hills), DARK, ZEROS)
        reds.append(bool((found.pixels[:, 0] > 200).all()))
    assert reds == [False, True]


def test_what_only_the_last_restart_fooled_is_counted() -> None:
    images, labels = np.zeros((40, 3, 12, 12), np.uint8), np.zeros(40, np.int64)
    lost, late = [], []
    for restarts in (1, 2, 3, 4):
        attack = PerImage(1, restarts=restarts, loss="margin", steps=20)
        search = PerImageSearch(attack, of(hills).models, images, labels, None, "cpu")
        search.run()
        lost.append(40 - len(search.open))
        late.append(search.last_restart)
    assert late == np.diff([0, *lost]).tolist()
    assert late[1] > 0
    found = PerImage(1, restarts=2, loss="margin", steps=20).run(of(hills), images, labels)
    assert found.last_restart == late[1]
    assert PerImage(1, restarts=1, loss="margin", steps=20).run(of(hills), images, labels).last_restart is None


def test_images_that_are_lost_cost_nothing_more() -> None:
    easy = of(window(0, 0, 12, 1e-3, -1.0))
    assert PerImage(4).run(easy, DARK, ZEROS).gradients == 4
    assert PerImage(4, confidence=np.inf, restarts=1, steps=10).run(easy, DARK, ZEROS).gradients == 4 + 4 * 10


def test_confidence_asks_for_a_margin() -> None:
    """Margin 1 needs one bright pixel, 8 needs four."""
    model = window(4, 4, 2, 1 / 255, 0.0)
    for confidence, least in ((0.0, 0), (7.0, 3.5 * 255)):
        found = PerImage(2, confidence=confidence, loss="margin").run(of(model), DARK, ZEROS)
        assert found.pixels[0, 0].sum() > least


def without_gradient(images: torch.Tensor) -> torch.Tensor:
    red = images[:, 0, 4:8, 4:8].mean((1, 2)).detach()
    score = torch.floor(red / 32) + 0 * images.sum((1, 2, 3))
    return torch.stack([torch.full_like(score, 6.5), score], 1)


def fooled(found: Any, model: Any) -> bool:
    shown = DARK.copy()
    for image, pixels, (row, column) in zip(shown, found.pixels, found.positions, strict=True):
        image[:, row : row + 4, column : column + 4] = pixels
    return bool((model(torch.from_numpy(shown).float()).argmax(1) == 1).all())


def test_a_random_search_finishes_what_gradients_cannot() -> None:
    attack = PerImage(4, restarts=1, steps=3)
    assert not fooled(attack.run(of(without_gradient), DARK, ZEROS), without_gradient)
    assert fooled(replace(attack, polish=400).run(of(without_gradient), DARK, ZEROS), without_gradient)


def test_a_surrogate_lends_its_gradient_and_the_first_model_decides() -> None:
    attack = PerImage(4, restarts=1)
    guide = window(4, 4, 4, 1e-3, 1.0)
    assert fooled(attack.run(of(without_gradient, guide), DARK, ZEROS), without_gradient)


def test_a_target_is_reached() -> None:
    net = network()
    aims = [PerImage(6, target=target, confidence=0.1).run(of(net), IMAGES, LABELS) for target in (1, 2)]
    for target, found in zip((1, 2), aims, strict=True):
        shown = IMAGES.copy()
        for image, pixels, (row, column) in zip(shown, found.pixels, found.positions, strict=True):
            image[:, row : row + 6, column : column + 6] = pixels
        assert (net(torch.from_numpy(shown).float()).argmax(1) == target).float().mean() > 0.7


def test_a_patch_as_large_as_the_image() -> None:
    found = PerImage(12, confidence=np.inf, steps=30, restarts=1).run(of(by_channel(1e-3, -1e-3, 0)), IMAGES, LABELS)
    assert found.positions is not None
    assert (found.positions == 0).all()
    assert (found.pixels[:, 0] == 255).all()
    assert (found.pixels[:, 1] == 0).all()


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 2}, {"step_size": 3.0}, {"loss": "margin"}, {"target": 2}, {"seed": 1}, {"restarts": 1},
        {"momentum": 0.0}, {"candidates": 1}, {"move_every": 1}, {"move": False}, {"polish": 20},
    ],
)  # fmt: skip
def test_every_setting_changes_something(change: dict[str, Any]) -> None:
    attack = PerImage(3, restarts=2, confidence=np.inf, steps=16)
    places = np.full((12, 2), 4)
    before, after = (
        each.run(of(network()), IMAGES, LABELS, positions=places) for each in (attack, replace(attack, **change))
    )
    assert not (np.array_equal(before.pixels, after.pixels) and np.array_equal(before.positions, after.positions))


def test_the_batch_does_not_matter() -> None:
    whole, parts = (
        PerImage(3, batch_size=size).run(of(window(3, 3, 3, 1e-3, 2.0)), IMAGES, LABELS) for size in (12, 5)
    )
    assert np.array_equal(whole.pixels, parts.pixels)


def test_places_are_ranked_by_what_a_patch_could_gain() -> None:
    gradient = torch.zeros(2, 3, 6, 6)
    gradient[0, 1, 4:, 2:4] = 1.0
    gradient[1, 0, 0:2, 4:] = -1.0
    clean = torch.full((2, 3, 6, 6), 200.0)
    ranked = promising_places(clean, gradient, 2, 2)
    assert ranked.shape == (2, 9, 2)
    assert ranked[:, 0].tolist() == [[4, 2], [0, 4]]
    best = extreme_pixels(gradient, 2, ranked[:, 0])
    assert best[0, 1].unique().tolist() == [255]
    assert best[1, 0].unique().tolist() == [0]
    assert best[0, 0].unique().tolist() == [128]


@pytest.mark.parametrize(
    "change",
    [
        {"restarts": 0}, {"momentum": 1.0}, {"candidates": 0}, {"move_every": 0}, {"directions": 5}, {"batch_size": 0},
        {"confidence": -1.0}, {"confidence": float("nan")}, {"polish": -1}, {"target": -1},
    ],
)  # fmt: skip
def test_bad_settings(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        PerImage(**{"patch_size": 2, **change})
