"""Folders in which something is not what its name says end in one sentence, or are read; nothing hangs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from folders import TREES, made
from readers import READERS, outcome

from edgeguard.artifact import Artifact
from edgeguard.data import load_dataset
from edgeguard.errors import InputError


@pytest.mark.parametrize("name", TREES)
def test_hostile_folders(tmp_path: Path, name: str) -> None:
    tree = TREES[name]
    for module in READERS[tree.reader].needs:
        pytest.importorskip(module)
    path = made(tree, tmp_path)
    assert outcome(READERS[tree.reader], path) == ("accepted" if tree.valid else "refused")


def test_a_name_that_is_refused_is_shown_with_escapes(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    path = made(TREES["images, broken and named b'a\\nb.png'"], tmp_path)
    with pytest.raises(InputError, match=r"a\\nb\.png cannot be read as an image"):
        load_dataset(f"imagefolder:{path.parents[1]}", "test")


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        (None, "input_shape", [3, 16]), (None, "input_shape", [3, 16, 0]), (None, "input_shape", [3, 16, "16"]),
        (None, "num_classes", 0), (None, "num_classes", 10**9), (None, "weight_bits", 10**400), (None, "profile", []),
        (None, "profile", {}), ("proof", "integer_mac_coverage", 10**400), ("proof", "integer_mac_coverage", "all"),
        ("source", "data", []), ("source", "data", {"spec": 7}), ("source", "seed", "x"), ("source", "seed", -1),
        ("source", "patch_sizes", ["x"]), ("source", "patch_sizes", [10**400]),
    ],
)  # fmt: skip
def test_values_of_a_manifest_that_others_calculate_with(tmp_path: Path, part: str | None, key: str, value: object) -> None:
    path = READERS["artifact"].make(tmp_path)
    manifest = json.loads(path.read_text())
    (manifest if part is None else manifest[part])[key] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=f"{key!r} is not what an export writes"):
        Artifact.load(path.parent)
