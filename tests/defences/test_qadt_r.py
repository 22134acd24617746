"""What the passes of QADT-R really see, and where its patches go."""

import itertools

import numpy as np
import pytest
import torch
from small_training import TRAIN, batch_of, small_trainer
from test_trainer import PER_IMAGE, UNIVERSAL, trainer

from edgeguard.defences.parts import PerImagePatches, UniversalPatches
from edgeguard.defences.patch_memory import PatchMemory
from edgeguard.defences.qadt_r import QADTR, _promising


def seen_passes(subject, indices=None):
    """Pixels of every pass of one step, and the clean batch."""
    seen, forward = [], subject.forward

    def watched(pixels, width):
        seen.append(pixels.detach().clone())
        return forward(pixels, width)

    subject.forward = watched
    indices = np.arange(16) if indices is None else indices
    clean = torch.from_numpy(TRAIN.images(indices)).float()
    subject.step(indices)
    return seen, clean


def boxes(changed):
    """Rows and columns that changed pixels of (n, 3, H, W) span, for each image."""
    spans = []
    for image in changed.any(1):
        rows, columns = image.any(1).nonzero()[:, 0], image.any(0).nonzero()[:, 0]
        spans.append(
            (int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1) if len(rows) else (0, 0)
        )
    return spans


def test_only_a_share_of_the_images_is_patched_by_squares_of_whole_grey_levels():
    subject = trainer(augment=False, universal=None, per_image=PerImagePatches(sizes=(4,), passes=3, share=0.75))
    seen, clean = seen_passes(subject)
    assert len(seen) == 4
    assert torch.equal(seen[0], clean)
    for pixels in seen[1:]:
        assert torch.equal(pixels[12:], clean[12:])
        spans = boxes(pixels != clean)
        assert all(0 < height <= 4 and 0 < width <= 4 for height, width in spans[:12])
        assert spans.count((4, 4)) > 6
        assert torch.equal(pixels, pixels.round().clamp(0, 255))


def test_patches_stay_where_they_are_and_climb_by_steps_that_halve():
    part = PerImagePatches(sizes=(4,), passes=3, step_size=40.0, momentum=0.0)
    subject = trainer(augment=False, universal=None, per_image=part)
    seen, clean = seen_passes(subject)
    for earlier, later, step in zip(seen[1:-1], seen[2:], (40, 30), strict=True):
        moved = (later - earlier).abs()
        assert moved.max() == step
        spans = boxes(((later != clean) | (earlier != clean))[:12])
        assert all(height <= 4 and width <= 4 for height, width in spans)


def test_patches_ascend_alone_while_the_weights_rest():
    part = PerImagePatches(sizes=(4,), passes=1, ascents=3, step_size=40.0, momentum=0.0)
    subject = trainer(augment=False, universal=None, per_image=part)
    learned, forward = [], subject.forward

    def watched(pixels, width):
        norms = [norm.running_mean for norm in subject.model.modules() if isinstance(norm, torch.nn.BatchNorm2d)]
        state = [*subject.model.parameters(), *norms]
        learned.append((len(pixels), [value.detach().clone() for value in state]))
        return forward(pixels, width)

    subject.forward = watched
    seen, clean = seen_passes(subject)
    assert [count for count, _ in learned] == [16, 12, 12, 12, 16]  # clean, three ascents of the patched share, the pass
    first, *rest = [values for _, values in learned[1:]]
    assert all(torch.equal(one, other) for values in rest for one, other in zip(first, values, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(learned[0][1], first, strict=True))
    sizes = [float((later[:12] - earlier[:12]).abs().max()) for earlier, later in itertools.pairwise(seen[1:])]
    assert sizes == pytest.approx([40, 40 * (1 - 0.5 / 3), 40 * (1 - 1 / 3)], abs=1)
    assert torch.equal(seen[-1][12:], clean[12:])
    assert all(parameter.requires_grad for parameter in subject.model.parameters())


def test_universal_patches_lie_on_the_first_images_of_the_first_pass():
    subject = trainer(augment=False, per_image=None)
    assert isinstance(subject.defence, QADTR)
    members = [patch.pixels for patch in subject.defence.patches()]
    (pixels,), clean = seen_passes(subject)
    assert torch.equal(pixels[8:], clean[8:])
    for image, original in zip(pixels[:8], clean[:8], strict=True):
        windows = [(image[:, y : y + s, x : x + s], s) for s in (3, 4) for y in range(17 - s) for x in range(17 - s)]
        found = [s for window, s in windows if np.array_equal(window.numpy(), members[s - 3])]
        assert len(found) == 1
        assert int((image != original).any(0).sum()) <= found[0] ** 2


def test_universal_patches_climb_on_the_gradient_of_the_training_step():
    subject = trainer(lr=1e-9, scale_lr=1e-9, per_image=None)
    before = [patch.pixels.astype(int) for patch in subject.defence.patches()]
    subject.step(np.arange(16))
    for old, patch in zip(before, subject.defence.patches(), strict=True):
        moved = np.abs(patch.pixels.astype(int) - old)
        assert set(np.unique(moved)) <= set(range(9))
        assert moved.max() == UNIVERSAL.step_size


def test_a_patch_goes_on_in_the_next_epoch_from_where_it_ended():
    part = PerImagePatches(sizes=(4,), passes=2, share=1.0, keep=1.0, step_size=0.5)
    subject = trainer(augment=False, universal=None, per_image=part)
    first, _ = seen_passes(subject)
    second, clean = seen_passes(subject)
    fresh, _ = seen_passes(trainer(augment=False, universal=None, per_image=part, seed=1))
    assert (second[1] - first[-1]).abs().max() <= 1  # one half step and its rounding
    assert (fresh[1] - first[-1]).abs().max() > 1
    assert (second[1] != clean).any()


def test_the_most_promising_of_the_drawn_places_is_taken():
    generator = torch.Generator().manual_seed(0)
    gradient, clean = (
        torch.randn((3, 3, 9, 11), generator=generator),
        torch.rand((3, 3, 9, 11), generator=generator) * 255,
    )
    side, draws = 4, np.random.default_rng(0).random((3, 500))
    places = _promising(gradient, clean, draws, side)
    assert places.shape == (3, 2)
    for image, (row, column) in enumerate(places.tolist()):
        gains = {}
        for y in range(6):
            for x in range(8):
                g, c = (t[image, :, y : y + side, x : x + side] for t in (gradient, clean))
                gains[y, x] = float(torch.maximum(g * (255 - c), -g * c).sum())
        assert (row, column) == max(gains, key=gains.get)


def test_with_one_candidate_any_place_inside_the_image_is_taken():
    draws = ((np.arange(48) + 0.5) / 48)[:, None]
    places = _promising(torch.zeros(48, 3, 9, 11), torch.zeros(48, 3, 9, 11), draws, 4)
    assert places.tolist() == [[n // 8, n % 8] for n in range(48)]


def test_patches_begin_with_what_harms_most_or_with_noise():
    subject = trainer(augment=False, universal=None, per_image=PerImagePatches(sizes=(4,), share=1.0, keep=0.0))
    batch = batch_of(subject, 64)
    gradient = torch.randn(batch.pixels.shape, generator=torch.Generator().manual_seed(0))
    pixels, places = subject.defence._openings(batch, gradient, subject.config.per_image)
    extreme = ((pixels == 0) | (pixels == 255)).flatten(1).all(1)
    assert 16 < int(extreme.sum()) < 48
    number = int(extreme.nonzero()[0, 0])
    row, column = places[number]
    rising = gradient[number, :, row : row + 4, column : column + 4] > 0
    assert torch.equal(pixels[number] == 255, rising)


def test_state_holds_pool_and_memory_and_continues_exactly():
    options = {"universal": UNIVERSAL, "per_image": PER_IMAGE}
    whole, first, second = (small_trainer("qadt-r", {}, batch_size=16, **options) for _ in range(3))
    for subject in (whole, first):
        subject.step(np.arange(16))
    second.defence.load_state(
        {name: np.copy(v) if isinstance(v, np.ndarray) else v for name, v in first.defence.state().items()}
    )
    second.model.load_state_dict(first.model.state_dict())
    for name, optimizer in second.optimizers().items():
        optimizer.load_state_dict(first.optimizers()[name].state_dict())
    second.step_index = 1
    for subject in (whole, second):
        subject.step(np.arange(16) + 4)
    assert {"memory.pixels", "memory.places", "pixels.0", "age"} <= whole.defence.state().keys()
    assert all(np.array_equal(value, second.defence.state()[name]) for name, value in whole.defence.state().items())
    values = second.model.state_dict()
    assert all(torch.equal(value, values[name]) for name, value in whole.model.state_dict().items())


def test_nothing_is_remembered_without_keep():
    assert "memory.pixels" not in trainer(per_image=PerImagePatches(sizes=(3,), keep=0.0)).defence.state()
    assert trainer(universal=None, per_image=PerImagePatches(keep=0.0)).defence.state() == {}
    assert trainer(universal=UniversalPatches((3,), 1), per_image=None).defence.patches()[0].size == (3, 3)
    assert not PatchMemory(4, 3).known(np.arange(4)).any()
