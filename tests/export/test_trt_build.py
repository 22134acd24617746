"""Reading what an engine computes with, and, with TensorRT and a GPU, building and running plans."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import graphs
import numpy as np
import pytest

from edgeguard.errors import EngineError, ExportError, InputError, MissingDependency
from edgeguard.targets import reference

onnx = pytest.importorskip("onnx")
from test_trt_rules import Net, signed_graph  # noqa: E402

from edgeguard.export.qdq_writer import write_qdq  # noqa: E402
from edgeguard.export.trt_build import (  # noqa: E402
    BuildOptions,
    build_plan,
    load_model,
    read_cache,
    rebuild_spread,
    spread,
    version_of,
)
from edgeguard.export.trt_layers import (  # noqa: E402
    LayerPrecision,
    datatype,
    precision_of,
    read_layers,
    require_int8,
    weighted_layers,
)
from edgeguard.targets.tensorrt import TensorRTEngine  # noqa: E402

INT8_TACTIC = "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32"
VECTOR = "Thirty-two wide channel vectorized row major Int8 format."


def conv(**changes: Any) -> dict[str, Any]:
    """An INT8 convolution in the words of the inspector, as NVIDIA's documentation shows one."""
    return {
        "Name": "conv + relu", "LayerType": "CaskConvolution", "ParameterType": "Convolution",
        "Inputs": [{"Name": "x", "Dimensions": [16, 512, 28, 28], "Format/Datatype": VECTOR}],
        "Outputs": [{"Name": "y", "Format/Datatype": VECTOR}], "Weights": {"Type": "Int8", "Count": 131072},
        "Bias": {"Type": "Float", "Count": 256}, "TacticName": INT8_TACTIC,
    } | changes  # fmt: skip


def read(*layers: dict[str, Any], **expected: str) -> tuple[LayerPrecision, ...]:
    return read_layers(json.dumps({"Layers": layers}), expected or {"conv": "Conv"})


def test_an_int8_convolution_is_found_by_the_parts_of_its_name() -> None:
    (layer,) = read(conv())
    assert layer == LayerPrecision("conv", "Conv", "int8", INT8_TACTIC, "conv + relu")
    require_int8([layer])


def test_metadata_counts_before_the_name() -> None:
    metadata = "[ONNX Layer: conv.dq]\x1e[ONNX Layer: conv]\x1f[ONNX Layer: relu]"
    (layer,) = read(conv(Name="__myl_conv_0", Metadata=metadata))
    assert (layer.precision, layer.engine_layer) == ("int8", "__myl_conv_0")
    (layer,) = read(conv(Name="conv", Metadata="[ONNX Layer: another]"))
    assert layer.precision == "unknown"


def test_copies_of_a_layers_input_do_not_count() -> None:
    copy = {"Name": "Reformat", "LayerType": "Reformat", "Metadata": "[ONNX Layer: conv]",
            "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP32 format"}]}  # fmt: skip
    assert [layer.precision for layer in read(copy, conv())] == ["int8"]
    assert [layer.precision for layer in read(copy)] == ["unknown"]


FLOAT_CONV = conv(Weights={"Type": "Float"}, TacticName="sm80_xmma_fprop_f32f32_tf32f32_f32")


@pytest.mark.parametrize(
    ("layer", "precision"),
    [
        (FLOAT_CONV, "fp32"),  # integers in and out, but float weights
        (conv(Weights={"Type": "Half"}), "fp16"),
        (conv(Weights={}, TacticName="sm80_xmma_fprop_f16f16_f16f16"), "fp16"),
        (conv(Weights=None, TacticName="", Inputs=[]), "unknown"),
        (conv(Weights=None, TacticName="kgen_1", Inputs=[{"Format/Datatype": "Int8"}]), "unknown"),
        (conv(TacticName="", Inputs=[{"Format/Datatype": "Half"}]), "fp16"),  # weight-only quantization
        (conv(TacticName=""), "int8"),
        ({"Name": "conv", "LayerType": "gemm", "Inputs": [{"DataType": "Int8", "Format": "x"}, {"DataType": "Int8"}]}, "int8"),
        ({"Name": "conv", "LayerType": "gemm", "Inputs": [{"DataType": "Float"}, {"DataType": "Int8"}]}, "fp32"),
    ],
)  # fmt: skip
def test_precisions(layer: dict[str, Any], precision: str) -> None:
    assert precision_of(layer) == precision
    assert read(layer)[0].precision == precision


def test_the_least_favourable_of_several_kernels_counts() -> None:
    assert read(conv(), FLOAT_CONV)[0].precision == "fp32"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Row major linear FP32 format (kLINEAR)", "fp32"), ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("BFloat16", "fp16"), ("Int8", "int8"), ("Int32", "unknown"), ("UInt8", "unknown"), ("", "unknown"),
    ],
)  # fmt: skip
def test_datatypes(text: str, kind: str) -> None:
    assert datatype(text) == kind


def test_float_layers_are_named() -> None:
    layers = read(conv(), FLOAT_CONV | {"Name": "head"}, conv="Conv", head="Gemm", lost="Conv")
    with pytest.raises(ExportError, match=r"INT8: head \(fp32, sm80.*\), lost \(unknown\); no plan was kept"):
        require_int8(layers)


@pytest.mark.parametrize("document", ["", "[]", "{}", "null", json.dumps({"Layers": ["conv", "relu"]})])
def test_what_is_no_layer_information_is_refused(document: str) -> None:
    with pytest.raises(ExportError, match="TensorRT's inspector"):
        read_layers(document, {"conv": "Conv"})


def test_weighted_layers_of_a_model() -> None:
    assert weighted_layers(Net().model()) == {"conv": "Conv", "branch": "Conv", "logits": "Gemm"}


@pytest.mark.parametrize("batches", [(0, 1, 2), (2, 1, 4), (1, 4, 2)])
def test_wrong_batches_are_refused(batches: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="make no profile"):
        BuildOptions(batches)


def test_a_workspace_has_room() -> None:
    with pytest.raises(InputError, match="workspace"):
        BuildOptions(workspace_bytes=0)


def test_spread_of_builds() -> None:
    first = np.array([[1, 0], [0, 1], [3, 2]], np.float32)
    assert spread([first, first]) == {"images": 3, "max_difference": 0.0, "decisions_differing": 0}
    second = first + np.array([[0, 2], [0, 0], [-0.5, 0]], np.float32)
    assert spread([first, second, first]) == {"images": 3, "max_difference": 2.0, "decisions_differing": 1}


def test_one_build_has_no_spread(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2 or more"):
        rebuild_spread(tmp_path / "model.onnx", np.zeros((1, 3, 8, 8), np.uint8), 1)


def test_timing_caches(tmp_path: Path) -> None:
    path = tmp_path / "model.timing"
    assert read_cache(path) == b""
    path.write_bytes(b"abc")
    assert read_cache(path) == b"abc"
    with pytest.raises(InputError, match="cannot read"):
        read_cache(tmp_path)


def test_models_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_model(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(InputError, match="not a readable ONNX file"):
        load_model(tmp_path / "text.onnx")


def test_versions() -> None:
    module = ModuleType("tensorrt")
    for text, version in (("8.6.1", (8, 6)), ("10.3.0.post1", (10, 3)), ("11.4.0.106", (11, 4))):
        module.__version__ = text  # type: ignore[attr-defined]
        assert version_of(module) == version
    module.__version__ = "next"  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="calls its version 'next'"):
        version_of(module)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_without_tensorrt_nothing_is_written(tmp_path: Path) -> None:
    write_qdq(signed_graph(8), tmp_path / "model.onnx", signed=True)
    with pytest.raises(MissingDependency, match=r'pip install "edgeguard\[trt\]"'):
        build_plan(tmp_path / "model.onnx", tmp_path / "model.plan")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.trt
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_plan_builds_in_int8_and_answers_as_the_reference(bits: int, tmp_path: Path) -> None:
    graph, plan = signed_graph(bits), tmp_path / "model.plan"
    write_qdq(graph, tmp_path / "model.onnx", signed=True)
    info = build_plan(tmp_path / "model.onnx", plan, BuildOptions((1, 4, 8)))
    assert {layer["precision"] for layer in info["layers"]} == {"int8"}
    images = graphs.random_images(graph.input_shape, 21, seed=5)
    expected = reference.run(graph, images)[graph.output]
    with TensorRTEngine(plan, graph.input_shape, graph.num_classes) as engine:
        logits = engine(images)  # 8 + 8 + 5 images
        assert np.array_equal(logits, engine(images))
        assert engine(images[:3]).shape == (3, graph.num_classes)
        assert engine.describe()["batch"] == [1, 8]
    assert (logits.argmax(1) == expected.argmax(1)).mean() >= 0.9
    with pytest.raises(EngineError, match="closed"):
        engine(images)
    engine.close()


@pytest.mark.trt
@pytest.mark.usefixtures("gpu")
def test_rebuilds_are_compared(tmp_path: Path) -> None:
    graph = signed_graph(8)
    write_qdq(graph, tmp_path / "model.onnx", signed=True)
    images = graphs.random_images(graph.input_shape, 4)
    result = rebuild_spread(tmp_path / "model.onnx", images, 2, BuildOptions((1, 4, 4)))
    assert (result["builds"], result["images"], len(result["plan_sha256"])) == (2, 4, 2)
    assert 1 <= result["distinct_plans"] <= 2
