"""Every TensorRT name in our sources exists in the published bindings of 8.6, 10 and 11.

`tests/assets/tensorrt-names-*.txt` list the classes of the bindings with their members, taken from the wheels by
`extract_tensorrt_names.py`. In the sources, a variable that holds a TensorRT object has a name of `CLASSES` (with or
without `self._`), so each attribute can be looked up in its class. A name that the same function asks for with
`hasattr` has to be in one release, any other in all.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "tests" / "assets"
SOURCES = (ROOT / "export" / "trt_build.py", ROOT / "targets" / "tensorrt.py")
RELEASES = ("8.6", "10", "11")
MODULE = "tensorrt"

CLASSES = {
    "trt": MODULE, "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser",
    "error": "ParserError", "config": "IBuilderConfig", "cache": "ITimingCache", "profile": "IOptimizationProfile",
    "tensor": "ITensor", "runtime": "Runtime", "engine": "ICudaEngine", "context": "IExecutionContext",
    "inspector": "EngineInspector",
}  # fmt: skip
PLAIN = {
    "serialized", "kept", "name", "is_input", "dtype", "document", "smallest", "best", "largest", "accepted", "errors",
    "fixed", "found", "shape", "kind",
}  # fmt: skip
"""Variables for results without further attributes: numbers, texts, shapes, buffers."""


def names(release: str) -> dict[str, set[str]]:
    """Members by class; the module's own under `tensorrt`."""
    lines = (ASSETS / f"tensorrt-names-{release}.txt").read_text(encoding="utf-8").splitlines()
    split = (line.partition(":") for line in lines if not line.startswith("#"))
    return {owner: set(members.split()) for owner, _, members in split}


def owner_of(node: ast.expr) -> str | None:
    """The class of what an expression holds, or None when it is nothing of TensorRT's."""
    if isinstance(node, ast.Name):
        return CLASSES.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    if isinstance(node.value, ast.Name) and node.value.id == "self":
        return CLASSES.get(node.attr.lstrip("_"))
    owner = owner_of(node.value)
    return None if owner is None else node.attr if owner == MODULE else f"{owner}.{node.attr}"


def used(function: ast.AST) -> Iterator[tuple[str, str]]:
    """(class, member) of every attribute of a TensorRT object."""
    for node in ast.walk(function):
        if not isinstance(node, ast.Attribute) or node.attr == "__init__":
            continue
        if (owner := owner_of(node.value)) is not None:
            yield owner, node.attr


def asked_for(function: ast.AST) -> set[tuple[str, str]]:
    """(class, member) of every `hasattr(x, "member")`."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {
        (owner_of(call.args[0]) or "?", str(call.args[1].value))
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "hasattr" and isinstance(call.args[1], ast.Constant)
    }


def untracked(function: ast.AST) -> Iterator[str]:
    """Variables that are given the result of a TensorRT call and are in neither table: their uses would be missed."""
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        called = node.value.func
        if isinstance(called, ast.Attribute) and owner_of(called.value) is not None:
            targets = [name for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            yield from (f"line {node.lineno}: {n.id}" for n in targets if n.id not in {*CLASSES, *PLAIN, "self", "_"})


def functions(source: str) -> Iterator[ast.AST]:
    """Each function, and what stands outside of all."""
    tree = ast.parse(source)
    inner = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    yield from inner
    yield ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)], [])


def problems(source: str) -> list[str]:
    """What is wrong with a source, one sentence each."""
    lists = {release: names(release) for release in RELEASES}
    found: list[str] = []
    for function in functions(source):
        optional = asked_for(function)
        found += [f"{variable} holds a TensorRT result; add it to CLASSES or PLAIN" for variable in untracked(function)]
        for owner, member in {*used(function), *optional}:
            missing = [release for release in RELEASES if member not in lists[release].get(owner, ())]
            if missing and ((owner, member) not in optional or len(missing) == len(RELEASES)):
                found.append(f"{owner}.{member} is not in TensorRT {', '.join(missing)}")
    return sorted(set(found))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_name_is_published(path: Path) -> None:
    assert problems(path.read_text(encoding="utf-8")) == []


def test_the_lookup_sees_what_matters() -> None:
    seen = {name for path in SOURCES for f in functions(path.read_text(encoding="utf-8")) for name in used(f)}
    assert seen >= {
        ("ICudaEngine", "get_tensor_profile_shape"), ("IExecutionContext", "set_tensor_address"),
        ("IExecutionContext", "execute_async_v3"), ("Builder", "build_serialized_network"), ("BuilderFlag", "TF32"),
        ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"), ("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH"),
        ("IBuilderConfig", "set_timing_cache"), ("ParserError", "desc"), ("ILogger.Severity", "ERROR"),
        ("LayerInformationFormat", "JSON"), ("EngineInspector", "get_engine_information"), ("ITimingCache", "serialize"),
        ("IOptimizationProfile", "set_shape"), ("ITensor", "name"), ("Runtime", "deserialize_cuda_engine"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("def f(engine): engine.get_tensor_nam(0)", "ICudaEngine.get_tensor_nam is not in TensorRT 8.6, 10, 11"),
        ("def f(self): self._context.execute_async_v2(0)", "IExecutionContext.execute_async_v2 is not in TensorRT 10, 11"),
        ("def f(trt): return trt.BuilderFlag.INT8", "BuilderFlag.INT8 is not in TensorRT 11"),
        ("def f(trt): return trt.Bilder", "tensorrt.Bilder is not in TensorRT 8.6, 10, 11"),
        ("def f(trt): return trt.ILogger.Severity.EROR", "ILogger.Severity.EROR is not in"),
        ("def f(trt): return hasattr(trt.BuilderFlag, 'INT88')", "BuilderFlag.INT88 is not in TensorRT 8.6, 10, 11"),
        ("def f(config): config.max_workspace_size = 1", "IBuilderConfig.max_workspace_size is not in TensorRT 10, 11"),
        ("def f(builder):\n    net = builder.create_network(0)\n    net.add_nonsense()", "line 2: net holds"),
        ("import tensorrt as trt\nx = trt.Bilder()", "tensorrt.Bilder"),
    ],
)
def test_a_wrong_name_is_found(source: str, text: str) -> None:
    assert any(text in problem for problem in problems(source)), problems(source)


def test_a_name_that_is_asked_for_need_not_be_everywhere() -> None:
    guarded = "def f(trt, config):\n    if hasattr(trt.BuilderFlag, 'INT8'):\n        config.set_flag(trt.BuilderFlag.INT8)"
    assert problems(guarded) == []


def test_the_lists_say_where_they_come_from() -> None:
    for release in RELEASES:
        first = (ASSETS / f"tensorrt-names-{release}.txt").read_text(encoding="utf-8").splitlines()[0]
        assert f"bindings-{release}." in first
        assert len(first.split("SHA-256 ")[1]) == 64
        assert len(names(release)["ICudaEngine"]) > 20


def test_cuda_names_exist() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    tree = ast.parse((ROOT / "targets" / "tensorrt.py").read_text(encoding="utf-8"))
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    calls = {text for text in texts if text.startswith("cuda") and text.isidentifier()}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr[:4] == "cuda"}
    assert {"cudaMalloc", "cudaMallocHost", "cudaMemcpyAsync", "cudaStreamSynchronize"} <= calls
    kinds = {"cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"}
    assert kinds <= attributes
    assert [name for name in (calls | attributes) - kinds if not hasattr(runtime, name)] == []
    assert all(hasattr(runtime.cudaMemcpyKind, kind) for kind in kinds)
