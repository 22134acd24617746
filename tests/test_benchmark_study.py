"""The study: its plan, its cache, an interrupted start, its page, and a miniature of the whole from end to end."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree as Xml

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("brevitas")

APART = 1
"""Of `DEFENCES`, the one that the tests train at each width alone."""
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from study import estimates, figures, goals, plots, training  # noqa: E402
from study.cells import Cache, Cell, digest  # noqa: E402
from study.grid import ATTACKS, DEFENCES, OURS, READY, Budget, Defence, Grid, ablations, ready_row  # noqa: E402
from study.planning import Data, Planner, parse_filters  # noqa: E402
from study.work import Place, compute, drive, environment, split_threads  # noqa: E402

from edgeguard import files, zoo  # noqa: E402
from edgeguard.errors import EdgeGuardError, InputError  # noqa: E402
from edgeguard.statistics import wilson  # noqa: E402

DATA = Data("1" * 64, "2" * 64, 1280, 500)
DIGITS = "resnet8-digits-qadtr"
"""A ready model of the embedded data."""
MINIATURE = [
    "--data", "digits", "--image-size", "16", "--model", "resnet8", "--widths", "4", "--passes", "40", "--max-steps", "60",
    "--harden", "--batch-size 32 --pretrain-epochs 2 --eval-limit 20", "--no-ablations", "--limit", "40",
    "--query-limit", "20", "--steps", "4", "--attack-batch", "20", "--craft-limit", "60", "--queries", "30",
]  # fmt: skip


def load(name: str) -> ModuleType:
    """A script beside the package of the same name."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script, report = load("study"), load("study_report")


def defences() -> tuple[Defence, ...]:
    """Those of the study, one of them trained at each width alone."""
    return tuple(dataclasses.replace(one, apart=number == APART) for number, one in enumerate(DEFENCES))


def small(**changes: Any) -> Grid:
    kept = ("aqapa-6", "aqapa-8-corners", "patch-rs-8", "per-image-8")
    attacks = tuple(spec for spec in ATTACKS if spec.name in kept)
    return Grid(**{"model": "resnet8", "data": "digits", "image_size": 16, "widths": ("8", "2"), "surrogates": ("8",),
                   "attacks": attacks, "defences": defences(), **changes})  # fmt: skip


def planner(tmp_path: Path, grid: Grid, data: Data = DATA) -> Planner:
    return Planner(grid, Cache(tmp_path), data)


def fill(cache: Cache, made: Planner, success: dict[str, int] | None = None) -> None:
    """Finish every cell with plausible results. success: fooled images of 100 by defence."""
    while todo := [cell for cell in made.cells() if not cache.has(cell) and all(map(cache.has, cell.needs))]:
        for cell in todo:
            cache.write(cell, example(cell, (success or {}).get(cell.defence, 50)), 10.0, ENVIRONMENT)


ENVIRONMENT = {"versions": {"python": "3"}, "machine": "x86_64", "cpu_flags": ["avx2"], "threads": 1, "cuda": None}


def example(cell: Cell, fooled: int) -> dict[str, Any]:
    if cell.kind == "train":
        return {
            "checkpoint_sha256": digest("train", cell.inputs),
            "steps": 80,
            "epochs": 4,
            "passes_per_batch": 2.0,
            "metrics": {},
        }
    if cell.kind == "export":
        return {"integer_mac_coverage": 1.0, "identical_to_reference": True, "file_bytes": 70_000 + int(cell.width),
                "patch_sizes": None if cell.defence == "qat" else [6]}  # fmt: skip
    if cell.kind == "certificate":
        one = {"accuracy": 0.5, "correct": 50, "ci95": [0.4, 0.6]}
        return {"n": 100, "certified": one, "defended": one, "clean": one}
    if cell.kind == "accuracy":
        return {"accuracy": 0.916, "successes": 458, "n": 500, "ci95": [0.9, 0.93]}
    if cell.kind == "craft":
        return {"size": 6}
    flags = np.arange(120) < 100
    return {"asr": fooled / 100, "successes": fooled, "n": 100, "ci95": [0.0, 1.0], "source": cell.width, "judged": 120,
            "rows": [{}], "robust_accuracy": 0.4, "eligible": np.packbits(flags).tobytes().hex(),
            "fooled": np.packbits(np.arange(120) < fooled).tobytes().hex()}  # fmt: skip


# --- the grid and its plan


def test_every_cell_comes_after_what_it_needs_and_once(tmp_path: Path) -> None:
    cells = planner(tmp_path, small(ablations=ablations())).cells()
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    for number, cell in enumerate(cells):
        assert {need.name for need in cell.needs} <= set(names[:number])
    by_kind = {kind: [cell for cell in cells if cell.kind == kind] for kind in ("train", "export", "craft", "attack")}
    assert [cell.name for cell in by_kind["train"]][:3] == ["train.qat.s0.w8-2", "train.pbat.s0.w8", "train.pbat.s0.w2"]
    assert len([cell for cell in by_kind["export"] if cell.defence == "qat"]) == 2
    universal = next(cell for cell in cells if cell.name == "attack.qat.s0.w2.aqapa-6")
    assert [need.name for need in universal.needs[1:]] == ["craft.qat.s0.w2.a-qapa-6", "craft.qat.s0.w8.a-qapa-6"]
    ours = {cell.attack for cell in by_kind["attack"] if cell.defence == "no-distillation"}
    assert ours == {"patch-rs-8", "per-image-8"}
    assert not [cell for cell in cells if cell.kind == "certificate" and cell.defence == "no-distillation"]


def test_defences_get_equal_passes(tmp_path: Path) -> None:
    grid = small(passes=52)
    made = planner(tmp_path, grid)
    for defence in grid.defences:
        argv = made.argv(defence, 3, "8,2")
        epochs = int(argv[argv.index("--epochs") + 1])
        assert epochs * defence.passes <= 52 < (epochs + 1) * defence.passes
        assert argv[argv.index("--seed") + 1] == "3"
    assert small(passes=1).epochs(next(one for one in DEFENCES if one.name == OURS)) == 1


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"passes": 48}, {"train"}),
        ({"max_steps": 5}, {"train"}),
        ({"extra": ("--lr", "0.1")}, {"train"}),
        ({"image_size": 32}, {"train"}),
        ({"budget": Budget(limit=77)}, {"attack"}),
        ({"budget": Budget(per_image_limit=77)}, {"attack"}),
        ({"budget": Budget(query_limit=77)}, {"attack"}),
        ({"budget": Budget(per_image_steps=77)}, {"attack"}),
        ({"budget": Budget(per_image_restarts=77)}, {"attack"}),
        ({"budget": Budget(lavan_steps=77)}, {"attack"}),
        ({"budget": Budget(queries=77)}, {"attack"}),
        ({"budget": Budget(stride=7)}, {"attack"}),
        ({"budget": Budget(steps=77)}, {"craft", "attack"}),
        ({"budget": Budget(attack_batch=77)}, {"craft", "attack"}),
        ({"budget": Budget(restarts=7)}, {"craft", "attack"}),
        ({"budget": Budget(craft_limit=77)}, {"craft", "attack"}),
        ({"budget": Budget(certificate_limit=77)}, {"certificate"}),
        ({"budget": Budget(certificate_size=7)}, {"certificate"}),
        ({"budget": Budget(certificate_masks=7)}, {"certificate"}),
    ],
)
def test_a_setting_renews_exactly_the_cells_that_depend_on_it(
    tmp_path: Path, changes: dict[str, Any], kinds: set[str]
) -> None:
    base = small(attacks=ATTACKS, defences=DEFENCES[:1])
    cache = Cache(tmp_path)
    fill(cache, planner(tmp_path, base))
    changed = planner(tmp_path, dataclasses.replace(base, **changes))
    missing = {cell.kind for cell in changed.cells() if cell.key is not None and not cache.has(cell)}
    assert missing == kinds


def test_data_and_weights_are_inputs(tmp_path: Path) -> None:
    cache, grid = Cache(tmp_path / "cells"), small(defences=DEFENCES[:1])
    fill(cache, Planner(grid, cache, DATA))
    other = Planner(grid, cache, dataclasses.replace(DATA, test_sha256="3" * 64))
    assert not [cell for cell in other.cells() if cache.has(cell)]
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")
    with_weights = Planner(dataclasses.replace(grid, weights=weights), cache, DATA)
    assert not [cell for cell in with_weights.cells() if cache.has(cell)]


def test_filters_keep_what_the_wanted_cells_need(tmp_path: Path) -> None:
    grid = small(seeds=(0, 1))
    filters = parse_filters(["defence=qat", "width=2", "attack=aqapa-6", "seed=1"], grid)
    names = [cell.name for cell in planner(tmp_path, grid).cells(filters)]
    assert names == [
        "train.qat.s1.w8-2", "export.qat.s1.w2", "craft.qat.s1.w2.a-qapa-6", "export.qat.s1.w8", "craft.qat.s1.w8.a-qapa-6",
        "attack.qat.s1.w2.aqapa-6",
    ]  # fmt: skip
    clean = planner(tmp_path, grid).cells(parse_filters(["attack=accuracy"], grid))
    assert {cell.kind for cell in clean} == {"train", "export", "accuracy"}


@pytest.mark.parametrize("text", ["defence=none", "width=7", "attack=all", "seed=5", "colour=red", "width"])
def test_filters_name_what_there_is(text: str) -> None:
    with pytest.raises(InputError, match=r"there are|expected"):
        parse_filters([text], small())


@pytest.mark.parametrize(
    "changes",
    [{"surrogates": ("5",)}, {"seeds": ()}, {"passes": 0}, {"defences": (DEFENCES[0], DEFENCES[0])}, {"widths": ("x",)}],
)  # fmt: skip
def test_bad_grids_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        small(**changes)
    with pytest.raises(InputError, match="at least 1"):
        Budget(limit=0)


def test_options_are_held_against_the_command_line() -> None:
    training.check_options(small(extra=("--batch-size", "32")), [DEFENCES[0]])
    wrong = Defence("other", "Other", ("--method", "qat", "--no-such-option", "1"))
    with pytest.raises(InputError, match=r"other: .*--no-such-option"):
        training.check_options(small(), [wrong])


# --- the cache


def test_a_cell_is_taken_only_for_its_own_inputs(tmp_path: Path) -> None:
    cache, cell = Cache(tmp_path), Cell("accuracy", "qat", 0, "4", inputs={"a": 1})
    assert not cache.has(cell)
    with pytest.raises(InputError, match="not computed yet"):
        cache.read(dataclasses.replace(cell, inputs=None))
    cache.write(cell, {"n": 1}, 1.5, {})
    assert cache.read(cell)["result"] == {"n": 1}
    assert not cache.has(dataclasses.replace(cell, inputs={"a": 2}))
    path = cache.path(cell)
    assert path is not None
    document = json.loads(path.read_text())
    document["inputs"] = {"a": 2}
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="delete it"):
        cache.read(cell)
    path.write_text("{}")
    with pytest.raises(InputError, match="not a cell"):
        cache.read(cell)


def test_a_training_without_checkpoint_starts_again_and_one_with_goes_on(tmp_path: Path) -> None:
    trainer = training.Trainer(small(), tmp_path, tmp_path / "models", "cpu", 1)
    cell = planner(tmp_path, small()).cells()[0]
    folder = trainer.folder(cell)
    first = trainer.command(cell)
    assert first[1:4] == ["harden", "--model", "resnet8"]
    assert first[-2:] == ["--out", str(folder)]
    assert first[-6:-2] == ["--device", "cpu", "--threads", "1"]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert trainer.command(cell) == first
    assert not folder.exists()
    folder.mkdir()
    (folder / "checkpoint.safetensors").write_bytes(b"")
    assert trainer.command(cell)[1:4] == ["harden", "--resume", str(folder)]


def test_a_ready_model_is_judged_instead_of_trained(tmp_path: Path) -> None:
    row = ready_row(DIGITS)
    grid = small(defences=(row,), image_size=None, widths=("8", "4", "3"), surrogates=("8",), seeds=(0, 1), attacks=ATTACKS)
    place = Place(grid, tmp_path / "cells", tmp_path / "work", "cpu", 1)
    cells = place.planner().cells({"attack": ("accuracy", "per-image-8", "patch-rs-8")})
    training = [cell for cell in cells if cell.kind == "train"]
    assert len(training) == 1  # of one seed
    assert place.trainer.model(training[0]) == zoo.MODELS / DIGITS
    compute(place, training[0])
    result = place.cache.read(training[0])["result"]
    assert result["checkpoint_sha256"] == files.sha256(zoo.MODELS / DIGITS / "checkpoint.safetensors")
    limits = {cell.width: cell.inputs["limit"] for cell in place.planner().cells() if cell.attack == "per-image-8"}
    assert limits == {"8": 1000, "4": 1000, "3": 300}
    assert grid.images(next(spec for spec in ATTACKS if spec.name == "patch-rs-8"), row, "8") == 300
    other = planner(tmp_path, small(defences=(row,)))
    with pytest.raises(InputError, match="made for other data"):
        other.cells()


def test_a_failed_training_says_what_it_said(tmp_path: Path) -> None:
    grid = small(defences=(Defence("bad", "Bad", ("--max-steps", "many")),))
    place = Place(grid, tmp_path / "cells", tmp_path / "work", "cpu", 1)
    cell = place.planner().cells()[0]
    with pytest.raises(EdgeGuardError, match=r"--max-steps many .* ended with 2: .*integer"):
        compute(place, cell)
    assert not place.cache.has(cell)


# --- estimates


def test_estimates_scale_with_what_was_measured(tmp_path: Path) -> None:
    grid = small(attacks=ATTACKS, defences=DEFENCES[:1])
    cache = Cache(tmp_path)
    fill(cache, planner(tmp_path, grid))
    side = (16, 16)
    cells = {cell.name: cell for cell in planner(tmp_path, grid).cells()}
    measured = estimates.Estimator(grid, DATA, side, cache.documents())
    patch_rs = cells["attack.qat.s0.w2.patch-rs-8"]
    assert measured.seconds(patch_rs) == pytest.approx(10)
    twice = dataclasses.replace(patch_rs, inputs={**patch_rs.inputs, "limit": 2 * patch_rs.inputs["limit"]})
    assert measured.seconds(twice) == pytest.approx(20)
    train = cells["train.qat.s0.w8-2"]
    assert measured.steps(grid.defences[0]) == 24 * (1280 // 128)
    assert measured.seconds(train) == pytest.approx(10 * 240 / 80)
    both = small(attacks=ATTACKS, defences=DEFENCES[:2])  # of the second, nothing is measured
    other = {cell.name: cell for cell in planner(tmp_path, both).cells()}["train.pbat.s0.w8-2"]
    steps = measured.steps(both.defences[1])
    by_passes = estimates.Estimator(both, DATA, side, cache.documents(), estimates.Rates(1e6, 1e6, 1, 1, 1))
    assert by_passes.seconds(other) == pytest.approx(10 / 80 * both.defences[1].passes * steps)
    nothing = estimates.Estimator(grid, DATA, side, [])
    assert all(nothing.seconds(cell) is None for cell in cells.values())
    rates = estimates.Rates(start=5, per_pass=0.5, export=2, answers=1000, gradients=100)
    calibrated = estimates.Estimator(grid, DATA, side, [], rates)
    assert calibrated.seconds(train) == pytest.approx(5 + 0.5 * 240)
    assert calibrated.seconds(cells["export.qat.s0.w2"]) == 2
    assert calibrated.seconds(cells["accuracy.qat.s0.w2"]) == pytest.approx(0.5)
    unknown = {cell.name: cell for cell in planner(tmp_path / "empty", grid).cells()}
    for name, cell in cells.items():
        assert calibrated.seconds(unknown[name]) == pytest.approx(calibrated.seconds(cell)), name
    fewer = dataclasses.replace(grid, max_steps=7, extra=("--batch-size", "64"))
    assert estimates.Estimator(fewer, DATA, side, []).steps(grid.defences[0]) == 7
    assert estimates.duration(59) == "59 s"
    assert estimates.duration(600) == "10 min"
    assert estimates.duration(9000) == "2.5 h"


@pytest.mark.slow
def test_a_plan_calibrates_where_nothing_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*MINIATURE, "--work", str(tmp_path / "work"), "--results", str(tmp_path / "cells"), "--plan"]
    assert script.run([*command, "--only", "defence=qat"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 22
    assert all("  about " in line for line in lines[:-1])
    assert lines[-1].startswith("21 cells to do, about ")
    kept = files.read_json(tmp_path / "work" / "calibration.json")["rates"]
    assert all(value > 0 for value in kept.values())
    assert not (tmp_path / "cells" / "train").exists()


def test_threads_are_shared_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert split_threads(1) == 0
    assert os.environ["OMP_NUM_THREADS"] == "9"
    assert split_threads(3) == 2
    assert os.environ["OMP_NUM_THREADS"] == "2"


# --- the page


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A finished study of made-up results, in which QADT-R is fooled on 20 of 100 images and the others on more."""
    grid = small(widths=("8", "4"), surrogates=("8",), seeds=(0, 1), ablations=ablations(), attacks=ATTACKS,
                 defences=(*defences(), ready_row(DIGITS)), image_size=None)  # fmt: skip
    place = Place(grid, tmp_path / "cells", tmp_path / "work")
    fooled = {"qat": 90, "pbat": 28, "dwq": 60, "dwq-4-16": 60, "triqdef": 40, OURS: 20, READY: 45}
    fill(place.cache, place.planner(), fooled)
    script.write_index(place)
    return place.results


def test_the_page_tells_every_table(results: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.md"
    notes.write_text("The weather was not reproduced.\n")
    page = report.run(["--results", str(results), "--notes", str(notes), "--out", str(tmp_path / "docs")])
    text = page.read_text()
    low, high = wilson(40, 200)
    assert f"20.0 [{100 * low:.1f}, {100 * high:.1f}], n = 200, seeds 20.0 to 20.0" in text
    assert "| against DWQ | -40.0 [" in text
    assert "| QAT, no defence | 1 | 4 | 2.00 | 8.0 | 10 | 1.00 |" in text
    assert "| PBAT | 2 | 4 | 2.00 | 16.0 | 20 | 2.00 |" in text
    assert "| without distillation | +30.0 [" in text, "50 instead of 20 of the same 100 images"
    assert "The weather was not reproduced." in text
    assert "Not measured\n" not in text
    assert "at least 25 points below DWQ on every unseen configuration and width | -40.0 points" in text
    missed = next(line for line in text.splitlines() if "below PBAT on every unseen" in line)
    assert missed.endswith("14 of 14 comparisons miss it | **not reached** |")
    for name in ("study-asr-8.svg", "study-asr-4.svg", "study-per-image.svg"):
        assert f"(images/{name})" in text
        drawing = Xml.fromstring((tmp_path / "docs" / "images" / name).read_text())
        assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in (tmp_path / "docs" / "images" / name).read_text()
    assert (
        report.run(["--results", str(results), "--notes", str(notes), "--out", str(tmp_path / "docs")]).read_text()
        == text
    )


def test_goals_are_reached_missed_or_open(results: Path) -> None:
    study = figures.Study.load(results)
    found = {goal.text: goal for goal in goals.goals(study)}
    verdicts = {text: goal.reached for text, goal in found.items()}
    assert verdicts["clean accuracy of QADT-R at 8 bits at least 91.5%"] is True
    assert verdicts["clean accuracy of QADT-R at 2 bits at least 87.0%"] is None
    assert verdicts["clean accuracy of QADT-R within 1 point of QAT at every width"] is True
    assert verdicts["ASR of QADT-R at least 25 points below DWQ on every unseen configuration and width"] is True
    assert verdicts["ASR of QADT-R at least 10 points below PBAT on every unseen configuration and width"] is False
    assert verdicts["ASR of QADT-R below PBAT under Patch-RS at every width"] is True
    text = "ASR of the ready QADT-R model under A-QAPA per image {0}x{0} at 8 bits at most {1}%, on 1,000 images"
    few = found[text.format(8, 50)]
    assert few.reached is None
    assert "only 120 images judged" in few.figure
    assert verdicts[text.format(5, 30)] is False
    best = "QADT-R the best of all defences under A-QAPA per image 5x5 at every width, at an equal budget"
    assert verdicts[best] is True


def test_differences_are_of_the_images_that_count_for_both(results: Path) -> None:
    study = figures.Study.load(results)
    found = study.difference(OURS, "qat", "8", "aqapa-6")
    assert found is not None
    assert (found.value, found.n) == (pytest.approx(-0.7), 200)
    assert found.ci95[0] < -0.7 < found.ci95[1]
    assert study.gap(OURS, "pbat", "4", "lavan-8") == pytest.approx(-0.08)
    assert study.gap(OURS, "nobody", "4", "lavan-8") is None
    assert study.difference(OURS, "nobody", "4", "lavan-8") is None


def test_engines_are_compared_on_the_images_that_were_judged_of_both() -> None:
    def judged(count: int, fooled: int) -> dict[str, Any]:
        flags = {"eligible": np.arange(count) >= 0, "fooled": np.arange(count) < fooled}
        return {"seed": 0, "result": {"judged": count, **{k: np.packbits(v).tobytes().hex() for k, v in flags.items()}}}

    cells = {("attack", "a", "8", "x"): [judged(300, 60)], ("attack", "b", "8", "x"): [judged(100, 20)]}
    found = figures.Study({}, cells, ()).difference("a", "b", "8", "x")
    assert found is not None
    assert (found.n, found.value) == (100, pytest.approx(0.4))


def test_a_page_needs_a_study(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        report.run(["--results", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(InputError, match="not reproduced"):
        report.run(["--notes", str(tmp_path / "none.md"), "--out", str(tmp_path)])
    place = Place(small(), tmp_path / "cells", tmp_path / "work")
    script.write_index(place)
    with pytest.raises(InputError, match="no cell of the study is finished"):
        report.run(["--results", str(place.results), "--out", str(tmp_path)])
    assert figures.Study.load(place.results).missing[0] == "train.qat.s0.w8-2"
    assert plots.plots(figures.Study.load(place.results)) == {}


# --- all of it


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of one defence that was killed while it trained, and started again."""
    folder = tmp_path_factory.mktemp("study")
    command = [*MINIATURE, "--work", str(folder / "work"), "--results", str(folder / "cells")]
    only = ["--only", "defence=qat", "--only", "attack=aqapa-8,patch-rs-8,accuracy"]
    killed = subprocess.Popen(
        [sys.executable, str(BENCHMARKS / "study.py"), *command, *only], stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 900
        while not (found := list(folder.glob("work/runs/*/checkpoint.safetensors"))):
            assert killed.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    config = found[0].with_name("config.json")
    before = config.stat().st_ino
    assert not list(folder.glob("cells/train/*.json"))
    assert script.run([*command, *only]) == 6
    assert config.stat().st_ino == before, "the training did not go on, it began anew"
    return folder


@pytest.mark.slow
def test_an_interrupted_study_goes_on(miniature: Path) -> None:
    documents = {document["kind"]: document for document in Cache(miniature / "cells").documents()}
    assert documents["train"]["result"]["steps"] == 60
    clock = files.read_json(next(miniature.glob("work/runs/*.json")))
    assert clock["finished"]
    assert documents["train"]["seconds"] == clock["seconds"]
    assert documents["export"]["result"]["integer_mac_coverage"] == 1.0
    assert documents["export"]["result"]["identical_to_reference"] is True
    assert documents["accuracy"]["result"]["accuracy"] > 0.3
    assert documents["accuracy"]["result"]["n"] == 360
    (packed,) = miniature.glob("cells/models/*")
    assert documents["train"]["result"]["checkpoint_sha256"] == files.sha256(packed / "checkpoint.safetensors")
    run = next(miniature.glob("work/runs/*/checkpoint.safetensors"))
    assert (packed / "checkpoint.safetensors").stat().st_size < run.stat().st_size
    assert str(miniature) not in (packed / "config.json").read_text()
    assert environment(Place(small(), miniature, miniature))["versions"]["onnxruntime"]


def test_a_second_start_does_nothing_and_only_what_is_new_is_done(
    miniature: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*MINIATURE, "--work", str(miniature / "work"), "--results", str(miniature / "cells")]
    only = ["--only", "defence=qat", "--only", "attack=aqapa-8,patch-rs-8,accuracy"]
    assert script.run([*command, *only]) == 0
    assert script.run([*command, *only, "--plan"]) == 0
    assert "0 cells to do" in capsys.readouterr().out
    assert script.run([*command, *only, "--queries", "40", "--plan"]) == 0
    plan = capsys.readouterr().out
    assert "attack.qat.s0.w4.patch-rs-8  about" in plan
    assert "1 cells to do" in plan
    index = files.read_json(miniature / "cells" / "index.json")
    assert sum(entry["file"] is not None for entry in index["cells"]) == 6


@pytest.mark.slow
def test_every_attack_is_judged_by_workers(miniature: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    args = script.arguments([*MINIATURE, "--per-image-limit", "12", "--per-image-steps", "3", "--lavan-steps", "5",
                             "--certificate-limit", "5", "--data", "digits", "--work", str(miniature / "work")])  # fmt: skip
    place = Place(script.grid_of(args), miniature / "cells", (miniature / "work").resolve(), "cpu", 1)
    said: list[str] = []
    count = drive(place, {"defence": ("qat",)}, 2, said.append, lambda: None)
    found = {document["attack"]: document for document in place.cache.documents() if document["kind"] == "attack"}
    assert set(found) == {spec.name for spec in ATTACKS if "4" in (spec.widths or "4")}
    assert count == 15
    assert len(said) == 2 * count
    for name in ("lavan-8", "per-image-8", "per-image-5", "patch-rs-8"):
        assert found[name]["result"]["n"] <= (20 if name == "patch-rs-8" else 12)
    long = found["per-image-8-long"]["inputs"]
    assert (long["steps"], long["restarts"], long["limit"]) == (100, 6, 12)
    results = {name: document["result"] for name, document in found.items()}
    assert results["per-image-8-long"]["asr"] >= results["per-image-8"]["asr"]
    assert results["per-image-8"]["asr"] >= results["per-image-5"]["asr"]
    assert (
        results["aqapa-8-worst"]["asr"]
        >= results["aqapa-8-corners"]["asr"]
        >= results["aqapa-8-corners"]["mean_over_corners"]
    )
    assert results["aqapa-8-worst"]["places"] == 9
    assert results["patch-rs-8"]["queries"] > 0
    assert results["per-image-8"]["gradients"] > 0
    assert {row["source"] for row in results["aqapa-6"]["rows"]} == {"4"}
    assert found["noise-8"]["environment"]["threads"] == 1
    script.write_index(place)
    study = figures.Study.load(place.results)
    share = study.asr("qat", "4", "aqapa-8")
    assert share is not None
    assert share.successes == results["aqapa-8"]["successes"]


def test_an_engine_is_made_again_from_the_results_and_says_so_when_it_cannot(miniature: Path, tmp_path: Path) -> None:
    results = tmp_path / "cells"
    shutil.copytree(miniature / "cells", results)
    command = [*MINIATURE, "--work", str(tmp_path / "empty"), "--results", str(results), "--only", "defence=qat"]
    assert script.run([*command, "--only", "attack=noise-8", "--limit", "41"]) == 1
    shutil.rmtree(results / "models")
    shutil.rmtree(tmp_path / "empty")
    with pytest.raises(InputError, match=r"is not at .*models.*; delete .*train.*json to train it again"):
        script.run([*command, "--only", "attack=noise-8", "--limit", "42"])
