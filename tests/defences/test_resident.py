from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_training import TRAIN

from edgeguard.data import Dataset, from_arrays, load_splits
from edgeguard.defences import resident
from edgeguard.defences.augment import Crops
from edgeguard.defences.resident import ResidentImages, resident_images

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def images(height: int, width: int) -> Dataset:
    rng = np.random.default_rng(3)
    return from_arrays("noise", rng.integers(0, 256, (20, height, width, 3), np.uint8), np.arange(20))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shape", [(16, 16), (9, 24)])
def test_crops_are_those_that_the_host_makes(shape: tuple[int, int], flip: bool) -> None:
    dataset, indices = images(*shape), np.array([3, 3, 0, 19, 7, 11, 12, 13])
    for seed in range(8):
        crops = Crops.draw(len(indices), shape, np.random.default_rng(seed), flip)
        found = ResidentImages(dataset, CPU).cropped(indices, crops)
        assert found.dtype == torch.uint8
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(found.numpy(), crops.apply(dataset.images(indices)))


def test_whole_images_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "CHUNK", 100)
    found = ResidentImages(TRAIN, CPU).cropped(np.arange(256), Crops.whole(256))
    assert np.array_equal(found.numpy(), TRAIN.images(np.arange(256)))


def test_images_stay_with_the_host_where_the_device_gains_nothing(
    image_folder: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Made:
        def __init__(self, dataset: Dataset, device: torch.device) -> None:
            self.device = device

    monkeypatch.setattr(resident, "ResidentImages", Made)
    size = len(TRAIN) * 3 * 16 * 16
    for free, expected in ((4 * size, True), (4 * size - 4, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 1 << 40))
        assert (resident_images(TRAIN, GPU) is not None) is expected
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    assert image_folder.crop is not None
    assert resident_images(image_folder, GPU) is None
    assert resident_images(TRAIN, CPU) is None


@pytest.fixture
def image_folder(tmp_path: Path) -> Dataset:
    for part in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            Image.new("RGB", (140, 140), (9, 9, 9)).save(folder / "one.png")
    return load_splits(f"imagefolder:{tmp_path}", 128, seed=0)[0]
