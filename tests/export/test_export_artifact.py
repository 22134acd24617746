"""An export is a complete artifact that has proved itself, or nothing at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest

from edgeguard.artifact import Artifact
from edgeguard.errors import ExportError, InputError, MissingDependency
from edgeguard.export import export_artifact
from edgeguard.inspection import inspect_artifact
from edgeguard.targets import open_engine

pytest.importorskip("onnx")

GRAPH = graphs.every_op(4)
IMAGES = graphs.random_images(GRAPH.input_shape, 5)


def export(out: Path, **changes: Any) -> Artifact:
    options = {
        "target": "ort", "width": "w4a4", "weight_bits": 4, "activation_bits": 4, "images": IMAGES,
        "source": {"run": "abc"}, **changes,
    }  # fmt: skip
    return export_artifact(GRAPH, out, **options)


def test_manifest(tmp_path: Path) -> None:
    artifact = export(tmp_path / "out")
    manifest = artifact.manifest
    assert sorted(path.name for path in artifact.path.iterdir()) == ["graph.npz", "manifest.json", "model.onnx"]
    assert (artifact.target, artifact.width) == ("ort", "w4a4")
    assert (manifest["weight_bits"], manifest["activation_bits"], manifest["num_classes"]) == (4, 4, 10)
    assert manifest["input_shape"] == [3, 13, 11]
    assert manifest["source"] == {"run": "abc"}
    assert manifest["versions"].keys() == {
        "edgeguard", "python", "numpy", "onnx", "onnxruntime", "machine", "cpu_flags",
    }  # fmt: skip
    proof = manifest["proof"]
    assert (proof["integer_mac_coverage"], proof["identical"], proof["allowed"], proof["images"]) == (1.0, True, True, 5)
    assert len(manifest["layers"]) == 7
    document = inspect_artifact(artifact.path)
    assert document["integer_mac_coverage"] == 1.0
    assert document["file_bytes"] == artifact.onnx.stat().st_size
    with open_engine(artifact) as engine:
        assert engine(IMAGES).shape == (5, 10)


def test_the_same_export_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = export(tmp_path / "a"), export(tmp_path / "b")
    for name in ("graph.npz", "manifest.json", "model.onnx"):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes(), name


def test_a_failed_proof_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeguard.export import proof

    monkeypatch.setattr(proof, "INTEGER_KERNELS", frozenset({"QGemm"}))
    with pytest.raises(ExportError, match="computes in float: conv1"):
        export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    artifact = export(tmp_path / "out", allow_float=True)
    assert artifact.manifest["proof"]["integer_mac_coverage"] < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "tpu"}, "unknown target 'tpu'; expected ort"),
        ({"images": IMAGES[:0]}, "empty batch"),
        ({"images": IMAGES.astype(np.float32)}, "got float32"),
        ({"images": IMAGES[:, :, 1:]}, r"expected .*\(N, 3, 13, 11\)"),
    ],
)
def test_wrong_requests_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        export(tmp_path / "out", **changes)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        export(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_missing_onnx_names_its_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependency, match=r'pip install "edgeguard\[train\]"'):
        export(tmp_path / "out")


def test_importing_and_exporting_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None; from edgeguard.export import export_artifact\n"
        "assert 'onnx' not in sys.modules\n"
        "from pathlib import Path; from edgeguard.graph_io import load_graph; import numpy as np\n"
        "graph = load_graph(Path(sys.argv[1]) / 'graph.npz'); images = np.zeros((1, *graph.input_shape), np.uint8)\n"
        "export_artifact(graph, Path(sys.argv[2]), target='ort', width='4', weight_bits=4, activation_bits=4,\n"
        "                images=images, source={})\n"
    )
    command = [sys.executable, "-c", program, str(export(tmp_path / "a").path), str(tmp_path / "b")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert Artifact.load(tmp_path / "b").width == "4"
