import numpy as np
import pytest
import torch

from edgeguard.calib import calibrate, calibration_indices
from edgeguard.calib.estimators import ESTIMATORS, Observer, minmax, mse, percentile, squared_error
from edgeguard.data import load_dataset
from edgeguard.errors import InputError
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


def test_unknown_estimator():
    model = quantize_model(load_model("resnet8").module, QuantScheme(parse_widths("8")), Normalization((0.5,) * 3, (0.2,) * 3))
    with pytest.raises(InputError, match="unknown estimator 'median'; expected one of minmax, percentile, mse"):
        calibrate(model, np.zeros((1, 3, 32, 32), np.uint8), "median")
