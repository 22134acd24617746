"""`edgeguard calibrate`, `doctor` and `bench`, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_runner import execute

Outcome = tuple[int, str, str]
Program = Callable[..., Outcome]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    """Runs the program in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        done = execute(tmp_path, *arguments)
        return done.returncode, done.stdout, done.stderr

    return run


CALIBRATE = ["calibrate", "--model", "resnet8", "--image-size", "16", "--calibration-images", "16", "--eval-limit", "20",
             "--estimator", "minmax"]  # fmt: skip


def test_from_calibration_to_bench(program: Program, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    code, out, err = program(*CALIBRATE, "--bits", "8,2", "--patched", "0.5", "--out", "run", "--json")
    assert code == 0, err
    assert "no --weights" in err
    document = json.loads(out)
    assert (document["schema"], document["run"]) == ("edgeguard.calibrate/1", "run")
    assert document["metrics"]["widths"].keys() == {"8", "2"}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["command"].startswith("edgeguard calibrate")
    code, out, err = program("export", "run", "--bits", "2", "--target", "ort-legacy", "--proof-images", "2", "--out", "a")
    assert code == 0, err
    assert "target ort-legacy" in out
    code, out, err = program("bench", "a", "--batch", "1,3", "--rounds", "2", "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [(row["model"], row["batch"]) for row in rows] == [("ort", 1), ("float32", 1), ("ort", 3), ("float32", 3)]
    for row in rows:
        assert 0 < row["latency_ms"]["median"] <= row["latency_ms"]["p95"]
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["latency_ms"]["median"] * 1e3)
    assert [row["speedup"]["median"] for row in rows if row["model"] == "float32"] == [1.0, 1.0]
    code, out, _ = program("bench", "a", "--batch", "1", "--rounds", "1", "--runtime", "reference")
    assert code == 0
    assert "reference" in out
    for arguments, words in {
        ("bench", "run"): "not an artifact", ("bench", "a", "--batch", "0"): "batch sizes must be 1 to",
        ("bench", "a", "--batch", "x"): "--batch 'x' is not", ("bench", "a", "--rounds", "0"): "at least one round",
        ("bench", "a", "--batch", "1,1"): "names a size twice", ("bench", "a", "--runtime", "tpu"): "unknown runtime",
        ("harden", "--resume", "run"): "was calibrated, not trained",
        ("harden", "--target", "tpu"): "unknown target 'tpu'",
        ("export", "run", "--bits", "8", "--target", "ort-avx2"): "at most 7 bits",
    }.items():  # fmt: skip
        code, out, err = program(*arguments)
        assert (code, out) == (2, ""), arguments
        assert words in err.strip().splitlines()[-1]
        assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bits", "17"], "bit-width 17"),
        (["--bits", "8,9"], "no integer engine runs 9 bits; calibrate at 8 bits or fewer"),
        (["--estimator", "median"], "unknown estimator 'median'"),
        (["--patched", "2"], "must be 0 to 1"),
        (["--patch", "missing.npz"], "no share of images"),
        (["--target", "missing.toml"], "cannot read the target profile: missing.toml does not exist"),
        (["--threads", "-1"], "--threads must be 0 or more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_options_of_calibrate(program: Program, tmp_path: Path, arguments: list[str], words: str) -> None:
    code, out, err = program(*CALIBRATE, *arguments)
    assert (code, out) == (2, "")
    assert words in err.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_doctor(program: Program) -> None:
    code, out, _ = program("doctor", "--json")
    assert code == 0
    assert json.loads(out)["schema"] == "edgeguard.doctor/1"
    code, out, _ = program("doctor")
    assert code == 0
    assert "ort-legacy" in out


def test_help_names_them(program: Program) -> None:
    code, out, _ = program("--help")
    assert code == 0
    assert all(name in out for name in ("calibrate", "bench", "doctor"))
