"""A layer that an engine computes differently is found, and only that one comes first."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest
from small_artifact import small_graph, write_artifact

from edgeguard import files
from edgeguard.artifact import MANIFEST, Artifact, write_manifest
from edgeguard.errors import InputError
from edgeguard.graph import Conv, Linear
from edgeguard.patch import apply_patch
from edgeguard.verify.divergence import divergence

pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from edgeguard.export import export_artifact  # noqa: E402
from edgeguard.targets.twin import Twin  # noqa: E402

GRAPH = graphs.every_op(4)
IMAGES = graphs.random_images(GRAPH.input_shape, 9, seed=3)
PIXELS = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (3, 5, 5))
PATCHED = apply_patch(IMAGES, PIXELS, np.ones((5, 5), bool), np.full((9, 2), 4))
LAYERS = [node.name for node in GRAPH.nodes if isinstance(node, Conv | Linear)]


@pytest.fixture(scope="module", params=["ort", "openvino"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    if request.param == "openvino":
        pytest.importorskip("openvino")
    return export_artifact(
        GRAPH, tmp_path_factory.mktemp("artifacts") / request.param, target=request.param, width="4", weight_bits=4,
        activation_bits=4, images=IMAGES[:2], source={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def twin() -> Twin:
    return Twin(GRAPH)


def tampered(artifact: Artifact, layer: str, folder: Path) -> Artifact:
    """The same artifact with every bias of one layer of its ONNX file a quarter of the biases' spread higher."""
    folder.mkdir()
    for file in artifact.path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    model = onnx.load(folder / "model.onnx")
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name == f"{layer}/bias")
    values = onnx.numpy_helper.to_array(bias)
    moved = (values + max(np.abs(values).max() / 4, 1e-6)).astype(values.dtype)
    assert (moved != values).any()
    bias.CopyFrom(onnx.numpy_helper.from_array(moved, bias.name))
    onnx.save(model, folder / "model.onnx")
    manifest = files.read_json(folder / MANIFEST)
    write_manifest(folder, {key: value for key, value in manifest.items() if key not in ("schema", "files")})
    return Artifact.load(folder)


def test_equal_engines_differ_nowhere(artifact: Artifact, twin: Twin) -> None:
    ticks: list[tuple[int, int]] = []
    found = divergence(artifact, None, twin, IMAGES, PATCHED, threads=1, tick=lambda *done: ticks.append(done))
    assert (found["n"], found["reason"], found["skipped"]) == (9, None, [])
    assert found["first"] == {"clean": None, "patched": None}
    assert found["undisturbed"] == {"clean": 1.0, "patched": 1.0}
    assert [entry["layer"] for entry in found["layers"]] == [node.name for node in GRAPH.nodes[:-1]]
    for entry, node in zip(found["layers"], GRAPH.nodes[:-1], strict=True):
        integers = 9 * int(np.prod(GRAPH.tensors[node.output].shape))
        for kind in ("clean", "patched"):
            assert entry[kind] == {"equal": 1.0, "steps": {"0": integers}}
        assert entry["op"] == type(node).__name__.lower()
    assert ticks == [(9, 18), (18, 18)]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[4], LAYERS[-1]], ids=["first", "middle", "last"])
def test_a_changed_bias_is_found_in_its_layer(artifact: Artifact, twin: Twin, tmp_path: Path, layer: str) -> None:
    found = divergence(tampered(artifact, layer, tmp_path / "a"), None, twin, IMAGES, PATCHED, threads=1)
    assert found["first"] == {"clean": layer, "patched": layer}
    assert found["undisturbed"] == {"clean": 1.0, "patched": 1.0}
    before = True
    for entry in found["layers"]:
        before = before and entry["layer"] != layer
        for kind in ("clean", "patched"):
            counts = entry[kind]["steps"]
            assert entry[kind]["equal"] == counts.get("0", 0) / sum(counts.values())
            assert not before or entry[kind]["equal"] == 1
            assert list(counts) == sorted(counts, key=lambda name: int(name.split("-")[0]))


def test_clean_and_patched_are_told_apart_and_images_are_batched(
    twin: Twin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The reference of another first layer differs where the pixels are bright: under the patch only."""
    from edgeguard.targets import layers
    from edgeguard.verify import divergence as module

    original = layers.open_layers

    def bright(*arguments: Any) -> Any:
        reader = original(*arguments)

        def run(images: Any) -> Any:
            values = reader.run(images)
            sizes.append(len(images))
            values["quantized"] = values["quantized"] + 3 * (images == 255)
            return values

        return layers.LayerReader(reader.graph, reader.names, {}, run)

    sizes: list[int] = []
    monkeypatch.setattr(module, "open_layers", bright)
    monkeypatch.setattr(module, "BATCH", 4)
    dim, lit = np.minimum(IMAGES, 254), PATCHED.copy()
    lit[lit == 255] = 254
    lit[:, :, 0, 0] = 255
    artifact = write_artifact(tmp_path / "reference", GRAPH, "4")
    found = divergence(artifact, "reference", twin, dim, lit)
    assert sizes == [4, 4, 1, 4, 4, 1]
    assert found["first"] == {"clean": None, "patched": "quantize"}
    assert found["layers"][0]["patched"]["steps"] == {"0": 9 * 3 * (13 * 11 - 1), "3-4": 27}
    monkeypatch.setattr(module, "MEMORY", 1)
    sizes.clear()
    assert divergence(artifact, "reference", twin, dim, lit) == found
    assert sizes == [1] * 18


def test_chosen_tensors_only(artifact: Artifact, twin: Twin) -> None:
    names = [GRAPH.nodes[4].output, GRAPH.nodes[1].output]
    found = divergence(artifact, None, twin, IMAGES[:2], PATCHED[:2], names)
    assert [entry["layer"] for entry in found["layers"]] == [GRAPH.nodes[1].name, GRAPH.nodes[4].name]
    found = divergence(artifact, None, twin, IMAGES[:2], PATCHED[:2], [GRAPH.output])
    assert [entry["layer"] for entry in found["layers"]] == [LAYERS[-1]]
    found = divergence(artifact, None, twin, IMAGES[:2], PATCHED[:2], ["pixels"])
    assert found["skipped"] == [{"tensor": "pixels", "reason": "it is not a quantized tensor"}]


def test_tensorrt_says_why_not(artifact: Artifact, twin: Twin) -> None:
    found = divergence(artifact, "trt", twin, IMAGES, PATCHED)
    assert found["reason"].startswith("a TensorRT plan gives no tensor but its outputs")
    assert (found["n"], found["layers"], found["first"]) == (9, [], {"clean": None, "patched": None})


def test_without_onnx_the_reason_is_how_to_install_it(
    artifact: Artifact, twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    found = divergence(artifact, None, twin, IMAGES, PATCHED)
    assert (found["reason"], found["layers"]) == ('onnx is not installed; run: pip install "edgeguard[train]"', [])


def test_what_does_not_belong_together_is_refused(artifact: Artifact, twin: Twin) -> None:
    with pytest.raises(InputError, match="as many patched images as clean ones, got 8 and 9"):
        divergence(artifact, None, twin, IMAGES, PATCHED[:8])
    with pytest.raises(InputError, match="the graph has no tensor 'nonsense'"):
        divergence(artifact, None, twin, IMAGES, PATCHED, ["nonsense"])
    for other in (small_graph(), graphs.every_op(3)):
        with pytest.raises(InputError, match="the twin is of another graph than the artifact"):
            divergence(artifact, None, Twin(other), IMAGES, PATCHED)
