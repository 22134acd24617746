"""The folder that `export` writes and everything later reads: `manifest.json`, the integer graph, the runtime's model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeguard import files
from edgeguard.errors import ArtifactError, InputError, shown
from edgeguard.graph import IntegerGraph
from edgeguard.graph_io import load_graph

SCHEMA = "edgeguard.artifact/1"
MANIFEST, GRAPH, ONNX_MODEL = "manifest.json", "graph.npz", "model.onnx"
POOL = "pool.json"
"""What a folder of several artifacts has in place of a manifest."""
MAX_NAME = 200
MAX_SIDE, MAX_BITS = 65_535, 32
MAX_CLASSES = 1 << 16
"""Of a data set, and of what classifies it: each has a name, and a row of weights."""
REQUIRED = {
    "schema": str, "target": str, "width": str, "weight_bits": int, "activation_bits": int, "num_classes": int,
    "input_shape": list, "files": dict, "proof": dict, "layers": list, "source": dict, "versions": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Artifact:
    """An exported model on disk, its files checked against the manifest's SHA-256.

    manifest: the parsed `manifest.json`; its keys are those of `REQUIRED`.
    """

    path: Path
    manifest: dict[str, Any]

    @staticmethod
    def load(path: Path | str) -> Artifact:
        """Open an artifact folder.

        Raises:
            ArtifactError: not an artifact, of another schema, or a file is missing or altered.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            if (path / POOL).is_file():
                raise ArtifactError(f"{path} is a pool of artifacts; name one of its members, the folders in it")
            raise ArtifactError(f"{path} is not an artifact: it has no {MANIFEST}; make one with `edgeguard export`")
        try:
            manifest = files.read_json(path / MANIFEST)
        except InputError as exc:
            raise ArtifactError(str(exc)) from exc
        if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
            raise ArtifactError(f"{path / MANIFEST} is not of schema {SCHEMA!r}")
        for key, kind in REQUIRED.items():
            if type(manifest.get(key)) is not kind:
                raise ArtifactError(f"{path / MANIFEST}: {key!r} is missing or not a {kind.__name__}")
        for key in ("target", "width"):
            if not manifest[key].isprintable() or len(manifest[key]) > MAX_NAME:
                raise ArtifactError(f"{path / MANIFEST}: {key!r} must be a short name, got {manifest[key]!r:.80}")
        _check_values(path / MANIFEST, manifest)
        if GRAPH not in manifest["files"]:
            raise ArtifactError(f"{path / MANIFEST}: no {GRAPH} among its files")
        for name, digest in manifest["files"].items():
            file = path / name
            if not files.has_plain_file(path, name):
                raise ArtifactError(f"{path}: {name!r:.80} is missing or not a plain file of this folder")
            if files.sha256(file) != digest:
                raise ArtifactError(f"{file} was changed after the export: its SHA-256 is not the manifest's")
        return Artifact(path, manifest)

    def graph(self) -> IntegerGraph:
        """The integer graph: what every runtime of this artifact must compute."""
        return load_graph(self.path / GRAPH)

    @property
    def onnx(self) -> Path:
        """Path of the ONNX model."""
        return self.path / ONNX_MODEL

    @property
    def target(self) -> str:
        return str(self.manifest["target"])

    @property
    def width(self) -> str:
        """The bit-width as users write it: `4`, or `w4a8` where weights and activations differ."""
        return str(self.manifest["width"])


def _check_values(path: Path, manifest: dict[str, Any]) -> None:
    """Raises ArtifactError where a value that others calculate with, or look up, is none."""
    proof, source, profile = manifest["proof"], manifest["source"], manifest.get("profile")
    coverage, data = proof.get("integer_mac_coverage"), source.get("data")
    values = {
        "input_shape": len(manifest["input_shape"]) == 3 and _are_sizes(manifest["input_shape"], MAX_SIDE),
        "num_classes": _are_sizes([manifest["num_classes"]], MAX_CLASSES),
        "weight_bits": _are_sizes([manifest["weight_bits"]], MAX_BITS),
        "activation_bits": _are_sizes([manifest["activation_bits"]], MAX_BITS),
        "integer_mac_coverage": coverage is None or (type(coverage) in (int, float) and 0 <= coverage <= 1),
        "profile": profile is None or (isinstance(profile, dict) and isinstance(profile.get("runtime"), str)),
        "data": data is None or (isinstance(data, dict) and isinstance(data.get("spec", ""), str)),
        "seed": type(source.get("seed", 0)) is int and 0 <= source.get("seed", 0) < 1 << 63,
        "patch_sizes": source.get("patch_sizes") is None or _are_sizes(source["patch_sizes"], MAX_SIDE),
    }
    wrong = next((name for name, right in values.items() if not right), None)
    if wrong is not None:
        found = next((part[wrong] for part in (manifest, proof, source) if wrong in part), None)
        raise ArtifactError(f"{path}: {wrong!r} is not what an export writes: {shown(found)}")


def _are_sizes(values: Any, most: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and 1 <= value <= most for value in values)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Hash every file of the folder into the manifest and write it.

    Raises:
        InputError: when a required key is missing.
    """
    hashes = {file.name: files.sha256(file) for file in sorted(folder.iterdir()) if file.name != MANIFEST}
    document = {"schema": SCHEMA, **manifest, "files": hashes}
    missing = REQUIRED.keys() - document.keys()
    if missing:
        raise InputError(f"the manifest lacks {sorted(missing)}")
    files.write_json(folder / MANIFEST, document)
