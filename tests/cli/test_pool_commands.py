"""Pools from the command line: exported from one run, inspected, opened and verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import graphs
import numpy as np
import pytest
from command_runner import Done, execute

from edgeguard.errors import InputError
from edgeguard.pool_artifact import Pool
from edgeguard.report.read import check_report
from edgeguard.targets import open_engine
from edgeguard.targets.random_precision import RandomPrecisionEngine

Program = Callable[..., Done]
EXPORT = ("export", "run", "--proof-images", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, calibrated at three widths, and `pool` of two of them."""
    pytest.importorskip("onnx")
    path = tmp_path_factory.mktemp("pools")
    calibrate = ["calibrate", "--model", "resnet8", "--image-size", "16", "--calibration-images", "16", "--eval-limit", "20",
                 "--estimator", "minmax", "--bits", "8,w4a8,2", "--out", "run"]  # fmt: skip
    export = [*EXPORT, "--bits", "8,w4a8", "--pool", "--probabilities", "0.75,0.25", "--seed", "3", "--out", "pool"]
    for command in (calibrate, export):
        done = execute(path, *command)
        assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def program(folder: Path) -> Program:
    return lambda *arguments: execute(folder, *arguments)


def test_export_writes_a_pool(folder: Path) -> None:
    pool = Pool.load(folder / "pool")
    assert pool.widths == ("8", "w4a8")
    assert pool.probabilities == (0.75, 0.25)
    assert (pool.seed, pool.target) == (3, "ort")
    assert sorted(path.name for path in (folder / "pool").iterdir()) == ["8", "pool.json", "w4a8"]
    with open_engine(folder / "pool") as engine:
        assert isinstance(engine, RandomPrecisionEngine)
        images = graphs.random_images(engine.input_shape, 4)
        for artifact in pool.artifacts:
            with open_engine(artifact) as alone:
                np.testing.assert_array_equal(engine.ask(artifact.width, images), alone(images))


def test_export_says_what_it_made(program: Program, tmp_path: Path) -> None:
    done = program(*EXPORT, "--bits", "2,8", "--pool", "--out", tmp_path / "made", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "edgeguard.inspect-pool/1"
    assert document["pool"] == str(tmp_path / "made")
    assert (document["widths"], document["probabilities"], document["seed"]) == (["2", "8"], [0.5, 0.5], None)
    assert document["integer_mac_coverage"] == 1
    again = program(*EXPORT, "--bits", "2,8", "--pool", "--out", tmp_path / "made")
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_without_a_folder_one_is_named(folder: Path, program: Program) -> None:
    done = program(*EXPORT, "--bits", "8,2", "--pool")
    assert done.returncode == 0, done.stderr
    assert "every batch is answered by one member, drawn from 8 (50.0%), 2 (50.0%)" in done.stdout
    assert "next: edgeguard verify runs/run-ort-pool-8-2" in done.stdout
    assert Pool.load(folder / "runs" / "run-ort-pool-8-2").seed is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--bits", "8", "--pool"), "a pool draws from 2 to 64 members, got 1: 8"),
        (("--bits", "8,8", "--pool"), "names a width twice"),
        (("--bits", "8,5", "--pool"), "was not trained at 5 bits"),
        (("--bits", "8,2"), "is not a bit-width"),
        (("--bits", "8,2", "--probabilities", "0.5,0.5"), "add --pool or leave them out"),
        (("--bits", "8", "--seed", "1"), "add --pool or leave them out"),
        (("--bits", "8,2", "--pool", "--probabilities", "0.5,x"), "is not a comma-separated list of numbers"),
        (("--bits", "8,2", "--pool", "--probabilities", "0.5,0.4"), "sum to 1, got 0.5, 0.4"),
        (("--bits", "8,2", "--pool", "--probabilities", "1"), "2 members needs as many probabilities, got 1"),
        (("--bits", "8,2", "--pool", "--seed", "-1"), "seed must be null or a whole number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_options_leave_nothing(program: Program, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    done = program(*EXPORT, *arguments, "--out", tmp_path / "made")
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_inspect_shows_every_member(program: Program) -> None:
    document = json.loads(program("inspect", "pool", "--json").stdout)
    assert document["schema"] == "edgeguard.inspect-pool/1"
    assert [member["width"] for member in document["members"]] == ["8", "w4a8"]
    assert [member["weight_bits"] for member in document["members"]] == [8, 4]
    table = program("inspect", "pool").stdout
    assert "8 (75.0%), w4a8 (25.0%); seed 3" in table
    assert all(f"Member {width}:" in table for width in ("8", "w4a8"))
    assert table.count("100% of ") == 2


def test_verify_judges_the_pool(folder: Path, program: Program, tmp_path: Path) -> None:
    (tmp_path / "gate.toml").write_text("max_asr = 0.0001\nrequire_integer = true\n")
    done = program("verify", "pool", "--attack", "a-qapa", "--patch-size", "4", "--placement", "random", "--steps", "4",
                   "--limit", "40", "--gate", tmp_path / "gate.toml", "--out", tmp_path / "report", "--json")  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "gate failed: max_asr" in done.stderr
    report = check_report(json.loads(done.stdout))
    assert report == json.loads((tmp_path / "report" / "report.json").read_text())
    assert [rule["passed"] for rule in report["gate"]["rules"]] == [False, True]
    assert report["artifact"]["pool"]["widths"] == ["8", "w4a8"]
    assert report["artifact"]["sha256"] == Pool.load(folder / "pool").sha256
    assert report["environment"]["engine"]["member_runtime"] == "ort"
    assert report["clean"]["bit_identical"] is True
    sources = [row["source"] for row in report["attacks"] if row["access"] == "transfer"]
    assert sources == ["8", "w4a8", "all widths"]
    trust = {check["check"]: check["passed"] for check in report["trust"]}
    assert trust["random_by_design"] is True
    assert "deterministic" not in trust
    assert "random by design" in (tmp_path / "report" / "report.html").read_text()


def test_verify_refuses_surrogates_and_broken_pools(folder: Path, program: Program, tmp_path: Path) -> None:
    done = program("verify", "pool", "--surrogate", "pool/8", "--limit", "20", "--out", tmp_path / "report")
    assert done.returncode == 2
    assert "leave the surrogates out" in done.stderr
    (tmp_path / "pool.json").write_text('{"schema": "edgeguard.pool/1", "members": []}')
    done = program("verify", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "'members' must be a list of 2 to 64" in done.stderr
    with pytest.raises(InputError, match="'members' must be a list"):
        open_engine(tmp_path)
