"""`edgeguard serve`, and `edgeguard verify` of what it serves, as they are typed."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_runner import Done, execute
from serving import serve_artifact
from small_artifact import labelled, small_graph, write_artifact

from edgeguard.report.read import read_report

Program = Callable[..., Done]
TOKEN = "a-secret-of-the-tests-alone"
DATA = ("--data", "npz:data.npz")
SMALL = ("--limit", "40", "--steps", "5", "--universal-queries", "100", "--patch-size", "4", "--placement", "random")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the artifact `a8` and with `data.npz`; nothing of it is trained, for nothing here needs that."""
    folder = tmp_path_factory.mktemp("serve")
    write_artifact(folder / "a8", small_graph(bits=8), "8")
    dataset = labelled(small_graph(bits=8), 160)
    images = np.ascontiguousarray(dataset.images(np.arange(len(dataset))).transpose(0, 2, 3, 1))
    np.savez(folder / "data.npz", images=images, labels=dataset.labels)
    return folder


@pytest.fixture
def program(workspace: Path) -> Program:
    return lambda *arguments: execute(workspace, *arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--host", "0.0.0.0"), "no token protects it"), (("--host", "::"), "no token protects it"),
        (("--tls-cert", "c.pem"), "both --tls-cert and --tls-key"),
        (("--tls-cert", "no", "--tls-key", "no"), "not a certificate"),
        (("--token-file", "missing"), "cannot read the token file"),
        (("--max-batch", "0"), "max-batch"), (("--port", "70000"), "port"),
        (("--name", "a/b"), "give --name"), (("--runtime", "gpu"), "unknown runtime"), (("--timeout", "-1"), "timeouts"),
        (("--host", "203.0.113.1", "--token-file", "token"), "cannot listen on 203.0.113.1"),
    ],
)  # fmt: skip
def test_what_serve_refuses(program: Program, workspace: Path, options: tuple[str, ...], message: str) -> None:
    (workspace / "token").write_text(TOKEN)
    done = program("serve", "a8", *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") <= 2
    assert done.stdout == ""


def test_a_port_that_is_taken(program: Program) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        done = program("serve", "a8", "--port", other.getsockname()[1])
    assert done.returncode == 2
    assert "Address already in use" in done.stderr


@pytest.mark.parametrize("secret", ["short", "with spaces in between", "", "\u00fcmlaut" * 5, "x" * 2000])
def test_secrets_that_are_none(program: Program, workspace: Path, secret: str) -> None:
    (workspace / "weak").write_text(secret)
    done = program("serve", "a8", "--token-file", "weak")
    assert done.returncode == 2
    assert "the token in weak" in done.stderr


def test_serve_and_verify(program: Program, workspace: Path, tmp_path: Path) -> None:
    (workspace / "token").write_text(f"{TOKEN}\n")
    options = ("--token-file", workspace / "token", "--quiet", "--name", "board-1")
    with serve_artifact(workspace / "a8", tmp_path, *options) as server:
        assert server.url.endswith("/v2/models/board-1")
        done = program("verify", server.url, *DATA)
        assert done.returncode == 3
        assert "401: a token is needed" in done.stderr
        asked = ("--budget", "quick", *DATA, *SMALL, "--json")
        done = program("verify", server.url, "--token-file", "token", "--twin", "a8", *asked, "--out", "far")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["artifact"]["remote"]["url"] == server.url
        assert TOKEN not in done.stdout
        assert report == read_report(workspace / "far" / "report.json")
        local = program("verify", "a8", *asked, "--out", "near")
        assert json.loads(local.stdout)["attacks"] == report["attacks"]
        done = program("verify", server.url, "--token-file", "token", *DATA, *SMALL, "--out", "blind")
        assert done.returncode == 0, done.stderr
        assert "Not tried: a-qapa-per-image" in done.stdout
        assert not (workspace / "blind.unfinished").exists()
        assert server.stop(signal.SIGINT) == 0
        assert server.log.read_text() == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("a8", "--twin", "a8"), 2, "--twin is for a remote engine"), (("a8", "--rate", "5"), 2, "--rate is for a remote engine"),
        (("http://127.0.0.1:1/v2",), 2, "is not the URL of a model"), (("grpc://127.0.0.1/v2/models/m",), 2, "names no port"),
        (("http://u:p@127.0.0.1:1/v2/models/m",), 2, "a URL with a password"),
        (("http://127.0.0.1:1/v2/models/m", "--patience", "0.2"), 3, "Connection refused"),
        (("http://127.0.0.1:1/v2/models/m", "--in-flight", "0"), 2, "1 to 64"),
        (("http://127.0.0.1:1/v2/models/m", "--twin", "nowhere"), 2, "nowhere is not an artifact"),
    ],
)  # fmt: skip
def test_what_verify_refuses(program: Program, arguments: tuple[str, ...], code: int, message: str) -> None:
    done = program("verify", *arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_needs_gradients_is_refused_when_it_is_asked_for(program: Program, workspace: Path, tmp_path: Path) -> None:
    with serve_artifact(workspace / "a8", tmp_path) as server:
        for options in (("--attack", "a-qapa"), ("--access", "engine"), ("--attack", "gap,patch-rs")):
            done = program("verify", server.url, *DATA, *options)
            assert done.returncode == 2
            assert "needs gradients" in done.stderr
        done = program("verify", server.url, *SMALL)
        assert done.returncode == 2
        assert "name labelled images with --data" in done.stderr
        done = program("verify", server.url, *DATA, "--runtime", "ort", "--attack", "patch-rs")
        assert done.returncode == 2
        assert "leave --runtime and --threads out" in done.stderr
