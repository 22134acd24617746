"""Every reader of files that others may have made: how a valid file is written, and how a changed one is read."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer

sys.path.append(str(Path(__file__).resolve().parents[1]))

import graphs
from report_example import example_report
from small_artifact import labelled, small_graph, write_artifact

from edgeguard import open_inference, zoo
from edgeguard.artifact import Artifact
from edgeguard.attacks.api import Found
from edgeguard.cli.app import app
from edgeguard.cli.judged_data import judged_data
from edgeguard.data.folder import load_folder
from edgeguard.data.npz import load_npz
from edgeguard.errors import EdgeGuardError, InputError
from edgeguard.graph_io import load_graph, save_graph
from edgeguard.inspection import format_inspection, inspect_artifact
from edgeguard.patch import Patch, square
from edgeguard.patch_files import load_patch, save_png
from edgeguard.pool_artifact import Pool, write_pool
from edgeguard.report.read import read_report
from edgeguard.targets.profiles import FOLDER, load_profile
from edgeguard.verify import VerifyOptions
from edgeguard.verify.bundle import Bundle, write_bundle
from edgeguard.verify.document import artifact_block, seen_sizes
from edgeguard.verify.gate import Gate
from edgeguard.verify.prepare import Split
from edgeguard.verify.propose import Plan
from edgeguard.verify.run import trained_widths

PIXELS = np.arange(3 * 5 * 7, dtype=np.uint8).reshape(3, 5, 7)
TORCH = ("torch", "safetensors")
LONGEST = 1500
"""Characters of a sentence."""


@dataclass(frozen=True)
class Reader:
    """make: write a valid file into a folder, and whatever belongs to it; returns its path. read: what is tested.

    form: "json", "toml", "npz", or "bytes" of another kind. needs: modules beyond the base install.
    slow: what follows and takes seconds, a process of its own; only `benchmarks/hostile_inputs.py` tries that.
    """

    form: str
    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    needs: tuple[str, ...] = ()
    slow: Callable[[Path], object] | None = None


def outcome(reader: Reader, path: Path, slow: bool = False) -> str:
    """"accepted", or "refused" with one sentence. Every other exception is a failure, and passes through."""
    try:
        reader.read(path)
        if slow and reader.slow is not None:
            reader.slow(path)
    except EdgeGuardError as exc:
        sentence = str(exc)
        assert sentence.strip(), "an error without a sentence"
        assert sentence.isprintable(), sentence
        assert len(sentence) < LONGEST, sentence
        return "refused"
    return "accepted"


def _manifest(folder: Path) -> Path:
    layer = {"name": "conv1", "op": "Conv", "macs": 10, "storage_bits": 4, "compute_bits": 8, "kernel": "QLinearConv"}
    source = {"patch_sizes": [4], "data": {"spec": "digits"}, "seed": 0, "widths": ["8", "4"]}
    more: dict[str, Any] = {"layers": [layer], "source": source, "profile": {"runtime": "reference"}}
    return write_artifact(folder / "artifact", small_graph(), "4", **more).path / "manifest.json"


def _read_artifact(path: Path) -> object:
    """All that `inspect` and `verify` take from a manifest."""
    artifact = Artifact.load(path.parent)
    artifact.graph()
    taken = artifact_block(artifact), seen_sizes(artifact), trained_widths(artifact), judged_data(artifact, None, False)
    text = format_inspection(inspect_artifact(path.parent))
    assert all(line.isprintable() for line in text.splitlines()), "what a terminal obeys"
    return taken


def _graph(folder: Path) -> Path:
    save_graph(graphs.every_op(4), folder / "graph.npz")
    return folder / "graph.npz"


def _pool(folder: Path) -> Path:
    for bits in (4, 8):
        write_artifact(folder / f"w{bits}", small_graph(bits), str(bits))
    return write_pool(folder, ("w4", "w8"), (0.25, 0.75), 7).path / "pool.json"


def _patch(folder: Path) -> Path:
    Patch(PIXELS, np.arange(35).reshape(5, 7) % 3 > 0).save(folder / "patch.npz")
    return folder / "patch.npz"


def _png(folder: Path) -> Path:
    save_png(square(PIXELS), folder / "patch.png")
    return folder / "patch.png"


def _data(folder: Path) -> Path:
    names = np.array(["cat", "dog", "owl"])
    np.savez(folder / "data.npz", images=np.zeros((3, 4, 4, 3), np.uint8), labels=np.arange(3), class_names=names)
    return folder / "data.npz"


def _images(folder: Path) -> Path:
    """Two classes of one image each; the first may be of any format, whatever its name says."""
    from PIL import Image

    for name in ("cat", "dog"):
        (folder / "set" / name).mkdir(parents=True)
        Image.fromarray(PIXELS.transpose(1, 2, 0)).save(folder / "set" / name / "a.png")
    return folder / "set" / "cat" / "a.png"


def read_folder(folder: Path) -> object:
    """Every way in which the images of a folder are read."""
    resized, photographs = load_folder(folder, "test", 8), load_folder(folder, "train", 128)
    every = np.arange(len(resized))
    cropped = photographs.augmented(every, np.random.default_rng(0), flip=True)
    return resized.images(every), cropped, load_folder(folder, "test").images(every)


def _onnx(folder: Path) -> Path:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], "net", inputs, outputs, [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(folder / "m.onnx"))
    return folder / "m.onnx"


def _read_onnx(path: Path) -> object:
    from edgeguard.export.onnx_read import read_model

    return read_model(path)


def _load_onnx(path: Path) -> object:
    from edgeguard.export.isolated import inspect_onnx

    return inspect_onnx(path)


def _read_options(path: Path) -> object:
    """The options of `harden`, as --config gives them, without running it."""
    command = typer.main.get_command(app).commands["harden"]  # type: ignore[attr-defined]
    try:
        return command.make_context("harden", ["--config", str(path)])
    except typer.BadParameter.__bases__[0] as exc:  # what a user of the command is told in a box
        raise InputError(exc.format_message()) from exc


def _written(name: str, text: Callable[[], str]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(text(), encoding="utf-8")
        return folder / name

    return make


def _profile() -> str:
    return (FOLDER / "ort.toml").read_text(encoding="utf-8").replace('"ort"', '"own"', 1)


def _card(folder: Path) -> Path:
    path = folder / "small"
    path.mkdir()
    for name in zoo.RUN_FILES:
        (path / name).write_bytes(b"x")
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    card = {key: kind() for key, kind in zoo.REQUIRED.items()}
    card |= {"schema": zoo.SCHEMA, "name": "small", "files": dict.fromkeys(zoo.RUN_FILES, digest)}
    (path / zoo.CARD).write_text(json.dumps(card))
    return path / zoo.CARD


def _bundle(folder: Path) -> Path:
    artifact = write_artifact(folder / "artifact", small_graph(), "4")
    dataset = labelled(artifact.graph(), 12)
    split = Split(dataset, np.arange(8), dataset, np.arange(8, 12))
    mask = np.ones((4, 4), bool)
    one = Found(np.zeros((3, 4, 4), np.uint8), mask)
    own = Found(np.zeros((2, 3, 4, 4), np.uint8), mask, np.zeros((2, 2), np.int64))
    made = [("p.npz", Plan("", "query", 4, attack="patch-rs"), one, {}), ("q.npz", Plan("", "query", 4, attack="lavan"), own, {})]
    (folder / "bundle").mkdir()
    write_bundle(folder / "bundle", artifact, split, VerifyOptions(limit=8), made, ["edgeguard"])
    return folder / "bundle" / "bundle.json"


def _message(folder: Path) -> Path:
    images = np.zeros((2, 3, 2, 2), np.uint8)
    body, _ = open_inference.write_message({"id": "7"}, "inputs", {"pixels": images})
    (folder / "body").write_bytes(body)
    return folder / "body"


def _read_message(path: Path) -> object:
    bounds = open_inference.Bounds.of((4, 3, 2, 2), 1 << 20)
    document, blob = open_inference.read_message(path.read_bytes(), None, bounds)
    return open_inference.read_tensors(document, "inputs", blob, bounds)


def _run(folder: Path) -> Any:
    from edgeguard.run import Run

    model = {"spec": "resnet8", "num_classes": 10, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    scheme = {"widths": ["8", "w4a8"], "boundary_bits": 8, "residual_bits": 8, "signed_activations": False}
    config = {"model": model, "scheme": scheme, "data": {}, "training": {}, "versions": {}}
    return Run.create(folder / "run", config)


def _read_config(path: Path) -> object:
    from edgeguard.run import Run

    run = Run.load(path.parent)
    return run.scheme(), run.float_model()


def _net() -> Any:
    from torch import nn

    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def _checkpoint(folder: Path) -> Path:
    run = _run(folder)
    run.write_checkpoint({f"model.{name}": value for name, value in _net().state_dict().items()}, {"epoch": 3})
    return Path(run.checkpoint)


def _read_checkpoint(path: Path) -> object:
    from edgeguard.run import Run, restore_model

    tensors, state = Run(path.parent, {}).read_checkpoint()
    restore_model(_net(), tensors, path)
    return state


def _weights(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        import safetensors.torch
        import torch

        if name.endswith(".safetensors"):
            safetensors.torch.save_file(_net().state_dict(), str(folder / name))
        else:
            torch.save(_net().state_dict(), folder / name)
        return folder / name

    return make


def _read_weights(path: Path) -> object:
    from edgeguard.models import apply_weights, read_weights

    return apply_weights(_net(), read_weights(path), str(path))


READERS: dict[str, Reader] = {
    "artifact": Reader("json", _manifest, _read_artifact),
    "bundle": Reader("json", _bundle, lambda path: Bundle.load(path.parent)),
    "pool": Reader("json", _pool, lambda path: Pool.load(path.parent)),
    "report": Reader("json", _written("report.json", lambda: json.dumps(example_report())), read_report),
    "zoo card": Reader("json", _card, lambda path: zoo.ZooModel.load(path.parent).check()),
    "protocol message": Reader("json", _message, _read_message),
    "options": Reader("toml", _written("options.toml", lambda: "max-steps = 3\nmethod = 'qat'\n"), _read_options),
    "gate": Reader("toml", _written("gate.toml", lambda: "max_asr = 0.3\nrequire_trust = true\n"), Gate.load),
    "profile": Reader("toml", _written("own.toml", _profile), lambda path: load_profile(str(path))),
    "integer graph": Reader("npz", _graph, load_graph),
    "patch npz": Reader("npz", _patch, load_patch),
    "data npz": Reader("npz", _data, load_npz),
    "patch png": Reader("bytes", _png, load_patch),
    "image": Reader("bytes", _images, lambda path: read_folder(path.parents[1]), needs=("PIL.Image",)),
    "ONNX file": Reader("bytes", _onnx, _read_onnx, needs=("onnx",), slow=_load_onnx),
    "run config": Reader("json", lambda folder: Path(_run(folder).path) / "config.json", _read_config, needs=TORCH),
    "checkpoint": Reader("bytes", _checkpoint, _read_checkpoint, needs=TORCH),
    "weights safetensors": Reader("bytes", _weights("w.safetensors"), _read_weights, needs=TORCH),
    "weights torch": Reader("bytes", _weights("w.pt"), _read_weights, needs=TORCH),
}


def arrays_of(path: Path) -> dict[str, Any]:
    with np.load(path) as data:
        return dict(data.items())


def npz_bytes(arrays: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()
