"""Structures that users' networks are made of: each lowers, and its integers agree with the simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")
pytest.importorskip("brevitas")

from torch import nn  # noqa: E402

from edgeguard import graph as g  # noqa: E402
from edgeguard.calib import calibrate  # noqa: E402
from edgeguard.data import load_dataset  # noqa: E402
from edgeguard.errors import ExportError  # noqa: E402
from edgeguard.export.lower import lower  # noqa: E402
from edgeguard.export.lower_ops import lookup  # noqa: E402
from edgeguard.inttype import IntType  # noqa: E402
from edgeguard.quant.model import Normalization, quantize_model  # noqa: E402
from edgeguard.quant.scheme import QuantScheme  # noqa: E402
from edgeguard.quant.width import Width, parse_widths  # noqa: E402
from edgeguard.targets import reference  # noqa: E402
from edgeguard.targets.twin import Twin  # noqa: E402

IMAGES = load_dataset("digits", "train").images(np.arange(24))
CHANNELS = 8


def conv(inputs: int, outputs: int, *behind: nn.Module, **options: Any) -> nn.Sequential:
    options = {"kernel_size": 3, "padding": 1, "bias": False} | options
    return nn.Sequential(nn.Conv2d(inputs, outputs, **options), nn.BatchNorm2d(outputs), *behind)


class Net(nn.Module):
    """A first convolution, the structure under test on (N, 8, 16, 16), global pooling and a linear layer."""

    def __init__(self, middle: nn.Module, features: int) -> None:
        super().__init__()
        self.stem = conv(3, CHANNELS, nn.ReLU(), stride=2)
        self.middle, self.pool, self.head = middle, nn.AdaptiveAvgPool2d(1), nn.Linear(features, 10)

    def forward(self, x: Any) -> Any:
        return self.head(torch.flatten(self.pool(self.middle(self.stem(x))), 1))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torchvision.ops.SqueezeExcitation(CHANNELS, 4, nn.SiLU, nn.Hardsigmoid)

    def forward(self, x: Any) -> Any:
        return self.body(x)


class Dense(nn.Module):
    """Batch norm and ReLU in front of convolutions, their outputs (of both signs) concatenated with the input."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (8, 12))
        self.convs = nn.ModuleList(nn.Conv2d(n, 4, 3, padding=1, bias=False) for n in (8, 12))

    def forward(self, x: Any) -> Any:
        for norm, layer in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, layer(torch.relu(norm(x)))], 1)
        return x


class ShuffleUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = conv(4, 4, nn.ReLU())

    def forward(self, x: Any) -> Any:
        left, right = x.chunk(2, dim=1)
        x = torch.cat((left, self.branch(right)), dim=1)
        n, c, h, w = x.size()
        return torch.transpose(x.view(n, 2, c // 2, h, w), 1, 2).contiguous().view(n, c, h, w)


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.three = conv(8, 4, nn.ReLU(), kernel_size=1, padding=0), conv(8, 4, nn.ReLU())
        self.pool = nn.MaxPool2d(3, 1, 1, ceil_mode=True)

    def forward(self, x: Any) -> Any:
        return torch.cat([self.one(x), self.three(x), self.pool(x)], 1)


class LateReLU(nn.Module):
    """A convolution whose output is read with and without its ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(8, 8), conv(8, 8)

    def forward(self, x: Any) -> Any:
        x = self.first(x)
        return x + self.second(torch.relu(x))


STRUCTURES: dict[str, tuple[Any, int, set[type[Any]]]] = {
    "squeeze and excite": (SqueezeExcite, 8, {g.Multiply, g.Lookup}),
    "dense block": (Dense, 16, {g.Concat}),
    "shuffle unit": (ShuffleUnit, 8, {g.Slice, g.Shuffle, g.Concat}),
    "inception": (Inception, 16, {g.Concat, g.MaxPool}),
    "a ReLU of its own": (LateReLU, 8, {g.Lookup, g.Add}),
    "hard-swish": (lambda: conv(8, 8, nn.Hardswish()), 8, {g.Lookup}),
    "depthwise and dropout": (lambda: conv(8, 8, nn.ReLU6(), nn.Dropout(0.3), groups=8), 8, {g.Conv}),
    "same padding": (lambda: conv(8, 8, nn.ReLU(), kernel_size=(3, 5), dilation=2, padding="same"), 8, {g.Conv}),
    "ceil-mode pooling": (lambda: nn.MaxPool2d(3, 2, ceil_mode=True), 8, {g.MaxPool}),
}


def prepared(module: nn.Module, widths: str = "8,4,2", seed: int = 0) -> Any:
    """A calibrated quantized model with random batch-norm statistics."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        for parameter in getattr(layer, "weight", None), getattr(layer, "bias", None):
            if parameter is not None and not isinstance(layer, nn.BatchNorm2d):
                parameter.data = torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = torch.randn(layer.bias.shape, generator=generator) * 0.2
            layer.running_var = torch.rand(layer.bias.shape, generator=generator) + 0.3
    model = quantize_model(module.eval(), QuantScheme(parse_widths(widths)), Normalization((0.5,) * 3, (0.25,) * 3))
    calibrate(model, IMAGES, "minmax")
    return model.eval()


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_agree_with_the_simulation(name: str) -> None:
    make, features, expected = STRUCTURES[name]
    model = prepared(Net(make(), features))
    for width in model.control.widths:
        graph = lower(model, width, (3, 32, 32))
        assert expected <= {type(node) for node in graph.nodes}
        got = reference.run(graph, IMAGES)[graph.output]
        with torch.no_grad(), model.at(width):
            simulation = model(torch.from_numpy(IMAGES).float()).numpy()
            assert np.array_equal(Twin(graph)(torch.from_numpy(IMAGES)).numpy(), got)
        error = np.abs(got - simulation).mean() / simulation.std()
        assert error < {8: 0.02, 4: 0.15, 2: 0.6}[width.weight], (name, str(width), error)


def test_what_is_concatenated_has_one_type_and_scale() -> None:
    model = prepared(Net(Dense(), 16))
    graph = lower(model, Width(4, 4), (3, 32, 32))
    for node in graph.nodes:
        if isinstance(node, g.Concat):
            assert len({(graph.tensors[name].dtype, graph.tensors[name].scale) for name in node.inputs}) == 1
    joined = [q for q in model.activation_quantizers().values() if q.wide]
    assert joined
    assert all(q.limits()[0] == 0 and q.dtype(Width(4, 4)).signed for q in joined)


def test_a_batch_norm_of_its_own_is_a_depthwise_convolution() -> None:
    graph = lower(prepared(Net(Dense(), 16)), Width(2, 2), (3, 32, 32))
    alone = [node for node in graph.nodes if isinstance(node, g.Conv) and node.weight.shape[1:] == (1, 1, 1)]
    assert [len(node.weight) for node in alone] == [8, 12]
    assert all(set(np.abs(node.weight).ravel()) == {127} for node in alone)


def test_a_table_is_its_function_with_its_derivative() -> None:
    source = g.Tensor("x", (4, 1, 1), IntType(8, signed=True), 0.05)
    node = lookup("silu", source, nn.SiLU(), IntType(8, signed=True), 0.04)
    x = (np.arange(256) - 128) * 0.05
    exact = x / (1 + np.exp(-x)) / 0.04
    np.testing.assert_array_equal(node.table, np.clip(np.rint(exact), -128, 127))
    inside = np.rint(exact) <= 127
    np.testing.assert_allclose(node.slope[inside], np.gradient(exact)[inside], atol=0.03)
    assert not node.slope[~inside].any()


class Classifier(nn.Module):
    """Ends in a convolution and an average pool, as SqueezeNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last, self.pool = conv(3, 8, nn.ReLU(), stride=2), nn.Conv2d(8, 10, 1), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Any) -> Any:
        return torch.flatten(self.pool(torch.relu(self.last(self.stem(x)))), 1)


def test_a_network_may_end_in_a_pool() -> None:
    graph = lower(prepared(Classifier()), Width(2, 2), (3, 32, 32))
    last = graph.nodes[-1]
    assert isinstance(last, g.Dequantize)
    assert graph.tensors[last.input].dtype.bits == 8
    assert len(np.unique(last.scale)) == 1


FLATTENINGS = {
    "view by size": lambda x: x.view(x.size(0), -1), "view by shape": lambda x: x.view(x.shape[0], -1),
    "view by features": lambda x: x.view(-1, 8), "reshape": lambda x: x.reshape((x.size()[0], 8)),
    "flatten": lambda x: x.flatten(1),
}  # fmt: skip


class Flattened(nn.Module):
    def __init__(self, spelling: Any) -> None:
        super().__init__()
        self.stem, self.head, self.spelling = conv(3, 8, nn.ReLU(), stride=2), nn.Linear(8, 10), spelling

    def forward(self, x: Any) -> Any:
        return self.head(self.spelling(self.stem(x)))


@pytest.mark.parametrize("name", FLATTENINGS)
def test_every_spelling_of_flatten(name: str) -> None:
    spelling = FLATTENINGS[name]
    model = prepared(Flattened(lambda x: spelling(nn.functional.adaptive_avg_pool2d(x, 1))), "8")
    graph = lower(model, Width(8, 8), (3, 32, 32))
    assert sum(isinstance(node, g.Flatten) for node in graph.nodes) == 1
    assert graph.tensors[graph.nodes[-2].output].shape == (10,)


def test_a_mean_over_the_image_is_an_average_pool() -> None:
    graph = lower(prepared(Flattened(lambda x: x.mean([2, 3])), "8"), Width(8, 8), (3, 32, 32))
    assert [node.kernel for node in graph.nodes if isinstance(node, g.AveragePool)] == [(16, 16)]


class Scaled(nn.Module):
    def forward(self, x: Any) -> Any:
        return x * 2.0


class Halves(nn.Module):
    def forward(self, x: Any) -> Any:
        parts = x.chunk(2, dim=2)
        return torch.cat([parts[0], parts[1]], 3)


@pytest.mark.parametrize(("module", "message"), [(Scaled(), "mul.*two quantized"), (Halves(), r"chunk\(n, dim=1\)")])
def test_what_has_no_integer_form_is_named(module: nn.Module, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        lower(prepared(Net(module, 8)), Width(8, 8), (3, 32, 32))
