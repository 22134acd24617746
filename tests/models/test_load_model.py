from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from edgeguard.errors import InputError, MissingDependency  # noqa: E402
from edgeguard.models import IMAGENET_MEAN, IMAGENET_STD, MODELS, load_model  # noqa: E402

FACTORIES = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, **attributes):
        super().__init__()
        self.linear = nn.Linear(3, classes)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.linear(x.mean((2, 3)))

def plain(): return Net(4)
def sized(num_classes=5):
    return Net(num_classes, mean=(0.5, 0.4, 0.3), std=torch.tensor([0.1, 0.2, 0.3]), input_size=16)
def free(**options): return Net(options.get("num_classes", 6))
def bad_mean(): return Net(4, mean=(0.5, 0.5))
def text_mean(): return Net(4, mean="grey")
def nan_mean(): return Net(4, mean=(0.5, 0.5, float("nan")))
def zero_std(): return Net(4, std=(0.1, 0.0, 0.1))
def bad_size(): return Net(4, input_size="large")
def headless(): return nn.Flatten()
def stated():
    module = nn.Flatten()
    module.num_classes = 12
    return module
def features():
    module = nn.Conv2d(3, 4, 1)
    module.input_size = 8
    return module
def too_small():
    module = nn.Conv2d(3, 4, 9)
    module.input_size = 8
    return module
def fails(): raise RuntimeError("no luck")
def text(): return "model"
constant = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "edgeguard_test_factories"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def equal(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True))


def test_our_models() -> None:
    model = load_model("resnet8")
    assert (model.spec, model.num_classes, model.input_size) == ("resnet8", 10, 32)
    assert (model.mean, model.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert not model.module.training
    assert load_model("resnet8", num_classes=43).num_classes == 43
    assert list(MODELS) == ["resnet8", "resnet20", "resnet32", "resnet44", "resnet56"]


def test_initial_weights_follow_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second, other = (load_model("resnet8", seed=seed).module for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(first, second)
    assert not equal(first, other)


def test_classes_come_from_the_weights(tmp_path: Path) -> None:
    torch.save(load_model("resnet8", num_classes=7).module.state_dict(), tmp_path / "w.pt")
    assert load_model("resnet8", weights=tmp_path / "w.pt").num_classes == 7


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "resnet21",
            r"unknown model 'resnet21'; expected resnet8, .* or package\.module:factory",
        ),
        ("", "unknown model ''; expected"),
        ("torchvision/resnet19", "torchvision has no classifier 'resnet19'; expected a name such as .*resnet18"),
        ("torchvision/", "torchvision has no classifier ''"),
        ("torchvision/fcn_resnet50", "torchvision has no classifier 'fcn_resnet50'"),
        ("no_such_package.models:net", "cannot import 'net' from 'no_such_package.models'"),
        ("math:no_such_function", "cannot import 'no_such_function' from 'math'"),
        (":factory", "cannot import 'factory' from ''"),
        ("math:pi", "math:pi is a float; expected a function"),
        ("math:sqrt", "math:sqrt failed: TypeError"),
    ],
)
def test_unknown_models(spec: str, message: str) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(InputError, match=message):
        load_model(spec)


@pytest.mark.parametrize("classes", [1, 0, -3])
def test_too_few_classes(classes: int) -> None:
    with pytest.raises(InputError, match=f"at least 2 classes, got {classes}"):
        load_model("resnet8", num_classes=classes)


def test_torchvision(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    model = load_model("torchvision/squeezenet1_1", num_classes=5)
    assert (model.num_classes, model.input_size, model.mean) == (5, 224, IMAGENET_MEAN)
    torch.save(model.module.state_dict(), tmp_path / "w.pt")
    again = load_model("torchvision/squeezenet1_1", weights=tmp_path / "w.pt", seed=9)
    assert again.num_classes == 5
    assert equal(again.module, model.module)


def test_torchvision_models_with_auxiliary_outputs() -> None:
    pytest.importorskip("torchvision")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_model("torchvision/googlenet", num_classes=5)
    model.module.train()
    assert model.module(torch.zeros(2, 3, 64, 64)).shape == (2, 5)


def test_factories(factories: str) -> None:
    plain = load_model(f"{factories}:plain")
    assert (plain.num_classes, plain.input_size, plain.mean) == (4, None, IMAGENET_MEAN)
    sized = load_model(f"{factories}:sized", num_classes=8)
    assert (sized.num_classes, sized.input_size, sized.mean) == (8, 16, (0.5, 0.4, 0.3))
    assert sized.std == pytest.approx((0.1, 0.2, 0.3))
    assert load_model(f"{factories}:sized").num_classes == 5
    assert load_model(f"{factories}:free", num_classes=9).num_classes == 9
    assert load_model(f"{factories}:stated").num_classes == 12


def test_the_search_path_is_left_as_it_was(factories: str) -> None:
    before = list(sys.path)
    load_model(f"{factories}:plain")
    with pytest.raises(InputError):
        load_model(f"{factories}:nothing")
    assert sys.path == before


def test_a_factory_that_fixes_its_classes(factories: str) -> None:
    assert load_model(f"{factories}:plain", num_classes=4).num_classes == 4
    with pytest.raises(InputError, match="makes a model of 4 classes, but 3 are needed"):
        load_model(f"{factories}:plain", num_classes=3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bad_mean", r"mean must be three finite numbers, got \[0\.5, 0\.5\]"),
        ("text_mean", "mean must be three numbers, got 'grey'"),
        ("nan_mean", "mean must be three finite numbers"),
        ("zero_std", "std must be positive"),
        ("bad_size", "input_size must be a number of pixels, got 'large'"),
        ("headless", "no linear layer to count its classes by; set its attribute num_classes"),
        ("features", r"must return logits \(N, classes\)"),
        ("too_small", "cannot run on one image of 8 pixels"),
        ("fails", "fails failed: RuntimeError: no luck"),
        ("text", "returned a str; expected a torch module"),
        ("constant", "is a int; expected a function"),
    ],
)
def test_wrong_factories(factories: str, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(f"{factories}:{name}")


def test_without_torchvision_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(MissingDependency, match=r'pip install "edgeguard\[train\]"'):
        load_model("torchvision/resnet18")
