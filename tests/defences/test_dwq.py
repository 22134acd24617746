import collections

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_training import WIDTHS, batch_of, equal, small_trainer, train

from edgeguard.defences.attacking import attacked
from edgeguard.defences.parts import RandomPrecision
from edgeguard.errors import InputError
from edgeguard.quant.width import Width


def trainer(options=None, **settings):
    return small_trainer("dwq", options or {}, **settings)


def test_perturbed_images_lie_in_the_ball_and_raise_the_loss():
    subject = trainer()
    batch, width = batch_of(subject), Width(8, 8)
    subject.model.train()
    pixels = subject.defence.perturbed(batch, width)
    change = (pixels - batch.pixels).abs()
    assert float(change.max()) == pytest.approx(8.0, abs=1e-4)
    assert float(change.mean()) > 3.0
    assert pixels.min() >= 0
    assert pixels.max() <= 255

    def loss(images):
        with attacked(subject.model), torch.no_grad():
            return float(F.cross_entropy(subject.forward(images, width), batch.labels))

    noise = batch.pixels + 8 * torch.randn(batch.pixels.shape, generator=torch.Generator().manual_seed(0)).sign()
    assert loss(pixels) > loss(batch.pixels)
    assert loss(pixels) > loss(noise.clamp(0, 255))


def test_every_process_perturbs_its_rows():
    subject = trainer()
    subject.model.train()
    whole = subject.defence.perturbed(batch_of(subject), Width(8, 8))
    for rank in range(2):
        part = subject.defence.perturbed(batch_of(subject, rows=slice(rank, None, 2)), Width(8, 8))
        assert (torch.isclose(part, whole[rank::2], atol=1e-3).float().mean()) > 0.99


def test_attack_and_update_share_a_width_and_all_widths_are_drawn_alike(monkeypatch):
    subject = trainer()
    pairs, forward = [], subject.forward

    def spy(pixels, width):
        pairs.append(width)
        return forward(pixels[:2], width)

    subject.model.train()
    monkeypatch.setattr(subject, "forward", spy)
    monkeypatch.setattr(subject, "descend", lambda loss: None)
    for step in range(150):
        batch = batch_of(subject, 2, step)
        subject.defence.train(batch)
    assert pairs[::2] == pairs[1::2]
    counts = collections.Counter(pairs[::2])
    assert set(counts) == set(WIDTHS)
    assert min(counts.values()) > 35, "uniform, where 1 / bits would give the highest width 21 of 150"


def test_the_attack_leaves_no_trace_in_the_model():
    subject = trainer()
    subject.model.train()
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    subject.defence.perturbed(batch_of(subject), Width(2, 2))
    assert equal(before, subject.model.state_dict())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in subject.model.parameters())
    assert subject.model.body.get_submodule("bn1").norms[2].training


def test_a_step_reports_accuracy_under_its_attack_alone():
    result = trainer().step(np.arange(32))
    assert np.isnan(result.clean_accuracy)
    assert 0 <= result.patched_accuracy <= 1


@pytest.mark.parametrize("options", [{"epsilon": 2.0}, {"step": 0.5}], ids=str)
def test_every_option_changes_the_result(options):
    assert not equal(train(trainer(), 2), train(trainer(options), 2))


def test_same_seed_same_bytes():
    subject = trainer()
    assert equal(train(subject, 3), train(trainer(), 3))
    assert subject.defence.state() == {}
    assert subject.defence.patches() == []


def test_training_lowers_the_loss_under_its_attack():
    subject = trainer(epochs=6, distillation=0.0, lr=0.1)
    found = []
    while not subject.finished:
        subject.run_epoch(lambda result: found.append(result.loss))
    assert np.mean(found[-8:]) < 0.8 * np.mean(found[:8])


@pytest.mark.parametrize(
    "change", [{"epsilon": 0.0}, {"epsilon": 300.0}, {"step": 0.0}, {"step": float("inf")}], ids=str
)
def test_impossible_options_are_refused(change):
    with pytest.raises(InputError, match="dwq needs 0 < epsilon <= 255"):
        RandomPrecision(**change)


def test_the_published_widths_are_trained():
    bits = ",".join(str(width) for width in range(16, 3, -1))
    subject = trainer(bits=bits)
    assert len(subject.config.widths) == 13
    pixels = batch_of(subject, 8).pixels
    subject.model.eval()
    with torch.no_grad():
        logits = {}
        for width in (Width(16, 16), Width(12, 12), Width(8, 8), Width(4, 4)):
            with subject.model.at(width):
                logits[width.weight] = subject.model(pixels)
    apart = [float((logits[16] - logits[bits]).abs().mean()) for bits in (12, 8, 4)]
    assert 0 < apart[0] < apart[1] < apart[2]
    drawn = {subject.step(np.arange(8) + number).width.weight for number in range(12)}
    assert max(drawn) > 8
