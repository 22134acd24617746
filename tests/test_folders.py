from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from edgeguard import files, folders, locks
from edgeguard.errors import InputError

HOLDER = """
import sys, time
from pathlib import Path
from edgeguard import folders
with getattr(folders, sys.argv[1])(Path(sys.argv[2])) as folder:
    (Path(folder or sys.argv[2]) / "half").write_text("x")
    print("held", flush=True)
    time.sleep(600)
"""
NEEDS_LOCKS = pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")


class Holder:
    """Another process that holds a folder, or fills one, until it is killed."""

    def __init__(self, how: str, path: Path) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", HOLDER, how, str(path)], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def test_a_folder_appears_only_when_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with folders.folder_transaction(out) as folder:
        (folder / "file").write_text("x")
        assert not out.exists()
    assert (out / "file").read_text() == "x"
    assert out.stat().st_mode & 0o777 == 0o755
    assert list(out.parent.iterdir()) == [out]


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with folders.folder_transaction(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    def race() -> None:
        with folders.folder_transaction(tmp_path / "out"):
            (tmp_path / "out").mkdir()

    with pytest.raises(InputError, match="exists already"):
        race()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("there", "dangling"):
        with pytest.raises(InputError, match=r"exists already; name a new folder with --out"):
            folders.new_folder(tmp_path / name)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write to"), folders.folder_transaction(tmp_path / "file" / "out"):
        pass


@NEEDS_LOCKS
def test_a_folder_that_another_process_fills_is_left_to_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Holder("folder_transaction", out):
        with pytest.raises(InputError, match=r"another process is writing .*out; wait for it, or name another folder with --out"):
            fill(out)
        fill(tmp_path / "out.more")
        fill(tmp_path / "o")
        assert len(list(tmp_path.glob(".out.*"))) == 1


@NEEDS_LOCKS
def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Holder("folder_transaction", out):
        pass
    assert len(list(tmp_path.glob(".out.*.part"))) == 1
    (tmp_path / ".out.notafold.part").write_text("somebody's file")
    fill(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.notafold.part", "out"]


def fill(path: Path) -> None:
    with folders.folder_transaction(path) as folder:
        (folder / "file").write_text("x")


@NEEDS_LOCKS
def test_a_folder_is_held_by_one_process_until_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    with Holder("held", path), pytest.raises(InputError, match=r"another process is writing .*run; wait until it has ended"):
        hold(path)
    (path / "patches").mkdir()
    (path / "patches" / ".a.npz.123.0123abcd.tmp").write_text("half")
    (path / ".mine.tmp").write_text("somebody's file")
    hold(path)
    assert sorted(entry.name for entry in path.rglob("*")) == [".mine.tmp", "half", "patches"]
    hold(path)


def hold(path: Path) -> None:
    with folders.held(path):
        pass


def test_without_locks_nothing_is_held_and_nothing_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Holder("folder_transaction", tmp_path / "out"):
        pass
    monkeypatch.setattr(locks, "take", lambda folder: None)
    with folders.held(tmp_path / "run"), folders.held(tmp_path / "run"):
        pass
    fill(tmp_path / "out")
    assert len(list(tmp_path.glob(".out.*"))) == 1


def test_folders_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for call, message in (
        (folders.make_folder, "cannot make the folder"), (hold, "cannot write to"), (fill, "cannot write to"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            call(tmp_path / "file" / "folder")


def test_errors_name_files_by_where_they_would_have_been(tmp_path: Path) -> None:
    def fail() -> None:
        with folders.folder_transaction(tmp_path / "out") as folder:
            files.write_bytes(folder / "missing" / "file", b"x")

    with pytest.raises(InputError) as caught:
        fail()
    assert str(caught.value).startswith(f"cannot write {tmp_path / 'out' / 'missing' / 'file'}: ")


def test_a_folder_that_is_filled_in_the_last_moment_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, chmod = tmp_path / "out", Path.chmod

    def late(path: Path, mode: int) -> None:
        out.mkdir()
        (out / "file").write_text("another's")
        chmod(path, mode)

    monkeypatch.setattr(Path, "chmod", late)
    with pytest.raises(InputError, match="exists already"):
        fill(out)
    assert (out / "file").read_text() == "another's"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_temporary_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with folders.temporary_folder() as folder:
        (folder / "file").write_text("x")
        assert folder.parent == tmp_path
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    message = r"cannot write .*nowhere.*: No such file or directory; TMPDIR names another place"
    with pytest.raises(InputError, match=message), folders.temporary_folder():
        pass


@NEEDS_LOCKS
def test_a_folder_that_is_replaced_while_it_is_locked_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, open_file, times = tmp_path / "folder", os.open, []

    def replaced(path: Path, flags: int) -> int:
        handle = open_file(path, flags)
        if not times:
            folder.rename(tmp_path / "old")
        times.append(path)
        return handle

    monkeypatch.setattr(os, "open", replaced)
    locks.release(locks.take_made(folder))
    assert len(times) == 2
    assert folder.is_dir()
