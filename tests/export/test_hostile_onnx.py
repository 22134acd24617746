"""Broken and hostile ONNX files: one sentence each, bounded memory and time. The files are made here, line by line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeguard.errors import EngineError, InputError, MissingDependency

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgeguard.export import isolated, onnx_inspect, onnx_read  # noqa: E402
from edgeguard.export.onnx_inspect import examine  # noqa: E402

WEIGHT = np.ones((4, 3), np.float32)


def model(opset: int = 17, ir_version: int = 8) -> Any:
    """x (N, 4) times a stored matrix (4, 3)."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])], [numpy_helper.from_array(WEIGHT, "w")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def changed(change: Callable[[Any], Any]) -> bytes:
    made = model()
    change(made)
    return bytes(made.SerializeToString())


def weight_of(made: Any) -> Any:
    return made.graph.initializer[0]


def external(location: str, length: int | None = None, offset: int | None = None) -> Callable[[Any], None]:
    """Keep the weight in another file."""

    def change(made: Any) -> None:
        weight = weight_of(made)
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("length", length), ("offset", offset)):
            if value is not None:
                weight.external_data.add(key=key, value=str(value))

    return change


def ten_gigabytes(made: Any) -> None:
    weight_of(made).dims[:] = [50_000, 50_000]


def ten_gigabytes_without_data(made: Any) -> None:
    weight_of(made).CopyFrom(TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2_500_000_000]))


def hidden_in_an_attribute(made: Any) -> None:
    value = TensorProto(name="huge", data_type=TensorProto.FLOAT, dims=[2_500_000_000])
    made.graph.node.add(op_type="Constant", output=["huge"]).attribute.append(helper.make_attribute("value", value))


def sparse_bomb(made: Any) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "bomb")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "bomb.indices")
    made.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [10**10]))


def cyclic(made: Any) -> None:
    made.graph.node[0].input[0] = "z"
    made.graph.node.add(op_type="Relu", input=["y"], output=["z"], name="back")


def invalid_utf8() -> bytes:
    return changed(lambda made: setattr(made.graph.node[0], "name", "@@@@")).replace(b"@@@@", b"\xff\xfe\xff\xfe")


BAD: dict[str, tuple[bytes, str]] = {
    # an empty file
    "zero bytes": (b"", "is empty"),
    # a file of another kind
    "text": (b"This is a text file.\n" * 100, "is not an ONNX model"),
    # the first half of a download
    "truncated": (changed(lambda made: None)[:-40], "is not an ONNX model"),
    # valid protobuf that holds no graph
    "no graph": (onnx.ModelProto(ir_version=8).SerializeToString(), "has no operations"),
    # a name whose bytes are no text
    "invalid UTF-8": (invalid_utf8(), "a name in it is not UTF-8"),
    # operations that wait for each other
    "cyclic": (changed(cyclic), "cannot load"),
    # made by a tool of the future
    "opset": (model(opset=999).SerializeToString(), "cannot load.*999"),
    "IR version": (model(ir_version=999).SerializeToString(), "cannot load.*999"),
    # an operation of nobody
    "domain": (changed(lambda made: (setattr(made.graph.node[0], "domain", "evil"),
                                     made.opset_import.append(helper.make_opsetid("evil", 1)))), "cannot load.*evil"),
    # a reason of the runtime that quotes an escape sequence
    "escape codes": (changed(lambda made: setattr(made.graph.node[0], "op_type", "\x1b[31mRed")), r"\\x1b\[31mRed"),
    # memory bombs: a hundred bytes that declare gigabytes
    "10 GB with 48 bytes": (changed(ten_gigabytes), "declares 10,000,000,000 bytes .* holds 48"),
    "10 GB without data": (changed(ten_gigabytes_without_data), "declares 10,000,000,000 bytes .* holds 0"),
    "10 GB in an attribute": (changed(hidden_in_an_attribute), "'huge' declares 10,000,000,000"),
    "sparse": (changed(sparse_bomb), "too large to unpack"),
    # shapes that overflow arithmetic
    "negative": (changed(lambda made: weight_of(made).dims.append(-1)), "impossible shape"),
    "rank": (changed(lambda made: weight_of(made).dims.extend([1] * 100)), "impossible shape"),
    "overflow": (changed(lambda made: weight_of(made).dims.extend([2**62, 4])), "declares"),
    "data type": (changed(lambda made: setattr(weight_of(made), "data_type", 99)), "unknown data type 99"),
    # external data that reads other files of the machine
    "absolute": (changed(external("/etc/hostname", 48)), "only files within"),
    "parent": (changed(external("../secret.bin", 48)), "only files within"),
    "inner parent": (changed(external("sub/../../secret.bin", 48)), "only files within"),
    "drive": (changed(external("C:/secret.bin", 48)), "only files within"),
    "backslash": (changed(external("..\\secret.bin", 48)), "only files within"),
    "no location": (changed(external("", 48)), "only files within"),
    "symlink": (changed(external("link.bin", 48)), "leads through a link"),
    "symlinked folder": (changed(external("linked/secret.bin", 48)), "leads through a link"),
    "missing": (changed(external("missing.bin", 48)), "cannot be read"),
    "a folder as data": (changed(external("sub", 48)), "not a plain file"),
    # the runtime's own mark for a memory address
    "memory address": (changed(external("*/_ORT_MEM_ADDR_/*", 48, 4096)), "only files within"),
    # external data that ends early, starts before the file, or is not a number
    "short": (changed(external("short.bin", 48)), "which has 10"),
    "offset": (changed(external("weights.bin", 48, 40)), "which has 48"),
    "negative offset": (changed(external("weights.bin", 48, -1)), "which has 48"),
    "length": (changed(external("weights.bin", 10**10)), "declares 48"),
    "no number": (changed(external("weights.bin", 48, "zero")), "not a number"),  # type: ignore[arg-type]
}
"""Contents, and words of the sentence that refuses them."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with files beside the model, a secret outside of it, and links to that."""
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    (tmp_path / "secret.bin").write_bytes(bytes(48))
    (inside / "weights.bin").write_bytes(WEIGHT.tobytes())
    (inside / "short.bin").write_bytes(bytes(10))
    (inside / "link.bin").symlink_to(tmp_path / "secret.bin")
    (inside / "linked").symlink_to(tmp_path)
    return inside


@pytest.mark.parametrize("name", BAD)
def test_one_sentence(folder: Path, name: str) -> None:
    content, words = BAD[name]
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        examine(folder / "model.onnx")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("location", ["weights.bin", "./weights.bin"])
def test_external_data_in_its_own_folder_is_read(folder: Path, location: str) -> None:
    (folder / "model.onnx").write_bytes(changed(external(location, 48)))
    document = examine(folder / "model.onnx")
    assert document["float_layers"] == ["product"]
    assert document["file_bytes"] == (folder / "model.onnx").stat().st_size + 48


def test_a_file_beyond_the_limit_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "model.onnx"
    with file.open("wb") as handle:
        handle.truncate(onnx_read.LIMIT + 1)  # a hole, not a gigabyte
    with pytest.raises(InputError, match=r"at most 1,073,741,824 are read"):
        examine(file)
    content = changed(external("weights.bin", 48))
    file.write_bytes(content)
    monkeypatch.setattr(onnx_read, "LIMIT", len(content) + 47)
    with pytest.raises(InputError, match="which is the limit"):
        examine(file)


def test_a_pipe_does_not_block(folder: Path) -> None:
    os.mkfifo(folder / "model.onnx")
    with pytest.raises(InputError, match="not a plain file"):
        isolated.inspect_onnx(folder / "model.onnx")


def test_without_onnx(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependency, match=r'onnx is not installed; run: pip install "edgeguard\[train\]"'):
        isolated.inspect_onnx(folder / "model.onnx")


@pytest.mark.parametrize("count", [10**8, 2 * 10**8, 10**10])
def test_memory_is_bounded_while_the_runtime_folds_constants(folder: Path, count: int) -> None:
    """0.4, 0.8 and 40 GB of ones that a file of two hundred bytes asks the runtime to compute when it loads."""
    pytest.importorskip("resource")
    made = model()
    made.graph.initializer.append(numpy_helper.from_array(np.array([count]), "size"))
    made.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "one"))
    made.graph.node.add(op_type="Expand", input=["one", "size"], output=["ones"], name="bomb")
    made.graph.node.add(op_type="ReduceSum", input=["ones"], output=["sum"], name="sum")
    made.graph.node.add(op_type="Add", input=["y", "sum"], output=["z"], name="add")
    made.graph.output[0].name = "z"
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    code = """if True:
        import json, resource, sys
        from edgeguard.export import isolated
        try:
            answer = isolated.inspect_onnx(sys.argv[1])["float_layers"]
        except isolated.InputError as exc:
            answer = str(exc)
        print(json.dumps([answer, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))"""
    command = [sys.executable, "-c", code, folder / "model.onnx"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    answer, peak = json.loads(done.stdout)
    assert answer == ["product"] or "takes more memory than its size allows" in answer  # loaded without folding, or refused
    assert count > 10**8 or answer == ["product"]
    assert peak * (1 if sys.platform == "darwin" else 1024) < isolated.MEMORY + (1 << 20)


def test_large_files_have_room_for_what_they_hold(folder: Path) -> None:
    """Weights of 4 bits that the runtime unpacks to float32: eight bytes for each of the file's, in several copies."""
    rows, columns = 10_000, 4_800
    packed = onnx.TensorProto(name="w", data_type=TensorProto.INT4, dims=[rows, columns], raw_data=bytes(rows * columns // 2))
    nodes = [
        helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "f"], ["y"], name="product"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", rows), ("y", columns))]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [packed])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    assert isolated.inspect_onnx(folder / "model.onnx")["macs"] == rows * columns


def test_too_little_memory_is_called_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the runtime and protobuf runs out of it."""
    (folder / "model.onnx").write_bytes(changed(lambda made: None))
    for words in ("onnxruntime cannot write x: std::bad_alloc", "onnxruntime 1.32 cannot load x: std::bad_alloc"):
        kind = InputError if "write" in words else EngineError

        def fail(*_: object, words: str = words, kind: type[Exception] = kind, **__: object) -> None:
            raise kind(words)

        monkeypatch.setattr(onnx_inspect, "open_session", fail)
        with pytest.raises(MemoryError):
            examine(folder / "model.onnx")


SAID = {
    "a constructor": ("/x/graph/model.cc:256 onnxruntime::Model::Model(onnx::ModelProto&&, const Path&) Unsupported IR: 999",
                      "Unsupported IR: 999"),
    "templates": ("/x/y.h:46 void a::b::F(const std::map<std::basic_string<char>, int>&, int) Only these", "Only these"),
    "const and with": ("/x/y.cc:1 a::Status a::Graph::Resolve(const T&) const [with T = float] it was false", "it was false"),
    "a reason that looks like one": ("model.cc:9 Node::name of op is of domain a::b (node_x) and bad",
                                     "Node::name of op is of domain a::b (node_x) and bad"),
    "long names": ("x.cc:1 " + "a::" * 30_000, None),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_reasons_go_without_the_runtimes_own_sources(name: str) -> None:
    said, kept = SAID[name]
    error = EngineError("it cannot be loaded")
    error.__cause__ = RuntimeError(f"[ONNXRuntimeError] : 1 : FAIL : Load model from m.onnx failed:{said}\n")
    reason = onnx_inspect._reason_of(error, Path("m.onnx"))
    assert reason == kept or (kept is None and len(reason) < 500)


def test_a_process_that_dies_is_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model.onnx").write_bytes(changed(lambda made: None))
    monkeypatch.setattr(isolated, "CODE", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(InputError, match="ended with status -9"):
        isolated.inspect_onnx(folder / "model.onnx")
    monkeypatch.setattr(isolated, "CODE", "import time; time.sleep(60)")
    monkeypatch.setattr(isolated, "SECONDS", 0.05)
    with pytest.raises(InputError, match="takes the runtime more than"):
        isolated.inspect_onnx(folder / "model.onnx")


def test_the_limit_is_enforced(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux enforces RLIMIT_AS")
    (folder / "model.onnx").write_bytes(changed(lambda made: None))
    code = "import sys; sys.path[:] = sys.argv[2:]; from edgeguard.export import isolated; isolated._limit(0); bytes(4 << 30)"
    monkeypatch.setattr(isolated, "CODE", code)
    with pytest.raises(InputError, match="ended with status 1"):
        isolated.inspect_onnx(folder / "model.onnx")
