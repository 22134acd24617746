"""What all attacks with gradients have in common, on models whose optimal patch is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from known_optima import IMAGES, LABELS, by_channel, linear, network, of
from numpy.typing import NDArray

from edgeguard.attacks.api import ACCESSES, Attack, Found, Victim
from edgeguard.attacks.aqapa import AQAPA
from edgeguard.attacks.bpda import BPDA
from edgeguard.attacks.gap import GAP, disc
from edgeguard.attacks.lavan import LaVAN, logit_gap
from edgeguard.attacks.per_image import PerImage
from edgeguard.attacks.transforms import Transforms
from edgeguard.errors import InputError

PLACES = np.random.default_rng(3).integers(0, 10, (12, 2))
UNIVERSAL: list[Any] = [
    AQAPA(3, steps=40, batch_size=6, starts=2),
    AQAPA(3, steps=200, batch_size=6, starts=2, optimizer="adam"),
    AQAPA(3, steps=60, batch_size=6, starts=1, transforms=Transforms(30, 0.2, 20, 0.2, 5)),
    GAP(3, steps=80, batch_size=6, step_size=8),
    GAP(3, steps=80, batch_size=6, step_size=8, optimizer="momentum-sign", circular=False),
    LaVAN(3, steps=60, batch_size=6, universal=True, epsilon=2.0),
]
SINGLE: list[Any] = [
    PerImage(3, move=False, confidence=np.inf),
    LaVAN(3, steps=30, confidence=1.0, epsilon=0.5),
]
EVERY: list[Any] = [*UNIVERSAL, *SINGLE]


def crafted(attack: Attack, victim: Victim, labels: NDArray[np.int64] = LABELS, **options: Any) -> Found:
    return attack.run(victim, IMAGES, labels, positions=PLACES, **options)


@pytest.mark.parametrize("attack", EVERY)
def test_the_protocol(attack: Attack) -> None:
    seen: list[tuple[int, int]] = []
    found = crafted(attack, of(network()), progress=lambda done, total: seen.append((done, total)))
    assert attack.access == "gradients"
    assert attack.access in ACCESSES
    assert attack.per_image == found.per_image
    assert found.pixels.dtype == np.uint8
    assert found.pixels.shape == ((12, 3, 3, 3) if attack.per_image else (3, 3, 3))
    assert found.gradients > 0
    assert found.queries == 0
    assert seen[-1][0] == seen[-1][1]
    assert (found.positions is None) != attack.per_image


@pytest.mark.parametrize("attack", UNIVERSAL)
def test_universal_patches_reach_the_best_colour_at_any_place(attack: Attack) -> None:
    found = crafted(attack, of(by_channel(1e-3, -1e-3, 1e-3, bias=25.0)))
    assert (found.pixels[:, found.mask] == np.array([255, 0, 255])[:, None]).all()


@pytest.mark.parametrize("attack", UNIVERSAL)
def test_universal_patches_reach_a_target(attack: Any) -> None:
    found = crafted(replace(attack, target=0), of(by_channel(1e-3, -1e-3, 1e-3)), np.ones(12, np.int64))
    assert (found.pixels[:, found.mask] == np.array([0, 255, 0])[:, None]).all()


@pytest.mark.parametrize("attack", SINGLE)
def test_every_image_gets_the_best_pixels_of_its_place(attack: Attack) -> None:
    weight = np.random.default_rng(1).choice([-1.0, 1.0], (3, 12, 12)) / 100
    labels = np.arange(12) % 2
    found = crafted(attack, of(linear(weight, 0.0)), labels)
    assert np.array_equal(found.positions, PLACES)
    for patch, label, (row, column) in zip(found.pixels, labels, PLACES, strict=True):
        under = weight[:, row : row + 3, column : column + 3] * (1 if label == 0 else -1)
        assert np.array_equal(patch, np.where(under > 0, 255, 0))


@pytest.mark.parametrize("attack", SINGLE)
def test_single_patches_reach_a_target(attack: Any) -> None:
    found = crafted(replace(attack, target=0), of(by_channel(1e-2, -1e-2, 1e-2)), np.ones(12, np.int64))
    assert (found.pixels == np.array([0, 255, 0])[:, None, None]).all()


@pytest.mark.parametrize("attack", [*EVERY, PerImage(3, restarts=2)])
def test_bpda_of_identical_engine_and_twin_crafts_the_same_bytes(attack: Attack) -> None:
    net = network()

    def engine(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.no_grad():
            logits: NDArray[np.float32] = net(torch.from_numpy(pixels).float()).numpy()
        return logits

    live = BPDA(engine, net)
    white, black = crafted(attack, of(net)), crafted(attack, of(live))
    assert np.array_equal(white.pixels, black.pixels)
    assert np.array_equal(white.positions, black.positions)
    assert live.queries >= black.gradients == white.gradients


@pytest.mark.parametrize("attack", EVERY)
def test_every_model_counts(attack: Attack) -> None:
    """One model wants red, the other green: the patch that serves both is both."""
    models = of(by_channel(1e-2, 0, -1e-2), by_channel(0, 1e-2, -1e-2))
    found = crafted(attack, models, np.zeros(12, np.int64))
    assert (found.pixels[..., :, found.mask] == np.array([255, 255, 0])[:, None]).all()


@pytest.mark.parametrize("attack", EVERY)
def test_equal_seeds_give_equal_bytes(attack: Attack) -> None:
    first, again = crafted(attack, of(network())), crafted(attack, of(network()))
    assert np.array_equal(first.pixels, again.pixels)


@pytest.mark.parametrize(
    ("attack", "change"),
    [
        *[(UNIVERSAL[0], change) for change in (
            {"optimizer": "sgd"}, {"average": True}, {"transforms": Transforms(rotation_degrees=10)}, {"momentum": 0.0},
        )],
        *[(GAP(4, steps=20, batch_size=6), change) for change in (
            {"steps": 5}, {"batch_size": 3}, {"step_size": 1.0}, {"target": 2}, {"seed": 1}, {"momentum": 0.0},
            {"optimizer": "sgd"}, {"circular": False}, {"transforms": Transforms()},
        )],
        *[(UNIVERSAL[5], change) for change in (
            {"steps": 5}, {"epsilon": 0.1}, {"target": 2}, {"seed": 1}, {"batch_size": 3}, {"place": (2, 2)},
        )],
        *[(LaVAN(3, steps=20, epsilon=0.5), change) for change in (
            {"steps": 1}, {"epsilon": 0.01}, {"target": 2}, {"confidence": 0.4}, {"place": (2, 2)}, {"universal": True},
        )],
    ],
)  # fmt: skip
def test_every_setting_changes_something(attack: Any, change: dict[str, Any]) -> None:
    models = of(network(), network(1))
    labels = network()(torch.from_numpy(IMAGES).float()).argmax(1).numpy()
    before, after = crafted(attack, models, labels), crafted(replace(attack, **change), models, labels)
    assert before.pixels.shape != after.pixels.shape or not np.array_equal(before.pixels, after.pixels)


def test_lavan_rests_when_it_is_sure() -> None:
    sure = crafted(LaVAN(3, steps=30, epsilon=0.5, confidence=0.6), of(by_channel(1e-1, 1e-1, 1e-1, bias=5800.0)))
    never = crafted(LaVAN(3, steps=30, epsilon=0.5, confidence=1.0), of(by_channel(1e-1, 1e-1, 1e-1, bias=5800.0)))
    assert sure.gradients < never.gradients == 12 * 31


def test_the_gap_of_two_logits() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0], [1.0, 4.0, 2.0]])
    labels = torch.tensor([0, 2])
    assert logit_gap(logits, labels).tolist() == [3, 2]
    assert logit_gap(logits, labels, 2).tolist() == [1, 2]


def test_a_disc() -> None:
    assert disc(1).tolist() == [[True]]
    assert disc(4).tolist() == [[False, True, True, False], [True] * 4, [True] * 4, [False, True, True, False]]
    big = disc(40)
    assert abs(big.mean() - np.pi / 4) < 0.01
    assert not big[0, 0]
    assert big[0, 20]
    assert np.array_equal(big, big.T)


@pytest.mark.parametrize("attack", [*EVERY, PerImage(3)])
def test_bad_material(attack: Any) -> None:
    with pytest.raises(InputError, match="needs models"):
        crafted(attack, Victim())
    with pytest.raises(InputError, match="labelled images"):
        crafted(attack, of(network()), LABELS[:3])
    with pytest.raises(InputError, match="but the model has 3 classes"):
        crafted(attack, of(network()), LABELS + 3)
    with pytest.raises(InputError, match="target 7 is none of"):
        crafted(replace(attack, target=7), of(network()))
    with pytest.raises(InputError, match="larger than the image"):
        crafted(replace(attack, patch_size=13), of(network()))


@pytest.mark.parametrize("attack", SINGLE)
def test_attacks_that_are_told_the_place_need_one(attack: Attack) -> None:
    with pytest.raises(InputError, match="one position for each image"):
        attack.run(of(network()), IMAGES, LABELS)
    with pytest.raises(InputError, match="positions must be"):
        attack.run(of(network()), IMAGES, LABELS, positions=PLACES + 10)


@pytest.mark.parametrize("attack", [UNIVERSAL[3], UNIVERSAL[5]])
def test_nothing_to_craft_on(attack: Any) -> None:
    with pytest.raises(InputError, match="all crafting images are of the target"):
        crafted(replace(attack, target=0), of(network()))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *[(GAP, change) for change in (
            {"patch_size": 0}, {"steps": 0}, {"batch_size": 0}, {"step_size": 0.0}, {"momentum": 1.0}, {"seed": -1},
            {"target": -1}, {"optimizer": "lbfgs"},
        )],
        *[(LaVAN, change) for change in (
            {"patch_size": 0}, {"steps": 0}, {"batch_size": 0}, {"epsilon": 0.0}, {"confidence": 0.0},
            {"confidence": 1.5}, {"seed": -1}, {"target": -1},
        )],
        (AQAPA, {"optimizer": "lbfgs"}),
    ],
)  # fmt: skip
def test_bad_settings(kind: Any, change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        kind(**{"patch_size": 3, **change})
