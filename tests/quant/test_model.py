import pytest
import torch
from torch import nn

from edgeguard.errors import ExportError, InputError
from edgeguard.models import load_model
from edgeguard.quant.model import Normalization, activation_quantizer, quantize_model, weight_quantizer
from edgeguard.quant.scheme import QuantScheme
from edgeguard.quant.width import Width, parse_widths

PLAIN = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
SCHEME = QuantScheme(parse_widths("8,4,2"))


def quantized(module=None, scheme=SCHEME):
    return quantize_model(module or load_model("resnet8").module, scheme, PLAIN)


def test_roles_of_a_residual_net():
    model = quantized()
    roles = {name: (q.role, q.signed) for name, q in model.activation_quantizers().items()}
    assert len(roles) == 11
    assert list(roles.values()).count(("residual", True)) == 3
    assert list(roles.values()).count(("boundary", False)) == 1
    layers = {n: weight_quantizer(m).role for n, m in model.body.named_modules() if weight_quantizer(m) is not None}
    assert layers["conv1"] == layers["linear"] == "boundary"
    assert set(layers.values()) == {"boundary", "inner"}


def test_an_addition_and_its_inputs_share_one_learned_scale():
    model = quantized()
    sizes = sorted(len(model.members(group)) for group in model.scales)
    assert sizes == [1, 1, 1, 1, 7]  # three blocks' inner activations, the pool; stem, branches and sums together


def test_one_write_switches_every_quantizer_and_batch_norm():
    model = quantized().eval()
    for group in model.scales:
        group.log_scale.data.fill_(-4.0)
    pixels = torch.randint(0, 256, (2, 3, 32, 32)).float()
    with torch.no_grad():
        outputs = {}
        for width in SCHEME.widths:
            model.control.select(width)
            for name, module in model.body.named_modules():
                quantizer = weight_quantizer(module)
                if quantizer is not None:
                    integers, _ = quantizer.integers(module.weight)
                    assert quantizer.dtype(width).allowed(integers.int().numpy()), name
            outputs[width] = model(pixels)
    assert not torch.equal(outputs[Width(8, 8)], outputs[Width(2, 2)])


def test_every_value_is_an_integer_of_its_type():
    model = quantized().eval()
    for group in model.scales:
        group.log_scale.data.fill_(-3.0)
    seen = {}
    for name, quantizer in model.activation_quantizers().items():
        layer = model.body.get_submodule(name)
        layer.register_forward_hook(lambda _m, _i, out, q=quantizer, n=name: seen.__setitem__(n, (q, out)))
    with torch.no_grad(), model.at(Width(4, 4)):
        model(torch.randint(0, 256, (2, 3, 32, 32)).float())
    for name, (quantizer, out) in seen.items():
        steps = out / quantizer.scale()
        assert torch.allclose(steps, steps.round(), atol=1e-3), name
        with model.at(Width(4, 4)):
            assert quantizer.dtype(Width(4, 4)).allowed(steps.round().int().numpy()), name


def test_the_callers_model_is_not_changed():
    module = load_model("resnet8").module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    quantized(module).body.get_submodule("conv1").weight.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert type(module.conv1) is nn.Conv2d


def test_input_covers_every_pixel_without_clipping():
    model = quantized()
    pixels = torch.arange(256).float().view(1, 1, 16, 16).expand(1, 3, 16, 16).clone().requires_grad_()
    out = model.input_quantizer(pixels)
    real = (pixels.detach() / 255 - 0.5) / 0.25
    assert (out - real).abs().max() <= 1.01 * model.input_quantizer.step
    out.sum().backward()
    assert pixels.grad.min() > 0


class Sequence(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.GELU(), "layers_1.*GELU"),
        (nn.InstanceNorm2d(4), "layers_1.*InstanceNorm2d"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "layers_1.*reflect"),
        (nn.BatchNorm2d(4, track_running_stats=False), "layers_1.*running statistics"),
    ],
)
def test_layers_without_an_integer_form_are_named(layer, message):
    with pytest.raises(ExportError, match=message):
        quantized(Sequence(layer))


def test_control_flow_cannot_be_traced():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="cannot be traced"):
        quantized(Branching())


def test_relu6_is_a_limit():
    model = quantized(Sequence(nn.BatchNorm2d(4), nn.ReLU6())).eval()
    quantizer = activation_quantizer(model.body.get_submodule(next(iter(model.activation_quantizers()))))
    quantizer.group.log_scale.data.fill_(-2.0)
    assert quantizer.limits() == (0, 24)


def test_scheme_is_validated():
    with pytest.raises(InputError, match="at least one"):
        QuantScheme(())
    with pytest.raises(InputError, match="bit-width 9"):
        QuantScheme(parse_widths("4"), boundary_bits=9)


def test_widths_of_training_alone_are_finer_and_not_cut_by_a_target():
    scheme = QuantScheme(parse_widths("12,8"), max_weight_bits=7)
    twelve, eight = scheme.widths
    assert [scheme.weight_type("inner", width).bits for width in (twelve, eight)] == [12, 7]
    assert [scheme.activation_type("inner", False, width).qmax for width in (twelve, eight)] == [4095, 255]
    assert scheme.weight_type("boundary", twelve).bits == 7
