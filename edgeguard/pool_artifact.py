"""A pool: a folder of artifacts of one model at several widths, and `pool.json`, which says how one of them is drawn.

Random-precision inference answers every batch with one member, drawn anew. Source: Fu et al. 2021, "Double-Win Quant",
ICML, section on random precision inference; the folder is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeguard import files
from edgeguard.artifact import MANIFEST, MAX_NAME, POOL, Artifact
from edgeguard.errors import ArtifactError, InputError
from edgeguard.inspection import format_inspection, inspect_artifact

SCHEMA, INSPECT_SCHEMA = "edgeguard.pool/1", "edgeguard.inspect-pool/1"
MAX_MEMBERS, MAX_BYTES, MAX_SEED = 64, 1 << 20, 2**63 - 1
TOLERANCE = 1e-6
"""By how much the probabilities in a file may miss 1 together."""
SHARED = ("target", "profile", "num_classes", "input_shape")
"""What all members' manifests must agree in."""
KEYS = {"folder": str, "probability": float, "manifest_sha256": str}


@dataclass(frozen=True)
class Member:
    """One artifact of a pool, and how likely it is drawn."""

    artifact: Artifact
    probability: float


@dataclass(frozen=True)
class Pool:
    """Artifacts of different widths that take the same images and know the same classes.

    seed: of the draw; None takes fresh entropy whenever the pool is opened. Probabilities are positive and sum to 1.
    """

    path: Path
    members: tuple[Member, ...]
    seed: int | None

    @staticmethod
    def is_pool(path: Path | str) -> bool:
        """Whether a folder says of itself that it is a pool."""
        return (Path(path) / POOL).is_file()

    @staticmethod
    def load(path: Path | str) -> Pool:
        """Open a pool's folder and all its members.

        Raises:
            ArtifactError: not a pool, of another schema, a member that is missing, altered or outside the folder, or
                members that do not belong together.
        """
        path = Path(path)
        file = path / POOL
        if not file.is_file() or file.is_symlink():
            raise ArtifactError(f"{path} is not a pool: it has no {POOL}; make one with `edgeguard export --pool`")
        try:
            document = files.read_json(file, MAX_BYTES)
        except InputError as exc:
            raise ArtifactError(str(exc)) from exc
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise ArtifactError(f"{file} is not of schema {SCHEMA!r}")
        entries = document.get("members")
        if not isinstance(entries, list) or not 2 <= len(entries) <= MAX_MEMBERS:
            raise ArtifactError(f"{file}: 'members' must be a list of 2 to {MAX_MEMBERS} members")
        chances = check_probabilities([_entry(file, entry)["probability"] for entry in entries], str(file))
        members = tuple(Member(_member(path, entry), chance) for entry, chance in zip(entries, chances, strict=True))
        _check_fit(path, [member.artifact for member in members])
        return Pool(path, members, check_seed(document.get("seed"), str(file)))

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        return tuple(member.artifact for member in self.members)

    @property
    def widths(self) -> tuple[str, ...]:
        """The members' widths as users write them."""
        return tuple(member.artifact.width for member in self.members)

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Of the members, in their order; they sum to 1."""
        return tuple(member.probability for member in self.members)

    @property
    def target(self) -> str:
        return self.members[0].artifact.target

    @property
    def sha256(self) -> str:
        """Of `pool.json`, which holds the members' own."""
        return files.sha256(self.path / POOL)


def load_model(path: Path | str) -> Artifact | Pool:
    """A folder that `export` wrote, with or without `--pool`.

    Raises:
        ArtifactError: as `Artifact.load` and `Pool.load`.
    """
    return Pool.load(path) if Pool.is_pool(path) else Artifact.load(path)


def write_pool(
    folder: Path, members: Sequence[str], probabilities: Sequence[float] | None = None, seed: int | None = None
) -> Pool:
    """Make a pool of artifacts that lie in a folder: write its `pool.json`, atomically.

    Args:
        members: names of the artifacts' folders. probabilities: theirs; None draws all alike.
        seed: of the draw; None takes fresh entropy whenever the pool is opened.

    Raises:
        InputError: fewer than two members, or probabilities or a seed that are none. ArtifactError: as `Pool.load`.
    """
    check_members(members)
    chances = [1 / len(members)] * len(members) if probabilities is None else list(probabilities)
    if len(chances) != len(members):
        raise InputError(f"a pool of {len(members)} members needs as many probabilities, got {len(chances)}")
    chances, seed = check_probabilities(chances, "the pool"), check_seed(seed, "the pool")
    artifacts = [Artifact.load(_inside(folder, name)) for name in members]
    _check_fit(folder, artifacts)
    entries = [
        {"folder": name, "probability": chance, "manifest_sha256": files.sha256(artifact.path / MANIFEST)}
        for name, chance, artifact in zip(members, chances, artifacts, strict=True)
    ]
    files.write_json(folder / POOL, {"schema": SCHEMA, "members": entries, "seed": seed})
    return Pool.load(folder)


def check_members(members: Sequence[str]) -> None:
    """Raises InputError for too few or too many members, or one that is named twice."""
    if not 2 <= len(members) <= MAX_MEMBERS:
        raise InputError(
            f"a pool draws from 2 to {MAX_MEMBERS} members, got {len(members)}: {', '.join(members) or 'none'}; "
            "name several widths, or export one without --pool"
        )
    if len(set(members)) != len(members):
        raise InputError(f"a pool names a member twice: {', '.join(members)}")


def check_probabilities(values: Sequence[Any], where: str) -> list[float]:
    """Positive numbers that sum to 1 within `TOLERANCE`, scaled to do so exactly.

    Raises:
        ArtifactError: they are not.
    """
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numbers or not all(0 < value <= 1 for value in values) or abs(math.fsum(values) - 1) > TOLERANCE:
        got = ", ".join(map(repr, values))
        raise ArtifactError(f"{where}: probabilities must be positive and sum to 1, got {got:.200}")
    total = math.fsum(values)
    return [float(value) / total for value in values]


def check_seed(value: Any, where: str) -> int | None:
    """Raises ArtifactError for what is neither None nor a whole number from 0 to 2**63 - 1."""
    if value is not None and (type(value) is not int or not 0 <= value <= MAX_SEED):
        raise ArtifactError(f"{where}: the seed must be null or a whole number of at least 0, got {value!r:.60}")
    return value if value is None else int(value)


def inspect_pool(pool: Pool) -> dict[str, Any]:
    """Describe a pool and each of its members: a JSON document of schema `edgeguard.inspect-pool/1`.

    integer_mac_coverage: the lowest of all members.

    Raises:
        ArtifactError: as `inspect_artifact`.
    """
    documents = [inspect_artifact(artifact.path) for artifact in pool.artifacts]
    return {
        "schema": INSPECT_SCHEMA, "target": pool.target, "widths": list(pool.widths),
        "probabilities": list(pool.probabilities), "seed": pool.seed,
        "integer_mac_coverage": min(document["integer_mac_coverage"] for document in documents),
        "file_bytes": sum(document["file_bytes"] for document in documents),
        "members": [
            {"width": width, "probability": chance, **document}
            for width, chance, document in zip(pool.widths, pool.probabilities, documents, strict=True)
        ],
    }  # fmt: skip


def format_pool(document: dict[str, Any]) -> str:
    """A pool's document for the terminal: how the members are drawn, and the table of each."""
    drawn = ", ".join(f"{member['width']} ({member['probability']:.1%})" for member in document["members"])
    source = "fresh entropy at each opening" if document["seed"] is None else f"seed {document['seed']}"
    heading = (
        f"pool for target {document['target']}: every batch is answered by one member, drawn from {drawn}; {source}"
    )
    tables = [f"Member {member['width']}:\n{format_inspection(member)}" for member in document["members"]]
    return "\n\n".join([f"{heading}; {document['file_bytes']:,} bytes in all", *tables])


def _entry(file: Path, entry: Any) -> dict[str, Any]:
    """A member's entry with the keys that it needs."""
    if not isinstance(entry, dict):
        raise ArtifactError(f"{file}: a member is not an object: {entry!r:.60}")
    for key, kind in KEYS.items():
        allowed = (int, float) if kind is float else (kind,)
        if type(entry.get(key)) not in allowed:
            raise ArtifactError(f"{file}: a member's {key!r} is missing or not a {kind.__name__}")
    return entry


def _inside(folder: Path, name: str) -> Path:
    """The folder of a member, which lies in the pool's own and nowhere else.

    Raises:
        ArtifactError: a path that leads elsewhere, or no folder.
    """
    path = folder / name if name.isprintable() else folder
    if not name.isprintable() or len(name.encode()) > MAX_NAME or name in ("", ".", "..") or set(name) & set("/\\:"):
        raise ArtifactError(f"{folder}: a member must be the plain name of a folder in it, got {name!r:.60}")
    if path.is_symlink() or not path.is_dir():
        raise ArtifactError(f"{folder}: the member {name!r} is missing or not a plain folder; export the pool again")
    return path


def _member(folder: Path, entry: dict[str, Any]) -> Artifact:
    path = _inside(folder, entry["folder"])
    if (path / MANIFEST).is_symlink():
        raise ArtifactError(f"{path}: {MANIFEST} is a link; a pool holds its members itself")
    artifact = Artifact.load(path)
    if files.sha256(path / MANIFEST) != entry["manifest_sha256"]:
        raise ArtifactError(f"{path} was changed after the pool was made: its manifest's SHA-256 is not the pool's")
    return artifact


def _check_fit(path: Path, artifacts: Sequence[Artifact]) -> None:
    first = artifacts[0]
    for other in artifacts[1:]:
        for key in SHARED:
            if other.manifest.get(key) != first.manifest.get(key):
                raise ArtifactError(
                    f"{path}: the members {first.width} and {other.width} differ in {key}: "
                    f"{first.manifest.get(key)!r:.80} and {other.manifest.get(key)!r:.80}; export them together"
                )
    widths = [artifact.width for artifact in artifacts]
    if len(set(widths)) != len(widths):
        raise ArtifactError(f"{path}: the members must be of different widths, got {', '.join(widths)}")
