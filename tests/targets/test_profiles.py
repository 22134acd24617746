"""Target profiles: the built-in ones, a user's own, and everything that can be wrong in a file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from edgeguard.errors import InputError
from edgeguard.targets.profiles import BUILT_IN, FOLDER, TargetProfile, load_profile, profile_of

ORT = load_profile("ort")


def write(path: Path, **changes: Any) -> str:
    values = {**ORT.to_json(), "name": "mine", **changes}
    lines = [f"{key} = {str(value).lower() if isinstance(value, bool) else json.dumps(value)}" for key, value in values.items()
             if value is not None]  # fmt: skip
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_every_file_beside_the_code_is_built_in() -> None:
    assert {path.stem for path in FOLDER.glob("*.toml")} == set(BUILT_IN)
    assert all(load_profile(name).name == name for name in BUILT_IN)


def test_what_the_runtimes_need() -> None:
    legacy, avx2, trt = load_profile("ort-legacy"), load_profile("ort-avx2"), load_profile("trt")
    assert (ORT.storage_bits, ORT.weight_bits, ORT.signed_activations) == (2, 8, False)
    assert (legacy.opset, legacy.storage_bits) == (13, 8)
    assert 2 * 255 * ((1 << (avx2.weight_bits - 1)) - 1) < 1 << 15 < 2 * 255 * ((1 << avx2.weight_bits) - 1)
    assert not avx2.saturates
    assert (trt.format, trt.signed_activations) == ("qdq", True)


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    profile = load_profile(write(tmp_path / "mine.toml", storage_bits=4))
    assert profile == dataclasses.replace(ORT, name="mine", storage_bits=4)
    assert profile_of(profile.to_json()) == profile


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"storag_bits": 4}, "unknown key 'storag_bits'; expected name, summary, runtime"),
        ({"opset": None}, "the key 'opset' is missing; expected name"),
        ({"opset": "17"}, "'opset' is '17' .str.; expected int"),
        ({"opset": True}, "'opset' is True .bool.; expected int"),
        ({"signed_activations": 1}, "'signed_activations' is 1 .int.; expected bool"),
        ({"runtime": "tflite"}, "'runtime' is 'tflite'; expected one of ort, openvino, trt"),
        ({"format": "qdq"}, "'format' is 'qdq'; runtime 'ort' expects 'qoperator'"),
        ({"storage_bits": 3}, "'storage_bits' is 3; expected one of 2, 4, 8"),
        ({"weight_bits": 9}, "'weight_bits' is 9; expected 2 to 8"),
        ({"opset": 21}, "too old for 'storage_bits' 2; expected at least 25 and 13"),
        ({"opset": 12, "storage_bits": 8}, "expected at least 13 and 7"),
        ({"saturates": False}, "expected 'weight_bits' of at most 7"),
        ({"name": "../up"}, "'name' is '../up'; expected up to 64 letters"),
        ({"name": "ort"}, "'name' is 'ort', which is built in"),
        ({"summary": "a\x1b[2Jb"}, "'summary' holds characters that cannot be printed"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_profile(write(tmp_path / "mine.toml", **changes))
    assert "mine.toml" in str(caught.value)


def test_files_that_are_no_profile(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("name = ")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "long.toml").write_text("# " + "x" * 70_000)
    (tmp_path / "folder.toml").mkdir()
    for name, message in {
        "broken.toml": "not valid TOML", "binary.toml": "not valid TOML", "long.toml": "at most 65536",
        "missing.toml": "cannot read the target profile", "folder.toml": "cannot read the target profile",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=message):
            load_profile(str(tmp_path / name))
    with pytest.raises(InputError, match="unknown target 'tpu'; expected ort, ort-legacy"):
        load_profile("tpu")


def test_a_profile_is_validated_where_it_is_made() -> None:
    with pytest.raises(InputError, match="'weight_bits' is 1"):
        TargetProfile(**{**ORT.to_json(), "weight_bits": 1})
