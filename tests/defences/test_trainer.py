import dataclasses

import numpy as np
import pytest
import torch

from edgeguard.calib import calibrate
from edgeguard.data import load_dataset
from edgeguard.defences.augment import crop_and_flip
from edgeguard.defences.config import GIR, HardenConfig, PatchTraining, preset
from edgeguard.defences.gir import frozen_statistics, gradient_alignment
from edgeguard.defences.trainer import Trainer
from edgeguard.errors import InputError
from edgeguard.models import load_model
from edgeguard.quant.model import Normalization, quantize_model
from edgeguard.quant.scheme import QuantScheme
from edgeguard.quant.width import Width, parse_widths

WIDTHS = parse_widths("8,2")
TRAIN = load_dataset("digits", "train", 16).subset(np.arange(256))
CPU = torch.device("cpu")
PATCHES = PatchTraining(sizes=(3, 4), members=1, per_step=2)


def config(**changes):
    base = HardenConfig("qadt-r", WIDTHS, epochs=2, batch_size=32, flip=False, patches=PATCHES)
    return dataclasses.replace(base, **changes)


def trainer(**changes):
    float_model = load_model("resnet8")
    model = quantize_model(float_model.module, QuantScheme(WIDTHS), Normalization(float_model.mean, float_model.std))
    calibrate(model, TRAIN.images(np.arange(32)))
    return Trainer(model, TRAIN, config(**changes), CPU)


def state(subject):
    return {name: value.clone() for name, value in subject.model.state_dict().items()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def steps(subject, count):
    return [subject.step(np.arange(32) + 7 * number) for number in range(count)]


def test_same_seed_same_bytes_other_seed_other_bytes():
    first, second, other = trainer(), trainer(), trainer(seed=1)
    for subject in (first, second, other):
        steps(subject, 3)
    assert equal(state(first), state(second))
    assert not equal(state(first), state(other))


@pytest.mark.parametrize(
    "changes",
    [
        {"gir": GIR(backward_noise=0.5)},
        {"gir": GIR(alignment=1.0, alignment_every=1)},
        {"gir": GIR(patch_noise=5.0)},
        {"lr": 0.001},
        {"scale_lr": 0.1},
        {"momentum": 0.0},
        {"weight_decay": 0.1},
        {"clip_norm": 0.01},
        {"augment": False},
        {"flip": True},
        {"patches": None},
        {"patches": dataclasses.replace(PATCHES, step_size=32.0)},
        {"patches": dataclasses.replace(PATCHES, share=0.25)},
        {"patches": dataclasses.replace(PATCHES, sizes=(2, 5))},
        {"patches": dataclasses.replace(PATCHES, members=2)},
        {"patches": dataclasses.replace(PATCHES, per_step=1)},
        {"patches": dataclasses.replace(PATCHES, inner_steps=1)},
        {"patches": dataclasses.replace(PATCHES, refresh_every=2)},
    ],
    ids=str,
)
def test_every_option_changes_the_result(changes):
    plain, changed = trainer(), trainer(**changes)
    steps(plain, 4)
    steps(changed, 4)
    assert not equal(state(plain), state(changed))


def test_warm_up_changes_the_result():
    plain, changed = trainer(epochs=20), trainer(epochs=20, warmup_steps=1)
    steps(plain, 2)
    steps(changed, 2)
    assert not equal(state(plain), state(changed))


def test_a_step_trains_the_current_width_only():
    subject = trainer()
    before = state(subject)
    width = subject.step(np.arange(32)).width
    after = state(subject)
    own, other = (WIDTHS.index(w) for w in (width, *[w for w in WIDTHS if w != width]))
    assert not torch.equal(before[f"body.bn1.norms.{own}.running_mean"], after[f"body.bn1.norms.{own}.running_mean"])
    assert torch.equal(before[f"body.bn1.norms.{other}.running_mean"], after[f"body.bn1.norms.{other}.running_mean"])
    assert not torch.equal(before["body.conv1.weight"], after["body.conv1.weight"])


def test_patches_climb_on_the_gradient_of_the_training_step():
    subject = trainer(lr=1e-9, scale_lr=1e-9)
    assert subject.pool is not None
    before = subject.pool[0]
    steps(subject, 1)
    moved = subject.pool[0] - before
    assert set(np.unique(np.abs(moved))) <= set(range(9))
    assert np.abs(moved).max() == 8


def test_widths_are_drawn_in_proportion_to_their_need():
    probabilities = config(widths=parse_widths("8,4,2")).width_probabilities()
    assert probabilities == pytest.approx([1 / 7, 2 / 7, 4 / 7])


def test_training_lowers_the_loss():
    subject = trainer(epochs=6, lr=0.05)
    losses = []
    while not subject.finished:
        subject.run_epoch(lambda result: losses.append(result.loss))
    assert len(losses) == 48
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])


def test_max_steps_ends_the_run_in_mid_epoch():
    subject = trainer(max_steps=3)
    subject.run_epoch()
    assert subject.finished
    assert subject.step_index == 3


def test_a_diverging_loss_is_an_error():
    subject = trainer()
    subject.model.body.get_submodule("linear").weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="no longer finite"):
        subject.step(np.arange(32))


def test_frozen_statistics_are_kept_and_training_resumes():
    subject = trainer()
    subject.model.train()
    before = state(subject)
    with frozen_statistics(subject.model):
        subject.model(torch.zeros(4, 3, 16, 16))
    assert equal(before, state(subject))
    assert subject.model.body.get_submodule("bn1").norms[0].training


def test_alignment_is_a_share_and_one_for_equal_widths():
    subject = trainer()
    pixels, labels = torch.from_numpy(TRAIN.images(np.arange(8))).float(), torch.from_numpy(TRAIN.labels[:8])
    eight, two = Width(8, 8), Width(2, 2)
    same = gradient_alignment(subject.model, pixels, labels, (eight, eight))
    other = gradient_alignment(subject.model, pixels, labels, (eight, two))
    assert float(same.detach()) == pytest.approx(1.0, abs=1e-4)
    assert 0.0 <= float(other.detach()) < float(same.detach())


def test_crops_keep_pixels_and_follow_the_generator():
    images = TRAIN.images(np.arange(16))
    out = crop_and_flip(images, np.random.default_rng(0), flip=True)
    assert out.shape == images.shape
    assert out.dtype == np.uint8
    assert np.array_equal(out, crop_and_flip(images, np.random.default_rng(0), flip=True))
    assert not np.array_equal(out, crop_and_flip(images, np.random.default_rng(0), flip=False))
    ramp = np.broadcast_to(np.arange(16, dtype=np.uint8) + 1, (64, 3, 16, 16)).copy()
    columns = crop_and_flip(ramp, np.random.default_rng(1), flip=False)[:, 0, 8]
    assert all(set(np.diff(row[row > 0].astype(int)).tolist()) == {1} for row in columns)


def test_presets_switch_parts_on():
    plain = config(patches=None)
    qadtr = preset(dataclasses.replace(plain, method="qadt-r"))
    assert qadtr.patches == PatchTraining()
    assert min(qadtr.gir.backward_noise, qadtr.gir.alignment, qadtr.gir.patch_noise) > 0
    assert preset(qadtr, {"alignment": 0.0}).gir.alignment == 0.0
    qat = preset(dataclasses.replace(qadtr, method="qat"))
    assert (qat.patches, qat.gir) == (None, GIR())
    with pytest.raises(InputError, match="qat is the undefended baseline: it has no alignment"):
        preset(qat, {"alignment": 1.0})
    with pytest.raises(InputError, match="unknown method 'magic'"):
        preset(dataclasses.replace(qadtr, method="magic"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: config(epochs=0),
        lambda: config(batch_size=1),
        lambda: config(lr=float("nan")),
        lambda: config(seed=-1),
        lambda: GIR(alignment=-1.0),
        lambda: GIR(alignment_every=0),
        lambda: PatchTraining(sizes=()),
        lambda: PatchTraining(share=0.0),
    ],
)
def test_impossible_options_are_refused(make):
    with pytest.raises(InputError):
        make()
