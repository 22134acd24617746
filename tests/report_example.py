"""Reports without running anything: one with every part, and one with as few as there can be."""

from __future__ import annotations

import base64
import copy
from typing import Any

import numpy as np

SURVIVAL = {
    "delta_asr": 0.01, "ci95": [-0.01, 0.03], "mcnemar_p": 0.5, "verdict": "undecided", "margin": 0.02, "n": 90,
    "bit_identical": False, "flips": {"both": 40, "engine_only": 3, "twin_only": 2, "neither": 45},
}  # fmt: skip


def encoded(*shape: int) -> str:
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return base64.b64encode(values.tobytes()).decode()


def named(label: int) -> dict[str, Any]:
    return {"class": label, "name": f"class {label}"}


def attack(asr: float, **changes: Any) -> dict[str, Any]:
    return {
        "name": "aqapa", "access": "engine", "scope": "universal", "patch_size": 6, "placement": "random", "seen": False,
        "asr": asr, "ci95": [max(asr - 0.05, 0), min(asr + 0.05, 1)], "robust_accuracy": 0.9 * (1 - asr), "robust_ci95": [0.1, 0.6],
        "robust_n": 100, "n": 90, "twin_asr": asr - 0.01, "queries": 1200, "steps": 300, "source": "4", "target": None,
        "places": 1, "stride": None, "patch": 0, "survival": copy.deepcopy(SURVIVAL), **changes,
    }  # fmt: skip


def rate(asr: float) -> dict[str, Any]:
    return {"asr": asr, "ci95": [max(asr - 0.05, 0), min(asr + 0.05, 1)], "n": 90}


def layer(name: str, op: str, apart: int) -> dict[str, Any]:
    return {
        "layer": name, "op": op, "clean": {"equal": 1.0, "steps": {"0": 4096}},
        "patched": {"equal": 1 - apart / 4096, "steps": {"0": 4096 - apart, **({"1": apart} if apart else {})}},
    }  # fmt: skip


def minimal_report(**changes: Any) -> dict[str, Any]:
    """What a machine without torch writes of an engine that died: one replayed patch, everything else null or empty."""
    report = example_report(
        status={"complete": False, "reason": "the engine failed at a replayed patch: it gave 9 logits"},
        attacks=[attack(0.1, name="replay", access="replay", seen=None, twin_asr=None, queries=0, steps=None, source=None,
                        survival=None)],
        aggregated=[], seen_unseen=[], survival=None, trust=[], heat_map=None, divergence=None, advice=[], gate=None,
        timing={"attacks": [1.5], "total": 2.0}, definitions={}, options={},
    )  # fmt: skip
    report["artifact"]["integer_mac_coverage"] = None
    report["clean"].update(twin=None, agreement=None, bit_identical=None, steps=None)
    report["data"]["crafting"] = None
    report["environment"]["command"] = []
    report["examples"] = {"attack": 0, "images": []}
    report["patches"] = report["patches"][:1]
    return {**report, **changes}


def example_report(**changes: Any) -> dict[str, Any]:
    """A report that has every part."""
    accuracy = {"accuracy": 0.9, "n": 100, "ci95": [0.83, 0.94]}
    image = {
        "index": 17, "height": 8, "width": 8, "pixels": encoded(3, 8, 8), "position": [1, 2], "label": named(3),
        "clean": named(3), "engine": named(5), "twin": named(4), "fooled": True,
    }  # fmt: skip
    report = {
        "schema": "edgeguard.report/1",
        "edgeguard": "0.1.0",
        "status": {"complete": True, "reason": None},
        "artifact": {
            "name": "resnet20-w4", "target": "ort", "width": "4", "weight_bits": 4, "activation_bits": 4,
            "num_classes": 10, "input_shape": [3, 8, 8], "source": {}, "files": {"model.onnx": "ab" * 32},
            "integer_mac_coverage": 1.0, "sha256": "cd" * 32,
        },
        "environment": {
            "versions": {"python": "3.11", "torch": None}, "platform": "Linux", "engine": {"runtime": "ort"},
            "threads": 1, "seed": 7, "command": ["edgeguard", "verify", "my model"],
        },
        "data": {
            "name": "digits", "sha256": "ef" * 32, "n": 100, "of": 300,
            "crafting": {"name": "digits", "sha256": "ef" * 32, "n": 200, "of": 300, "disjoint": True},
        },
        "options": {"steps": 300, "accesses": ["transfer", "engine"], "target": None},
        "definitions": {"asr": "ASR = P[engine(x_adv) != y | engine(x) = y]", "survival": "paired per image"},
        "clean": {"engine": accuracy, "twin": accuracy, "agreement": 0.99, "bit_identical": False,
                  "steps": {"0": 880, "1": 90, "3-4": 30}},
        "attacks": [
            attack(0.45),
            attack(0.3, access="transfer", patch=1, source="all widths"),
            attack(0.35, name="aqapa-per-image", scope="per-image", placement="optimized", patch=None, steps=40),
        ],
        "aggregated": [
            {
                "name": "aqapa", "patch_size": 6, "placement": "random", "asr": 0.3, "ci95": [0.25, 0.35], "n": 90,
                "source": "all widths", "surrogates": ["4", "all widths"],
            }
        ],
        "seen_unseen": [
            {"split": "size", "seen": rate(0.3), "unseen": rate(0.45)},
            {"split": "placement", "seen": rate(0.45), "unseen": rate(0.35)},
            {"split": "family", "seen": rate(0.45), "unseen": None},
            {"split": "width", "seen": None, "unseen": None},
        ],
        "survival": {**copy.deepcopy(SURVIVAL), "attack": 0},
        "trust": [
            {"check": "gradients_alive", "passed": True, "detail": "0.0% vanished"},
            {"check": "deterministic", "passed": None, "detail": "not run"},
        ],
        "heat_map": {
            "patch": 0, "stride": 1, "rows": [0, 1, 2], "columns": [0, 1], "n": 90,
            "asr": [[0.1, 0.2], [0.3, 0.45], [0.25, 0.0]],
        },
        "divergence": {
            "n": 32, "reason": None,
            "layers": [layer("conv1", "conv", 0), layer("layer1.0.conv2", "conv", 12), layer("fc", "linear", 30)],
            "first": {"clean": None, "patched": "layer1.0.conv2"}, "skipped": [],
            "undisturbed": {"clean": 1.0, "patched": 1.0},
        },
        "advice": ["max_asr: 200 images would decide it"],
        "timing": {"attacks": [12.5, 80.0, 3.25], "total": 101.5},
        "gate": {
            "passed": True,
            "rules": [
                {"rule": "max_asr", "limit": 0.6, "figure": 0.45, "ci95": [0.4, 0.5], "passed": True, "detail": "fine"}
            ],
        },
        "patches": [
            {"height": 6, "width": 6, "pixels": encoded(3, 6, 6), "mask": base64.b64encode(b"\1" * 36).decode(),
             "sha256": "01" * 32},
            {"height": 4, "width": 6, "pixels": encoded(3, 4, 6), "mask": base64.b64encode(b"\1\0" * 12).decode(),
             "sha256": "02" * 32},
        ],
        "examples": {"attack": 0, "images": [{**image, "index": index} for index in range(6)]},
    }  # fmt: skip
    return {**copy.deepcopy(report), **changes}
