"""What a verification attacks: an artifact in a local runtime, or a model on a server, with or without its artifact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgeguard import files
from edgeguard.artifact import MANIFEST, Artifact
from edgeguard.errors import InputError
from edgeguard.targets import Engine, open_engine
from edgeguard.targets.asking import RemoteOptions
from edgeguard.targets.remote import RemoteEngine, RemoteModel
from edgeguard.verify import document
from edgeguard.verify.options import ATTACKS, GRADIENT_ATTACKS, QUERY_ATTACKS, VerifyOptions

NO_TWIN = "it needs gradients, and there is no twin of the remote engine to take them from; name its artifact with --twin"


@dataclass(frozen=True)
class Remote:
    """A model on a server.

    twin: the artifact whose twin gives gradients and is compared with the engine; None where there is none. How like the engine
    it is, is measured: `clean` and `survival` of the report say it.
    """

    model: RemoteModel
    twin: Artifact | None = None
    options: RemoteOptions = RemoteOptions()  # noqa: RUF009  (frozen)

    @property
    def is_twins_artifact(self) -> bool:
        """Whether the server says that it executes the very artifact of the twin."""
        if self.twin is None:
            return False
        return self.model.claims.get("artifact_sha256") == files.sha256(self.twin.path / MANIFEST)


Target = Artifact | Remote


def artifact_of(target: Target) -> Artifact | None:
    """Where gradients come from."""
    return target.twin if isinstance(target, Remote) else target


def shape_of(target: Target, images: tuple[int, int, int]) -> tuple[int, int, int]:
    """(3, H, W) that the engine takes. images: of the data, for a server that takes any size."""
    if isinstance(target, Remote):
        if target.twin is None:
            return target.model.input_shape or images
        target = target.twin
    channels, height, width = target.manifest["input_shape"]
    return channels, height, width


def width_of(target: Target) -> str:
    """The bit-width that reports name; of a server's model without a twin what the server says, if it says anything."""
    if isinstance(target, Remote):
        if target.twin is None:
            return str(target.model.claims.get("width", "unknown"))
        target = target.twin
    return target.width


def open_target(target: Target, shape: tuple[int, int, int], runtime: str | None = None, threads: int = 0) -> Engine:
    """The engine that is attacked; raises as `open_engine`, `RemoteEngine` and `check_runtime`."""
    check_runtime(target, runtime, threads)
    if isinstance(target, Remote):
        return RemoteEngine(target.model, target.options, shape)
    return open_engine(target, runtime, threads)


def check_runtime(target: Target, runtime: str | None, threads: int) -> None:
    """Raises InputError where a remote engine is told how to run."""
    if isinstance(target, Remote) and (runtime is not None or threads):
        raise InputError("a remote engine has a runtime and threads of its own; leave --runtime and --threads out")


def fingerprint(target: Target) -> list[Any]:
    """What tells one target from another: hashes, and what a server says of its model."""
    artifact = artifact_of(target)
    hashes: list[Any] = [] if artifact is None else [files.sha256(artifact.path / MANIFEST)]
    return [*hashes, target.model.identity()] if isinstance(target, Remote) else hashes


def target_block(target: Target) -> dict[str, Any]:
    """What was attacked, as the report's `artifact`.

    With a twin it is the twin's artifact, and how many of its multiply-accumulates are integer counts for the engine only where
    the server says that it executes that very artifact. Without one, little is known.
    """
    if not isinstance(target, Remote):
        return document.artifact_block(target)
    model = target.model
    remote = {**model.identity(), "twin": target.twin is not None, "claims_twins_artifact": target.is_twins_artifact}
    if target.twin is not None:
        block = document.artifact_block(target.twin)
        coverage = block["integer_mac_coverage"] if target.is_twins_artifact else None
        return {**block, "integer_mac_coverage": coverage, "remote": remote}
    sha256 = model.claims.get("artifact_sha256")
    return {
        "name": model.address.model, "target": "remote", "width": width_of(target), "weight_bits": 0, "activation_bits": 0,
        "num_classes": max(model.logits.shape[1], 0), "input_shape": list(model.pixels.shape[1:]), "source": {}, "files": {},
        "integer_mac_coverage": None, "sha256": sha256 if isinstance(sha256, str) else "unknown", "remote": remote,
    }  # fmt: skip


def without_gradients(attacks: tuple[str, ...]) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    """Of a budget's attacks those that a remote engine without a twin allows, and the others with the reason.

    Where none is left, the universal search through queries takes their place.
    """
    kept = tuple(name for name in attacks if name in QUERY_ATTACKS) or QUERY_ATTACKS[:1]
    return kept, [{"attack": name, "reason": NO_TWIN} for name in attacks if name in GRADIENT_ATTACKS]


def check_target(target: Target, options: VerifyOptions) -> None:
    """Raises InputError for options that a remote engine cannot serve."""
    if not isinstance(target, Remote):
        return
    check_runtime(target, options.runtime, options.threads)
    if target.twin is None and options.surrogates:
        raise InputError("surrogates are for patches made with gradients; name one of them with --twin")
    if target.twin is None and options.differentiates:
        named = [name for name in options.attacks if name in GRADIENT_ATTACKS] or list(ATTACKS)
        raise InputError(f"{named[0]}: {NO_TWIN}, or ask for {' or '.join(QUERY_ATTACKS)} with access query")
