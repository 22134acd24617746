import collections
import dataclasses

import numpy as np
import pytest
import torch
from small_training import TRAIN, WIDTHS, batch_of, equal, small_trainer, train

from edgeguard.defences.distributed import forbid_local_statistics
from edgeguard.defences.parts import Disalignment, UniversalPatches
from edgeguard.defences.triqdef import likeness
from edgeguard.errors import InputError
from edgeguard.quant.width import Width

EIGHT, FOUR, TWO = WIDTHS
PATCHES = UniversalPatches(sizes=(4,), members=2, share=0.5, per_step=2)
SMALL = {"patches": PATCHES, "penalty_every": 1, "penalty_images": 8}


def trainer(options=None, **settings):
    return small_trainer("triqdef", {**SMALL, **(options or {})}, **settings)


def measured(subject, widths, layers=2, gradients=True):
    pixels, labels = torch.from_numpy(TRAIN.images(np.arange(16))).float(), torch.from_numpy(TRAIN.labels[:16])
    subject.model.train()
    return likeness(subject.model, pixels, labels, widths, layers, gradients)


def test_likeness_is_one_for_a_width_and_itself_and_less_for_two():
    subject = trainer()
    same, other = measured(subject, (EIGHT, EIGHT)), measured(subject, (EIGHT, TWO))
    assert [float(value.detach()) for value in same] == pytest.approx([1.0, 1.0], abs=1e-4)
    assert all(0.0 < float(value.detach()) < 0.99 for value in other)
    assert float(measured(subject, (EIGHT, TWO), gradients=False)[1]) == 0.0
    assert float(measured(subject, (EIGHT, TWO), layers=1)[0].detach()) != float(other[0].detach())


def test_likeness_does_not_depend_on_running_statistics_and_leaves_them():
    subject = trainer()
    before = measured(subject, (EIGHT, TWO))
    norms = [m for m in subject.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    kept = [norm.running_mean.fill_(7.0).clone() for norm in norms]
    counts = [norm.num_batches_tracked.clone() for norm in norms]
    after = measured(subject, (EIGHT, TWO))
    assert [float(v.detach()) for v in after] == [float(v.detach()) for v in before]
    assert all(torch.equal(norm.running_mean, was) for norm, was in zip(norms, kept, strict=True))
    assert all(torch.equal(norm.num_batches_tracked, was) for norm, was in zip(norms, counts, strict=True))
    assert all(norm.training and norm.track_running_stats for norm in norms)


def test_statistics_of_one_process_alone_are_refused_where_several_train():
    subject = trainer()
    forbid_local_statistics(subject.model)
    with pytest.raises(InputError, match="train it with one process"):
        measured(subject, (EIGHT, TWO))


def test_features_are_the_ends_of_the_last_stages():
    subject = trainer()
    seen = {}
    names = list(subject.model.activation_quantizers())
    for name in names:
        layer = subject.model.body.get_submodule(name)
        layer.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out.detach()))
    with torch.no_grad():
        subject.model.eval()(torch.zeros(1, 3, 16, 16))
    ends = {tuple(value.shape[2:]): name for name, value in seen.items() if value.dim() == 4 and value.shape[2] > 1}
    assert list(ends) == [(16, 16), (8, 8), (4, 4)]
    assert all("relu2" in ends[size] or "add" in ends[size] for size in ends), ends


def test_each_penalty_has_a_gradient_that_lowers_it():
    subject = trainer()
    parameters = [p for p in subject.model.body.parameters() if p.dim() > 1]
    for index in range(2):
        value = measured(subject, (EIGHT, TWO))[index]
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        norm = sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5
        assert np.isfinite(norm)
        assert norm > 0


def test_penalties_make_widths_less_alike():
    plain = trainer({"feature_penalty": 0.0, "gradient_penalty": 0.0}, epochs=4, distillation=0.0)
    apart = trainer({"feature_penalty": 8.0, "gradient_penalty": 0.0}, epochs=4, distillation=0.0)
    for subject in (plain, apart):
        for number in range(16):
            subject.step(np.arange(32) + 7 * number)
    pairs = [(EIGHT, FOUR), (EIGHT, TWO), (FOUR, TWO)]
    values = [[float(measured(s, pair, gradients=False)[0].detach()) for pair in pairs] for s in (plain, apart)]
    assert np.mean(values[1]) < np.mean(values[0]) - 0.02


def test_the_curriculum_opens_widths_from_high_to_low():
    subject = trainer()
    assert subject.total_steps == 16
    opened = [subject.defence.open_widths(step) for step in range(16)]
    assert opened[:4] == [(EIGHT, FOUR)] * 4
    assert opened[4:] == [(EIGHT, FOUR, TWO)] * 12
    at_once = trainer({"curriculum": 0.0})
    assert at_once.defence.open_widths(0) == (EIGHT, FOUR, TWO)
    mixed = trainer(bits="2,8,4")
    assert mixed.defence.open_widths(0) == (EIGHT, FOUR)


def test_two_different_widths_are_drawn_among_those_open():
    subject = trainer({"curriculum": 0.0})
    drawn = [subject.defence._draw(batch_of(subject, 2, step)) for step in range(140)]
    assert all(width != other for width, other in drawn)
    counts = collections.Counter(width for width, _ in drawn)
    assert counts[TWO] > counts[FOUR] > counts[EIGHT] > 0
    early = trainer()
    assert TWO not in {one for step in range(4) for one in early.defence._draw(batch_of(early, 2, step))}


def test_patches_are_universal_and_climb():
    subject = trainer(lr=1e-9, scale_lr=1e-9)
    before = [patch.pixels.astype(int) for patch in subject.defence.patches()]
    assert [one.shape for one in before] == [(3, 4, 4)] * 2
    result = subject.step(np.arange(32))
    moved = [patch.pixels - old for patch, old in zip(subject.defence.patches(), before, strict=True)]
    assert max(np.abs(one).max() for one in moved) == 8
    assert 0 <= result.patched_accuracy <= 1
    assert 0 <= result.clean_accuracy <= 1
    other = trainer()
    other.defence.load_state(subject.defence.state())
    assert all(np.array_equal(a.pixels, b.pixels)
               for a, b in zip(other.defence.patches(), subject.defence.patches(), strict=True))  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"patches": dataclasses.replace(PATCHES, sizes=(5,))},
        {"patches": dataclasses.replace(PATCHES, share=0.25)},
        {"feature_penalty": 0.0},
        {"gradient_penalty": 0.0},
        {"penalty_every": 2},
        {"penalty_images": 4},
        {"layers": 1},
        {"curriculum": 0.0},
    ],
    ids=str,
)
def test_every_option_changes_the_result(options):
    assert not equal(train(trainer(), 3), train(trainer(options), 3))


def test_same_seed_same_bytes():
    assert equal(train(trainer(), 2), train(trainer(), 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_penalty": -1.0}, "finite and not negative"),
        ({"gradient_penalty": float("nan")}, "finite and not negative"),
        ({"penalty_every": 0}, "at least 1"),
        ({"penalty_images": 1}, "at least 2 images"),
        ({"layers": 0}, "at least 1"),
        ({"curriculum": 1.5}, "a part of the run"),
    ],
)
def test_impossible_options_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(Disalignment(), **change)


def test_one_width_cannot_be_compared():
    with pytest.raises(InputError, match="two or more"):
        trainer(bits="4")
    assert Width(4, 4) in WIDTHS
