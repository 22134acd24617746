"""A process that has imported everything and forks one child for each `edgeguard` command: so a command costs no start.

Lines of JSON on stdin: `{"start": {...}}` is answered `{"pid": N}`, `{"wait": N}` `{"status": S}`, as `os.waitpid` gives it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any


def set_clock(offset: Path) -> None:
    """Let Python's own clock be so many seconds ahead as a file says whenever it is asked."""
    now = time.time
    time.time = lambda: now() + float(offset.read_text())


def child(order: dict[str, Any]) -> None:
    """Run one command and end; never returns."""
    os.chdir(order["folder"])
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.update(order["environment"])
    tempfile.tempdir = None  # somebody may have asked for it before TMPDIR was another
    if order["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"],) * 2)
    if "EDGEGUARD_FAULTS_CLOCK" in os.environ:
        set_clock(Path(os.environ["EDGEGUARD_FAULTS_CLOCK"]))
    from edgeguard.cli import main

    operations = None
    if order["listing"] is not None:
        from operations import Operations

        operations = Operations(Path(order["listing"]), order["fault"])
        operations.count_calls()
    sys.argv = ["edgeguard", *order["arguments"]]
    code: Any = 0
    try:
        main()
    except SystemExit as exc:
        code = exc.code or 0
    except BaseException:
        traceback.print_exc()
        code = 70
    finally:
        if operations is not None:
            operations.came("end")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    import brevitas
    import matplotlib.figure
    import onnx
    import onnxruntime
    import torchvision

    import edgeguard.cli
    import edgeguard.defences.harden
    import edgeguard.export.onnx_writer
    import edgeguard.export.proof
    import edgeguard.targets.twin
    import edgeguard.verify

    assert all((brevitas, matplotlib.figure, onnx, onnxruntime, torchvision, edgeguard.cli))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            print(json.dumps({"status": os.waitpid(order["wait"], 0)[1]}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            child(order["start"])
        print(json.dumps({"pid": pid}), flush=True)


if __name__ == "__main__":
    main()
