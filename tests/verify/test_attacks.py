"""Every attack of the catalog through `verify`, and what the rows add up to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_artifact import SIDE, small_graph, write_artifact

from edgeguard.artifact import Artifact
from edgeguard.data.dataset import Dataset
from edgeguard.errors import InputError
from edgeguard.report.html import render_html
from edgeguard.report.read import check_report
from edgeguard.report.summary import format_summary
from edgeguard.verify import ATTACKS, BUDGETS, VerifyOptions, budget, verify
from edgeguard.verify.breakdown import seen_unseen
from edgeguard.verify.catalog import CATALOG
from edgeguard.verify.options import accesses_of

Options = Callable[..., VerifyOptions]


@pytest.fixture(scope="module")
def report(artifact: Artifact, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    other = write_artifact(tmp_path_factory.mktemp("surrogates") / "small-8", small_graph(8), "8")
    options = VerifyOptions(
        attacks=ATTACKS, accesses=accesses_of(ATTACKS), patch_sizes=(4,), steps=20, attack_batch=20, limit=40,
        per_image_limit=12, queries=60, universal_queries=800, surrogates=(other.path,),
    )  # fmt: skip
    return verify(artifact, dataset, options)


def test_the_catalog_holds_every_attack() -> None:
    assert tuple(CATALOG) == ATTACKS


def test_every_attack_is_judged_at_every_access(report: dict[str, Any]) -> None:
    check_report(report)
    rows = [(r["name"], r["scope"], r["access"], r["placement"], r["source"]) for r in report["attacks"]]
    for name in ("aqapa", "gap"):
        for source in ("4", "8", "all widths"):
            assert (name, "universal", "transfer", "random", source) in rows
        assert (name, "universal", "engine", "random", "4") in rows
    assert ("aqapa-per-image", "per-image", "transfer", "optimized", "8") in rows
    assert ("aqapa-per-image", "per-image", "engine", "optimized", "4") in rows
    assert ("lavan", "per-image", "engine", "random", "4") in rows
    assert ("patch-rs", "universal", "query", "random", None) in rows
    assert ("patch-rs", "per-image", "query", "optimized", None) in rows
    assert len(rows) == len(set(rows)) == len(report["timing"]["attacks"])


def test_per_image_attacks_take_the_first_images_and_have_no_single_patch(report: dict[str, Any]) -> None:
    for row in report["attacks"]:
        own = row["scope"] == "per-image"
        assert row["n"] == row["robust_n"] == (12 if own else 40)
        assert (row["patch"] is None) is own
    assert len(report["patches"]) == sum(row["scope"] == "universal" for row in report["attacks"])


def test_query_budgets_are_kept(report: dict[str, Any]) -> None:
    for row in report["attacks"]:
        if row["access"] == "query":
            assert 0 < row["queries"] <= (60 * 12 if row["scope"] == "per-image" else 800)
        assert (row["queries"] > 0) is (row["access"] in ("query", "engine"))


def test_patches_of_their_own_are_the_strongest(report: dict[str, Any]) -> None:
    best = max(report["attacks"], key=lambda row: row["asr"])
    assert best["scope"] == "per-image"
    assert report["examples"]["attack"] == report["attacks"].index(best)
    assert report["heat_map"] is not None
    assert np.shape(report["heat_map"]["asr"]) == (len(report["heat_map"]["rows"]), len(report["heat_map"]["columns"]))
    assert max(map(max, report["heat_map"]["asr"])) <= 1
    assert all(layer["clean"]["equal"] == layer["patched"]["equal"] == 1 for layer in report["divergence"]["layers"])
    render_html(report)
    assert "Patch-RS" in format_summary(report)


def test_the_aggregated_asr_is_the_maximum_over_surrogates(report: dict[str, Any]) -> None:
    assert [row["name"] for row in report["aggregated"]] == ["aqapa", "gap"]
    for found in report["aggregated"]:
        group = (found["name"], "transfer", "universal")
        rows = [row for row in report["attacks"] if (row["name"], row["access"], row["scope"]) == group]
        assert found["asr"] == max(row["asr"] for row in rows)
        assert found["surrogates"] == ["4", "8", "all widths"]


def test_seen_and_unseen(report: dict[str, Any]) -> None:
    splits = {entry["split"]: entry for entry in report["seen_unseen"]}
    families = splits["family"]
    aqapa = [row["asr"] for row in report["attacks"] if row["name"] == "aqapa"]
    others = [row["asr"] for row in report["attacks"] if row["name"] not in ("aqapa", "noise")]
    assert families["seen"]["asr"] == max(aqapa)
    assert families["unseen"]["asr"] == max(others)
    assert splits["size"]["unseen"] is None
    assert splits["placement"]["unseen"]["asr"] >= splits["placement"]["seen"]["asr"]
    undefended = seen_unseen(report["attacks"], [], ["4"])
    assert all(entry["seen"] is None for entry in undefended)


def test_query_attacks_need_no_torch(artifact: Artifact, dataset: Dataset, tmp_path: Path) -> None:
    images = dataset.images(np.arange(40))
    np.savez(tmp_path / "data.npz", images=images.transpose(0, 2, 3, 1), labels=dataset.labels[:40])
    program = f"""
import importlib.util, sys
sys.modules["torch"] = None
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else real(name, *rest)
from pathlib import Path
from edgeguard.artifact import Artifact
from edgeguard.data.npz import load_npz
from edgeguard.files import to_json
from edgeguard.verify import VerifyOptions, verify
artifact, data = Artifact.load({str(artifact.path)!r}), load_npz(Path({str(tmp_path / "data.npz")!r}))
options = VerifyOptions(attacks=("patch-rs", "patch-rs-per-image"), accesses=("query",), patch_sizes=(6,), queries=200,
                        universal_queries=2000, attack_batch=20, decision_only=True)
sys.stdout.write(to_json(verify(artifact, data, options)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = check_report(json.loads(done.stdout))
    assert [row["name"] for row in report["attacks"]] == ["noise", "patch-rs", "patch-rs"]
    assert report["attacks"][2]["asr"] > report["attacks"][0]["asr"]
    assert "labels only" in report["definitions"]["query"]


@pytest.mark.parametrize("name", BUDGETS)
def test_budgets_are_valid_options(name: str) -> None:
    chosen = budget(name)
    VerifyOptions(**chosen, accesses=accesses_of(chosen["attacks"]))


def test_budgets_grow() -> None:
    sizes = [(len(each["attacks"]), each["steps"], len(each["placements"])) for each in BUDGETS.values()]
    assert sizes == sorted(sizes)
    with pytest.raises(InputError, match="unknown budget 'huge'"):
        budget("huge")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attacks": ("patch-rs",)}, "add the access 'query'"),
        ({"attacks": ("a-qapa",), "accesses": ("query",)}, "needs gradients"),
        ({"accesses": ("engine", "query")}, "the access 'query' is for"),
        ({"attacks": ("pgd",)}, "attack must be one or more of"),
        ({"queries": 0}, "number of queries"),
        ({"per_image_limit": 0}, "patches of their own"),
    ],
)
def test_options_that_contradict_each_other(quick: Options, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        quick(**change)


def test_the_time_is_estimated_before_the_start(artifact: Artifact, dataset: Dataset, quick: Options) -> None:
    said: list[str] = []
    report = verify(artifact, dataset, quick(), announce=said.append)
    assert len(said) == 1
    assert said[0].startswith("2 attacks to craft, 3 patches to judge: about ")
    assert report["timing"]["total"] > 0
    assert report["artifact"]["input_shape"][1] == SIDE
