from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

from edgeguard.errors import InputError  # noqa: E402
from edgeguard.models import apply_weights, load_model, read_weights, resnet8, resnet20  # noqa: E402
from edgeguard.models import weights as module_under_test  # noqa: E402

Path_ = Path


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    return dict(load_model("resnet8", seed=5).module.state_dict())


@pytest.fixture
def stored(tmp_path: Path, state: dict[str, Any]) -> Path:
    path = tmp_path / "w.safetensors"
    safetensors.save_file(state, str(path))
    return path


def same(module: Any, state: dict[str, Any]) -> bool:
    return all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


def test_safetensors(stored: Path, state: dict[str, Any]) -> None:
    assert same(load_model("resnet8", weights=stored).module, state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        OrderedDict,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")},
    ],
    ids=["plain", "ordered", "state_dict", "module", "both", "no counters"],
)
def test_forms_of_a_state_dict(tmp_path: Path, state: dict[str, Any], wrap: Any) -> None:
    torch.save(wrap(state), tmp_path / "w.pt")
    assert same(load_model("resnet8", weights=tmp_path / "w.pt").module, state)


def test_the_old_format_of_torch(tmp_path: Path, state: dict[str, Any]) -> None:
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert same(load_model("resnet8", weights=tmp_path / "w.pth").module, state)


def test_half_precision_is_widened(tmp_path: Path, state: dict[str, Any]) -> None:
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    torch.save(half, tmp_path / "w.pt")
    assert load_model("resnet8", weights=tmp_path / "w.pt").module.conv1.weight.dtype == torch.float32


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.safetensors does not exist"):
        read_weights(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="is not a file"):
        read_weights(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_damaged_files(tmp_path: Path, state: dict[str, Any], suffix: str) -> None:
    path = tmp_path / f"w.{suffix}"
    safetensors.save_file(state, str(path)) if suffix == "safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2], whole[:100], b"\xff" * 8 + whole[8:], b"\0" * 5000):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"w\.{suffix} is truncated or not a weights file") as caught:
            read_weights(path)
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)


class Bomb:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path_.write_text, (self.path, "executed")


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, new_format: bool) -> None:
    trace = tmp_path / "trace"
    torch.save({"weight": Bomb(trace)}, tmp_path / "w.pt", _use_new_zipfile_serialization=new_format)
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(Bomb(trace), protocol=2))
    for name in ("w.pt", "w.pkl"):
        with pytest.raises(InputError, match="holds Python objects, which can run code and are refused") as caught:
            read_weights(tmp_path / name)
        assert "\n" not in str(caught.value)
    (tmp_path / "w4.pkl").write_bytes(pickle.dumps(Bomb(trace), protocol=4))
    with pytest.raises(InputError, match=r"w4\.pkl is truncated or not a weights file$"):
        read_weights(tmp_path / "w4.pkl")
    assert not trace.exists()


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(resnet8(), tmp_path / "w.pt")
    with pytest.raises(InputError, match="holds Python objects"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "holds no state dict"),
        ({}, "holds no state dict"),
        ([1, 2], "holds no state dict"),
        ({"epoch": 3}, "'epoch' names no tensor"),
        ({3: torch.zeros(1)}, "3 names no tensor"),
        ({"state_dict": {}}, "holds no state dict"),
    ],
)
def test_files_without_a_state_dict(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match=message):
        read_weights(tmp_path / "w.pt")


def test_a_zip_bomb_is_refused_by_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "MAX_BYTES", 1_000_000)
    with zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 2_000_000)
    assert (tmp_path / "w.pt").stat().st_size < 10_000
    with pytest.raises(InputError, match="unpacks to 2000000 bytes; at most 1000000 are read"):
        read_weights(tmp_path / "w.pt")


def test_another_architecture_names_what_is_missing(stored: Path, state: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        load_model("resnet20", weights=stored)
    text = str(caught.value)
    assert text.startswith(f"{stored} is of another architecture: it lacks layer1.1.conv1.weight, layer1.1.bn1.weight")
    assert text.endswith("more (60 in all)")
    assert text.count("layer") == 3
    with pytest.raises(InputError, match=r"the model has no layer1\.1\.conv1\.weight, .* and 69 more \(72 in all\)"):
        apply_weights(resnet8(), resnet20().state_dict(), "file")
    with pytest.raises(InputError, match=r"file is of another architecture: it lacks linear\.bias$"):
        apply_weights(resnet8(), {key: value for key, value in state.items() if key != "linear.bias"}, "file")


def test_other_shapes_are_named(stored: Path) -> None:
    with pytest.raises(
        InputError, match=r"linear\.weight \(10, 64\) instead of \(3, 64\), linear\.bias \(10,\) instead"
    ):
        load_model("resnet8", num_classes=3, weights=stored)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_name_their_key(state: dict[str, Any], value: float) -> None:
    bad = {key: tensor.clone() for key, tensor in state.items()}
    bad["layer2.0.bn1.running_var"][3] = value
    module = resnet8()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with pytest.raises(InputError, match=r"file: layer2\.0\.bn1\.running_var holds NaN or infinity"):
        apply_weights(module, bad, "file")
    assert same(module, before)


def test_values_too_large_for_float32(state: dict[str, Any]) -> None:
    bad = {**state, "linear.bias": torch.full((10,), 1e300, dtype=torch.float64)}
    with pytest.raises(InputError, match=r"linear\.bias holds NaN or infinity"):
        apply_weights(resnet8(), bad, "file")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_tensors_of_another_kind(state: dict[str, Any], dtype: Any) -> None:
    with pytest.raises(InputError, match=r"linear\.bias is torch\..*, expected torch\.float32"):
        apply_weights(resnet8(), {**state, "linear.bias": torch.zeros(10, dtype=dtype)}, "file")
