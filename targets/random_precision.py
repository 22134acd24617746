"""Random-precision inference: several engines behind one, of which one, drawn at random, answers each batch.

Source: Fu et al. 2021, "Double-Win Quant" (ICML): the precision is drawn anew at every inference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgeguard.errors import EngineError, InputError
from edgeguard.targets import BaseEngine, Engine, Images, Logits

NAME = "random-precision"


class RandomPrecisionEngine(BaseEngine):
    """An engine that owns others and closes them with itself.

    Every call, whatever its batch, is answered by one member. The draw comes from the engine's own generator, so a seed
    gives the same sequence of members again; images that are refused cost no draw.

    members: by width, in the order of the probabilities. last: width of the member that answered last, or None.
    """

    name = NAME

    def __init__(self, members: Mapping[str, Engine], probabilities: Sequence[float], seed: int | None = None) -> None:
        """Raises InputError for no members, members of different shapes, or other than one probability for each."""
        shapes = {(engine.input_shape, engine.num_classes) for engine in members.values()}
        if len(shapes) != 1:
            raise InputError(
                f"the members of a pool must take the same images and know the same classes, got {sorted(shapes)}"
            )
        chances = np.array(probabilities, np.float64)
        if chances.shape != (len(members),) or not (chances > 0).all() or not np.isclose(chances.sum(), 1):
            raise InputError(
                f"{len(members)} members need as many positive probabilities that sum to 1, got {list(probabilities)}"
            )
        super().__init__(*shapes.pop())
        self.members, self.probabilities, self.seed = dict(members), tuple(map(float, probabilities)), seed
        self.last: str | None = None
        self._widths, self._chances = list(members), chances / chances.sum()
        self._rng = np.random.default_rng(seed)

    def ask(self, width: str, images: Images) -> Logits:
        """The logits of one member, without a draw.

        Raises:
            InputError: no such member, or images it cannot take. EngineError: it fails; says which.
        """
        if width not in self.members:
            raise InputError(f"the pool has no member of width {width!r}; it has {', '.join(self.members)}")
        try:
            return self.members[width](images)
        except EngineError as exc:
            raise EngineError(f"the member of width {width} failed: {exc}") from exc

    def _logits(self, images: Images) -> Logits:
        width = self._widths[int(self._rng.choice(len(self._widths), p=self._chances))]
        logits = self.ask(width, images)
        self.last = width
        return logits

    def describe(self) -> dict[str, Any]:
        """As every engine, version, provider and threads being the members'; and how they are drawn."""
        own = next(iter(self.members.values())).describe()
        return {
            **own, "runtime": self.name, "member_runtime": own["runtime"], "widths": self._widths,
            "probabilities": list(self.probabilities), "seed": self.seed,
        }  # fmt: skip

    def close(self) -> None:
        """Close every member, also when one of them fails to."""
        super().close()
        with contextlib.ExitStack() as stack:
            for engine in self.members.values():
                stack.callback(engine.close)
