"""A pool verified: expectations over the draw, each member against its own twin, and checks that can fail."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_artifact import labelled, small_graph, write_artifact

from edgeguard import files
from edgeguard.artifact import Artifact
from edgeguard.attacks.aqapa import AQAPA
from edgeguard.attacks.lavan import LaVAN
from edgeguard.attacks.per_image import PerImage
from edgeguard.data.dataset import Dataset
from edgeguard.errors import EngineError, InputError
from edgeguard.patch import square
from edgeguard.pool_artifact import Pool, write_pool
from edgeguard.report.html import render_html
from edgeguard.report.read import check_report
from edgeguard.report.summary import format_summary
from edgeguard.targets import BaseEngine, open_pool
from edgeguard.targets.random_precision import RandomPrecisionEngine
from edgeguard.targets.reference import ReferenceEngine
from edgeguard.verify import Gate, VerifyOptions, pool_trust, verify, verify_pool
from edgeguard.verify.harness import Judged, Subject
from edgeguard.verify.options import accesses_of
from edgeguard.verify.pool_judge import PoolSubject, PoolVerdict, Side, expected_share, mixed
from edgeguard.verify.pool_models import Guide, Mixture, Weighted
from edgeguard.verify.pool_workshop import GUIDE, PoolWorkshop
from edgeguard.verify.propose import EVERY_WIDTH, plans
from edgeguard.verify.trust import NAMES

WIDTHS, CHANCES = ("8", "4", "3"), (0.5, 0.3, 0.2)
ATTACKS = ("a-qapa", "a-qapa-per-image", "patch-rs")
OPTIONS = VerifyOptions(
    attacks=ATTACKS, accesses=accesses_of(ATTACKS), patch_sizes=(4,), placements=("random", "worst"), steps=12,
    attack_batch=20, stride=6, per_image_limit=10, universal_queries=300, limit=40,
)  # fmt: skip


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    folder = tmp_path_factory.mktemp("pools") / "pool"
    folder.mkdir()
    for width in WIDTHS:
        write_artifact(folder / width, small_graph(int(width)), width)
    return write_pool(folder, WIDTHS, CHANCES, seed=4)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return labelled(small_graph(8), 90)


@pytest.fixture(scope="module")
def report(pool: Pool, data: Dataset) -> dict[str, Any]:
    return check_report(verify_pool(pool, data, OPTIONS, gate=Gate(require_integer=True, require_trust=True)))


def test_the_report_says_what_it_was(report: dict[str, Any], pool: Pool) -> None:
    block = report["artifact"]["pool"]
    assert (block["widths"], block["seed"]) == (list(WIDTHS), 4)
    assert block["probabilities"] == pytest.approx(CHANCES)
    assert report["artifact"]["sha256"] == pool.sha256
    assert report["artifact"]["width"] == "8, 4, 3"
    assert set(report["artifact"]["files"]) == {f"{width}/manifest.json" for width in WIDTHS}
    assert report["environment"]["engine"]["runtime"] == "random-precision"
    assert "random by design" in report["definitions"]["pool"]
    for text in (format_summary(report), render_html(report)):
        assert "a pool of 8 (50.0 %), 4 (30.0 %), 3 (20.0 %), drawn for each batch" in text
        assert "random by design" in text
    assert "Random by design: rates are expectations" in format_summary(report)
    assert report["gate"]["passed"] is True


def test_a_pool_that_does_not_add_up_is_no_report(report: dict[str, Any]) -> None:
    changed = copy.deepcopy(report)
    changed["artifact"]["pool"]["probabilities"] = [1.0]
    with pytest.raises(InputError, match="one probability for each of its widths"):
        check_report(changed)
    changed = copy.deepcopy(report)
    changed["attacks"][0]["members"]["8"] = 2
    with pytest.raises(InputError, match=r"attacks\[0\]\.members\.8"):
        check_report(changed)


def test_rates_are_expectations_over_the_members(report: dict[str, Any], pool: Pool, data: Dataset) -> None:
    clean = report["clean"]
    for who in ("engine", "twin"):
        expected = sum(p * clean["members"][w][who]["accuracy"] for w, p in zip(WIDTHS, CHANCES, strict=True))
        assert clean[who]["accuracy"] == pytest.approx(expected)
    assert clean["members"]["8"]["engine"]["accuracy"] == 1
    assert clean["engine"]["accuracy"] < 1
    counting = {width: clean["members"][width]["engine"]["accuracy"] for width in WIDTHS}
    for row in report["attacks"]:
        assert row["members"].keys() == set(WIDTHS)
        assert row["ci95"][0] <= row["asr"] <= row["ci95"][1]
        if row["scope"] == "universal":
            weights = {width: chance * counting[width] for width, chance in zip(WIDTHS, CHANCES, strict=True)}
            asr = sum(weights[width] * row["members"][width] for width in WIDTHS) / sum(weights.values())
            assert row["asr"] == pytest.approx(asr)
            assert row["robust_accuracy"] == pytest.approx(clean["engine"]["accuracy"] * (1 - row["asr"]))


def test_a_members_figures_are_those_of_the_member_alone(pool: Pool, data: Dataset, tmp_path: Path) -> None:
    square(np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)).save(tmp_path / "p.npz")
    options = VerifyOptions(
        accesses=("replay",), replay=(tmp_path / "p.npz",), placements=("random", "worst"), stride=4
    )
    together = verify_pool(pool, data, options)
    for member in pool.members:
        alone = verify(member.artifact, data, options)
        for one, all_ in zip(alone["attacks"], together["attacks"], strict=True):
            assert all_["members"][member.artifact.width] == one["asr"]
        assert together["clean"]["members"][member.artifact.width] == alone["clean"]
    assert len({row["asr"] for row in together["attacks"]}) == 2


def test_each_member_agrees_with_its_own_twin(report: dict[str, Any]) -> None:
    assert report["clean"]["bit_identical"] is True
    assert report["clean"]["agreement"] == pytest.approx(1)
    assert all(block["bit_identical"] for block in report["clean"]["members"].values())
    for row in report["attacks"]:
        assert row["twin_asr"] == pytest.approx(row["asr"])
        assert row["survival"]["bit_identical"]
        assert row["survival"]["member"] in WIDTHS
    assert report["survival"]["verdict"] == "survived"


def test_every_access_is_tried_on_the_whole_pool(report: dict[str, Any]) -> None:
    rows = [(row["name"], row["access"], row["source"], row["placement"]) for row in report["attacks"]]
    assert rows.count(("aqapa", "transfer", EVERY_WIDTH, "worst")) == 1
    for width in WIDTHS:
        assert ("aqapa", "transfer", width, "random") in rows
    assert ("aqapa", "engine", EVERY_WIDTH, "random") in rows
    for access in ("transfer", "engine"):
        assert ("aqapa-per-image", access, EVERY_WIDTH, "optimized") in rows
    (query,) = (row for row in report["attacks"] if row["name"] == "patch-rs" and row["placement"] == "random")
    assert query["queries"] % len(WIDTHS) == 0
    assert query["queries"] > 600
    (aggregated,) = [one for one in report["aggregated"] if one["placement"] == "random"]
    assert aggregated["surrogates"] == [*WIDTHS, EVERY_WIDTH]


def test_the_strongest_attacks_reach_every_member(report: dict[str, Any]) -> None:
    row = next(row for row in report["attacks"] if row["name"] == "aqapa-per-image" and row["access"] == "engine")
    assert min(row["members"].values()) > 0.8
    noise = next(row for row in report["attacks"] if row["name"] == "noise")
    assert noise["asr"] < row["asr"]


def test_random_is_no_failure_and_no_determinism(report: dict[str, Any]) -> None:
    checks = {check["check"]: check for check in report["trust"]}
    assert (
        tuple(checks) == pool_trust.NAMES == tuple(name.replace("deterministic", "random_by_design") for name in NAMES)
    )
    assert checks["random_by_design"]["passed"] is True
    assert "200 answers were bit for bit the drawn member's" in checks["random_by_design"]["detail"]
    assert "member 3" in checks["gradients_alive"]["detail"]


def test_a_fresh_seed_gives_the_same_rates(pool: Pool, data: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    folder.mkdir()
    for width in WIDTHS:
        write_artifact(folder / width, small_graph(int(width)), width)
    fresh = write_pool(folder, WIDTHS, CHANCES)
    options = VerifyOptions(
        attacks=("patch-rs",), accesses=("query",), patch_sizes=(4,), universal_queries=200, limit=30
    )
    first, second = (verify_pool(one, data, options)["attacks"] for one in (fresh, pool))
    assert first == second
    likely = write_pool(folder, WIDTHS, (0.1, 0.1, 0.8))
    assert verify_pool(likely, data, options)["clean"]["engine"] != verify_pool(pool, data, options)["clean"]["engine"]


def test_stages_are_kept_for_each_member(pool: Pool, data: Dataset, tmp_path: Path, monkeypatch: Any) -> None:
    options = VerifyOptions(patch_sizes=(4,), accesses=("transfer",), steps=4, attack_batch=10, limit=20)
    first = verify_pool(pool, data, options, stages=tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 4 + 2 * 5 * len(WIDTHS)
    monkeypatch.setattr(AQAPA, "run", lambda *_, **__: pytest.fail("crafted again"))
    second = verify_pool(pool, data, options, stages=tmp_path / "kept")
    assert second["attacks"] == first["attacks"]


def test_surrogates_and_wrong_data_are_refused(pool: Pool, data: Dataset) -> None:
    with pytest.raises(InputError, match="leave the surrogates out"):
        verify_pool(pool, data, VerifyOptions(surrogates=(pool.path / "8",)))
    with pytest.raises(InputError, match="larger than the image"):
        verify_pool(pool, data, VerifyOptions(patch_sizes=(17,)))


def test_a_failing_member_ends_the_report_and_is_named(
    pool: Pool, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = ReferenceEngine._logits, {"n": 0}

    def failing(self: ReferenceEngine, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        calls["n"] += 1
        if calls["n"] > 10:
            raise EngineError("out of memory")
        return real(self, images)

    monkeypatch.setattr(ReferenceEngine, "_logits", failing)
    for name in ("a", "b", "c"):
        square(np.full((3, 4, 4), ord(name), np.uint8)).save(tmp_path / f"{name}.npz")
    options = VerifyOptions(accesses=("replay",), replay=tuple(tmp_path / f"{name}.npz" for name in "abc"), limit=40)
    report = check_report(verify_pool(pool, data, options))
    assert report["status"]["complete"] is False
    assert "the member of width 4 failed: out of memory" in report["status"]["reason"]
    assert len(report["attacks"]) == 2
    assert [check["passed"] for check in report["trust"]] == [None] * 6
    render_html(report)


def test_replay_works_without_torch(pool: Pool, data: Dataset, tmp_path: Path) -> None:
    square(np.full((3, 4, 4), 255, np.uint8)).save(tmp_path / "white.npz")
    np.savez(tmp_path / "data.npz", images=data.images(np.arange(20)).transpose(0, 2, 3, 1), labels=data.labels[:20])
    program = f"""
import importlib.util, sys
sys.modules["torch"] = None
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else real(name, *rest)
from pathlib import Path
from edgeguard.data.npz import load_npz
from edgeguard.files import to_json
from edgeguard.pool_artifact import Pool
from edgeguard.verify import VerifyOptions, verify_pool
options = VerifyOptions(accesses=("replay",), replay=(Path({str(tmp_path / "white.npz")!r}),))
report = verify_pool(Pool.load({str(pool.path)!r}), load_npz(Path({str(tmp_path / "data.npz")!r})), options)
sys.stdout.write(to_json(report))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "report.json").write_text(done.stdout)
    report = check_report(files.read_json(tmp_path / "report.json"))
    assert report["clean"]["twin"] is None
    assert report["survival"] is None
    assert {check["check"]: check["passed"] for check in report["trust"]}["random_by_design"] is True


IMAGES = np.random.default_rng(0).integers(0, 256, (12, 3, 8, 8), dtype=np.uint8)


class Linear(BaseEngine):
    """Logits that are linear in the pixels; told to, noisy."""

    name = "linear"

    def __init__(self, seed: int) -> None:
        super().__init__((3, 8, 8), 3)
        self.weight = np.random.default_rng(seed).normal(size=(192, 3)).astype(np.float32) / 300
        self.noise = 0.0

    def _logits(self, images: Any) -> Any:
        self.noise *= -1
        return images.reshape(len(images), -1).astype(np.float32) @ self.weight + np.float32(self.noise)


def draw(chances: tuple[float, ...] = (0.7, 0.3), engine: type[RandomPrecisionEngine] = RandomPrecisionEngine) -> Any:
    made = engine({"8": Linear(0), "2": Linear(1)}, chances, seed=0)
    labels = made.ask("8", IMAGES).argmax(1)
    sides = [
        Side(width, chance, Subject.of(lambda x, w=width: made.ask(w, x), IMAGES, labels), None)
        for width, chance in zip(("8", "2"), chances, strict=True)
    ]
    return made, sides


class Stuck(RandomPrecisionEngine):
    """Says that it draws, and does not."""

    def _logits(self, images: Any) -> Any:
        self.last = "8"
        return self.ask("8", images)


class Blended(RandomPrecisionEngine):
    """Answers with something of its own."""

    def _logits(self, images: Any) -> Any:
        return super()._logits(images) + np.float32(1e-3)


def test_the_check_of_the_draw_can_fail() -> None:
    assert pool_trust.random_by_design(*draw())["passed"]
    stuck = pool_trust.random_by_design(*draw(engine=Stuck))
    assert stuck["passed"] is False
    assert "the draw of 8, 2 does not follow its probability" in stuck["detail"]
    blended = pool_trust.random_by_design(*draw(engine=Blended))
    assert blended["passed"] is False
    assert "in 200 calls 0 answers were bit for bit" in blended["detail"]
    engine, sides = draw()
    engine.members["2"].noise = 1.0
    noisy = pool_trust.random_by_design(engine, sides)
    assert noisy["passed"] is False
    assert "member 2 itself is not deterministic" in noisy["detail"]


def test_checks_of_members_fail_with_the_first_that_does() -> None:
    _, sides = draw()
    outcomes = {"8": True, "2": True}
    check = pool_trust.of_members(sides, lambda side: {"check": "x", "passed": outcomes[side.width], "detail": "d"})
    assert check == {"check": "x", "passed": True, "detail": "member 8: d; member 2: d"}
    for value in (False, None):
        outcomes["2"] = value  # type: ignore[assignment]
        found = pool_trust.of_members(sides, lambda side: {"check": "x", "passed": outcomes[side.width], "detail": "d"})
        assert found == {"check": "x", "passed": value, "detail": "member 2: d"}


def test_a_large_patch_must_win_on_all_members() -> None:
    engine, sides = draw()

    def twin(width: str, alive: bool) -> Callable[[torch.Tensor], torch.Tensor]:
        weight = torch.from_numpy(engine.members[width].weight)
        return lambda x: (x if alive else x.detach() + 0 * x).flatten(1) @ weight

    honest = {width: twin(width, True) for width in engine.members}
    assert pool_trust.large_patch_wins(sides, honest, 0)["passed"]
    masked = {width: twin(width, False) for width in engine.members}
    assert pool_trust.large_patch_wins(sides, masked, 0)["passed"] is False
    assert pool_trust.large_patch_wins(sides, {}, 0)["passed"] is None


def judged(successes: int, counting: int = 100, n: int = 100) -> Judged:
    eligible = np.arange(n) < counting
    fooled = np.arange(n) < successes
    zeros = np.zeros((n, 2))
    return Judged(eligible, fooled, eligible & ~fooled, zeros.astype(np.float32), zeros.astype(np.int64), 1)


def test_a_verdict_weighs_its_members() -> None:
    verdict = PoolVerdict((judged(50), judged(10, counting=20)), (0.75, 0.25))
    assert verdict.expected_n == 80
    assert verdict.asr == pytest.approx((0.75 * 50 + 0.25 * 10) / 80)
    assert verdict.robust_accuracy == pytest.approx(0.75 * 0.5 + 0.25 * 0.1)
    assert verdict.shown == 0
    np.testing.assert_allclose(verdict.fooled[[0, 20, 60]], [1, 0.75, 0])
    assert expected_share(0.5, 79.6)[:2] == (0.5, 80)
    assert expected_share(1 + 1e-12, 0.2)[:2] == (1.0, 1)


@pytest.mark.parametrize(("white", "black", "passed"), [(50, 20, True), (50, 52, True), (50, 80, False)])
def test_white_box_strongest(white: int, black: int, passed: bool) -> None:
    def verdict(successes: int) -> PoolVerdict:
        return PoolVerdict((judged(successes), judged(successes)), (0.5, 0.5))

    found = pool_trust.white_box_strongest([("white", verdict(white))], [("black", verdict(black))])
    assert found["passed"] is passed
    assert pool_trust.white_box_strongest([], [("black", verdict(black))])["passed"] is None


def test_the_mean_answer_is_one_in_numpy_and_torch() -> None:
    rng = np.random.default_rng(0)
    logits = [rng.normal(size=(20, 5)).astype(np.float32) * scale for scale in (1, 1000)]
    logits[1][3] = 7.0
    got = mixed(logits, (0.6, 0.4))
    models = {str(index): (lambda _, own=own: torch.from_numpy(own)) for index, own in enumerate(logits)}
    expected = Mixture(models, {"0": 0.6, "1": 0.4})(torch.zeros(20, 3, 2, 2)).numpy()
    np.testing.assert_allclose(got, expected, atol=2e-5)
    np.testing.assert_allclose(np.exp(got).sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(mixed(logits[:1], (1.0,)).argmax(1), logits[0].argmax(1))
    assert not np.allclose(got, mixed(logits, (0.4, 0.6)))


def test_weights_make_the_mean_of_losses_one_by_probabilities() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    models: Mapping[str, Any] = {"a": lambda images: images * 2, "b": lambda images: images * 5}
    weighted = [Weighted(models["a"], 2 * 0.9), Weighted(models["b"], 2 * 0.1)]
    value = torch.stack([model(x).sum() for model in weighted]).mean()
    assert float(value.detach()) == pytest.approx(21)
    (gradient,) = torch.autograd.grad(value, x)
    np.testing.assert_allclose(gradient.numpy(), 0.9 * 2 + 0.1 * 5)
    assert Weighted(models["a"], 1.0).queries == 0
    guide = Guide(Mixture({"a": models["a"]}, {"a": 1.0}))
    assert not guide(x).requires_grad


def test_attacks_are_set_to_the_expectation(pool: Pool, data: Dataset) -> None:
    images, labels = data.images(np.arange(20)), data.labels[:20]
    options = VerifyOptions(
        attacks=("a-qapa", "a-qapa-per-image", "lavan"), accesses=("transfer", "engine"), patch_sizes=(4,), batch_size=7
    )
    from edgeguard.targets.twin import Twin

    with open_pool(pool) as engine:
        sides = [
            Side(width, chance, Subject.of(engine.members[width], images, labels), None)
            for width, chance in zip(WIDTHS, CHANCES, strict=True)
        ]
        subject = PoolSubject.over(sides, lambda x: mixed([engine.ask(w, x) for w in WIDTHS], CHANCES))
        assert subject.eligible.sum() == max(side.subject.eligible.sum() for side in sides) == 20
        twins = {one.width: Twin(one.graph()) for one in pool.artifacts}
        workshop = PoolWorkshop(subject, "pool", twins, images, labels, engine, dict(zip(WIDTHS, CHANCES, strict=True)))
        for plan in plans(options, list(WIDTHS), pool=True):
            if plan.attack is None:
                continue
            attack, models = workshop.attack(plan, options), workshop.victim(plan, options).models
            everyone = plan.source == EVERY_WIDTH
            assert list(models) == ([*([GUIDE] * plan.per_image), *WIDTHS] if everyone else [plan.source])
            if isinstance(attack, AQAPA):
                assert attack.average is everyone
            if isinstance(attack, PerImage):
                assert attack.confidence == pytest.approx(np.log(5 / 0.2))
            if isinstance(attack, LaVAN):
                assert attack.confidence == pytest.approx(0.9)
            pixels = torch.from_numpy(images).float()
            if everyone:
                for width in WIDTHS:
                    expected = engine.ask(width, images)
                    np.testing.assert_array_equal(models[width](pixels).detach().numpy(), expected)


def test_a_single_artifact_is_no_pool(artifact: Artifact, data: Dataset) -> None:
    report = verify(artifact, data, VerifyOptions(patch_sizes=(4,), accesses=("transfer",), steps=2, limit=20))
    assert "pool" not in report["artifact"]
    assert "members" not in report["attacks"][0]
    assert "deterministic" in [check["check"] for check in report["trust"]]


def test_a_bundle_is_for_one_integer_graph(pool: Pool, data: Dataset, tmp_path: Path) -> None:
    options = VerifyOptions(accesses=("replay",), bundle=tmp_path, limit=None)
    with pytest.raises(InputError, match="a bundle is made for one integer graph"):
        verify_pool(pool, data, options)
