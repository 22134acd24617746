"""Mutations that hypothesis searches for: bytes of every file, and values anywhere in JSON. Always the same ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from corpus import places, replaced
from readers import READERS, Reader, outcome

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

FEW = settings(derandomize=True, deadline=None, max_examples=12, database=None, suppress_health_check=list(HealthCheck),
               phases=(Phase.explicit, Phase.generate))  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
                    max_leaves=8)  # fmt: skip
EDITS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4), st.integers(0, 8)), min_size=1, max_size=4)


def made(name: str, folder: Path) -> tuple[Reader, Path]:
    reader = READERS[name]
    for module in reader.needs:
        pytest.importorskip(module)
    return reader, reader.make(folder)


@pytest.mark.parametrize("name", READERS)
def test_changed_bytes(tmp_path: Path, name: str) -> None:
    reader, path = made(name, tmp_path)
    original = path.read_bytes()

    @FEW
    @given(EDITS)
    def check(edits: list[tuple[float, bytes, int]]) -> None:
        content = original
        for place, new, gone in edits:
            start = int(place * len(content))
            content = content[:start] + new + content[start + gone :]
        path.write_bytes(content)
        outcome(reader, path)

    check()


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.form == "json"])
def test_changed_values(tmp_path: Path, name: str) -> None:
    reader, path = made(name, tmp_path)
    document = json.loads(path.read_bytes())
    found = list(places(document))

    @FEW
    @given(st.sampled_from(found), JSON)
    def check(where: tuple[Any, ...], value: Any) -> None:
        path.write_text(json.dumps(replaced(document, where, value)), encoding="utf-8")
        outcome(reader, path)

    check()
