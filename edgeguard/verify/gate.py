"""A gate: rules from a TOML file that a report must meet, for the exit code of a build.

    max_asr = 0.30              # of every attack in the report, at every placement
    min_clean_accuracy = 0.88   # of the engine
    min_robust_accuracy = 0.60  # under every attack in the report
    require_integer = true      # every multiply-accumulate of the artifact runs in an integer kernel
    require_survival = true     # the survival verdict is "survived"
    require_trust = true        # every trust check ran and passed

A number is decided by the unfavourable end of its 95 % Wilson interval: an ASR by the upper end, an accuracy by the
lower. A gate that lets a model through is a claim, and few images support no claim; where only the point estimate
passes, the rule says so, and how many images would decide. What is not known, such as survival without a twin, fails,
and so does a report that an engine's failure cut short.

A baseline is an earlier report. It is met when no attack that both reports hold succeeds more often than before, and
clean accuracy is not lower: a difference counts where its 95 % interval (Newcombe, two samples) lies beyond zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeguard import files
from edgeguard.errors import InputError, shown
from edgeguard.statistics import difference
from edgeguard.verify.advice import advise
from edgeguard.verify.survival import SURVIVED

NUMBERS = ("max_asr", "min_clean_accuracy", "min_robust_accuracy")
SWITCHES = ("require_integer", "require_survival", "require_trust")
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Gate:
    """The rules; None and False are not asked for. Numbers are shares between 0 and 1."""

    max_asr: float | None = None
    min_clean_accuracy: float | None = None
    min_robust_accuracy: float | None = None
    require_integer: bool = False
    require_survival: bool = False
    require_trust: bool = False

    def __post_init__(self) -> None:
        for name in NUMBERS:
            value = getattr(self, name)
            if value is not None and (type(value) not in (int, float) or not 0 <= value <= 1):
                raise InputError(f"gate rule {name} must be a share between 0 and 1, got {shown(value)}")
        for name in SWITCHES:
            if type(getattr(self, name)) is not bool:
                raise InputError(f"gate rule {name} must be true or false, got {shown(getattr(self, name))}")
        if all(getattr(self, name) is None for name in NUMBERS) and not any(getattr(self, name) for name in SWITCHES):
            raise InputError(f"a gate needs at least one rule; there are {', '.join(NUMBERS + SWITCHES)}")

    @staticmethod
    def of(rules: Mapping[str, Any]) -> Gate:
        """Raises InputError for an unknown rule or a value out of range."""
        unknown = sorted(rules.keys() - {*NUMBERS, *SWITCHES})
        if unknown:
            raise InputError(f"unknown gate rule {unknown[0]!r:.60}; expected {', '.join(NUMBERS + SWITCHES)}")
        return Gate(**rules)

    @staticmethod
    def load(path: Path) -> Gate:
        """Read a TOML file.

        Raises:
            InputError: missing, not TOML, or as `Gate.of`.
        """
        try:
            rules = files.read_toml(path, MAX_BYTES)
        except InputError as exc:
            raise InputError(f"cannot read the gate file: {exc}") from exc
        try:
            return Gate.of(rules)
        except InputError as exc:
            raise InputError(f"{path}: {exc}") from exc


def evaluate(
    gate: Gate | None, report: Mapping[str, Any], baseline: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Hold a report against a gate, and against an earlier report.

    Returns: `passed`, and one entry per rule: `rule`, `limit`, `figure` (what was measured), `ci95` (or None), `passed`
    and `detail`, a sentence.

    Raises:
        InputError: the baseline holds no attack that the report holds too.
    """
    rules = [] if gate is None else _rules(gate, report)
    if not report["status"]["complete"]:
        rules.append(_switch("complete", None, False, f"the report is incomplete: {report['status']['reason']}"))
    if baseline is not None:
        rules.append(_regressions(report, baseline))
    return {"passed": all(rule["passed"] for rule in rules), "rules": rules}


def _rules(gate: Gate, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    rules = []
    if gate.max_asr is not None:
        worst = max(report["attacks"], key=lambda attack: float(attack["ci95"][1]))
        rules.append(_number("max_asr", gate.max_asr, worst["asr"], worst["ci95"], worst["n"], _name(worst)))
    if gate.min_clean_accuracy is not None:
        clean = report["clean"]["engine"]
        limit = gate.min_clean_accuracy
        rules.append(_number("min_clean_accuracy", limit, clean["accuracy"], clean["ci95"], clean["n"], "without a patch"))
    if gate.min_robust_accuracy is not None:
        worst = min(report["attacks"], key=lambda attack: float(attack["robust_ci95"][0]))
        limit = gate.min_robust_accuracy
        rules.append(
            _number("min_robust_accuracy", limit, worst["robust_accuracy"], worst["robust_ci95"], worst["robust_n"], _name(worst))
        )
    if gate.require_integer:
        coverage = report["artifact"]["integer_mac_coverage"]
        detail = f"{coverage:.2%} of the multiply-accumulates run in integer kernels" if coverage is not None else (
            "nobody can say how a remote engine computes; this one does not even claim to execute the twin's artifact"
            if report["artifact"].get("remote")
            else "the artifact does not say how many of its multiply-accumulates are integer"
        )  # fmt: skip
        rules.append(_switch("require_integer", coverage, coverage == 1.0, detail))
    if gate.require_survival:
        verdict = report["survival"]["verdict"] if report["survival"] else None
        rules.append(_switch("require_survival", verdict, verdict == SURVIVED, _survival(report)))
    if gate.require_trust:
        rules.append(_trust(report["trust"]))
    return rules


def _regressions(report: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """Whether any attack, or clean accuracy, is worse than in an earlier report."""
    keys = ("name", "access", "scope", "patch_size", "placement", "source", "target", "stride")
    before = {tuple(row[key] for key in keys): row for row in baseline["attacks"]}
    pairs = [(before[key], row) for row in report["attacks"] if (key := tuple(row[k] for k in keys)) in before]
    if not pairs:
        raise InputError("the baseline holds no attack that this report holds too; verify both with the same options")
    worse = []
    for old, new in pairs:
        low, high = _difference(new["asr"], new["n"], old["asr"], old["n"])
        if low > 0:
            worse.append(f"{_name(new)}: ASR {old['asr']:.1%} -> {new['asr']:.1%}, difference {low:+.1%} to {high:+.1%}")
    old, new = baseline["clean"]["engine"], report["clean"]["engine"]
    low, high = _difference(new["accuracy"], new["n"], old["accuracy"], old["n"])
    if high < 0:
        worse.append(f"clean accuracy {old['accuracy']:.1%} -> {new['accuracy']:.1%}, difference {low:+.1%} to {high:+.1%}")
    detail = "; ".join(worse) or f"none of {len(pairs)} attacks and not the clean accuracy is worse than in the baseline"
    return _switch("no_regression", len(worse), not worse, detail)


def _difference(new: float, new_n: int, old: float, old_n: int) -> tuple[float, float]:
    return difference(round(new * new_n), new_n, round(old * old_n), old_n)


def _name(attack: Mapping[str, Any]) -> str:
    return (
        f"{attack['name']}, {attack['access']} access, {attack['patch_size']} pixels, {attack['placement']} placement"
    )


def _number(rule: str, limit: float, figure: float, ci95: list[float], n: int, what: str) -> dict[str, Any]:
    high = rule.startswith("max_")
    advice = advise(round(figure * n), n, limit, maximum=high)
    return {"rule": rule, "limit": limit, "figure": figure, "ci95": list(ci95), "passed": advice.passed,
            "detail": f"{what}: {advice.sentence}"}  # fmt: skip


def _switch(rule: str, figure: object, passed: bool, detail: str) -> dict[str, Any]:
    return {"rule": rule, "limit": True, "figure": figure, "ci95": None, "passed": passed, "detail": detail}


def _survival(report: Mapping[str, Any]) -> str:
    found = report["survival"]
    if not found:
        return "survival was not measured: it needs the twin, and the twin needs torch"
    low, high = found["ci95"]
    return f"{found['verdict']}: ASR difference {found['delta_asr']:+.1%}, interval {low:+.1%} to {high:+.1%}"


def _trust(checks: list[Mapping[str, Any]]) -> dict[str, Any]:
    failed = [check["check"] for check in checks if check["passed"] is False]
    missing = [check["check"] for check in checks if check["passed"] is None]
    detail = "every check ran and passed"
    if failed or missing or not checks:
        parts = [f"failed: {', '.join(failed)}"] if failed else []
        parts += [f"not run: {', '.join(missing)}"] if missing else []
        detail = "; ".join(parts) or "no trust check ran"
    return _switch("require_trust", detail, bool(checks) and not failed and not missing, detail)
