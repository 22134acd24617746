"""The operations of a job that a fault can hit, counted and named alike in every run, in the process of the job itself.

A file is written in three of them: `write NAME` (all of it is in the temporary file, which is not synchronized), `name NAME` (it
is about to get its name) and `named NAME` (it has it). Further `make NAME` and `remove NAME`, each before it is done, `step`
(after a step of an optimizer), `ask` (before ONNX Runtime is called), and `end`. All but `end` carry the number of their
occurrence.
"""

from __future__ import annotations

import os
import re
import signal
import stat
import sys
from collections import Counter
from pathlib import Path
from typing import Any

TEMPORARY = re.compile(r"\.(?P<name>.+)\.(\d+\.[0-9a-f]{8}\.tmp|[a-z0-9_]{8}\.part)")
STAGE = re.compile(r"[0-9a-f]{32}\.npz")
PATCH = re.compile(r"\d+x\d+-\d+\.npz")


def plain(name: str) -> str:
    """A file's name without what differs from run to run."""
    found = TEMPORARY.fullmatch(name)
    name = found["name"] if found else name
    return "a stage" if STAGE.fullmatch(name) else "a patch" if PATCH.fullmatch(name) else name


class Operations:
    """Watches this process, below the current folder; for a process that does nothing else, as it cannot be undone.

    listing: file that takes the name of every operation. fault: `at`, the name of one of them, and `act`: `kill`; `half`,
    which cuts the file that is being written into half before; `stop` until somebody continues the process; or `clock`, which
    copies the file `from` over the file `to`.
    """

    def __init__(self, listing: Path, fault: dict[str, str] | None) -> None:
        self._folder, self._fault = str(Path.cwd()), fault
        self._listing = os.open(listing, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._counts: Counter[str] = Counter()
        self._named = ""
        sys.addaudithook(self._audit)
        self._sync, os.fsync = os.fsync, self._synchronize

    def came(self, name: str, handle: int | None = None) -> None:
        """An operation; handle: of the file that is being written."""
        self._counts[name] += 1
        label = name if name == "end" else f"{name} {self._counts[name]}"
        os.write(self._listing, f"{label}\n".encode())
        if self._fault is None or self._fault["at"] != label:
            return
        act = self._fault["act"]
        if act == "half":
            assert handle is not None
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
        if act == "clock":
            Path(self._fault["to"]).write_bytes(Path(self._fault["from"]).read_bytes())
        else:
            os.kill(os.getpid(), signal.SIGSTOP if act == "stop" else signal.SIGKILL)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir"):
            return
        pair = event in ("os.rename", "os.link")
        path, descriptor = os.fsdecode(arguments[1 if pair else 0]), arguments[-1]
        where = os.readlink(f"/proc/self/fd/{descriptor}") if descriptor >= 0 else ""
        if not str(Path(self._folder, where, path)).startswith(f"{self._folder}/"):
            return
        name = plain(Path(path).name)
        if event == "os.remove" and TEMPORARY.fullmatch(Path(path).name):
            return  # looks whether anything is left, which it rarely is
        if pair:
            self._named = name
        self.came(f"{'name' if pair else 'make' if event == 'os.mkdir' else 'remove'} {name}")

    def _synchronize(self, handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if path.startswith(self._folder):
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                if self._named:
                    self.came(f"named {self._named}")
                self._named = ""
            else:
                self.came(f"write {plain(Path(path).name)}", handle)
        self._sync(handle)

    def count_calls(self) -> None:
        """Count what PyTorch's optimizers and ONNX Runtime do as well."""
        import onnxruntime
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(lambda *_: self.came("step"))
        run = onnxruntime.InferenceSession.run

        def ask(session: Any, *arguments: Any, **more: Any) -> Any:
            self.came("ask")
            return run(session, *arguments, **more)

        onnxruntime.InferenceSession.run = ask
