"""Patch-RS against functions whose optimal patch and place are known."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeguard.attacks.api import Arrays, Attack, Images, Logits, Victim
from edgeguard.attacks.patch_rs import PatchRS
from edgeguard.attacks.square_updates import (
    INITIAL,
    carry_pixels,
    change_pixels,
    change_places,
    initial_pixels,
    side_of_square,
)
from edgeguard.errors import EngineError, InputError
from edgeguard.patch import apply_patch

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(60, 200, (6, 3, 8, 8), dtype=np.uint8)
LABELS = np.zeros(6, np.int64)
PLACES = np.array([[0, 0], [1, 2], [3, 3], [2, 1], [0, 3], [5, 5]])
WEIGHT = RNG.choice([-1.0, 1.0], (3, 8, 8)) * RNG.uniform(0.5, 1, (3, 8, 8))
BEST = np.where(WEIGHT > 0, 255, 0)


class Engine:
    """Two classes, of which class 1 is `threshold` short of a weighted sum of the pixels. Counts what it is shown."""

    def __init__(self, weight: NDArray[np.float64], threshold: float = 1e9, dies_at: int | None = None) -> None:
        self.weight, self.threshold, self.dies_at = weight, threshold, dies_at
        self.sizes: list[int] = []

    def __call__(self, images: Images) -> NDArray[np.float32]:
        if len(self.sizes) == self.dies_at:
            raise EngineError("the device is gone")
        self.sizes.append(len(images))
        score = (images * self.weight).sum((1, 2, 3)) - self.threshold
        return np.stack([-score, score], 1).astype(np.float32)


class Decisions(Engine):
    """Tells the class and nothing else."""

    def __call__(self, images: Images) -> NDArray[np.float32]:
        decisions: NDArray[np.float32] = np.eye(2, dtype=np.float32)[super().__call__(images).argmax(1)]
        return decisions


class Memory:
    """A checkpoint that never leaves the process."""

    def __init__(self) -> None:
        self.kept: Arrays | None = None
        self.saves = 0

    def load(self) -> Arrays | None:
        return self.kept

    def save(self, state: Arrays) -> None:
        self.kept, self.saves = {name: np.array(array) for name, array in state.items()}, self.saves + 1


def everywhere(*gains: float) -> NDArray[np.float64]:
    """Weights to which the place of a pixel does not matter."""
    return np.broadcast_to(np.array(gains)[:, None, None], (3, 8, 8)).astype(np.float64)


def under(row: int, column: int, size: int) -> tuple[slice, slice, slice]:
    return slice(None), slice(row, row + size), slice(column, column + size)


def test_every_image_gets_the_optimal_pixels_of_its_place() -> None:
    config = PatchRS(3, 500, move_location=False)
    found = config.run(Victim(classify=Engine(WEIGHT)), IMAGES, LABELS, positions=PLACES)
    assert found.per_image
    assert found.positions is None
    for pixels, (row, column) in zip(found.pixels, PLACES, strict=True):
        assert np.array_equal(pixels, BEST[under(row, column, 3)])


@pytest.mark.parametrize("start", [None, PLACES])
def test_finds_the_only_place_that_counts(start: NDArray[np.int64] | None) -> None:
    weight = np.zeros((3, 8, 8))
    weight[under(5, 3, 2)] = WEIGHT[under(5, 3, 2)]
    found = PatchRS(2, 1500).run(Victim(classify=Engine(weight)), IMAGES, LABELS, positions=start)
    assert found.positions is not None
    assert (found.positions == [5, 3]).all()
    assert (found.pixels == BEST[under(5, 3, 2)]).all()
    assert start is None or np.array_equal(start, PLACES)


@pytest.mark.parametrize("batch_size", [4, 15])
def test_universal_finds_the_color_that_wins_anywhere(batch_size: int) -> None:
    config = PatchRS(3, 3000, scope="universal", batch_size=batch_size)
    found = config.run(Victim(classify=Engine(everywhere(1, -1, 0.5), 1e5)), IMAGES, LABELS)
    assert np.array_equal(found.patch.pixels, np.broadcast_to([[[255]], [[0]], [[255]]], (3, 3, 3)))


def test_labels_alone_lead_to_a_patch_that_only_a_near_optimum_beats() -> None:
    pixels = np.broadcast_to(np.array([255, 0, 255])[:, None, None], (3, 3, 3))
    engine = Decisions(everywhere(1, -1, 0.5))
    images = np.full_like(IMAGES, 100)
    best = 9 * (255 + 127.5) + 55 * 50
    plain = 64 * 50
    engine.threshold = plain + 0.9 * (best - plain)
    images[0] = 255 * np.array([1, 0, 1])[:, None, None]  # the anchor of the others
    labels = np.array([1, 0, 0, 0, 0, 0])
    found = PatchRS(3, 1500, mode="labels", move_location=False).run(
        Victim(classify=engine), images, labels, positions=PLACES
    )
    engine_says = engine(apply_patch(images, found.pixels, found.mask, PLACES)).argmax(1)
    assert (engine_says[1:] == 1).all()
    assert (found.pixels[1:] == pixels).mean() > 0.9


def test_labels_alone_find_a_universal_patch() -> None:
    images = np.clip(100 + np.arange(12)[:, None, None, None] * 3 + np.zeros((12, 3, 8, 8)), 0, 255).astype(np.uint8)
    engine = Decisions(everywhere(1, 1, 1), 64 * 3 * 116 + 27 * 128.0)
    found = PatchRS(3, 4800, scope="universal", mode="labels", batch_size=12).run(
        Victim(classify=engine), images, np.zeros(12, np.int64)
    )
    assert (found.patch.pixels == 255).mean() > 0.9


def test_targeted_reaches_its_class_and_leaves_images_of_it_alone() -> None:
    def classify(images: Images) -> NDArray[np.float32]:
        red, green, _ = images.astype(np.float32).sum((2, 3)).T
        return np.stack([np.full_like(red, 1e6), red, green], 1)

    labels = np.array([0, 1, 2, 0, 1, 2])
    for scope in ("per-image", "universal"):
        config = PatchRS(3, 900, scope=scope, target=2, batch_size=4)
        found = config.run(Victim(classify=classify), IMAGES, labels)
        attacked = found.pixels[labels != 2] if found.per_image else found.pixels[None]
        assert (attacked[:, 1] == 255).all()
    assert PatchRS(3, 50, target=2).run(Victim(classify=classify), IMAGES, labels).queries == 50 * 4


def test_fooled_images_leave_the_search() -> None:
    engine = Engine(WEIGHT, float(np.median((IMAGES * WEIGHT).sum((1, 2, 3)))) + 1500)
    config = PatchRS(4, 300)
    found = config.run(Victim(classify=engine), IMAGES, LABELS)
    assert engine.sizes == sorted(engine.sizes, reverse=True)
    assert engine.sizes[-1] < 6
    assert found.queries == sum(engine.sizes) < 6 * 300
    assert found.positions is not None
    patched = apply_patch(IMAGES, found.pixels, found.mask, found.positions)
    assert (engine(patched).argmax(1) == 1).sum() >= 5


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PatchRS(2, 57), 57 * 6),
        (PatchRS(2, 57, batch_size=4), 57 * 6),
        (PatchRS(2, 1), 6),
        (PatchRS(2, 57, scope="universal", batch_size=5), 55),
        (PatchRS(2, 3, scope="universal", batch_size=5), 3),
        (PatchRS(2, 57, scope="universal", mode="labels", batch_size=10), 50),
    ],
)
def test_the_budget_is_spent_and_counted(config: PatchRS, expected: int) -> None:
    engine, told = Engine(WEIGHT), []
    found = config.run(Victim(classify=engine), IMAGES, LABELS, progress=lambda *done: told.append(done))
    assert found.queries == sum(engine.sizes) == expected
    assert max(engine.sizes) <= config.batch_size
    assert told[-1][0] == told[-1][1] == len(told)


@pytest.mark.parametrize("queries", [7, 8, 9, 50])
def test_the_budget_of_labels_per_image(queries: int) -> None:
    engine = Decisions(everywhere(1, 1, 1), 64 * 3 * 230.0)
    found = PatchRS(2, queries, mode="labels").run(Victim(classify=engine), IMAGES[:1], LABELS[:1])
    assert found.queries == sum(engine.sizes)
    assert queries // 2 <= found.queries <= queries


@pytest.mark.parametrize("scope", ["per-image", "universal"])
@pytest.mark.parametrize("mode", ["logits", "labels"])
def test_a_resumed_search_gives_the_same_bytes(scope: str, mode: str) -> None:
    threshold = float((IMAGES * WEIGHT).sum((1, 2, 3)).max()) + 1200
    config = PatchRS(4, 80 if scope == "per-image" else 400, scope=scope, mode=mode, batch_size=6, save_every=7)
    whole = config.run(Victim(classify=Engine(WEIGHT, threshold)), IMAGES, LABELS)
    memory = Memory()
    with pytest.raises(EngineError, match="the device is gone"):
        config.run(Victim(classify=Engine(WEIGHT, threshold, dies_at=40)), IMAGES, LABELS, checkpoint=memory)
    assert memory.saves > 0
    engine = Engine(WEIGHT, threshold)
    resumed = replace(config, save_every=3).run(Victim(classify=engine), IMAGES, LABELS, checkpoint=memory)
    assert 0 < sum(engine.sizes) < whole.queries
    assert np.array_equal(whole.pixels, resumed.pixels)
    assert (whole.positions is None) == (resumed.positions is None) == (scope == "universal")
    if whole.positions is not None and resumed.positions is not None:
        assert np.array_equal(whole.positions, resumed.positions)
    assert whole.queries == resumed.queries


def test_a_checkpoint_of_another_search_is_refused() -> None:
    memory = Memory()
    PatchRS(2, 20, save_every=10).run(Victim(classify=Engine(WEIGHT)), IMAGES, LABELS, checkpoint=memory)
    for config, images in ((PatchRS(2, 21), IMAGES), (PatchRS(2, 20), IMAGES[::-1])):
        with pytest.raises(InputError, match="of another search"):
            config.run(Victim(classify=Engine(WEIGHT)), images, LABELS, checkpoint=memory)


def pixels_of(config: PatchRS) -> NDArray[np.uint8]:
    return config.run(Victim(classify=Engine(WEIGHT)), IMAGES, LABELS, positions=PLACES % 4).pixels


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"area": 1.0}, {"initial": "stripes"}, {"move_location": False}, {"queries": 80}]
)
def test_equal_settings_give_equal_patches_and_others_others(change: dict[str, object]) -> None:
    config = PatchRS(4, 60)
    assert np.array_equal(pixels_of(config), pixels_of(config))
    assert not np.array_equal(pixels_of(config), pixels_of(replace(config, **change)))  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"batches": 2}, {"batch_size": 3}])
def test_the_batches_of_a_universal_search_matter(change: dict[str, object]) -> None:
    config = PatchRS(3, 60, scope="universal", batch_size=6)
    assert not np.array_equal(pixels_of(config), pixels_of(replace(config, **change)))  # type: ignore[arg-type]


def test_a_larger_batch_size_does_not_change_a_search_per_image() -> None:
    assert np.array_equal(pixels_of(PatchRS(3, 60, batch_size=4)), pixels_of(PatchRS(3, 60)))


@pytest.mark.parametrize(
    "logits",
    [np.full((6, 2), np.nan), np.zeros((5, 2)), np.zeros(6), np.zeros((6, 1))],
    ids=["nan", "images", "flat", "one class"],
)
@pytest.mark.parametrize("scope", ["per-image", "universal"])
def test_answers_that_are_none(logits: NDArray[np.float64], scope: str) -> None:
    classify: Logits = lambda images: logits.astype(np.float32)  # noqa: E731
    with pytest.raises(EngineError, match="must give finite logits"):
        PatchRS(2, 60, scope=scope, batch_size=6).run(Victim(classify=classify), IMAGES, LABELS)


@pytest.mark.parametrize(
    "change",
    [
        {"patch_size": 0}, {"queries": 0}, {"scope": "all"}, {"mode": "scores"}, {"initial": "noise"}, {"area": 0.0},
        {"batch_size": 0}, {"batches": 0}, {"save_every": 0}, {"seed": -1}, {"target": -1},
    ],
)  # fmt: skip
def test_bad_settings(change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        PatchRS(**{"patch_size": 2, "queries": 10, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "material", "said"),
    [
        (PatchRS(9, 10), {}, "larger than the image"),
        (PatchRS(2, 10), {"images": IMAGES.astype(np.float32)}, r"must be \(N, 3, H, W\) uint8"),
        (PatchRS(2, 10), {"images": IMAGES[:0], "labels": LABELS[:0]}, "needs labelled images"),
        (PatchRS(2, 10), {"labels": LABELS[:3]}, "needs labelled images"),
        (PatchRS(2, 10), {"labels": LABELS + 2}, "labels run from 2 to 2"),
        (PatchRS(2, 10, target=2), {}, "the target is 2"),
        (PatchRS(2, 10, target=0), {}, "all 6 images are of the target's class"),
        (PatchRS(2, 10, move_location=False), {}, "one position for each image"),
        (PatchRS(2, 10), {"positions": PLACES + 5}, "positions must be"),
        (PatchRS(2, 5, mode="labels"), {}, "at least 7 queries"),
    ],
)
def test_bad_material(config: PatchRS, material: dict[str, NDArray[np.generic]], said: str) -> None:
    given = {"images": IMAGES, "labels": LABELS, **material}
    with pytest.raises(InputError, match=said):
        config.run(Victim(classify=Engine(WEIGHT)), **given)  # type: ignore[arg-type]


def test_a_victim_that_answers_no_queries() -> None:
    with pytest.raises(InputError, match="asks a live engine"):
        PatchRS(2, 10).run(Victim(), IMAGES, LABELS)


def test_it_is_an_attack() -> None:
    attack: Attack = PatchRS(2, 10, scope="universal", mode="labels")
    assert (attack.name, attack.access, attack.per_image) == ("patch-rs", "labels", False)
    assert PatchRS(2, 10).per_image


def test_it_needs_no_torch() -> None:
    code = "import sys, edgeguard.attacks.patch_rs; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_the_moves() -> None:
    assert [side_of_square(0.4, 50, spent) for spent in (0, 0.001, 0.002, 0.01, 0.3, 1)] == [31, 31, 22, 15, 5, 2]
    assert side_of_square(0.4, 2, 0) == 1
    rng = np.random.default_rng(0)
    for kind in INITIAL:
        pixels = initial_pixels(kind, 40, 6, rng)
        assert set(np.unique(pixels)) == {0, 255}
        assert ((change_pixels(pixels, 1, rng) != pixels).sum((1, 2, 3)) == 1).all()
        changed = (change_pixels(pixels, 3, rng) != pixels).any(1)
        assert changed.any((1, 2)).sum() > 30
        for one in changed:
            assert all(np.ptp(axis) < 3 for axis in np.nonzero(one) if len(axis))
    places = change_places(np.full((500, 2), 10), (32, 32), 6, 0.99, rng)
    assert set(np.unique(places)) == {9, 10, 11}
    places = change_places(np.full((500, 2), 10), (32, 32), 6, 0.0, rng)
    assert (places.min(), places.max()) == (0, 26)


def test_carried_pixels_stay_where_they_are_on_the_image() -> None:
    pixels = RNG.integers(0, 256, (5, 3, 4, 4), dtype=np.uint8)
    old = np.full((5, 2), 2)
    new = old + np.array([[0, 0], [1, 0], [0, -1], [-2, 2], [1, 1]])
    mask = np.ones((4, 4), bool)
    before = apply_patch(IMAGES[:5], pixels, mask, old)
    after = apply_patch(IMAGES[:5], carry_pixels(pixels, new - old), mask, new)
    for index, (row, column) in enumerate(new):
        both = slice(max(2, row), min(2, row) + 4), slice(max(2, column), min(2, column) + 4)
        assert np.array_equal(before[index, :, both[0], both[1]], after[index, :, both[0], both[1]])
