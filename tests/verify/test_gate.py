from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeguard.errors import InputError
from edgeguard.statistics import wilson
from edgeguard.verify.gate import Gate, evaluate


def attack(asr: float, robust: float, n: int = 1000, **changes: Any) -> dict[str, Any]:
    return {
        "name": "aqapa", "access": "engine", "scope": "universal", "source": "4", "target": None, "stride": None,
        "patch_size": 6, "placement": "random", "asr": asr, "n": n, "ci95": list(wilson(round(asr * n), n)),
        "robust_accuracy": robust, "robust_n": n, "robust_ci95": list(wilson(round(robust * n), n)), **changes,
    }  # fmt: skip


def report(**changes: Any) -> dict[str, Any]:
    return {
        "status": {"complete": True, "reason": None},
        "artifact": {"integer_mac_coverage": 1.0},
        "clean": {"engine": {"accuracy": 0.9, "n": 1000, "ci95": list(wilson(900, 1000))}},
        "attacks": [attack(0.2, 0.7), attack(0.3, 0.6, placement="worst")],
        "survival": {"verdict": "survived", "delta_asr": 0.0, "ci95": [-0.01, 0.01]},
        "trust": [{"check": "deterministic", "passed": True, "detail": ""}],
        **changes,
    }


@pytest.mark.parametrize(
    ("rules", "passed"),
    [
        ({"max_asr": 0.33}, True),
        ({"max_asr": 0.32}, False),
        ({"max_asr": 0.25}, False),
        ({"min_clean_accuracy": 0.87}, True),
        ({"min_clean_accuracy": 0.89}, False),
        ({"min_robust_accuracy": 0.56}, True),
        ({"min_robust_accuracy": 0.58}, False),
        ({"require_integer": True}, True),
        ({"require_survival": True}, True),
        ({"require_trust": True}, True),
        ({"max_asr": 0.9, "min_robust_accuracy": 0.9}, False),
    ],
)
def test_rules(rules: dict[str, Any], passed: bool) -> None:
    found = evaluate(Gate.of(rules), report())
    assert found["passed"] is passed
    assert {rule["rule"] for rule in found["rules"]} == rules.keys()


def test_the_strongest_attack_decides_and_is_named() -> None:
    (rule,) = evaluate(Gate(max_asr=0.1), report())["rules"]
    assert rule["figure"] == 0.3
    assert "worst placement" in rule["detail"]
    assert rule["ci95"] == pytest.approx(wilson(300, 1000))


def test_says_when_only_the_point_estimate_passes() -> None:
    (rule,) = evaluate(Gate(max_asr=0.32), report())["rules"]
    assert not rule["passed"]
    assert "would let it pass" in rule["detail"]
    (rule,) = evaluate(Gate(max_asr=0.25), report())["rules"]
    assert "would let it pass" not in rule["detail"]


def test_an_incomplete_report_passes_no_gate() -> None:
    found = evaluate(Gate(max_asr=0.9), report(status={"complete": False, "reason": "the engine failed"}))
    assert not found["passed"]
    assert "the engine failed" in found["rules"][-1]["detail"]


def test_a_baseline_refuses_regressions() -> None:
    same = evaluate(None, report(), report())
    assert same["passed"]
    assert "none of 2 attacks" in same["rules"][0]["detail"]
    better = [attack(0.1, 0.8), attack(0.3, 0.6, placement="worst")]
    found = evaluate(None, report(), report(attacks=better))
    assert not found["passed"]
    assert "ASR 10.0% -> 20.0%, difference +6.9% to +13.1%" in found["rules"][0]["detail"]
    assert "worst" not in found["rules"][0]["detail"]
    hardly = [attack(0.19, 0.8), attack(0.29, 0.6, placement="worst")]
    assert evaluate(None, report(), report(attacks=hardly))["passed"]
    clean = {"engine": {"accuracy": 0.95, "n": 1000, "ci95": list(wilson(950, 1000))}}
    assert "clean accuracy 95.0% -> 90.0%" in evaluate(None, report(), report(clean=clean))["rules"][0]["detail"]
    with pytest.raises(InputError, match="baseline holds no attack"):
        evaluate(None, report(), report(attacks=[attack(0.1, 0.8, patch_size=9)]))


def test_what_is_not_known_does_not_pass() -> None:
    unknown = report(
        artifact={"integer_mac_coverage": None},
        survival=None,
        trust=[{"check": "gradients_alive", "passed": None, "detail": ""}],
    )
    gate = Gate(require_integer=True, require_survival=True, require_trust=True)
    assert [rule["passed"] for rule in evaluate(gate, unknown)["rules"]] == [False, False, False]
    assert not evaluate(Gate(require_trust=True), report(trust=[]))["passed"]


def test_planted_failures() -> None:
    assert not evaluate(Gate(require_integer=True), report(artifact={"integer_mac_coverage": 0.99}))["passed"]
    lost = {"verdict": "did not survive", "delta_asr": 0.1, "ci95": [0.05, 0.15]}
    assert not evaluate(Gate(require_survival=True), report(survival=lost))["passed"]
    broken = [{"check": "deterministic", "passed": False, "detail": ""}]
    (rule,) = evaluate(Gate(require_trust=True), report(trust=broken))["rules"]
    assert not rule["passed"]
    assert "deterministic" in rule["detail"]


@pytest.mark.parametrize(
    "rules",
    [
        {}, {"max_ars": 0.1}, {"max_asr": 1.5}, {"max_asr": -0.1}, {"max_asr": "0.1"}, {"max_asr": True},
        {"max_asr": float("nan")}, {"require_trust": 1}, {"require_trust": False},
    ],
)  # fmt: skip
def test_bad_rules(rules: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="gate"):
        Gate.of(rules)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "gate.toml"
    path.write_text("max_asr = 0.3\nrequire_integer = true\n")
    assert Gate.load(path) == Gate(max_asr=0.3, require_integer=True)
    for text in ("max_asr = ", "unknown = 1", "[gate]\nmax_asr = 0.3", "\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(InputError, match=r"gate\.toml"):
            Gate.load(path)
    with pytest.raises(InputError, match="cannot read"):
        Gate.load(tmp_path / "missing.toml")
    path.write_bytes(b"#" * (2 << 20))
    with pytest.raises(InputError, match="at most"):
        Gate.load(path)
