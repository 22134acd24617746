"""`analyze`: the parts that are asked for, over one or several artifacts, as one JSON document."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

import edgeguard
from edgeguard import files
from edgeguard.analysis import gradients, visibility
from edgeguard.artifact import MANIFEST, Artifact
from edgeguard.attacks.aqapa import AQAPA, craft
from edgeguard.data.dataset import Dataset
from edgeguard.errors import InputError
from edgeguard.patch import Patch, check_fits
from edgeguard.statistics import wilson
from edgeguard.targets import open_engine
from edgeguard.targets.twin import Twin
from edgeguard.verify.harness import Subject, judge_at, judge_everywhere, random_places
from edgeguard.verify.options import Progress

SCHEMA = "edgeguard.analysis/1"
PARTS = ("alignment", "sensitivity", "visibility", "transfer")
DEFINITIONS = {
    "asr": "P[engine(x_adv) != y | engine(x) = y], at one random place per image unless said otherwise",
    "ci95": "Of a rate: Wilson score interval; of a mean: percentile bootstrap over images",
    "cosine": "Of the gradients of the scaled cross-entropy by the pixels, of two twins, on the same image",
    "hog_cosine": f"Of histograms of oriented gradients ({gradients.CELL}x{gradients.CELL} cells, {gradients.BINS} "
    "orientations) of the gradients' magnitude summed over colours",
    "edge_iou": f"Overlap of the strongest {gradients.EDGE_SHARE:.0%} of Sobel edges of that magnitude",
    "chance": "The same measures between the gradients of different images: what two artifacts share without being alike",
    "sensitivity": "ASR with the patch's top left corner at one place of every image, for each place of a grid",
    "opacity": "The patch is blended with the image, 1 is a plain paste; pixels are rounded to whole grey levels",
    "delta_e": "Mean CIELAB colour difference (CIE 1976) of the covered pixels to what they cover",
    "transfer": "Patches crafted on one artifact's twin (A-QAPA, universal), judged on another's live engine",
    "aggregated": "The largest ASR over all surrogates",
}


@dataclass(frozen=True)
class AnalysisOptions:
    """What to analyze.

    parts: of `PARTS`. patch_size: of the patches to craft; sizes: of those whose visibility is compared. opacities:
    0 to 1. stride: of the grid of places. steps, attack_batch: of crafting. limit, craft_limit: images judged, and
    crafted on, at most.
    """

    parts: tuple[str, ...] = PARTS
    patch_size: int = 6
    sizes: tuple[int, ...] = (3, 4, 6, 8, 10)
    opacities: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    stride: int = 4
    steps: int = 100
    attack_batch: int = 100
    limit: int = 200
    craft_limit: int = 1000
    batch_size: int = 50
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts or len(set(self.parts)) != len(self.parts):
            raise InputError(f"--what must be one or more of {', '.join(PARTS)}, each once; got {', '.join(self.parts)}")
        numbers = {"patch size": self.patch_size, "stride": self.stride, "steps": self.steps, "limit": self.limit,
                   "smallest size": min(self.sizes, default=0), "number of images to craft on": self.craft_limit,
                   "batch size": min(self.batch_size, self.attack_batch)}  # fmt: skip
        for name, value in numbers.items():
            if value < 1:
                raise InputError(f"the {name} must be at least 1, got {value}")
        if any(not 0 <= opacity <= 1 for opacity in self.opacities) or self.seed < 0 or self.threads < 0:
            raise InputError("opacities lie between 0 and 1, and seed and threads are not negative")


@dataclass(frozen=True, eq=False)
class Member:
    """An artifact that is analyzed, its twin, and its live engine on the judged images."""

    name: str
    artifact: Artifact
    twin: Twin
    subject: Subject
    engine: dict[str, Any]


def analyze(
    artifacts: Sequence[Artifact], judged: Dataset, crafted_of: Dataset | None, options: AnalysisOptions, *,
    patch: Patch | None = None, progress: Progress | None = None, command: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Analyze artifacts that take the same images and know the same classes.

    Args:
        judged: at most `options.limit` of its images, drawn with the seed. crafted_of: other images to craft on; without
            them, those of `judged` that are not judged.
        patch: for `sensitivity` and the opacities of `visibility`; without it one is crafted on each twin.

    Returns: a document of schema `edgeguard.analysis/1`; equal arguments on one machine give equal documents.

    Raises:
        InputError: artifacts or options that do not fit together, too few images, or a patch larger than the image.
    """
    _check(artifacts, judged, options, patch)
    order = np.random.default_rng(options.seed).permutation(len(judged))
    chosen = order[: min(options.limit, len(judged) if crafted_of is not None else len(judged) // 2)]
    source, rest = (judged, order[len(chosen) :]) if crafted_of is None else (
        crafted_of, np.random.default_rng(options.seed + 1).permutation(len(crafted_of)))  # fmt: skip
    rest = rest[: options.craft_limit]
    if not len(chosen) or not len(rest):
        raise InputError(f"{judged.name} has too few images: crafting and judging need different ones, at least one each")
    with ExitStack() as stack:
        members = []
        for name, artifact in zip(_names(artifacts), artifacts, strict=True):
            engine = stack.enter_context(open_engine(artifact, threads=options.threads))
            subject = Subject.of(engine, judged.images(chosen), judged.labels[chosen], batch_size=options.batch_size)
            if options.parts != ("alignment",) and not subject.eligible.any():
                raise InputError(
                    f"{name}: the engine classifies none of the {len(chosen)} judged images correctly, so that none "
                    "counts for the attack success rate; check the data and its labels"
                )
            twin = Twin(artifact.graph()).eval().requires_grad_(False)
            members.append(Member(name, artifact, twin, subject, dict(engine.describe())))
        study = _Study(members, options, source.images(rest), source.labels[rest], patch, progress)
        parts = {part: getattr(study, part)() for part in PARTS if part in options.parts}
    return {
        "schema": SCHEMA, "command": list(command), "options": asdict(options), "definitions": DEFINITIONS,
        "versions": {"edgeguard": edgeguard.__version__, "python": platform.python_version(), "numpy": np.__version__,
                     "torch": str(torch.__version__)},
        "platform": platform.platform(), "patch_sha256": None if patch is None else patch.sha256,
        "artifacts": [
            {"name": member.name, "target": member.artifact.target, "width": member.artifact.width,
             "sha256": files.sha256(member.artifact.path / MANIFEST), "engine": member.engine,
             "accuracy": {"accuracy": float(member.subject.correct.mean()), "n": len(chosen),
                          "ci95": list(wilson(int(member.subject.correct.sum()), len(chosen)))}}
            for member in members
        ],
        "data": {"name": judged.name, "sha256": judged.sha256, "n": len(chosen), "crafted_on": len(rest)},
        **parts,
    }  # fmt: skip


def _check(artifacts: Sequence[Artifact], judged: Dataset, options: AnalysisOptions, patch: Patch | None) -> None:
    if not artifacts:
        raise InputError("name at least one artifact")
    for key in ("input_shape", "num_classes"):
        if any(one.manifest[key] != artifacts[0].manifest[key] for one in artifacts):
            raise InputError(f"the artifacts differ in {key}; analyze those of one model and data set together")
    _, height, width = artifacts[0].manifest["input_shape"]
    if judged.image_shape[1:] != (height, width):
        raise InputError(f"{judged.name} has images of shape {judged.image_shape}, but the artifacts take {height}x{width}")
    if options.parts == ("alignment",) and len(artifacts) < 2:
        raise InputError("gradients are compared between artifacts of several widths; name at least two")
    for size in (options.patch_size, *(options.sizes if "visibility" in options.parts else ())):
        check_fits((size, size), (height, width))
    if patch is not None:
        check_fits(patch.size, (height, width))


def _names(artifacts: Sequence[Artifact]) -> list[str]:
    """Width of each, with its target where there are several, and a number where that is not unique."""
    several = len({one.target for one in artifacts}) > 1
    plain = [f"{one.width} bits{', ' + one.target if several else ''}" for one in artifacts]
    return [name if plain.count(name) == 1 else f"{name} ({number + 1})" for number, name in enumerate(plain)]


class _Study:
    """The parts; patches are crafted once for each artifact and size."""

    def __init__(self, members: list[Member], options: AnalysisOptions, images: Any, labels: Any, patch: Patch | None,
                 progress: Progress | None) -> None:  # fmt: skip
        self._members, self._options, self._given, self._progress = members, options, patch, progress
        self._images, self._labels = images, labels
        self._patches: dict[tuple[str, int], Patch] = {}

    def alignment(self) -> list[dict[str, Any]]:
        """Every pair of artifacts; `chance` compares each image's gradient at one with the next image's at the other."""
        subject = self._members[0].subject
        found = {one.name: gradients.input_gradients(one.twin, subject.images, subject.labels) for one in self._members}
        pairs = list(itertools.combinations(found, 2))
        rows = []
        for number, (a, b) in enumerate(pairs):
            chance = gradients.compare(found[a], np.roll(found[b], 1, 0), self._options.seed)
            measured = gradients.compare(found[a], found[b], self._options.seed)
            rows.append({"first": a, "second": b, **measured, "chance": chance})
            self._tick("gradient alignment", number + 1, len(pairs))
        return rows

    def sensitivity(self) -> list[dict[str, Any]]:
        """ASR at each place, for every artifact."""
        rows = []
        for one in self._members:
            patch = self._given or self._patch(one, self._options.patch_size)
            stage = f"places, {one.name}"
            grid, fooled = judge_everywhere(one.subject, patch, self._options.stride, lambda d, t, s=stage: self._tick(s, d, t))  # type: ignore[misc]
            lines, columns = sorted({int(row) for row, _ in grid}), sorted({int(column) for _, column in grid})
            n = int(fooled.shape[1])
            counts = fooled.sum(1).reshape(len(lines), len(columns)).tolist()
            rows.append({"artifact": one.name, "patch_size": max(patch.size), "rows": lines, "columns": columns,
                         "asr": [[count / n for count in line] for line in counts],
                         "ci95": [[list(wilson(count, n)) for count in line] for line in counts], "n": n})  # fmt: skip
        return rows

    def visibility(self) -> list[dict[str, Any]]:
        """ASR against size, opacity and colour difference, for every artifact."""
        return [
            {
                "artifact": one.name,
                "by_size": visibility.by_size(
                    one.subject, {size: self._patch(one, size) for size in self._options.sizes}, self._options.seed,
                ),
                "by_opacity": visibility.by_opacity(
                    one.subject, self._given or self._patch(one, self._options.patch_size), self._options.opacities,
                    self._options.seed,
                ),
            }
            for one in self._members
        ]  # fmt: skip

    def transfer(self) -> dict[str, Any]:
        """Every surrogate on every engine, random pixels beside them, and the largest of each column."""
        size = self._options.patch_size
        noise = np.random.default_rng([self._options.seed, size]).integers(0, 256, (3, size, size), np.uint8)
        sources = {one.name: self._patch(one, size) for one in self._members}
        patches = {**sources, "random pixels": Patch(noise, np.ones((size, size), bool))}
        rows = []
        for (source, patch), target in itertools.product(patches.items(), self._members):
            judged = judge_at(target.subject, patch, random_places(target.subject, patch, self._options.seed))
            rows.append({"surrogate": source, "engine": target.name, **visibility.rate(judged)})
        best = []
        for target in self._members:
            column = [row for row in rows if row["engine"] == target.name and row["surrogate"] in sources]
            best.append(max(column, key=lambda row: float(row["asr"])))
        return {"patch_size": size, "rows": rows, "aggregated": best}

    def _patch(self, one: Member, size: int) -> Patch:
        key = (one.name, size)
        if key not in self._patches:
            options = self._options
            config = AQAPA(size, options.steps, options.attack_batch, seed=options.seed)
            stage = f"crafting {size}x{size}, {one.name}"
            self._patches[key] = craft(
                config, {one.artifact.width: one.twin}, self._images, self._labels,
                lambda step: self._tick(stage, step.step + 1, options.steps),
            ).patch  # fmt: skip
        return self._patches[key]

    def _tick(self, stage: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(stage, done, total)
