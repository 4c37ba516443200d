"""Paired differences as words and tables, and how tasks and their scores are called. All of it is plain text."""

from __future__ import annotations

from collections.abc import Sequence

from hfsd.findings import Estimate, Paired, Results, TaskScore, TaskSummary, VariantSummary
from hfsd.stats import is_share, key_of
from hfsd.units import estimate_text, p_text, plural

PAIRED_NOTE = (
    "Differences of variants that answered the same documents, with 95% intervals of a paired bootstrap. McNemar's p "
    "is exact and two-sided. The exchange test takes its place where documents are not just right or wrong, and in a "
    "mean of several tasks: a coin exchanges the two answers of each document. Better or worse: the interval leaves "
    "zero out and p < 0.05; nothing is corrected for the number of comparisons."
)
UNTOLD = "not told apart"  # of `findings.VERDICTS`


def in_percent(task: TaskSummary) -> bool:
    """Whether a task's scores are shares of documents, and print in percent."""
    return is_share(task.metric, task.chance, task.higher_is_better)


def score_text(score: TaskScore | Estimate, share: bool) -> str:
    """`61.0 [54.1, 67.5]`: a score and its 95% interval, in percent without the sign, or in the task's own unit."""
    return estimate_text(Estimate(score.value, score.low, score.high), 100 if share else 1, 1 if share else 3)


def label(results: Results, task: TaskSummary) -> str:
    """The task's name, with metric and filter where the name alone would not tell."""
    same = [t for t in results.tasks if t.task == task.task]
    parts = [task.task]
    if len({t.metric for t in same}) > 1:
        parts.append(task.metric)
    if len({t.filter for t in same}) > 1:
        parts.append(task.filter)
    return " ".join(parts)


def counted(results: Results) -> list[TaskSummary]:
    """The tasks that enter the mean."""
    return [t for t in results.tasks if t.in_mean]


def line_of(results: Results, variant_id: str) -> VariantSummary | None:
    """The closing table's line of a variant."""
    return next((v for v in results.variants if v.variant.id == variant_id), None)


def at_n(tasks: Sequence[TaskSummary]) -> str:
    """`n = 200`, or each task's own n where they differ."""
    sizes = sorted({t.n for t in tasks})
    return f"n = {sizes[0]}" if len(sizes) == 1 else f"n = {sizes[0]} to {sizes[-1]}"


def on_text(results: Results, found: Paired) -> str:
    """`on arc_easy`, or `in the mean over 2 tasks`."""
    task = task_of(results, found)
    return f"in the mean over {plural(len(counted(results)), 'task')}" if task is None else f"on {label(results, task)}"


def difference_text(results: Results, found: Paired) -> str:
    """`+2.1 points [-4.2, 8.3] (McNemar p = 0.62, n = 24), not told apart at this n`."""
    test = found.test if found.test == "McNemar" else f"{found.test} test"
    return f"{gap_text(results, found)} ({test} {p_text(found.p)}, n = {found.n}), {verdict_text(found)}"


def verdict_text(found: Paired) -> str:
    """`better`, `worse` or `not told apart at this n`."""
    return f"{UNTOLD} at this n" if found.verdict == UNTOLD else found.verdict


def gap_text(results: Results, found: Paired) -> str:
    """`+2.1 points [-4.2, +8.3]`, or in the task's own unit."""
    task = task_of(results, found)
    if task is None or in_percent(task):
        return estimate_text(found.difference, 100, sign="+", unit=" points")
    return estimate_text(found.difference, places=3, sign="+", unit=f" {found.metric}")


def task_of(results: Results, found: Paired) -> TaskSummary | None:
    """The task of a difference; None for the mean."""
    if found.task is None:
        return None
    key = (found.task, found.metric, found.filter)
    return next(t for t in results.tasks if key_of(t) == key)


def paired_table(results: Results, against: str = "arms") -> list[list[str]]:
    """Header row, then one row per pair and task or mean; empty where nothing was compared.

    Args:
        results: of a run.
        against: `original`: every variant less the original; `arms`: all other pairs; `sft`: of them, those less sft.
    """
    arms = {v.variant.id: v.variant.arm for v in results.variants}
    chosen = [p for p in results.paired if arms[p.second] == against or (against == "arms" and p.second != "original")]
    rows = [
        [
            f"{p.first} - {p.second}",
            "mean" if (task := task_of(results, p)) is None else label(results, task),
            gap_text(results, p),
            f"{p_text(p.p)} ({p.test})",
            str(p.n),
            p.verdict,
        ]
        for p in chosen
    ]
    return [["pair", "on", "difference", "p", "n", "verdict at this n"], *rows] if rows else []
