"""The program from outside: exit codes, one JSON document on stdout, one sentence on stderr."""

import json
import shutil

import numpy as np
import pytest

import edgeguard
from edgeguard.files import sha256

FAST = ["--budget", "quick", "--steps", "5", "--limit", "40", "--patch-size", "4"]


def fails(done, code, *words):
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("edgeguard: "), done.stderr
    for word in words:
        assert word in last
    assert done.stdout == ""


def test_help_names_the_commands(program):
    done = program("--help")
    assert done.returncode == 0
    for command in ("harden", "export", "verify", "inspect", "demo"):
        assert command in done.stdout


def test_version(program):
    assert program("--version").stdout.strip() == edgeguard.__version__


def test_inspect_json(program, workspace):
    done = program("inspect", "a2", "--json")
    document = json.loads(done.stdout)
    assert document["schema"] == "edgeguard.inspect/1"
    assert (document["target"], document["weight_bits"], document["activation_bits"]) == ("ort", 2, 2)
    assert document["integer_mac_coverage"] == 1.0
    assert document["macs"] == sum(layer["macs"] for layer in document["layers"])
    assert [layer["storage_bits"] for layer in document["layers"]] == [8, 2, 2, 2, 2, 2, 2, 8]
    assert {layer["compute_bits"] for layer in document["layers"]} == {8}
    assert set(document["layers"][0]) == {"name", "op", "macs", "storage_bits", "compute_bits", "kernel"}
    table = program("inspect", "a2").stdout
    assert all(layer["name"] in table for layer in document["layers"])


def test_verify_writes_json_and_page(program, workspace, tmp_path):
    out = tmp_path / "report"
    done = program("verify", "a8", *FAST, "--placement", "random,worst", "--stride", "6", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((out / "report.json").read_text())
    assert report["schema"] == "edgeguard.report/1"
    assert report["clean"]["bit_identical"] is True
    assert report["clean"]["agreement"] == 1.0
    assert report["artifact"]["sha256"] == sha256(workspace / "a8" / "manifest.json")
    cells = {(row["access"], row["placement"]) for row in report["attacks"]}
    assert {("transfer", "random"), ("transfer", "worst"), ("engine", "random"), ("engine", "worst")} <= cells
    for row in report["attacks"]:
        low, high = row["ci95"]
        assert low <= row["asr"] <= high
        assert row["asr"] == row["twin_asr"]
    assert "<html" in (out / "report.html").read_text()


def test_summary_for_people(program, tmp_path):
    done = program("verify", "a8", *FAST, "--access", "engine", "--out", tmp_path / "report")
    assert "ASR" in done.stdout
    assert "P[engine(x_adv) != y | engine(x) = y]" in done.stdout
    assert str(tmp_path / "report" / "report.html") in done.stdout


def test_gate_decides_the_exit_code(program, tmp_path):
    (tmp_path / "strict.toml").write_text("max_asr = 0.0\nmin_clean_accuracy = 0.999\nrequire_integer = true\n")
    (tmp_path / "lax.toml").write_text("max_asr = 1.0\nrequire_integer = true\nrequire_survival = true\n")
    strict = program("verify", "a8", *FAST, "--gate", tmp_path / "strict.toml", "--out", tmp_path / "s", "--json")
    assert strict.returncode == 1
    assert "gate failed" in strict.stderr
    assert json.loads(strict.stdout)["gate"]["passed"] is False
    lax = program("verify", "a8", *FAST, "--gate", tmp_path / "lax.toml", "--out", tmp_path / "l", "--json")
    assert lax.returncode == 0, lax.stderr
    assert json.loads(lax.stdout)["gate"]["passed"] is True


def test_replay_of_a_training_patch(program, workspace, tmp_path):
    patch = sorted((workspace / "run" / "patches").glob("4x4-*.npz"))[0]
    done = program("verify", "a2", "--patch", patch, "--limit", "60", "--out", tmp_path / "r", "--json")
    assert done.returncode == 0, done.stderr
    assert {row["access"] for row in json.loads(done.stdout)["attacks"]} == {"replay"}


def test_surrogates_give_an_aggregated_rate(program, tmp_path):
    done = program("verify", "a2", *FAST, "--access", "transfer", "--surrogate", "a8", "--out", tmp_path / "r", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rates = {row["source"]: row["asr"] for row in report["attacks"] if row["access"] == "transfer"}
    assert rates.keys() == {"2", "8", "all widths"}
    assert report["aggregated"][0]["asr"] == max(rates.values())


def test_the_same_command_gives_the_same_bytes(program, tmp_path):
    for name in ("one", "two"):
        assert program("export", "run", "--bits", "2", "--out", tmp_path / name).returncode == 0
    for file in ("manifest.json", "model.onnx", "graph.npz"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_default_output_folders_count_up(program, workspace, tmp_path):
    for expected in ("run-ort-8", "run-ort-8-2"):
        done = program("export", workspace / "run", "--bits", "8", "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["artifact"] == f"runs/{expected}"


def test_options_from_a_file(program, tmp_path):
    (tmp_path / "v.toml").write_text('budget = "quick"\nsteps = 3\nlimit = 30\npatch-size = "3"\naccess = "engine"\n')
    done = program("verify", "a8", "--config", tmp_path / "v.toml", "--limit", "20", "--out", tmp_path / "r", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["options"]["steps"] == 3
    assert report["clean"]["engine"]["n"] == 20
    (tmp_path / "bad.toml").write_text("stepz = 3\n")
    fails(program("verify", "a8", "--config", tmp_path / "bad.toml"), 2, "'stepz' is not an option")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "run", "--bits", "17"], ["bit-width 17"]),
        (["export", "run", "--bits", "4"], ["not trained at 4 bits", "8, 2"]),
        (["export", "run", "--bits", "4,,2"], ["not a bit-width"]),
        (["export", "run", "--bits", "8", "--out", "a8"], ["a8 exists already"]),
        (["export", "missing", "--bits", "8"], ["missing is not a run"]),
        (["export", "run", "--bits", "8", "--target", "tpu"], ["unknown target 'tpu'"]),
        (["harden", "--bits", "4,,2"], ["empty entry"]),
        (["harden", "--bits", "17"], ["bit-width 17"]),
        (["harden", "--method", "magic"], ["unknown method 'magic'"]),
        (["harden", "--weights", "missing.safetensors"], ["missing.safetensors does not exist"]),
        (["harden", "--data", "imagefolder:empty"], ["empty"]),
        (["harden", "--patch-sizes", "5,x"], ["not a comma-separated list"]),
        (["harden", "--patch-sizes", "40"], ["larger than the image"]),
        (["harden", "--resume", "a8"], ["is not a run"]),
        (["harden", "--out", "run"], ["run exists already"]),
        (["verify", "run"], ["not an artifact"]),
        (["verify", "a8", "--patch-size", "33"], ["larger than the image"]),
        (["verify", "a8", "--attack", "magic"], ["unknown attack 'magic'"]),
        (["verify", "a8", "--access", "oracle"], ["oracle"]),
        (["verify", "a8", "--gate", "missing.toml"], ["missing.toml"]),
        (["verify", "a8", "--data", "npz:labels.npz"], ["label", "classes"]),
        (["verify", "a8", "--out", "a2"], ["a2 exists already"]),
        (["inspect", "run"], ["not an artifact"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_sentence(program, workspace, arguments, words):
    (workspace / "empty").mkdir(exist_ok=True)
    images = np.zeros((12, 16, 16, 3), np.uint8)
    np.savez(workspace / "labels.npz", images=images, labels=np.arange(12))
    fails(program(*arguments), 2, *words)


def test_an_altered_artifact_is_refused(program, workspace, tmp_path):
    copy = tmp_path / "altered"
    shutil.copytree(workspace / "a8", copy)
    data = bytearray((copy / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.onnx").write_bytes(bytes(data))
    for command in ("verify", "inspect"):
        fails(program(command, copy), 2, "SHA-256")


def test_weights_of_another_architecture_name_their_keys(program, tmp_path):
    from safetensors.torch import save_file

    from edgeguard.models import load_model

    save_file(load_model("resnet20").module.state_dict(), tmp_path / "w.safetensors")
    done = program("harden", "--model", "resnet8", "--weights", tmp_path / "w.safetensors", "--out", tmp_path / "x")
    fails(done, 2, "another architecture", "layer1.1")


def test_debug_shows_the_traceback(program):
    done = program("--debug", "inspect", "run")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
