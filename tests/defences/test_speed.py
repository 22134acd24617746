"""What is left to the machine, and what is not."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgeguard.defences.config import HardenConfig
from edgeguard.defences.speed import WORTH_COMPILING, has_bfloat16_units, settle
from edgeguard.errors import InputError, MissingDependency
from edgeguard.quant.view import compiler_missing
from edgeguard.quant.width import parse_widths

CONFIG = HardenConfig("qat", parse_widths("8,2"))
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(params=["g++", "c++", "clang++"])
def compiler(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One compiler on the search path and nothing else."""
    program = tmp_path / request.param
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize("wish", [True, False])
@pytest.mark.parametrize("passes", [1, WORTH_COMPILING])
def test_what_is_asked_for_is_done_without_a_word(compiler: None, wish: bool, passes: int) -> None:
    config, said = settle(CONFIG, wish, wish, None, passes, CPU)
    assert (config.amp, config.compiled, said) == (wish, wish, [])
    assert settle(CONFIG, wish, not wish, None, passes, CPU)[0].compiled is not wish


def test_long_runs_are_compiled(compiler: None) -> None:
    short, long = (settle(CONFIG, False, None, None, passes, CPU) for passes in (WORTH_COMPILING - 1, WORTH_COMPILING))
    assert (short[0].compiled, long[0].compiled) == (False, True)
    assert short[1] == long[1] == []


def test_without_a_compiler_long_runs_say_so(no_compiler: None) -> None:
    config, said = settle(CONFIG, False, None, None, WORTH_COMPILING, CPU)
    assert not config.compiled
    assert said == ["training is not compiled, and slower: no C++ compiler (g++ or clang++) is installed"]
    assert settle(CONFIG, False, None, None, WORTH_COMPILING - 1, CPU)[1] == []
    assert settle(CONFIG, False, False, None, WORTH_COMPILING, CPU)[1] == []


def test_compiling_without_a_compiler_is_refused(no_compiler: None) -> None:
    with pytest.raises(MissingDependency, match=r"--compile: no C\+\+ compiler.*--no-compile"):
        settle(CONFIG, False, True, None, 1, CPU)


def test_windows_compilers_are_not_looked_for(compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler_missing() is None
    monkeypatch.setattr(sys, "platform", "win32")
    assert "Windows" in str(compiler_missing())


@pytest.mark.parametrize(
    ("known", "units"),
    [({"amx_bf16": True}, True), ({"avx512_bf16": True, "amx_bf16": False}, True), ({"avx512_f": True}, False)],
)
def test_bfloat16_is_used_where_there_are_units_for_it(
    known: dict[str, bool], units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    config, said = settle(CONFIG, None, False, None, 1, CPU)
    assert config.amp is units
    assert [note.startswith("bfloat16 outside the quantizers") for note in said] == [True] * units
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert settle(CONFIG, None, False, None, 1, CPU)[0].amp is False


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_have_them_since_ampere(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert has_bfloat16_units(torch.device("cuda", 0)) is expected


def test_passes_are_recorded_where_they_are_compiled_on_one_gpu(compiler: None) -> None:
    long = WORTH_COMPILING
    assert settle(CONFIG, False, None, None, long, GPU)[0].cuda_graphs
    assert not settle(CONFIG, False, None, None, long - 1, GPU)[0].cuda_graphs
    assert not settle(CONFIG, False, None, False, long, GPU)[0].cuda_graphs
    assert not settle(CONFIG, False, None, None, long, CPU)[0].cuda_graphs
    assert not settle(CONFIG, False, None, None, long, GPU, world=2)[0].cuda_graphs
    assert not settle(replace(CONFIG, accumulate=2), False, None, None, long, GPU)[0].cuda_graphs


@pytest.mark.parametrize(
    ("changes", "compiled", "device", "world", "reason"),
    [
        ({}, True, CPU, 1, "on cpu, and only passes on a CUDA device"),
        ({}, False, GPU, 1, "use --compile"),
        ({}, True, GPU, 2, "train with one, or without --cuda-graphs"),
        ({"accumulate": 2}, True, GPU, 1, "--accumulate adds them up"),
    ],
)
def test_what_cannot_be_recorded_is_refused(
    changes: dict[str, int], compiled: bool, device: torch.device, world: int, reason: str, compiler: None
) -> None:
    with pytest.raises(InputError, match=f"--cuda-graphs: .*{reason}"):
        settle(replace(CONFIG, **changes), False, compiled, True, 1, device, world)


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="flags of the CPU are read from Linux")
def test_units_of_this_cpu_are_those_that_linux_names() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert has_bfloat16_units(CPU) is ("amx_bf16" in flags or "avx512_bf16" in flags)
