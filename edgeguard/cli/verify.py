"""`edgeguard verify`."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress, TaskID

from edgeguard import folders
from edgeguard.cli.console import (
    ConfigOption,
    JsonOption,
    OutOption,
    emit,
    fill_report,
    integers,
    log,
    output_folder,
    progress_bars,
    write_report,
)
from edgeguard.cli.judged_data import data_of
from edgeguard.cli.remote import (
    AuthorityOption,
    InFlightOption,
    PatienceOption,
    PixelMaxOption,
    RateOption,
    TimeoutOption,
    TokenOption,
    TwinOption,
    is_url,
    name_of,
    opened,
)
from edgeguard.errors import EdgeGuardError, EngineError, require
from edgeguard.pool_artifact import Pool, load_model
from edgeguard.report.read import read_report
from edgeguard.report.summary import format_summary
from edgeguard.verify import Gate, Remote, VerifyOptions, accesses_of, allowed_attacks, verify_pool, without_gradients
from edgeguard.verify import budget as budget_options
from edgeguard.verify import verify as verify_target
from edgeguard.verify.bundle import Bundle
from edgeguard.verify.catalog import entry
from edgeguard.verify.deployed import check_target

GATE_FAILED = 1
UNFINISHED = ".unfinished"


def verify(
    artifact: Annotated[
        str, typer.Argument(help="An artifact or a pool that `edgeguard export` wrote, or http(s):// or grpc(s)://HOST:PORT/v2/models/NAME.")
    ],
    data: Annotated[str | None, typer.Option(help="Labelled images; by default what the model was trained on.")] = None,
    budget: Annotated[str, typer.Option(help="quick, standard or exhaustive.")] = "standard",
    attack: Annotated[
        str | None, typer.Option(help="a-qapa, a-qapa-per-image, gap, lavan, patch-rs, patch-rs-per-image; comma-separated.")
    ] = None,
    access: Annotated[
        str | None, typer.Option(help="replay, transfer, engine, query; comma-separated. By default all that apply.")
    ] = None,
    patch_size: Annotated[str, typer.Option(help="Sides in pixels, comma-separated.")] = "6",
    placement: Annotated[
        str | None, typer.Option(help="Of universal patches: random, worst; comma-separated.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Of the grid of worst placements, in pixels; 1 is exact.")] = None,
    steps: Annotated[int | None, typer.Option(help="Gradient steps to craft a universal patch.")] = None,
    restarts: Annotated[int | None, typer.Option(help="Fresh starts of each patch; the best is judged.")] = None,
    loss: Annotated[str | None, typer.Option(help="The attack's loss.")] = None,
    target: Annotated[int | None, typer.Option(help="Class to push every image to; none: away from its own.")] = None,
    queries: Annotated[int | None, typer.Option(help="Images shown to the engine for each image's own patch.")] = None,
    universal_queries: Annotated[
        int | None, typer.Option(help="Images shown to the engine for a universal patch.")
    ] = None,
    decision_only: Annotated[
        bool, typer.Option("--decision-only", help="Query attacks see labels instead of logits.")
    ] = False,
    patch: Annotated[
        list[Path] | None, typer.Option(help="Patch file (npz, or png with alpha) to replay; may be repeated.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Folder that `edgeguard attack` wrote: replay its patches on its images.")
    ] = None,
    surrogate: Annotated[list[Path] | None, typer.Option(help="Artifact to craft on as well; may be repeated.")] = None,
    limit: Annotated[int | None, typer.Option(help="Images to judge at most; 0: all.")] = None,
    per_image_limit: Annotated[
        int | None, typer.Option(help="How many of them get patches of their own at most.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random. [default: 0, or the bundle's]")] = None,
    batch_size: Annotated[int, typer.Option(help="The batch the engine is deployed with.")] = 50,
    runtime: Annotated[str | None, typer.Option(help="ort, reference or twin; the artifact's own by default.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of the runtime; 0: its choice.")] = 0,
    gate: Annotated[Path | None, typer.Option(help="TOML file of rules; a broken one gives exit code 1.")] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="An earlier report.json; falling behind it gives exit code 1.")
    ] = None,
    twin: TwinOption = None,
    token_file: TokenOption = None,
    tls_ca: AuthorityOption = None,
    timeout: TimeoutOption = None,
    patience: PatienceOption = None,
    in_flight: InFlightOption = None,
    rate: RateOption = None,
    pixel_max: PixelMaxOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Attack the deployed engine with adversarial patches and report how robust it is.

    Finished stages are kept beside the output folder until the report is written: after an interruption the same
    command goes on from there.
    """
    given = {
        "attacks": _names(attack), "placements": _names(placement), "stride": stride, "steps": steps,
        "restarts": restarts, "loss": loss, "target": target, "queries": queries, "per_image_limit": per_image_limit,
        "universal_queries": universal_queries,
    }  # fmt: skip
    chosen = {**budget_options(budget), **{key: value for key, value in given.items() if value is not None}}
    if limit is not None:
        chosen["limit"] = limit or None
    for name in chosen["attacks"]:
        entry(name)
    replay = tuple(patch or ())
    if bundle is not None:
        carried = Bundle.load(bundle)
        chosen["target"], seed = (
            given if given is not None else carried.document[key] for key, given in (("target", target), ("seed", seed))
        )
        chosen["limit"] = limit
    replays = bool(replay or bundle)
    accesses = _names(access) or (("replay",) if replays and attack is None else accesses_of(chosen["attacks"]))
    remote = {"timeout": timeout, "patience": patience, "in_flight": in_flight, "rate": rate, "pixel_max": pixel_max}
    skipped: list[dict[str, str]] = []
    if is_url(artifact) and twin is None and attack is None and access is None and not replays:
        chosen["attacks"], skipped = without_gradients(chosen["attacks"])
        accesses = accesses_of(chosen["attacks"])
    if attack is None:  # of the budget's attacks, those that the given accesses allow
        chosen["attacks"] = allowed_attacks(chosen["attacks"], accesses) or chosen["attacks"]
    options = VerifyOptions(
        **chosen, accesses=accesses, patch_sizes=integers(patch_size, "--patch-size"), decision_only=decision_only,
        seed=seed or 0, batch_size=batch_size, replay=replay, bundle=bundle, surrogates=tuple(surrogate or ()), runtime=runtime,
        threads=threads,
    )  # fmt: skip
    rules = Gate.load(gate) if gate is not None else None
    earlier = read_report(baseline) if baseline is not None else None
    source = opened(artifact, load_model, twin, token_file, tls_ca, **remote)
    if isinstance(source, Remote):
        check_target(source, options)
    folder = folders.new_folder(output_folder(out, f"{name_of(source)}-verify"))
    if options.differentiates:
        require("torch", "train")
    judged, crafted = data_of(source, data, options.universal)
    with _unfinished(folder) as unfinished, progress_bars() as progress:
        further: dict[str, Any] = {
            "craft_data": crafted, "gate": rules, "baseline": earlier, "progress": Stages(progress), "announce": log,
            "command": ["edgeguard", *sys.argv[1:]], "stages": unfinished,
        }  # fmt: skip
        if isinstance(source, Pool):
            report = verify_pool(source, judged, options, **further)
        else:
            report = verify_target(source, judged, options, skipped=skipped, **further)
        complete = report["status"]["complete"]
        page = write_report(report, folder) if complete else unfinished / fill_report(report, unfinished, unfinished)
        if complete:
            shutil.rmtree(unfinished, ignore_errors=True)
    emit(report, f"{format_summary(report)}\nreport: {page}", as_json)
    if not complete:
        log(f"{report['status']['reason']}; what was found until then is in {page}, and the same command goes on from there")
        raise typer.Exit(EngineError.exit_code)
    if report["gate"] is not None and not report["gate"]["passed"]:
        broken = [rule for rule in report["gate"]["rules"] if not rule["passed"]]
        log(f"gate failed: {'; '.join(str(rule['rule']) + ': ' + str(rule['detail']) for rule in broken)}")
        raise typer.Exit(GATE_FAILED)


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """Where a verification that will be `folder` keeps what is finished; no other process can have it meanwhile."""
    unfinished = folder.with_name(folder.name + UNFINISHED)
    with folders.held(unfinished):
        try:
            folders.new_folder(folder)  # its holder may have ended in this moment
            if any(unfinished.iterdir()):
                log(f"going on with what is finished in {unfinished}")
            yield unfinished
        except (EdgeGuardError, KeyboardInterrupt):
            if any(unfinished.iterdir()):
                log(f"what is finished is kept in {unfinished}, and the same command goes on from there")
            raise
        finally:
            with contextlib.suppress(OSError):
                unfinished.rmdir()


def _names(text: str | None) -> tuple[str, ...] | None:
    return tuple(text.split(",")) if text is not None else None


class Stages:
    """One bar for each stage of a verification."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, note="")
        self._progress.update(self._tasks[stage], completed=done, total=total)
