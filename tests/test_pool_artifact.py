"""Pools on disk: written whole, read with distrust."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import pytest
from small_artifact import small_graph, write_artifact

from edgeguard import files
from edgeguard import graph as g
from edgeguard.artifact import MANIFEST, Artifact
from edgeguard.errors import ArtifactError, InputError
from edgeguard.pool_artifact import (
    MAX_BYTES,
    MAX_MEMBERS,
    POOL,
    Pool,
    format_pool,
    inspect_pool,
    load_model,
    write_pool,
)

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pool of three members with other than equal probabilities."""
    path = tmp_path / "pool"
    path.mkdir()
    for bits in (8, 4, 3):
        write_artifact(path / str(bits), small_graph(bits), str(bits))
    write_pool(path, ["8", "4", "3"], [0.5, 0.3, 0.2], seed=7)
    return path


def rewrite(folder: Path, change: Change) -> None:
    document = files.read_json(folder / POOL)
    change(document)
    (folder / POOL).write_text(json.dumps(document))


def test_what_is_written_is_read(folder: Path) -> None:
    pool = Pool.load(folder)
    assert pool.widths == ("8", "4", "3")
    assert pool.probabilities == pytest.approx((0.5, 0.3, 0.2))
    assert (pool.seed, pool.target) == (7, "reference")
    assert [artifact.path for artifact in pool.artifacts] == [folder / "8", folder / "4", folder / "3"]
    assert pool.sha256 == files.sha256(folder / POOL)
    document = files.read_json(folder / POOL)
    assert document["schema"] == "edgeguard.pool/1"
    assert [entry["folder"] for entry in document["members"]] == ["8", "4", "3"]
    assert document["members"][0]["manifest_sha256"] == files.sha256(folder / "8" / MANIFEST)


def test_without_more_all_are_alike_and_nothing_is_seeded(folder: Path) -> None:
    pool = write_pool(folder, ["8", "3"])
    assert pool.probabilities == (0.5, 0.5)
    assert pool.seed is None
    assert files.read_json(folder / POOL)["seed"] is None
    assert not list(folder.glob(".*"))


def test_probabilities_sum_to_one_exactly(folder: Path) -> None:
    third = round(1 / 3, 7)
    assert sum(write_pool(folder, ["8", "4", "3"], [third] * 3).probabilities) == pytest.approx(1, abs=1e-15)


def test_a_folder_is_a_pool_or_an_artifact(folder: Path, tmp_path: Path) -> None:
    assert isinstance(load_model(folder), Pool)
    assert isinstance(load_model(folder / "8"), Artifact)
    assert Pool.is_pool(folder)
    assert not Pool.is_pool(folder / "8")
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        load_model(tmp_path)
    with pytest.raises(ArtifactError, match=r"is not a pool.*export --pool"):
        Pool.load(folder / "8")


@pytest.mark.parametrize(
    ("members", "probabilities", "seed", "message"),
    [
        (["8"], None, None, "2 to 64 members, got 1: 8.*without --pool"),
        ([], None, None, "got 0: none"),
        ([str(number) for number in range(MAX_MEMBERS + 1)], None, None, "got 65"),
        (["8", "8"], None, None, "a member twice"),
        (["8", "4"], [1.0], None, "2 members needs as many probabilities, got 1"),
        (["8", "4"], [1.0, 0.0], None, "positive and sum to 1, got 1.0, 0.0"),
        (["8", "4"], [0.5, 0.4], None, "sum to 1"),
        (["8", "4"], [float("nan"), 0.5], None, "sum to 1"),
        (["8", "4"], None, -1, "seed must be null or a whole number"),
        (["8", "../pool/4"], None, None, "plain name of a folder"),
        (["8", "7"], None, None, "'7' is missing"),
    ],
)
def test_a_wrong_pool_is_not_written(folder: Path, members: Any, probabilities: Any, seed: Any, message: str) -> None:
    before = (folder / POOL).read_bytes()
    with pytest.raises(InputError, match=message):
        write_pool(folder, members, probabilities, seed)
    assert (folder / POOL).read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema="edgeguard.pool/2"), "not of schema"),
        (lambda d: d.update(members="8,4"), "'members' must be a list of 2 to 64"),
        (lambda d: d["members"].__delitem__(slice(1, None)), "'members' must be a list of 2"),
        (lambda d: d["members"].extend(d["members"] * 40), "'members' must be a list of 2 to 64"),
        (lambda d: d["members"].__setitem__(0, "8"), "not an object"),
        (lambda d: d["members"][0].pop("folder"), "'folder' is missing or not a str"),
        (lambda d: d["members"][0].update(probability=True), "'probability' is missing or not a float"),
        (lambda d: d["members"][0].update(probability=0.9), "sum to 1"),
        (lambda d: d["members"][0].update(probability=-0.5), "positive"),
        (lambda d: d["members"][0].update(probability=1e400), "it holds inf, which is no number"),
        (lambda d: d["members"][0].update(manifest_sha256="0" * 64), "changed after the pool was made"),
        (lambda d: d["members"][1].update(d["members"][0]), "sum to 1|different widths"),
        (lambda d: d.update(seed="7"), "seed must be null"),
        (lambda d: d.update(seed=True), "seed must be null"),
        (lambda d: d.update(seed=2**63), "seed must be null"),
    ],
)
def test_a_wrong_file_is_refused(folder: Path, change: Change, message: str) -> None:
    rewrite(folder, change)
    with pytest.raises(ArtifactError, match=message):
        Pool.load(folder)


@pytest.mark.parametrize("name", ["../outside", "/", "..", ".", "", "8/../../outside", "8\\x", "C:x", "8\0", "8\n"])
def test_no_member_lies_outside(folder: Path, name: str) -> None:
    shutil.copytree(folder / "8", folder.parent / "outside")
    rewrite(folder, lambda document: document["members"][0].update(folder=name))
    with pytest.raises(ArtifactError, match="plain name of a folder in it"):
        Pool.load(folder)


def test_links_are_not_followed(folder: Path) -> None:
    outside = folder.parent / "outside"
    (folder / "8").rename(outside)
    (folder / "8").symlink_to(outside)
    with pytest.raises(ArtifactError, match="not a plain folder"):
        Pool.load(folder)
    (folder / "8").unlink()
    shutil.copytree(outside, folder / "8")
    (folder / "8" / MANIFEST).unlink()
    (folder / "8" / MANIFEST).symlink_to(outside / MANIFEST)
    with pytest.raises(ArtifactError, match="is a link"):
        Pool.load(folder)
    (folder / "8" / MANIFEST).unlink()
    shutil.copy(outside / MANIFEST, folder / "8" / MANIFEST)
    assert Pool.load(folder).widths[0] == "8"
    (folder / POOL).rename(outside / POOL)
    (folder / POOL).symlink_to(outside / POOL)
    with pytest.raises(ArtifactError, match="is not a pool"):
        Pool.load(folder)


def test_a_large_or_broken_file_is_not_read(folder: Path) -> None:
    (folder / POOL).write_text(" " * MAX_BYTES + "{}")
    with pytest.raises(ArtifactError, match=f"at most {MAX_BYTES}"):
        Pool.load(folder)
    (folder / POOL).write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        Pool.load(folder)


def other_shape(path: Path) -> None:
    builder = graphs.Builder(4, (3, 8, 8), 0)
    flat = builder.move(g.Flatten, builder.quantize())
    write_artifact(path, builder.finish(builder.linear(flat, 5, accumulators=True)), "4")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: write_artifact(path, small_graph(4), "8"), "of different widths, got 8, 8, 3"),
        (lambda path: write_artifact(path, small_graph(4), "4", target="ort"), "8 and 4 differ in target"),
        (lambda path: write_artifact(path, small_graph(4), "4", profile={"runtime": "x"}), "8 and 4 differ in profile"),
        (lambda path: write_artifact(path, small_graph(4), "4", num_classes=6), "8 and 4 differ in num_classes"),
        (other_shape, "8 and 4 differ in input_shape"),
    ],
)
def test_members_that_do_not_belong_together(folder: Path, make: Callable[[Path], object], message: str) -> None:
    before = (folder / POOL).read_bytes()
    shutil.rmtree(folder / "4")
    make(folder / "4")
    with pytest.raises(ArtifactError, match=message):
        write_pool(folder, ["8", "4", "3"])
    assert (folder / POOL).read_bytes() == before


def test_an_altered_member_is_refused(folder: Path) -> None:
    with (folder / "3" / "graph.npz").open("ab") as handle:
        handle.write(b"x")
    with pytest.raises(ArtifactError, match=r"graph\.npz was changed"):
        Pool.load(folder)
    shutil.rmtree(folder / "3")
    write_artifact(folder / "3", small_graph(3, seed=1), "3")
    with pytest.raises(ArtifactError, match="changed after the pool was made"):
        Pool.load(folder)


def test_inspection_holds_every_member(folder: Path) -> None:
    document = inspect_pool(Pool.load(folder))
    assert document["schema"] == "edgeguard.inspect-pool/1"
    assert (document["widths"], document["seed"], document["target"]) == (["8", "4", "3"], 7, "reference")
    assert [member["schema"] for member in document["members"]] == ["edgeguard.inspect/1"] * 3
    assert document["integer_mac_coverage"] == 1
    assert "8 (50.0%), 4 (30.0%), 3 (20.0%); seed 7" in format_pool(document)
    assert "fresh entropy" in format_pool(inspect_pool(write_pool(folder, ["8", "4"])))


def test_the_lowest_coverage_is_the_pools(folder: Path) -> None:
    shutil.rmtree(folder / "4")
    write_artifact(folder / "4", small_graph(4), "4", proof={"integer_mac_coverage": 0.5})
    assert inspect_pool(write_pool(folder, ["8", "4", "3"]))["integer_mac_coverage"] == 0.5
