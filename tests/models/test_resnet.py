from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import fx, nn  # noqa: E402

from edgeguard.models import resnet8, resnet20, resnet32, resnet44, resnet56  # noqa: E402
from edgeguard.models.resnet import BasicBlock  # noqa: E402

PARAMETERS = {resnet8: 75_290, resnet20: 269_722, resnet32: 464_154, resnet44: 658_586, resnet56: 853_018}


@pytest.mark.parametrize(("factory", "count"), PARAMETERS.items(), ids=lambda value: getattr(value, "__name__", value))
def test_sizes(factory: object, count: int) -> None:
    module = factory()  # type: ignore[operator]
    assert sum(p.numel() for p in module.parameters()) == count
    layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == int(factory.__name__.removeprefix("resnet"))  # type: ignore[attr-defined]
    assert module.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_num_classes_and_other_image_sizes() -> None:
    assert resnet8(3).eval()(torch.zeros(1, 3, 48, 48)).shape == (1, 3)


def test_names_are_those_of_the_published_weights() -> None:
    names = set(resnet20().state_dict())
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "linear.weight", "linear.bias", *(f"bn1.{name}" for name in norm)}
    for block in (f"layer{stage}.{index}" for stage in (1, 2, 3) for index in range(3)):
        expected |= {f"{block}.conv1.weight", f"{block}.conv2.weight"}
        expected |= {f"{block}.{layer}.{name}" for layer in ("bn1", "bn2") for name in norm}
    assert names == expected


def test_shortcut_takes_every_second_pixel_and_pads_the_channels() -> None:
    block = BasicBlock(16, 32, 2)
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    assert block.shortcut is not None
    out = block.shortcut(x)
    assert out.shape == (2, 32, 4, 4)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()
    assert BasicBlock(16, 16, 1).shortcut is None


def test_traceable_with_modules_that_are_used_once() -> None:
    module = resnet20().eval()
    traced = fx.symbolic_trace(module)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(traced(x), module(x))
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert len(called) == len(set(called))
    functions = {node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"}
    assert functions == {"add", "pad", "flatten"}
