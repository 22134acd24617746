"""Write the public names of a TensorRT bindings wheel to a text file: `python extract_tensorrt_names.py WHEEL OUT`.

The bindings are imported, by the Python version that the wheel is for, and looked at. The libraries they link to are
not needed for that: libraries of the same names, whose functions do nothing, take their place. Needs `cc`, `nm` and
`readelf`. A line of the result is `Class: member member ...`, and `tensorrt: ...` for the module itself.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LOOK = """
import inspect, sys
sys.path.insert(0, sys.argv[1])
import tensorrt_bindings as module

def public(thing):
    return sorted(name for name in dir(thing) if not name.startswith("_"))

def show(name, thing):
    print(f"{name}: {' '.join(public(thing))}")
    for member in public(thing):
        value = getattr(thing, member, None)
        if inspect.isclass(value) and value is not thing and value.__module__.startswith("tensorrt"):
            show(f"{name}.{member}", value)

classes = {n: getattr(module, n) for n in public(module) if inspect.isclass(getattr(module, n))}
print("tensorrt:", "__version__", *public(module))
for name, thing in classes.items():
    show(name, thing)
"""
SYSTEM = re.compile(r"_?_?Py|_ITM|__|dl|pthread")
"""Symbols that Python and the system provide."""


def lines_of(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def stand_ins(library: Path, folder: Path) -> None:
    """Empty versions of the libraries that the bindings link to."""
    symbols = [line.split()[-1] for line in lines_of("nm", "-D", "--undefined-only", str(library))]
    wanted = [symbol for symbol in symbols if "@" not in symbol and not SYSTEM.match(symbol)]
    source = folder / "empty.c"
    source.write_text("".join(f'void *f{n}(void) __asm__("{s}"); void *f{n}(void) {{ return 0; }}\n'
                              for n, s in enumerate(wanted)))  # fmt: skip
    for line in lines_of("readelf", "-d", str(library)):
        found = re.search(r"\[(libnv[^]]+)\]", line)
        if found:
            out = str(folder / found[1])
            lines_of("cc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{found[1]}", "-o", out, str(source))


def main(wheel: Path, out: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        stand_ins(folder / "tensorrt_bindings" / "tensorrt.so", folder)
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", LOOK, str(folder)],
            env={**os.environ, "LD_LIBRARY_PATH": str(folder)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    out.write_text(f"# from {wheel.name}, SHA-256 {digest}\n{result.stdout}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
