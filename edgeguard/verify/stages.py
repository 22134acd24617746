"""What a verification has finished, on disk, so that an interrupted one goes on where it stopped.

A stage's file is named by a hash of everything that it depends on, so a stage of other data, another artifact or other
options is never taken for it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard import files, folders
from edgeguard.attacks.api import Found
from edgeguard.verify.harness import Judged

MAX_BYTES = 4 << 30
Arrays = Mapping[str, NDArray[Any]]


class Store:
    """Finished stages below a folder.

    folder: created when the first stage is saved; None keeps nothing. fingerprint: what all stages depend on, JSON.
    """

    def __init__(self, folder: Path | None, fingerprint: object) -> None:
        self._folder = folder
        self._base = json.dumps(fingerprint, sort_keys=True, default=str)

    def path(self, stage: object) -> Path | None:
        """The file of a stage; stage: JSON."""
        if self._folder is None:
            return None
        key = hashlib.sha256(f"{self._base}\n{json.dumps(stage, sort_keys=True)}".encode()).hexdigest()
        return self._folder / f"{key[:32]}.npz"

    def load(self, stage: object) -> dict[str, NDArray[Any]] | None:
        """What was saved, or None.

        Raises:
            InputError: the file is not readable.
        """
        path = self.path(stage)
        return files.read_npz(path, MAX_BYTES) if path is not None and path.is_file() else None

    def save(self, stage: object, arrays: Arrays) -> None:
        path = self.path(stage)
        if path is None:
            return
        folders.make_folder(path.parent)
        files.write_npz(path, arrays)

    def drop(self, stage: object) -> None:
        path = self.path(stage)
        if path is not None:
            path.unlink(missing_ok=True)

    def checkpoint(self, stage: object) -> StageCheckpoint:
        """Where the attack of a stage keeps what it has not finished."""
        return StageCheckpoint(self, [stage, "unfinished"])

    def found(self, stage: object, compute: Callable[[StageCheckpoint], Found]) -> tuple[Found, float]:
        """What an attack proposed and the seconds it took, from disk or computed now."""
        arrays = self.load(stage)
        if arrays is None:
            begin = time.perf_counter()
            checkpoint = self.checkpoint(stage)
            made = compute(checkpoint)
            optional = {} if made.positions is None else {"positions": made.positions}
            counts = {"queries": np.int64(made.queries), "gradients": np.int64(made.gradients)}
            if made.last_restart is not None:
                counts["last_restart"] = np.int64(made.last_restart)
            seconds = np.float64(time.perf_counter() - begin)
            arrays = {"pixels": made.pixels, "mask": made.mask, **optional, **counts, "seconds": seconds}
            self.save(stage, arrays)
            checkpoint.drop()
        found = Found(
            arrays["pixels"], arrays["mask"], arrays.get("positions"), int(arrays["queries"]), int(arrays["gradients"]),
            int(arrays["last_restart"]) if "last_restart" in arrays else None,
        )  # fmt: skip
        return found, float(arrays["seconds"])

    def judged(self, stage: object, compute: Callable[[], Judged]) -> tuple[Judged, float]:
        """A verdict and the seconds it took, from disk or computed now."""
        arrays = self.load(stage)
        if arrays is None:
            begin = time.perf_counter()
            made = compute()
            arrays = {
                "eligible": made.eligible, "fooled": made.fooled, "robust": made.robust, "logits": made.logits,
                "positions": made.positions, "places": np.int64(made.places),
                "seconds": np.float64(time.perf_counter() - begin),
            }  # fmt: skip
            self.save(stage, arrays)
        seconds = float(arrays.pop("seconds"))
        places = int(arrays.pop("places"))
        return Judged(**arrays, places=places), seconds


class StageCheckpoint:
    """The state of an unfinished attack, as `edgeguard.attacks.api.Checkpoint`."""

    def __init__(self, store: Store, stage: object) -> None:
        self._store, self._stage = store, stage

    def load(self) -> Arrays | None:
        return self._store.load(self._stage)

    def save(self, state: Arrays) -> None:
        self._store.save(self._stage, state)

    def drop(self) -> None:
        self._store.drop(self._stage)
