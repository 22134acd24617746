"""A-QAPA against models whose optimal patch is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgeguard.attacks.aqapa import AQAPA, Crafted, CraftStep, craft
from edgeguard.attacks.bpda import BPDA, Differentiable
from edgeguard.attacks.widths import WidthChooser
from edgeguard.errors import InputError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (60, 3, 6, 6), dtype=np.uint8)
LABELS = np.zeros(60, np.int64)


def linear(weight: NDArray[np.float64], bias: float = 0.0) -> Differentiable:
    """Two classes; class 1 gains `weight` (3, H, W) per grey level, class 0 starts `bias` ahead."""
    matrix = torch.from_numpy(weight.astype(np.float32)).flatten()

    def model(images: torch.Tensor) -> torch.Tensor:
        score = images.flatten(1) @ matrix - bias
        return torch.stack([-score, score], 1)

    return model


def by_channel(*gains: float, bias: float = 0.0) -> Differentiable:
    """A model to which the place of a pixel does not matter."""
    return linear(np.broadcast_to(np.array(gains)[:, None, None], (3, 6, 6)), bias)


def test_finds_the_optimal_pixels_of_a_linear_model() -> None:
    weight = RNG.standard_normal((3, 6, 6)) / 100
    found = craft(AQAPA(6, steps=60, batch_size=20), {"8": linear(weight, 30.0)}, IMAGES, LABELS)
    assert np.array_equal(found.patch.pixels, np.where(weight > 0, 255, 0))


@pytest.mark.parametrize("loss", ["cross-entropy", "margin", "scaled-cross-entropy", "bounded-margin"])
def test_finds_the_optimal_colour_wherever_it_is_placed(loss: str) -> None:
    model = by_channel(1e-3, -1e-3, 1e-3, bias=9.0)
    found = craft(AQAPA(3, steps=60, batch_size=20, loss=loss), {"8": model}, IMAGES, LABELS)
    assert (found.patch.pixels == np.array([255, 0, 255])[:, None, None]).all()


def test_targeted_goes_the_other_way() -> None:
    labels = np.ones(60, np.int64)
    model = by_channel(1e-3, -1e-3, 1e-3)
    found = craft(AQAPA(3, steps=60, batch_size=20, target=0), {"8": model}, IMAGES, labels)
    assert (found.patch.pixels == np.array([0, 255, 0])[:, None, None]).all()


def test_bpda_of_identical_engine_and_twin_crafts_the_same_patch() -> None:
    model = linear(RNG.standard_normal((3, 6, 6)) / 100, 30.0)

    def engine(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = model(torch.from_numpy(pixels).float()).numpy()
        return logits

    config = AQAPA(3, steps=10, batch_size=20)
    white = craft(config, {"8": model}, IMAGES, LABELS)
    live = craft(config, {"8": BPDA(engine, model)}, IMAGES, LABELS)
    assert np.array_equal(white.patch.pixels, live.patch.pixels)


def test_moves_toward_the_width_where_it_is_weakest() -> None:
    """Width "a" is lost at once; "b" wants another colour and needs all of the patch."""
    models = {"a": by_channel(1e-3, 0, 0, bias=-100.0), "b": by_channel(-1e-3, 0, 0, bias=1.0)}
    config = AQAPA(3, steps=80, batch_size=20)
    found = craft(config, models, IMAGES, LABELS)
    drawn = [step.width for step in found.history[40:]]
    assert drawn.count("b") > 3 * drawn.count("a")
    assert (found.patch.pixels[0] == 0).all()


def test_the_distribution_over_widths() -> None:
    chooser = WidthChooser(["8", "4", "2"], rate=4.0, floor=0.3)
    assert np.allclose(chooser.probabilities(), 1 / 3)
    for _ in range(50):
        chooser.update("8", 1.0)
        chooser.update("4", 0.5)
    probabilities = chooser.probabilities()
    assert probabilities.sum() == pytest.approx(1)
    assert probabilities[2] > probabilities[1] > probabilities[0] >= 0.1
    assert np.allclose(WidthChooser(["8", "4"], rate=0.0, floor=0.0).probabilities(), 0.5)


@pytest.mark.parametrize("steps", [1, 7, 30, 60, 100, 300, 1000])
@pytest.mark.parametrize("starts", [1, 2, 5, 8, 30])
def test_the_race_is_part_of_the_steps(steps: int, starts: int) -> None:
    rounds = AQAPA(6, steps=steps, starts=starts, race=0.4).rounds()
    assert sum(alive * each for alive, each in rounds) == steps
    assert rounds[-1][0] == 1
    assert rounds[-1][1] >= 0.6 * steps
    assert [alive for alive, _ in rounds] == sorted({alive for alive, _ in rounds}, reverse=True)
    assert all(each >= 5 for _, each in rounds[:-1])
    assert AQAPA(6, steps=steps, starts=starts, race=0.0).rounds() == [(1, steps)]


def hills(images: torch.Tensor) -> torch.Tensor:
    """Dark red is a low hill that a start below grey climbs, bright red a high one: only the latter fools."""
    red = images[:, 0].amax((1, 2)) / 255
    score = torch.maximum(0.3 - red, 3 * red - 2)
    return torch.stack([torch.full_like(score, 0.5), score], 1)


def test_starts_race_and_the_best_goes_on() -> None:
    images = np.zeros((30, 3, 4, 4), np.uint8)
    labels = np.zeros(30, np.int64)
    reds = []
    for starts in (1, 12):
        config = AQAPA(1, steps=160, batch_size=10, starts=starts, step_size=4.0, loss="margin", seed=1)
        found = craft(config, {"8": hills}, images, labels)
        assert len({step.start for step in found.history}) == config.rounds()[0][0]
        assert [step.step for step in found.history] == list(range(160))
        reds.append(int(found.patch.pixels[0, 0, 0]))
    assert reds == [0, 255]


def test_the_best_restart_is_returned() -> None:
    images = np.zeros((30, 3, 4, 4), np.uint8)
    config = AQAPA(1, steps=60, batch_size=10, starts=1, step_size=4.0, loss="margin", seed=1, restarts=4)
    found = craft(config, {"8": hills}, images, np.zeros(30, np.int64))
    assert len(found.selection) == 4
    assert set(found.selection) == {0.0, 1.0}
    assert int(found.patch.pixels[0, 0, 0]) == 255
    assert len(found.history) == 240


def test_equal_seeds_give_equal_patches() -> None:
    def run(seed: int) -> Crafted:
        return craft(AQAPA(3, steps=5, batch_size=20, seed=seed), {"8": by_channel(1e-3, 0, 0)}, IMAGES, LABELS)

    assert np.array_equal(run(1).patch.pixels, run(1).patch.pixels)
    assert run(1).history == run(1).history
    assert not np.array_equal(run(1).patch.pixels, run(2).patch.pixels)


def test_only_images_that_can_be_lost_are_attacked() -> None:
    """Images that a model already misclassifies do not pull on the patch."""
    images = np.concatenate([np.full((5, 3, 6, 6), 0, np.uint8), np.full((5, 3, 6, 6), 255, np.uint8)])
    steps: list[CraftStep] = []
    model = by_channel(1e-3, 1e-3, 1e-3, bias=20.0)
    craft(AQAPA(1, steps=3, batch_size=10), {"8": model}, images, np.zeros(10, np.int64), steps.append)
    assert [step.success for step in steps] == [0, 0, 0]
    assert [step.step for step in steps] == [0, 1, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"patch_size": 0}, {"steps": 0}, {"starts": 0}, {"race": 1.0}, {"width_rate": -1.0}, {"batch_size": 0},
        {"restarts": 0}, {"step_size": 0.5}, {"step_size": 300.0}, {"momentum": 1.0}, {"width_floor": 2.0},
        {"seed": -1}, {"target": -1}, {"loss": "mse"},
    ],
)  # fmt: skip
def test_bad_configurations(change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        AQAPA(**{"patch_size": 3, **change})  # type: ignore[arg-type]


def test_bad_input() -> None:
    model = by_channel(1, 1, 1)
    with pytest.raises(InputError, match="larger than the image"):
        craft(AQAPA(7), {"8": model}, IMAGES, LABELS)
    with pytest.raises(InputError, match="needs models"):
        craft(AQAPA(3), {}, IMAGES, LABELS)
    with pytest.raises(InputError, match="labelled images"):
        craft(AQAPA(3), {"8": model}, IMAGES, LABELS[:3])
