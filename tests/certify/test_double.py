"""Double masking against every choice an attacker has, and against the published algorithms written as plain loops."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from certify_tables import CLASSES, Tables
from numpy.typing import NDArray

from edgeguard.certify import Defended, MaskSet, contradictions
from edgeguard.errors import EngineError, InputError
from edgeguard.patch import apply_patch, grid_positions

BLACK = (0, 0, 0)
SMALL = MaskSet.of((6, 6), (2, 2), 2, BLACK)
"""Four masks of 4x4 pixels, so ten different pairs."""


class Unchecked(MaskSet):
    """A set that is not held to its promise."""

    def __post_init__(self) -> None: ...


def wins(masks: MaskSet) -> int:
    """How often an attacker changes the answer of a certified image, over all places and all that pixels could do.

    The attacker chooses the label of every masked image in which any pixel of the patch can be seen; elsewhere the image
    is the clean one, whose label is 0 behind every pair, so that it is certified.
    """
    clean = Tables(masks, np.zeros((1, len(masks) * (len(masks) + 1) // 2), np.int64))
    assert Defended(clean, masks).answer(clean.images()).certified.all()
    won, seen = 0, set()
    for row, column in grid_positions(masks.image, masks.patch, 1):
        window = clean.regions[:, row : row + masks.patch[0], column : column + masks.patch[1]]
        free = ~window.all((1, 2))
        if free.tobytes() in seen:
            continue
        seen.add(free.tobytes())
        choices = np.array(list(itertools.product(range(CLASSES), repeat=int(free.sum()))), np.int64)
        tables = np.zeros((len(choices), len(free)), np.int64)
        tables[:, free] = choices
        attacked = Tables(masks, tables)
        won += int((Defended(attacked, masks, 500).predict(attacked.images()) != 0).sum())
    return won


def test_no_attacker_changes_what_is_certified() -> None:
    assert wins(SMALL) == 0


def test_the_enumeration_finds_a_hole_in_the_masks() -> None:
    holey = Unchecked(SMALL.image, SMALL.patch, (4, 4), ((0,), (0, 2)), BLACK)
    assert wins(holey) > 0


def test_one_wrong_pair_prevents_the_certificate() -> None:
    tables = np.zeros((11, 10), np.int64)
    tables[np.arange(1, 11), np.arange(10)] = 1
    model = Tables(SMALL, tables)
    for size in (1, 4, 100):
        answers = Defended(model, SMALL, size).answer(model.images())
        assert answers.certified.tolist() == [True] + [False] * 10


def published(masks: MaskSet, model: Tables, number: int) -> int:
    """Algorithm 1 of the paper, one image, without shortcuts."""

    def label(one: int, other: int) -> int:
        return int(model.tables[number, model.pairs.index((min(one, other), max(one, other)))])

    every = range(len(masks))
    first = [label(mask, mask) for mask in every]
    counted = Counter(first)
    majority = min(counted, key=lambda value: (-counted[value], value))
    for mask in every:
        if first[mask] != majority and {label(mask, other) for other in every} == {first[mask]}:
            return first[mask]
    return majority


def random_tables(count: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(1)
    tables = rng.choice(CLASSES, (count, 10), p=[0.7, 0.2, 0.1])
    for row in range(0, count, 3):  # one mask that stands the second round
        cells = [cell for cell, pair in enumerate(Tables(SMALL, tables[:1]).pairs) if row % 4 in pair]
        tables[row, cells] = 1 + row % 2
    return tables.astype(np.int64)


def test_predictions_are_the_published_ones() -> None:
    model = Tables(SMALL, random_tables(600))
    expected = [published(SMALL, model, number) for number in range(600)]
    assert min(Counter(expected).values()) > 20
    for size in (7, 1000):
        model.asked = 0
        answers = Defended(model, SMALL, size).answer(model.images())
        assert answers.labels.tolist() == expected
        assert (answers.certified == (model.tables == model.tables[:, :1]).all(1)).all()
        assert model.asked == answers.predicting.sum() + answers.proving.sum()
        labels, certified = Defended(model, SMALL, size)(model.images())
        assert (labels == answers.labels).all()
        assert (certified == answers.certified).all()


def test_wrong_predictions_are_not_proven_and_prediction_alone_proves_nothing() -> None:
    model = Tables(SMALL, np.zeros((2, 10), np.int64))
    defended = Defended(model, SMALL)
    answers = defended.answer(model.images(), np.array([0, 1]))
    assert answers.certified.tolist() == [True, False]
    assert answers.predicting.tolist() == [4, 4]
    assert answers.proving.tolist() == [6, 0]
    assert not defended.answer(model.images(), prove=False).certified.any()


def trigger(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Class 1 where any pixel is white, class 0 elsewhere: one bright pixel fools it."""
    white = (images == 255).all(1).any((1, 2))
    return np.stack([~white, white], 1).astype(np.float32)


def test_a_fragile_model_is_defended_against_patches_at_every_place() -> None:
    images = np.random.default_rng(0).integers(0, 200, (3, 3, 12, 12), np.uint8)
    images[2, :, 5, 5] = images[2, :, 6, 6] = 255  # class 1, on two pixels that one mask can hide
    labels = np.array([0, 0, 1])
    masks = MaskSet.of((12, 12), (3, 3), 3)
    defended = Defended(trigger, masks)
    answers = defended.answer(images, labels)
    assert answers.certified.tolist() == [True, True, False]
    pixels, mask = np.full((3, 3, 3), 255, np.uint8), np.ones((3, 3), bool)
    fooled = 0
    for place in grid_positions((12, 12), (3, 3), 1):
        attacked = apply_patch(images, pixels, mask, np.tile(place, (3, 1)))
        fooled += int((trigger(attacked[:2]).argmax(1) == 1).sum())
        assert not contradictions(answers.certified, defended.predict, attacked, labels).any()
    assert fooled == 2 * 100


def test_contradictions_are_found_where_there_are_any() -> None:
    images = np.zeros((3, 3, 12, 12), np.uint8)

    def always_one(shown: NDArray[np.uint8]) -> NDArray[np.int64]:
        return np.ones(len(shown), np.int64)

    flags = contradictions(np.array([True, True, False]), always_one, images, np.array([0, 1, 0]))
    assert flags.tolist() == [True, False, False]
    assert not contradictions(np.zeros(3, bool), always_one, images, np.zeros(3, np.int64)).any()
    with pytest.raises(InputError, match="one attacked version"):
        contradictions(np.zeros(2, bool), always_one, images, np.zeros(3, np.int64))


def two_spots(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Looks at two pixels, far apart, each dark, bright or masked, and trusts the one that is not bright."""
    near, far = images[:, 0, 1, 1], images[:, 0, 10, 10]
    one = (near == 255) & (far != 255) | (near == 127) & (far == 0)
    return np.stack([~one, one], 1).astype(np.float32)


def test_one_round_of_masks_cannot_certify() -> None:
    """Two clean images of different classes, each with its label behind every single mask, become one and the same image
    under a patch. So agreement of single masks proves nothing, whatever is done with them; pairs see the difference.
    """
    dark_near, dark_far, attacked = np.zeros((3, 1, 3, 12, 12), np.uint8)
    dark_near[..., 10, 10] = dark_far[..., 1, 1] = 255
    attacked[..., 10, 10] = attacked[..., 1, 1] = 255
    white, mask = np.full((3, 1, 1), 255, np.uint8), np.ones((1, 1), bool)
    assert (apply_patch(dark_near, white, mask, np.array([[1, 1]])) == attacked).all()
    assert (apply_patch(dark_far, white, mask, np.array([[10, 10]])) == attacked).all()
    masks = MaskSet.of((12, 12), (1, 1), 3)
    labels = []
    certified = []
    for image in (dark_near, dark_far):
        behind = masks.apply(np.repeat(image, len(masks), 0), np.arange(len(masks)))
        alone = two_spots(behind).argmax(1)
        assert len(set(alone)) == 1
        labels.append(int(alone[0]))
        certified.append(bool(Defended(two_spots, masks).answer(image).certified[0]))
    assert labels == [0, 1]
    assert sorted(certified) == [False, True]
    assert Defended(two_spots, masks).predict(attacked)[0] == labels[certified.index(True)]


@pytest.mark.parametrize(
    "logits",
    [
        lambda n: np.full((n, 2), np.nan),
        lambda n: np.zeros((n + 1, 2)),
        lambda n: np.zeros(n),
        lambda n: np.zeros((n, 1)),
    ],
)
def test_a_broken_engine_is_an_error(logits: object) -> None:
    defended = Defended(lambda images: logits(len(images)), SMALL)  # type: ignore[operator]
    with pytest.raises(EngineError, match="finite logits"):
        defended(np.zeros((2, 3, 6, 6), np.uint8))


def test_wrong_input_is_an_error() -> None:
    for shape in ((2, 3, 6, 7), (0, 3, 6, 6), (3, 6, 6)):
        with pytest.raises(InputError, match=r"masks are for images of \(6, 6\)"):
            Defended(trigger, SMALL)(np.zeros(shape, np.uint8))
    with pytest.raises(InputError, match="batch size"):
        Defended(trigger, SMALL, 0)
