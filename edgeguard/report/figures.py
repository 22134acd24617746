"""What a report comes down to, in words: shared by the terminal summary and the HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]

ATTACK_NAMES = {
    "aqapa": "A-QAPA", "aqapa-per-image": "A-QAPA per image", "gap": "GAP", "lavan": "LaVAN", "patch-rs": "Patch-RS",
    "replay": "Replay", "noise": "Random pixels",
}  # fmt: skip
ACCESS_NAMES = {
    "none": "no access, a baseline",
    "replay": "replay: a given patch",
    "transfer": "transfer: crafted on twins",
    "engine": "engine: values of the live engine, gradient of its twin",
    "query": "query: the outputs of the live engine, no gradient",
}
CHECK_NAMES = {
    "white_box_strongest": "White-box attacks are the strongest",
    "gradients_alive": "Gradients are alive",
    "softmax_unsaturated": "The softmax is not saturated",
    "large_patch_wins": "A large patch wins",
    "deterministic": "The engine is deterministic",
    "random_by_design": "The engine is random by design, and only so",
    "batch_one_agrees": "Batch 1 agrees with the deployed batch",
}


def percent(value: float | None, sign: bool = False) -> str:
    """A share as text; a dash for what was not measured."""
    if value is None:
        return "-"
    return f"{100 * value:+.1f} %" if sign else f"{100 * value:.1f} %"


def interval(ci95: Sequence[float] | None, sign: bool = False) -> str:
    """An interval of shares as text, in percent."""
    if ci95 is None:
        return "-"
    low, high = (f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}" for value in ci95)
    return f"{low} to {high} %"


def strongest(report: Report) -> Mapping[str, Any]:
    """The attack with the highest ASR."""
    attack: Mapping[str, Any] = max(report["attacks"], key=lambda row: float(row["asr"]))
    return attack


def weakest_robustness(report: Report) -> Mapping[str, Any]:
    """The attack that leaves the lowest robust accuracy."""
    attack: Mapping[str, Any] = min(report["attacks"], key=lambda row: float(row["robust_accuracy"]))
    return attack


def attack_name(attack: Mapping[str, Any]) -> str:
    """One attack in a few words."""
    name, size = ATTACK_NAMES.get(attack["name"], attack["name"]), attack["patch_size"]
    access = "" if attack["access"] in ("none", attack["name"]) else f", {attack['access']} access"
    named = attack["name"].endswith("per-image")
    own = ", a patch for each image" if attack["scope"] == "per-image" and not named else ""
    return f"{name}{access}{own}, {size}x{size}, {attack['placement']} placement"


def trust_counts(report: Report) -> tuple[int, int, int]:
    """Trust checks that passed, failed and did not run."""
    outcomes = [check["passed"] for check in report["trust"]]
    return outcomes.count(True), outcomes.count(False), outcomes.count(None)


def trust_sentence(report: Report) -> str:
    """How the trust checks came out, in one sentence."""
    passed, failed, missing = trust_counts(report)
    text = f"{passed} of {passed + failed} trust checks passed" if passed + failed else "no trust check ran"
    return f"{text}, {missing} did not run" if missing else text


def headline(report: Report) -> tuple[str, str]:
    """Verdict of the whole report: its mood (`good`, `bad` or `unknown`) and a sentence.

    Figures that failed a trust check come first, then a failed gate, then survival.
    """
    _, failed, _ = trust_counts(report)
    if not report["status"]["complete"]:
        return "bad", "Incomplete: the engine failed before the verification had ended"
    gate, survival = report["gate"], report["survival"]
    if failed:
        return "bad", f"Do not rely on these numbers: {failed} trust check{'s' * (failed > 1)} failed"
    if gate is not None and not gate["passed"]:
        broken = sum(not rule["passed"] for rule in gate["rules"])
        return "bad", f"The gate failed: {broken} of {len(gate['rules'])} rules are not met"
    verdict = survival["verdict"] if survival else None
    if verdict == "survived" and gate is not None:
        return "good", "The gate passed, and the engine is no easier to attack than its simulation"
    if verdict == "survived":
        return (
            "unknown",
            "Robustness survived the export; whether it is enough, the rates below say and no gate decides",
        )
    if verdict == "did not survive":
        return "bad", "Robustness did not survive: the engine is easier to attack than its simulation"
    if verdict == "undecided":
        return "unknown", "Undecided: too few images to say whether robustness survived"
    return "unknown", "Survival was not measured: there was no twin to compare with"


def model_line(report: Report) -> str:
    """Artifact, runtime and widths in one line."""
    artifact = report["artifact"]
    pool = artifact.get("pool")
    widths = f"{artifact['weight_bits']}-bit weights, {artifact['activation_bits']}-bit activations"
    if pool:
        drawn = (f"{width} ({percent(chance)})" for width, chance in zip(pool["widths"], pool["probabilities"], strict=True))
        widths = f"random precision: a pool of {', '.join(drawn)}, drawn for each batch"
    coverage = artifact["integer_mac_coverage"]
    integer = "integer share unknown" if coverage is None else f"{100 * coverage:.4g} % integer multiply-accumulates"
    remote = artifact.get("remote")
    if not remote:
        return f"{artifact['target']}, {widths}, {integer}"
    twin = f"compared with a twin of {widths}" if remote["twin"] else "without a twin"
    return f"remote engine at {remote['url']} ({remote['server']}), {twin}, {integer}"


def member_rates(attack: Mapping[str, Any]) -> str:
    """ASR of an attack on each member of a pool; empty for a single engine."""
    return ", ".join(f"{width}: {percent(share)}" for width, share in (attack.get("members") or {}).items())


def steps_sentence(report: Report) -> str:
    """How many clean logits of the engine lie how many steps of the last layer's integers from the twin's."""
    return steps_text(report["clean"]["steps"] or {})


def steps_text(steps: Mapping[str, int]) -> str:
    """Counts by the number of integer steps apart."""
    return ", ".join(f"{name}: {count}" for name, count in steps.items()) or "not measured"


def of_images(block: Mapping[str, Any]) -> str:
    """An accuracy with its count and interval."""
    return f"{percent(block['accuracy'])} of {block['n']} images, {interval(block['ci95'])}"


def seconds(value: float) -> str:
    """A duration in the unit that suits it."""
    if value < 60:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 3600 else f"{value / 3600:.1f} h"
