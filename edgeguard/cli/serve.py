"""`edgeguard serve`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeguard import files
from edgeguard.artifact import GRAPH, MANIFEST
from edgeguard.cli.console import ConfigOption, JsonOption, emit, log
from edgeguard.errors import EngineError
from edgeguard.pool_artifact import Pool, load_model
from edgeguard.secrets import read_token
from edgeguard.targets import open_engine

MEBIBYTE = 1 << 20


def serve(
    artifact: Annotated[Path, typer.Argument(help="The folder that `edgeguard export` wrote: an artifact or a pool.")],
    name: Annotated[str | None, typer.Option(help="Of the model in URLs; by default the folder's.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond this machine only with a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: a free one.")] = 8000,
    token_file: Annotated[Path | None, typer.Option(help="File with the secret that clients must show.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate (PEM), with --tls-key: HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Key of the certificate (PEM, without a password).")] = None,
    runtime: Annotated[
        str | None, typer.Option(help="ort, openvino, trt, reference or twin; its own by default.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of the runtime; 0: its choice.")] = 0,
    max_batch: Annotated[int, typer.Option(help="Images of one request, and of requests answered together.")] = 64,
    max_waiting: Annotated[int, typer.Option(help="Requests that wait for the engine; more are told to come back.")] = 256,
    max_body: Annotated[int, typer.Option(help="MiB of one request's body.")] = 64,
    max_connections: Annotated[int, typer.Option(help="Clients at a time.")] = 512,
    timeout: Annotated[float, typer.Option(help="Seconds for a body to arrive, and again for its answer.")] = 30.0,
    idle: Annotated[float, typer.Option(help="Seconds that a connection may rest.")] = 60.0,
    quiet: Annotated[bool, typer.Option("--quiet", help="Log errors alone.")] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Serve an exported model to other programs over HTTP, by the Open Inference Protocol.

    Prints the model's URL when it listens, and runs until it is interrupted or terminated; then what has arrived is answered.
    """
    from edgeguard.serve import Model, ServeOptions, listen, run

    options = ServeOptions(
        host, port, read_token(token_file) if token_file is not None else None, tls_cert, tls_key, max_batch, max_waiting,
        max_body * MEBIBYTE, max_connections, timeout, idle, quiet,
    )  # fmt: skip
    options.tls()
    source = load_model(artifact)
    if options.token is not None and not options.local and tls_cert is None:
        log("warning: without --tls-cert, token and images travel unencrypted")
    with open_engine(source, runtime, threads) as engine:
        model = Model.of(name if name is not None else source.path.resolve().name, engine, options, _claims(source))
        listening, root = listen(options)
        url = f"{root}/v2/models/{model.name}"
        emit({"schema": "edgeguard.serve/1", "url": url, "model": model.name, "pid": os.getpid()}, url, as_json)
        sys.stdout.flush()
        if not run(engine, model, options, listening):
            log(f"edgeguard: {artifact}: the engine did not end its last call; leaving it")
            sys.stderr.flush()
            os._exit(EngineError.exit_code)  # closing an engine that is still at work could crash, and waiting for it hang


def _claims(source: Any) -> dict[str, Any]:
    """What identifies the model, for clients that hold it against a twin."""
    if isinstance(source, Pool):
        return {"target": source.target, "width": ", ".join(source.widths), "artifact_sha256": source.sha256}
    return {"target": source.target, "width": source.width, "artifact_sha256": files.sha256(source.path / MANIFEST),
            "graph_sha256": source.manifest["files"][GRAPH]}  # fmt: skip
