"""The pictures of a report, as PNG files: scores and recovery, and those of the stages that the results can fill."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd.figures import COLOURS, MUTED, blank, block_scores, candidates, chosen_scores, loss, save
from hfsd.records import Results, TaskScore
from hfsd.stats import mean_score
from hfsd.text import at_n, counted, in_percent, label, plural, recovered

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(results: Results, out: Path) -> list[str]:
    """Writes the pictures that the results can fill, and returns their file names.

    `block_scores.png` and `candidates.png` need a scan, `loss.png` a trained arm; `recovery.png` is always there.
    """
    files: dict[str, Callable[[], Figure]] = {"recovery.png": lambda: recovery(results)}
    scan = results.scan
    if scan and scan.scores:
        files["block_scores.png"] = lambda: block_scores(chosen_scores(scan, results.plan), results.plan)
    if scan and scan.candidates:
        files["candidates.png"] = lambda: candidates(scan, results.plan)
    if any(t.losses for t in results.training):
        files["loss.png"] = lambda: loss(results.training)
    save(files, out)
    return list(files)


def recovery(results: Results) -> Figure:
    """One panel per task, the mean first: a dot and 95% interval per variant, its recovery in words beside it."""
    panels = list(_panels(results))
    ids = [v.variant.id for v in results.variants]
    heights = [0.55 + 0.3 * len(ids)] * len(panels)
    figure = blank(8.0, sum(heights) + 0.75, len(panels))
    for axes, (title, scores, chance, share, unit) in zip(figure.axes, panels, strict=True):
        scale = 100 if share else 1
        for y, line in enumerate(results.variants):
            score = scores[line.variant.id]
            axes.errorbar(
                score.value * scale,
                y,
                xerr=_whiskers(score, scale),
                fmt="o",
                color=COLOURS.get(line.variant.arm, MUTED),
                capsize=3,
                markersize=6,
                linewidth=1.6,
            )
            words, place = _recovery_label(score, line.variant.arm), (1.015, y)
            tint = MUTED if line.variant.arm == "original" else "black"
            axes.annotate(words, place, xycoords=("axes fraction", "data"), va="center", fontsize=9, color=tint)
        if chance is not None:
            axes.axvline(chance * scale, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.1)
            axes.annotate(
                f"chance {100 * chance:.0f}%",
                (chance * scale, 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, -1),
                textcoords="offset points",
                fontsize=8,
                color=MUTED,
                va="top",
            )
        axes.set_yticks(range(len(ids)), ids)
        axes.set_ylim(len(ids) - 0.4, -0.95)
        axes.set_title(title)
        axes.set_xlabel(unit, fontsize=9, labelpad=1)
        axes.grid(axis="x", color="#E4E4E4", linewidth=0.8)
        axes.set_axisbelow(True)
        if share:
            axes.set_xlim(0, 100)
    words = (
        "dots: scores; whiskers: 95% intervals; recovery: share of the original's score (after taking chance from both)"
    )
    figure.supxlabel(words, fontsize=8.5)
    return figure


def _panels(results: Results) -> Iterator[tuple[str, dict[str, TaskScore], float | None, bool, str]]:
    """(title, score per variant, chance, in percent, unit) of the mean and of every task."""
    tasks = counted(results)
    if len(tasks) > 1:
        means = {v.variant.id: mean_score(tasks, v.variant.id) for v in results.variants}
        chance = sum(t.chance or 0.0 for t in tasks) / len(tasks)
        title = f"Mean of {plural(len(tasks), 'task')} ({at_n(tasks)} each)"
        yield title, {k: m for k, m in means.items() if m}, chance, True, "score (%)"
    for task in results.tasks:
        share = in_percent(task)
        title = f"{label(results, task)} ({task.metric}, n = {task.n}, {plural(task.shots, 'shot')})"
        if not task.in_mean:
            title += ", not in the mean"
        unit = "score (%)" if share else f"{task.metric}{'' if task.higher_is_better else ' (lower is better)'}"
        scores = task.scores if task.in_mean else {k: _without_recovery(s) for k, s in task.scores.items()}
        yield title, scores, task.chance, share, unit


def _without_recovery(score: TaskScore) -> TaskScore:
    # near chance a ratio says nothing, so none is drawn for a task that does not count
    return TaskScore(score.value, score.low, score.high, None, None)


def _recovery_label(score: TaskScore, arm: str) -> str:
    if score.recovery is None:
        return ""
    if arm == "original":  # 100% by definition: its row heads the column instead
        return "recovery (corrected)"
    corrected = "" if score.chance_corrected is None else f" ({recovered(score.chance_corrected)})"
    return f"{recovered(score.recovery)}{corrected}"


def _whiskers(score: TaskScore, scale: float) -> Any:
    if score.low is None or score.high is None:
        return None
    return [[max(0.0, score.value - score.low) * scale], [max(0.0, score.high - score.value) * scale]]
