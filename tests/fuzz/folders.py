"""Hostile folders: trees around an artifact or images in which something is not what its name says."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from readers import READERS

Change = Callable[[Path], object]


@dataclass(frozen=True)
class Tree:
    """reader: of `readers.READERS`, given a valid tree with `change` applied to the folder of its file. valid: it stays so."""

    reader: str
    change: Change
    valid: bool = False


def _link(name: str, target: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def _moved(name: str) -> Change:
    """A file is a link to where it was moved, outside of the folder."""

    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / "moved")
        (folder / name).symlink_to(folder.parent / "moved")

    return change


def _pipe(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def _folder(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def _named(name: str) -> Change:
    """Another name of the artifact's graph among its files."""

    def change(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = manifest["files"]["graph.npz"]
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return change


def _copied(name: bytes) -> Change:
    """An image under another name, which the file system takes and people do not expect."""

    def change(folder: Path) -> None:
        shutil.copyfile(os.fsencode(folder / "a.png"), os.fsencode(folder) + b"/" + name)

    return change


def _broken(name: bytes) -> Change:
    """The same of a file that is no image, so that a sentence has to name it."""

    def change(folder: Path) -> None:
        with open(os.fsencode(folder) + b"/" + name, "wb") as handle:
            handle.write(b"no image")

    return change


def _class(name: bytes) -> Change:
    def change(folder: Path) -> None:
        os.rename(os.fsencode(folder), os.fsencode(folder.parent) + b"/" + name)

    return change


def _sparse(size: int) -> Change:
    def change(folder: Path) -> None:
        with (folder / "b.png").open("wb") as handle:
            handle.write(b"\x89PNG\r\n\x1a\n")
            handle.truncate(size)

    return change


TREES: dict[str, Tree] = {
    **{f"artifact, {name!r:.30} among its files": Tree("artifact", _named(name)) for name in (
        "../graph.npz", "/etc/hostname", "sub/graph.npz", "..", ".", "", "graph.npz\0", "x" * 5000, "\x1b[2J", "a\nb", "\u202e",
    )},
    "artifact, graph is a link out of the folder": Tree("artifact", _moved("graph.npz")),
    "artifact, graph is a link to a device": Tree("artifact", _link("graph.npz", "/dev/zero")),
    "artifact, graph is a link to itself": Tree("artifact", _link("graph.npz", "graph.npz")),
    "artifact, graph is a pipe": Tree("artifact", _pipe("graph.npz")),
    "artifact, graph is a folder": Tree("artifact", _folder("graph.npz")),
    "artifact, manifest is a link to a device": Tree("artifact", _link("manifest.json", "/dev/zero")),
    "artifact, manifest is a link to itself": Tree("artifact", _link("manifest.json", "manifest.json")),
    "artifact, manifest is a pipe": Tree("artifact", _pipe("manifest.json")),
    "artifact, manifest is a folder": Tree("artifact", _folder("manifest.json")),
    "images, a link to a device": Tree("image", _link("b.png", "/dev/zero")),
    "images, a link to a file that is no image": Tree("image", _link("b.png", "/etc/hostname")),
    "images, a link to itself": Tree("image", _link("b.png", "b.png")),
    "images, a link to nothing": Tree("image", _link("b.png", "gone.png")),
    "images, a link to an image outside": Tree("image", _moved("a.png"), valid=True),
    "images, a link to the folder above": Tree("image", _link("loop", ".."), valid=True),
    "images, a class that is a link to all classes": Tree(
        "image", lambda folder: (folder.parent / "owl").symlink_to("."), valid=True),
    "images, a class that is a link to itself": Tree("image", lambda folder: (folder.parent / "owl").symlink_to("owl"), valid=True),
    "images, a pipe": Tree("image", _pipe("b.png")),
    "images, a folder named like an image": Tree("image", _folder("a.png")),
    "images, a class without images": Tree("image", lambda folder: (folder.parent / "owl").mkdir()),
    "images, a sparse file of a terabyte": Tree("image", _sparse(1 << 40)),
    "images, a sparse file of 200 MiB": Tree("image", _sparse(200 << 20)),
    **{f"images, named {name!r:.40}": Tree("image", _copied(name), valid=True) for name in (
        b"\xff\xfe.png", b"a\nb.png", b"\x1b[2J.png", "\u202egnp.png".encode(), "\u732b.png".encode(), b"x" * 251 + b".png",
    )},
    **{f"images, broken and named {name!r:.40}": Tree("image", _broken(name)) for name in (
        b"\xff\xfe.png", b"a\nb.png", b"\x1b[2J.png", "\u202egnp.png".encode(), b"x" * 251 + b".png",
    )},
    **{f"images, a class named {name!r:.40}": Tree("image", _class(name), valid=valid) for name, valid in (
        (b"\xff\xfe", False), (b"a\nb", False), (b"\x1b[2J", False), ("\u202egnp".encode(), False), ("\u732b".encode(), True),
        ("\u0645\u06cc\u200c\u062e".encode(), True), (b"<script>alert(1)</script>".replace(b"/", b"|"), True), (b"train", True),
    )},
}  # fmt: skip


def made(tree: Tree, folder: Path) -> Path:
    """The file that the reader is given, in a new tree below `folder`, changed."""
    path = READERS[tree.reader].make(folder)
    tree.change(path.parent)
    return path
