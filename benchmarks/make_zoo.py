"""Pack a run as a ready model of the package, `zoo:NAME`.

    python benchmarks/make_zoo.py RUN --name resnet20-cifar10-qadtr --data cifar10 --seconds 5400 \\
        --description "..." --reports REPORT-8 REPORT-4 REPORT-2

The folder edgeguard/zoo/models/NAME is written anew: the configuration, the model's tensors without the state of the
training, the metrics, the reports, and card.json. Paths are reduced to the names of their files, and the example images
of the reports are left out, because the data are not ours to pass on. What `edgeguard verify` found of artifacts of RUN goes into
the card; for a width without a report it holds the simulated accuracy of the run's last metrics and no attack.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch

from edgeguard import files, folders
from edgeguard.errors import EdgeGuardError, InputError
from edgeguard.report.read import read_report
from edgeguard.run import CHECKPOINT, CONFIG, METRICS, MODEL, Run
from edgeguard.statistics import wilson
from edgeguard.zoo import CARD, MODELS, SCHEMA, ZooModel

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
SPEC = re.compile(r"((?:--[\w-]+=)?(?:[a-z0-9]+:)?)(.*)", re.DOTALL)
PRIVATE = re.compile(r"""(^|[\s'"=:,;(\[])(~?/|\.\./|[A-Za-z]:\\|\\\\)[\w.~-]""")
"""A path that leads somewhere, at the beginning of a text or of a word in it."""
ENCODED = ("pixels", "mask")
"""Keys of base64, whose slashes are no paths."""
ATTACK_KEYS = ("name", "access", "scope", "patch_size", "placement", "asr", "ci95", "n")
KNOWN_WEIGHTS = {
    "26c2a6e380a989870a76a4bc7b7c5cb84d7a9e7b92f08e65d3e40c29e2bdc363": (
        "BSD-2-Clause",
        "akamaster/pytorch_resnet_cifar10, Copyright (c) 2018, Yerlan Idelbayev; the text of the license is in NOTICE",
    ),
}
"""Starting weights by SHA-256: license and credit."""


@dataclass(frozen=True)
class Packing:
    """What a run does not say of itself.

    data: what `--data` takes, in place of the run's own. licence, credit: of starting weights that `KNOWN_WEIGHTS` lacks.
    seconds: of the training.
    """

    name: str
    description: str = ""
    reports: tuple[Path, ...] = ()
    data: str | None = None
    licence: str | None = None
    credit: str | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise InputError(
                f"{self.name!r} is no name of a ready model; expected lower case, digits and single dashes"
            )
        if self.seconds is not None and not self.seconds > 0:
            raise InputError(f"the seconds of the training must be above 0, got {self.seconds}")


def pack(run: Run, packing: Packing, models: Path = MODELS) -> ZooModel:
    """Write the ready model below `models`, whose folder NAME must not exist.

    Raises:
        InputError: an unfinished or damaged run, a report of another run, an incomplete one, starting weights without a
        license, or a path that would be published.
    """
    config = public_config(run, packing.data)
    reports = _reports(run, packing.reports)
    metrics = _metrics(run)
    tensors = {MODEL + name: value for name, value in run.load_model().state_dict().items()}
    _, state = run.read_checkpoint()
    with folders.folder_transaction(models / packing.name) as folder:
        files.write_json(folder / CONFIG, config)
        packed = Run.load(folder)
        packed.write_checkpoint(tensors, {"step": state.get("step")})
        files.write_bytes(folder / METRICS, "".join(json.dumps(line) + "\n" for line in metrics).encode())
        for name, report in reports.items():
            files.write_json(folder / name, report)
        _check_packed(packed, run)
        card = _card(run, packing, config, metrics[-1], list(reports.values()))
        card["files"] = {file.name: files.sha256(file) for file in sorted(folder.iterdir())}
        for document in (config, metrics, card, reports):
            check_public(document)
        files.write_json(folder / CARD, card)
    model = ZooModel.load(models / packing.name)
    model.check()
    return model


def public(text: str) -> str:
    """A path without its folders, also behind an option or the kind of a data set; any other text as it is."""
    match = SPEC.fullmatch(text)
    head, path = (match[1], match[2]) if match else ("", text)
    is_path = path.startswith(("/", "~", "./", "../")) or ("/" in path and " " not in path and PurePath(path).suffix)
    return head + PurePath(path).name if is_path else text


def public_command(text: str) -> str:
    """A shell command, its paths without their folders.

    Raises:
        InputError: it is no shell command.
    """
    try:
        return shlex.join(public(token) for token in shlex.split(text))
    except ValueError as exc:
        raise InputError(f"the command of the run cannot be read: {exc}; got {text!r:.80}") from exc


def public_config(run: Run, data: str | None) -> dict[str, Any]:
    """The configuration of the run as it may be published. data: the spec to name in place of the run's own."""
    config: dict[str, Any] = _each_text(run.config, public)
    config["command"] = public_command(str(run.config.get("command", "")))
    if data is not None:
        if public(data) != data:
            raise InputError(f"--data {data!r} is a path of this machine; name what everyone has: digits, cifar10")
        config["data"]["spec"] = data
        config["training"]["data"] = data
    return config


def public_report(report: dict[str, Any]) -> dict[str, Any]:
    """A report as it may be published: without example images, its paths without their folders."""
    found: dict[str, Any] = _each_text(report, public)
    found["environment"]["command"] = [public(token) for token in report["environment"]["command"]]
    found["examples"] = {**report["examples"], "images": []}
    return found


def check_public(document: Any) -> None:
    """Raises InputError naming the first text of a document that holds a path of a machine."""
    for place, text in _texts(document, ""):
        if PRIVATE.search(text):
            raise InputError(f"{place[1:]} holds a path, which must not be published: {text!r:.200}")


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a JSON document with every text changed but those under `ENCODED`."""
    if isinstance(value, dict):
        return {key: one if key in ENCODED else _each_text(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_each_text(one, change) for one in value]
    return change(value) if isinstance(value, str) else value


def _texts(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield f"{place}.key", str(key)
            if key not in ENCODED:
                yield from _texts(one, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            yield from _texts(one, f"{place}.{number}")
    elif isinstance(value, str):
        yield place, value


def _metrics(run: Run) -> list[dict[str, Any]]:
    path = run.path / METRICS
    if not path.is_file():
        raise InputError(f"{path} does not exist; the run has not finished an epoch, continue it with --resume")
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not lines or {str(width) for width in run.widths} - lines[-1].get("widths", {}).keys():
        raise InputError(
            f"{path} lacks figures of a width of the run; expected all of {', '.join(map(str, run.widths))}"
        )
    return lines


def _reports(run: Run, paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The reports as they may be published, by the name of their file: report-4.json, report-4-2.json, ..."""
    checkpoint = files.sha256(run.checkpoint)
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        source = path / "report.json" if path.is_dir() else path
        report = read_report(source)
        if report["artifact"].get("source", {}).get("run_checkpoint_sha256") != checkpoint:
            raise InputError(
                f"{source} is not of an artifact of {run.path}; export the run and verify the artifact again"
            )
        if not report["status"]["complete"]:
            raise InputError(f"{source} is incomplete: {report['status']['reason']}; verify the artifact again")
        width = report["artifact"]["width"]
        if width not in map(str, run.widths):
            raise InputError(
                f"{source} is of width {width!r}; those of {run.path} are {', '.join(map(str, run.widths))}"
            )
        number = 1 + sum(other["artifact"]["width"] == width for other in found.values())
        found[f"report-{width}.json" if number == 1 else f"report-{width}-{number}.json"] = public_report(report)
    return found


def _check_packed(packed: Run, run: Run) -> None:
    """The packed model is the run's, bit for bit, so that their exports are."""
    ours, theirs = packed.load_model().state_dict(), run.load_model().state_dict()
    differ = [name for name in ours.keys() | theirs.keys() if not torch.equal(ours[name], theirs[name])]
    if differ:
        raise InputError(f"{packed.checkpoint} is not the model of {run.path}: {differ[0]} differs")


def _card(run: Run, packing: Packing, config: dict[str, Any], metrics: dict[str, Any],
          reports: list[dict[str, Any]]) -> dict[str, Any]:  # fmt: skip
    settings = config["training"]["config"]
    model, data = config["model"], config["data"]
    method, seed = str(settings["method"]), settings["seed"]
    widths = [str(width) for width in run.widths]
    return {
        "schema": SCHEMA,
        "name": packing.name,
        "description": packing.description or f"{model['spec']} on {data['spec']}, by the method {method}.",
        "model": {"spec": model["spec"], "num_classes": model["num_classes"]},
        "data": {"spec": data["spec"], "trained_as": public(run.config["data"]["spec"]),
                 **{key: data[key] for key in ("image_shape", "train_sha256", "test_sha256")}},
        "method": method,
        "widths": widths,
        "results": [_result(width, metrics["widths"][width], reports) for width in widths],
        "weights": _weights(model.get("weights_sha256"), packing),
        "training": {"command": config["command"], "seconds": packing.seconds, "steps": metrics.get("step"), "seed": seed,
                     "versions": config["versions"]},
        "source": {"run_checkpoint_sha256": files.sha256(run.checkpoint)},
        "files": {},
    }  # fmt: skip


def _result(width: str, simulated: dict[str, Any], reports: list[dict[str, Any]]) -> dict[str, Any]:
    """What is known of one width."""
    own = [report for report in reports if report["artifact"]["width"] == width]
    if own:
        best = max((report["clean"]["engine"] for report in own), key=lambda clean: int(clean["n"]))
        clean = {**{key: best[key] for key in ("accuracy", "n", "ci95")}, "measured": "engine"}
    else:
        accuracy, n = simulated["accuracy"], simulated["n"]
        clean = {"accuracy": accuracy, "n": n, "ci95": list(wilson(round(accuracy * n), n)), "measured": "simulation"}
    failed = {check["check"] for report in own for check in report["trust"] if check["passed"] is False}
    attacks = [{key: row[key] for key in ATTACK_KEYS} for report in own for row in report["attacks"]]
    return {"width": width, "clean": clean, "attacks": attacks, "failed_checks": sorted(failed)}


def _weights(digest: str | None, packing: Packing) -> dict[str, Any]:
    """License and credit of the weights that the training started from; null where it started from none."""
    licence, credit = KNOWN_WEIGHTS.get(digest or "", (packing.licence, packing.credit))
    if digest is None:
        if packing.licence or packing.credit:
            raise InputError("the run started from no weights; leave out --licence and --credit")
        return {"sha256": None, "licence": None, "credit": None}
    if not licence or not credit:
        raise InputError(f"the run started from weights of SHA-256 {digest}; name their --licence and --credit")
    return {"sha256": digest, "licence": licence, "credit": credit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run of `edgeguard harden` or `calibrate`")
    parser.add_argument("--name", required=True, help="of the ready model, e.g. resnet20-cifar10-qadtr")
    parser.add_argument("--description", default="", help="one sentence")
    parser.add_argument(
        "--reports", type=Path, nargs="*", default=[], help="what `edgeguard verify` wrote: folders or files"
    )
    parser.add_argument("--data", help="what everyone can name in place of the run's own data: digits, cifar10")
    parser.add_argument("--licence", help="of the starting weights, e.g. BSD-2-Clause")
    parser.add_argument("--credit", help="of the starting weights: who made them")
    parser.add_argument("--seconds", type=float, help="that the training took")
    parser.add_argument("--models", type=Path, default=MODELS, help="the folder of all ready models")
    args = parser.parse_args()
    packing = Packing(
        args.name, args.description, tuple(args.reports), args.data, args.licence, args.credit, args.seconds
    )
    try:
        model = pack(Run.load(args.run), packing, args.models)
    except EdgeGuardError as exc:
        raise SystemExit(f"make_zoo: {exc}") from exc
    sizes = {file.name: file.stat().st_size for file in sorted(model.path.iterdir())}
    print(f"{model.path}: " + ", ".join(f"{name} {size:,} bytes" for name, size in sizes.items()))
    print(
        f"checkpoint {sizes[CHECKPOINT] / 1e6:.2f} MB; try: edgeguard export zoo:{model.name} --bits {model.card['widths'][0]}"
    )


if __name__ == "__main__":
    main()
