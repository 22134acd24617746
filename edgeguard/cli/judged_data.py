"""Which labelled images a command judges an artifact on: what `verify`, `attack` and `certify` share."""

from __future__ import annotations

from edgeguard.artifact import Artifact
from edgeguard.data import Dataset, has_splits, load_dataset, load_splits
from edgeguard.errors import InputError
from edgeguard.pool_artifact import Pool
from edgeguard.verify import Remote


def data_of(source: Artifact | Pool | Remote, spec: str | None, crafts: bool) -> tuple[Dataset, Dataset | None]:
    """As `judged_data`, for whatever is judged."""
    if isinstance(source, Pool):
        return judged_data(source.artifacts[0], spec, crafts)
    if isinstance(source, Remote):
        return judged_data(source.twin, spec, crafts, source.model.input_shape)
    return judged_data(source, spec, crafts)


def judged_data(
    artifact: Artifact | None, spec: str | None, crafts: bool, shape: tuple[int, int, int] | None = None
) -> tuple[Dataset, Dataset | None]:
    """Images to judge, and other images to craft on where there are any and `crafts` says that they are needed.

    Without `spec`, the test images of what the model was trained on, split as its training split it.
    artifact: None for a remote engine without a twin; shape: of the images that it takes, where that is known.

    Raises:
        InputError: no spec, and an artifact that does not say what it was trained on; or data that cannot be read.
    """
    if artifact is None:
        return _of_shape(spec, crafts, shape)
    source = artifact.manifest["source"]
    trained_on = source.get("data", {}).get("spec")
    wanted = spec or trained_on
    if not isinstance(wanted, str):
        raise InputError(f"{artifact.path} does not say what it was trained on; name labelled images with --data")
    size = artifact.manifest["input_shape"][1] if wanted.startswith(("digits", "imagefolder")) else None
    if spec is None or has_splits(wanted):
        train, test = load_splits(wanted, size, seed=source.get("seed", 0))
        return test, train if crafts else None
    return load_dataset(wanted, "test", size), None


def _of_shape(spec: str | None, crafts: bool, shape: tuple[int, int, int] | None) -> tuple[Dataset, Dataset | None]:
    """The same for a model of which little but the shape of its images is known."""
    if spec is None:
        raise InputError("nobody says what the remote model was trained on; name labelled images with --data")
    size = shape[1] if shape is not None and spec.startswith(("digits", "imagefolder")) else None
    if has_splits(spec):
        train, test = load_splits(spec, size, seed=0)
        return test, train if crafts else None
    return load_dataset(spec, "test", size), None
