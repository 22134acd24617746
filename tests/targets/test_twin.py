"""The twin: the reference's integers, and the gradients of a hand-written straight-through estimator."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import pytest

from edgeguard import graph as g
from edgeguard.errors import EngineError, InputError
from edgeguard.graph import IntegerGraph
from edgeguard.inttype import IntType
from edgeguard.targets import reference

torch = pytest.importorskip("torch")

from torch.nn import functional  # noqa: E402

from edgeguard.targets import twin_steps  # noqa: E402
from edgeguard.targets.twin import Twin, TwinEngine  # noqa: E402

F64 = torch.float64


def straight(exact: Any, value: Any) -> Any:
    """`value` forward, the gradient of `exact` backward; the first term is exactly zero."""
    return exact - exact.detach() + value.detach()


def clip(z: Any, low: int, high: int) -> Any:
    """Straight-through round and clamp. The gradient includes the limits; that of `torch.clamp` depends on its version."""
    z = straight(z, z.round())
    return torch.where((z >= low) & (z <= high), z, z.detach().clamp(low, high))


def straight_through(graph: IntegerGraph, pixels: Any) -> Any:
    """Logits by plain autograd in float64, forward values rounded to float32 where the formulas say so."""

    def once(exact: Any) -> Any:
        return straight(exact, exact.float().double())

    def tensor(values: Any) -> Any:
        return torch.tensor(np.asarray(values), dtype=F64)

    values = {"pixels": pixels.double()}
    for node in graph.nodes:
        inputs = [values[name] for name in g.node_inputs(node)]
        x = inputs[0]
        if isinstance(node, g.Dequantize):
            return x * tensor(node.scale)
        dtype = graph.tensors[node.output].dtype
        low, high = dtype.qmin, dtype.qmax
        if isinstance(node, g.Quantize):
            scale, point = tensor(node.scale)[:, None, None], tensor(node.zero_point)[:, None, None]
            y = clip(once(x / scale) + point, low, high)
        elif isinstance(node, g.Conv):
            top, left, bottom, right = node.padding
            y = functional.conv2d(functional.pad(x, (left, right, top, bottom)), tensor(node.weight), tensor(node.bias),
                                  node.stride, 0, node.dilation, node.groups)  # fmt: skip
            y = clip(once(once(y) * tensor(graph.multiplier(node))[:, None, None]), low, high)
        elif isinstance(node, g.Linear):
            y = x @ tensor(node.weight).T + tensor(node.bias)
            if dtype.bits < 32:
                y = clip(once(once(y) * tensor(graph.multiplier(node))), low, high)
        elif isinstance(node, g.Add):
            first, second = graph.add_ratios(node)
            y = clip(x * first + inputs[1] * second, low, high)
        elif isinstance(node, g.Multiply):
            y = clip(once(x * inputs[1] * float(graph.product_multiplier(node))), low, high)
        elif isinstance(node, g.Lookup):
            index = (x.detach() - graph.tensors[node.input].dtype.qmin).long()
            y = straight(x * tensor(node.slope)[index], tensor(node.table)[index])
        elif isinstance(node, g.Slice):
            y = x[:, node.start : node.stop]
        elif isinstance(node, g.Take):
            y = x[:, :, list(node.rows)][:, :, :, list(node.columns)]
        elif isinstance(node, g.Shuffle):
            parts = x.unflatten(1, (node.groups, -1))
            y = parts.transpose(1, 2).flatten(1, 2)
        elif isinstance(node, g.AveragePool):
            windows = x.unfold(2, node.kernel[0], node.stride[0]).unfold(3, node.kernel[1], node.stride[1])
            y = clip(once(windows.sum((4, 5)) * float(graph.average_multiplier(node))), low, high)
        elif isinstance(node, g.MaxPool):
            top, left, bottom, right = node.padding
            y = functional.max_pool2d(functional.pad(x, (left, right, top, bottom), value=-1e9), node.kernel, node.stride)
        elif isinstance(node, g.Pad):
            top, left, bottom, right = node.padding
            y = functional.pad(x, (left, right, top, bottom, *node.channels))
        elif isinstance(node, g.Concat):
            y = torch.cat(inputs, 1)
        elif isinstance(node, g.Flatten):
            y = x.flatten(1)
        else:
            y = clip(x, node.low, node.high)
        values[node.output] = y
    raise AssertionError("no Dequantize")


def pixels_of(graph: IntegerGraph, count: int, seed: int = 3) -> Any:
    return torch.from_numpy(graphs.random_images(graph.input_shape, count, seed)).float()


def gradient(model: Any, pixels: Any) -> tuple[Any, Any]:
    """Logits, and the gradient of a loss in which every logit counts differently."""
    pixels = pixels.clone().requires_grad_()
    logits = model(pixels)
    weights = torch.linspace(-1, 2, logits.shape[1], dtype=logits.dtype)
    return logits.detach(), torch.autograd.grad((logits * weights).sum(), pixels)[0]


@pytest.mark.parametrize("build", [graphs.every_op, graphs.gated, graphs.resnet20])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_gradients_are_straight_through(build: Any, bits: int) -> None:
    graph = build(bits)
    pixels = pixels_of(graph, 3)
    logits, got = gradient(Twin(graph), pixels)
    same, expected = gradient(lambda x: straight_through(graph, x), pixels)
    np.testing.assert_array_equal(logits.numpy(), reference.run(graph, pixels.numpy().astype(np.uint8))[graph.output])
    np.testing.assert_allclose(logits.numpy(), same.numpy(), rtol=1e-6)
    assert got.dtype == torch.float32
    assert float(got.abs().max()) > 0
    scale = float(expected.abs().max())
    np.testing.assert_allclose(got.numpy(), expected.numpy(), rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("build", [graphs.every_op, graphs.gated])
def test_every_tensor_is_the_references(build: Any) -> None:
    graph = build(4)
    images = graphs.random_images(graph.input_shape, 3)
    expected = reference.run(graph, images, keep=graph.tensors)
    twin = Twin(graph)
    for pixels in (torch.from_numpy(images), torch.from_numpy(images).float().requires_grad_()):
        got = twin.run(pixels, keep=graph.tensors)
        assert got.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(got[name].detach().numpy(), values.astype(np.float32), err_msg=name)
    assert twin.run(pixels).keys() == {graph.output}
    with pytest.raises(InputError, match="no tensor"):
        twin.run(pixels, keep=["nonsense"])


def saturating_graph(groups: int, channels: int) -> IntegerGraph:
    """A graph whose second convolution really exceeds 2**24, the largest integer float32 counts to."""
    builder = graphs.Builder(8, (3, 6, 6), 0)
    x = builder.conv(builder.quantize(), channels, kernel=1)
    rng = np.random.default_rng(1)
    weight = rng.integers(120, 128, (6, channels // groups, 3, 3)).astype(np.int8)
    weight[::2] *= -1
    name, scale = "wide", np.full(6, 1e-4, np.float32)
    node = g.Conv(name, x, "wide.out", weight, IntType(8, True, True), scale, np.zeros(6, np.int32), (1, 1), (1,) * 4,
                  (1, 1), groups)  # fmt: skip
    sums = reference.convolve(node, builder.values[x], builder.tensors[x].dtype).transpose(0, 2, 3, 1)
    assert np.abs(sums).max() > 1 << 24
    builder.append_product(node, sums, IntType(8, True), None)
    return builder.finish(builder.linear(builder.move(g.Flatten, "wide.out"), 10, accumulators=True))


@pytest.mark.parametrize(("groups", "portions"), [(1, True), (2, False)])
def test_sums_beyond_float32_stay_exact(groups: int, portions: bool) -> None:
    """Dense convolutions are split into portions of channels; grouped ones fall back to float64."""
    graph = saturating_graph(groups, 512 * groups)
    node = next(n for n in graph.nodes if n.name == "wide")
    assert isinstance(node, g.Conv)
    slices = twin_steps.exact_slices(node, graph.tensors[node.input].dtype)
    assert (len(slices) > 1) is portions
    if portions:
        covered = [index for part in slices for index in range(part.start, part.stop)]
        assert covered == list(range(node.weight.shape[1]))
    images = graphs.random_images(graph.input_shape, 4, seed=8)
    expected = reference.run(graph, images, keep=["wide.out"])
    got = Twin(graph).run(torch.from_numpy(images), keep=["wide.out"])
    for name, values in expected.items():
        np.testing.assert_array_equal(got[name].numpy(), values.astype(np.float32))
    _, left = gradient(Twin(graph), torch.from_numpy(images).float())
    _, right = gradient(lambda x: straight_through(graph, x), torch.from_numpy(images).float())
    np.testing.assert_allclose(left.numpy(), right.numpy(), rtol=1e-3, atol=1e-5 * float(right.abs().max()))


def test_no_gradient_beyond_the_input_quantizers_range() -> None:
    graph = graphs.every_op(8)
    quantize = graph.nodes[0]
    assert isinstance(quantize, g.Quantize)
    narrow = g.Quantize(quantize.name, quantize.input, quantize.output, quantize.scale / 2, quantize.zero_point)
    graph = IntegerGraph((narrow, *graph.nodes[1:]), graph.tensors)
    pixels = pixels_of(graph, 4)
    _, got = gradient(Twin(graph), pixels)
    scale, point = (torch.from_numpy(v)[:, None, None] for v in (narrow.scale, narrow.zero_point))
    integers = (pixels / scale).round() + point
    beyond = (integers < -128) | (integers > 127)
    assert beyond.any()
    assert (got[beyond] == 0).all()
    assert (got[~beyond] != 0).any()


def test_pixels_between_integers_round_with_the_first_quantizer() -> None:
    graph = graphs.every_op(8)
    pixels = pixels_of(graph, 2)
    twin = Twin(graph)
    assert torch.equal(twin(pixels + 1e-3), twin(pixels))
    assert not torch.equal(twin((pixels + 2.4).clamp(0, 255)), twin(pixels))


def test_results_do_not_depend_on_global_switches() -> None:
    graph = graphs.resnet20(4)
    pixels = pixels_of(graph, 4)
    twin = Twin(graph)
    logits, expected = gradient(twin, pixels)
    again, repeated = gradient(twin, pixels)
    assert torch.equal(again, logits)
    assert torch.equal(repeated, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(twin(pixels), logits)
    with torch.inference_mode():
        assert torch.equal(twin(pixels.contiguous(memory_format=torch.channels_last)), logits)
    with torch.no_grad():
        assert torch.equal(twin(pixels.to(torch.uint8)), logits)


def test_the_callers_images_are_left_alone() -> None:
    graph = graphs.every_op(4)
    pixels = pixels_of(graph, 2)
    before = pixels.clone()
    Twin(graph)(pixels)
    gradient(Twin(graph), pixels)
    assert torch.equal(pixels, before)


def test_no_parameters_and_nothing_to_save() -> None:
    twin = Twin(graphs.every_op(4))
    assert list(twin.parameters()) == []
    assert twin.state_dict() == {}


@pytest.mark.parametrize(
    "images",
    [torch.zeros(1, 3, 13, 12), torch.zeros(1, 3, 13, 11, dtype=F64), torch.zeros(3, 13, 11), torch.zeros(1, 1, 13, 11)],
)
def test_wrong_images_are_refused(images: Any) -> None:
    with pytest.raises(InputError, match=r"expected \(N, 3, 13, 11\) uint8 or float32"):
        Twin(graphs.every_op(4))(images)


def test_engine_restores_the_number_of_threads() -> None:
    graph = graphs.every_op(4)
    before = torch.get_num_threads()
    with TwinEngine(graph, threads=before + 1) as engine:
        engine(graphs.random_images(graph.input_shape, 1))
    assert torch.get_num_threads() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_a_device_that_is_not_there_is_an_engine_error() -> None:
    with pytest.raises(EngineError, match="device 'cuda' cannot be used"):
        TwinEngine(graphs.every_op(4), device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_cuda_has_the_same_integers_and_deterministic_gradients(bits: int) -> None:
    graph = graphs.resnet20(bits)
    images = graphs.random_images(graph.input_shape, 64)
    with TwinEngine(graph, device="cuda") as engine:
        np.testing.assert_array_equal(engine(images), reference.run(graph, images)[graph.output])
    twin = Twin(graph).to("cuda")
    pixels = torch.from_numpy(images).float()
    results = []
    for _ in range(2):
        leaf = pixels.to("cuda").requires_grad_()
        results.append(torch.autograd.grad(twin(leaf).square().sum(), leaf)[0])
    assert torch.equal(results[0], results[1])
    leaf = pixels.requires_grad_()
    expected = torch.autograd.grad(Twin(graph)(leaf).square().sum(), leaf)[0]
    np.testing.assert_allclose(results[0].cpu().numpy(), expected.numpy(), rtol=1e-3, atol=1e-4)
