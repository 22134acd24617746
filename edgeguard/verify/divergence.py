"""Where an engine and its twin part: per layer, how many integer steps lie between them, without and with a patch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.artifact import Artifact
from edgeguard.errors import InputError, MissingDependency
from edgeguard.graph import Dequantize, IntegerGraph, Node
from edgeguard.targets import Engine, Images, artifact_runtime, open_engine
from edgeguard.targets.differences import logit_steps
from edgeguard.targets.layers import UNREADABLE, LayerReader, open_layers
from edgeguard.verify.harness import Tick

if TYPE_CHECKING:
    from edgeguard.targets.twin import Twin

BATCH = 64
"""Most images at a time."""
MEMORY, BYTES_PER_INTEGER = 256 << 20, 12
"""Bytes that the layers of one batch may take, and those of one integer: the runtime's, ours, the twin's float32."""


def divergence(
    artifact: Artifact, runtime: str | None, twin: Twin, clean_images: Images, patched_images: Images,
    names: Collection[str] | None = None, threads: int = 0, tick: Tick | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compare the integers of an engine with those of its twin, layer by layer.

    An early difference travels on, so the first layer that differs is where to look; later ones show how it grows.

    Args:
        runtime: as `open_engine` spells it; None for the artifact's own.
        clean_images, patched_images: (N, 3, H, W) uint8, the same images without and with a patch.
        names: tensors of the graph to compare, its output (the logits) among them; None for all that can be read.
        tick: called with the images done and their total.

    Returns:
        `n`: images of each kind. `reason`: None, or why the runtime cannot be looked into; then there are no layers.
        `layers`: in the graph's order, `layer` and `op` of the node and, for `clean` and `patched`, `equal`: share of
        integers that are the same, and `steps`: integers by the magnitude of their difference, in the classes of
        `logit_steps`. The last entry is that of the logits, in accumulator steps of the last layer.
        `first`: name of the first layer with a difference, or None, for `clean` and `patched`.
        `skipped`: `tensor` and `reason` of those that cannot be read. `undisturbed`: share of images, for `clean` and
        `patched`, whose logits are those of the deployed engine bit for bit while its layers are read.

    Raises:
        InputError: sets of images of different sizes, a tensor that the graph does not have, or a twin of another graph.
        EngineError: as `open_engine`.
    """
    if len(clean_images) != len(patched_images):
        raise InputError(f"expected as many patched images as clean ones, got {len(patched_images)} and {len(clean_images)}")
    runtime = runtime or artifact_runtime(artifact)
    if runtime in UNREADABLE:
        return _unread(len(clean_images), UNREADABLE[runtime])
    try:
        reader = open_layers(artifact, runtime, names, threads)
    except MissingDependency as exc:  # the machine that an engine is deployed on may lack onnx; that costs this alone
        return _unread(len(clean_images), str(exc))
    _check_twin(twin.graph, reader)
    logits = names is None or reader.graph.output in names
    kinds = {"clean": clean_images, "patched": patched_images}
    steps: dict[str, dict[str, Counter[str]]] = {}
    undisturbed: dict[str, float] = {}
    with open_engine(artifact, runtime, threads) as engine:
        for index, (kind, images) in enumerate(kinds.items()):
            done = (index * len(clean_images), 2 * len(clean_images))
            steps[kind], undisturbed[kind] = _compare(reader, engine, twin, images, tick, done)
    layers: list[dict[str, Any]] = [
        {"layer": node.name, "op": type(node).__name__.lower(), **{kind: _entry(steps[kind][tensor]) for kind in kinds}}
        for tensor, node in _compared(reader, logits)
    ]
    first = {kind: next((str(layer["layer"]) for layer in layers if layer[kind]["equal"] < 1), None) for kind in kinds}
    skipped = [{"tensor": name, "reason": reason} for name, reason in reader.skipped.items()]
    return {"n": len(clean_images), "reason": None, "layers": layers, "first": first, "skipped": skipped,
            "undisturbed": undisturbed}  # fmt: skip


def _unread(n: int, reason: str) -> dict[str, Any]:
    return {"n": n, "reason": reason, "layers": [], "first": {"clean": None, "patched": None}, "skipped": [],
            "undisturbed": None}  # fmt: skip


def _check_twin(graph: IntegerGraph, reader: LayerReader) -> None:
    other = [name for name in reader.names if graph.tensors.get(name) != reader.graph.tensors[name]]
    if other or graph.output != reader.graph.output or graph.input_shape != reader.graph.input_shape:
        raise InputError(
            f"the twin is of another graph than the artifact: they differ in {other[0] if other else 'their ends'!r}; "
            "make it from the artifact's own graph"
        )


def _compared(reader: LayerReader, logits: bool) -> list[tuple[str, Node]]:
    """Tensors and the nodes they are reported under: the logits under the layer whose accumulators they are."""
    graph = reader.graph
    by_output = {node.output: node for node in graph.nodes}
    found = [(node.output, node) for node in graph.nodes if node.output in reader.names]
    last = graph.nodes[-1]
    if logits and isinstance(last, Dequantize):
        accumulators = graph.tensors[last.input].scale is None
        found.append((last.output, by_output[last.input] if accumulators else last))
    return found


def _compare(reader: LayerReader, engine: Engine, twin: Twin, images: Images, tick: Tick | None,
             done: tuple[int, int]) -> tuple[dict[str, Counter[str]], float]:  # fmt: skip
    """Steps by class for every tensor, and the share of images on which reading layers left the logits as they are."""
    import torch

    graph = reader.graph
    last = graph.nodes[-1]
    scales = {graph.output: last.scale} if isinstance(last, Dequantize) else {}
    device = next((buffer.device for buffer in twin.buffers()), torch.device("cpu"))
    steps: dict[str, Counter[str]] = {name: Counter() for name in (*reader.names, graph.output)}
    integers = sum(int(np.prod(graph.tensors[name].shape)) for name in reader.names)
    batch = max(1, min(BATCH, MEMORY // (BYTES_PER_INTEGER * max(1, integers))))
    kept = 0
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        got = reader(part)
        with torch.inference_mode():
            expected = twin.run(torch.from_numpy(part.copy()).to(device), keep=reader.names)
        for name, counts in steps.items():
            counts.update(_steps(got.pop(name) if name != graph.output else got[name],
                                 expected.pop(name).cpu().numpy(), scales.get(name)))  # fmt: skip
        kept += int((engine(part) == got[graph.output]).all(1).sum())
        if tick is not None:
            tick(done[0] + start + len(part), done[1])
    return steps, kept / len(images)


def _steps(got: NDArray[Any], expected: NDArray[np.float32], scale: NDArray[np.float32] | None) -> dict[str, int]:
    if scale is not None:
        return logit_steps(got, expected, scale)
    differing = got != expected
    counts = logit_steps(got[differing].astype(np.float32), expected[differing], np.ones((), np.float32))
    same = got.size - int(np.count_nonzero(differing))
    return {**({"0": same} if same else {}), **counts}


def _entry(counts: Counter[str]) -> dict[str, Any]:
    ordered = sorted(counts, key=lambda name: int(name.split("-")[0]))
    return {"equal": counts["0"] / counts.total(), "steps": {name: counts[name] for name in ordered}}
