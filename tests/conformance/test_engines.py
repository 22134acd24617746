"""One suite over every engine: the logits of an artifact are the reference's, bit for bit."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest

from edgeguard.artifact import Artifact
from edgeguard.errors import EngineError, InputError, MissingDependency
from edgeguard.export import export_artifact
from edgeguard.graph import IntegerGraph
from edgeguard.patch import apply_patch, random_positions
from edgeguard.targets import RUNTIMES, BaseEngine, Engine, open_engine, reference

WIDTHS = (8, 6, 5, 4, 3, 2)
MODELS = [(build, bits) for build in (graphs.every_op, graphs.gated) for bits in WIDTHS]
MODELS += [(graphs.resnet20, bits) for bits in (8, 4, 2)]

Export = Callable[[Callable[[int], IntegerGraph], int], Artifact]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    pytest.importorskip("onnx")

    @functools.cache
    def make(build: Callable[[int], IntegerGraph], bits: int) -> Artifact:
        graph = build(bits)
        out = tmp_path_factory.mktemp("artifacts") / f"{build.__name__}-{bits}"
        return export_artifact(
            graph, out, target="ort", width=str(bits), weight_bits=bits, activation_bits=bits,
            images=graphs.random_images(graph.input_shape, 2), source={},
        )  # fmt: skip

    return make


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    if request.param == "twin":
        pytest.importorskip("torch")
    return str(request.param)


def images_for(shape: tuple[int, int, int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Random images, all black, all white, single colours, extremes side by side, and patched ones."""
    rng = np.random.default_rng(7)
    images = graphs.random_images(shape, 5, seed=11)
    plain = np.zeros((5, *shape), np.uint8)
    plain[1] = 255
    plain[2, 0] = plain[3, 1] = plain[4, 2] = 255
    checks = (np.indices(shape).sum(0) % 2 * 255).astype(np.uint8)[None]
    mask = np.ones((5, 5), bool)
    pixels = rng.choice(np.array([0, 255], np.uint8), (3, 5, 5))
    patched = apply_patch(images, pixels, mask, random_positions(len(images), shape[1:], mask.shape, rng))
    return np.concatenate([images, plain, checks, patched])


@pytest.mark.parametrize(("build", "bits"), MODELS, ids=[f"{build.__name__}-{bits}" for build, bits in MODELS])
def test_logits_are_the_references(export: Export, runtime: str, build: Any, bits: int) -> None:
    artifact = export(build, bits)
    graph = artifact.graph()
    images = images_for(graph.input_shape)
    expected = reference.run(graph, images)[graph.output]
    assert len(np.unique(expected.argmax(1))) > 1, "a network whose answer never changes tests nothing"
    with open_engine(artifact, runtime, threads=1) as engine:
        np.testing.assert_array_equal(engine(images), expected)
        one_by_one = np.concatenate([engine(images[index : index + 1]) for index in range(len(images))])
        np.testing.assert_array_equal(one_by_one, expected)


def test_threads_and_memory_layout_change_nothing(export: Export, runtime: str) -> None:
    artifact = export(graphs.every_op, 4)
    images = images_for(artifact.graph().input_shape)
    channels_last = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    channels_last.flags.writeable = False
    with open_engine(artifact, runtime, threads=1) as one, open_engine(artifact, runtime, threads=2) as two:
        expected = one(images)
        np.testing.assert_array_equal(two(images), expected)
        np.testing.assert_array_equal(one(channels_last), expected)
        np.testing.assert_array_equal(one(images[::-1]), expected[::-1])


def test_engine_describes_itself(export: Export, runtime: str) -> None:
    artifact = export(graphs.every_op, 4)
    with open_engine(artifact, runtime, threads=1) as engine:
        assert isinstance(engine, Engine)
        assert engine.name == runtime
        assert engine.input_shape == artifact.graph().input_shape
        assert engine.num_classes == 10
        description = engine.describe()
    assert description["runtime"] == runtime
    assert description["version"]
    assert description["provider"]
    assert isinstance(description["cpu_flags"], list)
    assert description["threads"] == (None if runtime == "reference" else 1)


def test_the_artifacts_target_is_the_default(export: Export) -> None:
    with open_engine(export(graphs.every_op, 4)) as engine:
        assert engine.name == "ort"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda images: images.astype(np.float32), r"got float32 \(2, 3, 13, 11\), expected a NumPy array of uint8"),
        (lambda images: images[:, :, 1:], r"got uint8 \(2, 3, 12, 11\)"),
        (lambda images: images.transpose(0, 2, 3, 1), r"expected a NumPy array of uint8 \(N, 3, 13, 11\)"),
        (lambda images: images[0], r"got uint8 \(3, 13, 11\)"),
        (lambda images: images[:0], "empty batch"),
        (lambda images: images.tolist(), "got list"),
        (lambda images: None, "got NoneType"),
    ],
)
def test_wrong_images_are_refused(export: Export, runtime: str, spoil: Any, message: str) -> None:
    with open_engine(export(graphs.every_op, 4), runtime) as engine:
        images = graphs.random_images(engine.input_shape, 2)
        with pytest.raises(InputError, match=f"tensor 'pixels': .*{message}"):
            engine(spoil(images))


def test_closed_engine_is_refused(export: Export, runtime: str) -> None:
    with open_engine(export(graphs.every_op, 4), runtime) as engine:
        images = graphs.random_images(engine.input_shape, 1)
    with pytest.raises(EngineError, match="closed"):
        engine(images)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (np.full((1, 2), np.nan, np.float32), "not finite"),
        (np.full((1, 2), np.inf, np.float32), "not finite"),
        (np.zeros((1, 3), np.float32), r"returned \(1, 3\) float32, expected \(1, 2\)"),
        (np.zeros((1, 2), np.float64), "float64"),
    ],
)
def test_wrong_logits_are_refused(logits: Any, message: str) -> None:
    class Broken(BaseEngine):
        name = "broken"

        def _logits(self, images: Any) -> Any:
            return logits

    with Broken((3, 4, 4), 2) as engine, pytest.raises(EngineError, match=message):
        engine(np.zeros((1, 3, 4, 4), np.uint8))


def test_unknown_runtime_and_threads_are_refused(export: Export) -> None:
    artifact = export(graphs.every_op, 4)
    with pytest.raises(InputError, match="unknown runtime 'gpu'; expected one of ort, reference, twin"):
        open_engine(artifact, "gpu")
    with pytest.raises(InputError, match="-1 threads"):
        open_engine(artifact, "ort", threads=-1)


@pytest.mark.parametrize(
    ("runtime", "module", "command"),
    [("ort", "onnxruntime", "pip install edgeguard$"), ("twin", "torch", r'pip install "edgeguard\[train\]"')],
)
def test_a_missing_package_names_its_install(
    export: Export, monkeypatch: pytest.MonkeyPatch, runtime: str, module: str, command: str
) -> None:
    artifact = export(graphs.every_op, 4)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency, match=command):
        open_engine(artifact, runtime)


def test_a_model_the_runtime_cannot_load_is_an_engine_error(tmp_path: Path) -> None:
    from edgeguard.targets.ort import OrtEngine

    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(EngineError, match="cannot load"):
        OrtEngine(path, (3, 4, 4), 2)
    with pytest.raises(EngineError, match="cannot load"):
        OrtEngine(tmp_path / "missing.onnx", (3, 4, 4), 2)
