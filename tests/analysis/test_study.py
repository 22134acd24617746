"""`analyze` on small artifacts: where a model looks, what transfers, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import graphs
import numpy as np
import pytest
from small_artifact import CLASSES, SIDE, labelled, small_graph, write_artifact

from edgeguard import graph as g
from edgeguard.analysis import PARTS, SCHEMA, AnalysisOptions, analyze
from edgeguard.analysis.page import format_analysis, render_analysis
from edgeguard.artifact import Artifact
from edgeguard.data.dataset import Dataset, from_arrays
from edgeguard.errors import InputError
from edgeguard.graph import IntegerGraph
from edgeguard.patch import square
from edgeguard.targets.reference import ReferenceEngine

WINDOW = slice(4, 8), slice(8, 12)
"""Rows and columns that `looking` reads."""
WHITE = square(np.full((3, 4, 4), 255, np.uint8))


def looking(seed: int = 0) -> IntegerGraph:
    """One linear layer that reads nothing but the pixels of `WINDOW`."""
    builder = graphs.Builder(8, (3, SIDE, SIDE), seed)
    graph = builder.finish(builder.linear(builder.move(g.Flatten, builder.quantize()), CLASSES, bits=8, accumulators=True))
    seen = np.zeros((3, SIDE, SIDE), bool)
    seen[:, WINDOW[0], WINDOW[1]] = True
    nodes = [
        dataclasses.replace(node, weight=node.weight * seen.reshape(1, -1).astype(node.weight.dtype))
        if isinstance(node, g.Linear) else node
        for node in graph.nodes
    ]  # fmt: skip
    return IntegerGraph(tuple(nodes), graph.tensors)


def fooled_in_the_window(judged: Dataset, count: int) -> float:
    """ASR of `WHITE` on the window, asked of the reference directly; all images count, for the model labelled them."""
    chosen = np.random.default_rng(0).permutation(len(judged))[:count]
    images = judged.images(chosen).copy()
    images[:, :, WINDOW[0], WINDOW[1]] = 255
    return float((ReferenceEngine(looking())(images).argmax(1) != judged.labels[chosen]).mean())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Artifact]:
    folder = tmp_path_factory.mktemp("pair")
    return [write_artifact(folder / "a", small_graph(), "4"), write_artifact(folder / "b", small_graph(2, 3), "2")]


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_artifact(tmp_path_factory.mktemp("window") / "w", looking(), "8")


@pytest.fixture(scope="module")
def images() -> Dataset:
    return labelled(small_graph(), 120)


@pytest.fixture
def quick() -> Callable[..., AnalysisOptions]:
    def options(**changes: Any) -> AnalysisOptions:
        return AnalysisOptions(**{
            "patch_size": 8, "sizes": (2, 8), "opacities": (0.0, 1.0), "steps": 12, "attack_batch": 20, "limit": 40,
            "threads": 1, **changes,
        })  # fmt: skip

    return options


def test_the_map_peaks_where_the_model_looks(window: Artifact, quick: Callable[..., AnalysisOptions]) -> None:
    judged = labelled(looking(), 60)
    document = analyze([window], judged, judged, quick(parts=("sensitivity",)), patch=WHITE)
    (found,) = document["sensitivity"]
    assert (found["rows"], found["columns"], found["patch_size"], found["n"]) == ([0, 4, 8, 12], [0, 4, 8, 12], 4, 40)
    shares = np.array(found["asr"])
    assert np.shape(found["ci95"]) == (4, 4, 2)
    assert document["patch_sha256"] == WHITE.sha256
    assert shares[1, 2] > 0
    np.testing.assert_allclose(shares[1, 2], fooled_in_the_window(judged, 40))
    shares[1, 2] = 0
    assert not shares.any(), "a patch outside of the window changes nothing"


def test_everything_at_once_is_one_strict_document(
    pair: list[Artifact], images: Dataset, quick: Callable[..., AnalysisOptions]
) -> None:
    stages: dict[str, tuple[int, int]] = {}
    document = analyze(pair, images, None, quick(), progress=lambda name, *done: stages.update({name: done}))
    assert document["schema"] == SCHEMA
    assert set(PARTS) <= document.keys()
    json.dumps(document, allow_nan=False)
    assert {"edgeguard", "numpy", "torch"} <= document["versions"].keys()
    assert all(one["engine"] and len(one["sha256"]) == 64 for one in document["artifacts"])
    assert stages
    assert all(done == total for done, total in stages.values())
    assert document == analyze(pair, images, None, quick())
    assert document["data"]["n"] + document["data"]["crafted_on"] <= 120
    assert [one["width"] for one in document["artifacts"]] == ["4", "2"]
    for words in (render_analysis(document), format_analysis(document)):
        assert "4 bits" in words
        assert "2 bits" in words
        assert "n = 40" in words
        assert "P[engine(x_adv)" in words
        assert "different images" in words


def test_crafting_beats_random_pixels_and_the_aggregated_rate_is_the_largest(
    pair: list[Artifact], quick: Callable[..., AnalysisOptions]
) -> None:
    # Enough images for the difference to show: the rates of two patches on 40 images differ by chance.
    many = labelled(small_graph(), 400)
    found = analyze(pair, many, None, quick(parts=("transfer",), steps=200, limit=133))["transfer"]
    rates = {(row["surrogate"], row["engine"]): row["asr"] for row in found["rows"]}
    own, other = "4 bits", "2 bits"
    assert len(rates) == 6, "two surrogates and random pixels, on two engines"
    for name in (own, other):
        assert rates[name, name] > rates["random pixels", name]
    for row in found["aggregated"]:
        assert row["asr"] == max(rates[own, row["engine"]], rates[other, row["engine"]])
        assert row["ci95"][0] <= row["asr"] <= row["ci95"][1]
        assert row["n"] > 0


def test_one_artifact_twice_is_perfectly_aligned_and_transfers_wholly(
    pair: list[Artifact], images: Dataset, quick: Callable[..., AnalysisOptions]
) -> None:
    document = analyze([pair[0], pair[0]], images, None, quick(parts=("alignment", "transfer")))
    (row,) = document["alignment"]
    assert row["first"] != row["second"], "names tell the columns apart"
    assert row["cosine"]["mean"] == pytest.approx(1)
    for name in ("cosine", "hog_cosine", "edge_iou"):
        assert row["chance"][name]["mean"] < 0.95, "gradients of different images are not those of one"
    crafted = [row for row in document["transfer"]["rows"] if row["surrogate"] != "random pixels"]
    assert len({row["asr"] for row in crafted}) == 1


def test_options_change_what_they_say(window: Artifact, quick: Callable[..., AnalysisOptions]) -> None:
    judged = labelled(looking(), 60)

    def run(**changes: Any) -> dict[str, Any]:
        return analyze([window], judged, judged, quick(**{"parts": ("sensitivity",), **changes}))

    base = run()
    assert run(limit=10)["data"]["n"] == 10
    assert run(craft_limit=10)["data"]["crafted_on"] == 10
    assert run(stride=2)["sensitivity"][0]["rows"] == [0, 2, 4, 6, 8]
    assert run(patch_size=6)["sensitivity"][0]["patch_size"] == 6
    assert run(seed=1)["sensitivity"] != base["sensitivity"]
    seen = run(parts=("visibility",), sizes=(3, 5), opacities=(0.0, 0.25))["visibility"][0]
    assert [row["patch_size"] for row in seen["by_size"]] == [3, 5]
    assert [row["opacity"] for row in seen["by_opacity"]] == [0.0, 0.25]
    assert seen["by_opacity"][0]["asr"] == 0
    assert "sensitivity" not in run(parts=("visibility",))


def test_judged_images_are_never_crafted_on(pair: list[Artifact], quick: Callable[..., AnalysisOptions]) -> None:
    few = labelled(small_graph(), 9)
    document = analyze(pair[:1], few, None, quick(parts=("sensitivity",)))
    assert (document["data"]["n"], document["data"]["crafted_on"]) == (4, 5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parts": ("alignments",)}, "--what must be"),
        ({"parts": ("transfer", "transfer")}, "each once"),
        ({"parts": ()}, "--what must be"),
        ({"opacities": (0.5, 1.5)}, "opacities"),
        ({"opacities": (float("nan"),)}, "opacities"),
        ({"sizes": (0, 4)}, "smallest size"),
        ({"sizes": ()}, "smallest size"),
        ({"stride": 0}, "stride"),
        ({"steps": 0}, "steps"),
        ({"limit": 0}, "limit"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_that_make_no_sense(quick: Callable[..., AnalysisOptions], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        quick(**changes)


def test_arguments_that_do_not_fit_together(
    pair: list[Artifact], images: Dataset, quick: Callable[..., AnalysisOptions], tmp_path: Any
) -> None:
    other = write_artifact(tmp_path / "c", small_graph(), "4", num_classes=CLASSES + 1)
    large, huge = square(np.zeros((3, 17, 4), np.uint8)), quick(patch_size=17)
    small = from_arrays("small", np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int64), ("a", "b"))
    cases: list[tuple[str, Callable[[], object]]] = [
        ("at least one artifact", lambda: analyze([], images, None, quick())),
        ("differ in num_classes", lambda: analyze([pair[0], other], images, None, quick())),
        ("at least two", lambda: analyze(pair[:1], images, None, quick(parts=("alignment",)))),
        ("larger than the image", lambda: analyze(pair, images, None, quick(), patch=large)),
        ("larger than the image", lambda: analyze(pair, images, None, huge)),
        ("images of shape", lambda: analyze(pair, small, None, quick())),
        ("too few images", lambda: analyze(pair, labelled(small_graph(), 1), None, quick())),
    ]  # fmt: skip
    for words, call in cases:
        with pytest.raises(InputError, match=words):
            call()


@pytest.mark.parametrize("part", ["sensitivity", "visibility", "transfer"])
def test_no_image_that_counts_is_an_error_and_never_a_rate(
    pair: list[Artifact], images: Dataset, quick: Callable[..., AnalysisOptions], part: str
) -> None:
    pixels = np.ascontiguousarray(images.images(np.arange(120)).transpose(0, 2, 3, 1))
    wrong = from_arrays("wrong", pixels, (images.labels + 1) % CLASSES, tuple(map(str, range(CLASSES))))
    with pytest.raises(InputError, match="counts for the attack success rate; check"):
        analyze(pair[:1], wrong, images, quick(parts=(part,)))


def test_sizes_that_do_not_fit_are_an_error_and_not_left_out(
    pair: list[Artifact], images: Dataset, quick: Callable[..., AnalysisOptions]
) -> None:
    for sizes in ((4, 17), (17,)):
        with pytest.raises(InputError, match="larger than the image"):
            analyze(pair[:1], images, None, quick(parts=("visibility",), sizes=sizes))
