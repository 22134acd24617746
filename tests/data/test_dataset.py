from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from edgeguard.data import Dataset, check_labels, from_arrays, holdout
from edgeguard.errors import InputError


def pixels(count: int, height: int = 4, width: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def make(labels: list[int], seed: int = 0) -> Dataset:
    return from_arrays("set", pixels(len(labels), seed=seed), np.array(labels, np.int64))


def test_images_are_nchw_in_the_order_asked_for() -> None:
    stored = pixels(5)
    dataset = from_arrays("set", stored, np.array([0, 1, 2, 1, 0]))
    images = dataset.images([3, 0, 3])
    assert images.dtype == np.uint8
    assert images.flags.c_contiguous
    assert dataset.image_shape == (3, 4, 6)
    np.testing.assert_array_equal(images, stored[[3, 0, 3]].transpose(0, 3, 1, 2))
    assert len(dataset) == 5
    assert dataset.num_classes == 3
    assert dataset.class_names == ("0", "1", "2")
    assert dataset.images([]).shape == (0, 3, 4, 6)


def test_images_are_copies() -> None:
    dataset = make([0, 1])
    dataset.images([0])[:] = 0
    assert dataset.images([0]).any()


def test_subset_composes_and_keeps_the_classes() -> None:
    dataset = make([0, 1, 2, 3, 4])
    part = dataset.subset([4, 2, 0]).subset(np.array([2, 0]))
    assert part.labels.tolist() == [0, 4]
    assert part.class_names == dataset.class_names
    np.testing.assert_array_equal(part.images([1, 0]), dataset.images([4, 0]))


def test_a_subset_does_not_follow_later_changes_of_its_indices() -> None:
    dataset = make([0, 1, 2])
    wanted = np.array([0, 1])
    part = dataset.subset(wanted)
    wanted[:] = 2
    np.testing.assert_array_equal(part.images([0]), dataset.images([0]))


def test_sha256_tells_pixels_labels_names_and_subsets_apart() -> None:
    same = make([0, 1, 2]).sha256
    assert same == make([0, 1, 2]).sha256
    named = from_arrays("set", pixels(3), np.array([0, 1, 2]), ("a", "b", "c"))
    digests = {same, make([0, 1, 2], seed=1).sha256, make([0, 2, 1]).sha256, named.sha256}
    digests |= {make([0, 1, 2]).subset(chosen).sha256 for chosen in ([0, 1], [1, 0])}
    assert len(digests) == 6


@pytest.mark.parametrize(
    ("indices", "message"),
    [([5], "has 3 images"), ([-1], "has 3 images"), ([0.5], "list of integers"), ([[0]], "list of integers")],
)
def test_wrong_indices(indices: object, message: str) -> None:
    dataset = make([0, 1, 2])
    with pytest.raises(InputError, match=message):
        dataset.images(indices)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        dataset.subset(indices)  # type: ignore[arg-type]


def test_an_empty_subset_is_refused() -> None:
    with pytest.raises(InputError, match="holds no images"):
        make([0, 1]).subset([])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (pixels(2).astype(np.float32), np.zeros(2, np.int64), "must be .N, H, W, 3. uint8"),
        (pixels(2).transpose(0, 3, 1, 2), np.zeros(2, np.int64), "must be .N, H, W, 3. uint8"),
        (pixels(2)[0], np.zeros(2, np.int64), "must be .N, H, W, 3. uint8"),
        (pixels(2, height=0), np.zeros(2, np.int64), "must be .N, H, W, 3. uint8"),
        (pixels(2), np.zeros(3, np.int64), "2 images but 3 labels"),
        (pixels(0), np.zeros(0, np.int64), "holds no images"),
        (pixels(2), np.zeros(2, np.int32), "int64, got .2,. int32"),
        (pixels(2), np.zeros((2, 1), np.int64), "labels must be .N,. int64"),
        (pixels(2), np.array([0, -1]), "must not be negative, got -1"),
    ],
)
def test_wrong_arrays(images: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_arrays("set", images, labels)


def test_labels_outside_the_class_names() -> None:
    with pytest.raises(InputError, match="label 2 lies outside its 2 class names"):
        from_arrays("set", pixels(2), np.array([0, 2]), ("a", "b"))


def test_check_labels() -> None:
    check_labels(make([0, 3]), 4)
    with pytest.raises(InputError, match=r"labels outside the model's classes; the largest label is 3.* 3 classes"):
        check_labels(make([0, 3]), 3)


def test_holdout_is_stratified_disjoint_and_complete() -> None:
    labels = [0] * 40 + [1] * 20 + [2] * 2
    dataset = make(labels)
    rest, held = holdout(dataset, 0.25, seed=3)
    assert np.bincount(held.labels).tolist() == [10, 5, 1]
    assert np.bincount(rest.labels).tolist() == [30, 15, 1]
    seen = np.concatenate([rest.images(range(len(rest))), held.images(range(len(held)))])
    assert {image.tobytes() for image in seen} == {image.tobytes() for image in dataset.images(range(len(dataset)))}


def test_holdout_follows_its_seed_and_its_fraction() -> None:
    dataset = make([0, 1] * 50)
    first, second, other = (holdout(dataset, 0.2, seed)[1].sha256 for seed in (1, 1, 2))
    assert first == second
    assert first != other
    assert len(holdout(dataset, 0.1, 1)[1]) == 10


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
def test_holdout_refuses_other_fractions(fraction: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        holdout(make([0, 0, 1, 1]), fraction, 0)


def test_holdout_needs_two_images_of_a_class() -> None:
    with pytest.raises(InputError, match="cannot be split"):
        holdout(make([0, 1, 2]), 0.5, 0)


def test_data_and_digits_need_neither_torch_nor_pillow() -> None:
    code = (
        "import sys; from edgeguard.data import load_dataset; load_dataset('digits', 'test').images([0]);"
        "print([m for m in ('torch', 'torchvision', 'PIL', 'onnx') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
