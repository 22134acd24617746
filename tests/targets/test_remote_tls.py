"""A remote engine over TLS: which certificates are trusted, by whose word, and that nothing is sent to a server that is not."""

from __future__ import annotations

import re
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command_runner import execute
from serving import Served, serve_artifact
from small_artifact import labelled, small_graph, write_artifact

from edgeguard.errors import EngineError
from edgeguard.targets.asking import RemoteOptions
from edgeguard.targets.reference import ReferenceEngine
from edgeguard.targets.remote import RemoteEngine, read_remote

TOKEN = "a-secret-of-the-tests-alone"
CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def options(**changes: object) -> RemoteOptions:
    return RemoteOptions(timeout=10.0, patience=0.5, token=TOKEN, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ca.pem`, `other-ca.pem`, and certificates of the first for `right` (127.0.0.1) and `wrong` (another host)."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("keys")

    def run(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], cwd=folder, check=True, capture_output=True)

    for name in ("ca", "other-ca"):
        run("req", "-x509", *CURVE, "-days", "2", "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}",
            "-addext", "keyUsage=critical,keyCertSign")  # fmt: skip
    for name, host in (("right", "IP:127.0.0.1,DNS:localhost"), ("wrong", "DNS:board.example")):
        (folder / f"{name}.ext").write_text(f"subjectAltName={host}\nbasicConstraints=CA:FALSE\n")
        run("req", *CURVE, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        run("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
            "-extfile", f"{name}.ext", "-out", f"{name}.pem")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("model") / "a8", small_graph(bits=8), "8").path


def serving(name: str, keys: Path, artifact: Path, folder: Path) -> Iterator[Served]:
    (folder / "token").write_text(TOKEN)
    tls = ("--tls-cert", keys / f"{name}.pem", "--tls-key", keys / f"{name}.key", "--token-file", folder / "token")
    with serve_artifact(artifact, folder, *tls) as server:
        yield server


@pytest.fixture(scope="module")
def right(keys: Path, artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serving("right", keys, artifact, tmp_path_factory.mktemp("right"))


@pytest.fixture(scope="module")
def wrong(keys: Path, artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serving("wrong", keys, artifact, tmp_path_factory.mktemp("wrong"))


def refused(server: Served, asked: RemoteOptions, reason: str) -> None:
    """With a sentence, before anything of the request was sent."""
    with pytest.raises(EngineError, match=f"the server's certificate is not trusted: .*{reason}") as caught:
        read_remote(server.url, asked)
    assert re.fullmatch(r"[^\n]{1,500}", str(caught.value))
    assert not [line for line in server.lines() if line["event"] == "request"]


def test_an_unknown_authority_is_not_trusted(right: Served, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    refused(right, options(), "certificate")
    refused(right, options(authority=keys / "other-ca.pem"), "certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(keys / "other-ca.pem"))
    refused(right, options(), "certificate")


def test_a_certificate_of_another_host_is_not_trusted(wrong: Served, keys: Path) -> None:
    refused(wrong, options(authority=keys / "ca.pem"), "127.0.0.1")


@pytest.mark.parametrize("how", ["option", "variable"])
def test_a_named_authority_is_trusted(
    right: Served, keys: Path, artifact: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    if how == "variable":
        if ssl.get_default_verify_paths().openssl_cafile_env != "SSL_CERT_FILE":
            pytest.skip("this OpenSSL reads another variable")
        monkeypatch.setenv("SSL_CERT_FILE", str(keys / "ca.pem"))
    asked = options(authority=keys / "ca.pem") if how == "option" else options()
    graph = small_graph(bits=8)
    images = labelled(graph, 5).images(np.arange(5))
    with RemoteEngine(read_remote(right.url, asked), asked) as engine:
        np.testing.assert_array_equal(engine(images), ReferenceEngine(graph)(images))
    by_name = right.url.replace("127.0.0.1", "localhost")
    assert read_remote(by_name, asked).logits.shape[1] == 5


def test_the_command(right: Served, wrong: Served, keys: Path, tmp_path: Path) -> None:
    dataset = labelled(small_graph(bits=8), 40)
    images = np.ascontiguousarray(dataset.images(np.arange(len(dataset))).transpose(0, 2, 3, 1))
    np.savez(tmp_path / "data.npz", images=images, labels=dataset.labels)
    (tmp_path / "token").write_text(TOKEN)
    small = ("--data", "npz:data.npz", "--attack", "patch-rs", "--universal-queries", "20", "--patch-size", "4", "--limit", "20",
             "--placement", "random", "--token-file", "token", "--patience", "0.5")  # fmt: skip
    for server, more in ((right, ()), (wrong, ("--tls-ca", keys / "ca.pem"))):
        done = execute(tmp_path, "verify", server.url, *small, *more, "--out", "r")
        assert done.returncode == 3
        assert "the server's certificate is not trusted" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "r").exists()
    done = execute(tmp_path, "verify", right.url, *small, "--tls-ca", keys / "ca.pem", "--out", "r")
    assert done.returncode == 0, done.stderr
