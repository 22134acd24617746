"""Verifying an engine on a server: the same findings, patch for patch, as on the same engine in the process."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Served, serve_artifact
from small_artifact import labelled, small_graph, write_artifact

from edgeguard import files
from edgeguard.artifact import Artifact
from edgeguard.data.dataset import Dataset
from edgeguard.errors import EngineError, InputError
from edgeguard.patch import Patch
from edgeguard.report.html import render_html
from edgeguard.report.read import check_report
from edgeguard.report.summary import format_summary
from edgeguard.targets.asking import RemoteOptions
from edgeguard.targets.remote import read_remote
from edgeguard.verify import Gate, Remote, VerifyOptions, verify, without_gradients

Options = Callable[..., VerifyOptions]
ALL = {
    "attacks": ("a-qapa", "a-qapa-per-image", "patch-rs", "patch-rs-per-image"), "accesses": ("transfer", "engine", "query"),
    "placements": ("random", "worst"), "universal_queries": 200, "queries": 12, "per_image_limit": 10, "batch_size": 16,
    "limit": 48,
}  # fmt: skip
QUERY = {**ALL, "attacks": ("patch-rs", "patch-rs-per-image"), "accesses": ("query",)}


@pytest.fixture(scope="module")
def served(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve_artifact(artifact.path, tmp_path_factory.mktemp("served")) as server:
        yield server


def remote(served: Served, twin: Artifact | None, **options: Any) -> Remote:
    settings = RemoteOptions(**{"patience": 2.0, **options})
    return Remote(read_remote(served.url, settings), twin, settings)


def shared(report: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on where the engine is."""
    found = ("clean", "attacks", "aggregated", "seen_unseen", "survival", "trust", "heat_map", "patches", "examples")
    return {part: report[part] for part in (*found, "data", "options")}


def test_every_access_finds_the_same_patches_and_rates(
    artifact: Artifact, dataset: Dataset, quick: Options, served: Served
) -> None:
    pytest.importorskip("torch")
    options = quick(**ALL)
    local = verify(artifact, dataset, options)
    found = check_report(verify(remote(served, artifact), dataset, options))
    assert shared(found) == shared(local)
    assert len(found["attacks"]) > 8
    assert {attack["access"] for attack in found["attacks"]} == {"none", "transfer", "engine", "query"}
    assert found["clean"]["bit_identical"] is True
    assert found["survival"]["verdict"] == "survived"
    assert found["environment"]["engine"]["runtime"] == "remote"
    assert found["environment"]["engine"]["url"] == served.url
    assert found["artifact"]["remote"]["claims_twins_artifact"] is True
    assert found["artifact"]["integer_mac_coverage"] == 1.0
    assert "server gives the outputs" in found["divergence"]["reason"]
    assert f"remote engine at {served.url}" in format_summary(found)
    assert served.url in render_html(found)


def test_without_a_twin_queries_and_replay(
    artifact: Artifact, dataset: Dataset, quick: Options, served: Served, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    Patch(rng.integers(0, 256, (3, 4, 4), np.uint8), np.ones((4, 4), bool)).save(tmp_path / "patch.npz")
    options = quick(**{**QUERY, "accesses": ("replay", "query")}, replay=(tmp_path / "patch.npz",))
    kept, skipped = without_gradients(("a-qapa", "gap", "patch-rs"))
    assert kept == ("patch-rs",)
    found = check_report(verify(remote(served, None), dataset, options, skipped=skipped))
    local = verify(artifact, dataset, options)
    for row, expected in zip(found["attacks"], local["attacks"], strict=True):
        twins = {"twin_asr", "survival", "seen"}
        assert {key: row[key] for key in row.keys() - twins} == {key: expected[key] for key in row.keys() - twins}
    assert {row["access"] for row in found["attacks"]} == {"none", "replay", "query"}
    assert found["clean"]["twin"] is found["survival"] is found["divergence"] is None
    assert [one["attack"] for one in found["skipped"]] == ["a-qapa", "gap"]
    assert found["artifact"]["integer_mac_coverage"] is None
    assert found["artifact"]["width"] == "4"
    text = format_summary(found)
    assert "without a twin" in text
    assert "Not tried: a-qapa; it needs gradients" in text
    assert "it needs gradients" in render_html(found)


def test_gradients_without_a_twin_are_refused(dataset: Dataset, quick: Options, served: Served, artifact: Artifact) -> None:
    with pytest.raises(InputError, match="a-qapa: it needs gradients, and there is no twin"):
        verify(remote(served, None), dataset, quick())
    for wrong in ({"runtime": "ort"}, {"threads": 2}):
        with pytest.raises(InputError, match="of its own"):
            verify(remote(served, artifact), dataset, quick(**wrong))


def test_nothing_left_of_a_budget_is_a_search_through_queries() -> None:
    assert without_gradients(("a-qapa",))[0] == ("patch-rs",)


def test_another_twin_says_nothing_of_integers(dataset: Dataset, quick: Options, served: Served, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    other = write_artifact(tmp_path / "other", small_graph(bits=8, seed=3), "8")
    gate = Gate(require_integer=True, require_survival=True)
    found = check_report(verify(remote(served, other), dataset, quick(), gate=gate))
    assert found["artifact"]["remote"]["claims_twins_artifact"] is False
    assert found["artifact"]["integer_mac_coverage"] is None
    assert found["clean"]["bit_identical"] is False
    rules = {rule["rule"]: rule for rule in found["gate"]["rules"]}
    assert not rules["require_integer"]["passed"]
    assert "does not even claim" in rules["require_integer"]["detail"]


def test_data_and_twins_that_do_not_fit(dataset: Dataset, quick: Options, served: Served, tmp_path: Path) -> None:
    import graphs

    from edgeguard import graph as g

    builder = graphs.Builder(4, (3, 8, 8), 0)
    x = builder.move(g.Flatten, builder.conv(builder.quantize(), 4, stride=2, bits=8))
    small = write_artifact(tmp_path / "small", builder.finish(builder.linear(x, 5, bits=8, accumulators=True)), "4")
    with pytest.raises(InputError, match="takes images of"):
        verify(remote(served, small), labelled(small.graph(), 40), quick())
    with pytest.raises(InputError, match="has images of shape"):
        verify(remote(served, None), labelled(small.graph(), 40), quick(**QUERY))


def timeless(report: dict[str, Any]) -> str:
    return files.to_json({key: value for key, value in report.items() if key != "timing"})


@pytest.mark.parametrize("after", [2, 5])
def test_a_lost_server_leaves_a_report_and_the_same_call_goes_on(
    artifact: Artifact, dataset: Dataset, quick: Options, tmp_path: Path, after: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as placeholder:
        port = placeholder.getsockname()[1]
    options, seen = quick(**QUERY), set()
    with serve_artifact(artifact.path, tmp_path / "whole", "--port", port) as server:
        whole = verify(remote(server, None), dataset, options)
    with serve_artifact(artifact.path, tmp_path / "cut", "--port", port) as server:
        def cut(stage: str, done: int, total: int) -> None:
            seen.add(stage)
            if len(seen) > after:
                server.process.kill()

        target = remote(server, None, patience=0.3)
        broken = check_report(verify(target, dataset, options, progress=cut, stages=tmp_path / "stages"))
    assert broken["status"]["complete"] is False
    assert f"{server.url}: " in broken["status"]["reason"]
    assert "tried" in broken["status"]["reason"]
    assert 0 < len(broken["attacks"]) < len(whole["attacks"])
    with pytest.raises(EngineError, match="no connection"):
        verify(target, dataset, options, stages=tmp_path / "stages")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "stages").iterdir()}
    assert kept
    with serve_artifact(artifact.path, tmp_path / "again", "--port", port) as server:
        report = verify(remote(server, None), dataset, options, stages=tmp_path / "stages")
    assert timeless(report) == timeless(whole)
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "stages").iterdir()}
    assert all(now.get(name) in (None, time) for name, time in kept.items())
