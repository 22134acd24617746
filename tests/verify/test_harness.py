"""The judge on engines whose behaviour is known pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeguard.errors import EngineError, InputError
from edgeguard.patch import Patch, apply_patch, grid_positions, square
from edgeguard.verify.harness import Subject, judge_at, judge_worst, logits_of, random_places

Images = NDArray[np.uint8]
Logits = NDArray[np.float32]


class Spot:
    """Answers class 1 where the pixel at `place` is brighter than 200, else class 0; `shift` moves every answer."""

    def __init__(self, place: tuple[int, int] = (4, 4), classes: int = 3) -> None:
        self.place, self.classes, self.asked = place, classes, 0
        self.batches: list[int] = []

    def __call__(self, images: Images) -> Logits:
        self.asked += len(images)
        self.batches.append(len(images))
        bright = (images[:, 0, self.place[0], self.place[1]] > 200).astype(np.int64)
        return np.eye(self.classes, dtype=np.float32)[bright]


class Random:
    """A fixed random function of all pixels, with many classes: every place matters."""

    def __call__(self, images: Images) -> Logits:
        rng = np.random.default_rng(0)
        weight = rng.standard_normal((int(np.prod(images.shape[1:])), 4))
        return np.sin(images.reshape(len(images), -1) @ weight / 40).astype(np.float32)


WHITE = square(np.full((3, 2, 2), 255, np.uint8))


def dark(count: int, side: int = 8) -> Images:
    return np.random.default_rng(1).integers(0, 100, (count, 3, side, side), dtype=np.uint8)


def test_untargeted_figures() -> None:
    labels = np.array([0] * 6 + [1] * 4)
    subject = Subject.of(Spot(), dark(10), labels)
    assert subject.correct.sum() == 6
    places = np.array([[4, 4], [3, 3], [0, 0], [0, 0], [0, 0], [0, 0], [4, 4], [4, 4], [0, 0], [0, 0]])
    judged = judge_at(subject, WHITE, places)
    assert (judged.n, judged.successes) == (6, 2)
    assert judged.asr == pytest.approx(2 / 6)
    assert judged.robust_accuracy == pytest.approx(4 / 10)


def test_targeted_figures() -> None:
    labels = np.array([0, 0, 1, 2])
    places = np.array([[4, 4], [0, 0], [4, 4], [4, 4]])
    judged = judge_at(Subject.of(Spot(), dark(4), labels, target=1), WHITE, places)
    assert judged.eligible.tolist() == [True, True, False, True]
    assert judged.fooled.tolist() == [True, False, False, True]
    assert judged.robust.tolist() == [False, True, False, False]


def test_an_attack_cannot_succeed_on_an_image_that_does_not_count() -> None:
    judged = judge_at(Subject.of(Spot(), dark(2), np.array([2, 0])), WHITE, np.array([[4, 4], [0, 0]]))
    assert not judged.fooled.any()
    assert judged.n == 1


def test_worst_place_finds_the_only_one_that_works() -> None:
    engine = Spot((7, 0))
    judged = judge_worst(Subject.of(engine, dark(5), np.zeros(5, np.int64)), WHITE, 1)
    assert judged.asr == 1
    assert (judged.positions == [6, 0]).all()
    assert judged.places == 49
    coarse = judge_worst(Subject.of(Spot((3, 3)), dark(5), np.zeros(5, np.int64)), square(WHITE.pixels[:, :1, :1]), 2)
    assert coarse.asr == 0


@pytest.mark.parametrize("target", [None, 2])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_worst_place_equals_brute_force(target: int | None, stride: int, batch_size: int) -> None:
    engine, images = Random(), np.random.default_rng(3).integers(0, 256, (25, 3, 6, 7), dtype=np.uint8)
    labels = np.random.default_rng(4).integers(0, 4, 25)
    labels[:15] = engine(images[:15]).argmax(1)
    mask = np.array([[True, True], [False, True]])
    patch = Patch(np.random.default_rng(5).integers(0, 256, (3, 2, 2), dtype=np.uint8), mask)
    judged = judge_worst(Subject.of(engine, images, labels, target, batch_size), patch, stride)
    clean = engine(images).argmax(1)
    answers = []
    for place in grid_positions((6, 7), (2, 2), stride):
        patched = apply_patch(images, patch.pixels, patch.mask, np.repeat(place[None], 25, 0))
        answers.append(engine(patched).argmax(1))
    eligible = clean == labels if target is None else labels != target
    fooled = np.any([a != labels if target is None else a == target for a in answers], 0) & eligible
    assert np.array_equal(judged.eligible, eligible)
    assert np.array_equal(judged.fooled, fooled)
    assert np.array_equal(judged.robust, (clean == labels) & np.all([a == labels for a in answers], 0))
    patched = apply_patch(images, patch.pixels, patch.mask, judged.positions)
    visited = eligible | (clean == labels)
    assert np.array_equal(judged.logits[visited], engine(patched)[visited])


def test_fooled_images_leave_the_search_and_batches_stay_full() -> None:
    images = dark(64)
    images[1:, 0, 1, 1] = 0
    engine = Spot((0, 0))
    subject = Subject.of(engine, images, np.zeros(64, np.int64), batch_size=16)
    engine.asked, engine.batches = 0, []
    judge_worst(subject, WHITE, 1)
    assert engine.asked == 64
    hard = Spot((0, 0), classes=2)
    subject = Subject.of(hard, images[:2], np.array([0, 1]), batch_size=16)
    hard.batches = []
    robust = judge_worst(subject, square(np.zeros((3, 2, 2), np.uint8)), 1)
    assert robust.successes == 0
    assert hard.batches == [16, 16, 16, 1]


def test_progress_of_the_worst_place_ends_at_its_total() -> None:
    ticks: list[tuple[int, int]] = []
    subject = Subject.of(Spot((0, 0)), dark(3), np.zeros(3, np.int64))
    judge_worst(subject, WHITE, 3, lambda done, total: ticks.append((done, total)))
    assert ticks[-1] == (9, 9)


def test_random_places_depend_on_seed_and_size_only() -> None:
    subject = Subject.of(Spot(), dark(50), np.zeros(50, np.int64))
    other = square(np.zeros((3, 2, 2), np.uint8))
    assert np.array_equal(random_places(subject, WHITE, 0), random_places(subject, other, 0))
    assert not np.array_equal(random_places(subject, WHITE, 0), random_places(subject, WHITE, 1))


def test_bad_input() -> None:
    images, labels = dark(3), np.zeros(3, np.int64)
    with pytest.raises(InputError, match="to judge"):
        Subject.of(Spot(), images[:0], labels[:0])
    with pytest.raises(InputError, match="labels run from 0 to 3"):
        Subject.of(Spot(), images, np.array([0, 1, 3]))
    with pytest.raises(InputError, match="target 3"):
        Subject.of(Spot(), images, labels, target=3)
    with pytest.raises(InputError, match="none of the 3 judged images counts"):
        _ = judge_at(Subject.of(Spot(), images, labels + 2), WHITE, np.zeros((3, 2), np.int64)).asr
    with pytest.raises(InputError, match="larger than the image"):
        judge_worst(Subject.of(Spot(), images, labels), square(np.zeros((3, 9, 9), np.uint8)), 1)


@pytest.mark.parametrize("answer", [np.full((3, 3), np.nan), np.full((3, 3), np.inf), np.zeros((2, 3)), np.zeros(3)])
def test_an_engine_that_answers_nonsense(answer: NDArray[np.float64]) -> None:
    with pytest.raises(EngineError, match="finite logits"):
        logits_of(lambda images: answer.astype(np.float32), dark(3), 8)
