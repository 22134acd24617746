"""The `edgeguard` program: its commands, and the one place where errors become a sentence and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import Annotated

import typer

import edgeguard
from edgeguard.cli import console
from edgeguard.cli.analyze import analyze
from edgeguard.cli.attack import attack
from edgeguard.cli.bench import bench
from edgeguard.cli.calibrate import calibrate
from edgeguard.cli.certify import certify
from edgeguard.cli.demo import demo
from edgeguard.cli.doctor import doctor
from edgeguard.cli.export import export
from edgeguard.cli.harden import harden
from edgeguard.cli.inspect import inspect
from edgeguard.cli.report import report
from edgeguard.cli.serve import serve
from edgeguard.cli.verify import verify
from edgeguard.errors import EdgeGuardError, InputError, printable

INTERRUPTED = 130
EXHAUSTED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What a system lacks, wherever it comes to light."""

app = typer.Typer(
    name="edgeguard",
    help="Harden quantized vision models against adversarial patches, export them in true integers, attack the engine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (harden, calibrate, export, inspect, verify, attack, report, certify, analyze, bench, serve, doctor, demo):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(edgeguard.__version__)
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    console.settings.debug = debug


def _of_the_system(error: OSError) -> str:
    """What the operating system refused, such as to look into a folder, and where.

    Raises:
        OSError: the error itself, where it is neither of a file nor of what a system lacks: it is a bug.
    """
    if error.filename is None and error.errno not in EXHAUSTED:
        raise error
    named = isinstance(error.filename, (str, bytes))
    where = os.fsdecode(error.filename) if named else "the system"
    return f"{where}: {error.strerror or error}"


def main() -> None:
    """Run the program. Exit codes: 0 fine, 1 the gate failed, 2 bad input, 3 a runtime, extra or device is missing."""
    try:
        app()
    except EdgeGuardError as exc:
        if console.settings.debug:
            traceback.print_exc()
        console.log(f"edgeguard: {exc}")
        sys.exit(exc.exit_code)
    except OSError as exc:
        sentence = printable(_of_the_system(exc))
        if console.settings.debug:
            traceback.print_exc()
        console.log(f"edgeguard: {sentence}")
        sys.exit(InputError.exit_code)
    except KeyboardInterrupt:
        console.log("edgeguard: interrupted")
        sys.exit(INTERRUPTED)
    finally:
        console.end_streams()
