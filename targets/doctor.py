"""What this machine can do: packages, CPU, GPU, and each target. Works in the base install; imports no torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import subprocess
from pathlib import Path
from typing import Any

import edgeguard
from edgeguard.errors import EngineError, MissingDependency, require
from edgeguard.targets import cpu_flags, ort
from edgeguard.targets.profiles import BUILT_IN, NEEDS, TargetProfile, load_profile

SCHEMA = "edgeguard.doctor/1"
PACKAGES = {
    "numpy": ("numpy", None), "onnxruntime": ("onnxruntime", None), "torch": ("torch", "train"),
    "torchvision": ("torchvision", "train"), "brevitas": ("brevitas", "train"), "safetensors": ("safetensors", "train"),
    "onnx": ("onnx", "train"), "pillow": ("PIL", "train"), "openvino": ("openvino", "openvino"),
    "tensorrt": ("tensorrt", "trt"),
}  # fmt: skip
"""Distribution: the module it installs, and the extra that it belongs to."""
EXPORTERS = ("torch", "torchvision", "brevitas", "safetensors", "onnx")
"""What an export needs besides the runtime."""
RUNTIME_PACKAGES = {"ort": "onnxruntime", "openvino": "openvino", "trt": "tensorrt"}
GPU_QUERY = ("name", "driver_version", "compute_cap", "memory.total")
GPU_SECONDS = 10.0
DEVICE_TREE = Path("/proc/device-tree/model")
"""Names the board of a Jetson, whose older systems have no nvidia-smi."""


def doctor() -> dict[str, Any]:
    """A JSON document of schema `edgeguard.doctor/1`: packages, cpu, gpu, and targets with what each can do here.

    Of a target: `run` (its runtime executes models here), `export` (a run can be exported for it here),
    `storage_bits` (weights that the runtime loads, where that was tried), `notes` and `install` (commands).
    """
    packages = {name: _package(name) for name in PACKAGES}
    gpu = _gpu()
    saturates = _saturates()
    loads = {bits: loadable(*NEEDS[bits]) for bits in sorted(NEEDS)} if packages["onnxruntime"]["version"] else {}
    flags = cpu_flags()
    return {
        "schema": SCHEMA,
        "edgeguard": edgeguard.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": {"machine": platform.machine(), "flags": flags, "integer": _integer(flags), "saturates": saturates},
        "gpu": gpu,
        "packages": packages,
        "targets": [_target(load_profile(name), packages, gpu, saturates, loads) for name in BUILT_IN],
    }


def _package(name: str) -> dict[str, Any]:
    module, extra = PACKAGES[name]
    version: str | None = None
    if importlib.util.find_spec(module) is not None:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "unknown"  # a package of the system, or of another name as onnxruntime-gpu
    return {"version": version, "install": _install(extra)}


def _install(extra: str | None) -> str:
    return f'pip install "edgeguard[{extra}]"' if extra else "pip install edgeguard"


def _integer(flags: list[str]) -> str:
    """Which instructions multiply 8-bit integers without loss."""
    for name, members in (("VNNI", ("avx512_vnni", "avx_vnni", "amx_int8")), ("dot product", ("asimddp", "i8mm"))):
        if any(flag in flags for flag in members):
            return name
    return "none found"


def _saturates() -> bool | None:
    """Whether products of 8-bit integers overflow in ONNX Runtime's kernels here; None where it cannot be tried."""
    try:
        return ort.saturates()
    except (MissingDependency, EngineError):
        return None


def loadable(opset: int, ir_version: int) -> bool:
    """Whether the installed ONNX Runtime loads models of an opset and IR version: tried on a model of one node."""
    runtime = require("onnxruntime", None)
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    # The model begins with its IR version (field 1) and ends with its only opset's number.
    model = ort.PRODUCT[:1] + bytes([ir_version]) + ort.PRODUCT[2:-1] + bytes([opset])
    try:
        runtime.InferenceSession(model, options, providers=[ort.PROVIDER])
    except Exception:  # the runtime's exceptions have no common base below Exception
        return False
    return True


def _gpu() -> dict[str, Any]:
    """NVIDIA GPUs as the driver names them: {"devices": [{"name", ...}], "detail": a sentence}."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_QUERY)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=GPU_SECONDS, check=False)
    except FileNotFoundError:
        return _board()
    except (OSError, subprocess.TimeoutExpired) as exc:
        return {"devices": [], "detail": f"nvidia-smi does not answer: {exc}"}
    if answer.returncode != 0:
        reason = (answer.stdout + answer.stderr).strip().splitlines() or [f"exit code {answer.returncode}"]
        return {"devices": [], "detail": f"nvidia-smi failed: {reason[0]}"}
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    devices = [dict(zip(GPU_QUERY, row, strict=False)) for row in rows]
    return {"devices": devices, "detail": f"{len(devices)} found by nvidia-smi"}


def _board() -> dict[str, Any]:
    try:
        name = DEVICE_TREE.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        name = ""
    if "jetson" in name.lower() or "orin" in name.lower():
        return {"devices": [{"name": name}], "detail": "an NVIDIA Jetson, from its device tree"}
    return {"devices": [], "detail": "no NVIDIA GPU found: nvidia-smi is not installed"}


def _target(profile: TargetProfile, packages: dict[str, dict[str, Any]], gpu: dict[str, Any], saturates: bool | None,
            loads: dict[int, bool]) -> dict[str, Any]:  # fmt: skip
    runtime = RUNTIME_PACKAGES[profile.runtime]
    run = packages[runtime]["version"] is not None
    missing = [name for name in EXPORTERS if packages[name]["version"] is None]
    install = [packages[name]["install"] for name in missing]
    if not run:
        install.append(packages[runtime]["install"])
    notes: list[str] = []
    storage: list[int] | None = None
    if profile.runtime == "ort" and run:
        storage = [bits for bits in sorted(NEEDS) if bits >= profile.storage_bits and loads[bits]]
        run = bool(storage)
        notes += _ort_notes(profile, packages[runtime]["version"], saturates, loads)
    export = run and not missing
    if profile.runtime == "trt" and not (run and gpu["devices"]):
        run, export = False, not missing
        notes.append("no plan can be built or run here: it takes TensorRT and an NVIDIA GPU; export works with --onnx-only")
    elif profile.runtime == "trt":
        notes.append("a plan runs only on the kind of GPU and the TensorRT version it was built with")
    return {
        "name": profile.name, "summary": profile.summary, "run": run, "export": export, "storage_bits": storage,
        "notes": notes, "install": list(dict.fromkeys(install)),
    }  # fmt: skip


def _ort_notes(profile: TargetProfile, version: str, saturates: bool | None, loads: dict[int, bool]) -> list[str]:
    notes = []
    refused = [bits for bits in sorted(NEEDS) if bits >= profile.storage_bits and not loads[bits]]
    if refused:
        notes.append(
            f"onnxruntime {version} loads no weights of {' and '.join(map(str, refused))} bits; "
            "update it, or export with --target ort-legacy"
        )
    if saturates and profile.saturates:
        notes.append("products of 8-bit integers saturate on this CPU: exact, slower kernels are switched on")
    return notes


def format_doctor(document: dict[str, Any]) -> str:
    """The document for people."""
    cpu, gpu = document["cpu"], document["gpu"]
    saturation = {True: "saturate in 16 bits", False: "are exact", None: "were not tried"}[cpu["saturates"]]
    names = ", ".join(device["name"] for device in gpu["devices"])
    lines = [
        f"edgeguard {document['edgeguard']}, Python {document['python']}, {document['system']}",
        f"CPU {cpu['machine']}: {' '.join(cpu['flags']) or 'no flags known'}; 8-bit instructions: {cpu['integer']}; "
        f"products {saturation}",
        f"GPU: {names or gpu['detail']}",
        "",
    ]
    for name, entry in document["packages"].items():
        lines.append(f"{name:>12}  {entry['version'] or 'missing: ' + entry['install']}")
    lines += ["", f"{'target':>12}  {'run':<4} {'export':<7} weights stored as"]
    for target in document["targets"]:
        stored = "" if target["storage_bits"] is None else ", ".join(f"INT{bits}" for bits in target["storage_bits"])
        run, export = ("yes" if target[key] else "no" for key in ("run", "export"))
        lines.append(f"{target['name']:>12}  {run:<4} {export:<7} {stored or '-'}")
        lines += [f"{'':>14}{line}" for line in (*target["notes"], *(f"install: {entry}" for entry in target["install"]))]
    return "\n".join(lines)
