"""The pictures of scores: recovery of every variant as bars, and every task's scores as dots, with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hfsd.figures import COLOURS, MUTED, blank
from hfsd.findings import Estimate, Results, TaskScore, VariantSummary
from hfsd.records import Variant
from hfsd.text import at_n, counted, estimate_text, in_percent, label, plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 4.7  # inches: across a phone, letters of 10 points are 10 pixels high
PALE = 0.42  # the second bar of a pair
PANELS = 16  # a group such as MMLU has dozens of tasks: more are left to the table


def short_names(variants: Sequence[Variant]) -> dict[str, str]:
    """Name in a picture by variant id: the arm, with data set and seed only where these tell variants apart."""
    data = {v.data for v in variants if v.data} if len({v.data for v in variants if v.data}) > 1 else set()
    seeds = {v.seed for v in variants if v.seed is not None}
    names = {v.id: Variant(v.arm, v.data if data else None, v.seed if len(seeds) > 1 else None).id for v in variants}
    return names if len(set(names.values())) == len(names) else {v.id: v.id for v in variants}


def recovery(results: Results) -> Figure:
    """Two bars per variant: recovery, and in a paler tint chance-corrected, with intervals; 100% is the original."""
    lines = [v for v in results.variants if v.variant.arm != "original"]
    names = short_names([v.variant for v in results.variants])
    figure = blank(WIDTH, 1.25 + 0.66 * len(lines))
    axes = figure.axes[0]
    axes.axvline(100, color=COLOURS["original"], linestyle=(0, (4, 3)), linewidth=1.2, zorder=3)
    axes.text(100, 1.01, "original", transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=9)
    for y, line in enumerate(lines):
        _beside(axes, names[line.variant.id], y - 0.34, at=0, fontsize=10)
        _bar(axes, y - 0.05, line.recovery, line.variant.arm, 1.0)
        _bar(axes, y + 0.22, line.chance_corrected, line.variant.arm, PALE)
    axes.set_xlim(*_recovery_limits(lines))
    axes.set_ylim(len(lines) - 0.55, -0.55)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("share of the original's mean score (%)", fontsize=9)
    axes.grid(axis="x", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    _bar_legend(figure)
    return figure


def _bar(axes: Any, y: float, found: Estimate | None, arm: str, strength: float) -> None:
    """One bar with its whisker, and its number in a column at the right."""
    if found is not None:
        axes.barh(y, found.value, height=0.24, color=COLOURS.get(arm, MUTED), alpha=strength, linewidth=0)
        reach = _reach(found, 1)
        axes.errorbar(found.value, y, xerr=reach, fmt="none", ecolor="black", capsize=2.5, linewidth=1.1, zorder=4)
    tint = "black" if strength == 1 else MUTED
    _beside(axes, estimate_text(found, unit="%"), y, fontsize=9, color=tint)


def _recovery_limits(lines: Sequence[VariantSummary]) -> tuple[float, float]:
    """The axis holds nought and 100%, and what is near: intervals of few documents may reach far beyond."""
    found = [e for v in lines for e in (v.recovery, v.chance_corrected) if e is not None]
    ends = [x for e in found for x in (e.value, e.low, e.high) if x is not None]
    return max(-60.0, min([0.0, *ends]) * 1.04), min(180.0, max([104.0, *(1.04 * x for x in ends)]))


def _bar_legend(figure: Figure) -> None:
    from matplotlib.patches import Patch

    keys = [Patch(color=MUTED, label="recovery"), Patch(color=MUTED, alpha=PALE, label="chance-corrected")]
    figure.legend(
        handles=keys, loc="outside lower left", ncols=2, frameon=False, fontsize=9, handlelength=1.2, borderaxespad=0
    )


def tasks(results: Results) -> Figure:
    """One panel per task, the mean first: a dot and 95% interval per variant, its recovery in words beside it."""
    panels = list(_panels(results))
    names = short_names([v.variant for v in results.variants])
    figure = blank(WIDTH, (0.72 + 0.24 * len(names)) * len(panels), len(panels))
    for axes, (title, scores, chance, share, unit) in zip(figure.axes, panels, strict=True):
        scale = 100 if share else 1
        for y, line in enumerate(results.variants):
            _dot(axes, y, scores[line.variant.id], line.variant.arm, scale)
        if chance is not None:
            _chance(axes, chance * scale)
        axes.set_yticks(range(len(names)), list(names.values()), fontsize=9)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_title(title)
        axes.set_xlabel(unit, fontsize=9, labelpad=1)
        axes.grid(axis="x", color="#E4E4E4", linewidth=0.8)
        axes.set_axisbelow(True)
        if share:
            axes.set_xlim(0, 100)
    return figure


Panel = tuple[str, dict[str, TaskScore], float | None, bool, str]


def _panels(results: Results) -> Iterator[Panel]:
    """(title, score per variant, chance, in percent, unit) of the mean and of every task."""
    found = counted(results)
    if len(found) > 1:
        means = {v.variant.id: _mean(v) for v in results.variants}
        chance = sum(t.chance or 0.0 for t in found) / len(found)
        yield f"mean of {plural(len(found), 'task')}, {at_n(found)}", means, chance, True, "score (%)"
    for task in results.tasks[:PANELS]:
        share = in_percent(task)
        title = f"{label(results, task)}, n = {task.n}, {plural(task.shots, 'shot')}"
        if not task.in_mean:
            title += ", not in the mean"
        unit = f"{task.metric} (%)" if share else f"{task.metric}{'' if task.higher_is_better else ', lower is better'}"
        # near chance a ratio says nothing, so none is drawn for a task that does not count
        yield (
            title,
            task.scores if task.in_mean else {k: _bare(s) for k, s in task.scores.items()},
            task.chance,
            share,
            unit,
        )


def _mean(line: VariantSummary) -> TaskScore:
    assert line.mean is not None, "where tasks count, every variant has a mean"
    return TaskScore(line.mean.value, line.mean.low, line.mean.high, line.recovery, line.chance_corrected)


def _bare(score: TaskScore) -> TaskScore:
    return TaskScore(score.value, score.low, score.high, None, None)


def _dot(axes: Any, y: int, score: TaskScore, arm: str, scale: float) -> None:
    reach = _reach(Estimate(score.value, score.low, score.high), scale)
    colour = COLOURS.get(arm, MUTED)
    axes.errorbar(score.value * scale, y, xerr=reach, fmt="o", color=colour, capsize=3, markersize=5.5, linewidth=1.5)
    words = estimate_text(score.recovery, places=0, unit="%") if score.recovery else ""
    if arm == "original":  # 100% by definition: its row heads the column instead
        words = "recovery [95%]" if words else ""
    tint = MUTED if arm == "original" else "black"
    _beside(axes, words, y, fontsize=8.5, color=tint)


def _chance(axes: Any, at: float) -> None:
    axes.axvline(at, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.1)
    place = {"xycoords": ("data", "axes fraction"), "xytext": (3, 0), "textcoords": "offset points"}
    axes.annotate(f"chance {at:.0f}%", (at, 1), **place, fontsize=8, color=MUTED, va="top")


def _beside(axes: Any, words: str, y: float, at: float = 1.02, **looks: Any) -> None:
    """Words at the height `y` of the data, at a share of the panel's width; by default a column at its right."""
    axes.text(at, y, words, transform=axes.get_yaxis_transform(), va="center", **looks)


def _reach(found: Estimate, scale: float) -> list[list[float]] | None:
    """How far the interval reaches to both sides, as matplotlib wants it."""
    if found.low is None or found.high is None:
        return None
    return [[max(0.0, found.value - found.low) * scale], [max(0.0, found.high - found.value) * scale]]
