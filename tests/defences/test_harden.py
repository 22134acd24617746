import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeguard import files
from edgeguard.defences.config import HardenConfig, preset
from edgeguard.defences.harden import choose_device, harden, resume
from edgeguard.defences.job import HardenJob, config_to_json, job_from_json
from edgeguard.defences.parts import PerImagePatches, UniversalPatches
from edgeguard.defences.speed import has_bfloat16_units
from edgeguard.errors import InputError, MissingDependency
from edgeguard.patch import Patch
from edgeguard.quant.view import compiler_missing
from edgeguard.quant.width import parse_widths
from edgeguard.run import CHECKPOINT, CONFIG, METRICS, Run

ARGUMENTS = [
    "--model", "resnet8", "--data", "digits", "--image-size", "16", "--bits", "8,2", "--epochs", "3", "--batch-size", "128",
    "--patch-sizes", "3,4", "--passes", "1", "--no-amp", "--no-compile", "--pretrain-epochs", "1", "--eval-limit", "60",
    "--threads", "1", "--calibration-images", "32",
]  # fmt: skip


class Silent:
    """Hears everything; after step `interrupt_at` it presses Ctrl-C `times` times."""

    def __init__(self, interrupt_at=None, times=1):
        self.epochs, self.notes, self.phases, self.steps = [], [], [], 0
        self.interrupt_at, self.times = interrupt_at, times

    def on_phase(self, name, total):
        self.phases.append((name, total))

    def on_note(self, text):
        self.notes.append(text)

    def on_pretrain(self, loss):
        pass

    def on_step(self, result):
        self.steps += 1
        if self.steps == self.interrupt_at:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)

    def on_epoch(self, metrics):
        self.epochs.append(metrics)


def job(**changes):
    config = preset(HardenConfig(
        "qadt-r", parse_widths("8,2"), epochs=2, batch_size=128, flip=False,
        universal=UniversalPatches(sizes=(3, 4), members=1), per_image=PerImagePatches(sizes=(3, 5), passes=1),
    ))  # fmt: skip
    settings = {"config": config, "image_size": 16, "pretrain_epochs": 1, "calibration_images": 32, "eval_limit": 60,
                "amp": False, "compiled": False, "cuda_graphs": False}  # fmt: skip
    return HardenJob("resnet8", "digits", **{**settings, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    listener = Silent()
    run = harden(job(), tmp_path_factory.mktemp("run") / "run", listener, "edgeguard harden")
    return run, listener


def test_a_run_holds_what_is_needed_to_judge_and_repeat_it(finished):
    run, listener = finished
    assert run.config["command"] == "edgeguard harden"
    assert {"torch", "brevitas", "numpy", "python", "edgeguard"} <= run.config["versions"].keys()
    assert job_from_json(run) == job()
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert lines == listener.epochs
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[-1]["widths"].keys() == {"8", "2"}
    assert lines[-1]["widths"]["2"]["asr"].keys() == {"3x3", "4x4"}
    patches = [Patch.load(path) for path in sorted((run.path / "patches").iterdir())]
    assert [patch.size for patch in patches] == [(3, 3), (4, 4)]
    assert run.config["training"]["patch_sizes"] == [3, 4, 5]
    assert listener.phases == [("pretrain", 11), ("harden", 22)]
    assert listener.notes == []
    assert listener.steps == 22


def test_the_checkpoint_gives_back_the_model(finished):
    run, _ = finished
    model = run.load_model()
    assert not model.training
    stored = load_file(run.checkpoint)
    assert torch.equal(stored["model.body.conv1.weight"], model.body.get_submodule("conv1").weight)
    with torch.no_grad():
        assert torch.isfinite(model(torch.zeros(1, 3, 16, 16))).all()


def test_the_teacher_is_kept_in_the_checkpoint(finished, tmp_path):
    run, _ = finished
    teacher = {n.removeprefix("teacher."): v for n, v in load_file(run.checkpoint).items() if n.startswith("teacher.")}
    untrained = run.float_model().module.state_dict()
    assert teacher.keys() == untrained.keys()
    assert not torch.equal(teacher["conv1.weight"], untrained["conv1.weight"])  # it was pretrained
    subject = harden(without_distillation(max_steps=1), tmp_path / "run", Silent())
    assert not any(name.startswith("teacher.") for name in load_file(subject.checkpoint))


def test_a_run_begins_with_the_model_of_another(finished, tmp_path):
    first, _ = finished
    still = without_distillation(max_steps=1, lr=1e-30, scale_lr=1e-30, weight_decay=0.0)
    run = harden(dataclasses.replace(still, start=first.path), tmp_path / "run", Silent())
    before, after = load_file(first.checkpoint), load_file(run.checkpoint)
    learned = [name for name in before if name.startswith("model.") and "running" not in name and "tracked" not in name]
    assert learned
    assert all(torch.allclose(before[name].float(), after[name].float(), atol=1e-12) for name in learned)
    assert run.config["training"]["start_sha256"] == files.sha256(first.checkpoint)
    assert job_from_json(run).start == first.path
    resume(run.path, Silent(), "cpu")


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"model": "resnet20"}, "model"), ({"widths": parse_widths("8,4")}, "widths"), ({"signed_activations": True}, "signed")],
)
def test_another_model_is_no_start(finished, tmp_path, changes, said):
    base = without_distillation()
    if "widths" in changes:
        changes = {"config": dataclasses.replace(base.config, **changes)}
    with pytest.raises(InputError, match=f"--start .*{said}"):
        harden(dataclasses.replace(base, start=finished[0].path, **changes), tmp_path / "run", Silent())
    assert not (tmp_path / "run").exists()


def without_distillation(**changes):
    base = job(pretrain_epochs=0, eval_limit=10)
    return dataclasses.replace(
        base, config=dataclasses.replace(base.config, distillation=0.0, per_image=None, **changes)
    )


def test_the_first_interrupt_ends_after_the_batch_and_resuming_gives_the_same_bytes(finished, tmp_path):
    run, _ = finished
    before, listener = signal.getsignal(signal.SIGINT), Silent(interrupt_at=15)
    with pytest.raises(KeyboardInterrupt):
        harden(job(), tmp_path / "run", listener, "edgeguard harden")
    assert listener.steps == 15
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint_step(tmp_path / "run") == 15
    resumed = Silent()
    stopped = resume(tmp_path / "run", resumed)
    assert resumed.phases == [("harden", 7)]
    assert stopped.checkpoint.read_bytes() == run.checkpoint.read_bytes()
    assert (stopped.path / METRICS).read_bytes() == (run.path / METRICS).read_bytes()
    for path in (run.path / "patches").iterdir():
        assert (stopped.path / "patches" / path.name).read_bytes() == path.read_bytes()


def test_a_second_interrupt_does_not_wait(tmp_path):
    listener = Silent(interrupt_at=3, times=2)
    with pytest.raises(KeyboardInterrupt):
        harden(without_distillation(), tmp_path / "run", listener)
    assert listener.steps == 3
    assert checkpoint_step(tmp_path / "run") == 0


def test_outside_the_main_thread_runs_end_as_well(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(harden, without_distillation(max_steps=2), tmp_path / "run", Silent()).result()
    assert checkpoint_step(run.path) == 2
    assert signal.getsignal(signal.SIGINT) is before


NET = """
from torch import nn
def tiny(num_classes=10):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                         nn.Linear(8 * 8 * 8, num_classes))
"""


@pytest.mark.skipif(compiler_missing() is not None, reason=str(compiler_missing()))
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
def test_a_compiled_run_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    (tmp_path / "tiny_net_of_a_test.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    compiled = dataclasses.replace(job(compiled=True), model="tiny_net_of_a_test:tiny")
    whole, plain = (
        harden(j, tmp_path / n, Silent())
        for j, n in ((compiled, "whole"), (dataclasses.replace(compiled, compiled=False), "plain"))
    )
    assert whole.config["training"]["config"]["compiled"] is True
    with pytest.raises(KeyboardInterrupt):
        harden(compiled, tmp_path / "stopped", Silent(interrupt_at=15))
    resume(tmp_path / "stopped", Silent(), trust_code=True)
    assert (tmp_path / "stopped" / CHECKPOINT).read_bytes() == whole.checkpoint.read_bytes()
    tensors, others = load_file(whole.checkpoint), load_file(plain.checkpoint)
    assert any(not torch.equal(tensors[name], others[name]) for name in tensors)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match=r"was begun compiled, and no C\+\+ compiler"):
        resume(tmp_path / "stopped", Silent(), trust_code=True)


def test_what_was_decided_for_the_user_is_said_and_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    base = without_distillation(max_steps=1)
    longer = dataclasses.replace(
        base, amp=None, compiled=None, config=dataclasses.replace(base.config, epochs=10**6, max_steps=0)
    )
    listener = Silent(interrupt_at=1)
    with pytest.raises(KeyboardInterrupt):
        harden(longer, tmp_path / "run", listener)
    config = Run.load(tmp_path / "run").config["training"]
    assert (config["compiled"], config["config"]["compiled"]) == (False, False)
    assert config["amp"] is config["config"]["amp"] is has_bfloat16_units(torch.device("cpu"))
    assert [note.split(":")[0] for note in listener.notes] == [
        "training is not compiled, and slower", *["bfloat16 outside the quantizers"] * config["amp"]
    ]  # fmt: skip


@pytest.mark.parametrize(("at", "lines"), [(11, 1), (22, 2)])
def test_an_interrupt_after_the_last_batch_of_an_epoch_waits_until_it_is_measured(finished, tmp_path, at, lines):
    run, out = finished[0], tmp_path / "run"
    with pytest.raises(KeyboardInterrupt) if at < 22 else contextlib.nullcontext():
        harden(job(), out, Silent(interrupt_at=at), "edgeguard harden")
    assert len((out / METRICS).read_text().splitlines()) == lines
    resume(out, Silent())
    assert (out / CHECKPOINT).read_bytes() == run.checkpoint.read_bytes()
    assert (out / METRICS).read_bytes() == (run.path / METRICS).read_bytes()


def begun(run: Run, folder: Path, *names: str) -> Path:
    """A copy of some files of a run."""
    folder.mkdir()
    for name in (CONFIG, *names):
        (folder / name).write_bytes((run.path / name).read_bytes())
    return folder


def test_a_run_without_a_checkpoint_begins_again(finished, tmp_path):
    run, listener = finished[0], Silent()
    again = resume(begun(run, tmp_path / "run"), listener)
    assert listener.phases == finished[1].phases
    assert "it begins again" in listener.notes[0]
    for name in (CONFIG, CHECKPOINT, METRICS):
        assert (again.path / name).read_bytes() == (run.path / name).read_bytes()
    with pytest.raises(InputError, match=r"checkpoint; wait for it, or go on with: edgeguard harden --resume"):
        Run.load(begun(run, tmp_path / "other")).load_model()


def test_a_run_does_not_begin_again_with_other_weights(finished, tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(1)}, weights)
    path = begun(finished[0], tmp_path / "run")
    config = json.loads((path / CONFIG).read_text())
    config["training"]["weights"], config["model"]["weights_sha256"] = str(weights), "0" * 64
    (path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"the file of float weights, .*weights.safetensors, is not what the run"):
        resume(path, Silent())


def test_a_run_does_not_begin_again_with_another_model(finished, tmp_path):
    path = begun(finished[0], tmp_path / "run")
    config = json.loads((path / CONFIG).read_text())
    config["training"]["model"] = "nowhere:factory"
    (path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"the model, nowhere:factory, is not what the run"):
        resume(path, Silent())


def test_metrics_that_are_damaged_or_gone(finished, tmp_path):
    path = begun(finished[0], tmp_path / "run", CHECKPOINT)
    with pytest.raises(InputError, match=r"trained to its end, and metrics.jsonl is not there"):
        resume(path, Silent())
    (path / METRICS).write_text("{")
    with pytest.raises(InputError, match=r"metrics.jsonl is damaged .*delete it"):
        resume(path, Silent())


def test_nothing_is_overwritten(finished):
    run, _ = finished
    with pytest.raises(InputError, match=r"exists already, a run; continue it with --resume"):
        harden(job(), run.path, Silent())
    with pytest.raises(InputError, match="exists already; name a new folder"):
        harden(job(), run.path / "patches", Silent())


def test_resuming_a_finished_run_changes_nothing(finished):
    run, _ = finished
    before = run.checkpoint.read_bytes()
    resume(run.path, Silent())
    assert run.checkpoint.read_bytes() == before


def corrupt(run: Run, tmp_path: Path, change) -> Run:
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("config.json", CHECKPOINT):
        (folder / name).write_bytes((run.path / name).read_bytes())
    change(folder)
    return Run.load(folder)


def test_damaged_checkpoints_are_one_sentence(finished, tmp_path):
    run, _ = finished
    stored = load_file(run.checkpoint)

    def rewrite(**tensors):
        return lambda folder: save_file({**stored, **tensors}, folder / CHECKPOINT, {"edgeguard": "{}"})

    nan = stored["model.body.conv1.weight"].clone()
    nan[0] = float("nan")
    cases = {
        "truncated or not a checkpoint": lambda folder: (folder / CHECKPOINT).write_bytes(
            run.checkpoint.read_bytes()[:999]
        ),
        "does not exist": lambda folder: (folder / CHECKPOINT).unlink(),
        "conv1.weight holds NaN": rewrite(**{"model.body.conv1.weight": nan}),
        "another architecture.*conv1.weight": rewrite(**{"model.body.conv1.weight": nan[:3]}),
        "another architecture.*surplus": rewrite(**{"model.surplus": nan}),
    }
    for number, (message, change) in enumerate(cases.items()):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(InputError, match=message):
            corrupt(run, tmp_path / str(number), change).load_model()


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(InputError, match="is not a run"):
        Run.load(tmp_path)
    (tmp_path / "config.json").write_text('{"schema": "edgeguard.run/99"}')
    with pytest.raises(InputError, match="not of schema"):
        Run.load(tmp_path)
    (tmp_path / "config.json").write_text('{"schema": "edgeguard.run/1"}')
    with pytest.raises(InputError, match="'model' is missing"):
        Run.load(tmp_path)


def test_impossible_jobs_leave_nothing_behind(tmp_path, monkeypatch):
    base = job()
    too_large = "patch of 40x40 pixels is larger than the image, 16x16"
    universal = dataclasses.replace(base.config, universal=UniversalPatches(sizes=(40,)))
    per_image = dataclasses.replace(base.config, per_image=PerImagePatches(sizes=(40,)))
    big = dataclasses.replace(base.config, batch_size=100_000)
    for broken, message in [
        (dataclasses.replace(base, config=universal), too_large),
        (dataclasses.replace(base, config=per_image), too_large),
        (dataclasses.replace(base, config=big), "fewer than one batch"),
        (dataclasses.replace(base, data="npz:missing.npz"), "missing.npz does not exist"),
        (dataclasses.replace(base, model="resnet7"), "resnet7"),
    ]:
        with pytest.raises(InputError, match=message):
            harden(broken, tmp_path / "out", Silent())
        assert not list(tmp_path.iterdir())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match=r"--compile: no C\+\+ compiler"):
        harden(job(compiled=True), tmp_path / "out", Silent())
    assert not list(tmp_path.iterdir())


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="unknown device 'tpu9'"):
        choose_device("tpu9")
    if not torch.cuda.is_available():
        assert choose_device("auto") == torch.device("cpu")
        with pytest.raises(MissingDependency, match="cuda is not available"):
            choose_device("cuda")


def test_the_configuration_survives_json():
    document = json.loads(json.dumps(config_to_json(job(weights=Path("w.safetensors")))))
    assert document["weights"] == "w.safetensors"
    assert document["config"]["widths"] == ["8", "2"]


def start(out: Path) -> "subprocess.Popen[bytes]":
    code = "from edgeguard.cli import main; main()"
    command = [sys.executable, "-c", code, "harden", *ARGUMENTS, "--out", str(out)]
    return subprocess.Popen(command, cwd=out.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def checkpoint_step(out: Path) -> int:
    try:
        return int(Run.load(out).read_checkpoint()[1]["step"])
    except InputError:
        return -1


@pytest.mark.slow
def test_sigkill_in_mid_epoch_and_resume_give_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(whole)
    victim = start(killed)
    deadline = time.monotonic() + 300
    while checkpoint_step(killed) < 11 and time.monotonic() < deadline:  # 11 steps are one epoch
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(victim.pid, signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert 11 <= checkpoint_step(killed) < 33
    assert process.wait() == 0
    code = "from edgeguard.cli import main; main()"
    command = [sys.executable, "-c", code, "harden", "--resume", str(killed), "--threads", "1"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    assert (killed / CHECKPOINT).read_bytes() == (whole / CHECKPOINT).read_bytes()
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert np.array_equal(*(np.load(next((run / "patches").glob("3x3-0.npz")))["pixels"] for run in (whole, killed)))


@pytest.mark.slow
def test_ctrl_c_writes_a_checkpoint_and_says_how_to_continue(tmp_path):
    out = tmp_path / "run"
    # a shell that starts the tests in the background makes its children ignore SIGINT
    restore = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{restore}; from edgeguard.cli import main; main()"
    command = [sys.executable, "-c", code, "harden", *ARGUMENTS, "--epochs", "500", "--out", str(out)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while checkpoint_step(out) < 11 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"edgeguard harden --resume {out}" in errors
    assert "Traceback" not in errors
    assert checkpoint_step(out) >= 11
