"""A verification that is cut short: by an engine that fails, or by a crash after which the same command goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeguard import files
from edgeguard.artifact import Artifact
from edgeguard.data.dataset import Dataset
from edgeguard.errors import EngineError
from edgeguard.report.html import render_html
from edgeguard.report.read import check_report
from edgeguard.report.summary import format_summary
from edgeguard.targets.reference import ReferenceEngine
from edgeguard.verify import Gate, VerifyOptions, verify

Options = Callable[..., VerifyOptions]
SLOW = {"attacks": ("a-qapa", "patch-rs"), "accesses": ("transfer", "engine", "query"), "universal_queries": 600}


class Failing:
    """Stands before the engine's logits and, after so many images, raises or answers something else."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, images: int, fault: Callable[[Any], Any]) -> None:
        self.left, self.fault, self.inner = images, fault, ReferenceEngine._logits
        monkeypatch.setattr(ReferenceEngine, "_logits", lambda engine, pixels: self.answer(engine, pixels))

    def answer(self, engine: ReferenceEngine, pixels: Any) -> Any:
        logits = self.inner(engine, pixels)
        self.left -= len(pixels)
        return logits if self.left > 0 else self.fault(logits)


def die(logits: Any) -> Any:
    raise EngineError("the device went away")


def only_failing(monkeypatch: pytest.MonkeyPatch, images: int, fault: Callable[[Any], Any]) -> Failing:
    return Failing(monkeypatch, images, fault)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (die, "the device went away"),
        (lambda logits: logits * np.float32(np.nan), "not finite"),
        (lambda logits: logits[:, 1:], "expected"),
    ],
)
def test_what_was_found_before_the_engine_failed_is_kept(
    artifact: Artifact, dataset: Dataset, quick: Options, monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Any], Any], reason: str,
) -> None:  # fmt: skip
    only_failing(monkeypatch, 300, fault)
    report = check_report(verify(artifact, dataset, quick(), gate=Gate(max_asr=1.0)))
    assert report["status"]["complete"] is False
    assert reason in report["status"]["reason"]
    assert 0 < len(report["attacks"]) < 3
    assert all(check["passed"] is None for check in report["trust"])
    assert report["gate"]["passed"] is False
    assert report["heat_map"] is None
    assert reason in format_summary(report)
    render_html(report)


def test_an_engine_that_never_worked_is_an_error(
    artifact: Artifact, dataset: Dataset, quick: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_failing(monkeypatch, 0, die)
    with pytest.raises(EngineError, match="went away"):
        verify(artifact, dataset, quick())


def timeless(report: dict[str, Any]) -> str:
    return files.to_json({key: value for key, value in report.items() if key != "timing"})


class CrashError(Exception):
    pass


@pytest.mark.parametrize("after", [2, 6, 9])
def test_a_second_call_goes_on_and_ends_with_the_same_report(
    artifact: Artifact, dataset: Dataset, quick: Options, tmp_path: Path, after: int
) -> None:
    options, seen = quick(**SLOW), set()

    def crash(stage: str, done: int, total: int) -> None:
        seen.add(stage)
        if len(seen) > after:
            raise CrashError

    uninterrupted = verify(artifact, dataset, options)
    with pytest.raises(CrashError):
        verify(artifact, dataset, options, progress=crash, stages=tmp_path / "stages")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "stages").iterdir()}
    assert kept
    report = verify(artifact, dataset, options, stages=tmp_path / "stages")
    assert timeless(report) == timeless(uninterrupted)
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "stages").iterdir()}
    assert len(now) > len(kept)
    assert all(now.get(name) in (None, time) for name, time in kept.items())


def test_stages_of_other_options_are_not_taken(
    artifact: Artifact, dataset: Dataset, quick: Options, tmp_path: Path
) -> None:
    first = verify(artifact, dataset, quick(steps=3), stages=tmp_path / "stages")
    other = verify(artifact, dataset, quick(steps=4), stages=tmp_path / "stages")
    assert timeless(other) == timeless(verify(artifact, dataset, quick(steps=4)))
    assert timeless(first) != timeless(other)
