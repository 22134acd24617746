"""Messages of the Open Inference Protocol: what is written is what is read, and what is wrong is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeguard.errors import InputError
from edgeguard.open_inference import (
    DEEPEST,
    Bounds,
    Spec,
    TooLarge,
    read_message,
    read_object,
    read_specs,
    read_tensors,
    write_message,
)
from edgeguard.secrets import read_token

BOUNDS = Bounds.of((4, 3, 5, 5), 1 << 20)


def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    extremes = [0.1, -0.0, 3.4028235e38, 1.17549435e-38, 1e-45, -7.25]
    return {"pixels": rng.integers(0, 256, (2, 3, 5, 5), np.uint8), "logits": np.array([extremes], np.float32)}


@pytest.mark.parametrize("binary", [False, True, ["logits"], ["pixels"]])
def test_there_and_back(binary: Any) -> None:
    body, length = write_message({"id": "x"}, "inputs", arrays(), binary)
    assert (length is None) is (binary is False)
    document, blob = read_message(body, None if length is None else str(length), BOUNDS)
    assert document["id"] == "x"
    for tensor, (name, expected) in zip(read_tensors(document, "inputs", blob, BOUNDS), arrays().items(), strict=True):
        assert tensor.name == name
        assert tensor.values.dtype == expected.dtype
        np.testing.assert_array_equal(tensor.values, expected)
        assert np.array_equal(np.signbit(tensor.values), np.signbit(expected))


def test_every_float32_survives_json() -> None:
    bits = np.random.default_rng(1).integers(0, 1 << 32, 5000, np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)][None]
    bounds = Bounds.of(values.shape, 1 << 20)
    document, blob = read_message(write_message({}, "outputs", {"x": values})[0], None, bounds)
    assert read_tensors(document, "outputs", blob, bounds)[0].values.tobytes() == values.tobytes()


def test_memory_layout_and_byte_order_do_not_matter() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), np.uint8).transpose(0, 3, 1, 2)
    floats = np.arange(6, dtype=">f4").reshape(2, 3)
    for values in (images, floats, floats[::-1]):
        body, length = write_message({}, "inputs", {"x": values}, True)
        document, blob = read_message(body, str(length), BOUNDS)
        np.testing.assert_array_equal(read_tensors(document, "inputs", blob, BOUNDS)[0].values, values)


def test_nested_lists_of_the_right_size_are_within_the_bounds() -> None:
    largest = np.zeros((4, 3, 5, 5), np.uint8)
    entry = {"name": "x", "datatype": "UINT8", "shape": list(largest.shape), "data": largest.tolist()}
    document, blob = read_message(json.dumps({"inputs": [entry]}).encode(), None, BOUNDS)
    assert read_tensors(document, "inputs", blob, BOUNDS)[0].values.shape == largest.shape


def test_depth_counts_lists_and_not_brackets_in_text() -> None:
    fine = b'{"a": ' + b"[" * (DEEPEST - 1) + b"]" * (DEEPEST - 1) + b', "b": "' + rb"[[\"[[{{" * 5 + b'"}'
    assert read_object(fine, BOUNDS)["b"].startswith("[[")
    with pytest.raises(TooLarge, match="nested deeper"):
        read_object(fine.replace(b"[]", b"[[]]"), BOUNDS)


def test_no_message_is_built_that_is_larger_than_its_subject() -> None:
    small = Bounds.of((1, 2), 1 << 30)
    for text in (b"[" + b"[]," * 1000 + b"[]]", b"[" + b"1," * 1000 + b"1]", b'["' + b'","' * 20_000 + b'"]', b"[" * 1000):
        with pytest.raises(TooLarge):
            read_object(b'{"a": ' + text + b"}", small)
    with pytest.raises(TooLarge, match="at most 10 are taken"):
        read_message(b" " * 11, None, Bounds(1, 1, 10))


def test_several_tensors_share_the_bytes_behind() -> None:
    body, length = write_message({}, "inputs", {"a": np.uint8([1, 2]), "b": np.uint8([3]), "c": np.uint8([4, 5])}, ["a", "c"])
    document, blob = read_message(body, str(length), BOUNDS)
    assert [tensor.values.tolist() for tensor in read_tensors(document, "inputs", blob, BOUNDS)] == [[1, 2], [3], [4, 5]]
    document["inputs"].reverse()
    assert [tensor.values.tolist() for tensor in read_tensors(document, "inputs", blob, BOUNDS)] == [[1, 2], [3], [4, 5]]


def test_bytes_of_floats_that_are_not_finite() -> None:
    body, length = write_message({}, "inputs", {"x": np.float32([[np.nan]])}, True)
    document, blob = read_message(body, str(length), BOUNDS)
    with pytest.raises(InputError, match="not finite"):
        read_tensors(document, "inputs", blob, BOUNDS)


def test_specs() -> None:
    spec = Spec("x", "UINT8", (-1, 3, 5, 5))
    assert read_specs({"inputs": [spec.document()]}, "inputs") == [spec]
    changes: list[dict[str, Any]] = [{"shape": shape} for shape in ([-2], [True], [1] * 9, 3)]
    changes += [{"name": 1}, {"datatype": None}]
    for value in (None, {}, [1], [{"name": "x"}], *([{**spec.document(), **change}] for change in changes)):
        with pytest.raises(InputError):
            read_specs({"inputs": value}, "inputs")


def test_tokens(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("  0123456789abcdef\n")
    assert read_token(tmp_path / "token") == "0123456789abcdef"
    with pytest.raises(InputError, match="cannot read"):
        read_token(tmp_path)
