"""`edgeguard demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgeguard import folders
from edgeguard.cli.console import JsonOption, OutOption, emit, log, output_folder, progress_bars, write_report
from edgeguard.errors import require

BITS = ("8", "4", "2")
MODEL, DATA = "resnet8", "digits"


def demo(
    out: OutOption = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """The whole path on embedded data in a few minutes: harden, export at 8, 4 and 2 bits, verify, report."""
    for module in ("torch", "brevitas", "onnx"):
        require(module, "train")
    folder = output_folder(out, "demo")
    folders.new_folder(folder)
    reports = _run(folder, seed)
    rows = [f"{'bits':>5} {'accuracy':>9} {'ASR':>7}  95 % interval    integer MACs  twin identical"]
    for bits, report in reports.items():
        strongest = max(report["attacks"], key=lambda row: float(row["asr"]))
        low, high = strongest["ci95"]
        rows.append(
            f"{bits:>5} {report['clean']['engine']['accuracy']:9.1%} {strongest['asr']:7.1%}  "
            f"[{low:6.1%}, {high:6.1%}]  {report['artifact']['integer_mac_coverage']:12.0%}  "
            f"{'yes' if report['clean']['bit_identical'] else 'no'}"
        )
    text = "\n".join([
        *rows,
        "ASR: P[engine(x_adv) != y | engine(x) = y], the highest of the attacks tried, on the ONNX Runtime engine.",
        f"reports: {', '.join(str(folder / f'verify-{bits}' / 'report.html') for bits in reports)}",
        "your own model: edgeguard harden --model package.module:factory --weights FILE --data imagefolder:DIR",
        "then: edgeguard export RUN --target ort --bits 4, and edgeguard verify ARTIFACT",
    ])  # fmt: skip
    emit({"schema": "edgeguard.demo/1", "folder": str(folder), "reports": reports}, text, as_json)


def _run(folder: Path, seed: int) -> dict[str, Any]:
    from edgeguard.cli.harden import Progressing
    from edgeguard.cli.pipeline import export_run
    from edgeguard.cli.verify import Stages
    from edgeguard.data import load_dataset
    from edgeguard.defences.config import HardenConfig, preset
    from edgeguard.defences.harden import harden
    from edgeguard.defences.job import HardenJob
    from edgeguard.defences.parts import PerImagePatches, UniversalPatches
    from edgeguard.quant.width import parse_widths
    from edgeguard.verify import VerifyOptions, verify

    config = HardenConfig("qadt-r", parse_widths(",".join(BITS)), epochs=4, batch_size=64, flip=False, seed=seed,
                          universal=UniversalPatches(sizes=(5, 6)), per_image=PerImagePatches(sizes=(5, 6)))  # fmt: skip
    job = HardenJob(MODEL, DATA, preset(config), pretrain_epochs=6, eval_limit=360)
    train, test = load_dataset(DATA, "train"), load_dataset(DATA, "test")
    options = VerifyOptions(accesses=("engine",), patch_sizes=(6,), placements=("random", "worst"), stride=8, steps=60,
                            limit=150, seed=seed)  # fmt: skip
    reports: dict[str, Any] = {}
    with progress_bars() as progress:
        run = harden(job, folder / "run", Progressing(progress), "edgeguard demo")
        for bits in BITS:
            log(f"{bits} bits: exporting and attacking the engine")
            artifact = export_run(run, bits, "ort", folder / f"artifact-{bits}")
            report = verify(artifact, test, options, craft_data=train, progress=Stages(progress),
                            command=["edgeguard", "demo"])  # fmt: skip
            write_report(report, folder / f"verify-{bits}")
            reports[bits] = report
    return reports
