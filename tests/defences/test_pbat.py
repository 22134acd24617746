import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_training import TRAIN, batch_of, equal, small_trainer, train

from edgeguard.defences.attacking import attacked
from edgeguard.defences.parts import LocatedPatches
from edgeguard.defences.pbat import PBAT
from edgeguard.errors import InputError
from edgeguard.quant.width import Width

SMALL = {"sizes": (4,), "attack_steps": 3}


def trainer(options=None, **settings):
    return small_trainer("pbat", {**SMALL, **(options or {})}, **settings)


def losses(subject, pixels, labels, width):
    with attacked(subject.model), torch.no_grad():
        return F.cross_entropy(subject.forward(pixels, width), labels, reduction="none")


def patched(subject, count=32):
    batch = batch_of(subject, count)
    subject.model.train()
    return batch, subject.defence.patched(batch)


def test_half_of_the_batch_carries_one_patch_each_of_whole_grey_levels():
    batch, pixels = patched(trainer())
    assert pixels.shape == (16, 3, 16, 16)
    assert torch.equal(pixels, pixels.round())
    assert pixels.min() >= 0
    assert pixels.max() <= 255
    changed = (pixels != batch.pixels[:16]).any(1).numpy()
    windows = [(np.ptp(np.nonzero(one)[0]) + 1, np.ptp(np.nonzero(one)[1]) + 1) for one in changed]
    assert all(rows <= 4 and columns <= 4 for rows, columns in windows)
    assert len({tuple(np.argwhere(one)[0]) for one in changed}) > 4, "patches lie at places of their own"


@pytest.fixture(scope="module")
def trained():
    subject = small_trainer("qat", {}, epochs=5, lr=0.1, distillation=0.0)
    while not subject.finished:
        subject.run_epoch()
    return subject.model.state_dict()


def test_the_attack_raises_the_loss_at_its_width_and_places_raise_it_further(trained):
    found = {}
    for moves in ("none", "random", "full"):
        subject = trainer({"moves": moves, "attack_steps": 8, "share": 1.0})
        subject.model.load_state_dict(trained)
        batch, pixels = patched(subject, 64)
        found[moves] = float(losses(subject, pixels, batch.labels, Width(8, 8)).mean())
        clean = float(losses(subject, batch.pixels, batch.labels, Width(8, 8)).mean())
        assert found[moves] > clean + 0.5
    assert found["full"] > found["random"] > found["none"]


@pytest.mark.parametrize("moves", ["none", "random", "full"])
def test_every_process_crafts_the_patches_of_its_rows(moves):
    subject = trainer({"moves": moves, "attack_steps": 1, "sizes": (3, 4)})
    whole = patched(subject)[1]
    for rank in range(2):
        part = subject.defence.patched(batch_of(subject, rows=slice(rank, None, 2)))
        same = (part == whole[rank::2]).flatten(1).float().mean(1)
        assert (same > 0.9).all(), "signs of gradients that are nearly zero may differ, places and starts may not"


def test_a_move_keeps_a_place_that_no_neighbour_beats():
    subject = trainer()
    batch = batch_of(subject, 8)
    subject.model.train()
    clean, labels = batch.pixels, batch.labels
    patch = torch.full((8, 3, 4, 4), 255.0)
    places = np.full((8, 2), 6, np.int64)
    down = np.array([2, 0])
    tried = np.stack([places + down, places - down])
    best = torch.full((8,), 1e9)
    with attacked(subject.model):
        assert np.array_equal(subject.defence._best(clean, labels, patch, places, best, tried), places)
        moved = subject.defence._best(clean, labels, patch, places, -best, tried)
    ones = [losses(subject, _under(clean, patch, each), labels, Width(8, 8)) for each in tried]
    expected = np.where((ones[1] > ones[0]).numpy()[:, None], tried[1], tried[0])
    assert np.array_equal(moved, expected)


def _under(clean, patch, places):
    out = clean.clone()
    for image, (row, column) in enumerate(places):
        out[image, :, row : row + 4, column : column + 4] = patch[image]
    return out


def test_only_the_attacked_width_is_asked_and_nothing_of_the_model_changes(monkeypatch):
    for options, width in (({}, Width(8, 8)), ({"attack_width": Width(2, 2)}, Width(2, 2))):
        subject = trainer(options)
        asked, forward = [], subject.forward

        def spy(pixels, at, asked=asked, forward=forward):
            asked.append(at)
            return forward(pixels, at)

        monkeypatch.setattr(subject, "forward", spy)
        before = {name: value.clone() for name, value in subject.model.state_dict().items()}
        patched(subject)
        assert set(asked) == {width}
        assert len(asked) == 3 * (1 + 4)
        assert equal(before, subject.model.state_dict())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in subject.model.parameters())


def test_weights_are_trained_at_all_widths_or_at_one():
    several = trainer()
    widths = {str(several.step(np.arange(16) + n).width) for n in range(8)}
    single = trainer({"single_width": True})
    assert {str(single.step(np.arange(16) + n).width) for n in range(4)} == {"8"}
    assert len(widths) > 1


@pytest.mark.parametrize(
    "options",
    [
        {"sizes": (5,)},
        {"share": 0.25},
        {"attack_steps": 1},
        {"step_size": 4.0},
        {"moves": "random"},
        {"moves": "none"},
        {"stride": 1},
        {"attack_width": Width(2, 2)},
        {"single_width": True},
    ],
    ids=str,
)
def test_every_option_changes_the_result(options):
    assert not equal(train(trainer(), 2), train(trainer(options), 2))


def test_same_seed_same_bytes_and_no_state():
    subject = trainer()
    assert equal(train(subject, 2), train(trainer(), 2))
    assert isinstance(subject.defence, PBAT)
    assert subject.defence.state() == {}
    assert subject.defence.patches() == []


def test_training_lowers_the_loss_under_its_attack():
    subject = trainer({"moves": "random"}, epochs=4, distillation=0.0, lr=0.1)
    found = []
    while not subject.finished:
        subject.run_epoch(lambda result: found.append(result.loss))
    assert len(found) == 4 * len(TRAIN) // 32
    assert np.mean(found[-8:]) < 0.95 * np.mean(found[:8])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": ()}, "patch sizes must be positive"),
        ({"share": 0.0}, "0 < share <= 1"),
        ({"attack_steps": 0}, "attack steps and stride >= 1"),
        ({"stride": 0}, "attack steps and stride >= 1"),
        ({"step_size": 0.0}, "0.5 to 255 grey levels, got 0.0"),
        ({"moves": "up"}, "unknown moves 'up'.*full, random, none"),
    ],
)
def test_impossible_options_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(LocatedPatches(), **change)
