"""Commands as processes that can be hit by a fault: started, waited for, and what they left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).resolve().parent
CALM = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
    "MPLCONFIGDIR": "", "COLUMNS": "120",
}  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a command ended. code: its exit code, or minus the signal that killed it. operations: if they were listed."""

    code: int
    stdout: str
    stderr: str
    operations: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The last line that a user sees. Raises AssertionError where there is a traceback."""
        assert "Traceback" not in self.stderr, self.stderr
        return self.stderr.strip().splitlines()[-1] if self.stderr.strip() else ""


@dataclass(frozen=True)
class Begun:
    """A command that runs. logs: folder of its output."""

    pid: int
    logs: Path

    def output(self) -> str:
        """What is on its stdout so far."""
        path = self.logs / "stdout"
        return path.read_text().strip() if path.is_file() else ""


class Nursery:
    """Runs commands, see `nursery.py`; a context manager. logs: folder for outputs. environment: of all commands."""

    def __init__(self, logs: Path, environment: Mapping[str, str] | None = None) -> None:
        self._logs, self._count = logs, 0
        logs.mkdir(parents=True, exist_ok=True)
        self._errors = (logs / "nursery.log").open("w")
        calm = {**CALM, "MPLCONFIGDIR": str(logs / "matplotlib")}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "nursery.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            text=True, env={**os.environ, **calm, **(environment or {})},
        )  # fmt: skip
        assert self._answer() == {"ready": True}

    def start(
        self, folder: Path, *arguments: object, fault: Mapping[str, str] | None = None, listed: bool = False,
        file_bytes: int | None = None, stdout: str = "", stderr: str = "", **environment: str,
    ) -> Begun:  # fmt: skip
        """Begin `edgeguard ARGUMENTS` in a folder.

        fault: see `Operations`. listed: keep the names of all operations. file_bytes: no file may be larger. stdout, stderr:
        files for them.
        """
        self._count += 1
        logs = self._logs / str(self._count)
        logs.mkdir()
        self._say({"start": {
            "folder": str(folder), "arguments": [str(one) for one in arguments], "fault": fault, "file_bytes": file_bytes,
            "listing": str(logs / "operations") if listed or fault else None, "environment": environment,
            "stdout": stdout or str(logs / "stdout"), "stderr": stderr or str(logs / "stderr"),
        }})  # fmt: skip
        return Begun(int(self._answer()["pid"]), logs)

    def wait(self, begun: Begun) -> Ended:
        """Until it has ended."""
        self._say({"wait": begun.pid})
        status = int(self._answer()["status"])
        texts = [path.read_text() if path.is_file() else ""
                 for path in (begun.logs / name for name in ("stdout", "stderr", "operations"))]  # fmt: skip
        return Ended(os.waitstatus_to_exitcode(status), texts[0], texts[1], tuple(texts[2].splitlines()))

    def run(self, folder: Path, *arguments: object, **settings: Any) -> Ended:
        """A command from its start to its end."""
        return self.wait(self.start(folder, *arguments, **settings))

    def _say(self, order: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the nursery ended: {Path(self._errors.name).read_text()[-3000:]}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()
