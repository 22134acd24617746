"""Packing a run: what is kept, what is left out, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("brevitas")

import torch
from packing import NAME, calibrated_run, load_script
from report_example import attack, example_report
from safetensors.torch import load_file

from edgeguard import files
from edgeguard.errors import InputError
from edgeguard.report.html import render_html
from edgeguard.report.read import read_report
from edgeguard.run import Run
from edgeguard.statistics import wilson

OTHER_WEIGHTS = "ab" * 32


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return calibrated_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def changed(run: Run, tmp_path: Path) -> Callable[..., Run]:
    """A copy of the run with another configuration: changed(model={"weights_sha256": ...}) -> Run."""

    def make(**changes: dict[str, Any]) -> Run:
        folder = tmp_path / "changed"
        folder.mkdir()
        for name in ("checkpoint.safetensors", "metrics.jsonl"):
            (folder / name).write_bytes((run.path / name).read_bytes())
        merged = {key: {**run.config[key], **change} for key, change in changes.items()}
        files.write_json(folder / "config.json", {**run.config, **merged})
        return Run.load(folder)

    return make


@pytest.fixture
def report(run: Run, tmp_path: Path) -> Callable[..., Path]:
    """Writes a report on an artifact of the run at 2 bits: report("a", width="8") -> its folder."""

    def write(name: str, width: str = "2", checkpoint: str | None = None, **changes: Any) -> Path:
        document = example_report(**changes)
        document["artifact"] |= {
            "width": width, "source": {"run_checkpoint_sha256": checkpoint or files.sha256(run.checkpoint)}
        }  # fmt: skip
        document["environment"]["command"] = ["edgeguard", "verify", "/home/me/w2", "--data=npz:~/d.npz"]
        folder = tmp_path / name
        folder.mkdir()
        files.write_json(folder / "report.json", document)
        return folder

    return write


def test_only_the_model_is_kept(script: ModuleType, run: Run, tmp_path: Path) -> None:
    model = script.pack(run, script.Packing(NAME), tmp_path)
    kept, whole = load_file(model.path / "checkpoint.safetensors"), load_file(run.checkpoint)
    assert kept.keys() == {name for name in whole if name.startswith("model.")} < whole.keys()
    assert all(torch.equal(kept[name], whole[name]) for name in kept)
    packed = Run.load(model.path)
    assert packed.read_checkpoint()[1] == {"step": 0}
    assert packed.checkpoint.stat().st_size < run.checkpoint.stat().st_size - 9 * 4000
    assert packed.load_model().state_dict().keys() == run.load_model().state_dict().keys()
    assert {file.name for file in model.path.iterdir()} == {"card.json", *model.card["files"]}
    again = script.pack(run, script.Packing(NAME), tmp_path / "again")
    for file in model.path.iterdir():
        assert file.read_bytes() == (again.path / file.name).read_bytes()


def test_the_card_of_a_run_without_reports(script: ModuleType, run: Run, tmp_path: Path) -> None:
    card = script.pack(run, script.Packing(NAME), tmp_path).card
    assert (card["schema"], card["name"], card["method"], card["widths"]) == (
        "edgeguard.zoo/1",
        NAME,
        "ptq",
        ["8", "2"],
    )
    assert card["model"] == {"spec": "resnet8", "num_classes": 10}
    assert card["source"] == {"run_checkpoint_sha256": files.sha256(run.checkpoint)}
    assert card["weights"] == {"sha256": None, "licence": None, "credit": None}
    assert (card["training"]["seconds"], card["training"]["seed"]) == (None, 0)
    figures = files.read_json(run.path / "metrics.jsonl")["widths"]
    for width, result in zip(("8", "2"), card["results"], strict=True):
        accuracy = figures[width]["accuracy"]
        clean = {
            "accuracy": accuracy,
            "n": 20,
            "ci95": list(wilson(round(20 * accuracy), 20)),
            "measured": "simulation",
        }
        assert result == {"width": width, "clean": clean, "attacks": [], "failed_checks": []}


def test_reports_become_figures(script: ModuleType, run: Run, report: Callable[..., Path], tmp_path: Path) -> None:
    second = report(
        "b", attacks=[attack(0.7, patch_size=8)] * 3, trust=[{"check": "deterministic", "passed": False, "detail": ""}]
    )
    model = script.pack(run, script.Packing(NAME, reports=(report("a"), second / "report.json")), tmp_path)
    eight, two = model.card["results"]
    assert eight["attacks"] == []
    assert two["clean"] == {"accuracy": 0.9, "n": 100, "ci95": [0.83, 0.94], "measured": "engine"}
    assert [row["asr"] for row in two["attacks"]] == [0.45, 0.3, 0.35, 0.7, 0.7, 0.7]
    assert all(row.keys() == set(script.ATTACK_KEYS) for row in two["attacks"])
    assert two["failed_checks"] == ["deterministic"]
    assert {"report-2.json", "report-2-2.json"} < model.card["files"].keys()
    shipped = read_report(model.path / "report-2.json")
    assert shipped["examples"]["images"] == []
    assert shipped["patches"] == example_report()["patches"]
    assert shipped["environment"]["command"] == ["edgeguard", "verify", "w2", "--data=npz:d.npz"]
    assert "The report holds no images" in render_html(shipped)


def test_reports_that_say_nothing_of_the_run_are_refused(
    script: ModuleType, run: Run, report: Callable[..., Path], tmp_path: Path
) -> None:
    incomplete = {"complete": False, "reason": "the engine failed"}
    for folder, words in (
        (report("a", checkpoint="0" * 64), "is not of an artifact of"),
        (report("b", status=incomplete), "is incomplete: the engine failed"),
        (report("c", width="4"), "is of width '4'; those of .* are 8, 2"),
        (tmp_path / "missing", "does not exist"),
    ):
        with pytest.raises(InputError, match=words):
            script.pack(run, script.Packing(NAME, reports=(folder,)), tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_every_choice_reaches_the_card(script: ModuleType, changed: Callable[..., Run], tmp_path: Path) -> None:
    run = changed(model={"weights_sha256": OTHER_WEIGHTS}, data={"spec": "npz:/data/cifar10-{split}.npz"})
    plain = {"licence": "MIT", "credit": "somebody"}
    with pytest.raises(InputError, match=f"weights of SHA-256 {OTHER_WEIGHTS}; name their --licence"):
        script.pack(run, script.Packing("one"), tmp_path)
    first = script.pack(run, script.Packing("one", **plain), tmp_path)
    second = script.pack(run, script.Packing("two", "A net.", data="cifar10", seconds=12.5, **plain), tmp_path)
    assert first.card["weights"] == {"sha256": OTHER_WEIGHTS, **plain}
    assert (first.card["description"], second.card["description"]) == (
        "resnet8 on npz:cifar10-{split}.npz, by the method ptq.", "A net."
    )  # fmt: skip
    assert (first.card["training"]["seconds"], second.card["training"]["seconds"]) == (None, 12.5)
    assert [model.card["data"]["spec"] for model in (first, second)] == ["npz:cifar10-{split}.npz", "cifar10"]
    assert second.card["data"]["trained_as"] == "npz:cifar10-{split}.npz"
    config = files.read_json(second.path / "config.json")
    assert (config["data"]["spec"], config["training"]["data"]) == ("cifar10", "cifar10")


def test_known_weights_bring_their_license(script: ModuleType, changed: Callable[..., Run], tmp_path: Path) -> None:
    (digest,) = script.KNOWN_WEIGHTS
    weights = script.pack(changed(model={"weights_sha256": digest}), script.Packing("one"), tmp_path).card["weights"]
    assert weights["licence"] == "BSD-2-Clause"
    assert "Yerlan Idelbayev" in weights["credit"]


def test_paths_lose_their_folders(script: ModuleType, changed: Callable[..., Run], tmp_path: Path) -> None:
    run = changed(training={"weights": "/home/me/my nets/w.pt"}, data={"spec": "imagefolder:/home/me/images"})
    model = script.pack(run, script.Packing(NAME), tmp_path / "models")
    config = files.read_json(model.path / "config.json")
    assert config["training"]["weights"] == "w.pt"
    assert config["data"]["spec"] == "imagefolder:images"
    assert (
        config["command"] == model.card["training"]["command"] == "edgeguard calibrate --weights w.pt --data=npz:d.npz"
    )
    for file in model.path.iterdir():
        assert b"/home" not in file.read_bytes()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a/b/c.npz", "c.npz"), ("~/c.npz", "c.npz"), ("../c", "c"), ("./c", "c"), ("a/c.npz", "c.npz"),
        ("npz:/a/c-{split}.npz", "c-{split}.npz"), ("--data=npz:a/c.npz", "--data=npz:c.npz"),
        ("imagefolder:/a/b/", "imagefolder:b"), ("torchvision/resnet18", "torchvision/resnet18"), ("digits", "digits"),
        ("package.module:factory", "package.module:factory"), ("w4a8", "w4a8"), ("one / two.", "one / two."), ("", ""),
    ],
)  # fmt: skip
def test_public_texts(script: ModuleType, text: str, expected: str) -> None:
    found = script.public(text)
    assert found == ("npz:" + expected if text.startswith("npz:") else expected)


@pytest.mark.parametrize("text", ["x /home/me", "--out=/tmp/x", "see '~/x'", r"C:\me", "npz:../x.npz", r"\\server\x"])
def test_a_path_that_is_left_is_refused(
    script: ModuleType, changed: Callable[..., Run], tmp_path: Path, text: str
) -> None:
    with pytest.raises(InputError, match=r"a\.0\.b holds a path"):
        script.check_public({"a": [{"b": text}]})
    with pytest.raises(InputError, match=r"versions\.note holds a path"):
        script.pack(changed(versions={"note": f"at {text}"}), script.Packing(NAME), tmp_path / "models")
    assert not (tmp_path / "models" / NAME).exists()
    script.check_public({"pixels": text, "b": "a/b, 1/2, https://x and / or"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "../x"}, "no name of a ready model"),
        ({"name": "Upper"}, "no name of a ready model"),
        ({"name": "a--b"}, "no name of a ready model"),
        ({"seconds": 0.0}, "must be above 0"),
        ({"seconds": float("nan")}, "must be above 0"),
        ({"data": "npz:/data/c.npz"}, "is a path of this machine"),
        ({"licence": "MIT"}, "started from no weights"),
    ],
)
def test_bad_choices(script: ModuleType, run: Run, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        script.pack(run, script.Packing(**{"name": NAME, **changes}), tmp_path / "models")
    assert not (tmp_path / "models" / NAME).exists()


def test_unfinished_runs_are_refused(script: ModuleType, changed: Callable[..., Run], tmp_path: Path) -> None:
    run = changed()
    (run.path / "metrics.jsonl").write_text('{"step": 0, "widths": {"8": {"accuracy": 0.5, "n": 2}}}\n')
    with pytest.raises(InputError, match="lacks figures of a width"):
        script.pack(run, script.Packing(NAME), tmp_path)
    (run.path / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match="has not finished an epoch"):
        script.pack(run, script.Packing(NAME), tmp_path)
    files.write_json(run.path / "config.json", {**run.config, "command": "edgeguard 'harden"})
    with pytest.raises(InputError, match="command of the run cannot be read"):
        script.pack(Run.load(run.path), script.Packing(NAME), tmp_path)


def test_the_script(
    script: ModuleType, run: Run, report: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = ["make_zoo.py", str(run.path), "--name", NAME, "--models", str(tmp_path / "models"), "--reports",
                 str(report("a")), str(report("b", width="8")), "--seconds", "3", "--description", "A net."]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    assert f"edgeguard export zoo:{NAME} --bits 8" in capsys.readouterr().out
    card = files.read_json(tmp_path / "models" / NAME / "card.json")
    assert [len(result["attacks"]) for result in card["results"]] == [3, 3]
    assert (card["description"], card["training"]["seconds"]) == ("A net.", 3.0)
    with pytest.raises(SystemExit, match=r"make_zoo: .* exists already"):
        script.main()
