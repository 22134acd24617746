import numpy as np
import pytest
import torch

from edgeguard.calib import calibrate, calibration_indices
from edgeguard.calib.estimators import ESTIMATORS, Observer, entropy, merge, minmax, mse, percentile, squared_error
from edgeguard.data import load_dataset
from edgeguard.errors import InputError
from edgeguard.export.lower import lower
from edgeguard.graph import Add
from edgeguard.inttype import IntType
from edgeguard.models import load_model
from edgeguard.quant.model import Normalization, quantize_model
from edgeguard.quant.scheme import QuantScheme
from edgeguard.quant.width import parse_widths


def observed(values):
    observer = Observer()
    observer(torch.as_tensor(values))
    return observer


def test_the_subset_is_deterministic_and_without_repeats():
    first = calibration_indices(1000, 64, 7)
    assert np.array_equal(first, calibration_indices(1000, 64, 7))
    assert not np.array_equal(first, calibration_indices(1000, 64, 8))
    assert len(set(first.tolist())) == 64
    assert len(calibration_indices(10, 64, 0)) == 10
    with pytest.raises(InputError, match="at least one image"):
        calibration_indices(0, 64, 0)


def test_minmax_covers_both_ends():
    assert minmax(observed([-1.0, 3.0]), IntType(8, signed=False)) == pytest.approx(3 / 255)
    assert minmax(observed([-4.0, 1.0]), IntType(8, signed=True)) == pytest.approx(4 / 128)


def test_percentile_ignores_an_outlier_that_minmax_does_not():
    values = np.concatenate([np.linspace(0, 1, 20_000), [1000.0]]).astype(np.float32)
    observer = Observer()
    for chunk in np.array_split(values, 8):
        observer(torch.from_numpy(chunk))
    dtype = IntType(8, signed=False)
    assert percentile(observer, dtype) < 0.05 < minmax(observer, dtype)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_mse_is_no_worse_than_the_others(bits):
    generator = torch.Generator().manual_seed(0)
    observer = observed(torch.randn(4000, generator=generator).exp())
    dtype, values = IntType(bits, signed=False), observer.values()
    errors = {name: squared_error(values, rule(observer, dtype), dtype) for name, rule in ESTIMATORS.items()}
    assert errors["mse"] <= min(errors.values()) * 1.001
    assert mse(observer, dtype) <= minmax(observer, dtype)


def test_entropy_clips_nothing_where_levels_are_finer_than_its_histogram():
    observer = observed(torch.randn(4000, generator=torch.Generator().manual_seed(0)).exp())
    for bits in (12, 16):
        dtype = IntType(bits, signed=False)
        assert entropy(observer, dtype) == minmax(observer, dtype)


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
def test_entropy_finds_the_grid_that_values_lie_on(bits, signed):
    dtype, step = IntType(bits, signed), 0.25
    levels = np.arange(1, dtype.qmax + 1)
    many = 100_000 // dtype.qmax
    values = np.repeat(levels, np.where(levels % 2, 3 * many, many)) * step  # merging two levels would show
    values = np.concatenate([values, np.full(3, 2 * dtype.qmax * step)])
    if signed:
        values *= np.where(np.arange(len(values)) % 3, 1, -1)
    observer = observed(values.astype(np.float32))
    assert entropy(observer, dtype) == pytest.approx(step, rel=0.05)
    assert minmax(observer, dtype) > 1.9 * step


def test_entropy_of_nothing_but_zeros():
    assert entropy(observed([0.0, 0.0]), IntType(8, signed=False)) == minmax(observed([0.0]), IntType(8, signed=False))


def test_what_a_relu_cuts_off_takes_no_range():
    rectified, limited = Observer(floor=0.0), Observer(floor=0.0, ceiling=6.0)
    for observer in (rectified, limited):
        observer(torch.tensor([-100.0, -2.0, 1.0, 8.0]))
    signed = IntType(8, signed=True)
    assert minmax(rectified, signed) == pytest.approx(8 / 127)
    assert minmax(limited, signed) == pytest.approx(6 / 127)
    assert limited.values().tolist() == [0.0, 0.0, 1.0, 6.0]


def test_merged_observers_have_seen_everything():
    both = merge([observed([-1.0, 0.5]), observed([0.0, 3.0])])
    assert (both.low, both.high) == (-1.0, 3.0)
    assert sorted(both.values().tolist()) == [-1.0, 0.0, 0.5, 3.0]


def test_signed_activations_lose_one_bit_and_no_more():
    images = load_dataset("digits", "train").images(np.arange(16))
    float_model = load_model("resnet8")
    scheme = QuantScheme(parse_widths("8"), signed_activations=True)
    model = quantize_model(float_model.module, scheme, Normalization(float_model.mean, float_model.std)).eval()
    calibrate(model, images, "minmax")
    used = [q for q in model.activation_quantizers().values() if not q.signed]
    pixels = torch.from_numpy(images).float()
    largest = {}
    with torch.no_grad():
        for quantizer in used:
            quantizer.observer = lambda x, q=quantizer: largest.update({q: float(x.max())})
        model(pixels)
    assert used
    single = [q for q in used if len(model.members(q.group)) == 1]
    assert all(largest[q] / q.scale() > 100 for q in single)  # of 127 steps


def test_progress_counts_every_image():
    model = quantize_model(load_model("resnet8").module, QuantScheme(parse_widths("8")), Normalization((0.5,) * 3, (0.2,) * 3))
    seen = []
    calibrate(model, np.zeros((5, 3, 16, 16), np.uint8), "minmax", batch_size=2, on_batch=seen.append)
    assert seen == [2, 2, 1]


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_calibration_sets_every_width_and_keeps_additions_exact(estimator):
    images = load_dataset("digits", "train").images(np.arange(32))
    float_model = load_model("resnet8")
    scheme = QuantScheme(parse_widths("8,4,2"))
    model = quantize_model(float_model.module, scheme, Normalization(float_model.mean, float_model.std)).eval()
    calibrate(model, images, estimator)
    pixels = torch.from_numpy(images).float()
    with torch.no_grad():
        real = float_model.module((pixels / 255 - torch.tensor(float_model.mean).view(3, 1, 1))
                                  / torch.tensor(float_model.std).view(3, 1, 1))  # fmt: skip
        errors = []
        for width in scheme.widths:
            with model.at(width):
                errors.append(float((model(pixels) - real).abs().mean() / real.abs().mean()))
                for group in model.scales:
                    scales = [q.scale() for q in model.members(group)]
                    assert all(np.log2(s / scales[0]) == round(np.log2(s / scales[0])) for s in scales)
    assert errors[0] < 0.1
    assert errors[0] < errors[1] < errors[2] + 0.5


@pytest.mark.parametrize("bits", ["8", "2"])
def test_a_branch_is_rounded_once_where_its_shortcut_lies_on_the_grid_of_the_sum(bits):
    images = load_dataset("digits", "train").images(np.arange(32))
    scheme = QuantScheme(parse_widths(bits))
    model = quantize_model(load_model("resnet20").module, scheme, Normalization((0.5,) * 3, (0.25,) * 3)).eval()
    calibrate(model, images)
    graph = lower(model, scheme.widths[0], (3, 32, 32))
    ratios = []
    for node in graph.nodes:
        if isinstance(node, Add):
            branch = [ratio for ratio, name in zip(graph.add_ratios(node), (node.input, node.other), strict=True)
                      if name.endswith("conv2")]  # fmt: skip
            shortcut = [ratio for ratio, name in zip(graph.add_ratios(node), (node.input, node.other), strict=True)
                        if not name.endswith("conv2")]  # fmt: skip
            ratios.append((*branch, *shortcut))
    assert len(ratios) == 9
    assert all(branch >= 1 for branch, shortcut in ratios if shortcut >= 1)
    assert any(shortcut >= 1 for _, shortcut in ratios)


def test_unknown_estimator():
    model = quantize_model(load_model("resnet8").module, QuantScheme(parse_widths("8")), Normalization((0.5,) * 3, (0.2,) * 3))
    with pytest.raises(InputError, match="unknown estimator 'median'; expected one of minmax, percentile, mse"):
        calibrate(model, np.zeros((1, 3, 32, 32), np.uint8), "median")
