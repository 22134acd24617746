import copy
import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from small_training import TRAIN, batch_of, calibrated, equal, fresh
from torch import nn

from edgeguard.calib import calibrate
from edgeguard.defences.config import HardenConfig, preset
from edgeguard.defences.gir import frozen_statistics, gradient_alignment
from edgeguard.defences.parts import GIR, PerImagePatches, UniversalPatches
from edgeguard.defences.trainer import Trainer
from edgeguard.errors import InputError
from edgeguard.models import load_model
from edgeguard.quant.model import Normalization, quantize_model
from edgeguard.quant.scheme import QuantScheme
from edgeguard.quant.width import Width, parse_widths

WIDTHS = parse_widths("8,2")
CPU = torch.device("cpu")
UNIVERSAL = UniversalPatches(sizes=(3, 4), members=1, per_step=2, share=0.5)
PER_IMAGE = PerImagePatches(sizes=(3, 4), passes=2)


def config(**changes):
    base = HardenConfig("qadt-r", WIDTHS, epochs=2, batch_size=16, flip=False, universal=UNIVERSAL, per_image=PER_IMAGE)
    return dataclasses.replace(base, **changes)


def trainer(bits="8,2", **changes):
    model = fresh(bits)
    model.load_state_dict(calibrated(bits))
    settings = config(**{"widths": parse_widths(bits), **changes})
    return Trainer(model, TRAIN, settings, CPU, load_model("resnet8"))


def state(subject):
    return {name: value.clone() for name, value in subject.model.state_dict().items()}


def steps(subject, count):
    """Batches overlap, so that later ones meet images again."""
    return [subject.step(np.arange(16) + 5 * number) for number in range(count)]


@pytest.fixture(scope="module")
def plain():
    subject = trainer()
    steps(subject, 4)
    return state(subject)


def test_same_seed_same_bytes_other_seed_other_bytes(plain):
    second, other = trainer(), trainer(seed=1)
    for subject in (second, other):
        steps(subject, 4)
    assert equal(plain, state(second))
    assert not equal(plain, state(other))


def universal(**changes):
    return {"universal": dataclasses.replace(UNIVERSAL, **changes)}


def per_image(**changes):
    return {"per_image": dataclasses.replace(PER_IMAGE, **changes)}


@pytest.mark.parametrize(
    "changes",
    [
        {"gir": GIR(backward_noise=0.5)},
        {"gir": GIR(alignment=1.0, alignment_every=1)},
        {"gir": GIR(alignment=1.0, alignment_every=2)},
        {"gir": GIR(alignment=1.0, alignment_every=1, alignment_images=4)},
        {"gir": GIR(patch_noise=5.0)},
        {"lr": 0.001},
        {"scale_lr": 0.1},
        {"momentum": 0.0},
        {"weight_decay": 0.1},
        {"clip_norm": 0.01},
        {"epochs": 1},
        {"max_steps": 4},
        {"accumulate": 2},
        {"augment": False},
        {"flip": True},
        {"distillation": 0.0},
        {"distillation": 1.0},
        {"temperature": 8.0},
        {"amp": True},
        {"universal": None},
        universal(sizes=(2, 5)),
        universal(members=2),
        universal(share=0.25),
        universal(per_step=1),
        universal(step_size=32.0),
        universal(refresh_every=2),
        {"per_image": None},
        per_image(sizes=(2, 5)),
        per_image(share=0.25),
        per_image(passes=1),
        per_image(ascents=2),
        per_image(step_size=8.0),
        per_image(momentum=0.0),
        per_image(candidates=1),
        per_image(keep=0.0),
        {"method": "qat"},
    ],
    ids=str,
)
def test_every_option_changes_the_result(plain, changes):
    changed = trainer(**changes)
    steps(changed, 4)
    assert not equal(plain, state(changed))


def test_the_two_alignment_penalties_differ():
    """Neither of the two options stands for the other."""
    found = []
    for gir in (GIR(alignment=1.0, alignment_every=1), GIR(alignment=1.0, alignment_every=2),
                GIR(alignment=1.0, alignment_every=1, alignment_images=4)):  # fmt: skip
        subject = trainer(gir=gir, per_image=None)
        steps(subject, 2)
        found.append(state(subject))
    assert not any(equal(a, b) for n, a in enumerate(found) for b in found[:n])


def test_without_a_teacher_or_distillation_there_is_none():
    assert Trainer(fresh("8,2"), TRAIN, config(), CPU).teacher is None
    assert trainer(distillation=0.0).teacher is None
    assert trainer().teacher is not None


def test_the_loss_mixes_label_and_teacher():
    logits, taught = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    label = torch.tensor([0])
    hard = float(nn.functional.cross_entropy(logits, label))
    soft = 9 * float(
        (torch.softmax(taught / 3, 1) * (torch.log_softmax(taught / 3, 1) - torch.log_softmax(logits / 3, 1))).sum()
    )
    subject = trainer(distillation=0.25, temperature=3.0)
    assert float(subject.loss(logits, label, taught)) == pytest.approx(0.75 * hard + 0.25 * soft, rel=1e-5)
    assert float(subject.loss(logits, label, None)) == pytest.approx(hard)


def test_the_teacher_answers_the_clean_image_as_the_float_model_does():
    float_model = load_model("resnet8")
    subject, seen = trainer(augment=False), []
    train = subject.defence.train
    subject.defence.train = lambda batch: (seen.append(batch), train(batch))[1]
    subject.step(np.arange(16))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (float_model.mean, float_model.std))
    with torch.no_grad():
        expected = float_model.module((torch.from_numpy(TRAIN.images(np.arange(16))).float() / 255 - mean) / std)
    torch.testing.assert_close(seen[0].taught, expected, rtol=1e-3, atol=1e-3)


def plain_net():
    """Without batch norm a part of a batch does not depend on the others."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)
        )
    model = quantize_model(module, QuantScheme(parse_widths("4")), Normalization((0.5,) * 3, (0.25,) * 3))
    calibrate(model, TRAIN.images(np.arange(32)))
    return model


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_give_the_update_of_the_whole(parts):
    start = plain_net()
    before = {name: value.clone() for name, value in start.state_dict().items()}
    found = []
    for accumulate in (1, parts):
        subject = Trainer(
            copy.deepcopy(start), TRAIN,
            config(method="qat", widths=parse_widths("4"), accumulate=accumulate, augment=False, distillation=0.0, clip_norm=0.05),
            CPU,
        )  # fmt: skip
        result = subject.step(np.arange(16))
        found.append((state(subject), result))
    (whole, result), (summed, result_of_parts) = found
    moved = max(float((whole[name] - before[name]).abs().max()) for name in whole)
    assert moved > 1e-4
    for name in whole:
        torch.testing.assert_close(summed[name], whole[name], rtol=0, atol=1e-4 * moved, msg=name)
    assert result_of_parts.loss == pytest.approx(result.loss, rel=1e-5)
    assert result_of_parts.clean_accuracy == pytest.approx(result.clean_accuracy)


def test_there_are_as_many_updates_in_parts_as_in_one():
    for accumulate in (1, 2):
        subject, updates = trainer(accumulate=accumulate), []
        subject.weight_optimizer.register_step_post_hook(lambda *_, updates=updates: updates.append(1))
        steps(subject, 2)
        assert len(updates) == 2 * (1 + PER_IMAGE.passes)


def test_warm_up_changes_the_result():
    first, changed = trainer(epochs=20), trainer(epochs=20, warmup_steps=1)
    steps(first, 2)
    steps(changed, 2)
    assert not equal(state(first), state(changed))


def test_a_step_trains_the_current_width_only():
    subject = trainer(per_image=None)
    before = state(subject)
    width = subject.step(np.arange(16)).width
    after = state(subject)
    own, other = (WIDTHS.index(w) for w in (width, *[w for w in WIDTHS if w != width]))
    assert not torch.equal(before[f"body.bn1.norms.{own}.running_mean"], after[f"body.bn1.norms.{own}.running_mean"])
    assert torch.equal(before[f"body.bn1.norms.{other}.running_mean"], after[f"body.bn1.norms.{other}.running_mean"])
    assert not torch.equal(before["body.conv1.weight"], after["body.conv1.weight"])


def test_widths_are_drawn_in_proportion_to_their_need():
    widths = parse_widths("8,4,2")
    assert config(widths=widths).width_probabilities() == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    subject = trainer("8,4,2")
    drawn = Counter()
    for step in range(50):
        batch = batch_of(subject, 2, step)
        drawn.update(subject.draw_width(batch, number) for number in range(4))
    assert drawn[Width(2, 2)] > drawn[Width(4, 4)] > drawn[Width(8, 8)] > 10


def test_training_lowers_the_loss():
    subject = trainer(epochs=3, batch_size=32, lr=0.05, distillation=0.0)
    losses = []
    while not subject.finished:
        subject.run_epoch(lambda result: losses.append(result.loss))
    assert len(losses) == 24
    assert np.mean(losses[-6:]) < 0.85 * np.mean(losses[:6])


def test_max_steps_ends_the_run_in_mid_epoch():
    subject = trainer(max_steps=3)
    subject.run_epoch()
    assert subject.finished
    assert subject.step_index == 3


def test_a_diverging_loss_is_an_error():
    subject = trainer()
    subject.model.body.get_submodule("linear").weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="no longer finite"):
        subject.step(np.arange(16))


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


def test_presets_switch_parts_on():
    base = HardenConfig("qadt-r", WIDTHS)
    qadtr = preset(base)
    assert (qadtr.universal, qadtr.per_image) == (UniversalPatches(), PerImagePatches())
    assert min(qadtr.gir.backward_noise, qadtr.gir.alignment, qadtr.gir.patch_noise) > 0
    assert preset(qadtr, {"alignment": 0.0}).gir.alignment == 0.0
    qat = preset(dataclasses.replace(qadtr, method="qat"))
    assert (qat.universal, qat.per_image, qat.gir) == (None, None, GIR())
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
        lambda: config(max_steps=-1),
        lambda: config(accumulate=0),
        lambda: config(accumulate=9),
        lambda: config(distillation=1.5),
        lambda: config(temperature=0.0),
        lambda: GIR(alignment=-1.0),
        lambda: GIR(alignment_every=0),
        lambda: UniversalPatches(sizes=()),
        lambda: UniversalPatches(share=0.0),
        lambda: PerImagePatches(sizes=(0,)),
        lambda: PerImagePatches(passes=0),
        lambda: PerImagePatches(ascents=-1),
        lambda: PerImagePatches(step_size=0.1),
        lambda: PerImagePatches(momentum=1.0),
        lambda: PerImagePatches(candidates=0),
        lambda: PerImagePatches(keep=1.5),
    ],
)
def test_impossible_options_are_refused(make):
    with pytest.raises(InputError):
        make()
