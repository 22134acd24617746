"""What the base install costs a device: bytes on disk, and seconds until it is imported.

    python3 -m venv base && base/bin/pip install . && base/bin/python benchmarks/footprint.py --out results/footprint.json

Run it with the Python of an environment that has the base install and nothing else. Counted are the files of every
installed distribution but pip and setuptools. Import times are the best of several fresh processes, with files in the cache.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from edgeguard import files

SCHEMA, TRIES = "edgeguard.footprint/1", 5
NOT_OURS = ("pip", "setuptools", "wheel")
IMPORTS = ("edgeguard", "edgeguard.serve", "edgeguard.targets.ort", "edgeguard.cli", "onnxruntime")


def sizes() -> dict[str, int]:
    """Bytes by distribution, the largest first."""
    found: dict[str, int] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name.lower() not in NOT_OURS:
            paths = (Path(str(distribution.locate_file(file))) for file in distribution.files or ())
            found[name] = sum(path.stat().st_size for path in paths if path.is_file())
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def import_seconds(module: str) -> float:
    """Of a fresh process, less what a process takes that imports nothing."""
    def best(code: str) -> float:
        spent = []
        for _ in range(TRIES):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-I", "-c", code], check=True)
            spent.append(time.perf_counter() - begin)
        return min(spent)

    return max(0.0, best(f"import {module}") - best("pass"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = sizes()
    document: dict[str, Any] = {
        "schema": SCHEMA, "python": platform.python_version(), "machine": platform.machine(), "bytes": sum(found.values()),
        "distributions": found, "import_seconds": {module: import_seconds(module) for module in IMPORTS},
    }  # fmt: skip
    if options.out is not None:
        files.write_json(options.out, document)
    for name, size in list(found.items())[:10]:
        print(f"{size / 1e6:8.1f} MB  {name}")
    print(f"{document['bytes'] / 1e6:8.1f} MB  in all, {len(found)} distributions")
    for module, seconds in document["import_seconds"].items():
        print(f"{seconds:8.2f} s   import {module}")


if __name__ == "__main__":
    main()
