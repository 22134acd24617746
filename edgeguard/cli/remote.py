"""What commands that attack an engine on a server share: its URL, its twin, and how it is asked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeguard.artifact import Artifact
from edgeguard.errors import InputError
from edgeguard.secrets import read_token
from edgeguard.targets.asking import RemoteOptions
from edgeguard.targets.remote import read_remote
from edgeguard.verify import Remote

TOKEN_VARIABLE = "EDGEGUARD_TOKEN"
GRPC_LOG = "GRPC_VERBOSITY"
"""gRPC writes lines of its own to stderr, about what its errors say as well, unless this variable tells it not to."""

TwinOption = Annotated[Path | None, typer.Option(help="Of a remote engine: the artifact whose twin gives gradients.")]
TokenOption = Annotated[Path | None, typer.Option(help="Of a remote engine: file with the secret that it asks for.")]
AuthorityOption = Annotated[Path | None, typer.Option(help="Of a remote engine: certificates to trust (PEM).")]
TimeoutOption = Annotated[float | None, typer.Option(help="Of a remote engine: seconds for one request. [default: 60]")]
PatienceOption = Annotated[
    float | None, typer.Option(help="Of a remote engine: seconds to try again when it is lost. [default: 30]")
]
InFlightOption = Annotated[int | None, typer.Option(help="Of a remote engine: requests at the same time. [default: 4]")]
RateOption = Annotated[float | None, typer.Option(help="Of a remote engine: images a second at most.")]
PixelMaxOption = Annotated[
    float | None, typer.Option(help="Of a remote engine that takes FP32: what white is, 1 or 255. [default: 255]")
]


def is_url(target: str) -> bool:
    return "://" in target


def remote_target(url: str, twin: Path | None, token_file: Path | None, **settings: Any) -> Remote:
    """Ask a server for its model. settings: fields of `RemoteOptions`; None leaves the default.

    Raises:
        InputError: options out of range, another URL, or a file that cannot be read. ArtifactError: the twin is no artifact.
        EngineError: as `read_remote`.
    """
    token = read_token(token_file) if token_file is not None else os.environ.get(TOKEN_VARIABLE) or None
    os.environ.setdefault(GRPC_LOG, "NONE")
    options = RemoteOptions(token=token, **{key: value for key, value in settings.items() if value is not None})
    artifact = Artifact.load(twin) if twin is not None else None
    return Remote(read_remote(url, options), artifact, options)


def refuse_remote_options(**given: Any) -> None:
    """Raises InputError where an option for remote engines was given with a folder."""
    named = [name for name, value in given.items() if value is not None]
    if named:
        raise InputError(f"--{named[0].replace('_', '-')} is for a remote engine, http(s):// or grpc(s)://HOST:PORT/v2/models/NAME")
