"""Hostile files end in one sentence, or are read where they are still valid: no other exception, and no code of theirs runs."""

from __future__ import annotations

from pathlib import Path

import corpus
import pytest
from readers import READERS, outcome


@pytest.mark.filterwarnings("ignore:.*(nested|quantized) tensor")  # of torch, where such tensors are made to be refused
@pytest.mark.parametrize("name", READERS)
def test_hostile_files(tmp_path: Path, name: str) -> None:
    reader, mark = READERS[name], tmp_path / "code-ran"
    for module in reader.needs:
        pytest.importorskip(module)
    path = reader.make(tmp_path)
    assert outcome(reader, path) == "accepted"
    found = []
    inside = {entry.relative_to(tmp_path) for entry in tmp_path.rglob("*")}
    for hostile in corpus.hostile(name, path, mark):
        original = path.read_bytes()
        path.write_bytes(hostile.content)
        try:
            found.append(outcome(reader, path))
        except Exception as exc:
            raise AssertionError(f"{hostile.kind}: {type(exc).__name__}: {exc}") from exc
        path.write_bytes(original)
        assert not mark.exists(), hostile.kind
    assert found.count("refused") > len(found) // 2
    assert {entry.relative_to(tmp_path) for entry in tmp_path.rglob("*")} == inside
