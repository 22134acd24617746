import copy

import numpy as np
import pytest
import torch
from torch import nn

from edgeguard import graph as g
from edgeguard.calib import calibrate
from edgeguard.data import load_dataset
from edgeguard.errors import ExportError, InputError
from edgeguard.export.lower import lower
from edgeguard.export.lower_ops import equal_windows, fold
from edgeguard.inttype import ACCUMULATOR, IntType
from edgeguard.models import load_model
from edgeguard.quant.batchnorm import SwitchableBatchNorm2d
from edgeguard.quant.model import Normalization, quantize_model
from edgeguard.quant.scheme import QuantScheme
from edgeguard.quant.width import Width, parse_width, parse_widths
from edgeguard.targets.reference import ReferenceEngine

SHAPE = (3, 32, 32)
IMAGES = load_dataset("digits", "train").images(np.arange(48))


def randomized(module, scheme=None, seed=0):
    """A calibrated quantized model whose batch norms have random statistics and gains of both signs."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator)
            layer.bias.data = torch.randn(layer.bias.shape, generator=generator)
            layer.running_mean = torch.randn(layer.bias.shape, generator=generator) * 0.2
            layer.running_var = torch.rand(layer.bias.shape, generator=generator) + 0.1
    model = quantize_model(module, scheme or QuantScheme(parse_widths("8,w4a8,2")), Normalization((0.5,) * 3, (0.25,) * 3))
    calibrate(model, IMAGES)
    return model.eval()


def simulated(model, width, images):
    with torch.no_grad(), model.at(width):
        return model(torch.from_numpy(images).float()).numpy()


@pytest.mark.parametrize("bits", ["8", "w4a8", "2"])
def test_integers_agree_with_the_simulation(bits):
    model, width = randomized(load_model("resnet8").module), parse_width(bits)
    graph = lower(model, width, SHAPE)
    logits, simulation = ReferenceEngine(graph)(IMAGES), simulated(model, width, IMAGES)
    spread = simulation.std()
    # rounding ties and int32 biases may differ by a step; at 2 bits a step is a quarter of the range
    assert np.abs(logits - simulation).mean() < {"8": 0.02, "w4a8": 0.05, "2": 0.4}[bits] * spread
    correlation = np.corrcoef(logits.ravel(), simulation.ravel())[0, 1]
    assert correlation > {"8": 0.999, "w4a8": 0.995, "2": 0.9}[bits]


@pytest.mark.parametrize("bits", ["12", "w8a9", "w16a8"])
def test_widths_of_training_alone_do_not_lower(bits):
    scheme = QuantScheme(parse_widths(f"8,{bits}"))
    model = randomized(load_model("resnet8").module, scheme)
    with pytest.raises(ExportError, match=f"no integer engine runs width {bits}.*export at 8 bits or fewer"):
        lower(model, parse_width(bits), SHAPE)
    assert lower(model, Width(8, 8), SHAPE).nodes


def test_structure_and_types():
    model = randomized(load_model("resnet8").module)
    graph = lower(model, parse_width("2"), SHAPE)
    kinds = [type(node).__name__ for node in graph.nodes]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "Quantize": 1, "Conv": 7, "Add": 3, "MaxPool": 2, "Pad": 2, "AveragePool": 1, "Flatten": 1, "Linear": 1, "Dequantize": 1,
    }  # fmt: skip
    convs = [node for node in graph.nodes if isinstance(node, g.Conv)]
    assert convs[0].weight_type == IntType(8, signed=True, narrow=True)
    assert all(node.weight_type == IntType(2, signed=True, narrow=True) for node in convs[1:])
    assert graph.tensors[convs[0].output].dtype == IntType(2, signed=False)
    last = graph.nodes[-2]
    assert isinstance(last, g.Linear)
    assert last.weight_type.bits == 8
    assert graph.tensors[last.output].dtype == ACCUMULATOR


def test_the_integers_that_were_trained_ship_up_to_the_sign_of_the_gain():
    model, width = randomized(load_model("resnet8").module), Width(2, 2)
    graph = lower(model, width, SHAPE)
    shipped = {node.name: node for node in graph.nodes if isinstance(node, g.Conv)}
    layer = model.body.get_submodule("layer1.0.conv1")
    norm = model.body.get_submodule("layer1.0.bn1")
    assert isinstance(norm, SwitchableBatchNorm2d)
    with model.at(width):
        trained, _ = layer.weight_quant.tensor_quant.integers(layer.weight)
        sign = torch.sign(norm.current().weight).view(-1, 1, 1, 1)
    assert np.array_equal(shipped["layer1.0.conv1"].weight, (trained * sign).to(torch.int8).numpy())
    assert (sign < 0).any()


def test_the_model_is_only_read():
    model = randomized(load_model("resnet8").module)
    before, index = copy.deepcopy(model.state_dict()), model.control.index
    lower(model, Width(2, 2), SHAPE)
    assert model.control.index == index
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Chain(nn.Module):
    def __init__(self, *layers, features=4):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *layers, nn.Flatten(), nn.Linear(features, 5))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize(
    ("layers", "features"),
    [
        ((nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 4, 3, 2, 1, groups=4), nn.AdaptiveAvgPool2d(1)), 4),
        ((nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 8, 3, dilation=2, groups=2), nn.AdaptiveAvgPool2d(1)), 8),
        ((nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(4, 6, 1), nn.ReLU(), nn.AvgPool2d(8)), 6 * 16),
        ((nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 12), nn.ReLU()), 12),
        ((nn.ReLU(), nn.AdaptiveAvgPool2d((5, None))), 4 * 5 * 32),
        ((nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(3)), 36),
        ((nn.ReLU(), nn.AvgPool2d(3, 2, 1)), 4 * 256),
    ],
)
def test_other_structures_agree_with_the_simulation(layers, features):
    model = randomized(Chain(*copy.deepcopy(layers), features=features), QuantScheme(parse_widths("8")))
    graph = lower(model, Width(8, 8), SHAPE)
    logits, simulation = ReferenceEngine(graph)(IMAGES), simulated(model, Width(8, 8), IMAGES)
    assert np.abs(logits - simulation).max() < 0.05 * simulation.std() + 1e-3


@pytest.mark.parametrize(("size", "count"), [(32, 5), (12, 7), (1, 7), (3, 7), (8, 4), (7, 7)])
def test_windows_of_one_length_have_the_means_of_adaptive_pooling(size, count):
    pixels, length = equal_windows(size, count)
    values = torch.arange(size, dtype=torch.float64) ** 2
    expected = torch.nn.functional.adaptive_avg_pool1d(values[None], count)[0]
    torch.testing.assert_close(values[list(pixels)].reshape(count, length).mean(1), expected)


def test_signed_activations_clamp_at_zero():
    scheme = QuantScheme(parse_widths("8"), signed_activations=True)
    model = randomized(Chain(nn.ReLU(), nn.AdaptiveAvgPool2d(1)), scheme)
    graph = lower(model, Width(8, 8), SHAPE)
    clamps = [node for node in graph.nodes if isinstance(node, g.Clamp)]
    assert [(node.low, node.high) for node in clamps] == [(0, 127)] * 2  # the convolution and the pool behind it
    simulation = simulated(model, Width(8, 8), IMAGES)
    assert np.abs(ReferenceEngine(graph)(IMAGES) - simulation).max() < 0.05 * simulation.std()


def test_a_dead_channel_keeps_its_bias():
    integers = np.full((3, 4), 100.0)
    gain, shift = np.array([1.0, 0.0, -1e-30]), np.array([0.5, 0.7, -0.3])
    weight, scale, bias = fold(integers, np.full(3, 0.01), gain, shift, 0.02, IntType(8, signed=False), 0.05)
    assert weight[1:].tolist() == [[0] * 4] * 2
    assert bias * scale * 0.02 == pytest.approx(shift, abs=2e-4)


@pytest.mark.parametrize(
    ("layers", "features", "message"),
    [
        ((nn.ReLU(), nn.AvgPool2d(3, 2, 1, count_include_pad=False)), 4 * 256, "padding that does not count"),
        ((nn.ReLU(), nn.MaxPool2d(3, 2, dilation=2)), 4 * 196, "max pooling with dilation"),
        ((nn.ReLU(), nn.ConstantPad2d(1, 3.0), nn.AdaptiveAvgPool2d(1)), 4, "padding with zeros"),
    ],
)
def test_what_cannot_be_lowered_is_named(layers, features, message):
    scheme, normalization = QuantScheme(parse_widths("8")), Normalization((0.5,) * 3, (0.25,) * 3)
    model = quantize_model(Chain(*layers, features=features), scheme, normalization)
    with pytest.raises(ExportError, match=rf"layers_?\.?\d.*{message}"):
        lower(model, Width(8, 8), SHAPE)


def test_an_untrained_width_is_refused():
    with pytest.raises(InputError, match="not trained at 5 bits"):
        lower(randomized(load_model("resnet8").module), Width(5, 5), SHAPE)
