"""A small artifact of an integer graph with random weights, and images that its own answers label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphs
import numpy as np

from edgeguard import graph as g
from edgeguard.artifact import GRAPH, Artifact, write_manifest
from edgeguard.data.dataset import Dataset, from_arrays
from edgeguard.graph import IntegerGraph
from edgeguard.graph_io import save_graph
from edgeguard.targets.reference import ReferenceEngine

SIDE, CLASSES = 16, 5


def small_graph(bits: int = 4, seed: int = 0) -> IntegerGraph:
    builder = graphs.Builder(bits, (3, SIDE, SIDE), seed)
    x = builder.conv(builder.quantize(), 8, stride=2, bits=8)
    x = builder.conv(x, 12, stride=2)
    x = builder.move(g.Flatten, x)
    return builder.finish(builder.linear(x, CLASSES, bits=8, accumulators=True))


def write_artifact(folder: Path, graph: IntegerGraph, width: str, **changes: Any) -> Artifact:
    folder.mkdir()
    save_graph(graph, folder / GRAPH)
    manifest = {
        "target": "reference", "width": width, "weight_bits": 4, "activation_bits": 4,
        "num_classes": graph.num_classes, "input_shape": list(graph.input_shape),
        "proof": {"integer_mac_coverage": 1.0}, "layers": [], "source": {"patch_sizes": [4]}, "versions": {},
    }  # fmt: skip
    write_manifest(folder, {**manifest, **changes})
    return Artifact.load(folder)


def labelled(graph: IntegerGraph, count: int, seed: int = 5) -> Dataset:
    images = graphs.random_images(graph.input_shape, count, seed)
    labels = ReferenceEngine(graph)(images).argmax(1).astype(np.int64)
    names = tuple(f"class {index}" for index in range(graph.num_classes))
    return from_arrays("random", np.ascontiguousarray(images.transpose(0, 2, 3, 1)), labels, names)
