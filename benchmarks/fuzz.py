"""Coverage-guided fuzzing of every reader of tests/fuzz/readers.py with atheris: what it reached, and what it found.

    pip install atheris
    python benchmarks/fuzz.py --seconds 60                     # every reader, and the table of docs/security.md
    python benchmarks/fuzz.py --seconds 600 --reader gate      # one, for longer

Each reader runs in a process of its own, with the hostile files of tests/fuzz/corpus.py as the first inputs. An exception that is
not one sentence is a finding: its input is kept below --findings, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "fuzz"))
RESULT = ROOT / "benchmarks" / "results" / "fuzz.json"
LONGEST = 1 << 16
"""Bytes of an input: longer ones make a fuzzer slow."""
COLUMNS = ("executions", "inputs_before", "inputs_after", "coverage_before", "coverage_after", "findings")
PROGRESS = re.compile(r"#\d+\s+(\w+)\s+cov: (\d+) ft: \d+ corp: (\d+)")


def target(name: str, seconds: int, findings: Path) -> None:
    """Fuzz one reader; never returns, for the fuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["edgeguard", "tomllib"]):
        import corpus
        from readers import READERS, outcome

        reader = READERS[name]
        folder = Path(tempfile.mkdtemp(prefix="edgeguard-fuzz-", dir=os.environ["FUZZ_FOLDER"]))
        path = reader.make(folder)
        outcome(reader, path)  # some import what they need only now
    first = folder.with_name("inputs")
    first.mkdir()
    contents = [path.read_bytes(), *(hostile.content for hostile in corpus.hostile(name, path, folder / "code-ran"))]
    for content in contents:
        if len(content) <= LONGEST:
            (first / hashlib.sha256(content).hexdigest()).write_bytes(content)

    def run(data: bytes) -> None:
        path.write_bytes(data)
        try:
            outcome(reader, path)
        except Exception as exc:
            place = exc.__traceback__
            while place is not None and place.tb_next is not None:
                place = place.tb_next
            where = "" if place is None else f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}"
            kept = findings / f"{name.replace(' ', '-')}-{type(exc).__name__}-{where.replace(':', '-')}"
            if not kept.exists():
                kept.write_bytes(data)
                print(f"FINDING {type(exc).__name__} {where} {exc!s:.300}", file=sys.stderr, flush=True)

    options = [f"-max_total_time={seconds}", f"-max_len={LONGEST}", "-seed=1", "-rss_limit_mb=4096", "-timeout=60",
               "-print_final_stats=1", f"-artifact_prefix={findings}/{name.replace(' ', '-')}-"]  # fmt: skip
    atheris.Setup([sys.argv[0], str(first), *options], run)
    atheris.Fuzz()


def fuzz(name: str, seconds: int, findings: Path) -> dict[str, Any]:
    """One reader in a process of its own. coverage: edges of the package's bytecode and comparisons that were reached."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--target", name, "--seconds", str(seconds), "--findings", str(findings)]
        environment = {**os.environ, "FUZZ_FOLDER": folder}
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    log = done.stderr.decode(errors="replace")
    progress = PROGRESS.findall(log)
    executed = re.search(r"stat::number_of_executed_units:\s+(\d+)", log)
    if not progress or executed is None:
        raise SystemExit(f"{name}: the fuzzer did not run:\n{log[-2000:]}")
    started = next((entry for entry in progress if entry[0] == "INITED"), progress[0])
    found = sorted({line.removeprefix("FINDING ") for line in log.splitlines() if line.startswith("FINDING ")})
    if done.returncode:
        found.append(f"the process ended with status {done.returncode}: {log.strip().splitlines()[-1]:.200}")
    return {
        "executions": int(executed[1]), "inputs_before": int(started[2]), "inputs_after": int(progress[-1][2]),
        "coverage_before": int(started[1]), "coverage_after": int(progress[-1][1]), "findings": len(found), "found": found,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="of each reader")
    parser.add_argument("--reader", help="one of tests/fuzz/readers.py; all by default")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="folder for inputs that broke something")
    parser.add_argument("--target", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.findings.mkdir(parents=True, exist_ok=True)
    if args.target is not None:
        target(args.target, args.seconds, args.findings.resolve())
    try:
        import atheris  # noqa: F401
    except ImportError:
        raise SystemExit("atheris is not installed; run: pip install atheris (Linux and macOS)") from None
    from readers import READERS

    if args.reader is not None and args.reader not in READERS:
        raise SystemExit(f"there is no reader {args.reader!r}; expected one of {', '.join(READERS)}")
    results: dict[str, Any] = {}
    print("| reader | " + " | ".join(COLUMNS) + " |\n|---|" + "---|" * len(COLUMNS))
    for name in READERS if args.reader is None else (args.reader,):
        results[name] = fuzz(name, args.seconds, args.findings.resolve())
        print(f"| {name} | " + " | ".join(str(results[name][column]) for column in COLUMNS) + " |", flush=True)
        for sentence in results[name]["found"]:
            print(f"{name}: {sentence}", file=sys.stderr)
    if args.reader is None:
        document = {"seconds": args.seconds, "python": platform.python_version(), "readers": results}
        RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(any(result["findings"] for result in results.values()))


if __name__ == "__main__":
    main()
