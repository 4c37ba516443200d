"""The arithmetic of a report: intervals, which tasks count, recovery, and what an interval allows to be said."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hfsd.errors import HfsdError
from hfsd.records import ARMS, EvalRow, Shift, TaskScore, TaskSummary, TrainReport, Variant, VariantSummary

Z95 = 1.959963984540054  # two-sided 95% of the normal distribution
EPSILON = 1e-9  # scores closer than this are equal: far below one document in any set
MARGIN = 0.10  # by how much the original must beat chance for a task to say anything about recovery
# Metrics of one task that say the same thing twice; the leaderboard takes the first of these, else the first given.
PREFERRED = ("acc_norm",)

TaskKey = tuple[str, str, str]


def wilson(value: float, n: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a share `value` of `n` documents, within [0, 1].

    For a mean of scores between 0 and 1 that are not all 0 or 1 it is wider than needed, never narrower.

    Raises:
        HfsdError: no documents, or a value outside [0, 1].
    """
    if n < 1:
        raise HfsdError(f"a score over {n} documents has no interval; evaluate at least one document")
    if not 0 <= value <= 1:
        raise HfsdError(f"{value:g} is no share of documents; it must lie between 0 and 1")
    z2 = Z95 * Z95 / n
    centre = (value + z2 / 2) / (1 + z2)
    half = Z95 * math.sqrt(value * (1 - value) / n + z2 / (4 * n)) / (1 + z2)
    # at 0 and 1 the bound is exact; rounding would leave 1e-17
    low = 0.0 if value == 0 else max(0.0, centre - half)
    high = 1.0 if value == 1 else min(1.0, centre + half)
    return low, high


def is_share(metric: str, chance: float | None, higher_is_better: bool) -> bool:
    """Whether a metric is a share of documents (printed in percent, Wilson interval)."""
    return higher_is_better and (chance is not None or metric.startswith(("acc", "exact_match", "mc")))


def interval(row: EvalRow) -> tuple[float, float] | tuple[None, None]:
    """The 95% interval of one score: Wilson for shares, else 1.96 standard errors, else none is known."""
    if is_share(row.metric, row.chance, row.higher_is_better) and 0 <= row.value <= 1:
        return wilson(row.value, row.n)
    if row.stderr is None:
        return None, None
    return row.value - Z95 * row.stderr, row.value + Z95 * row.stderr


def recovery(variant: float, original: float, chance: float = 0.0) -> float | None:
    """(variant - chance) / (original - chance) x 100; None where the original is not above chance."""
    if original - chance < EPSILON:
        return None
    return 100.0 * (variant - chance) / (original - chance)


def compare(a: TaskScore, b: TaskScore, higher_is_better: bool = True) -> str:
    """Whether `a` is "better" or "worse" than `b`, or "" where the 95% interval of the difference holds zero.

    The interval is Newcombe's (1998, method 10), from both scores' own intervals as if other documents had been
    asked. The variants answer the same ones, so that this claims less than a paired test would.
    """
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return ""
    difference = a.value - b.value
    low = difference - math.hypot(a.value - a.low, b.high - b.value)
    high = difference + math.hypot(a.high - a.value, b.value - b.low)
    if low <= 0 <= high:
        return ""
    return "better" if (low > 0) == higher_is_better else "worse"


def by_arm(variant: Variant) -> tuple[int, str, int]:
    """Sorts variants as every table and picture shows them."""
    place = ARMS.index(variant.arm) if variant.arm in ARMS else len(ARMS)
    return place, variant.data or "", -1 if variant.seed is None else variant.seed


def summarise_tasks(rows: Sequence[EvalRow]) -> list[TaskSummary]:
    """One summary per (task, metric, filter), in the order in which the original's rows come.

    Raises:
        HfsdError: no rows, no original, a variant without a task, or variants that answered different documents.
    """
    table: dict[TaskKey, dict[str, EvalRow]] = {}
    for row in rows:
        _sound(row)
        table.setdefault((row.task, row.metric, row.filter), {})[row.variant.id] = row
    ids = [v.id for v in sorted({row.variant for row in rows}, key=by_arm)]
    if "original" not in ids:
        raise HfsdError(
            f"no scores of the original among {ids or 'no variants'}; evaluate it first: nothing to recover to"
        )
    for key, scored in table.items():
        _same_documents(key, ids, scored)
    counted = _one_metric_per_task(list(table))
    return [_summary(key, ids, scored, key in counted) for key, scored in table.items()]


def summarise_variants(
    tasks: Sequence[TaskSummary],
    variants: Sequence[Variant],
    params: Mapping[str, int],
    shifts: Sequence[Shift],
    training: Sequence[TrainReport],
) -> list[VariantSummary]:
    """One line per variant: mean over the tasks that count, recovery as ratio of means, shift, training time.

    Raises:
        HfsdError: the parameter count of a variant is missing.
    """
    if missing := [v.id for v in variants if v.id not in params]:
        raise HfsdError(
            f"no parameter count for {', '.join(missing)}; counts are given for {', '.join(sorted(params))}"
        )
    shift_of = {s.variant.id: s for s in shifts}
    seconds = {t.variant.id: t.seconds for t in training}
    counted = [t for t in tasks if t.in_mean]
    lines = []
    for variant in sorted(variants, key=by_arm):
        mean = mean_score(counted, variant.id)
        lines.append(
            VariantSummary(
                variant=variant,
                params=int(params[variant.id]),
                mean=mean.value if mean else None,
                recovery=mean.recovery if mean else None,
                chance_corrected=mean.chance_corrected if mean else None,
                shift=shift_of.get(variant.id),
                train_seconds=seconds.get(variant.id),
                mean_low=mean.low if mean else None,
                mean_high=mean.high if mean else None,
            )
        )
    return lines


def mean_score(counted: Sequence[TaskSummary], variant_id: str) -> TaskScore | None:
    """Mean of a variant over tasks that count, with recoveries as ratios of means; None without such a task.

    The bounds are the means of the tasks' bounds: right if the tasks' errors move together (they may share
    documents), too wide if they do not.
    """
    if not counted:
        return None
    scores = [t.scores[variant_id] for t in counted]
    value = _mean([s.value for s in scores])
    original = _mean([t.scores["original"].value for t in counted])
    chance = _mean([t.chance or 0.0 for t in counted])
    return TaskScore(
        value=value,
        low=_mean([s.low if s.low is not None else s.value for s in scores]),
        high=_mean([s.high if s.high is not None else s.value for s in scores]),
        recovery=recovery(value, original),
        chance_corrected=recovery(value, original, chance),
    )


@dataclass(frozen=True)
class OverSeeds:
    """One arm on one data set over its seeds: mean and sample standard deviation of the score and of the recovery.

    `mean` is a share; `recovery` is in percent, None where the original is not above nought.
    """

    arm: str
    data: str | None
    seeds: tuple[int, ...]
    mean: float
    mean_sd: float
    recovery: float | None
    recovery_sd: float


def over_seeds(variants: Sequence[VariantSummary]) -> list[OverSeeds]:
    """The arms that were trained with several seeds and have a mean over tasks."""
    groups: dict[tuple[str, str | None], list[VariantSummary]] = {}
    for line in variants:
        if line.variant.seed is not None and line.mean is not None:
            groups.setdefault((line.variant.arm, line.variant.data), []).append(line)
    found = []
    for (arm, data), lines in groups.items():
        if len(lines) < 2:
            continue
        means = [line.mean for line in lines if line.mean is not None]
        shares = [line.recovery for line in lines if line.recovery is not None]
        whole = len(shares) == len(lines)
        found.append(
            OverSeeds(
                arm=arm,
                data=data,
                seeds=tuple(line.variant.seed for line in lines if line.variant.seed is not None),
                mean=_mean(means),
                mean_sd=statistics.stdev(means),
                recovery=_mean(shares) if whole else None,
                recovery_sd=statistics.stdev(shares) if whole else 0.0,
            )
        )
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _sound(row: EvalRow) -> None:
    what = f"{row.task} of {row.variant.id}"
    if row.n < 1:
        raise HfsdError(f"{what} was scored on {row.n} documents; evaluate at least one")
    if not math.isfinite(row.value) or (row.stderr is not None and not math.isfinite(row.stderr)):
        raise HfsdError(f"{what} is {row.value} +- {row.stderr}: no number; evaluate it again")


def _same_documents(key: TaskKey, ids: Sequence[str], scored: Mapping[str, EvalRow]) -> None:
    name = key[0]
    if missing := [i for i in ids if i not in scored]:
        raise HfsdError(f"{name} ({key[1]}) has no score of {', '.join(missing)}; evaluate every variant on every task")
    for field in ("n", "shots", "version", "chance", "higher_is_better"):
        seen = {i: getattr(scored[i], field) for i in ids}
        if len(set(seen.values())) > 1:
            values = ", ".join(f"{i} {v}" for i, v in seen.items())
            raise HfsdError(f"{name}: variants differ in {field} ({values}), so their scores cannot be compared")


def _one_metric_per_task(keys: Sequence[TaskKey]) -> set[TaskKey]:
    """A task that reports several metrics or filters enters a mean once."""
    chosen: dict[str, TaskKey] = {}
    for key in keys:
        best = chosen.setdefault(key[0], key)
        if key[1] in PREFERRED and best[1] not in PREFERRED:
            chosen[key[0]] = key
    return set(chosen.values())


def _summary(key: TaskKey, ids: Sequence[str], scored: Mapping[str, EvalRow], counts: bool) -> TaskSummary:
    original = scored["original"]
    note = _why_out(original) or ("" if counts else "another metric of this task is counted")
    return TaskSummary(
        task=key[0],
        metric=key[1],
        n=original.n,
        chance=original.chance,
        shots=original.shots,
        higher_is_better=original.higher_is_better,
        in_mean=not note,
        note=note,
        scores={i: _score(scored[i], original) for i in ids},
        filter=key[2],
        version=original.version,
    )


def _score(row: EvalRow, original: EvalRow) -> TaskScore:
    low, high = interval(row)
    ratio = row.higher_is_better
    return TaskScore(
        value=float(row.value),
        low=low,
        high=high,
        recovery=recovery(row.value, original.value) if ratio else None,
        chance_corrected=recovery(row.value, original.value, row.chance) if ratio and row.chance is not None else None,
    )


def _why_out(original: EvalRow) -> str:
    """Why a task says nothing about recovery, or "" where it does; judged on the original alone."""
    if not original.higher_is_better:
        return "lower is better"
    if original.chance is None:
        return "its chance level is not known"
    low, _ = interval(original)
    score, chance = f"{100 * original.value:.1f}%", f"{100 * original.chance:.1f}%"
    if original.value - original.chance < MARGIN - EPSILON:
        return f"the original scores {score}, less than {100 * MARGIN:.0f} points above chance ({chance})"
    if low is None or low <= original.chance:
        return f"the original's {score} has a 95% interval that is not clear of chance ({chance}) at n = {original.n}"
    return ""
