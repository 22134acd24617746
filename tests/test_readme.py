"""The README's commands are run as they stand.

Every line of a `sh` or `console` block that begins with `edgeguard` or `printf` runs through the installed command, in order, in
one temporary folder. A block that cannot be run here (a device, a download) has `<!-- not tested: REASON -->` on the
line above its fence. A line that ends in `&` runs beside the others, until the end. The two commands for a fresh machine
begin otherwise and are only looked for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
NOT_TESTED = re.compile(r"<!-- not tested: [^\n]*\S -->\n$")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and whether it asks to be left alone."""

    language: str
    text: str
    tested: bool


def blocks(text: str) -> list[Block]:
    return [Block(match[1], match[2], not NOT_TESTED.search(text[: match.start()])) for match in FENCE.finditer(text)]


def commands(block: Block) -> list[str]:
    """The commands of a shell block, one a line; in a `console` block those after `$`, the rest is output."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def to_run(text: str) -> list[str]:
    shell = [block for block in blocks(text) if block.tested and block.language in ("sh", "console")]
    return [line for block in shell for line in commands(block) if line.split()[0] in ("edgeguard", "printf")]


def test_fences_are_read() -> None:
    text = (
        "```sh\nedgeguard one --a \\\n  --b\n# comment\nls\n```\n```python\nedgeguard\n```\n"
        "<!-- not tested: needs a GPU -->\n```sh\nedgeguard two\n```\n"
        "```console\n$ edgeguard three | head\nedgeguard is output here\n```\n"
    )
    assert [line.split() for line in to_run(text)] == [
        ["edgeguard", "one", "--a", "--b"],
        ["edgeguard", "three", "|", "head"],
    ]
    assert not to_run("<!-- not tested: x -->\n```sh\nedgeguard two\n```\n")
    assert to_run("<!-- not tested: -->\n```sh\nedgeguard two\n```\n") == ["edgeguard two"]


def test_every_block_says_its_language() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count("\n```") == 2 * len(blocks(text))
    assert all(block.language for block in blocks(text))


@pytest.mark.parametrize(
    ("marker", "extras", "last"),
    [
        ("demo-command", "[train]", ".venv/bin/edgeguard demo"),
        ("test-command", "[train,test]", ".venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder"),
    ],
)
def test_the_commands_for_a_fresh_machine(marker: str, extras: str, last: str) -> None:
    found = re.search(rf"<!-- {marker} -->\n```sh\n([^\n]+)\n```\n", README.read_text(encoding="utf-8"))
    assert found
    assert found[1] == f"python3 -m venv .venv && .venv/bin/pip install '.{extras}' && {last}"


@pytest.mark.slow
def test_every_command_works(tmp_path: Path) -> None:
    lines = to_run(README.read_text(encoding="utf-8"))
    beside = Path(sys.executable).parent
    path = os.pathsep.join([str(beside), os.environ.get("PATH", "")])
    shell = shutil.which("bash")
    if not lines:
        return
    assert (beside / "edgeguard").is_file()
    assert shell
    env, beside_others = {**os.environ, "PATH": path}, []
    try:
        for line in lines:
            if line.endswith("&"):
                command = [shell, "-c", f"exec {line.removesuffix('&')}"]
                beside_others.append(subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL))
                continue
            result = subprocess.run(
                [shell, "-o", "pipefail", "-c", line],
                cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=900,
            )  # fmt: skip
            assert result.returncode == 0, f"$ {line}\n{result.stdout}{result.stderr}"
    finally:
        for process in beside_others:
            process.terminate()
    assert all(process.wait(60) == 0 for process in beside_others)
