"""The arithmetic of scores that needs no documents: intervals, recovery, the order of variants, seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from hfsd.errors import HfsdError
from hfsd.findings import Estimate, EvalRow, TaskSummary, VariantSummary
from hfsd.records import ARMS, Variant

Z95 = 1.959963984540054  # two-sided 95% of the normal distribution
EPSILON = 1e-9  # scores closer than this are equal: far below one document in any set
RESAMPLES = 5000  # draws of a bootstrap


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
    named = metric.startswith(("acc", "exact_match")) or metric in ("mc1", "mc2")  # and not mcc, a correlation
    return higher_is_better and (chance is not None or named)


def interval(row: EvalRow) -> tuple[float, float] | tuple[None, None]:
    """The 95% interval of one score: Wilson for shares of documents, else 1.96 standard errors, else none is known."""
    share = is_share(row.metric, row.chance, row.higher_is_better) and 0 <= row.value <= 1
    if share and row.pooled:
        return wilson(row.value, row.n)
    if row.stderr is None:
        return None, None
    low, high = row.value - Z95 * row.stderr, row.value + Z95 * row.stderr
    return (max(0.0, low), min(1.0, high)) if share else (low, high)


@cache
def t95(degrees: int) -> float:
    """The two-sided 95% quantile of Student's t with `degrees` of freedom, at least one, found by halving."""
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(degrees)
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _t_within(middle, degrees) < 0.95 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _t_within(angle: float, degrees: int) -> float:
    """P(|T| < sqrt(degrees) tan(angle)), exact: Abramowitz and Stegun 26.7.3 for odd degrees, 26.7.4 for even ones."""
    odd = degrees % 2
    total, term = 0.0, math.cos(angle) if odd else 1.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= math.cos(angle) ** 2 * k / (k + 1)
    series = math.sin(angle) * total
    return 2 / math.pi * (angle + series) if odd else series


def over_prompts(value: float, stderr: float | None, prompts: int, top: float = math.inf) -> Estimate:
    """A mean over prompts with its 95% interval, by Student's t, within [0, top]; of a single prompt there is none."""
    if stderr is None or prompts < 2:
        return Estimate(value)
    half = t95(prompts - 1) * stderr
    return Estimate(value, max(0.0, value - half), min(top, value + half))


def recovery(variant: float, original: float, chance: float = 0.0) -> float | None:
    """(variant - chance) / (original - chance) x 100; None where the original is not above chance."""
    if original - chance < EPSILON:
        return None
    return 100.0 * ((variant - chance) / (original - chance))


def key_of(task: TaskSummary) -> tuple[str, str, str]:
    """Task, metric and filter."""
    return task.task, task.metric, task.filter


def by_arm(variant: Variant) -> tuple[int, str, int]:
    """Sorts variants as every table and picture shows them."""
    place = ARMS.index(variant.arm) if variant.arm in ARMS else len(ARMS)
    return place, variant.data or "", -1 if variant.seed is None else variant.seed


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
        means = [line.mean.value for line in lines if line.mean is not None]
        shares = [line.recovery.value for line in lines if line.recovery is not None]
        whole = len(shares) == len(lines)
        found.append(
            OverSeeds(
                arm=arm,
                data=data,
                seeds=tuple(line.variant.seed for line in lines if line.variant.seed is not None),
                mean=average(means),
                mean_sd=statistics.stdev(means),
                recovery=average(shares) if whole else None,
                recovery_sd=statistics.stdev(shares) if whole else 0.0,
            )
        )
    return found


def ratio_stderr(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Standard error of sum(a) / sum(b) over documents (Cochran, Sampling Techniques, 3rd ed., section 6.3)."""
    n, total = len(pairs), math.fsum(b for _, b in pairs)
    if n < 2:
        return None
    ratio = math.fsum(a for a, _ in pairs) / total
    return math.sqrt(n / (n - 1) * math.fsum((a - ratio * b) ** 2 for a, b in pairs)) / total


def average(values: Sequence[float]) -> float:
    """Their mean."""
    return math.fsum(values) / len(values)
