"""`edgeguard bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgeguard.artifact import Artifact
from edgeguard.cli.console import ConfigOption, JsonOption, emit, integers, progress_bars
from edgeguard.errors import InputError, require


def bench(
    artifact: Annotated[Path, typer.Argument(help="The folder that `edgeguard export` wrote.")],
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,32",
    threads: Annotated[int, typer.Option(help="Threads of both runtimes; 0: their choice.")] = 1,
    rounds: Annotated[int, typer.Option(help="Turns of each model, of 5 timed calls.")] = 30,
    runtime: Annotated[str | None, typer.Option(help="ort, openvino, trt, reference or twin; its own by default.")] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Latency and throughput of an exported model against its float32 twin, in the same run."""
    require("onnx", "train")
    from edgeguard.export.bench import bench as measure

    batches = integers(batch, "--batch")
    if len(set(batches)) != len(batches):
        raise InputError(f"--batch {batch!r} names a size twice")
    loaded = Artifact.load(artifact)
    with progress_bars() as progress:
        task = progress.add_task("bench", total=rounds * len(batches), note="rounds")
        document = measure(loaded, batches, rounds, threads, runtime, lambda: progress.update(task, advance=1))
    emit(document, _table(document), as_json)


def _table(document: dict[str, Any]) -> str:
    lines = [f"{'model':>10} {'batch':>6} {'median ms':>10} {'p95 ms':>9} {'images/s':>10}  times over float32 (quartiles)"]
    for row in document["rows"]:
        latency, gain = row["latency_ms"], row["speedup"]
        lines.append(
            f"{row['model']:>10} {row['batch']:>6} {latency['median']:>10.3f} {latency['p95']:>9.3f} "
            f"{row['images_per_second']:>10,.0f}  {gain['median']:.2f} ({gain['quartiles'][0]:.2f} to {gain['quartiles'][1]:.2f})"
        )
    threads = document["threads"] or "the runtime's choice of"
    lines.append(f"{document['width']} bits, {threads} threads, {document['rounds']} rounds of {document['calls_per_round']} "
                 "calls; the models take turns; float32 is the same architecture in ONNX Runtime")  # fmt: skip
    return "\n".join(lines)
