"""The deployed engine on ARM: the base install on an emulated aarch64 board says what this machine's engine says, bit for bit.

`EDGEGUARD_BOARD` names the folder that `prepare_board.sh` beside this file made. CIFAR-10 and its ready model are taken where
`EDGEGUARD_CIFAR10` is set, the embedded digits and theirs elsewhere. `benchmarks/board.py` does the same on 1,000 images.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_runner import execute
from serving import started

from edgeguard import files
from edgeguard.artifact import MANIFEST, Artifact
from edgeguard.data import load_dataset
from edgeguard.report.read import read_report
from edgeguard.targets import open_engine
from edgeguard.targets.asking import RemoteOptions
from edgeguard.targets.remote import RemoteEngine, read_remote

pytestmark = [pytest.mark.board, pytest.mark.slow]
SCRIPT = Path(__file__).with_name("prepare_board.sh")
IMAGES, BATCH = 50, 25
STARTUP, SECONDS = 300.0, 900.0
"""An emulated Python takes many times as long as this machine's, above all where others work on it too."""
REMOTE = RemoteOptions(timeout=SECONDS)


@dataclass(frozen=True)
class Board:
    """A folder made by `prepare_board.sh`. cpu: a model of qemu's, "max" with all instructions that it knows."""

    python: Path
    cpu: str = "max"

    @property
    def env(self) -> dict[str, str]:
        return {"QEMU_CPU": self.cpu, "OMP_NUM_THREADS": "1"}

    def serve(self, artifact: Artifact, folder: Path) -> Any:
        """`edgeguard serve` on the board, as a context manager."""
        command = [str(self.python), "-m", "edgeguard", "serve", str(artifact.path), "--port", "0", "--threads", "1"]
        return started([*command, "--timeout", str(SECONDS)], folder, self.env, STARTUP)

    def run(self, folder: Path, *arguments: object) -> str:
        """What `edgeguard ARGUMENTS` prints on the board, in a folder."""
        done = subprocess.run(
            [str(self.python), "-m", "edgeguard", *map(str, arguments)], cwd=folder, env={**os.environ, **self.env},
            capture_output=True, text=True, check=False, timeout=SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout


Export = Callable[[int], Artifact]


@pytest.fixture(scope="module")
def board() -> Board:
    folder = os.environ.get("EDGEGUARD_BOARD")
    if not folder:
        pytest.skip(f"EDGEGUARD_BOARD is not set; {SCRIPT.name} makes a board")
    return Board(Path(folder) / "bin" / "python")


@pytest.fixture(scope="module")
def data() -> str:
    """What to write after --data."""
    folder = os.environ.get("EDGEGUARD_CIFAR10")
    return f"npz:{folder}/cifar10-{{split}}.npz" if folder else "digits"


@pytest.fixture(scope="module")
def export(data: str, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """A ready model, exported at a width once for the module."""
    pytest.importorskip("torch")
    pytest.importorskip("onnx")
    made: dict[int, Artifact] = {}
    name = "zoo:resnet8-digits-qadtr" if data == "digits" else "zoo:resnet20-cifar10-qadtr"

    def export(bits: int) -> Artifact:
        if bits not in made:
            folder = tmp_path_factory.mktemp("board") / f"ready-{bits}"
            done = execute(folder.parent, "export", name, "--target", "ort", "--bits", bits, "--data", data, "--out", folder)
            assert done.returncode == 0, done.stderr
            made[bits] = Artifact.load(folder)
        return made[bits]

    return export


def test_the_base_install_alone_is_on_it(board: Board, tmp_path: Path) -> None:
    document = json.loads(board.run(tmp_path, "doctor", "--json"))
    assert document["cpu"]["machine"] == "aarch64"
    assert document["cpu"]["flags"] == [], "the host's flags are not this CPU's"
    assert document["cpu"]["saturates"] is False
    versions = {name: entry["version"] for name, entry in document["packages"].items()}
    assert versions["onnxruntime"]
    assert {versions[name] for name in ("torch", "onnx", "brevitas", "pillow")} == {None}


@pytest.mark.parametrize(("bits", "cpu"), [(8, "max"), (2, "cortex-a72")])
def test_the_served_engine_is_this_machines_bit_for_bit(
    board: Board, export: Export, data: str, tmp_path: Path, bits: int, cpu: str
) -> None:
    """cortex-a72 has no instructions for dot products of bytes: the runtime takes other kernels there."""
    artifact = export(bits)
    images = load_dataset(data, "test").images(np.arange(IMAGES))
    batches = [images[start : start + BATCH] for start in range(0, IMAGES, BATCH)]
    with open_engine(artifact) as local:
        expected = local(images)
    with Board(board.python, cpu).serve(artifact, tmp_path) as server:
        model = read_remote(server.url, REMOTE)
        with RemoteEngine(model, REMOTE) as engine:
            found = np.concatenate(list(engine.stream(batches)))
        assert server.stop() == 0
    assert model.claims["machine"] == "aarch64"
    assert model.claims["artifact_sha256"] == files.sha256(artifact.path / MANIFEST)
    assert np.unique(expected.argmax(1)).size > 5
    assert found.tobytes() == expected.tobytes()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The small ready model of the embedded digits at 4 bits."""
    pytest.importorskip("torch")
    pytest.importorskip("onnx")
    folder = tmp_path_factory.mktemp("digits")
    done = execute(folder, "export", "zoo:resnet8-digits-qadtr", "--target", "ort", "--bits", 4, "--out", "a4")
    assert done.returncode == 0, done.stderr
    return Artifact.load(folder / "a4")


def test_it_is_verified_from_here(board: Board, digits: Artifact, tmp_path: Path) -> None:
    """Values of the board's engine, gradients of its twin on this machine."""
    with board.serve(digits, tmp_path / "run") as server:
        done = execute(
            tmp_path, "verify", server.url, "--twin", digits.path, "--attack", "a-qapa", "--access", "engine",
            "--placement", "random", "--patch-size", 6, "--steps", 2, "--limit", 8, "--timeout", SECONDS, "--budget", "quick",
            "--out", "report",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "report" / "report.json")
    assert report["status"]["complete"]
    assert report["environment"]["engine"]["claims"]["machine"] == "aarch64"
    assert report["clean"]["bit_identical"] is True
    assert report["survival"]["verdict"] == "survived"
    assert {row["access"] for row in report["attacks"] if row["name"] == "aqapa"} == {"engine"}
    assert all(row["survival"]["bit_identical"] for row in report["attacks"])


def test_it_judges_as_this_machine_does(board: Board, digits: Artifact, tmp_path: Path) -> None:
    """`inspect`, `certify` and a query attack, on the board and here."""
    small = (digits.path, "--limit", 4, "--threads", 1)
    query = (*small, "--attack", "patch-rs", "--access", "query", "--per-image-limit", 2, "--queries", 10,
             "--universal-queries", 20, "--placement", "random", "--patch-size", 6, "--budget", "quick")  # fmt: skip
    commands = {
        "certificate": ("certify", *small, "--patch-size", 4, "--masks", 3),
        "report": ("verify", *query),
    }
    inspect = ("inspect", digits.path, "--json")
    assert json.loads(board.run(tmp_path, *inspect)) == json.loads(execute(tmp_path, *inspect).stdout)
    for name, command in commands.items():
        board.run(tmp_path, *command, "--out", f"{name}-board")
        here = execute(tmp_path, *command, "--out", f"{name}-here")
        assert here.returncode == 0, here.stderr
    there, here = (json.loads((tmp_path / f"certificate-{place}/certificate.json").read_text()) for place in ("board", "here"))
    different = {key for key in there if there[key] != here[key]}
    assert different <= {"environment", "seconds"}
    assert there["environment"]["engine"]["machine"] == "aarch64"

    reports = [read_report(tmp_path / f"report-{place}/report.json") for place in ("board", "here")]
    assert "aarch64" in reports[0]["environment"]["platform"]
    assert reports[0]["environment"]["engine"]["machine"] == "aarch64"
    assert reports[0]["patches"] == reports[1]["patches"], "a query attack sees equal logits, so it makes equal patches"
    figures = ("name", "access", "scope", "patch_size", "placement", "asr", "robust_accuracy", "n", "queries")
    assert [[row[key] for key in figures] for row in reports[0]["attacks"]] == [
        [row[key] for key in figures] for row in reports[1]["attacks"]
    ]
    assert {row["name"] for row in reports[0]["attacks"]} == {"noise", "patch-rs"}


def refused(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, check=False, timeout=60,
                          env={**os.environ, **env})  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="the board is for Linux")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "name the folder for the board"),
        (("a", "b"), "expected one folder, got also 'b'"),
        (("--nothing",), "there is no option --nothing"),
        (("a", "--mirror"), "--mirror needs a value"),
    ],
)
def test_wrong_use_of_the_script_is_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    done = refused(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("prepare_board.sh: ")
    assert done.stderr.count("\n") == 1
    assert sentence in done.stderr


def test_a_missing_pip_is_said(board: Board, tmp_path: Path) -> None:
    done = refused(str(tmp_path / "other"), PYTHON="/nonexistent/python3")
    assert done.returncode == 3
    assert "/nonexistent/python3 has no pip: apt-get install python3-pip" in done.stderr
    assert not (tmp_path / "other").exists()


def test_what_is_up_to_date_is_left(board: Board) -> None:
    folder = board.python.parents[1]
    stamps = [(folder / name).stat().st_mtime_ns for name in ("system", "stamp")]
    done = refused(str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}/bin/edgeguard\n"
    assert done.stderr == ""
    assert [(folder / name).stat().st_mtime_ns for name in ("system", "stamp")] == stamps
