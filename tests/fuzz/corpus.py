"""Hostile files that are always the same: what kind each is, its bytes, and what it tries."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from readers import READERS, arrays_of, npz_bytes

TEXT = b"This is a text file.\n" * 50
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "x" * 100_000, "\x00", "\x1b[2J",
    "\ud800", "../../etc/passwd", "/etc/passwd", "\u202egnp.exe", [], {}, [[]], {"": {}}, [None] * 1000,
)  # fmt: skip
"""What takes the place of a value: of another type, out of range, no Unicode, a path that leads elsewhere."""
TOML = (
    b"max_asr = nan", b"max_asr = -inf", b"max_asr = 1e999", b"max_asr = " + b"9" * 5000, b"max_asr = " + b"[" * 20_000,
    b"max_asr" + b".a" * 30_000 + b" = 1",
    b"name" + b".a" * 1_900 + b" = 1", b"max_asr" + b".a" * 1_900 + b" = 1", b"name = [[1]]", b"x = 1\nx = 2", b"[a]\n[a]",
    b'"\\ud800" = 1', b"name = '''", b"a = {b = {c = {}}}", b"max_asr = true", b"max_asr = 1979-05-27", b"\xff\xfe",
    b"require_trust = 1", b"__class__ = 1", b"max_asr = '" + b"x" * 60_000 + b"'", b"name = '../../x'", b"#" * (2 << 20),
)  # fmt: skip
"""Numbers beyond floats and integers, nesting, keys twice, and files that are too long."""


@dataclass(frozen=True)
class Hostile:
    """kind: what it tries, in words. content: the bytes of the file that is read."""

    kind: str
    content: bytes


class Payload:
    """Unpickled, it makes a folder: the mark that code of a file ran."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def hostile(name: str, valid: Path, mark: Path) -> Iterator[Hostile]:
    """Every hostile file for one reader, from a valid one. mark: what exists once code of a file has run."""
    content, form = valid.read_bytes(), READERS[name].form
    yield from _bytes(content)
    if form == "json":
        yield from _json(content)
    elif form == "toml":
        yield from (Hostile(f"TOML {number}", text) for number, text in enumerate(TOML))
    elif form == "npz":
        yield from _npz(valid, mark)
    elif name == "patch png":
        yield from _png(content)
    elif name == "image":
        yield from _image(mark)
    elif name == "ONNX file":
        yield from _onnx(content)
    elif name == "weights torch":
        yield from _torch(valid, mark)
    else:
        yield from _safetensors(content)


def _bytes(content: bytes) -> Iterator[Hostile]:
    """Damage: of any file."""
    yield Hostile("empty", b"")
    yield Hostile("text", TEXT)
    yield Hostile("zeros", bytes(1000))
    yield Hostile("pickle of nothing", pickle.dumps(None))
    for share in (0.02, 0.3, 0.5, 0.9):
        yield Hostile("truncated", content[: int(len(content) * share)])
    yield Hostile("truncated", content[:-1])
    yield Hostile("twice", content * 2)
    rng = np.random.default_rng(0)
    for _ in range(12):
        changed = bytearray(content)
        for place in rng.integers(0, len(content), 3):
            changed[place] = int(rng.integers(0, 256))
        yield Hostile("bytes changed", bytes(changed))


def places(document: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of a document are, the inner ones too, by keys and indices."""
    items = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for key, value in items:
        yield (*where, key)
        yield from places(value, (*where, key))


def replaced(document: Any, where: tuple[Any, ...], value: Any) -> Any:
    """A copy of a document with another value at a place."""
    document = json.loads(json.dumps(document))
    inner = document
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    return document


def _json(content: bytes) -> Iterator[Hostile]:
    document = json.loads(content)
    found = list(places(document))
    for number, value in enumerate(VALUES):
        where = found[number * 7 % len(found)]
        yield Hostile("JSON value", json.dumps(replaced(document, where, value)).encode())
        yield Hostile("JSON value", json.dumps(replaced(document, (next(iter(document)),), value)).encode())
    for key in document:
        yield Hostile("JSON key missing", json.dumps({name: document[name] for name in document if name != key}).encode())
    yield Hostile("JSON nesting", b"[" * 100_000)
    yield Hostile("JSON nesting", b'{"a":' * 500 + b"1" + b"}" * 500)
    yield Hostile("JSON number of 5,000 digits", b"9" * 5000)
    yield Hostile("JSON of many objects", b'[' + b'{"":0},' * 3_000_000 + b"0]")
    yield Hostile("JSON of many lists", b"[" + b"[]," * 6_000_000 + b"0]")
    yield Hostile("JSON key twice", content.replace(b"{", b'{"schema": 1, ', 1))
    yield Hostile("JSON in UTF-16", json.dumps(document).encode("utf-16"))


def _member(descr: str, shape: str, body: bytes) -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


def _with_member(content: bytes, name: str, member: bytes) -> bytes:
    """An archive in which one member is another's bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for entry in old.namelist():
            if entry != f"{name}.npy":
                new.writestr(entry, old.read(entry))
        new.writestr(f"{name}.npy", member)
    return buffer.getvalue()


def _npz(valid: Path, mark: Path) -> Iterator[Hostile]:
    content, arrays = valid.read_bytes(), arrays_of(valid)
    for name, values in list(arrays.items())[:4]:
        yield Hostile("array missing", npz_bytes({key: arrays[key] for key in arrays if key != name}))
        for change in (lambda x: x.astype(np.float64) if x.dtype.kind != "U" else x[:0], lambda x: x[:0], lambda x: x[None],
                       lambda x: x.astype("S1"), lambda x: np.zeros((0, 10**6, 10**6), x.dtype), lambda x: np.array(7),
                       lambda x: np.full(3, 2**62)):  # fmt: skip
            yield Hostile("array of another kind", npz_bytes({**arrays, name: change(values)}))
        pickled = pickle.dumps(np.array([Payload(mark)], object), protocol=2)
        yield Hostile("array with code", _with_member(content, name, _member("|O", "(1,)", pickled)))
        for shape in ("(1099511627776,)", "(-1,)", "(2, -2)", "(4294967296, 4294967296)", "(True,)", "()", "(1e9,)"):
            yield Hostile("array of a lying shape", _with_member(content, name, _member("<f8", shape, bytes(8))))
        yield Hostile("text of no size", _with_member(content, name, _member("<U0", "(10000000000,)", b"")))
        yield Hostile("header with code", _with_member(content, name, _member("'+__import__('os').getcwd()+'", "(1,)", b"")))
    bomb = _member("|u1", f"({300 << 20},)", bytes(300 << 20))
    yield Hostile("zip bomb", _with_member(content, next(iter(arrays)), bomb))
    yield Hostile("names that lead elsewhere", _with_member(content, "../../escaped", _member("|u1", "(1,)", b"x")))
    end = content.rfind(b"PK\5\6")
    directory = content[: end + 12] + struct.pack("<I", 1 << 30) + content[end + 16 :]
    yield Hostile("zip directory of a gigabyte", directory)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _image(mark: Path) -> Iterator[Hostile]:
    """Images of all formats that are read, damaged, and headers that announce what is not there."""
    from PIL import Image

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8))
    rng = np.random.default_rng(1)
    for form in ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP", "GIF", "ICO", "PDF"):
        buffer = io.BytesIO()
        noise.save(buffer, form)
        content = buffer.getvalue()
        for length in (8, len(content) // 2, len(content) - 5):
            yield Hostile(f"{form}, truncated", content[:length])
        for _ in range(6):
            changed = bytearray(content)
            for place in rng.integers(0, min(len(content), 120), 2):
                changed[place] = int(rng.integers(0, 256))
            yield Hostile(f"{form}, bytes changed", bytes(changed))
    start = b"\x89PNG\r\n\x1a\n"
    for size in ((0, 7), (2**31 - 1, 2**31 - 1), (8192, 8193), (65_536, 1), (1, 2**32 - 1), (8192, 8192)):
        header = _chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
        yield Hostile("PNG of another size", start + header + _chunk(b"IDAT", zlib.compress(bytes(999))) + _chunk(b"IEND", b""))
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 8, 2, 0, 0, 0))
    for kind in (b"zTXt", b"iCCP"):
        yield Hostile("text bomb", start + header + _chunk(kind, b"a\0\0" + zlib.compress(bytes(100 << 20))))
    yield Hostile("PPM of another size", b"P6 100000000 100000000 255\n" + bytes(100))
    yield Hostile("PPM of a long number", b"P6 " + b"9" * 100_000)
    yield Hostile("PPM of text", b"P3 2 2 255\n" + b"1 " * 1_000_000)
    yield Hostile("TIFF that refers to itself", b"II*\0\x08\0\0\0\0\0\x08\0\0\0")
    tags = struct.pack("<HHII", 256, 4, 2**32 - 1, 8) * 500
    yield Hostile("TIFF of giant tags", b"II*\0\x08\0\0\0" + struct.pack("<H", 500) + tags)
    yield Hostile("WEBP of another size", b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff" * 6 + bytes(8))
    yield Hostile("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n")
    yield Hostile("SVG", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>')
    yield Hostile("pickle with code", pickle.dumps(Payload(mark)))


def _onnx(content: bytes) -> Iterator[Hostile]:
    """What makes a parser or a runtime take memory, time or other files; see tests/export/test_hostile_onnx.py for more."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def changed(change: Any) -> bytes:
        made = onnx.ModelProto.FromString(content)
        change(made)
        return bytes(made.SerializeToString())

    def outside(place: str) -> Any:
        def change(made: Any) -> None:
            weight = made.graph.initializer[0]
            weight.ClearField("raw_data")
            weight.data_location = TensorProto.EXTERNAL
            weight.external_data.add(key="location", value=place)

        return change

    def nested(made: Any) -> None:
        inner = helper.make_graph([], "g", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
        for _ in range(30):
            node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=helper.make_graph([], "e", [], []))
            inner = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
        made.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner))

    def many(made: Any) -> None:
        for number in range(20_000):
            made.graph.node.add(op_type="Relu", input=[f"y{number or ''}"], output=[f"y{number + 1}"])

    def giant(made: Any) -> None:
        made.graph.initializer.append(numpy_helper.from_array(np.array([10**10]), "size"))
        made.graph.node.add(op_type="ConstantOfShape", input=["size"], output=["ones"])
        made.graph.node.add(op_type="ReduceSum", input=["ones"], output=["sum"])

    for place in ("../secret", "/etc/passwd", "/dev/zero", "C:/x", "", "link\0", "*/_ORT_MEM_ADDR_/*", "x" * 5000, "\x1b[2J"):
        yield Hostile("external data elsewhere", changed(outside(place)))
    for shape in ([50_000, 50_000], [2**62, 4], [-1, 3], [1] * 100, [0, 3], []):
        yield Hostile("initializer of a lying shape", changed(
            lambda made, shape=shape: made.graph.initializer[0].dims.__setitem__(slice(None), shape)))  # fmt: skip
    yield Hostile("cyclic graph", changed(lambda made: made.graph.node[0].input.__setitem__(0, "y")))
    for kind in ("Nothing", "\x1b[31mRed", "\u202e", "x" * 100_000, ""):
        yield Hostile("unknown operation", changed(lambda made, kind=kind: setattr(made.graph.node[0], "op_type", kind)))
    yield Hostile("nested subgraphs", changed(nested))
    yield Hostile("protobuf of nothing but depth", b"\x3a\x7f" * 5000)
    yield Hostile("20,000 operations", changed(many))
    yield Hostile("ten gigabytes computed at load", changed(giant))
    for version in (0, 999, -1, 2**62):
        yield Hostile("opset of nobody", changed(lambda made, version=version: setattr(made.opset_import[0], "version", version)))


def _png(content: bytes) -> Iterator[Hostile]:
    def header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
        return _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))

    start, rows, end = content[:8], content[33:], _chunk(b"IEND", b"")
    for size in ((0, 0), (4097, 1), (2**31, 2**31), (4096, 4096), (13_000, 13_000), (1, 2**32 - 1)):
        yield Hostile("PNG of another size", start + header(*size) + rows)
    for depth, colour in ((16, 2), (3, 2), (8, 5), (0, 0), (1, 6), (8, 255)):
        yield Hostile("PNG of another kind", start + header(7, 5, depth, colour) + rows)
    yield Hostile("PNG with a second header", content[:33] + header(13_000, 13_000) + rows)
    yield Hostile("PNG bomb", start + header(7, 5) + _chunk(b"IDAT", zlib.compress(bytes(100 << 20))) + end)
    yield Hostile("text bomb", content[:33] + _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100 << 20))) + rows)
    yield Hostile("profile bomb", content[:33] + _chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100 << 20))) + rows)
    yield Hostile("animation", content[:33] + _chunk(b"acTL", bytes(8)) + rows)
    yield Hostile("length beyond the file", start + struct.pack(">I", 2**32 - 1) + b"IHDR")


def _torch(valid: Path, mark: Path) -> Iterator[Hostile]:
    import torch
    from torch import nn

    state = torch.load(valid, weights_only=True)

    def saved(value: Any, **options: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer, **options)
        return buffer.getvalue()

    class Call:
        def __init__(self, function: Any, *arguments: Any) -> None:
            self.function, self.arguments = function, arguments

        def __reduce__(self) -> Any:
            return self.function, self.arguments

    key, weight = "0.weight", state["0.weight"]
    others = {
        "meta": weight.to("meta"), "sparse": weight.to_sparse(), "nested": torch.nested.nested_tensor([weight]),
        "quantized": torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8), "complex": weight.to(torch.complex64),
        "NaN": weight * float("nan"), "infinite": weight / 0, "one value, seen as many": torch.zeros(1).expand(4, 3),
        "float8": weight.to(torch.float8_e4m3fn), "boolean": weight > 0, "another shape": weight.T,
        "giant, seen from one value": torch.zeros(1).expand(10**6, 10**6), "no tensor": 7, "empty": torch.zeros(0),
    }  # fmt: skip
    for kind, value in others.items():
        yield Hostile(f"tensor: {kind}", saved({**state, key: value}))
    for legacy in (False, True):
        options = {"_use_new_zipfile_serialization": not legacy}
        yield Hostile("pickle with code", saved({**state, "x": Payload(mark)}, **options))
        yield Hostile("whole model", saved(nn.Linear(2, 2), **options))
        yield Hostile("memory by bytearray", saved({**state, "x": Call(bytearray, 3 << 30)}, **options))
        yield Hostile("memory by tensor", saved({**state, "x": Call(torch.Tensor, 1 << 40)}, **options))
    yield Hostile("plain pickle with code", pickle.dumps(Payload(mark)))
    for value in ([], {}, {1: weight}, "text", {"state_dict": 5}, {"state_dict": {}}):
        yield Hostile("no state dict", saved(value))
    buffer = io.BytesIO()
    with zipfile.ZipFile(valid) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
        new.writestr("archive/data/99", bytes(300 << 20))
    yield Hostile("zip bomb", buffer.getvalue())


def _safetensors(content: bytes) -> Iterator[Hostile]:
    (length,) = struct.unpack_from("<Q", content)
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]

    def packed(document: Any) -> bytes:
        text = document if isinstance(document, bytes) else json.dumps(document).encode()
        return struct.pack("<Q", len(text)) + text + body

    for size in (0, 1, length - 1, length + 1, 100_000_001, 2**63, 2**64 - 1):
        yield Hostile("header of another length", struct.pack("<Q", size) + content[8:])
    tensor = next(name for name in header if name.endswith("0.weight"))
    changes: tuple[dict[str, Any], ...] = (
        {"shape": [10**9, 10**9]}, {"shape": [-1, 3]}, {"shape": [2**63, 4]}, {"shape": []}, {"shape": [12]}, {"dtype": "F64"},
        {"dtype": "F8_E4M3", "shape": [12, 4]}, {"dtype": "I32"}, {"dtype": "U8", "shape": [48]}, {"dtype": "X"},
        {"data_offsets": [0, 2**62]}, {"data_offsets": [48, 0]}, {"data_offsets": [-4, 44]}, {"data_offsets": []},
    )  # fmt: skip
    for change in changes:
        yield Hostile("tensor of another kind", packed({**header, tensor: {**header[tensor], **change}}))
    states: tuple[Any, ...] = ("", "[]", "7", "{", "[" * 100_000, '{"a": NaN}', '{"a": 1e999}', '"\\ud800"', "9" * 5000)
    for state in states:
        yield Hostile("state of another kind", packed({**header, "__metadata__": {"edgeguard": state}}))
    yield Hostile("no metadata", packed({name: header[name] for name in header if name != "__metadata__"}))
    yield Hostile("metadata no object", packed({**header, "__metadata__": 5}))
    yield Hostile("nested header", packed(b'{"a":' * 50_000))
    yield Hostile("a name twice", packed(json.dumps(header).encode()[:-1] + b', "%s": 1}' % tensor.encode()))
    for value in (np.nan, np.inf):
        yield Hostile("values not finite", packed(header)[: -len(body)] + np.full(len(body) // 4, value, "<f4").tobytes()
                      + bytes(len(body) % 4))  # fmt: skip
