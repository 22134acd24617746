"""What commands share: progress on stderr, results on stdout, output folders, `--config`, and the exact command."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from edgeguard import files, folders
from edgeguard.errors import InputError, MissingDependency, require
from edgeguard.report.html import render_html

REPORT_JSON, REPORT_HTML = "report.json", "report.html"
MAX_CONFIG = 1 << 20
"""Bytes of a file given to --config."""


@dataclass
class Settings:
    """Of the whole program; set by the root command."""

    debug: bool = False


settings = Settings()


class RateColumn(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "", style="progress.data.speed")


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Bars with rate and remaining time on stderr; nothing at all where stderr is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        yield progress


def log(message: str) -> None:
    """One line for a person, on stderr. Where it cannot be written, the work goes on without."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def emit(document: Any, text: str, as_json: bool) -> None:
    """The result, on stdout: a JSON document alone, or text.

    Raises:
        InputError: the file that stdout is sent to cannot be written. BrokenPipeError: its reader has gone.
    """
    try:
        print(files.to_json(document).rstrip("\n") if as_json else text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise InputError(f"cannot write the standard output: {exc.strerror or exc}") from exc


def end_streams() -> None:
    """Give up what cannot be written of stdout and stderr, over which the interpreter would stumble at its end."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:  # the process was started without it
            continue
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def command_line() -> str:
    """The command as it was typed, for the records."""
    return shlex.join(["edgeguard", *sys.argv[1:]])


def output_folder(out: Path | None, name: str) -> Path:
    """The folder the user named, or the first free one of that name under runs/."""
    if out is not None:
        return out
    candidates = (Path("runs") / (name if number == 1 else f"{name}-{number}") for number in range(1, 1 << 20))
    return next(path for path in candidates if not path.exists())


def write_report(report: Mapping[str, Any], out: Path) -> Path:
    """Write `report.json` and the page rendered from it into a new folder.

    Returns: the page; on a device without the extra that draws its charts, which is said, the JSON.
    """
    with folders.folder_transaction(out) as folder:
        name = fill_report(report, folder, out)
    return out / name


def fill_report(report: Mapping[str, Any], folder: Path, known_as: Path) -> str:
    """The same into a folder that is there, known as another to the user. Returns: the name of the file to look at."""
    files.write_json(folder / REPORT_JSON, report)
    try:
        files.write_bytes(folder / REPORT_HTML, render_html(report).encode())
    except MissingDependency as exc:
        log(f"{REPORT_HTML} is not drawn: {exc}; then, here or elsewhere: edgeguard report {known_as / REPORT_JSON}")
        return REPORT_JSON
    return REPORT_HTML


def limit_threads(threads: int) -> None:
    """Let PyTorch use so many CPU threads; 0 leaves the choice to it."""
    if threads < 0:
        raise InputError(f"--threads must be 0 or more, got {threads}")
    if threads:
        require("torch", "train").set_num_threads(threads)


def integers(text: str, option: str) -> tuple[int, ...]:
    """A comma-separated list of whole numbers.

    Raises:
        InputError: an empty or other entry.
    """
    try:
        return tuple(int(entry) for entry in text.split(","))
    except ValueError as exc:
        raise InputError(f"{option} {text!r} is not a comma-separated list of whole numbers") from exc


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take options from a TOML file as defaults; the command line wins.

    Raises:
        InputError: unreadable, not TOML, or with a key that is no option of the command.
    """
    if path is None:
        return None
    values = files.read_toml(path, MAX_CONFIG)
    options = {parameter.name for parameter in context.command.params if parameter.param_type_name == "option"}
    given = {key.replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(given.keys() - options)
    if unknown:
        raise InputError(f"{path}: {unknown[0]!r} is not an option of `edgeguard {context.info_name}`")
    context.default_map = {**(context.default_map or {}), **given}
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", callback=_read_config, is_eager=True, help="Take options from a TOML file."),
]
ModelOption = Annotated[str, typer.Option(help="resnet20, resnet56, ..., torchvision/NAME or package.module:factory.")]
TrustCodeOption = Annotated[
    bool, typer.Option("--trust-code", help="Import and run the package.module:factory that a run names as its model.")
]
WeightsOption = Annotated[Path | None, typer.Option(help="Float weights: safetensors or a state dict.")]
DataOption = Annotated[str, typer.Option(help="digits, cifar10[:DIR], imagefolder:DIR or npz:FILE.")]
TargetOption = Annotated[str, typer.Option(help="What it is for: ort, ort-avx2, openvino, trt, ... or FILE.toml.")]
SeedOption = Annotated[int, typer.Option(help="Of everything random.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
ThreadsOption = Annotated[int, typer.Option(help="CPU threads; 0: PyTorch's choice.")]
ImageSizeOption = Annotated[int | None, typer.Option(help="Resize digits and image folders to this side.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
OutOption = Annotated[Path | None, typer.Option(help="New folder for the result; without it one under runs/.")]
