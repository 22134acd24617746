"""Two real processes, started by torchrun and talking through gloo, against one. Run as a program, this file is their work."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edgeguard.calib import calibrate
from edgeguard.data import load_dataset
from edgeguard.defences.checkpoint import load, save
from edgeguard.defences.config import HardenConfig
from edgeguard.defences.distributed import (
    ALONE,
    VARIABLES,
    Processes,
    data_parallel,
    forbid_local_statistics,
    joined,
)
from edgeguard.defences.harden import choose_device, harden, resume
from edgeguard.defences.job import HardenJob
from edgeguard.defences.parts import GIR, PerImagePatches, UniversalPatches
from edgeguard.defences.trainer import Trainer
from edgeguard.errors import InputError
from edgeguard.models import load_model
from edgeguard.quant.model import Normalization, QuantizedModel, quantize_model
from edgeguard.quant.quantizers import GradientNoise
from edgeguard.quant.scheme import QuantScheme
from edgeguard.quant.view import CompiledView
from edgeguard.quant.width import parse_widths
from edgeguard.run import CHECKPOINT, METRICS, Run

NORMALIZATION = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
STEPS_PER_EPOCH, STEPS = 4, 6
KINDS = ("everything", "parts")
PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 3, 8, 8))).float()


def job(folder: Path) -> HardenJob:
    """Everything on, few and small steps. Widths are low: rounding then seldom moves an activation by a whole step."""
    config = HardenConfig(
        "qadt-r", parse_widths("3,2"), epochs=2, max_steps=STEPS, batch_size=16, lr=1e-4, scale_lr=1e-5,
        universal=UniversalPatches(sizes=(3, 4), members=1, share=0.5, per_step=2),
        per_image=PerImagePatches(sizes=(3, 4), passes=2),
        gir=GIR(backward_noise=0.1, alignment=0.1, alignment_every=2, alignment_images=16, patch_noise=0.5),
    )  # fmt: skip
    data = f"npz:{folder}/{{split}}.npz"
    return HardenJob("resnet8", data, config, pretrain_epochs=1, calibration_images=32, eval_limit=20, device="cpu",
                     amp=False, compiled=False)  # fmt: skip


class Listener:
    """Hears everything, and gets a signal after a certain number of steps."""

    def __init__(self, kind: signal.Signals | None = None, at: int = 0) -> None:
        self.kind, self.at, self.losses, self.epochs = kind, at, [], 0

    def on_phase(self, name: str, total: int) -> None:
        pass

    def on_note(self, text: str) -> None:
        raise AssertionError(text)

    def on_pretrain(self, loss: float) -> None:
        pass

    def on_step(self, result: Any) -> None:
        self.losses.append(result.loss)
        if self.kind is not None and len(self.losses) == self.at:
            os.kill(os.getpid(), self.kind)

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        self.epochs += 1


def small_net() -> QuantizedModel:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    model = quantize_model(net, QuantScheme(parse_widths("3,2")), NORMALIZATION)
    calibrate(model, PIXELS.to(torch.uint8).numpy())
    return model.train()


def gradients(processes: Processes, compiled: bool) -> dict[str, torch.Tensor]:
    """Of one pass of the small net over `PIXELS`, and the statistics that it leaves."""
    model = small_net()
    view = CompiledView(model, compiled, processes.world)
    passed = data_parallel(model) if processes.world > 1 else nn.Identity()
    loss = (view(PIXELS[processes.rows]) * torch.tensor([1.0, -2.0, 3.0])).square().mean()
    passed(loss).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, **{name: value for name, value in model.named_buffers() if "running" in name}}


def speak(processes: Processes) -> dict[str, Any]:
    """What the processes tell each other, and what each makes of it."""
    rank, device = processes.rank, torch.device("cpu")
    rows = np.arange(14, dtype=np.int16).reshape(7, 2)
    net = nn.Linear(2, 1)
    nn.init.constant_(net.weight, rank)
    processes.copied(net, device)
    return {
        "any": [processes.any(rank == 1), processes.any(False)],
        "mean": processes.mean([rank + 1.0, float("nan") if rank else 5.0]),
        "averaged": processes.averaged(torch.tensor([2.0 * rank, 4.0])).tolist(),
        "gathered": bool(np.array_equal(processes.gathered(rows[processes.rows]), rows)),
        "copied": float(net.weight[0, 0].detach()),
        "rows": list(range(5)[processes.rows]),
    }


def diverge(processes: Processes, folder: Path) -> str:
    """The loss of the second process alone is NaN."""
    train, config = load_dataset("digits", "train", 16), job(folder).config
    trainer = Trainer(small_net(), train, dataclasses.replace(config, gir=GIR()), torch.device("cpu"), None, processes)
    try:
        trainer.descend(torch.tensor(float("nan") if processes.rank else 1.0, requires_grad=True))
    except InputError as exc:
        return str(exc)
    return "went on"


def trainer(folder: Path, kind: str, processes: Processes) -> Trainer:
    """From a net of random weights: everything on, or nothing but batches in two parts."""
    train, net, config = load_dataset("digits", "train", 16), load_model("resnet8"), job(folder).config
    if kind == "parts":
        config = dataclasses.replace(config, method="qat", accumulate=2, universal=None, per_image=None, gir=GIR())
    model = quantize_model(net.module, QuantScheme(config.widths), Normalization(net.mean, net.std))
    calibrate(model, train.images(np.arange(32)))
    return Trainer(model, train, config, torch.device("cpu"), net, processes)


def step(subject: Trainer) -> None:
    subject.step(np.arange(16) + 16 * subject.step_index)


def step_by_step(folder: Path, kind: str, processes: Processes) -> None:
    """Checkpoints of two processes before and after every step."""
    subject = trainer(folder, kind, processes)
    for number in range(STEPS + 1):
        if number:
            step(subject)
        (folder / f"{kind}-{number}").mkdir(exist_ok=True)
        save(Run(folder / f"{kind}-{number}", {}), subject)


def work(folder: Path) -> None:
    torch.set_num_threads(1)
    with joined() as processes:
        report: dict[str, Any] = {"speak": speak(processes), "diverge": diverge(processes, folder)}
        save_file(gradients(processes, False), folder / f"gradients-{processes.rank}.safetensors")
        for kind in KINDS:
            step_by_step(folder, kind, processes)
        whole = Listener()
        harden(job(folder), folder / "whole", whole, "", processes)
        report.update(losses=whole.losses, epochs=whole.epochs)
        try:
            stopped = Listener(signal.SIGINT if processes.rank else None, 2)
            harden(job(folder), folder / "stopped", stopped, "", processes)
        except KeyboardInterrupt:
            report["stopped"] = len(stopped.losses)
        (folder / f"report-{processes.rank}.json").write_text(json.dumps(report))
        killed = Listener(signal.SIGKILL if processes.rank else None, STEPS_PER_EPOCH + 1)
        harden(job(folder), folder / "killed", killed, "", processes)


def compiled(folder: Path) -> None:
    """As in `gradients`, compiled."""
    torch.set_num_threads(1)
    with joined() as processes:
        save_file(gradients(processes, True), folder / f"compiled-{processes.rank}.safetensors")


def leave(folder: Path) -> None:
    """Train a step together, and write which threads are left when the others are no longer met."""
    with joined() as processes:
        step(trainer(folder, "everything", processes))
        during = threads()
    after = threads()
    (folder / f"threads-{processes.rank}.json").write_text(json.dumps([during, after]))


def threads() -> list[str]:
    """The names of this process's threads, sorted."""
    return sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))


PROGRAMS = {"work": work, "compiled": compiled, "leave": leave}


def torchrun(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds what two processes left: a whole run, one killed in its second epoch, one interrupted; and one process's."""
    folder = tmp_path_factory.mktemp("two")
    for split, count in (("train", 16 * STEPS_PER_EPOCH), ("test", 20)):
        chosen = load_dataset("digits", split, 16).subset(np.arange(count))
        images = chosen.images(np.arange(count)).transpose(0, 2, 3, 1)
        np.savez(folder / f"{split}.npz", images=images, labels=chosen.labels)
    result = torchrun(__file__, "work", str(folder), cwd=folder)
    assert result.returncode != 0
    assert "Signal 9 (SIGKILL)" in result.stderr, result.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in both processes: pretraining adds up in another order with more
    try:
        harden(job(folder), folder / "one", Listener())
    finally:
        torch.set_num_threads(threads)
    return folder


def reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"report-{rank}.json").read_text()) for rank in range(2)]


def differences(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> dict[str, float]:
    assert first.keys() == second.keys()
    return {name: float((first[name].double() - second[name].double()).abs().max()) for name in first}


def weights(run: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's parameters."""
    return {
        name: value for name, value in load_file(run / CHECKPOINT).items()
        if name.startswith("model.") and "running" not in name and "tracked" not in name
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_checkpoint_of_one(folder: Path, kind: str) -> None:
    """Each step from the same checkpoint. In some, rounding moves an activation by a step of its quantizer or a gradient
    to the other side of zero, which shows as in two runs of one process that begin a rounding error apart; not in most.
    """
    far, moved, statistics, patches = [], [], [], []
    for number in range(STEPS):
        subject = trainer(folder, kind, ALONE)
        load(Run(folder / f"{kind}-{number}", {}), subject)
        step(subject)
        (folder / "alone").mkdir(exist_ok=True)
        save(Run(folder / "alone", {}), subject)
        before, after, alone = (
            weights(folder / name) for name in (f"{kind}-{number}", f"{kind}-{number + 1}", "alone")
        )
        far.append(max(differences(after, alone).values()))
        moved.append(max(differences(after, before).values()))
        both = [load_file(folder / name / CHECKPOINT) for name in (f"{kind}-{number + 1}", "alone")]
        patches.append(
            all(torch.equal(both[0][name], both[1][name]) for name in both[0] if name.startswith("defence."))
        )
        statistics.append(max(value for name, value in differences(*both).items() if "running" in name))
    assert sorted(far)[STEPS // 2] < 1e-6, far
    assert sorted(statistics)[STEPS // 2] < 1e-4, statistics
    assert sum(patches) > STEPS // 2, patches
    assert sorted(moved)[STEPS // 2] > 2e-5, moved


def test_a_whole_run_begins_with_the_same_bytes_and_ends_close_by(folder: Path) -> None:
    one, two = (load_file(folder / name / CHECKPOINT) for name in ("one", "whole"))
    assert one.keys() == two.keys()
    same = [name for name in one if name.startswith("teacher.") or name.endswith(("exponent", "tracked"))]
    assert len(same) > 20
    assert all(torch.equal(one[name], two[name]) for name in same)
    assert max(differences(weights(folder / "one"), weights(folder / "whole")).values()) < 5e-4


def test_only_the_first_process_measures_and_both_hear_of_the_whole_batch(folder: Path) -> None:
    first, second = reports(folder)
    assert (first["epochs"], second["epochs"]) == (2, 0)
    assert first["losses"] == second["losses"]
    assert len(first["losses"]) == STEPS
    one, two = (json.loads((folder / name / METRICS).read_text().splitlines()[0]) for name in ("one", "whole"))
    assert one["loss"] == pytest.approx(two["loss"], rel=0.1)
    assert one["widths"].keys() == two["widths"].keys()


def test_an_interrupt_of_one_process_stops_both_after_the_same_step(folder: Path) -> None:
    assert [report["stopped"] for report in reports(folder)] == [2, 2]
    assert Run.load(folder / "stopped").read_checkpoint()[1]["step"] == 2


def test_a_loss_that_is_not_finite_in_one_process_stops_both(folder: Path) -> None:
    assert all("no longer finite at step 0" in report["diverge"] for report in reports(folder))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_no_thread_of_the_group_outlives_it(tmp_path: Path) -> None:
    result = torchrun(__file__, "leave", str(tmp_path), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        during, after = json.loads((tmp_path / f"threads-{rank}.json").read_text())
        assert any("gloo" in name for name in during)
        assert not [name for name in after if "gloo" in name]


def test_what_processes_tell_each_other(folder: Path) -> None:
    for rank, report in enumerate(reports(folder)):
        assert report["speak"] == {
            "any": [True, False], "mean": [1.5, 5.0], "averaged": [1.0, 4.0], "gathered": True, "copied": 0.0,
            "rows": [0, 2, 4] if rank == 0 else [1, 3],
        }  # fmt: skip


def test_gradients_and_statistics_are_those_of_the_whole_batch(folder: Path) -> None:
    one = gradients(ALONE, False)
    for rank in range(2):
        assert max(differences(one, load_file(folder / f"gradients-{rank}.safetensors")).values()) < 1e-5


def test_resuming_after_sigkill_of_one_process_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    assert Run.load(folder / "killed").read_checkpoint()[1]["step"] == STEPS_PER_EPOCH
    shutil.copytree(folder / "killed", tmp_path / "alone")
    arguments = ("-m", "edgeguard", "harden", "--resume", str(folder / "killed"), "--device", "cpu", "--json")
    result = torchrun(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["metrics"]["step"] == STEPS
    for name in (CHECKPOINT, METRICS):
        assert (folder / "killed" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    # one process ends what two began
    resume(tmp_path / "alone", Listener(), "cpu")
    assert Run.load(tmp_path / "alone").read_checkpoint()[1]["step"] == STEPS
    assert max(differences(weights(tmp_path / "alone"), weights(folder / "whole")).values()) < 5e-4


@pytest.mark.slow
def test_the_compiled_view_shares_its_statistics_too(tmp_path: Path) -> None:
    result = torchrun(__file__, "compiled", str(tmp_path), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    one = gradients(ALONE, False)
    for rank in range(2):
        assert max(differences(one, load_file(tmp_path / f"compiled-{rank}.safetensors")).values()) < 1e-5


def test_noise_is_the_same_for_any_number_of_processes() -> None:
    def draw(rank: int, world: int) -> torch.Tensor:
        noise = GradientNoise()
        noise.sigma, noise.rank, noise.world = 0.5, rank, world
        noise.generator.manual_seed(3)
        drawn = noise.draw(torch.zeros(6 // world, 4, 2, 2))
        assert drawn is not None
        return drawn

    parts = [draw(rank, 2) for rank in range(2)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), draw(0, 1))


def test_a_batch_must_be_dealt_out_evenly() -> None:
    Processes(0, 2).check(16, 4)
    ALONE.check(17, 4)
    with pytest.raises(InputError, match=r"15 images cannot be dealt out evenly to 2 processes; .* multiple of 2"):
        Processes(0, 2).check(15, 1)
    with pytest.raises(InputError, match=r"2 processes x 3 parts; .* multiple of 6"):
        Processes(1, 2).check(16, 3)


def test_statistics_of_one_process_alone_are_refused() -> None:
    model = small_net()
    model(PIXELS)
    forbid_local_statistics(model)
    model.eval()(PIXELS)
    with pytest.raises(InputError, match="statistics that are not shared"):
        model.train()(PIXELS)


def test_one_gpu_is_not_enough_for_two_processes() -> None:
    assert choose_device("cpu", Processes(1, 2, 1)) == torch.device("cpu")
    with pytest.raises(InputError, match="--device cuda:0 names one GPU for 2 processes; use --device cuda"):
        choose_device("cuda:0", Processes(1, 2, 1))


def test_the_environment_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with joined() as processes:
        assert processes == ALONE
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="as torchrun sets them"), joined():
        pass
    monkeypatch.setenv("WORLD_SIZE", "two")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(InputError, match="'two'"), joined():
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined() as processes:
        assert processes == ALONE
        assert not torch.distributed.is_initialized()


def test_the_teacher_and_the_net_are_untouched_by_one_process() -> None:
    net = load_model("resnet8").module
    before = [p.clone() for p in net.parameters()]
    ALONE.copied(net, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](Path(sys.argv[2]))
