from __future__ import annotations

import sys
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeguard.data import has_splits, load_dataset, load_splits
from edgeguard.errors import InputError, MissingDependency

SPECS = "digits, cifar10, cifar10:DIR, imagefolder:DIR, npz:FILE"


@pytest.mark.parametrize("spec", ["mnist", "", "digits:here", "npz:", "npz", "imagefolder", "cifar10:", "DIGITS"])
def test_unknown_specs_list_the_known(spec: str) -> None:
    with pytest.raises(InputError, match=f"expected one of {SPECS}"):
        load_dataset(spec, "test")
    with pytest.raises(InputError, match="unknown data"):
        has_splits(spec)


def test_unknown_split() -> None:
    with pytest.raises(InputError, match="unknown split 'valid'; expected train or test"):
        load_dataset("digits", "valid")  # type: ignore[arg-type]


def test_which_specs_have_splits() -> None:
    assert has_splits("digits")
    assert has_splits("cifar10")
    assert has_splits("cifar10:somewhere")
    assert has_splits("npz:a-{split}.npz")
    assert not has_splits("npz:a.npz")


def test_load_splits_uses_own_splits_or_holds_out(tmp_path: Path) -> None:
    train, test = load_splits("digits")
    assert (len(train), len(test)) == (1437, 360)
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(40) % 2)
    spec = f"npz:{tmp_path}/a.npz"
    train, test = load_splits(spec, fraction=0.25, seed=7)
    assert (len(train), len(test)) == (30, 10)
    assert load_splits(spec, fraction=0.25, seed=7)[1].sha256 == test.sha256
    assert load_splits(spec, fraction=0.25, seed=8)[1].sha256 != test.sha256
    assert load_splits("digits", 16)[0].image_shape == (3, 16, 16)


def test_splits_of_two_sizes_are_refused(tmp_path: Path) -> None:
    for split, size in (("train", 4), ("test", 5)):
        np.savez(tmp_path / f"{split}.npz", images=np.zeros((2, size, size, 3), np.uint8), labels=np.arange(2))
    with pytest.raises(InputError, match=r"training images are \(3, 4, 4\), test images \(3, 5, 5\)"):
        load_splits(f"npz:{tmp_path}/{{split}}.npz")


class FakeCifar:
    """Stands for torchvision's class: `missing` needs a download, and the download can fail."""

    classes = ("plane", "car")
    missing = False
    failure: Exception | None = None

    def __init__(self, root: str, train: bool, download: bool) -> None:
        print("Files already downloaded and verified")
        if self.missing and not download:
            raise RuntimeError("Dataset not found or corrupted.")
        if download and self.failure is not None:
            raise self.failure
        self.data = np.full((2, 32, 32, 3), 1 if train else 2, np.uint8)
        self.targets = [0, 1]


@pytest.fixture
def cifar(monkeypatch: pytest.MonkeyPatch) -> Any:
    datasets = pytest.importorskip("torchvision.datasets")
    fake = type("Fake", (FakeCifar,), {})
    monkeypatch.setattr(datasets, "CIFAR10", fake)
    return fake


def test_cifar10(cifar: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = load_dataset(f"cifar10:{tmp_path}", "train")
    assert dataset.image_shape == (3, 32, 32)
    assert dataset.class_names == ("plane", "car")
    assert dataset.images([0])[0, 0, 0, 0] == 1
    assert load_dataset(f"cifar10:{tmp_path}", "test").images([0])[0, 0, 0, 0] == 2
    assert capsys.readouterr().out == ""


def test_cifar10_is_downloaded_when_missing(cifar: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cifar.missing = True
    assert len(load_dataset("cifar10", "train")) == 2
    assert (tmp_path / "cache" / "edgeguard").is_dir()


def test_cifar10_where_the_base_install_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(MissingDependency, match=r'"edgeguard\[train\]"; on a device give the images as --data npz:'):
        load_dataset("cifar10", "test")


@pytest.mark.parametrize("failure", [urllib.error.URLError("no route"), RuntimeError("File not found or corrupted.")])
def test_cifar10_without_a_network(cifar: Any, tmp_path: Path, failure: Exception) -> None:
    cifar.missing, cifar.failure = True, failure
    with pytest.raises(InputError, match=r"CIFAR-10 is not in .* and its download failed \(.*--data cifar10:DIR"):
        load_dataset(f"cifar10:{tmp_path}/new", "train")


def test_cifar10_in_a_place_that_cannot_be_written(cifar: Any, tmp_path: Path) -> None:
    cifar.missing = True
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="download failed"):
        load_dataset(f"cifar10:{tmp_path}/file/below", "train")
