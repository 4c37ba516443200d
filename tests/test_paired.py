"""Paired intervals and tests: by hand, by brute force, and by simulation. All documents are made up."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfsd import documents, paired, stats, summary
from hfsd.findings import VERDICTS, Estimate, EvalRow, Paired, TaskScore, TaskSummary, VariantSummary
from hfsd.records import Variant

KEY = ("t", "acc", "none")
OTHER = ("u", "acc", "none")


def answered(columns: dict[str, object], key=KEY, ids=None, hashes=None) -> documents.Answered:
    """Documents from each variant's results in one order."""
    n = len(next(iter(columns.values())))
    ids = ids or [f"d{i}" for i in range(n)]
    named = [(key[0], name, text) for name, text in zip(ids, hashes or [f"{key[0]}{i}" for i in ids], strict=True)]
    found = documents.collect(key, {v: list(zip(named, column, strict=True)) for v, column in columns.items()})
    assert found is not None
    return found


def told(table: documents.Answered, key=KEY, chance=0.0, higher=True) -> TaskSummary:
    """The part of a summary that comparing needs."""
    scores = {v: TaskScore(table.value(v), None, None, None, None) for v in table.sums}
    return TaskSummary(*key[:2], len(table.documents), chance, 0, higher, higher, "", scores, filter=key[2])


def compared(tables: dict, pairs: list[tuple[str, str]], higher=True) -> list[Paired]:
    """All differences of these pairs, over tasks that all count (unless lower is better)."""
    tasks = [told(table, key, higher=higher) for key, table in tables.items()]
    asked = [(Variant(a), Variant(b)) for a, b in pairs]
    return paired.compare(tasks, tables, paired.resample(tables), asked)


def lines(tables: dict, chance=0.0) -> dict[str, VariantSummary]:
    """The closing table's lines, from rows that report what the documents give."""
    rows = [
        EvalRow(Variant(v), *key[:1], "1", *key[1:], 0, t.value(v), None, len(t.documents), chance, True, "")
        for key, t in tables.items()
        for v in t.sums
    ]
    draws = paired.resample(tables)
    variants = list(dict.fromkeys(r.variant for r in rows))
    found = summary.summarise_variants(
        summary.summarise_tasks(rows, draws), variants, dict.fromkeys((v.id for v in variants), 1), [], [], draws
    )
    return {line.variant.id: line for line in found}


def enough(n: int, right: int) -> list[float]:
    """So many right, then wrong."""
    return [1.0] * right + [0.0] * (n - right)


# McNemar


@given(st.integers(0, 9), st.integers(0, 9))
def test_mcnemar_is_the_share_of_coin_tosses_at_least_as_far_from_even(b, c):
    n = b + c
    tosses = [sum(toss) for toss in itertools.product((0, 1), repeat=n)] if n <= 10 else None
    if tosses is None:  # the same count without listing every toss
        tosses = [k for k in range(n + 1) for _ in range(math.comb(n, k))] if n <= 16 else []
    if tosses:
        extreme = sum(abs(2 * k - n) >= abs(b - c) for k in tosses)
        assert paired.mcnemar(b, c) == pytest.approx(float(Fraction(extreme, 2**n)))
    assert paired.mcnemar(b, c) == paired.mcnemar(c, b) <= 1


@pytest.mark.parametrize(
    # scipy.stats.binomtest(min(b, c), b + c).pvalue
    ("b", "c", "p"),
    [(0, 0, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (1, 9, 0.021484375), (10, 10, 1.0), (59, 121, 4.4344e-06)],
)
def test_mcnemar_known_values(b, c, p):
    assert paired.mcnemar(b, c) == pytest.approx(p, rel=1e-3)


def test_mcnemar_of_many_documents_is_still_a_number():
    assert 0 < paired.mcnemar(3000, 3400) < 1e-5 and paired.mcnemar(0, 5000) == 0.0


# Intervals


results = st.integers(2, 60).flatmap(
    lambda n: st.tuples(*[st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n) for _ in range(3)])
)


@settings(max_examples=25, deadline=None)
@given(results, st.randoms(use_true_random=False))
def test_estimates_lie_inside_and_the_order_of_documents_changes_nothing(columns, chosen):
    names = ("original", "pruned", "sft")
    tables = {KEY: answered(dict(zip(names, columns, strict=True)))}
    found = compared(tables, [("pruned", "original"), ("sft", "pruned")])
    for one in found:
        assert one.difference.low <= one.difference.value <= one.difference.high
        assert 0 < one.p <= 1 and one.verdict in VERDICTS and one.n == len(columns[0]) and one.test == "McNemar"
    for line in lines(tables).values():
        for estimate in (line.recovery, line.mean_of_ratios, line.chance_corrected):
            assert estimate is None or estimate.low is None or estimate.low <= estimate.value <= estimate.high
    order = chosen.sample(range(len(columns[0])), len(columns[0]))
    mixed = {name: [column[i] for i in order] for name, column in zip(names, columns, strict=True)}
    again = {KEY: answered(mixed, ids=[f"d{i}" for i in order])}
    assert compared(again, [("pruned", "original"), ("sft", "pruned")]) == found
    assert lines(again) == lines(tables)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.05, 1), min_size=2, max_size=60), st.lists(st.floats(0.05, 1), min_size=2, max_size=60))
def test_a_copy_of_the_original_recovers_exactly_everything(first, second):
    tables = {
        KEY: answered(dict.fromkeys(("original", "pruned"), first)),
        OTHER: answered(dict.fromkeys(("original", "pruned"), second), OTHER),
    }
    for one in compared(tables, [("pruned", "original")]):
        assert one.difference == Estimate(0.0, 0.0, 0.0) and one.p == 1.0 and one.verdict == "not told apart"
    draws = paired.resample(tables)
    for key in tables:
        assert paired.estimate(100.0, paired.ratios(draws[key]["pruned"], draws[key]["original"])) == Estimate(
            100, 100, 100
        )
    line = lines({KEY: answered({v: enough(40, 30) for v in ("original", "pruned")})}, chance=0.25)["pruned"]
    assert line.recovery == line.mean_of_ratios == line.chance_corrected == Estimate(100.0, 100.0, 100.0)


def test_a_difference_by_hand():
    first = enough(10, 7)
    second = [*enough(7, 4), 1.0, 0.0, 0.0]  # right on 5: only the first on 3, only the second on 1
    one, mean = compared({KEY: answered({"pruned": first, "original": second})}, [("pruned", "original")])
    assert one.difference.value == pytest.approx(0.2) and one.p == pytest.approx(2 * 5 / 16)
    assert mean.task is None and mean.p == one.p and mean.difference == one.difference
    # exact: every multiset of 10 draws, a difference of (b - c) / 10 with b, c drawn at rates 0.3 and 0.1
    mass: dict[int, float] = {}
    for b in range(11):
        for c in range(11 - b):
            ways = math.factorial(10) // (math.factorial(b) * math.factorial(c) * math.factorial(10 - b - c))
            mass[b - c] = mass.get(b - c, 0.0) + ways * 0.3**b * 0.1**c * 0.6 ** (10 - b - c)
    total, bounds = 0.0, {}
    for gap in sorted(mass):
        total += mass[gap]
        bounds.setdefault("low", gap / 10) if total >= 0.025 else None
        bounds.setdefault("high", gap / 10) if total >= 0.975 else None
    assert one.difference.low == pytest.approx(bounds["low"]) and one.difference.high == pytest.approx(bounds["high"])


def test_few_documents_that_all_went_one_way_are_not_enough():
    one, _ = compared({KEY: answered({"sft": enough(24, 12), "pruned": enough(24, 8)})}, [("sft", "pruned")])
    assert one.difference.low > 0 and one.p == 0.125 and one.verdict == "not told apart"
    one, _ = compared({KEY: answered({"sft": enough(24, 12), "pruned": enough(24, 7)})}, [("sft", "pruned")])
    assert one.difference.low > 0 and one.p == 0.0625 and one.verdict == "not told apart"
    one, _ = compared({KEY: answered({"sft": enough(24, 13), "pruned": enough(24, 6)})}, [("sft", "pruned")])
    assert one.verdict == "better"
    one, _ = compared({KEY: answered({"sft": enough(24, 6), "pruned": enough(24, 13)})}, [("sft", "pruned")])
    assert one.verdict == "worse"


def test_lower_is_better_turns_the_verdict_and_a_ratio_of_sums_is_one():
    key = ("b", "bits_per_byte", "none")
    rng = numpy.random.default_rng(1)
    weights = rng.integers(50, 150, 40)
    pairs = {
        v: [[-float(w) * level * rng.uniform(0.9, 1.1), int(w)] for w in weights]
        for v, level in (("original", 0.5), ("pruned", 0.7))
    }
    table = answered(pairs, key)
    nats = sum(a for a, _ in pairs["pruned"])
    assert table.value("pruned") == pytest.approx(-nats / weights.sum() / math.log(2))
    (one,) = compared({key: table}, [("pruned", "original")], higher=False)
    assert one.difference.value == pytest.approx(table.value("pruned") - table.value("original"))
    assert one.difference.low > 0 and one.verdict == "worse" and one.test == "exchange" and one.p < 0.001


def test_the_exchange_test_is_mcnemar_where_both_can_be_had():
    rng = numpy.random.default_rng(2)
    one, two = (rng.random(60) < 0.6).astype(float), (rng.random(60) < 0.45).astype(float)
    exact, _ = compared({KEY: answered({"a": one, "b": two})}, [("a", "b")])
    # the same answers as marks of 0 and 2: no longer right or wrong
    doubled, _ = compared({KEY: answered({"a": 2 * one, "b": 2 * two})}, [("a", "b")])
    assert (exact.test, doubled.test) == ("McNemar", "exchange") and doubled.p == pytest.approx(exact.p, abs=0.03)


# Ratios whose denominator may vanish


def test_an_original_at_nought_has_no_recovery_and_a_doubtful_one_no_interval():
    nought = lines({KEY: answered({"original": [0.0] * 20, "pruned": enough(20, 3)})})
    assert nought["pruned"].recovery is None and nought["pruned"].mean is None
    draws = paired.resample({KEY: answered({"original": enough(20, 1), "pruned": enough(20, 3)})})[KEY]
    doubtful = paired.estimate(300.0, paired.ratios(draws["pruned"], draws["original"]))
    assert doubtful == Estimate(300.0)  # a third of the draws has no right answer of the original
    assert paired.estimate(None, draws["pruned"]) is None


def test_few_draws_without_a_ratio_count_as_beyond_both_bounds():
    rest = numpy.linspace(90, 110, 9_900)
    found = paired.estimate(100.0, numpy.concatenate([rest, numpy.full(100, numpy.nan)]))
    plain = paired.estimate(100.0, rest)
    assert found.low < plain.low and found.high > plain.high and math.isfinite(found.high)
    assert paired.estimate(100.0, numpy.concatenate([rest, numpy.full(400, numpy.nan)])) == Estimate(100.0)


# Tasks over the same documents


def _two(second_like_first: bool | None, same: bool) -> dict:
    rng = numpy.random.default_rng(3)
    one = (rng.random(80) < 0.6).astype(float)
    two = {True: one, False: 1 - one, None: (rng.random(80) < 0.6).astype(float)}[second_like_first]
    names = [f"d{i}" for i in range(80)]
    tables = {KEY: answered({"original": one}, ids=names)}
    return tables | {OTHER: answered({"original": two}, OTHER, ids=names if same else [f"e{i}" for i in range(80)])}


def _width(tables: dict) -> float:
    mean = lines(tables)["original"].mean
    return mean.high - mean.low


def test_the_mean_over_shared_documents_knows_that_they_move_together():
    apart, alike = _width(_two(True, same=False)), _width(_two(True, same=True))
    assert alike == pytest.approx(apart * math.sqrt(2), rel=0.05)
    against = lines(_two(False, same=True))["original"].mean
    assert against.high - against.low < 0.3 * apart
    alone = lines({KEY: _two(True, same=True)[KEY]})["original"].mean
    task = stats.wilson(alone.value, 80)
    assert (alone.low, alone.high) == pytest.approx(task)


def test_who_shares_documents():
    def table(key, ids, hashes=None):
        return answered({"original": [1.0] * len(ids)}, key, ids, hashes)

    real, numbers = ["Mercury_1", "Mercury_2"], ["0", "1"]
    assert table(KEY, real).same_documents(table(OTHER, real))
    assert not table(KEY, numbers).same_documents(table(OTHER, numbers))  # rows 0 and 1 of two different sets
    assert table(KEY, numbers, ["x", "y"]).same_documents(table(OTHER, numbers, ["x", "y"]))
    assert not table(KEY, real).same_documents(table(OTHER, [*real, "Mercury_3"]))


def test_the_mean_of_differences_counts_distinct_documents():
    columns = {"pruned": enough(30, 15), "original": enough(30, 24)}
    tables = {KEY: answered(columns), OTHER: answered(columns, OTHER)}
    mean = compared(tables, [("pruned", "original")])[-1]
    assert mean.task is None and mean.n == 30 and mean.test == "exchange" and mean.verdict == "worse"
    apart = tables | {OTHER: answered(columns, OTHER, ids=[f"e{i}" for i in range(30)])}
    assert compared(apart, [("pruned", "original")])[-1].n == 60


def test_a_mean_needs_the_documents_of_every_task_that_counts():
    columns = {"pruned": enough(30, 15), "original": enough(30, 24)}
    tables = {KEY: answered(columns)}
    tasks = [told(tables[KEY]), told(tables[KEY], OTHER)]
    pairs = [(Variant("pruned"), Variant("original"))]
    assert [p.task for p in paired.compare(tasks, tables, paired.resample(tables), pairs)] == ["t"]


def test_who_is_compared_with_whom():
    sft, told = Variant("sft", "a", 1), Variant("self-distilled", "a", 1)
    merged, original, pruned = Variant("merged", None, 1), Variant("original"), Variant("pruned")
    kd = Variant("sdd+kd", "a", 2)  # there is no sft of its seed
    variants = [original, pruned, sft, told, kd, merged]
    found = [(a.id, b.id) for a, b in paired.pairs(variants, {merged.id: [told.id]})]
    assert found == [
        ("pruned", "original"),
        (sft.id, "original"),
        (sft.id, "pruned"),
        (told.id, "original"),
        (told.id, sft.id),
        (told.id, "pruned"),
        (kd.id, "original"),
        (kd.id, "pruned"),
        (merged.id, "original"),
        (merged.id, told.id),
        (merged.id, "pruned"),
    ]


# What is claimed, in simulation


def _claims(n: int, tasks: int, times: int, gap: float, kind: str = "apart") -> tuple[float, float]:
    """Shares of comparisons, in one task and in the mean, that are called better or worse, of variants `gap` apart.

    `apart`: variants answer by themselves, some documents being easier; `alike`: they mostly give the same answer, as
    arms of one pruned model do; `unlike`: mostly the other one; `marks`: documents are not just right or wrong.
    """
    rng = numpy.random.default_rng([n, tasks])
    tables = {}
    for task in range(tasks):
        key = (f"t{task}", "acc", "none")
        level = rng.uniform(0.3, 0.9, (n, 1))
        first, second = (rng.random((n, times)) < level + by for by in (gap, 0.0))
        if kind == "alike":
            first, second = (first ^ (rng.random((n, times)) < 0.08) for _ in range(2))
        if kind == "unlike":
            first = rng.random((n, times)) < 0.5
            second = first ^ (rng.random((n, times)) < 0.64)
        if kind == "marks":
            first, second = (side + rng.normal(0, 0.2, side.shape) for side in (first, second))
        columns = {f"a{i}": first[:, i].astype(float) for i in range(times)}
        columns |= {f"b{i}": second[:, i].astype(float) for i in range(times)}
        tables[key] = answered(columns, key)
    found = compared(tables, [(f"a{i}", f"b{i}") for i in range(times)])
    claimed = {
        mean: [p.verdict != "not told apart" for p in found if (p.task is None) == mean] for mean in (True, False)
    }
    return sum(claimed[False]) / len(claimed[False]), sum(claimed[True]) / len(claimed[True])


@pytest.mark.parametrize(("n", "times"), [(24, 500), (200, 500)])
@pytest.mark.parametrize(("tasks", "kind"), [(2, "apart"), (2, "alike"), (1, "marks")])
def test_variants_that_are_equally_good_are_seldom_told_apart(n, times, tasks, kind):
    alone, mean = _claims(n, tasks, times, 0.0, kind)
    assert alone <= 0.06 and mean <= 0.06


def test_the_bootstrap_alone_would_claim_too_much(monkeypatch):
    assert _claims(10, 1, 1000, 0.0, "unlike")[0] <= 0.05
    by_both = paired.verdict
    monkeypatch.setattr(paired, "verdict", lambda difference, p, higher: by_both(difference, 0.0, higher))
    assert _claims(10, 1, 1000, 0.0, "unlike")[0] > 0.06


def test_variants_that_differ_are_told_apart():
    alone, mean = _claims(200, 2, 100, 0.15)
    assert alone > 0.75 and mean > 0.95


@pytest.mark.parametrize("n", [50, 200])
def test_the_interval_of_recovery_holds_the_truth_about_as_often_as_it_says(n):
    rng, times = numpy.random.default_rng(n), 400
    original = rng.random((n, times)) < 0.7
    variant = numpy.where(original, rng.random((n, times)) < 0.85, rng.random((n, times)) < 0.2)
    truth = 100 * (0.7 * 0.85 + 0.3 * 0.2) / 0.7
    columns = {
        f"{name}{i}": side[:, i].astype(float) for name, side in (("o", original), ("v", variant)) for i in range(times)
    }
    table = answered(columns)
    draws = paired.resample({KEY: table})[KEY]
    held = 0
    for i in range(times):
        value = 100 * table.value(f"v{i}") / table.value(f"o{i}")
        found = paired.estimate(value, paired.ratios(draws[f"v{i}"], draws[f"o{i}"]))
        held += found.low <= truth <= found.high
    assert 0.91 <= held / times <= 0.98
