"""The view computes what the Brevitas model computes: bit for bit uncompiled, within rounding compiled."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torchvision.models import DenseNet, MobileNetV2, MobileNetV3, ShuffleNetV2, squeezenet1_1
from torchvision.models.mobilenetv3 import InvertedResidualConfig

from edgeguard.calib import calibrate
from edgeguard.data import load_dataset
from edgeguard.defences.gir import frozen_statistics
from edgeguard.errors import InputError
from edgeguard.models import load_model
from edgeguard.quant.functions import QuantizeActivation
from edgeguard.quant.model import Normalization, quantize_model
from edgeguard.quant.plain import normalize, normalize_eagerly, quantize_activation, quantize_weight
from edgeguard.quant.quantizers import GradientNoise, WeightQuantizer
from edgeguard.quant.scheme import QuantScheme
from edgeguard.quant.view import NO_MEAN_STEP, CompiledView, compiler_missing
from edgeguard.quant.width import WidthControl, parse_widths

PLAIN = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
WIDTHS = parse_widths("8,6,5,4,3,2,w4a8")
LABELS = torch.arange(6)
SIDES = {"resnet8": 16, "tiny": 16, "squeezenet": 48}
"""Of the images; all others take 32 pixels."""
# what torch.compile itself hides, but not from a filter that makes errors of warnings
quiet = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
needs_compiler = pytest.mark.skipif(compiler_missing() is not None, reason=str(compiler_missing()))


def tiny():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip


def vgg():
    """Max pools, SiLU, hidden linear layers, a convolution with bias, and a pool that only drops rows and columns."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3),
        nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((1, 1), (2, 1)), nn.Flatten(), nn.Linear(12 * 4 * 7, 20), nn.ReLU(),
        nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 10),
    )  # fmt: skip


BLOCKS = [InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 1.0),
          InvertedResidualConfig(16, 5, 32, 24, True, "HS", 2, 1, 1.0)]  # fmt: skip
NETS = {
    "resnet8": lambda: load_model("resnet8").module,
    "tiny": tiny,
    "vgg": vgg,
    "mobilenet_v2": partial(MobileNetV2, 10, 0.5, [[1, 16, 1, 1], [6, 24, 2, 2]]),
    "mobilenet_v3": partial(MobileNetV3, BLOCKS, 32, num_classes=10),
    "densenet": partial(DenseNet, 8, (2, 2), 16, num_classes=10),
    "squeezenet": partial(squeezenet1_1, num_classes=10),
    "shufflenet": partial(ShuffleNetV2, [2, 2, 2], [8, 16, 32, 64, 64], 10),
}


def images(name):
    side = SIDES.get(name, 32)
    return np.random.default_rng(0).integers(0, 256, (len(LABELS), 3, side, side), np.uint8)


def quantized(name):
    """A calibrated model of all widths in training mode, without dropout: its draws would have to be equal too.

    Its batch norms have seen data, so that scales fit what training sees and gradients arrive everywhere.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = NETS[name]()
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        if hasattr(layer, "inplace"):
            layer.inplace = False
    module.train()
    with torch.no_grad():
        for _ in range(20):
            module(batch(name) / 63.75 - 2.0)
    model = quantize_model(module.eval(), QuantScheme(WIDTHS), PLAIN)
    calibrate(model, images(name))
    return model.train()


@pytest.fixture(scope="module", params=NETS)
def twins(request):
    """The same model twice, the second with an uncompiled view of it, and pixels."""
    model = quantized(request.param)
    return model, copy.deepcopy(model), batch(request.param)


def batch(name):
    return torch.from_numpy(images(name)).float().contiguous(memory_format=torch.channels_last)


def magnitudes(model, found):
    """Hooks that add up, for each learned scale, the absolute terms of which its gradient is the sum."""

    def watch(quantizer, _arguments, result):
        if result[0].requires_grad:
            terms = result[0].detach().abs()
            name = next(f"scales.{n}.log_scale" for n, group in enumerate(model.groups()) if group is quantizer.group)
            result[0].register_hook(
                lambda g: found.__setitem__(name, found.get(name, 0.0) + math.log(2) * float((g.abs() * terms).sum()))
            )

    return [quantizer.register_forward_hook(watch) for quantizer in model.activation_quantizers().values()]


def passed(model, forward, pixels, width, sigma=0.0):
    """Logits, gradients by the pixels and by name, and buffers, after one pass and its backward."""
    model.zero_grad()
    model.noise.sigma = sigma
    model.noise.generator.manual_seed(7)
    pixels = pixels.clone().requires_grad_()
    with model.at(width):
        logits = forward(pixels)
    F.cross_entropy(logits, LABELS[: len(pixels)]).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), pixels.grad, gradients, {name: b.clone() for name, b in model.named_buffers()}


def relative(got, expected):
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))


def same_pass(model, forward, other, pixels, width, sigma=0.0):
    """One pass of both is the same; logits and gradients of what was compared are returned."""
    terms = {}
    handles = magnitudes(model, terms)
    logits, by_pixels, gradients, buffers = passed(model, model, pixels, width, sigma)
    for handle in handles:
        handle.remove()
    got_logits, got_by_pixels, got_gradients, got_buffers = passed(other, forward, pixels, width, sigma)
    assert torch.equal(got_logits, logits)
    assert relative(got_by_pixels, by_pixels) < 1e-5
    assert got_gradients.keys() == gradients.keys()
    others = [name for name in gradients if not name.endswith("log_scale")]
    assert relative(*(torch.cat([g[name].flatten() for name in others]) for g in (got_gradients, gradients))) < 1e-5
    for name, gradient in gradients.items():
        if name not in others:
            # a sum of many terms of both signs that nearly cancel: what rounding leaves is a share of the terms
            assert (got_gradients[name] - gradient).abs().max() <= 1e-5 * terms[name] + 1e-12, name
        else:
            # so are gains that a later batch norm undoes; they are small
            assert relative(got_gradients[name], gradient) < 2e-4, name
    for name, buffer in buffers.items():
        # where the view lies channels last and the model does not, PyTorch sums in another order
        torch.testing.assert_close(got_buffers[name], buffer, rtol=1e-5, atol=1e-6, msg=name)
        assert buffer.is_floating_point() or torch.equal(got_buffers[name], buffer)
    return logits, gradients


def test_uncompiled_it_is_the_model_at_every_width(twins):
    model, other, pixels = twins
    forward = CompiledView(other, compiled=False)
    seen = [same_pass(model, forward, other, pixels, width)[0] for width in WIDTHS]
    assert all(not torch.equal(a, b) for n, a in enumerate(seen) for b in seen[:n])


def test_gradient_noise_is_drawn_alike(twins):
    model, other, pixels = twins
    forward = CompiledView(other, compiled=False)
    for width in WIDTHS[::3]:
        _, plain = same_pass(model, forward, other, pixels, width)
        _, noisy = same_pass(model, forward, other, pixels, width, sigma=0.4)
        assert any(relative(noisy[name], gradient) > 1e-3 for name, gradient in plain.items())


def test_evaluation_mode_and_frozen_statistics(twins):
    model, other, pixels = twins
    forward = CompiledView(other, compiled=False)
    before = {name: buffer.clone() for name, buffer in other.named_buffers()}
    with frozen_statistics(model), frozen_statistics(other):
        same_pass(model, forward, other, pixels, WIDTHS[3], sigma=0.4)
    model.eval()
    other.eval()
    same_pass(model, forward, other, pixels, WIDTHS[3], sigma=0.4)
    model.train()
    other.train()
    assert all(torch.equal(buffer, before[name]) for name, buffer in other.named_buffers() if "sentinel" not in name)


def test_a_single_frozen_batch_norm_stays_frozen():
    model = quantized("tiny")
    model.body.get_submodule("1").norms[0].eval()
    other = copy.deepcopy(model)
    same_pass(model, CompiledView(other, compiled=False), other, batch("tiny"), WIDTHS[0])
    norms = [other.body.get_submodule(name).norms[0] for name in "14"]
    assert [int(norm.num_batches_tracked) for norm in norms] == [20, 21]  # 20 before, in float


def test_the_first_noisy_pass_leaves_modes_as_they_are():
    model = quantized("tiny")
    with frozen_statistics(model):
        modes = [module.training for module in model.modules()]
        passed(model, CompiledView(model, compiled=False), batch("tiny"), WIDTHS[0], sigma=0.4)
        assert [module.training for module in model.modules()] == modes


def test_scales_set_later_are_seen():
    model, pixels = quantized("tiny").eval(), batch("tiny")
    forward = CompiledView(model, compiled=False)
    with torch.no_grad():
        before = forward(pixels)
        for quantizer in model.activation_quantizers().values():
            quantizer.set_exponent(0, int(quantizer.exponent[0]) + 2)
        after = forward(pixels)
        assert not torch.equal(before, after)
        assert torch.equal(after, model(pixels))


def test_modules_of_like_names_are_kept_apart():
    class Alike(nn.Module):
        def __init__(self):
            super().__init__()
            self.input_quantizer = nn.Conv2d(3, 4, 3, bias=False)
            self.a = nn.Sequential(nn.MaxPool2d(2))
            self.a_0 = nn.AvgPool2d(3)
            self.linear = nn.Linear(4 * 2 * 2, 3)

        def forward(self, x):
            return self.linear(torch.flatten(self.a_0(self.a(self.input_quantizer(x))), 1))

    model = quantize_model(Alike(), QuantScheme(WIDTHS), PLAIN)
    pixels = batch("tiny")
    calibrate(model, images("tiny"))
    assert torch.equal(CompiledView(model, compiled=False)(pixels), model(pixels))


def test_a_batch_norm_without_momentum_is_refused():
    module = tiny()
    module[4].momentum = None
    with pytest.raises(InputError, match=r"layer '_4'.*momentum None.*--no-compile"):
        CompiledView(quantize_model(module, QuantScheme(WIDTHS), PLAIN))


def activation_result(function, x, noise, low=-8.0, high=7.0, ceiling=None, scale=0.13):
    x, scale = x.clone().requires_grad_(), torch.tensor(scale, requires_grad=True)
    out = function(x, scale, torch.tensor(low), torch.tensor(high), ceiling, noise)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape).sin()
    (out * weight).sum().backward()
    return out.detach(), x.grad, scale.grad, float((weight * out.detach()).abs().sum()) / float(scale.detach())


def normal(*shape, spread=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) * spread


@pytest.mark.parametrize("shape", [(4, 6, 5, 3), (4, 6)])
@pytest.mark.parametrize("ceiling", [None, 0.6])
@pytest.mark.parametrize("noisy", [False, True])
def test_activations_are_those_of_the_quantizers_function(shape, ceiling, noisy):
    x, noise = normal(*shape), normal(*shape[:2]) if noisy else None

    def brevitas(x, scale, low, high, ceiling, noise):
        top = min(float(high), round(ceiling / float(scale.detach()))) if ceiling else float(high)
        noise = None if noise is None else noise.view(*shape[:2], *[1] * (x.dim() - 2))
        return QuantizeActivation.apply(x, scale.log2(), 1.0, float(low), top, noise)

    expected = activation_result(brevitas, x, noise, scale=0.125)
    got = activation_result(quantize_activation, x, noise, ceiling=ceiling, scale=0.125)
    if ceiling is not None:
        assert float(got[0].max()) == 0.625  # 0.6 / 0.125 is 4.8 steps, rounded to 5
        expected = activation_result(brevitas, x, noise, high=5.0, scale=0.125)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert abs(float(got[2] - expected[2])) < 1e-6 * expected[3]


@pytest.mark.parametrize("width", WIDTHS, ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 3, 2), (5, 7)])
def test_weights_are_those_of_the_weight_quantizer(width, shape):
    weight = normal(*shape)
    weight[1] = 0.0
    control = WidthControl(WIDTHS)
    control.select(width)
    quantizer = WeightQuantizer(control, QuantScheme(WIDTHS), "inner")
    qmax = torch.tensor(float(quantizer.dtype(width).qmax))
    step = {4: 0.44, 3: 0.83, 2: 1.4}.get(width.weight, NO_MEAN_STEP)
    leaf = weight.clone().requires_grad_()
    out = quantize_weight(leaf, qmax, torch.tensor(step))
    assert torch.equal(out, quantizer(weight)[0])
    out.sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))


def norm_result(function, x, training):
    x = x.clone().requires_grad_()
    channels = x.shape[1]
    weight, bias = torch.linspace(0.5, 1.5, channels).requires_grad_(), torch.linspace(-1, 1, channels).requires_grad_()
    mean, var = torch.linspace(-0.2, 0.2, channels), torch.linspace(0.8, 1.2, channels)
    out = function(x, mean, var, weight, bias, training, 0.3, 1e-5)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape).sin()).sum().backward()
    return out.detach(), x.grad, weight.grad, bias.grad, mean, var


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
def test_batch_norm_is_pytorchs(training, channels_last):
    x = normal(4, 6, 5, 3, spread=3.0) + 2
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    results = zip(norm_result(normalize, x, training), norm_result(normalize_eagerly, x, training), strict=True)
    for got, expected in results:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=3e-6)


@needs_compiler
@quiet
@pytest.mark.slow
def test_compiled_parts_are_the_uncompiled_ones():
    x = normal(4, 6, 5, 3, spread=3.0).contiguous(memory_format=torch.channels_last)
    noise = GradientNoise()
    noise.sigma = 0.3
    factors = noise.draw(torch.empty(4, 6))
    for drawn in (None, factors):
        expected = activation_result(quantize_activation, x, drawn, ceiling=0.8)
        got = activation_result(torch.compile(quantize_activation, dynamic=False), x, drawn, ceiling=0.8)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        assert abs(float(got[2] - expected[2])) < 1e-6 * expected[3]
    weight, arguments = normal(5, 3, 3, 2), (torch.tensor(7.0), torch.tensor(0.44))
    compiled = torch.compile(quantize_weight, dynamic=False)(weight, *arguments)
    torch.testing.assert_close(compiled, quantize_weight(weight, *arguments), rtol=1e-6, atol=0)
    got = norm_result(torch.compile(normalize, dynamic=False), x, True)
    for value, expected in zip(got, norm_result(normalize, x, True), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=3e-6)


@needs_compiler
@quiet
@pytest.mark.slow
def test_one_graph_serves_all_widths_and_computes_what_the_model_does():
    model = quantized("tiny")
    other, pixels = copy.deepcopy(model), batch("tiny")
    counters.clear()
    CompiledView(copy.deepcopy(model), compiled=False)(pixels)
    assert not counters["stats"]["unique_graphs"]
    forward = CompiledView(other)
    passed(other, forward, pixels, WIDTHS[0])
    passed(other, forward, pixels, WIDTHS[0], sigma=0.4)
    assert counters["stats"]["unique_graphs"] == 2  # with noise and without
    with torch.compiler.set_stance("fail_on_recompile"):
        for number, width in enumerate(WIDTHS):
            for sigma in (0.0, 0.4):
                expected = passed(model, model, pixels, width, sigma)
                got = passed(other, forward, pixels, width, sigma)
                torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
                assert relative(got[1], expected[1]) < 1e-4
                for name, gradient in expected[2].items():
                    assert relative(got[2][name], gradient) < 1e-3, name
            tracked = other.body.get_submodule("1").norms[number].num_batches_tracked
            assert int(tracked) == 20 + 2 + 2 * (number == 0)  # 20 before, in float
        with pytest.raises(RuntimeError, match="fail_on_recompile"):
            passed(other, forward, pixels[:4], WIDTHS[0])


def curve(forward, model, dataset, steps=50):
    """Losses of plain training with a width drawn for each batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    rng, losses = np.random.default_rng(0), []
    for _ in range(steps):
        chosen = rng.choice(len(dataset), 16, replace=False)
        pixels = torch.from_numpy(dataset.images(chosen)).float().contiguous(memory_format=torch.channels_last)
        with model.at(WIDTHS[int(rng.integers(len(WIDTHS)))]):
            loss = F.cross_entropy(forward(pixels), torch.from_numpy(dataset.labels[chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return np.array(losses)


@needs_compiler
@quiet
@pytest.mark.slow
def test_the_loss_curve_is_the_models_up_to_what_rounding_does():
    """Quantization amplifies rounding: two runs of the model itself part once weights differ in their last bit.

    A single activation that rounds the other way moves logits by tenths.
    """
    dataset = load_dataset("digits", "train", 16)
    start = quantized("resnet8")
    calibrate(start, dataset.images(np.arange(32)))
    model, nudged, other = (copy.deepcopy(start) for _ in range(3))
    with torch.no_grad():
        for weight in nudged.body.parameters():
            weight.copy_(torch.nextafter(weight, torch.full_like(weight, math.inf)))
    expected = curve(model, model, dataset)
    natural = np.abs(curve(nudged, nudged, dataset) - expected)
    found = np.abs(curve(CompiledView(other), other, dataset) - expected)
    assert expected[-10:].mean() < 0.9 * expected[:10].mean()
    assert found[0] < 0.1
    assert natural.mean() > 0
    assert found.mean() < 3 * natural.mean()
    assert found.max() < 3 * natural.max()
