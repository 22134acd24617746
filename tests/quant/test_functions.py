import math

import pytest
import torch

from edgeguard.quant.functions import QuantizeActivation, ReplaceValue, RoundStraightThrough


def reference(x, log_scale, factor, low, high):
    """The same function with autograd's own operations and explicit straight-through estimators."""
    scale = torch.exp2(log_scale) * factor
    steps = (x / scale).clamp(low, high)
    return (steps + (steps.round() - steps).detach()) * scale


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0.0, 3.0), (-128.0, 127.0)])
def test_value_and_gradients_are_those_of_learned_step_sizes(low, high, channels_last):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, 3, 5, 4), generator=generator) * 2
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(x.shape, generator=generator)
    results = []
    for function in (QuantizeActivation.apply, reference):
        inputs, log_scale = x.clone().requires_grad_(), torch.tensor(-1.3, requires_grad=True)
        arguments = (inputs, log_scale, 0.5, low, high) + ((None,) if function is not reference else ())
        out = function(*arguments)
        (out * weight).sum().backward()
        results.append((out.detach(), inputs.grad, log_scale.grad))
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


def test_noise_scales_the_gradient_only():
    x = torch.linspace(-1, 1, 8).reshape(1, 2, 4, 1).requires_grad_()
    noise = torch.tensor([2.0, 0.5]).reshape(1, 2, 1, 1)
    out = QuantizeActivation.apply(x, torch.tensor(-4.0), 1.0, -128.0, 127.0, noise)
    out.sum().backward()
    assert torch.equal(x.grad, noise.expand(x.shape))
    assert (out - x).abs().max() <= 2**-5


def test_double_backward_works():
    x = torch.randn(4, 3, requires_grad=True)
    out = QuantizeActivation.apply(x * 2, torch.tensor(-3.0), 1.0, -128.0, 127.0, None)
    (gradient,) = torch.autograd.grad((out**2).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().max() > 0


def test_rounding_is_half_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, 300.0], requires_grad=True)
    out = RoundStraightThrough.apply(x, -128.0, 127.0)
    out.sum().backward()
    assert out.tolist() == [0.0, 2.0, 2.0, 0.0, 127.0]
    assert x.grad.tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]


def test_replace_value_passes_the_whole_gradient():
    x = torch.ones(3, requires_grad=True)
    (ReplaceValue.apply(x, torch.full((3,), 7.0)) * math.pi).sum().backward()
    assert torch.allclose(x.grad, torch.full((3,), math.pi))
