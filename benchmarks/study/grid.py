"""What the study compares: defences, ablations, attacks and how much of everything, as frozen values.

The three tables at the top are meant to be edited. Options of defences are those of `edgeguard harden`; before anything
runs, all are held against the options that the command really has.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from edgeguard.errors import InputError
from edgeguard.quant.width import parse_widths


@dataclass(frozen=True)
class Defence:
    """How `edgeguard harden` is called.

    name: in file names and tables. options: besides model, data, widths, epochs and seed.
    passes: forward and backward passes of the whole net over each batch, as `passes_per_batch` of
    `edgeguard.defences.config` counts them. All defences get equally many passes over the
    training images (`Grid.passes`), so one with more of them in each step gets fewer epochs.
    ready: name of a ready model of the package, which is judged as it is instead of training one; its passes are its own.
    apart: one run for each width instead of one for all. widths: trained at, where not at all of the grid.
    ablation: it is not a row of the tables but one of the parts that were left out.
    """

    name: str
    title: str
    options: tuple[str, ...]
    passes: float = 1
    apart: bool = False
    widths: tuple[str, ...] | None = None
    ablation: bool = False
    ready: str = ""


OURS = "qadt-r"
READY = "qadt-r-ready"
"""Trained for longer and against more sizes than the rows that are compared at an equal budget."""
SEEN = ("--patch-sizes", "6")
"""All defences that train against patches see this size alone, so that 5, 8 and 10 pixels are new to all of them."""
DEFENCES = (
    Defence("qat", "QAT, no defence", ("--method", "qat")),
    # The published 25 ascents with four places each take 30 passes; so many epochs fewer would not train at all.
    Defence("pbat", "PBAT", ("--method", "pbat", "--attack-steps", "4", "--moves", "random", *SEEN), passes=11 / 3),
    Defence("dwq", "DWQ", ("--method", "dwq"), passes=2),
    Defence("dwq-4-16", "DWQ, trained at 4 to 16 bits", ("--method", "dwq"), passes=2,
            widths=tuple(str(bits) for bits in range(16, 3, -1))),
    Defence("triqdef", "TriQDef", ("--method", "triqdef"), passes=1.125),
    Defence(OURS, "QADT-R", ("--method", "qadt-r", *SEEN), passes=4),
)  # fmt: skip

Part = tuple[str, str, tuple[str, ...], float | None, tuple[str, ...] | None]
PARTS: tuple[Part, ...] = (
    # name, what is left out, options added to those of QADT-R, passes where others, widths where others
    ("no-per-image", "without patches per image", ("--passes", "0"), 1, None),
    ("no-gir", "without GIR", ("--backward-noise", "0", "--alignment", "0", "--patch-noise", "0"), None, None),
    ("no-universal", "without universal patches", ("--universal-share", "0"), None, None),
    ("ascents", "one pass under patches, after two ascents alone", ("--passes", "1", "--ascents", "2"), 3.5, None),
    ("no-distillation", "without distillation", ("--distillation", "0"), None, None),
    ("no-gir-a", "without GIR (a), noise backward", ("--backward-noise", "0"), None, None),
    ("no-gir-b", "without GIR (b), alignment", ("--alignment", "0"), None, None),
    ("no-gir-c", "without GIR (c), noise on patch gradients", ("--patch-noise", "0"), None, None),
    ("no-dbwt", "without DBWT, 4 bits alone", (), None, ("4",)),
    ("lr-0.02", "learning rate 0.02 instead of 0.05", ("--lr", "0.02"), None, None),
    ("lr-0.1", "learning rate 0.1 instead of 0.05", ("--lr", "0.1"), None, None),
)
ABLATION_WIDTHS = ("8", "4", "2")
ABLATION_ATTACKS = ("aqapa-8", "lavan-8", "per-image-8", "patch-rs-8")


@dataclass(frozen=True)
class AttackSpec:
    """One column group of the study.

    method: a-qapa, gap (universal, crafted at every source width); lavan, patch-rs, per-image (one patch for each
    image); noise. size: side in pixels. placement: random, corners (any of the four), worst (any of a grid) or optimized.
    seen: whether defences are meant to train against it; what they really trained against is in the export's cell.
    steps, restarts: of A-QAPA per image, in place of the budget's; 0: the budget's. widths: the only ones attacked; none: all.
    """

    name: str
    title: str
    method: str
    size: int
    placement: str
    seen: bool = False
    steps: int = 0
    restarts: int = 0
    widths: tuple[str, ...] = ()

    @property
    def universal(self) -> bool:
        return self.method in UNIVERSAL


UNIVERSAL = ("a-qapa", "gap")
GOAL_WIDTHS = ("8", "4", "2")
SEARCHES = ("lavan", "patch-rs", "per-image")
ATTACKS = (
    AttackSpec("aqapa-6", "A-QAPA 6x6, random place", "a-qapa", 6, "random", seen=True),
    AttackSpec("aqapa-8", "A-QAPA 8x8, random place", "a-qapa", 8, "random"),
    AttackSpec("aqapa-10", "A-QAPA 10x10, random place", "a-qapa", 10, "random"),
    AttackSpec("aqapa-6-corners", "A-QAPA 6x6, four corners", "a-qapa", 6, "corners"),
    AttackSpec("aqapa-8-corners", "A-QAPA 8x8, four corners", "a-qapa", 8, "corners"),
    AttackSpec("aqapa-8-worst", "A-QAPA 8x8, worst place", "a-qapa", 8, "worst"),
    AttackSpec("lavan-8", "LaVAN 8x8, per image", "lavan", 8, "random"),
    AttackSpec("gap-8", "GAP 8x8, random place", "gap", 8, "random"),
    AttackSpec("patch-rs-8", "Patch-RS 8x8, per image, queries", "patch-rs", 8, "optimized"),
    AttackSpec("per-image-8", "A-QAPA 8x8, per image", "per-image", 8, "optimized"),
    AttackSpec("per-image-5", "A-QAPA 5x5, per image", "per-image", 5, "optimized"),
    AttackSpec("per-image-8-long", "A-QAPA 8x8, per image, 100 steps, 6 restarts", "per-image", 8, "optimized",
               steps=100, restarts=6, widths=GOAL_WIDTHS),
    AttackSpec("per-image-5-long", "A-QAPA 5x5, per image, 100 steps, 6 restarts", "per-image", 5, "optimized",
               steps=100, restarts=6, widths=GOAL_WIDTHS[:1]),
    AttackSpec("noise-8", "random pixels 8x8 (control)", "noise", 8, "random"),
)
MEASURES = ("accuracy", "certificate")
"""What `--only attack=` may name besides attacks."""


@dataclass(frozen=True)
class Budget:
    """How much is spent on each cell; every field is at least 1.

    limit: judged images of universal patches. per_image_limit: of A-QAPA and LaVAN per image. goal_limit: of A-QAPA per
    image on the ready model, which goals are about, at the widths of the goals. query_limit: of Patch-RS.
    steps, attack_batch, restarts, craft_limit: of universal patches. per_image_steps, per_image_restarts: of A-QAPA per
    image. lavan_steps: of LaVAN. queries: of Patch-RS, for each image. stride: of the grid of worst places, in pixels.
    certificate_limit, certificate_size, certificate_masks: images, side of the patch, masks along each axis.
    """

    limit: int = 500
    per_image_limit: int = 300
    goal_limit: int = 1000
    query_limit: int = 300
    steps: int = 300
    attack_batch: int = 100
    restarts: int = 1
    craft_limit: int = 2000
    per_image_steps: int = 40
    per_image_restarts: int = 3
    lavan_steps: int = 100
    queries: int = 1000
    stride: int = 4
    certificate_limit: int = 200
    certificate_size: int = 5
    certificate_masks: int = 6

    def __post_init__(self) -> None:
        low = {name: value for name, value in vars(self).items() if value < 1}
        if low:
            raise InputError(f"numbers of the study must be at least 1, got {low}")

    def judged(self, spec: AttackSpec, goal: bool = False) -> int:
        """Images that an attack is judged on. goal: whether the project's goals are about these engines."""
        if goal and spec.method == "per-image" and not spec.steps:
            return max(self.goal_limit, self.per_image_limit)
        return {"patch-rs": self.query_limit, "per-image": self.per_image_limit, "lavan": self.per_image_limit}.get(
            spec.method, self.limit
        )


@dataclass(frozen=True)
class Grid:
    """The whole study.

    widths: columns. surrogates: widths at which universal patches are crafted, besides the attacked width itself.
    passes: over the training images, of every defence. max_steps: stops each training early; 0 never.
    extra: further options of `edgeguard harden` for all defences.

    Raises:
        InputError: an empty or unknown entry.
    """

    model: str
    data: str
    weights: Path | None = None
    image_size: int | None = None
    widths: tuple[str, ...] = ("8", "5", "4", "3", "2")
    surrogates: tuple[str, ...] = ("8", "4", "2")
    seeds: tuple[int, ...] = (0,)
    defences: tuple[Defence, ...] = DEFENCES
    ablations: tuple[Defence, ...] = ()
    attacks: tuple[AttackSpec, ...] = ATTACKS
    passes: int = 24
    max_steps: int = 0
    extra: tuple[str, ...] = ()
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        parse_widths(",".join(self.widths))
        if not set(self.surrogates) <= set(self.widths):
            raise InputError(
                f"surrogates {', '.join(self.surrogates)} must be among the widths {', '.join(self.widths)}"
            )
        if not self.seeds or min(self.seeds) < 0 or self.passes < 1 or self.max_steps < 0:
            raise InputError("the study needs seeds of at least 0, passes >= 1 and max steps >= 0")
        names = [defence.name for defence in (*self.defences, *self.ablations)]
        if not names or len(set(names)) != len(names):
            raise InputError(f"defences need names of their own, got {names}")

    def images(self, spec: AttackSpec, defence: Defence, width: str) -> int:
        """Judged images of one cell: always the first ones of one order, so that engines are compared on what both have."""
        return self.budget.judged(spec, bool(defence.ready) and width in GOAL_WIDTHS)

    def epochs(self, defence: Defence) -> int:
        return max(1, int(self.passes / defence.passes))

    def trained(self, defence: Defence) -> tuple[str, ...]:
        """Widths that a defence trains at."""
        return defence.widths or self.widths

    def judged(self, defence: Defence) -> tuple[str, ...]:
        """Widths at which a defence's engines are attacked."""
        chosen = ABLATION_WIDTHS if defence.ablation else self.widths
        return tuple(width for width in self.widths if width in chosen and width in self.trained(defence))

    def attacked_by(self, defence: Defence, width: str) -> tuple[AttackSpec, ...]:
        """Attacks on a defence's engine of this width."""
        return tuple(
            spec for spec in self.attacks
            if (not defence.ablation or spec.name in ABLATION_ATTACKS) and (not spec.widths or width in spec.widths)
        )  # fmt: skip

    def sources(self, defence: Defence, width: str) -> tuple[str, ...]:
        """Widths whose universal patches attack an engine: its own first."""
        others = [one for one in self.surrogates if one != width and one in self.trained(defence)]
        return (width, *others)


def ready_row(name: str) -> Defence:
    """A ready model of the package as a row of its own."""
    return Defence(READY, f"QADT-R, zoo:{name}", (), ready=name)


def ablations(defences: tuple[Defence, ...] = DEFENCES) -> tuple[Defence, ...]:
    """QADT-R without one part after the other; none where QADT-R itself is not there."""
    return tuple(
        replace(ours, name=name, title=title, options=(*ours.options, *options), passes=passes or ours.passes,
                widths=widths, ablation=True)
        for ours in defences if ours.name == OURS
        for name, title, options, passes, widths in PARTS
    )  # fmt: skip
