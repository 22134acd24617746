"""What the baselines have in common: presets, budgets, their configuration in a run, and their command line."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from small_training import WIDTHS, equal, small_trainer

from edgeguard.defences.config import METHODS, HardenConfig, passes_per_batch, preset
from edgeguard.defences.dwq import DWQ
from edgeguard.defences.harden import harden, resume
from edgeguard.defences.job import HardenJob, config_to_json, job_from_json
from edgeguard.defences.parts import (
    GIR,
    Disalignment,
    LocatedPatches,
    PerImagePatches,
    RandomPrecision,
    UniversalPatches,
)
from edgeguard.defences.pbat import PBAT
from edgeguard.defences.qadt_r import QADTR
from edgeguard.defences.qat import QAT
from edgeguard.defences.triqdef import TriQDef
from edgeguard.errors import InputError
from edgeguard.quant.width import Width
from edgeguard.run import Run

OPTIONS = {
    "pbat": {"sizes": (4,), "attack_steps": 1, "moves": "random", "attack_width": Width(4, 4)},
    "dwq": {"epsilon": 4.0},
    "triqdef": {"sizes": (3, 4), "penalty_every": 2, "penalty_images": 4},
}


def plain(method, **changes):
    return HardenConfig(method, WIDTHS, **changes)


def test_each_method_has_its_own_part_and_no_other():
    kinds = {"qat": QAT, "qadt-r": QADTR, "pbat": PBAT, "dwq": DWQ, "triqdef": TriQDef}
    assert set(kinds) == set(METHODS)
    for method, kind in kinds.items():
        subject = small_trainer(method, OPTIONS.get(method, {}))
        assert type(subject.defence) is kind
        config = subject.config
        parts = {name for name in ("universal", "per_image", "pbat", "dwq", "triqdef") if getattr(config, name)}
        assert parts == {"qat": set(), "qadt-r": {"universal", "per_image"}}.get(method, {method})
        assert (config.gir != GIR()) == (method == "qadt-r")


def test_defaults_are_the_papers():
    assert preset(plain("pbat")).pbat == LocatedPatches()
    assert (LocatedPatches().sizes, LocatedPatches().attack_steps, LocatedPatches().step_size) == ((8,), 25, 25.5)
    assert preset(plain("dwq")).dwq == RandomPrecision(8.0, 1.25)
    found = preset(plain("triqdef")).triqdef
    assert found == Disalignment()
    assert (found.patches.sizes, found.patches.share) == ((6,), 0.5)
    assert (found.feature_penalty, found.gradient_penalty) == (0.8, 0.5)


def test_sizes_reach_the_patches_of_the_method():
    assert preset(plain("pbat"), options={"sizes": (5,)}).patch_sizes() == [5]
    config = preset(plain("triqdef"), options={"sizes": (7, 3)})
    assert config.patch_sizes() == [3, 7]
    assert config.triqdef.patches.share == 0.5
    assert preset(plain("dwq")).patch_sizes() is None


@pytest.mark.parametrize(
    ("method", "gir", "options", "message"),
    [
        ("dwq", {}, {"sizes": (5,)}, "method dwq has no sizes"),
        ("dwq", {}, {"moves": "full", "attack_steps": 3}, "method dwq has no attack_steps, moves"),
        ("pbat", {"alignment": 1.0}, {}, "method pbat has no alignment"),
        ("qadt-r", {}, {"epsilon": 3.0}, "method qadt-r has no epsilon"),
        ("qat", {}, {"epsilon": 3.0}, "qat is the undefended baseline: it has no epsilon"),
        ("magic", {}, {}, "unknown method 'magic'; expected one of qadt-r, qat, pbat, dwq, triqdef"),
    ],
)
def test_what_a_method_does_not_have_is_refused(method, gir, options, message):
    with pytest.raises(InputError, match=message):
        preset(plain(method), gir, options)


def test_pbat_attacks_a_width_that_is_trained():
    with pytest.raises(InputError, match="pbat attacks width 3, which is not trained; choose one of 8, 4, 2"):
        preset(plain("pbat"), options={"attack_width": Width(3, 3)})


def test_passes_of_a_batch():
    assert passes_per_batch(preset(plain("qat"))) == 1
    assert passes_per_batch(plain("qadt-r")) == 4
    assert passes_per_batch(plain("qadt-r", per_image=None)) == 1
    assert passes_per_batch(plain("qadt-r", per_image=PerImagePatches(passes=2, share=0.5, ascents=3))) == 6
    assert passes_per_batch(preset(plain("dwq"))) == 2
    assert passes_per_batch(preset(plain("pbat"))) == pytest.approx(1 + 0.5 * 25 * (1 + 4 / 3))
    assert passes_per_batch(preset(plain("pbat"), options={"moves": "random", "attack_steps": 6})) == pytest.approx(5)
    assert passes_per_batch(preset(plain("pbat"), options={"moves": "none", "share": 1.0, "attack_steps": 2})) == 3
    triqdef = preset(plain("triqdef"), options={"penalty_every": 2, "penalty_images": 32})
    assert passes_per_batch(triqdef) == pytest.approx(1 + 4 * 32 / 128 / 2)
    without = dataclasses.replace(triqdef, triqdef=dataclasses.replace(triqdef.triqdef, gradient_penalty=0.0))
    assert passes_per_batch(without) == pytest.approx(1 + 2 * 32 / 128 / 2)
    neither = dataclasses.replace(without, triqdef=dataclasses.replace(without.triqdef, feature_penalty=0.0))
    assert passes_per_batch(neither) == 1


@pytest.mark.parametrize("method", OPTIONS)
def test_a_configuration_survives_a_run(method, tmp_path):
    job = HardenJob("resnet8", "digits", preset(plain(method), options=OPTIONS[method]))
    training = json.loads(json.dumps(config_to_json(job)))
    empty = {"schema": "edgeguard.run/1", "model": {}, "scheme": {}, "data": {}, "versions": {}}
    run = Run.create(tmp_path / "run", {**empty, "training": training})
    assert job_from_json(run) == job
    if method == "pbat":
        assert training["config"]["pbat"]["attack_width"] == "4"
    training["config"][method]["surprise"] = 1
    (tmp_path / "run" / "config.json").write_text(json.dumps({**empty, "training": training}))
    with pytest.raises(InputError, match="cannot be read"):
        job_from_json(Run.load(tmp_path / "run"))


def test_runs_from_before_the_methods_are_read(tmp_path):
    job = HardenJob("resnet8", "digits", preset(plain("qadt-r")))
    training = json.loads(json.dumps(config_to_json(job)))
    for name in ("pbat", "dwq", "triqdef"):
        del training["config"][name]
    empty = {"schema": "edgeguard.run/1", "model": {}, "scheme": {}, "data": {}, "versions": {}}
    assert job_from_json(Run.create(tmp_path / "run", {**empty, "training": training})) == job


@pytest.mark.parametrize("method", OPTIONS)
def test_state_continues_exactly(method):
    whole, first = (small_trainer(method, OPTIONS[method]) for _ in range(2))
    for number in range(3):
        whole.step(np.arange(32) + number)
    for number in range(2):
        first.step(np.arange(32) + number)
    second = small_trainer(method, OPTIONS[method])
    second.model.load_state_dict(first.model.state_dict())
    for mine, theirs in zip(second.optimizers().values(), first.optimizers().values(), strict=True):
        mine.load_state_dict(theirs.state_dict())
    second.defence.load_state(first.defence.state())
    second.step_index = first.step_index
    second.step(np.arange(32) + 2)
    assert equal(whole.model.state_dict(), second.model.state_dict())


class Silent:
    def on_phase(self, name, total):
        pass

    def on_note(self, text):
        pass

    def on_pretrain(self, loss):
        pass

    def on_step(self, result):
        pass

    def on_epoch(self, metrics):
        pass


def test_a_whole_run_and_its_patches_on_disk(tmp_path):
    config = preset(plain("triqdef", epochs=1, max_steps=2, batch_size=32, flip=False, distillation=0.0),
                    options=OPTIONS["triqdef"])  # fmt: skip
    job = HardenJob("resnet8", "digits", config, image_size=16, pretrain_epochs=0, calibration_images=32, eval_limit=20)
    run = harden(dataclasses.replace(job, amp=False, compiled=False), tmp_path / "run", Silent())
    assert run.config["training"]["patch_sizes"] == [3, 4]
    assert len(list((run.path / "patches").iterdir())) == 4
    before = run.checkpoint.read_bytes()
    resume(run.path, Silent(), "cpu")
    assert run.checkpoint.read_bytes() == before
    assert torch.isfinite(run.load_model()(torch.zeros(1, 3, 16, 16))).all()
    large = dataclasses.replace(job, config=preset(plain("pbat", batch_size=32), options={"sizes": (20,)}))
    with pytest.raises(InputError, match="20x20 pixels is larger than the image"):
        harden(large, tmp_path / "other", Silent())
    assert UniversalPatches().share == 0.25
