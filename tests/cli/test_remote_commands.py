"""`edgeguard attack` and `edgeguard certify` on an engine on a server: what they find on the same engine here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest
from command_runner import execute
from serving import TOY_SHAPE, Served, serve_artifact, toy_images, toy_logits
from small_artifact import small_graph, write_artifact

from edgeguard.targets.reference import ReferenceEngine

QUERY = ("--attack", "patch-rs,patch-rs-per-image", "--queries", "150", "--image-queries", "20", "--patch-size", "4",
         "--judge-limit", "16", "--per-image-limit", "6")  # fmt: skip
CERTIFY = ("--patch-size", "2x3", "--limit", "10", "--masks", "8", "--attack-check", "--attack-places", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the artifact `a` and labelled images."""
    made = tmp_path_factory.mktemp("remote")
    graph = small_graph()
    write_artifact(made / "a", graph, "4")
    noise = graphs.random_images(graph.input_shape, 40, 5).astype(int)
    images = (100 + 10 * np.arange(40)[:, None, None, None] // 3 + noise // 8).clip(0, 255).astype(np.uint8)
    labels = ReferenceEngine(graph)(images).argmax(1).astype(np.int64)
    np.savez(made / "images.npz", images=images.transpose(0, 2, 3, 1), labels=labels)
    return made


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve_artifact(folder / "a", tmp_path_factory.mktemp("served")) as server:
        yield server


def run(folder: Path, *arguments: object) -> Any:
    done = execute(folder, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def found(document: Any) -> Any:
    """Of a certificate, what must not depend on where the engine is."""
    return {key: value for key, value in document.items() if key not in ("artifact", "environment", "seconds")}


def test_certify(folder: Path, served: Served, tmp_path: Path) -> None:
    data = ("--data", "npz:images.npz", "--batch-size", "16")
    here = run(folder, "certify", "a", *data, *CERTIFY, "--out", tmp_path / "here")
    far = run(folder, "certify", served.url, *data, *CERTIFY, "--in-flight", "2", "--out", tmp_path / "far")
    twin = run(folder, "certify", served.url, "--twin", "a", *data, *CERTIFY, "--out", tmp_path / "twin")
    assert found(here) == found(far) == found(twin)
    assert 0 < here["certified"]["correct"] < here["n"]
    assert far["environment"]["engine"]["url"] == served.url
    assert far["artifact"]["sha256"] == here["artifact"]["sha256"]
    assert twin["artifact"]["remote"]["claims_twins_artifact"] is True


def test_attack_through_queries(folder: Path, served: Served, tmp_path: Path) -> None:
    data = ("--data", "npz:images.npz")
    here = run(folder, "attack", "a", *data, *QUERY, "--out", tmp_path / "here")
    far = run(folder, "attack", served.url, *data, *QUERY, "--out", tmp_path / "far")
    assert here["patches"] == far["patches"]
    assert here["artifact"]["sha256"] == far["artifact"]["sha256"]
    replayed = run(folder, "verify", "a", *data, "--bundle", tmp_path / "far", "--out", tmp_path / "replayed")
    assert {row["access"] for row in replayed["attacks"]} == {"replay"}


def test_attack_with_values_from_there_and_gradients_from_here(folder: Path, served: Served, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    options = ("--data", "npz:images.npz", "--steps", "6", "--patch-size", "4", "--judge-limit", "10", "--attack", "a-qapa")
    here = run(folder, "attack", "a", *options, "--out", tmp_path / "here")
    far = run(folder, "attack", served.url, "--twin", "a", *options, "--out", tmp_path / "far")
    assert [one["access"] for one in here["patches"]] == ["engine"]
    assert here["patches"] == far["patches"]


def test_over_grpc(tmp_path: Path) -> None:
    pytest.importorskip("tritonclient.grpc")
    pytest.importorskip("grpc")
    from grpc_server import Fake, running

    images = toy_images(30, seed=4)
    np.savez(tmp_path / "toy.npz", images=images.transpose(0, 2, 3, 1), labels=toy_logits(images).argmax(1).astype(np.int64))
    with running(Fake()) as fake:
        proven = run(tmp_path, "certify", fake.url, "--data", "npz:toy.npz", "--patch-size", "1", "--masks", "4", "--out", "c")
        made = run(tmp_path, "attack", fake.url, "--data", "npz:toy.npz", "--attack", "patch-rs", "--queries", "150",
                   "--patch-size", "2", "--judge-limit", "10", "--out", "b")  # fmt: skip
        report = run(tmp_path, "verify", fake.url, "--data", "npz:toy.npz", "--bundle", "b", "--placement", "random", "--out", "r")
    assert proven["artifact"]["input_shape"] == list(TOY_SHAPE)
    assert proven["environment"]["engine"]["transport"] == report["environment"]["engine"]["transport"] == "gRPC"
    assert proven["clean"]["accuracy"] == 1.0
    assert made["artifact"]["sha256"] == "unknown"
    assert 0 < made["patches"][0]["queries"] <= 150
    assert report["attacks"][0]["access"] == "replay"


@pytest.mark.parametrize("command", ["attack", "certify"])
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["a", "--twin", "a"], 2, "--twin is for a remote engine"), (["a", "--rate", "5"], 2, "--rate is for a remote engine"),
        (["http://127.0.0.1:1/v2"], 2, "is not the URL of a model"),
        (["http://127.0.0.1:1/v2/models/m", "--patience", "0.1"], 3, "Connection refused"),
        (["grpc://127.0.0.1:1/v2/models/m", "--patience", "0.1"], 3, "UNAVAILABLE"),
    ],
)  # fmt: skip
def test_bad_calls(folder: Path, tmp_path: Path, command: str, arguments: list[str], code: int, words: str) -> None:
    if arguments[0].startswith("grpc"):
        pytest.importorskip("grpc")
    done = execute(folder, command, *arguments, "--data", "npz:images.npz", "--out", tmp_path / "o")
    assert done.returncode == code, done.stderr
    assert words in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "o").exists()


def test_what_a_server_cannot_be_asked(folder: Path, served: Served, tmp_path: Path) -> None:
    for arguments, words in (
        (["attack", served.url], "a-qapa: it needs gradients, and there is no twin of the remote engine"),
        (["attack", served.url, *QUERY, "--runtime", "ort"], "a remote engine has a runtime and threads of its own"),
        (["certify", served.url, "--threads", "2"], "a remote engine has a runtime and threads of its own"),
        (["certify", served.url, "--patch-size", "99"], "99"),
    ):
        done = execute(folder, *arguments, "--data", "npz:images.npz", "--out", tmp_path / "o")
        assert done.returncode == 2, done.stderr
        assert words in done.stderr.strip().splitlines()[-1]
    done = execute(folder, "certify", served.url, "--out", tmp_path / "o")
    assert done.returncode == 2
    assert "name labelled images with --data" in done.stderr
