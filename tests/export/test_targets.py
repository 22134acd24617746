"""Exports for target profiles: what the file holds, what is refused, and which engine opens it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import graphs
import pytest
import small_artifact

from edgeguard.artifact import Artifact
from edgeguard.errors import ExportError, InputError, MissingDependency
from edgeguard.export import export_artifact
from edgeguard.inspection import inspect_artifact
from edgeguard.targets import artifact_runtime, open_engine
from edgeguard.targets.profiles import load_profile

onnx = pytest.importorskip("onnx")

GRAPH = graphs.every_op(4)
IMAGES = graphs.random_images(GRAPH.input_shape, 3)


def export(out: Path, target: str, graph: Any = GRAPH, **options: Any) -> Artifact:
    return export_artifact(graph, out, target=target, width="4", weight_bits=4, activation_bits=4, source={},
                           images=graphs.random_images(graph.input_shape, 3), **options)  # fmt: skip


def weight_types(artifact: Artifact) -> set[int]:
    model = onnx.load(artifact.onnx)
    return {tensor.data_type for tensor in model.graph.initializer if "weight" in tensor.name and len(tensor.dims) > 1}


def test_ort_is_what_the_writer_writes(tmp_path: Path) -> None:
    from edgeguard.export.onnx_writer import write_onnx

    artifact = export(tmp_path / "a", "ort")
    write_onnx(GRAPH, tmp_path / "plain.onnx")
    assert artifact.onnx.read_bytes() == (tmp_path / "plain.onnx").read_bytes()
    assert artifact.manifest["profile"] == load_profile("ort").to_json()
    assert onnx.TensorProto.INT4 in weight_types(artifact)


def test_legacy_has_an_old_opset_and_no_small_types(tmp_path: Path) -> None:
    artifact = export(tmp_path / "a", "ort-legacy")
    model = onnx.load(artifact.onnx)
    assert ({entry.domain: entry.version for entry in model.opset_import}[""], model.ir_version) == (13, 7)
    assert weight_types(artifact) == {onnx.TensorProto.INT8}
    assert artifact.manifest["proof"]["identical"] is True
    assert inspect_artifact(artifact.path)["target"] == "ort-legacy"
    assert artifact_runtime(artifact) == "ort"
    with open_engine(artifact) as engine:
        assert engine.name == "ort"


def test_a_users_profile_steers_the_writer(tmp_path: Path) -> None:
    text = (Path(str(load_profile.__globals__["FOLDER"])) / "ort.toml").read_text()
    text = text.replace('name = "ort"', 'name = "mine"').replace("storage_bits = 2", "storage_bits = 8")
    (tmp_path / "mine.toml").write_text(text)
    artifact = export(tmp_path / "a", str(tmp_path / "mine.toml"))
    assert artifact.target == "mine"
    assert weight_types(artifact) == {onnx.TensorProto.INT8}


def test_weights_beyond_the_profile_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"at most 7 bits.*calibrate with --target ort-avx2"):
        export(tmp_path / "a", "ort-avx2")
    assert not list(tmp_path.iterdir())


def test_an_engine_executes_its_own_artifacts_only(tmp_path: Path) -> None:
    artifact = export(tmp_path / "a", "ort")
    with pytest.raises(InputError, match="exported for 'ort'; 'openvino' cannot execute it"):
        open_engine(artifact, "openvino")
    with pytest.raises(InputError, match="unknown runtime 'tpu'; expected one of ort, reference, twin, openvino, trt"):
        open_engine(artifact, "tpu")
    for runtime in ("reference", "twin"):
        with open_engine(artifact, runtime) as engine:
            assert engine.name == runtime


def test_missing_runtimes_name_their_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, target in (("tensorrt", "trt"), ("openvino", "openvino")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingDependency, match=rf'pip install "edgeguard\[{target}\]"'):
            export(tmp_path / "a", target)
    assert not list(tmp_path.iterdir())


def test_onnx_only_is_for_tensorrt(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--onnx-only is for TensorRT targets"):
        export(tmp_path / "a", "ort", onnx_only=True)


@pytest.mark.parametrize(("target", "options"), [("ort", {"repeat": 2}), ("trt", {"repeat": 2, "onnx_only": True}),
                                               ("trt", {"repeat": 0})])  # fmt: skip
def test_repeated_builds_are_for_plans(target: str, options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--repeat counts builds of a TensorRT plan"):
        export(tmp_path / "a", target, small_artifact.small_graph(4), **options)


@pytest.mark.trt
@pytest.mark.usefixtures("gpu")
def test_a_plan_and_its_rebuilds(tmp_path: Path) -> None:
    artifact = export(tmp_path / "a", "trt", small_artifact.small_graph(4), repeat=2)
    proof = artifact.manifest["proof"]
    assert proof["built"]
    assert proof["integer_mac_coverage"] == 1.0
    assert proof["rebuilds"]["builds"] == 2
    with open_engine(artifact) as engine:
        assert engine.describe()["runtime"] == "trt"


def test_an_onnx_file_for_tensorrt_without_tensorrt(tmp_path: Path) -> None:
    artifact = export(tmp_path / "a", "trt", small_artifact.small_graph(4), onnx_only=True)
    proof = artifact.manifest["proof"]
    assert (proof["built"], proof["integer_mac_coverage"]) == (False, 0.0)
    assert proof["agreement"] == 1.0
    assert {layer["kernel"] for layer in inspect_artifact(artifact.path)["layers"]} == {"no plan built"}
    with pytest.raises(InputError, match=r"holds no model\.plan: it was exported with --onnx-only"):
        open_engine(artifact)


def test_openvino_exports_and_opens(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    artifact = export(tmp_path / "a", "openvino", small_artifact.small_graph(4))
    assert artifact_runtime(artifact) == "openvino"
    with open_engine(artifact, threads=1) as engine:
        assert engine.name == "openvino"
        assert engine(graphs.random_images(engine.input_shape, 2)).shape == (2, small_artifact.CLASSES)
    with pytest.raises(InputError, match="exported for 'openvino'; 'ort' cannot execute it"):
        open_engine(artifact, "ort")
