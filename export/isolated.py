"""Examining a file in a process of its own: what a hostile model does to memory, time or the process ends there.

On systems without `resource` limits (Windows) only the time is bounded.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from edgeguard.errors import EdgeGuardError, InputError, MissingDependency, require

SECONDS = 300
"""Of processor time."""
PATIENCE = 6
"""Times as long may it take by the clock, on a busy machine."""
MEMORY, MEMORY_PER_BYTE, MEMORY_PER_ELEMENT = 1_000_000_000, 10, 16
"""Bytes of address space: for the libraries, which take a fifth of it, for each byte of the model and its external data, and
for each number in them, which the runtime may unpack to float32 in several copies."""
CODE = "import sys; sys.path[:] = sys.argv[2:]; from edgeguard.export.isolated import child; child(sys.argv[1])"
QUIET = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
"""Threads reserve address space."""


def inspect_onnx(path: Path | str) -> dict[str, Any]:
    """`edgeguard.export.onnx_inspect.examine`, in another process with bounded memory and time.

    Raises:
        InputError: see `examine`; the file takes too much memory or time, or crashes the runtime.
        MissingDependency: onnx or onnxruntime is not installed.
    """
    require("onnx", "train")
    from edgeguard.export.onnx_read import file_size

    path = Path(path)
    file_size(path)
    command = [sys.executable, "-c", CODE, str(path.absolute()), *filter(None, sys.path)]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=SECONDS * PATIENCE,
                              stdin=subprocess.DEVNULL, env={**os.environ, **QUIET})  # fmt: skip
    except subprocess.TimeoutExpired as exc:
        raise InputError(f"{str(path)!r} takes the runtime more than {SECONDS * PATIENCE} seconds to load") from exc
    try:
        answer = json.loads(done.stdout)
    except ValueError as exc:
        raise InputError(
            f"{str(path)!r} cannot be examined: the process that loaded it ended with status {done.returncode}"
            f"{_last_words(done.stderr)}; it may take {SECONDS} seconds of processor time, and memory by its size"
        ) from exc
    if "error" in answer:
        raise (MissingDependency if answer["exit_code"] == MissingDependency.exit_code else InputError)(answer["error"])
    return {**answer, "file": str(path) if str(path).isprintable() else answer["file"]}


def _last_words(stderr: bytes) -> str:
    """The last line that a process wrote, if any, quoted."""
    lines = stderr.decode(errors="replace").strip().splitlines()
    return f" and {lines[-1][:200]!r}" if lines else ""


def child(path: str) -> NoReturn:
    """Examine one file and print the document, or the error, as JSON; then end the process."""
    file = Path(path)
    try:
        from edgeguard.export.onnx_inspect import examine
        from edgeguard.export.onnx_read import read_model

        _limit(file.stat().st_size)
        stored = read_model(file)
        _limit(stored.size, stored.elements)
        del stored
        answer = examine(file)
    except EdgeGuardError as exc:
        answer = {"error": str(exc), "exit_code": exc.exit_code}
    except (MemoryError, RecursionError) as exc:
        kind = "memory than its size allows" if isinstance(exc, MemoryError) else "nesting than can be followed"
        answer = {"error": f"{path!r} takes more {kind}", "exit_code": InputError.exit_code}
    print(json.dumps(answer), flush=True)
    sys.stdout.flush()
    os._exit(0)


def _limit(size: int, elements: int = 0) -> None:
    """Bound the address space and processor time of this process, where the system can."""
    try:
        import resource
    except ImportError:
        return
    memory = MEMORY + MEMORY_PER_BYTE * size + MEMORY_PER_ELEMENT * elements
    for kind, wanted in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        bounded = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS knows RLIMIT_AS and does not let it be set
            resource.setrlimit(kind, (bounded, hard))
