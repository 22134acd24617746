"""What commands that attack an engine on a server share: its URL, its twin, and how it is asked."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from edgeguard.artifact import Artifact
from edgeguard.errors import InputError
from edgeguard.pool_artifact import Pool
from edgeguard.secrets import read_token
from edgeguard.targets.asking import RemoteOptions
from edgeguard.targets.remote import read_remote
from edgeguard.verify import Remote

TOKEN_VARIABLE = "EDGEGUARD_TOKEN"
GRPC_LOG = "GRPC_VERBOSITY"
"""gRPC writes lines of its own to stderr, about what its errors say as well, unless this variable tells it not to."""

Folder = TypeVar("Folder")
TargetArgument = Annotated[
    str, typer.Argument(help="The folder that `edgeguard export` wrote, or http(s):// or grpc(s)://HOST:PORT/v2/models/NAME.")
]
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


def opened(
    named: str, load: Callable[[str], Folder], twin: Path | None, token_file: Path | None, tls_ca: Path | None, **settings: Any
) -> Folder | Remote:  # fmt: skip
    """What a command attacks: a model on a server, or what `load` makes of a folder.

    settings: fields of `RemoteOptions`; None leaves the default.

    Raises:
        InputError: an option for remote engines was given with a folder. Otherwise as `remote_target` and `load`.
    """
    if is_url(named):
        return remote_target(named, twin, token_file, authority=tls_ca, **settings)
    refuse_remote_options(twin=twin, token_file=token_file, tls_ca=tls_ca, **settings)
    return load(named)


def name_of(source: Artifact | Pool | Remote) -> str:
    """What output folders are named by."""
    return source.model.address.model if isinstance(source, Remote) else source.path.resolve().name


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
