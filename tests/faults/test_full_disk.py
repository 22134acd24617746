"""Disks that are full, briefly."""

from __future__ import annotations

from pathlib import Path

import pytest
from full_disk import fill, full_streams, no_temporary_files, small_disk
from jobs import ATTACK, EXPORT, HARDEN, VERIFY, Job, Workshop


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "share", "said"),
    [
        (HARDEN, 0.3, "trained/checkpoint.safetensors"), (HARDEN, 0.3, "edgeguard harden --resume trained"),
        (EXPORT, 0.0, "artifact-2/"), (VERIFY, 0.8, "verified/"), (ATTACK, 0.0, "attacked/patch.npz"),
    ],
)  # fmt: skip
def test_a_sentence_and_after_space_is_made_the_same_result(
    workshop: Workshop, tmp_path: Path, job: Job, share: float, said: str
) -> None:
    with small_disk(tmp_path / "disk") as disk:
        if disk.mounted or said != "edgeguard harden --resume trained":
            assert said.partition("/")[0] in fill(workshop, disk, job, share)


@pytest.mark.slow
def test_no_room_for_temporary_files(workshop: Workshop, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        if not disk.mounted:
            pytest.skip("no tmpfs can be mounted here")
        assert "cannot write" in no_temporary_files(workshop, disk)


@pytest.mark.slow
def test_streams_that_cannot_be_written(workshop: Workshop) -> None:
    full_streams(workshop)
