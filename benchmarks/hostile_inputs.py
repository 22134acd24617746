"""How every reader takes the hostile files of tests/fuzz/corpus.py: refused, still valid, or anything worse; and its memory.

Each reader runs in a process of its own. Distinct files are counted by their content.
"""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "fuzz"))
RESULT = ROOT / "benchmarks" / "results" / "hostile_inputs.json"


def run(name: str) -> dict[str, Any]:
    """One reader. peak_mib: of the process or one that it starts, their libraries and the making of the files included."""
    import corpus
    from folders import TREES, made
    from readers import READERS

    found: dict[str, Any] = {"tried": 0, "refused": 0, "accepted": 0, "other_exceptions": 0, "code_executions": 0, "kinds": {}}
    seen = set()
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "code-ran"
        path = READERS[name].make(Path(folder))
        original = path.read_bytes()
        for hostile in corpus.hostile(name, path, mark):
            digest = hashlib.sha256(hostile.content).digest()
            if digest in seen or hostile.content == original:
                continue
            seen.add(digest)
            path.write_bytes(hostile.content)
            _count(found, name, hostile.kind, path)
            path.write_bytes(original)
            found["code_executions"] += mark.exists()
        for kind, tree in TREES.items():
            if tree.reader == name:
                inner = Path(tempfile.mkdtemp(dir=folder))
                _count(found, name, kind.split(",")[0] + " in a hostile folder", made(tree, inner))
    peaks = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {**found, "peak_mib": max(peaks) // 1024}


def _count(found: dict[str, Any], name: str, kind: str, path: Path) -> None:
    from readers import READERS, outcome

    try:
        result = outcome(READERS[name], path, slow=True)
    except Exception as exc:
        print(f"{name}, {kind}: {type(exc).__name__}: {exc}", file=sys.stderr)
        result = "other_exceptions"
    found["tried"] += 1
    found[result] += 1
    found["kinds"][kind] = found["kinds"].get(kind, 0) + 1


def main() -> None:
    if len(sys.argv) == 2:
        print(json.dumps(run(sys.argv[1])))
        return
    from readers import READERS

    readers: dict[str, Any] = {}
    columns = ("tried", "refused", "accepted", "other_exceptions", "code_executions", "peak_mib")
    print("| reader | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name in READERS:
        done = subprocess.run([sys.executable, __file__, name], check=True, stdout=subprocess.PIPE, text=True)
        readers[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"| {name} | " + " | ".join(str(readers[name][column]) for column in columns) + " |", flush=True)
    total = {column: sum(entry[column] for entry in readers.values()) for column in columns[:-1]}
    total["peak_mib"] = max(entry["peak_mib"] for entry in readers.values())
    print("| all | " + " | ".join(str(total[column]) for column in columns) + " |")
    RESULT.write_text(json.dumps({"total": total, "readers": readers}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
