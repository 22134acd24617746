from __future__ import annotations

import numpy as np
import pytest

from edgeguard.attacks.pool import PatchPool, PoolConfig
from edgeguard.errors import InputError


def _train(pool: PatchPool, steps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        for index in pool.draw(rng, 2):
            pool.ascend(int(index), rng.standard_normal(pool[int(index)].shape), 4.0)


def test_members_are_uint8_patches_of_every_size() -> None:
    pool = PatchPool(PoolConfig(sizes=(3, 5), members=2))
    assert [patch.size for patch in pool.patches()] == [(3, 3), (3, 3), (5, 5), (5, 5)]
    assert pool[0].dtype == np.float32
    assert np.array_equal(pool[0], np.rint(pool[0]))
    assert not np.array_equal(pool[0], pool[1])


def test_ascend_follows_the_sign_and_stays_in_range() -> None:
    pool = PatchPool(PoolConfig(sizes=(2,), members=1))
    gradient = np.ones((3, 2, 2))
    gradient[:, 0, 0] = -1.0
    gradient[:, 1, 1] = 0.0
    untouched = pool[0][:, 1, 1]
    for _ in range(100):
        pool.ascend(0, gradient, 3.3)
    assert (pool[0][:, 0, 0] == 0).all()
    assert (pool[0][:, 0, 1] == 255).all()
    assert np.array_equal(pool[0][:, 1, 1], untouched)


def test_step_size_is_in_grey_levels() -> None:
    pool = PatchPool(PoolConfig(sizes=(2,), members=1))
    pool.load_state({**pool.state(), "pixels.0": np.full((3, 2, 2), 100, np.uint8)})
    pool.ascend(0, np.full((3, 2, 2), 1e-9), 7.4)
    assert (pool[0] == 107).all()


def test_draw_visits_every_member_before_repeating() -> None:
    pool = PatchPool(PoolConfig(sizes=(2, 3), members=3))
    drawn = pool.draw(np.random.default_rng(0), 12)
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == list(range(6))
    assert len(pool.draw(np.random.default_rng(0), 2)) == 2


def test_noise_flips_signs_but_not_without_a_gradient() -> None:
    gradient = np.ones((3, 8, 8))
    noisy = PatchPool(PoolConfig(sizes=(8,), members=1, gradient_noise=2.0))
    before = noisy[0]
    noisy.ascend(0, gradient * 0, 4.0)
    assert np.array_equal(noisy[0], before)
    noisy.ascend(0, gradient, 4.0)
    moved = np.sign(noisy[0] - before)
    assert (moved == -1).any()
    assert (moved == 1).any()


def test_refresh_restarts_the_stalest_member() -> None:
    pool = PatchPool(PoolConfig(sizes=(2,), members=3, refresh_every=6))
    zero = np.zeros((3, 2, 2))
    before = [pool[i] for i in range(3)]
    for index in (1, 1, 1, 0, 2, 2):
        pool.ascend(index, zero, 1.0)
    assert np.array_equal(pool[0], before[0])
    assert not np.array_equal(pool[1], before[1])
    assert np.array_equal(pool[2], before[2])
    assert pool.refresh() == 2


def test_resume_is_exact() -> None:
    config = PoolConfig(sizes=(3, 4), members=2, refresh_every=5, gradient_noise=0.5, seed=3)
    straight, first = PatchPool(config), PatchPool(config)
    _train(straight, 4, 0)
    _train(first, 4, 0)
    resumed = PatchPool(config)
    resumed.load_state(first.state())
    _train(straight, 9, 1)
    _train(resumed, 9, 1)
    for left, right in zip(straight.patches(), resumed.patches(), strict=True):
        assert np.array_equal(left.pixels, right.pixels)


def test_the_seed_matters() -> None:
    left, right = PatchPool(PoolConfig(seed=0)), PatchPool(PoolConfig(seed=1))
    assert not np.array_equal(left[0], right[0])


@pytest.mark.parametrize(
    "change",
    [{"sizes": ()}, {"sizes": (0,)}, {"members": 0}, {"refresh_every": -1}, {"gradient_noise": -1.0}, {"seed": -1}],
)
def test_bad_configurations(change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        PoolConfig(**change)  # type: ignore[arg-type]


def test_bad_input() -> None:
    pool = PatchPool(PoolConfig(sizes=(2,), members=1))
    with pytest.raises(InputError, match="must be"):
        pool.ascend(0, np.zeros((3, 3, 3)), 1.0)
    with pytest.raises(InputError, match="finite"):
        pool.ascend(0, np.full((3, 2, 2), np.nan), 1.0)
    with pytest.raises(InputError, match="grey level"):
        pool.ascend(0, np.zeros((3, 2, 2)), 0.1)
    with pytest.raises(InputError, match="at least one"):
        pool.draw(np.random.default_rng(0), 0)
    state = pool.state()
    with pytest.raises(InputError, match="keys"):
        pool.load_state({**state, "extra": 1})
    with pytest.raises(InputError, match="uint8"):
        pool.load_state({**state, "pixels.0": np.zeros((3, 3, 3), np.uint8)})
    with pytest.raises(InputError, match="age"):
        pool.load_state({**state, "age": np.zeros(4, np.int64)})
