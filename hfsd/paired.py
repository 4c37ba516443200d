"""What variants that answered the same documents allow to be said: intervals and tests that use the pairing.

Intervals are percentiles of a bootstrap over documents (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
section 13.3): one draw of documents scores all variants. Tasks that ask the same documents share a draw, others have
draws of their own; a group such as MMLU is one set of documents.

A percentile bootstrap of few documents claims a little too much: of equals that answer 10 documents, 7% come out better
or worse; and it leaves zero out where 4 documents of 24 went one way and the rest neither, where McNemar's exact test
has p = 0.13. So "better" and "worse" need both: the interval leaves zero out, and p < 0.05 in a test of "exchanging
the two variants' answers changes nothing". For documents that are right or wrong that test is McNemar's, exact and
two-sided (Fagerland, Lydersen and Laake 2013, BMC Med Res Methodol 13:91, who count how seldom it claims too much, and
how often too little). Elsewhere, and for a mean of tasks, it is the randomisation test of which McNemar's is the
special case: it exchanges the answers of each document by a coin (Noreen 1989; Dror et al. 2018, P18-1128), and its p
is the share of `RESAMPLES` such exchanges, so an estimate.
Nothing is corrected for the number of comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy

from hfsd.documents import Answered, Array, Key
from hfsd.findings import Estimate, Paired, TaskSummary
from hfsd.records import Variant
from hfsd.stats import EPSILON, RESAMPLES, key_of

SEED = 0
LEVEL = 0.05
AT_ONCE = 2_000_000  # documents drawn at once, which bounds memory
DECIMALS = 9  # of a bound; beyond them it depends on the order in which a library adds

Pair = tuple[str, str]
Draws = dict[Key, dict[str, Array]]


def resample(answered: Mapping[Key, Answered]) -> Draws:
    """Every variant's score in each of `RESAMPLES` draws of the documents, with replacement; arrays (RESAMPLES,)."""
    found: Draws = {}
    for at, keys in enumerate(_clusters(answered)):
        columns = [c for k in keys for c in (*answered[k].sums.values(), *answered[k].weights.values())]
        # equal columns give equal sums to the last bit, so that a copy of the original recovers exactly 100%
        unique, back = numpy.unique(numpy.stack(columns, axis=1), axis=1, return_inverse=True)
        sums = _weighted_sums(_draw, unique, numpy.random.default_rng([SEED, at]))[:, back.ravel()]
        done = 0
        for key in keys:
            task, n = answered[key], len(answered[key].sums)
            mine, weights = sums[:, done : done + n].T, sums[:, done + n : done + 2 * n].T
            found[key] = {v: task.score(mine[i], weights[i]) for i, v in enumerate(task.sums)}
            done += 2 * n
    return found


def ratios(variant: Array, original: Array, chance: float = 0.0) -> Array:
    """Recovery in percent, draw by draw; NaN where the draw's original is not above chance."""
    over = original - chance
    return 100.0 * numpy.divide(variant - chance, over, out=numpy.full_like(over, numpy.nan), where=over > EPSILON)


def estimate(value: float | None, draws: Array | None) -> Estimate | None:
    """A value with its 95% percentile interval, widened to hold the value; None where there is no value.

    A draw without a number (its original is not above chance, so that the ratio could be anything) counts as lying
    beyond either bound. Where that makes a bound infinite, the ratio has no interval.
    """
    if value is None:
        return None
    if draws is None:
        return Estimate(value)
    unknown = numpy.isnan(draws)
    low = numpy.quantile(numpy.where(unknown, -numpy.inf, draws), LEVEL / 2, method="lower")
    high = numpy.quantile(numpy.where(unknown, numpy.inf, draws), 1 - LEVEL / 2, method="higher")
    if not (numpy.isfinite(low) and numpy.isfinite(high)):
        return Estimate(value)
    return around(value, float(low), float(high))


def around(value: float, low: float, high: float) -> Estimate:
    """A value with bounds that hold it, rounded to what does not depend on the number of threads."""
    return Estimate(value, min(value, round(low, DECIMALS)), max(value, round(high, DECIMALS)))


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of McNemar's test: documents that only one of two variants got right are coin tosses."""
    n, least = only_first + only_second, min(only_first, only_second)
    term, total = 1, 0
    for k in range(least + 1):
        total += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * total / 2**n)


def pairs(variants: Sequence[Variant], parts: Mapping[str, Sequence[str]]) -> list[tuple[Variant, Variant]]:
    """Who is compared: each with the original; arms with the pruned model, and with sft of their data and seed.

    Args:
        variants: in the order of the tables.
        parts: ids of the models that each merged variant was made of, by its id; it is compared with them too.
    """
    by_id = {v.id: v for v in variants}
    found: list[tuple[Variant, Variant]] = []
    for variant in (v for v in variants if v.arm != "original"):
        others = ["original"]
        if variant.arm not in ("pruned", "sft", "merged"):  # first, since it is the question that an arm answers
            others.append(Variant("sft", variant.data, variant.seed).id)
        others += [*parts.get(variant.id, []), *(["pruned"] if variant.arm != "pruned" else [])]
        found += [(variant, by_id[other]) for other in others if other in by_id]
    return found


def compare(
    tasks: Sequence[TaskSummary],
    answered: Mapping[Key, Answered],
    draws: Draws,
    asked: Sequence[tuple[Variant, Variant]],
) -> list[Paired]:
    """Differences of pairs of variants: on every task with documents, then in the mean of the tasks that count.

    Args:
        tasks: the summaries; a mean of several tasks is compared only where each of them has documents.
        draws: what `resample` gave for `answered`.
        asked: first and second, as `pairs` gives them.
    """
    ids = [(first.id, second.id) for first, second in asked]
    known = {key_of(t): t for t in tasks if key_of(t) in answered}
    counted = [key_of(t) for t in tasks if t.in_mean]
    swapped = _swap({k: answered[k] for k in known}, ids)
    found = []
    for pair in ids:
        sides = {k: _Side.of(t, answered[k], draws[k], swapped[k][pair], pair) for k, t in known.items()}
        found += [_paired(pair, side, side.task.task, side.task.metric, side.task.filter) for side in sides.values()]
        if counted and all(key in sides for key in counted):
            whole = _mean([sides[k] for k in counted], {k: answered[k] for k in counted})
            found.append(_paired(pair, whole, None, "mean", "none"))
    return found


@dataclass(frozen=True)
class _Side:
    """First less second: the difference, its draws, and the same with answers exchanged at random."""

    task: TaskSummary
    value: float
    draws: Array
    swapped: Array
    p: float | None  # where an exact one is known
    n: int

    @classmethod
    def of(cls, task: TaskSummary, answered: Answered, draws: Mapping[str, Array], swapped: Array, pair: Pair) -> _Side:
        first, second = pair
        value = answered.value(first) - answered.value(second)
        exact = _exact(answered, pair)
        return cls(task, value, draws[first] - draws[second], swapped, exact, len(answered.documents))


def _mean(sides: Sequence[_Side], answered: Mapping[Key, Answered]) -> _Side:
    if len(sides) == 1:
        return sides[0]
    value = sum(s.value for s in sides) / len(sides)
    draws = numpy.mean([s.draws for s in sides], axis=0)
    swapped = numpy.mean([s.swapped for s in sides], axis=0)
    distinct = sum(len(answered[keys[0]].documents) for keys in _clusters(answered))
    return _Side(sides[0].task, value, draws, swapped, None, distinct)


def _paired(pair: Pair, side: _Side, task: str | None, metric: str, filter_name: str) -> Paired:
    difference = estimate(side.value, side.draws)
    assert difference is not None
    p, test = side.p, "McNemar"
    if p is None:  # the observed one is an exchange too (Phipson and Smyth 2010): p is never nought
        test = "exchange"
        p = float((1 + numpy.count_nonzero(abs(side.swapped) >= abs(side.value) - EPSILON)) / (1 + len(side.swapped)))
    word = verdict(difference, p, side.task.higher_is_better)
    return Paired(pair[0], pair[1], task, metric, filter_name, difference, p, side.n, word, test)


def verdict(difference: Estimate, p: float, higher_is_better: bool = True) -> str:
    """One of `findings.VERDICTS`, of the first: the interval leaves zero out, and p < 0.05."""
    low, high = difference.low, difference.high
    if low is None or high is None or low <= 0 <= high or p >= LEVEL:
        return "not told apart"
    return "better" if (low > 0) == higher_is_better else "worse"


def _exact(answered: Answered, pair: Pair) -> float | None:
    """McNemar's p, or None where documents are not simply right or wrong."""
    first, second = (answered.sums[v] for v in pair)
    weights = numpy.stack([answered.weights[v] for v in pair])
    if not ((weights == 1).all() and numpy.isin(numpy.stack([first, second]), (0.0, 1.0)).all()):
        return None
    return mcnemar(int((first > second).sum()), int((second > first).sum()))


def _swap(answered: Mapping[Key, Answered], asked: Sequence[Pair]) -> dict[Key, dict[Pair, Array]]:
    """First less second of every pair, where a coin per document exchanges their answers; arrays (RESAMPLES,)."""
    found: dict[Key, dict[Pair, Array]] = {}
    for at, keys in enumerate(_clusters(answered) if asked else []):
        gaps = [side[b] - side[a] for k in keys for a, b in asked for side in (answered[k].sums, answered[k].weights)]
        moved = _weighted_sums(_toss, numpy.stack(gaps, axis=1), numpy.random.default_rng([SEED + 1, at])).T
        columns = iter(moved)
        for key in keys:
            task = answered[key]
            found[key] = {}
            for a, b in asked:
                s, w = next(columns), next(columns)
                first = task.score(task.sums[a].sum() + s, task.weights[a].sum() + w)
                second = task.score(task.sums[b].sum() - s, task.weights[b].sum() - w)
                found[key][a, b] = first - second
    return found


Counts = Callable[[numpy.random.Generator, int, int], Array]


def _draw(rng: numpy.random.Generator, rows: int, n: int) -> Array:
    """How often each of n documents is drawn, in `rows` draws of n with replacement; shape (rows, n)."""
    picks = rng.integers(0, n, (rows, n)) + n * numpy.arange(rows)[:, None]
    return numpy.bincount(picks.ravel(), minlength=rows * n).reshape(rows, n)


def _toss(rng: numpy.random.Generator, rows: int, n: int) -> Array:
    """A coin per document; shape (rows, n)."""
    return rng.integers(0, 2, (rows, n), dtype=numpy.int8)


def _weighted_sums(counts: Counts, columns: Array, rng: numpy.random.Generator) -> Array:
    """Sums of columns (documents, k) over documents taken `counts` times, `RESAMPLES` times; (RESAMPLES, k)."""
    n = len(columns)
    most = max(1, AT_ONCE // n)
    sizes = [min(most, RESAMPLES - start) for start in range(0, RESAMPLES, most)]
    return numpy.concatenate([counts(rng, rows, n).astype(float) @ columns for rows in sizes])


def _clusters(answered: Mapping[Key, Answered]) -> list[list[Key]]:
    """Tasks that ask the same documents, together."""
    found: list[list[Key]] = []
    for key, table in answered.items():
        mine = next((keys for keys in found if answered[keys[0]].same_documents(table)), None)
        if mine is None:
            found.append([key])
        else:
            mine.append(key)
    return found
