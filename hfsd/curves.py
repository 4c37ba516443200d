"""The curves of a sweep: their record, tables and pictures. Pure: no torch, no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd.figures import COLOURS, MUTED, blank, save
from hfsd.findings import Estimate
from hfsd.markdown import escape, table
from hfsd.records import SCHEMA, Variant
from hfsd.stats import by_arm
from hfsd.units import NA, aligned, estimate_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A shape per arm beside its colour: a curve is told apart in black and white, too.
SHAPES = {"pruned": "s", "sft": "^", "self-distilled": "o", "sdd+kd": "D", "on-policy": "v", "merged": "P"}
STYLES = ("-", "--", ":", "-.")  # of one arm's data sets and seeds
WIDE = 8  # values that span more than this ratio stand on a scale of powers of two
LABELS = {"data.rows": "training rows asked for (data.rows)", "prune.blocks": "blocks removed (prune.blocks)"}


@dataclass(frozen=True)
class Mark:
    """One variant at one value. `mean` is over the tasks that count, a share; `recovery` in percent of the original."""

    variant: Variant
    mean: Estimate | None
    recovery: Estimate | None


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    `value` is spelled as it was asked for, `folder` lies below the sweep's; `rows` were trained on, of all data sets
    together; `removed` of `n_layers` blocks are gone; `asked` says over what the marks are means, `setups` how each
    task was asked; `note` what a reader must know of this point alone.
    """

    value: str
    folder: str
    rows: int
    removed: int
    n_layers: int
    asked: str
    marks: list[Mark]
    note: str = ""
    setups: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Curve:
    """The points of one field, in the order asked for; `picture` is a file name."""

    field: str
    points: list[Point]
    picture: str

    @property
    def variants(self) -> list[Variant]:
        """All variants of the points, in the one order."""
        found = dict.fromkeys(mark.variant for point in self.points for mark in point.marks)
        return sorted(found, key=by_arm)

    @property
    def asked(self) -> str:
        """Over what the means of all points are."""
        return "; ".join(dict.fromkeys(point.asked for point in self.points))

    @property
    def setups(self) -> list[str]:
        """How the tasks were asked; what is not so at all points begins with the values where it is."""
        places: dict[str, list[str]] = {}
        for point in self.points:
            for line in point.setups:
                places.setdefault(line, []).append(point.value)
        everywhere = len(self.points)
        return [line if len(at) == everywhere else f"{', '.join(at)}: {line}" for line, at in places.items()]


@dataclass(frozen=True)
class SweepResult:
    """`sweep.json`: quality over each field that was swept. `folder` holds the points' runs, tables and pictures."""

    name: str
    model: str
    folder: str
    curves: list[Curve]
    schema: int = SCHEMA


def draw(result: SweepResult, out: Path) -> None:
    """One PNG per curve: recovery of every variant over the value."""
    files: dict[str, Callable[[], Figure]] = {c.picture: partial(picture, c, result.name) for c in result.curves}
    save(files, out)


def picture(curve: Curve, name: str) -> Figure:
    """Recovery (%) of every variant over the value, with 95% intervals, and the original as a line at 100%."""
    figure = blank(7.6, 5.0)
    axes = figure.axes[0]
    places, numeric = _places([p.value for p in curve.points])
    axes.axhline(100, color=COLOURS["original"], linewidth=1.6, label="original (100% by definition)")
    variants = [v for v in curve.variants if v.arm != "original"]
    for variant in variants:
        _line(axes, curve, variant, places, variants)
    known = [m.recovery for p in curve.points for m in p.marks if m.recovery and m.variant in variants]
    _scale(axes, places, numeric and min(places) > 0 and max(places) > WIDE * min(places), known)
    axes.set_xticks(places, [_tick(p) for p in curve.points])
    axes.minorticks_off()
    axes.set_xlabel(_label(curve))
    axes.set_ylabel("recovery (% of the original's mean score)")
    bars = "; bars: 95% intervals of a paired bootstrap" if known else ""
    axes.set_title(f"{name}: quality over {curve.field}\n{curve.asked}{bars}")
    if not known:
        words = "no recovery to draw: the original clears chance on no task"
        axes.annotate(words, (0.5, 0.4), xycoords="axes fraction", ha="center", color=MUTED)
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _scale(axes: Any, places: Sequence[float], powers: bool, known: Sequence[Estimate]) -> None:
    """The ends of both axes, by hand: lines that stand aside of their values would widen them."""
    if powers:
        axes.set_xscale("log", base=2)
        axes.set_xlim(*(2**end for end in _padded([math.log2(p) for p in places])))
    else:
        axes.set_xlim(*_padded(places))
    axes.set_ylim(*_padded([100.0, *(b for e in known for b in (e.low, e.value, e.high) if b is not None)]))


def _line(axes: Any, curve: Curve, variant: Variant, places: Sequence[float], variants: Sequence[Variant]) -> None:
    """Draws one variant where its recovery is known."""
    from matplotlib.transforms import ScaledTranslation

    found = [
        (place, mark.recovery)
        for place, point in sorted(zip(places, curve.points, strict=True), key=lambda pair: pair[0])
        for mark in point.marks
        if mark.variant == variant and mark.recovery is not None
    ]
    if not found:
        return
    of_arm = [v for v in variants if v.arm == variant.arm]
    # beside one another, so that no bar hides another's
    aside = 4.0 * (list(variants).index(variant) - (len(variants) - 1) / 2)  # points of 1/72 inch
    axes.errorbar(
        [place for place, _ in found],
        [recovery.value for _, recovery in found],
        yerr=_whiskers([recovery for _, recovery in found]),
        color=COLOURS.get(variant.arm, MUTED),
        marker=SHAPES.get(variant.arm, "o"),
        linestyle=STYLES[of_arm.index(variant) % len(STYLES)],
        linewidth=1.6,
        elinewidth=1.1,
        markersize=6,
        capsize=3,
        label=variant.id,
        transform=axes.transData + ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans),
    )


def _whiskers(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Lengths below and above; none where no interval is known."""
    low = [e.value if e.low is None else e.low for e in estimates]
    high = [e.value if e.high is None else e.high for e in estimates]
    return [
        [max(0.0, e.value - bound) for e, bound in zip(estimates, low, strict=True)],
        [max(0.0, bound - e.value) for e, bound in zip(estimates, high, strict=True)],
    ]


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis that shows all values."""
    room = 0.08 * (max(values) - min(values)) or 5.0
    return min(values) - room, max(values) + room


def _places(values: Sequence[str]) -> tuple[list[float], bool]:
    """Where the values stand on the axis, and whether they are numbers; what is none stands in the order asked for."""
    try:
        return [float(value) for value in values], True
    except ValueError:
        return [float(place) for place in range(len(values))], False


def _tick(point: Point) -> str:
    return f"{point.value}\n({point.note})" if point.note else point.value


def _label(curve: Curve) -> str:
    label, depths = LABELS.get(curve.field, curve.field), {p.n_layers for p in curve.points}
    return f"{label}, of {depths.pop()}" if curve.field == "prune.blocks" and len(depths) == 1 else label


def markdown(result: SweepResult) -> str:
    """The text of sweep.md, which stands beside the pictures."""
    parts = [f"# {escape(result.name)}: a sweep", f"Original: {escape(result.model)}."]
    for curve in result.curves:
        parts += [
            f"## Quality over {escape(curve.field)}",
            f"![Recovery of every variant over {escape(curve.field)}]({curve.picture})",
            table(wide(curve)),
            f"{escape(_told(curve))} Every other field is the recipe's.",
            "\n".join(f"- {escape(line)}" for line in curve.setups),
            "\n".join(f"- {escape(p.value)}: {escape(p.note)}" for p in curve.points if p.note),
            "\n".join(f"- {escape(p.value)}: run in `{p.folder}`" for p in curve.points),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def wide(curve: Curve) -> list[list[str]]:
    """Header row, then a row per value: what was cut, the rows trained on, and two columns per variant."""
    heads = [f"{v.id} {what}" for v in curve.variants for what in ("mean %", "recovery %")[: 1 + (v.arm != "original")]]
    rows = [[curve.field, "blocks removed", "rows trained on", *heads]]
    for point in curve.points:
        cells = [point.value, f"{point.removed} of {point.n_layers}", str(point.rows)]
        for variant in curve.variants:
            mean, recovery = numbers(point, variant)
            cells += [mean] if variant.arm == "original" else [mean, recovery]
        rows.append(cells)
    return rows


def text(result: SweepResult) -> str:
    """The curves for a terminal: a line per value and variant."""
    lines = []
    for curve in result.curves:
        rows = [[curve.field, "variant", "mean %", "recovery %"]]
        for point in curve.points:
            shown = [[v.id, *numbers(point, v)] for v in curve.variants]
            rows += [[point.value if not at else "", *cells] for at, cells in enumerate(shown)]
        lines += [*aligned(rows), _told(curve), *(f"- {line}" for line in curve.setups)]
        lines += [f"{curve.field}={p.value}: {p.note}" for p in curve.points if p.note]
        lines += [f"picture: {Path(result.folder) / curve.picture}", ""]
    return "\n".join([*lines, f"tables: {Path(result.folder) / 'sweep.md'}"])


def numbers(point: Point, variant: Variant) -> tuple[str, str]:
    """Mean and recovery of a variant at a point, in percent with intervals, or `n/a`."""
    mark = next((m for m in point.marks if m.variant == variant), None)
    if mark is None:
        return NA, NA
    return estimate_text(mark.mean, 100), estimate_text(mark.recovery)


def _told(curve: Curve) -> str:
    return f"Scores: {curve.asked}. Recovery: of the original's mean; in brackets: 95% intervals."
