"""Images per second of EdgeGuard's image folders against torchvision's `ImageFolder` and a `DataLoader`, in one run.

    python benchmarks/data_speed.py --out benchmarks/results/data_speed.json

Both read the same generated JPEGs and give batches of (n, 3, 224, 224) uint8: random crops, mirrored or not, as for
training, and resized centres as for evaluation. EdgeGuard decodes in so many threads, the DataLoader in so many processes,
which are started beforehand and kept. The two take turns; each turn is one pass over all images. Beside it: how long it takes
to open a folder of many files, of which only names and sizes are read.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from edgeguard import files
from edgeguard.data import batches, load_dataset
from edgeguard.data.decode import CROP_AREA, CROP_RATIO, resized_side
from edgeguard.errors import EdgeGuardError
from edgeguard.targets import cpu_flags

SCHEMA = "edgeguard.data_speed/1"
CLASSES = 4
MANY = 50_000
"""Files in the folder that is only opened."""


def write_photographs(folder: Path, count: int, size: tuple[int, int]) -> int:
    """JPEGs of noise at several scales, about as hard to decode as photographs. Returns: the mean file size in bytes."""
    rng = np.random.default_rng(0)
    width, height = size
    total = 0
    for number in range(count):
        pixels = np.zeros((height, width, 3))
        for octave in (2, 4, 8, 32, 128):
            grid = rng.integers(0, 256, (height // octave + 2, width // octave + 2, 3), np.uint8)
            pixels += np.asarray(Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC), float) * octave**0.5
        pixels = (pixels - pixels.min()) * 255 / np.ptp(pixels)
        path = folder / f"class{number % CLASSES}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=90)
        total += path.stat().st_size
    return total // count


def ours(folder: Path, side: int, batch: int, threads: int, train: bool) -> Callable[[], int]:
    """One pass over the folder, as the training loop makes it; returns the number of images."""
    data = load_dataset(f"imagefolder:{folder}", "train", side, threads)
    order = np.random.default_rng(0).permutation(len(data))

    def make(number: int, indices: np.ndarray[Any, Any]) -> Any:
        return data.augmented(indices, np.random.default_rng([0, number]), True) if train else data.images(indices)

    return lambda: sum(len(images) for images in batches(order, batch, make))


def theirs(folder: Path, side: int, batch: int, workers: int, train: bool) -> Callable[[], int]:
    """The same with torchvision's recipe."""
    crop = [transforms.RandomResizedCrop(side, CROP_AREA, CROP_RATIO), transforms.RandomHorizontalFlip()]
    centre = [transforms.Resize(resized_side(side)), transforms.CenterCrop(side)]
    recipe = transforms.Compose([*(crop if train else centre), transforms.PILToTensor()])
    data = datasets.ImageFolder(str(folder), recipe)
    loader = DataLoader(data, batch, shuffle=True, num_workers=workers, persistent_workers=True)
    return lambda: sum(len(images) for images, _ in loader)


def measure(passes: dict[str, Callable[[], int]], turns: int) -> dict[str, list[float]]:
    """Images per second of each in every turn, after one pass that is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(turns + 1):
        for name, one_pass in passes.items():
            start = time.perf_counter()
            count = one_pass()
            if turn:
                rates[name].append(count / (time.perf_counter() - start))
    return rates


def summary(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the ratio turn by turn: median and quartiles."""
    low, middle, high = np.quantile(np.divide(rates["edgeguard"], rates["torchvision"]), (0.25, 0.5, 0.75))
    return {
        "edgeguard_images_per_second": float(np.median(rates["edgeguard"])),
        "torchvision_images_per_second": float(np.median(rates["torchvision"])),
        "ratio": {"median": float(middle), "quartiles": [float(low), float(high)]},
    }


def opening(count: int) -> dict[str, Any]:
    """Seconds to open a folder of `count` files whose directories are cached."""
    with tempfile.TemporaryDirectory(prefix="edgeguard-") as name:
        for number in range(CLASSES):
            folder = Path(name) / f"class{number}"
            folder.mkdir()
            for index in range(count // CLASSES):
                (folder / f"{index:06}.jpg").write_bytes(b"")
        start = time.perf_counter()
        found = len(load_dataset(f"imagefolder:{name}", "train", 224))
        return {"files": found, "seconds": time.perf_counter() - start}


def run(count: int, sizes: list[tuple[int, int]], side: int, batch: int, turns: int) -> dict[str, Any]:
    """The whole benchmark: a JSON document of schema `edgeguard.data_speed/1`."""
    results = []
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="edgeguard-") as name:
            file_bytes = write_photographs(Path(name), count, size)
            for train in (True, False):
                for threads in (1, 2):
                    settings = (Path(name), side, batch, threads, train)
                    rates = measure({"edgeguard": ours(*settings), "torchvision": theirs(*settings)}, turns)
                    results.append({
                        "photographs": list(size), "mean_file_bytes": file_bytes,
                        "pixels": "training crops" if train else "centres", "threads": threads, **summary(rates),
                    })  # fmt: skip
    return {
        "schema": SCHEMA, "images": count, "image_size": side, "batch_size": batch, "turns": turns, "results": results,
        "opening": opening(MANY),
        "environment": {
            "python": platform.python_version(), "numpy": np.__version__, "pillow": PIL.__version__,
            "torch": torch.__version__, "torchvision": torchvision.__version__, "machine": platform.machine(),
            "cpus": os.cpu_count(), "load_average": os.getloadavg()[0], "cpu_flags": cpu_flags(),
        },
    }  # fmt: skip


def parse_size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128, help="JPEGs of each size")
    parser.add_argument("--photographs", type=parse_size, nargs="+", default=[(500, 375), (1600, 1200)], metavar="WxH")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        document = run(options.images, options.photographs, options.image_size, options.batch_size, options.turns)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(options.out, document)
    except EdgeGuardError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
    print(f"{'photographs':>12} {'pixels':<15} {'threads':>7} {'EdgeGuard/s':>12} {'torchvision/s':>14} {'ratio':>6}")
    for entry in document["results"]:
        width, height = entry["photographs"]
        print(
            f"{f'{width}x{height}':>12} {entry['pixels']:<15} {entry['threads']:>7} "
            f"{entry['edgeguard_images_per_second']:12.0f} {entry['torchvision_images_per_second']:14.0f} "
            f"{entry['ratio']['median']:6.2f}"
        )
    print(f"{document['opening']['files']} files opened in {document['opening']['seconds']:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
