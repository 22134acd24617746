from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import graphs
import pytest

from edgeguard import artifact as a
from edgeguard.artifact import Artifact, write_manifest
from edgeguard.errors import ArtifactError, InputError
from edgeguard.graph_io import save_graph

MANIFEST: dict[str, Any] = {
    "target": "ort", "width": "w4a8", "weight_bits": 4, "activation_bits": 8, "num_classes": 10,
    "input_shape": [3, 13, 11], "proof": {}, "layers": [], "source": {}, "versions": {},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "artifact"
    path.mkdir()
    save_graph(graphs.every_op(4), path / a.GRAPH)
    (path / a.ONNX_MODEL).write_bytes(b"model")
    write_manifest(path, MANIFEST)
    return path


def edit(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / a.MANIFEST).read_text())
    document.update(changes)
    (folder / a.MANIFEST).write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))


def test_load(folder: Path) -> None:
    artifact = Artifact.load(str(folder))
    assert artifact.path == folder
    assert (artifact.target, artifact.width) == ("ort", "w4a8")
    assert artifact.onnx == folder / "model.onnx"
    assert artifact.graph().num_classes == 10
    assert artifact.manifest["files"].keys() == {"graph.npz", "model.onnx"}


def test_equal_artifacts_have_equal_manifests(folder: Path) -> None:
    before = (folder / a.MANIFEST).read_bytes()
    write_manifest(folder, MANIFEST)
    assert (folder / a.MANIFEST).read_bytes() == before


@pytest.mark.parametrize("name", [a.GRAPH, a.ONNX_MODEL])
def test_an_altered_file_is_refused(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{name} was changed after the export"):
        Artifact.load(folder)


@pytest.mark.parametrize("name", [a.GRAPH, a.ONNX_MODEL])
def test_a_missing_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"'{name}' is missing"):
        Artifact.load(folder)


@pytest.mark.parametrize("key", sorted(a.REQUIRED.keys() - {"schema"}))
@pytest.mark.parametrize("value", [..., None, 1.5], ids=["missing", "null", "float"])
def test_a_missing_or_mistyped_key_is_refused(folder: Path, key: str, value: Any) -> None:
    edit(folder, **{key: value})
    with pytest.raises(ArtifactError, match=f"'{key}' is missing or not a"):
        Artifact.load(folder)


def test_booleans_are_no_numbers(folder: Path) -> None:
    edit(folder, weight_bits=True)
    with pytest.raises(ArtifactError, match="'weight_bits' is missing or not a int"):
        Artifact.load(folder)


@pytest.mark.parametrize("schema", [..., "edgeguard.artifact/2", 1])
def test_another_schema_is_refused(folder: Path, schema: Any) -> None:
    edit(folder, schema=schema)
    with pytest.raises(ArtifactError, match=r"not of schema 'edgeguard.artifact/1'"):
        Artifact.load(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/file", "..", ".", ""])
def test_files_elsewhere_are_refused(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_text("x")
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text("x")
    files = json.loads((folder / a.MANIFEST).read_text())["files"]
    edit(folder, files={**files, name: "0" * 64})
    with pytest.raises(ArtifactError, match="is missing or not a plain file of this folder"):
        Artifact.load(folder)


def test_links_are_refused(folder: Path) -> None:
    moved = folder.parent / "model"
    (folder / a.ONNX_MODEL).rename(moved)
    (folder / a.ONNX_MODEL).symlink_to(moved)
    with pytest.raises(ArtifactError, match="not a plain file"):
        Artifact.load(folder)


def test_a_manifest_without_the_graph_is_refused(folder: Path) -> None:
    edit(folder, files={})
    with pytest.raises(ArtifactError, match=r"no graph.npz among its files"):
        Artifact.load(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\x00", b"null"])
def test_a_spoilt_manifest_is_refused(folder: Path, content: bytes) -> None:
    (folder / a.MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError):
        Artifact.load(folder)


def test_what_is_no_artifact_says_how_to_make_one(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ArtifactError, match=r"has no manifest.json; make one with `edgeguard export`"):
            Artifact.load(path)


def test_an_incomplete_manifest_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the manifest lacks \['layers', 'proof'\]"):
        write_manifest(tmp_path, {key: value for key, value in MANIFEST.items() if key not in ("layers", "proof")})
    assert list(tmp_path.iterdir()) == []
