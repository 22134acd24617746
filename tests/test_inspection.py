from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import graphs
import pytest
from small_artifact import write_artifact

from edgeguard import files
from edgeguard.artifact import Artifact
from edgeguard.errors import ArtifactError
from edgeguard.graph import Conv, Linear
from edgeguard.inspection import format_inspection, inspect_artifact

LAYERS = [
    {"name": "conv1", "op": "conv", "macs": 30888, "storage_bits": 8, "compute_bits": 8, "kernel": "QLinearConv"},
    {"name": "fc", "op": "linear", "macs": 240, "storage_bits": 2, "compute_bits": 32, "kernel": "Gemm", "allowed": True},
]


def artifact(tmp_path: Path, **changes: Any) -> Artifact:
    document = {"layers": LAYERS, "proof": {"integer_mac_coverage": 30888 / 31128, "identical": True}, **changes}
    return write_artifact(tmp_path / "artifact", graphs.every_op(4), "4", **document)


def test_document(tmp_path: Path) -> None:
    path = artifact(tmp_path).path
    document = inspect_artifact(path)
    assert json.loads(files.to_json(document)) == document
    assert document == {
        "schema": "edgeguard.inspect/1",
        "target": "reference",
        "weight_bits": 4,
        "activation_bits": 4,
        "integer_mac_coverage": 30888 / 31128,
        "identical_to_reference": True,
        "macs": 31128,
        "file_bytes": 0,
        "float32_bytes": None,
        "float_layers": ["fc"],
        "layers": [{key: value for key, value in layer.items() if key != "allowed"} for layer in LAYERS],
    }


def test_file_bytes_are_the_runtimes_model(tmp_path: Path) -> None:
    from edgeguard.artifact import write_manifest

    made = artifact(tmp_path)
    (made.path / "model.onnx").write_bytes(bytes(1234))
    write_manifest(made.path, {key: value for key, value in made.manifest.items() if key not in ("files", "schema")})
    assert inspect_artifact(made.path)["file_bytes"] == 1234


def test_size_against_float32(tmp_path: Path) -> None:
    nodes = [node for node in graphs.every_op(4).nodes if isinstance(node, Conv | Linear)]
    layers = [{**LAYERS[0], "name": node.name, "storage_bits": 4} for node in nodes]
    document = inspect_artifact(artifact(tmp_path, layers=layers).path)
    assert document["float32_bytes"] == sum(node.weight.size * 28 // 8 for node in nodes)
    assert "0.0% of its size with float32 weights" in format_inspection(document)


def test_table(tmp_path: Path) -> None:
    lines = format_inspection(inspect_artifact(artifact(tmp_path).path)).splitlines()
    assert lines[0] == "target reference, weights 4 bit, activations 4 bit, model 0 bytes"
    assert lines[1] == "99.23% of 31,128 multiply-accumulates run in integer kernels"
    assert lines[3].split() == ["name", "op", "macs", "storage", "bits", "compute", "bits", "kernel"]
    assert lines[4].split() == ["conv1", "conv", "30,888", "8", "8", "QLinearConv"]
    assert lines[5].split() == ["fc", "linear", "240", "2", "32", "Gemm"]
    assert lines[3].index("kernel") == lines[4].index("QLinearConv") == lines[5].index("Gemm")


@pytest.mark.parametrize(("coverage", "text"), [(1.0, "100% of"), (0.999999, "99.99% of"), (0, "0.00% of")])
def test_only_everything_is_called_100_percent(tmp_path: Path, coverage: float, text: str) -> None:
    made = artifact(tmp_path, proof={"integer_mac_coverage": coverage})
    assert text in format_inspection(inspect_artifact(made.path))


@pytest.mark.parametrize("coverage", [None, True, "1.0", 1.5, -0.1])
def test_an_incomplete_proof_is_refused(tmp_path: Path, coverage: Any) -> None:
    with pytest.raises(ArtifactError, match=r"no integer_mac_coverage between 0 and 1|'integer_mac_coverage' is not what"):
        inspect_artifact(artifact(tmp_path, proof={"integer_mac_coverage": coverage}).path)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("conv1", "is not an object"),
        ({**LAYERS[0], "macs": "many"}, "layer 'conv1' has no int 'macs'"),
        ({key: value for key, value in LAYERS[0].items() if key != "kernel"}, "layer 'conv1' has no str 'kernel'"),
    ],
)
def test_incomplete_layers_are_refused(tmp_path: Path, layer: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        inspect_artifact(artifact(tmp_path, layers=[layer]).path)


def test_not_an_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not an artifact"):
        inspect_artifact(tmp_path)
