"""The comparison with ART: its two nets are one function, and what it prints is what was measured. ART is not needed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "art_comparison.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("art_comparison", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_help_needs_no_art(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["art_comparison.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 0
    assert "--settings-from" in capsys.readouterr().out
    assert "art" not in sys.modules


def test_prepared_net_is_the_published_one(script: ModuleType) -> None:
    from edgeguard.models import load_model

    model = load_model("resnet8", 10)
    generator = torch.Generator().manual_seed(0)
    for norm in model.module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            for values in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
                values.uniform_(0.5, 1.5, generator=generator)
    published, prepared = script.Net(model, False).eval(), script.Net(model, True).eval()
    images = torch.rand(4, 3, 32, 32, generator=generator) * 255
    leaf = images.clone().requires_grad_()
    logits = prepared(leaf)
    torch.testing.assert_close(logits, published(images), rtol=1e-4, atol=1e-3)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in prepared.modules())
    assert (prepared.shown, published.shown) == (4, 0)


def test_table_takes_medians_and_joins_seeds(script: ModuleType) -> None:
    def row(attack: str, seed: int, successes: int, rate: float, cpu: int = 2) -> dict[str, object]:
        return {"attack": attack, "size": 6, "seed": seed, "steps": 9, "asr": successes / 100, "successes": successes,
                "n": 100, "images_per_second": rate, "images_per_cpu_second": cpu * rate}  # fmt: skip

    rows = [row("aqapa", 0, 40, 300.0, 4), row("aqapa", 1, 50, 500.0, 4), row("art, published net", 0, 10, 100.0),
            row("art, published net", 1, 10, 50.0)]  # fmt: skip
    text = script.table(rows, {"prepared": [450.0]})
    assert "| aqapa | 6x6 | 9 | 45.0% | 40.0%, 50.0% | [38.3%, 51.9%], n = 200 |" in text
    assert "| aqapa | 400 | 1600 | 6.50x wall, 13.00x CPU |" in text
    assert "| prepared net alone | 450 | | |" in text
    assert "10.0%" not in text  # too few steps for its success rate to mean anything
