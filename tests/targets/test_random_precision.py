"""One engine over several: who answers, how often, and what happens when a member fails."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest
from small_artifact import CLASSES, SIDE, small_graph, write_artifact

from edgeguard.errors import ArtifactError, EngineError, InputError
from edgeguard.pool_artifact import Pool, write_pool
from edgeguard.targets import BaseEngine, Engine, open_engine, open_pool
from edgeguard.targets.random_precision import RandomPrecisionEngine
from edgeguard.targets.reference import ReferenceEngine

WIDTHS = ("8", "4", "3")
IMAGES = graphs.random_images((3, SIDE, SIDE), 3)


class Constant(BaseEngine):
    """Answers a constant; told to, it fails or cannot be closed."""

    name = "constant"

    def __init__(self, value: float, shape: tuple[int, int, int] = (3, 4, 4), classes: int = 2) -> None:
        super().__init__(shape, classes)
        self.value, self.broken, self.stuck = value, False, False

    def _logits(self, images: Any) -> Any:
        if self.broken:
            raise EngineError("out of memory")
        return np.full((len(images), self.num_classes), self.value, np.float32)

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        super().close()
        if self.stuck:
            raise EngineError("cannot be closed")


SMALL = np.zeros((2, 3, 4, 4), np.uint8)


def pool_of(seed: int | None = 0, probabilities: tuple[float, ...] = (0.5, 0.3, 0.2)) -> RandomPrecisionEngine:
    return RandomPrecisionEngine({width: Constant(float(width)) for width in WIDTHS}, probabilities, seed)


def answers(engine: RandomPrecisionEngine, calls: int) -> list[float]:
    return [float(engine(SMALL)[0, 0]) for _ in range(calls)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "pool"
    path.mkdir()
    for width in WIDTHS:
        write_artifact(path / width, small_graph(int(width)), width)
    write_pool(path, WIDTHS, seed=3)
    return path


def test_every_answer_is_bit_for_bit_a_members(folder: Path) -> None:
    expected = {width: ReferenceEngine(small_graph(int(width)))(IMAGES) for width in WIDTHS}
    with open_engine(folder) as engine:
        assert isinstance(engine, RandomPrecisionEngine)
        assert isinstance(engine, Engine)
        assert (engine.name, engine.input_shape, engine.num_classes) == ("random-precision", (3, SIDE, SIDE), CLASSES)
        assert engine.last is None
        for _ in range(20):
            logits = engine(IMAGES)
            np.testing.assert_array_equal(logits, expected[str(engine.last)])
        for width in WIDTHS:
            np.testing.assert_array_equal(engine.ask(width, IMAGES), expected[width])


def test_members_are_drawn_by_their_probabilities() -> None:
    counts = Counter(answers(pool_of(probabilities=(0.6, 0.3, 0.1)), 2000))
    for value, probability in zip((8, 4, 3), (0.6, 0.3, 0.1), strict=True):
        assert abs(counts[value] - 2000 * probability) < 5 * np.sqrt(2000 * probability * (1 - probability))


def test_a_seed_repeats_the_draw_and_none_does_not() -> None:
    first, again, other = (answers(pool_of(seed), 60) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    fresh = [answers(pool_of(None), 60) for _ in range(2)]
    assert fresh[0] != fresh[1]


def test_one_member_answers_a_whole_batch() -> None:
    engine = pool_of()
    assert all(len(np.unique(engine(SMALL))) == 1 for _ in range(20))


def test_asking_a_member_and_refused_images_cost_no_draw() -> None:
    expected, engine = answers(pool_of(), 30), pool_of()
    got = []
    for _ in range(30):
        engine.ask("4", SMALL)
        with pytest.raises(InputError, match="tensor 'pixels'"):
            engine(SMALL[:0])
        got.append(float(engine(SMALL)[0, 0]))
    assert got == expected
    with pytest.raises(InputError, match="no member of width '5'; it has 8, 4, 3"):
        engine.ask("5", SMALL)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES.astype(np.float32), "got float32"),
        (IMAGES[:, :, 1:], r"expected a NumPy array of uint8 \(N, 3, 16, 16\)"),
        (IMAGES[:0], "empty batch"),
        (None, "got NoneType"),
    ],
)
def test_wrong_images_are_refused(folder: Path, images: Any, message: str) -> None:
    with open_engine(folder) as engine, pytest.raises(InputError, match=message):
        engine(images)


def test_a_members_failure_names_its_width() -> None:
    members = {width: Constant(float(width)) for width in WIDTHS}
    engine = RandomPrecisionEngine(members, (0.5, 0.3, 0.2), 0)
    members["4"].broken = True
    with pytest.raises(EngineError, match="the member of width 4 failed: out of memory"):
        answers(engine, 50)
    assert engine.last != "4"


def test_closing_closes_every_member() -> None:
    members = {width: Constant(float(width)) for width in WIDTHS}
    with RandomPrecisionEngine(members, (0.5, 0.3, 0.2)) as engine:
        engine(SMALL)
    assert all(member.closed for member in members.values())
    with pytest.raises(EngineError, match="random-precision engine is closed"):
        engine(SMALL)
    members = {width: Constant(float(width)) for width in WIDTHS}
    members["8"].stuck = members["3"].stuck = True
    with pytest.raises(EngineError, match="cannot be closed"):
        RandomPrecisionEngine(members, (0.5, 0.3, 0.2)).close()
    assert all(member.closed for member in members.values())


def test_members_and_probabilities_must_fit() -> None:
    with pytest.raises(InputError, match="same images"):
        RandomPrecisionEngine({}, ())
    with pytest.raises(InputError, match="same images"):
        RandomPrecisionEngine({"8": Constant(8), "4": Constant(4, classes=3)}, (0.5, 0.5))
    for probabilities in ((1.0,), (0.5, 0.6), (1.0, 0.0)):
        with pytest.raises(InputError, match="2 members need as many positive probabilities"):
            RandomPrecisionEngine({"8": Constant(8), "4": Constant(4)}, probabilities)


def test_it_describes_itself(folder: Path) -> None:
    with open_pool(Pool.load(folder)) as engine:
        description = engine.describe()
    assert (description["runtime"], description["member_runtime"]) == ("random-precision", "reference")
    assert description["widths"] == list(WIDTHS)
    assert description["probabilities"] == pytest.approx([1 / 3] * 3)
    assert description["seed"] == 3
    assert {"version", "provider", "threads", "cpu_flags"} <= description.keys()


def test_runtime_and_threads_reach_the_members(folder: Path) -> None:
    pytest.importorskip("torch")
    with open_pool(Pool.load(folder), "twin", 1) as engine:
        assert {member.name for member in engine.members.values()} == {"twin"}
        assert engine.describe()["threads"] == 1
        with open_pool(Pool.load(folder)) as reference:
            for width in WIDTHS:
                np.testing.assert_array_equal(engine.ask(width, IMAGES), reference.ask(width, IMAGES))
    with pytest.raises(InputError, match="exported for 'reference'; 'ort' cannot execute it"):
        open_engine(folder, "ort")
    with pytest.raises(InputError, match="-1 threads"):
        open_engine(folder, threads=-1)


def test_a_folder_of_one_artifact_opens_as_before(folder: Path, tmp_path: Path) -> None:
    with open_engine(folder / "8") as engine, open_engine(str(folder / "8")) as other:
        assert engine.name == "reference"
        np.testing.assert_array_equal(engine(IMAGES), other(IMAGES))
    with pytest.raises(ArtifactError, match="is not an artifact"):
        open_engine(tmp_path)


def test_what_was_opened_is_closed_when_a_member_cannot_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    monkeypatch.setattr(BaseEngine, "close", lambda self: closed.append(self.name))
    pool = Pool.load(folder)
    (folder / "3" / "graph.npz").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"graph\.npz"):
        open_pool(pool)
    assert closed == ["reference", "reference"]
