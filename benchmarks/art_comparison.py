"""A-QAPA against `AdversarialPatchPyTorch` of the Adversarial Robustness Toolbox (ART): ASR at equal cost, and speed.

Same float32 net, same crafting images, same square of pixels at random places, same number of steps and images, one
thread. Gradients are counted by the net itself, and both attacks must have taken them of equally many images. The
patches are rounded to uint8 and judged by `edgeguard.verify.harness` on the same test images at the same places.

ART runs untargeted with `scale_min = scale_max = size / 32` and no rotation, which pastes size x size pixels (checked).
Its other settings are searched one after the other, by the ASR on the *judged* images, which favours ART.

Two nets are timed: as published, which is what one hands to a library, and prepared (batch norms folded, channels last,
no gradients of weights), which is how A-QAPA runs here. ART is timed on both; its patches come from the prepared one,
since both compute the same function. Turns are interleaved, so that a busy machine slows all of them alike.

    pip install adversarial-robustness-toolbox
    python benchmarks/art_comparison.py --weights resnet20-cifar10.safetensors --data 'npz:cifar10-{split}.npz' \\
        --out benchmarks/results/art_comparison.json
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from edgeguard.attacks.api import Victim
from edgeguard.attacks.aqapa import AQAPA
from edgeguard.data import load_splits
from edgeguard.defences.job import versions
from edgeguard.models import FloatModel, load_model
from edgeguard.patch import square
from edgeguard.statistics import wilson
from edgeguard.targets import cpu_flags
from edgeguard.verify.harness import Subject, judge_at, random_places

TUNED_SIZE = 8
PROBE_STEPS = 10
"""ART's steps on the published net, where only its speed is of interest: all of its steps are alike."""
BARE = 5
"""Passes of the bare net in a turn, each forward and backward."""


@dataclass(frozen=True)
class ArtSettings:
    """What can be chosen for ART. Not all are options of ART's constructor.

    random_start: uniform pixels instead of grey (`reset_patch`). whole_pixels: places on the pixel grid, through ART's
    mask of allowed centres; without it places are real numbers and the patch's pixels are interpolated. updates: of the
    patch in a step, each on so many times fewer images. target: a class; None is untargeted. cleared: not in ART,
    which adds every step's gradient to the earlier ones: the patch's gradient is dropped before each step.
    """

    optimizer: str = "Adam"
    learning_rate: float = 5.0
    random_start: bool = False
    whole_pixels: bool = False
    updates: int = 1
    target: int | None = None
    cleared: bool = False


CHANGES: tuple[dict[str, Any], ...] = (
    {"learning_rate": 20.0}, {"learning_rate": 60.0},
    {"optimizer": "pgd", "learning_rate": 5.0}, {"optimizer": "pgd", "learning_rate": 20.0},
    {"random_start": True}, {"whole_pixels": True}, {"updates": 2}, {"target": 2},
)  # fmt: skip
"""Tried one after the other; what helps is kept. Target 2 is the bird."""


class Net(nn.Module):
    """Grey levels (N, 3, H, W) float32 to logits. shown: images that gradients were taken of."""

    def __init__(self, model: FloatModel, prepared: bool, bfloat16: bool = False) -> None:
        super().__init__()
        self.body, self.prepared, self.bfloat16, self.shown = copy.deepcopy(model.module), prepared, bfloat16, 0
        std = torch.tensor(model.std)[:, None, None]
        self.register_buffer("gain", 1 / (255 * std))
        self.register_buffer("bias", -torch.tensor(model.mean)[:, None, None] / std)
        if prepared:
            fold(self.body)
            self.body.to(memory_format=torch.channels_last).requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.shown += len(images) if images.requires_grad else 0
        images = images * self.gain + self.bias
        if self.prepared:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            logits: torch.Tensor = self.body(images)
        return logits.float()


def fold(body: nn.Module) -> None:
    """Put every batch norm `bnK` into the convolution `convK` beside it."""
    for module in body.modules():
        for name, norm in list(module.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                convolution = "conv" + name.removeprefix("bn")
                setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), norm))
                setattr(module, name, nn.Identity())


@dataclass(frozen=True, eq=False)
class Task:
    """images: (N, 3, H, W) uint8 to craft on, all classified correctly; labels: (N,). batch_size: images of a step."""

    subject: Subject
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    batch_size: int


def art_attack(net: Net, settings: ArtSettings, size: int) -> Any:
    """ART's attack, pasting its patch at 1:1."""
    evasion = importlib.import_module("art.attacks.evasion")
    classification = importlib.import_module("art.estimators.classification")
    scale = size / 32
    estimator = classification.PyTorchClassifier(
        net, nn.CrossEntropyLoss(), (3, 32, 32), 10, clip_values=(0, 255), device_type="cpu"
    )
    attack = evasion.AdversarialPatchPyTorch(
        estimator, rotation_max=0.0, scale_min=scale, scale_max=scale, learning_rate=settings.learning_rate,
        patch_shape=(3, size, size), patch_type="square", optimizer=settings.optimizer,
        targeted=settings.target is not None, verbose=False,
    )  # fmt: skip
    if settings.cleared:
        train = attack._train_step

        def cleared(**batch: Any) -> Any:
            attack._patch.grad = None
            return train(**batch)

        attack._train_step = cleared
    return attack


def run_art(net: Net, settings: ArtSettings, size: int, task: Task, steps: int, seed: int) -> NDArray[np.uint8]:
    """Its patch, (3, size, size). ART counts epochs, so the crafting images are cut to a whole number of them."""
    np.random.seed(seed)  # what ART draws from
    torch.manual_seed(seed)
    attack = art_attack(net, settings, size)
    if settings.random_start:
        attack.reset_patch(np.random.uniform(0, 255, (3, size, size)))
    attack.max_iter = max(1, -(-steps * task.batch_size // len(task.images)))
    attack.batch_size = task.batch_size // settings.updates
    count = steps * task.batch_size // attack.max_iter
    labels = task.labels[:count] if settings.target is None else np.full(count, settings.target)
    mask = np.ones((1, 32, 32), bool) if settings.whole_pixels else None
    pixels, _ = attack.generate(task.images[:count].astype(np.float32), labels, mask=mask)
    rounded: NDArray[np.uint8] = pixels.round().clip(0, 255).astype(np.uint8)
    return rounded


def run_aqapa(net: Net, config: AQAPA, task: Task) -> NDArray[np.uint8]:
    return config.run(Victim({"float": net}), task.images, task.labels).pixels


def covered(net: Net, settings: ArtSettings, size: int, images: int = 500) -> list[int]:
    """The numbers of pixels that ART's patch covers; [size * size] when it is pasted at 1:1 everywhere."""
    attack = art_attack(net, settings, size)
    mask = np.ones((1, 32, 32), bool) if settings.whole_pixels else None
    white = np.full((3, size, size), 255, np.float32)
    patched = attack.apply_patch(np.zeros((images, 3, 32, 32), np.float32), size / 32, white, mask=mask)
    return sorted({int(count) for count in (patched == 255).all(1).sum((1, 2))})


def measured(net: Net, attack: Callable[[], NDArray[np.uint8]], task: Task, seed: int) -> dict[str, Any]:
    """Run an attack, time all of it and judge its patch. Rates: images that gradients were taken of per second."""
    net.shown, wall, cpu = 0, time.perf_counter(), time.process_time()
    pixels = attack()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    patch = square(pixels)
    judged = judge_at(task.subject, patch, random_places(task.subject, patch, seed))
    return {"asr": judged.asr, "successes": judged.successes, "n": judged.n,
            "ci95": list(wilson(judged.successes, judged.n)), "images": net.shown, "images_per_second": net.shown / wall,
            "images_per_cpu_second": net.shown / cpu}  # fmt: skip


def bare(net: Net, batch: int) -> float:
    """Images per second of the net alone, forward and backward to its input; median."""
    images, times = torch.rand(batch, 3, 32, 32) * 255, []
    for _ in range(BARE):
        leaf = images.clone().requires_grad_()
        start = time.perf_counter()
        net(leaf).sum().backward()  # type: ignore[no-untyped-call]
        times.append(time.perf_counter() - start)
    return batch / statistics.median(times)


def tune(net: Net, task: Task, steps: int) -> tuple[ArtSettings, list[dict[str, Any]]]:
    """The settings of ART with the highest ASR, and all that were tried; `cleared` is tried last and never chosen."""

    def tried(settings: ArtSettings) -> float:
        found = measured(net, lambda: run_art(net, settings, TUNED_SIZE, task, steps, 1000), task, 0)
        rows.append(asdict(settings) | {"asr": found["asr"]})
        print(f"tuning ART: {found['asr']:.1%} {settings}", flush=True)
        return float(found["asr"])

    rows: list[dict[str, Any]] = []
    best = ArtSettings()
    highest = tried(best)
    for change in CHANGES:
        candidate = replace(best, **change)
        if candidate != best and (asr := tried(candidate)) > highest:
            best, highest = candidate, asr
    tried(replace(best, cleared=True))
    return best, rows


def turn(
    nets: dict[str, Net], settings: ArtSettings, task: Task, size: int, steps: int, seed: int
) -> list[dict[str, Any]]:
    """Every contender once, one after the other; ours also in bfloat16, and with one start: as many moves as steps."""
    config = AQAPA(size, steps=steps, batch_size=task.batch_size, seed=seed)
    ours, published, low = nets["prepared"], nets["published"], nets["bfloat16"]
    contenders = {
        "aqapa": (ours, steps, lambda: run_aqapa(ours, config, task)),
        "art": (ours, steps, lambda: run_art(ours, settings, size, task, steps, seed)),
        "art, published net": (published, PROBE_STEPS, lambda: run_art(published, settings, size, task, PROBE_STEPS, seed)),
    }
    single = replace(config, starts=1, race=0.0)
    contenders["aqapa, one start"] = (ours, steps, lambda: run_aqapa(ours, single, task))
    contenders["aqapa, one start, bfloat16"] = (low, steps, lambda: run_aqapa(low, single, task))
    rows = []
    for name, (net, taken, attack) in contenders.items():
        row = {"attack": name, "size": size, "seed": seed, "steps": taken} | measured(net, attack, task, 0)
        if row["images"] != taken * task.batch_size:
            raise SystemExit(f"{name} took gradients of {row['images']} images instead of {taken * task.batch_size}")
        print(f"{size}x{size} seed {seed} {name:<27} ASR {row['asr']:.1%}, {row['images_per_second']:.0f}/s", flush=True)
        rows.append(row)
    return rows


def prepare(args: argparse.Namespace, net: Net) -> tuple[Task, dict[str, str]]:
    """What is crafted on, from the training images, and what is judged, from the test images; digests of both."""

    def classify(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.no_grad():
            return net(torch.from_numpy(images).float()).numpy()

    train, test = load_splits(args.data)
    judged = np.arange(min(args.limit, len(test)))
    subject = Subject.of(classify, test.images(judged), test.labels[judged], batch_size=100)
    first = np.arange(min(2 * args.craft, len(train)))
    pool = Subject.of(classify, train.images(first), train.labels[first], batch_size=100)
    chosen = np.flatnonzero(pool.correct)[: args.craft]
    digests = {"train": train.sha256, "test": test.sha256, "weights": hashlib.sha256(args.weights.read_bytes()).hexdigest()}
    return Task(subject, pool.images[chosen], pool.labels[chosen], args.batch_size), digests


def table(rows: list[dict[str, Any]], bare_rates: dict[str, list[float]]) -> str:
    """ASR per size with the interval of all seeds' images together; median rates, and median ratios within a turn."""
    lines = ["| attack | patch | steps | ASR, mean of seeds | lowest, highest | 95 %, all seeds |", "|---|---|---|---|---|---|"]
    for name, size in dict.fromkeys((row["attack"], row["size"]) for row in rows if "published" not in row["attack"]):
        mine = [row for row in rows if (row["attack"], row["size"]) == (name, size)]
        asr = [row["asr"] for row in mine]
        n = sum(row["n"] for row in mine)
        low, high = wilson(sum(row["successes"] for row in mine), n)
        lines.append(f"| {name} | {size}x{size} | {mine[0]['steps']} | {statistics.fmean(asr):.1%} | {min(asr):.1%}, "
                     f"{max(asr):.1%} | [{low:.1%}, {high:.1%}], n = {n:,} |")  # fmt: skip
    lines += ["", "| images per second, median | wall clock | CPU time | over ART, published net |", "|---|---|---|---|"]

    base = {(row["size"], row["seed"]): row for row in rows if row["attack"] == "art, published net"}
    for name in dict.fromkeys(row["attack"] for row in rows):
        mine = [row for row in rows if row["attack"] == name]
        cells = []
        for key in ("images_per_second", "images_per_cpu_second"):
            ratios = [row[key] / base[row["size"], row["seed"]][key] for row in mine]
            cells.append((statistics.median(row[key] for row in mine), statistics.median(ratios)))
        (wall, wall_ratio), (cpu, cpu_ratio) = cells
        lines.append(f"| {name} | {wall:.0f} | {cpu:.0f} | {wall_ratio:.2f}x wall, {cpu_ratio:.2f}x CPU |")
    for name, values in bare_rates.items():
        lines.append(f"| {name} net alone | {statistics.median(values):.0f} | | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--sizes", default="6,8", help="sides of the patches in pixels")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=100, help="images of a step")
    parser.add_argument("--seeds", type=int, default=3, help="0 only searches ART's settings")
    parser.add_argument("--limit", type=int, default=2000, help="test images that are judged")
    parser.add_argument("--craft", type=int, default=2000, help="training images that are crafted on")
    parser.add_argument("--tune-steps", type=int, default=100, help="of each of ART's settings that are tried")
    parser.add_argument("--settings-from", type=Path, help="an earlier result, for ART's settings instead of tuning")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model("resnet20", 10, args.weights)
    nets = {"published": Net(model, False), "prepared": Net(model, True), "bfloat16": Net(model, True, True)}
    nets = {name: net.eval() for name, net in nets.items()}
    task, digests = prepare(args, nets["prepared"])
    sizes = [int(size) for size in args.sizes.split(",")]
    if args.settings_from is not None:
        art = json.loads(args.settings_from.read_text())["art"]
        settings = ArtSettings(**art["settings"])
    else:
        settings, tried = tune(nets["prepared"], task, args.tune_steps)
        art = {"version": importlib.import_module("art").__version__, "settings": asdict(settings), "tried": tried,
               "tried_size": TUNED_SIZE, "tried_steps": args.tune_steps}  # fmt: skip
    pasted = {f"{size}x{size}": covered(nets["prepared"], settings, size) for size in sizes}
    alone: dict[str, list[float]] = {name: [] for name in nets}
    result: dict[str, Any] = {
        "art": art, "covered_pixels": pasted, "runs": [], "net_alone_images_per_second": alone,
        "judged": len(task.subject.images), "crafted_on": len(task.images), "batch_size": args.batch_size,
        "threads": args.threads, "versions": versions(), "cpu": cpu_flags(), "sha256": digests,
    }  # fmt: skip
    save(args.out, result)
    for seed in range(args.seeds):
        for size in sizes:
            result["runs"] += turn(nets, settings, task, size, args.steps, seed)
            for name, net in nets.items():
                alone[name].append(bare(net, args.batch_size))
            save(args.out, result)
    if result["runs"]:
        print(table(result["runs"], alone))


def save(path: Path | None, result: dict[str, Any]) -> None:
    """After every turn, since all of them take long: the JSON, and beside it the table."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        if result["runs"]:
            path.with_suffix(".md").write_text(table(result["runs"], result["net_alone_images_per_second"]))


if __name__ == "__main__":
    main()
