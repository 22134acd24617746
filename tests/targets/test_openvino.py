"""OpenVINO's engine: its answers, the kernels it says it chose, and its errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest

from edgeguard.errors import EngineError, InputError
from edgeguard.graph import IntegerGraph
from edgeguard.targets import reference

pytest.importorskip("openvino")
onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper  # noqa: E402

from edgeguard.export.qdq_writer import write_qdq  # noqa: E402
from edgeguard.targets.openvino import Kernel, OpenVinoEngine  # noqa: E402


def opened(graph: IntegerGraph, path: Path, threads: int = 1) -> OpenVinoEngine:
    write_qdq(graph, path, signed=False)
    return OpenVinoEngine(path, graph.input_shape, graph.num_classes, threads)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_qdq(graphs.every_op(4), tmp_path / "model.onnx", signed=False)
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("build", [graphs.every_op, graphs.gated])
def test_the_integers_behind_its_logits_are_the_references(build: Any, bits: int, tmp_path: Path) -> None:
    """The logits differ by float32's rounding alone, unless a tie was decided otherwise on the way: rarely."""
    graph = build(bits)
    images = graphs.random_images(graph.input_shape, 24, seed=9)
    expected = reference.run(graph, images)[graph.output]
    images.flags.writeable = False
    with opened(graph, tmp_path / "model.onnx") as engine:
        got = engine(images)
        np.testing.assert_array_equal(engine(images[:3]), got[:3])
    alike = np.abs(got - expected).max(1) < 1e-5 * np.abs(expected).max()
    assert alike.mean() >= 0.9, f"{(~alike).sum()} of {len(images)} images differ"
    assert (got.argmax(1) == expected.argmax(1)).mean() >= 0.95


@pytest.mark.parametrize("bits", [8, 2])
def test_every_layer_is_one_integer_kernel(bits: int, tmp_path: Path) -> None:
    graph = graphs.every_op(bits)
    with opened(graph, tmp_path / "model.onnx") as engine:
        kernels = engine.kernels()
    layers = [node.name for node in graph.nodes if graph.macs(node)]
    assert len(kernels) == len(layers) == 7
    for layer in layers:
        (kernel,) = [kernel for kernel in kernels if kernel.executes(layer)]
        assert kernel.integer, kernel
        assert kernel.kind == ("Convolution" if layer.startswith("conv") else "FullyConnected")
        assert kernel.weights > 0


def test_a_float_model_has_float_kernels(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")
    body = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["f", "w"], ["c"], name="layer"),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["y"]),
    ]
    path = save(tmp_path / "float.onnx", body, TensorProto.UINT8, TensorProto.FLOAT, [weight])
    with OpenVinoEngine(path, (3, 8, 8), 4, 1) as engine:
        (kernel,) = engine.kernels()
    assert kernel.executes("layer")
    assert (kernel.precision, kernel.weight_precision, kernel.integer) == ("f32", "f32", False)


def test_the_layer_of_a_kernel_is_told_by_its_weights_and_by_names() -> None:
    kernel = Kernel("conv1", "Convolution", "u8", "i8", "brgconv", "", 9, ("conv1/WithoutBiases", "conv2/quantize"))
    assert kernel.executes("conv1")
    assert not any(kernel.executes(name) for name in ("conv2", "conv", "conv1/Without"))
    assert Kernel("m", "MatMul", "u8", "f32", "", "fc/weight", 0, ("Multiply_5",)).executes("fc")
    assert Kernel("m", "MatMul", "u8", "f32", "", "", 0, ("m",)).integer is False


def save(path: Path, nodes: list[Any], source: int, target: int, weights: Any = ()) -> Path:
    ends = [helper.make_tensor_value_info("x", source, ["N", 3, 8, 8]), helper.make_tensor_value_info("y", target, None)]
    body = helper.make_graph(nodes, "g", ends[:1], ends[1:], list(weights))
    onnx.save(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_it_describes_itself(model: Path) -> None:
    with OpenVinoEngine(model, (3, 13, 11), 10, threads=1) as engine:
        described = engine.describe()
    assert (described["runtime"], described["provider"], described["threads"]) == ("openvino", "CPU", 1)
    assert described["options"] == {"INFERENCE_PRECISION_HINT": "f32"}
    assert described["version"]
    assert "CPU" in described["device"]
    assert len(described["kernels"]) == 7
    assert described["kernels"][0]["precision"] in ("u8", "i8")


def test_a_closed_engine_says_so(model: Path) -> None:
    engine = OpenVinoEngine(model, (3, 13, 11), 10)
    engine.close()
    with pytest.raises(EngineError, match="the openvino engine is closed"):
        engine(np.zeros((1, 3, 13, 11), np.uint8))
    with pytest.raises(EngineError, match="the openvino engine is closed"):
        engine.kernels()


def test_other_inputs_and_outputs_are_refused(tmp_path: Path) -> None:
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.INT32)
    path = save(tmp_path / "model.onnx", [node], TensorProto.FLOAT, TensorProto.INT32)
    with pytest.raises(EngineError, match="expected uint8 pixels in and float32 logits out, got f32, i32"):
        OpenVinoEngine(path, (3, 8, 8), 3)


def test_what_cannot_be_loaded_is_an_engine_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    for path in (tmp_path / "model.onnx", tmp_path / "missing.onnx"):
        with pytest.raises(EngineError, match=r"openvino .* cannot load") as caught:
            OpenVinoEngine(path, (3, 8, 8), 3)
        assert "\n" not in str(caught.value)


def test_failures_while_running_are_engine_errors(model: Path) -> None:
    with OpenVinoEngine(model, (3, 12, 12), 10) as engine, pytest.raises(EngineError, match="failed to run the model"):
        engine(np.zeros((1, 3, 12, 12), np.uint8))


def test_a_negative_number_of_threads_is_refused(model: Path) -> None:
    with pytest.raises(InputError, match="-1 threads"):
        OpenVinoEngine(model, (3, 13, 11), 10, threads=-1)
