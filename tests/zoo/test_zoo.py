"""Ready models: names, cards, hashes, and that a wheel holds their files."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeguard import files, zoo
from edgeguard.errors import InputError

pytest.importorskip("torch")
pytest.importorskip("brevitas")

from packing import NAME, calibrated_run, load_script

ROOT = Path(__file__).resolve().parents[2]
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one packed model."""
    folder = tmp_path_factory.mktemp("zoo")
    script = load_script()
    model = script.pack(calibrated_run(folder / "run"), script.Packing(NAME), folder / "models")
    assert isinstance(model.path, Path)
    return model.path


@pytest.fixture
def model(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, and nothing else, as the models of the installation."""
    monkeypatch.setattr(zoo, "MODELS", tmp_path / "models")
    return shutil.copytree(packed, tmp_path / "models" / NAME)


def test_a_ready_model_is_a_run(model: Path) -> None:
    from edgeguard.run import Run

    assert zoo.names() == (NAME,)
    assert [found.name for found in zoo.models()] == [NAME]
    assert zoo.resolve(f"zoo:{NAME}") == model
    run = Run.load(zoo.resolve(f"zoo:{NAME}"))
    assert [str(width) for width in run.widths] == zoo.models()[0].card["widths"] == ["8", "2"]
    assert not run.load_model().training


def test_other_texts_are_paths() -> None:
    for text in ("runs/digits", "zoo", "./zoo:x", "/a/zoo:b"):
        assert zoo.resolve(text) == Path(text)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "x", "/etc", f"{NAME}/", f"./{NAME}", f"{NAME}/../{NAME}", NAME.upper(), "*", "\0"]
)
def test_unknown_names_and_tricks_are_refused(model: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"no ready model .*; expected one of {NAME}; .*harden --list"):
        zoo.resolve(f"zoo:{name}")


def test_an_installation_without_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "MODELS", tmp_path / "none")
    assert zoo.names() == zoo.models() == ()
    with pytest.raises(InputError, match="comes without any"):
        zoo.resolve(f"zoo:{NAME}")


@pytest.mark.parametrize("name", zoo.RUN_FILES)
def test_altered_and_missing_files_are_one_sentence(model: Path, name: str) -> None:
    content = bytearray((model / name).read_bytes())
    content[-2] ^= 1
    (model / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} was changed: .*SHA-256.*; install edgeguard again"):
        zoo.resolve(f"zoo:{NAME}")
    (model / name).unlink()
    with pytest.raises(InputError, match=rf"'{name}' is missing or not a file"):
        zoo.resolve(f"zoo:{NAME}")


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda card: card.pop(key)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda card: card.update(schema="edgeguard.zoo/2"), "is not of schema"),
        (lambda card: card.update(results={}), "'results' is missing or not a list"),
        (lambda card: card.update(name="other"), "describes 'other'"),
        (lambda card: card["files"].pop("config.json"), "no SHA-256 of config.json"),
        (lambda card: card["files"].update({"../run/config.json": "0"}), "missing or not a file of this folder"),
        *((without(key), "is not of schema" if key == "schema" else f"'{key}' is missing") for key in zoo.REQUIRED),
    ],
)
def test_wrong_cards_are_one_sentence(model: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    card = files.read_json(model / zoo.CARD)
    change(card)
    files.write_json(model / zoo.CARD, card)
    with pytest.raises(InputError, match=words):
        zoo.resolve(f"zoo:{NAME}")


def test_the_list_needs_no_torch(model: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "for name in ('torch', 'torchvision', 'brevitas', 'safetensors', 'onnx'): sys.modules[name] = None\n"
        f"from edgeguard import zoo; zoo.MODELS = pathlib.Path({str(model.parent)!r})\n"
        "sys.argv = ['edgeguard', 'harden', '--list']\n"
        "from edgeguard.cli import main; main()\n"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=model.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"zoo:{NAME}" in result.stdout


def test_a_wheel_holds_the_models(packed: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    for name in ("edgeguard", "export", "targets", "calib"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(packed, tmp_path / "edgeguard" / "zoo" / "models" / NAME)
    (tmp_path / "dist").mkdir()
    code = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("edgeguard/zoo/models/")}
        expected = sorted((tmp_path / "edgeguard").glob("zoo/models/*/*"))
        assert held == {path.relative_to(tmp_path).as_posix() for path in expected}
        assert f"edgeguard/zoo/models/{NAME}/card.json" in held
        for path in expected:
            assert archive.read(path.relative_to(tmp_path).as_posix()) == path.read_bytes()


@pytest.mark.parametrize("name", zoo.names())
def test_the_models_of_the_package_are_whole(name: str) -> None:
    from edgeguard.run import Run

    script = load_script()
    found = zoo.ZooModel.load(zoo.resolve(f"zoo:{name}"))
    run = Run.load(found.path)
    run.load_model()
    assert found.path.joinpath("checkpoint.safetensors").stat().st_size < 1.5 * MEGABYTE
    assert [str(width) for width in run.widths] == [result["width"] for result in found.card["results"]]
    assert {file.name for file in found.path.iterdir()} == {zoo.CARD, *found.card["files"]}
    for file in found.path.glob("*.json"):
        script.check_public(files.read_json(file))
    weights = found.card["weights"]
    assert (weights["sha256"] is None) == (weights["licence"] is None) == (weights["credit"] is None)
