"""torchvision's official files hold a state dict: an OrderedDict with `_metadata`, in some of them Parameters, old formats too."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
models = pytest.importorskip("torchvision.models")

from edgeguard.errors import InputError  # noqa: E402
from edgeguard.models import load_model  # noqa: E402


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("parameters", [True, False])
def test_files_as_torchvision_publishes_them(tmp_path: Path, new_format: bool, parameters: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = models.squeezenet1_1()
    state = module.state_dict(keep_vars=parameters)
    assert hasattr(state, "_metadata")
    path = tmp_path / "squeezenet1_1-b8a52dc0.pth"
    torch.save(state, path, _use_new_zipfile_serialization=new_format)
    loaded = load_model("torchvision/squeezenet1_1", weights=path)
    assert (loaded.num_classes, loaded.input_size) == (1000, 224)
    found = loaded.module.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in state.items())


def old_names(state: dict[str, Any]) -> OrderedDict[str, Any]:
    """What the layers were called when the DenseNets were published: norm.1.weight instead of norm1.weight."""
    renamed = OrderedDict()
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        head, layer, rest = key.partition("denselayer")
        for name in ("norm1", "norm2", "conv1", "conv2"):
            rest = rest.replace(f".{name}.", f".{name[:-1]}.{name[-1]}.")
        renamed[head + layer + rest] = value
    return renamed


def test_the_old_names_of_densenet(tmp_path: Path) -> None:
    module = models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=5)
    own = module.state_dict()
    state = old_names(own)
    assert "features.denseblock1.denselayer2.norm.1.running_mean" in state
    assert "features.denseblock1.denselayer2.norm1.running_mean" not in state
    changed = OrderedDict((key, value + 1) for key, value in state.items())
    from edgeguard.models import apply_weights

    apply_weights(module, changed, "densenet.pth")
    first = "features.denseblock2.denselayer1.conv"
    assert torch.equal(module.state_dict()[first + "2.weight"], changed[first + ".2.weight"])
    with pytest.raises(InputError, match=r"the model has no features\.denseblock9\.denselayer1\.norm\.1\.weight"):
        apply_weights(module, {**changed, "features.denseblock9.denselayer1.norm.1.weight": torch.zeros(1)}, "x")
