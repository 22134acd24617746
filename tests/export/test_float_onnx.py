"""The float twin of an integer graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest
import small_artifact

from edgeguard import graph as g
from edgeguard.errors import ExportError
from edgeguard.graph import IntegerGraph, Tensor
from edgeguard.inttype import IntType
from edgeguard.targets.ort import open_session
from edgeguard.targets.reference import ReferenceEngine

onnx = pytest.importorskip("onnx")

from edgeguard.export.float_onnx import FUNCTIONS, float_onnx, lookup_function  # noqa: E402


def test_it_computes_about_what_the_integers_compute(tmp_path: Path) -> None:
    graph = small_artifact.small_graph(8)
    images = graphs.random_images(graph.input_shape, 16)
    onnx.save(float_onnx(graph), tmp_path / "float.onnx")
    session = open_session(tmp_path / "float.onnx", 1)
    pixels = ((images / 255 - graphs.MEAN[:, None, None]) / graphs.STD[:, None, None]).astype(np.float32)
    logits = session.run(None, {session.get_inputs()[0].name: pixels})[0]
    expected = ReferenceEngine(graph)(images)
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.97  # the integers clip what is out of range


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tables_are_recognized(name: str) -> None:
    graph, node = with_table(FUNCTIONS[name])
    assert lookup_function(graph, node) == name


def test_an_unknown_table_is_an_error() -> None:
    graph, node = with_table(np.cos)
    with pytest.raises(ExportError, match="no float equivalent of this look-up table"):
        lookup_function(graph, node)


def with_table(function: Callable[..., Any]) -> tuple[IntegerGraph, g.Lookup]:
    """A graph whose tensors `x` and `y` a look-up table joins; the rest of it is never looked at."""
    source, target = IntType(8, signed=True), IntType(8, signed=True)
    x = np.arange(source.qmin, source.qmax + 1) * 0.05
    table = np.clip(np.rint(function(x) / 0.05), target.qmin, target.qmax).astype(np.int16)
    base = small_artifact.small_graph(8)
    tensors = {**base.tensors, "x": Tensor("x", (4,), source, 0.05), "y": Tensor("y", (4,), target, 0.05)}
    stub = dataclasses.replace(base)
    object.__setattr__(stub, "tensors", tensors)
    return stub, g.Lookup("f", "x", "y", table, np.zeros(len(table), np.float32))
