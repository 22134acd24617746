"""A stored graph comes back as it was; a hostile one comes back as one clear sentence."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest

from edgeguard.errors import ArtifactError
from edgeguard.graph_io import load_graph, save_graph
from edgeguard.targets import reference


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "graph.npz"
    save_graph(graphs.every_op(4), path)
    return path


@pytest.mark.parametrize("build", [graphs.every_op, graphs.gated, graphs.resnet20])
def test_round_trip(build: Any, tmp_path: Path) -> None:
    graph = build(2)
    save_graph(graph, tmp_path / "a.npz")
    loaded = load_graph(tmp_path / "a.npz")
    assert loaded.tensors == graph.tensors
    assert loaded.input == graph.input
    assert [type(node) for node in loaded.nodes] == [type(node) for node in graph.nodes]
    for got, expected in zip(loaded.nodes, graph.nodes, strict=True):
        for field in fields(expected):
            a, b = getattr(got, field.name), getattr(expected, field.name)
            assert type(a) is type(b)
            np.testing.assert_array_equal(a, b)
    images = graphs.random_images(graph.input_shape, 2)
    np.testing.assert_array_equal(reference.run(loaded, images)["logits"], reference.run(graph, images)["logits"])


def test_equal_graphs_give_equal_bytes(stored: Path, tmp_path: Path) -> None:
    save_graph(load_graph(stored), tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == stored.read_bytes()


def rewrite(path: Path, edit: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Let `edit` change the JSON document and the arrays of a stored graph."""
    with np.load(path) as data:
        arrays = dict(data.items())
    document = json.loads(arrays.pop("graph").tobytes())
    edit(document, arrays)
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    np.savez(path, graph=np.frombuffer(text, np.uint8), **arrays)


def nodes(document: dict[str, Any], op: str) -> list[dict[str, Any]]:
    return [entry for entry in document["nodes"] if entry["op"] == op]


def edit_node(op: str, /, **changes: Any) -> Any:
    return lambda document, arrays: nodes(document, op)[0].update(changes)


def edit_tensor(**changes: Any) -> Any:
    return lambda document, arrays: document["tensors"][2].update(changes)


def edit_array(name: str, change: Callable[[Any], Any]) -> Any:
    return lambda document, arrays: arrays.update({name: change(arrays[name])})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda document, arrays: document.update(schema="edgeguard.graph/2"), "schema 'edgeguard.graph/2'; this version"),
        (lambda document, arrays: document.pop("nodes"), "nodes"),
        (lambda document, arrays: document.update(nodes=7), "not a readable integer graph"),
        (lambda document, arrays: document.update(nodes=[]), "ends in a Dequantize"),
        (lambda document, arrays: document.update(input=["pixels"]), "not a readable integer graph"),
        (edit_node("Conv", op="Exec"), "unknown operation 'Exec'"),
        (edit_node("Conv", op=["Conv"]), "not a readable integer graph"),
        (edit_node("Conv", op="__class__"), "unknown operation"),
        (edit_node("Conv", extra=1), "unknown field 'extra' of a Conv"),
        (edit_node("Conv", __class__="x"), "unknown field '__class__'"),
        (edit_node("Conv", stride=[1.0, 1.0]), "stride must be 2 integers"),
        (edit_node("Conv", stride="11"), "stride must be 2 integers"),
        (edit_node("Conv", stride=[1, 1, 1]), "stride must be 2 integers"),
        (edit_node("Conv", groups=True), "field 'groups' of a Conv cannot be True"),
        (edit_node("Conv", groups=None), "cannot be None"),
        (edit_node("Conv", name=3), "name must be text"),
        (edit_node("Conv", padding=[1 << 40] * 4), "when it is padded"),
        (edit_node("Conv", weight_type={"bits": 8.0, "signed": True, "narrow": True}), "is not an integer type"),
        (edit_node("Conv", weight_type={"bits": 64, "signed": True, "narrow": True}), "bit-width 64 is not supported"),
        (edit_node("Conv", weight_type=7), "not a readable integer graph"),
        (edit_node("Conv", weight="a"), "unknown field 'weight'"),
        (edit_node("Concat", inputs=[["conv1.out"]]), "inputs must be text"),
        (edit_tensor(shape=[1 << 25, 1, 1]), "impossible shape"),
        (edit_tensor(shape=[1 << 24, 1 << 24, 1]), "impossible shape"),
        (edit_tensor(shape=[0]), "impossible shape"),
        (edit_tensor(shape=[]), "impossible shape"),
        (edit_tensor(shape=[True]), "impossible shape"),
        (edit_tensor(scale="1"), "no number as its scale"),
        (edit_tensor(scale=10**400), "not a readable integer graph"),
        (edit_tensor(scale=[1]), "no number as its scale"),
        (edit_tensor(name="other"), "conv1.out"),
        (lambda document, arrays: arrays.pop("1.weight"), "1.weight"),
        (edit_array("1.weight", lambda values: values.astype(np.float32)), "array of int8, got float32"),
        (edit_array("1.bias", lambda values: values.astype(np.int64)), "array of int32, got int64"),
        (edit_array("1.weight_scale", lambda values: values.astype(np.float64)), "array of float32"),
        (edit_array("1.weight", lambda values: values[:0]), "declared"),
        (edit_array("1.weight", lambda values: np.zeros(())), "array of int8"),
        (edit_array("1.weight_scale", lambda values: values * np.float32("inf")), "positive and finite"),
    ],
)  # fmt: skip
def test_hostile_contents_are_refused(stored: Path, edit: Any, message: str) -> None:
    rewrite(stored, edit)
    with pytest.raises(ArtifactError, match=message):
        load_graph(stored)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"schema": NaN}'])
def test_hostile_json_is_refused(stored: Path, text: bytes) -> None:
    with np.load(stored) as data:
        arrays = dict(data.items())
    arrays["graph"] = np.frombuffer(text, np.uint8)
    np.savez(stored, **arrays)
    with pytest.raises(ArtifactError):
        load_graph(stored)


def test_pickles_are_never_executed(stored: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("a pickle was executed",))

    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + pickle.dumps([Bomb()])
    with zipfile.ZipFile(stored, "a") as archive:
        archive.writestr("hostile.npy", member)
    with pytest.raises(ArtifactError, match="pickled objects"):
        load_graph(stored)


def test_huge_declared_arrays_are_refused_before_allocation(stored: Path) -> None:
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776,), }"
    with zipfile.ZipFile(stored, "a") as archive:
        archive.writestr("huge.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(8))
    with pytest.raises(ArtifactError, match=r"declares \(1099511627776,\) float64"):
        load_graph(stored)


@pytest.mark.parametrize("length", [0, 1, 50, 1000, -30])
def test_truncated_files_are_refused(stored: Path, length: int) -> None:
    stored.write_bytes(stored.read_bytes()[:length])
    with pytest.raises(ArtifactError, match="not a readable"):
        load_graph(stored)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        load_graph(tmp_path / "missing.npz")


def test_no_altered_byte_escapes_as_another_exception(stored: Path) -> None:
    original = stored.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        data = bytearray(original)
        for position in rng.integers(0, len(data), 3):
            data[position] = int(rng.integers(0, 256))
        stored.write_bytes(data)
        try:
            load_graph(stored)
        except ArtifactError:
            refused += 1
    assert refused > 150


def test_compressed_archives_are_read_too(stored: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    stored.write_bytes(buffer.getvalue())
    assert load_graph(stored).num_classes == 10
