"""ONNX Runtime's engine: its session options, and the graph it says it executes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest

from edgeguard.errors import EngineError
from edgeguard.targets import cpu_flags, ort, reference
from edgeguard.targets.ort import OrtEngine, write_optimized

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper  # noqa: E402

from edgeguard.export.onnx_writer import write_onnx  # noqa: E402


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_onnx(graphs.every_op(8), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_the_tried_product_is_a_valid_model_of_one_node() -> None:
    parsed = onnx.load_model_from_string(ort.PRODUCT)
    onnx.checker.check_model(parsed)
    assert [node.op_type for node in parsed.graph.node] == ["MatMulInteger"]


def test_a_model_of_a_later_onnx_says_what_helps(tmp_path: Path) -> None:
    later = onnx.load_model_from_string(ort.PRODUCT)
    later.ir_version = 120
    onnx.save(later, tmp_path / "later.onnx")
    with pytest.raises(EngineError, match=r"IR version: 120.*; update onnxruntime, or export with --target ort-legacy$"):
        ort.open_session(tmp_path / "later.onnx")


def test_vnni_never_saturates() -> None:
    if {"avx512_vnni", "avx_vnni"} & set(cpu_flags()):
        assert not ort.saturates()
    assert ort.session_options() == ({ort.PRECISION: "1"} if ort.saturates() else {})
    assert ort.session_options(wide=False) == {}


def test_the_precise_kernels_give_the_same_logits(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU without VNNI runs: weights as uint8. Its logits are the reference's as well."""
    monkeypatch.setattr(ort, "saturates", lambda: True)
    graph = graphs.every_op(8)
    images = graphs.random_images(graph.input_shape, 6)
    with OrtEngine(model, graph.input_shape, graph.num_classes) as engine:
        assert engine.describe()["options"] == {"session.x64quantprecision": "1"}
        np.testing.assert_array_equal(engine(images), reference.run(graph, images)[graph.output])


def test_the_optimized_graph_is_written(model: Path, tmp_path: Path) -> None:
    assert write_optimized(model, tmp_path / "optimized.onnx") == "CPUExecutionProvider"
    domains = {(node.op_type, node.domain) for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert ("QLinearConv", "com.microsoft") in domains, "the runtime's own channels-last convolution"


def save(path: Path, kinds: tuple[int, int], op: str = "Cast", **attributes: Any) -> Path:
    values = [helper.make_tensor_value_info(name, kind, ["N", 3]) for name, kind in zip("xy", kinds, strict=True)]
    body = helper.make_graph([helper.make_node(op, ["x"], ["y"], **attributes)], "g", values[:1], values[1:])
    onnx.save(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("kinds", [(TensorProto.FLOAT, TensorProto.FLOAT), (TensorProto.UINT8, TensorProto.INT32)])
def test_other_inputs_and_outputs_are_refused(tmp_path: Path, kinds: tuple[int, int]) -> None:
    path = save(tmp_path / "model.onnx", kinds, to=kinds[1])
    with pytest.raises(EngineError, match="expected uint8 pixels in and float32 logits out"):
        OrtEngine(path, (3, 1, 1), 3)


def test_failures_while_running_are_engine_errors(model: Path) -> None:
    with OrtEngine(model, (3, 12, 12), 10) as engine, pytest.raises(EngineError, match="failed to run the model"):
        engine(np.zeros((1, 3, 12, 12), np.uint8))


def test_a_wrong_number_of_logits_is_an_engine_error(model: Path) -> None:
    with OrtEngine(model, (3, 13, 11), 11) as engine, pytest.raises(EngineError, match=r"returned \(1, 10\)"):
        engine(np.zeros((1, 3, 13, 11), np.uint8))
