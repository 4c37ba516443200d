"""Intervals, which tasks count, recovery, and what an interval allows to be said. All records are made up."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfsd import plain, report, stats, text
from hfsd.errors import HfsdError
from hfsd.records import TaskScore, Variant
from tests.made import DISTILLED, GOOD, ORIGINAL, PRUNED, SFT, made, row, rows


@pytest.mark.parametrize(
    ("value", "n", "low", "high"),
    # scipy.stats.binomtest(count, n).proportion_ci(method="wilson")
    [
        (0.5, 10, 0.236593, 0.763407),
        (0.0, 10, 0.0, 0.277533),
        (1.0, 20, 0.838875, 1.0),
        (0.81, 100, 0.722205, 0.874852),
    ],
)
def test_wilson_known_values(value, n, low, high):
    assert stats.wilson(value, n) == pytest.approx((low, high), abs=1e-5)


@given(st.floats(0, 1), st.integers(1, 100_000))
def test_wilson_holds_the_value_and_stays_in_bounds(value, n):
    low, high = stats.wilson(value, n)
    assert 0 <= low <= value + 1e-12 and value - 1e-12 <= high <= 1


@pytest.mark.parametrize(("value", "n"), [(0.5, 0), (1.5, 10), (-0.1, 10), (math.nan, 10)])
def test_wilson_refuses_what_is_no_share(value, n):
    with pytest.raises(HfsdError):
        stats.wilson(value, n)


share = st.floats(0, 1)


@given(share, share, share)
def test_recovery_arithmetic(variant, original, chance):
    found = stats.recovery(variant, original, chance)
    if original - chance < stats.EPSILON:
        assert found is None
    elif variant <= original:
        assert found <= 100 * (1 + 1e-9)
        # taking chance off both can only show a loss as larger
        assert found <= stats.recovery(variant, original) + 1e-6
    else:
        assert found >= 100 * (1 - 1e-9)
    if found is not None:
        assert stats.recovery(original, original, chance) == pytest.approx(100)


@settings(max_examples=60)
@given(st.lists(st.tuples(share, share, share, share), min_size=1, max_size=4), st.integers(1, 5000))
def test_mean_and_recovery_of_any_scores(values, n):
    results = made(rows=rows({f"tiny_{i}": v for i, v in enumerate(values)}, n), scan=None)
    counted = [t for t in results.tasks if t.in_mean]
    for line in results.variants:
        if not counted:
            assert line.mean is None and line.recovery is None and line.chance_corrected is None
            continue
        scores = [t.scores[line.variant.id].value for t in counted]
        assert line.mean == pytest.approx(sum(scores) / len(scores))
        assert line.mean_low - 1e-9 <= line.mean <= line.mean_high + 1e-9
        assert min(scores) - 1e-9 <= line.mean <= max(scores) + 1e-9
        assert line.chance_corrected is not None and math.isfinite(line.chance_corrected)
    if counted:
        assert results.variants[0].recovery == pytest.approx(100)
        assert results.variants[0].chance_corrected == pytest.approx(100)
    plain.dumps(results)


def test_recovery_is_a_ratio_of_means():
    line = {v.variant.id: v for v in made().variants}[DISTILLED.id]
    assert line.mean == pytest.approx(0.60)
    assert line.recovery == pytest.approx(100 * 0.60 / 0.65)
    assert line.chance_corrected == pytest.approx(100 * (0.60 - 0.25) / (0.65 - 0.25))
    task = made().tasks[0].scores[DISTILLED.id]
    assert task.recovery == pytest.approx(100 * 0.65 / 0.70)
    assert task.chance_corrected == pytest.approx(100 * 0.40 / 0.45)


@pytest.mark.parametrize(
    ("scores", "n", "why"),
    [
        ((0.30, 0.25, 0.28, 0.29), 100_000, "less than 10 points above chance"),
        ((0.40, 0.25, 0.28, 0.29), 10, "not clear of chance"),
        ((0.0, 0.0, 0.1, 0.1), 100, "less than 10 points above chance"),
    ],
)
def test_a_task_that_the_original_does_not_clear_is_out(scores, n, why):
    task = made(rows=rows({"tiny_match": scores}, n)).tasks[0]
    assert not task.in_mean and why in task.note


def test_exactly_ten_points_is_enough():
    assert made(rows=rows({"tiny_match": (0.35, 0.3, 0.3, 0.3)}, 1000)).tasks[0].in_mean


def test_lower_is_better_is_shown_and_never_in_the_mean():
    task = made().tasks[2]
    assert not task.in_mean and task.note == "lower is better"
    assert {s.recovery for s in task.scores.values()} == {None}
    assert task.scores["original"].low == pytest.approx(0.9 - 1.96 * 0.01, abs=1e-4)


def test_zero_original_gives_no_recovery():
    task = made(rows=rows({"tiny_match": (0.0, 0.0, 0.5, 0.5)}, chance=0.0)).tasks[0]
    assert task.scores[SFT.id].recovery is None and task.scores[SFT.id].chance_corrected is None


def test_no_task_qualifies():
    results = made(rows=rows({"tiny_match": (0.25, 0.25, 0.25, 0.25)}))
    assert [v.mean for v in results.variants] == [None] * 4
    assert "cannot be judged by recovery" in text.headline(results)
    assert "n/a" in report.table(results)[1]
    assert "not told apart at n = 200" in text.headline(results)
    report.markdown(results, [], [])


def test_one_metric_of_a_task_counts():
    both = rows(GOOD) + rows({"tiny_match": (0.72, 0.4, 0.5, 0.6)}, metric="acc_norm")
    results = made(rows=both)
    counted = {(t.task, t.metric): t.in_mean for t in results.tasks}
    assert counted == {("tiny_match", "acc"): False, ("tiny_rank", "acc"): True, ("tiny_match", "acc_norm"): True}
    assert report.table(results)[0][1] == "tiny_match acc %"


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ([row(ORIGINAL, "t", 0.6), row(PRUNED, "t", 0.5, n=199)], "differ in n (original 200, pruned 199)"),
        ([row(ORIGINAL, "t", 0.6), row(PRUNED, "t", 0.5, shots=5)], "differ in shots"),
        ([row(ORIGINAL, "t", 0.6), row(PRUNED, "u", 0.5)], "has no score of pruned"),
        ([row(PRUNED, "t", 0.6)], "no scores of the original"),
        ([], "no scores of the original"),
        ([row(ORIGINAL, "t", math.nan)], "no number"),
        ([row(ORIGINAL, "t", 0.5, n=0)], "0 documents"),
        ([row(ORIGINAL, "t", 0.5), row(Variant("merged"), "t", 0.5)], "no parameter count for merged"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(broken, says):
    with pytest.raises(HfsdError, match=re.escape(says)):
        made(rows=broken)


def test_a_cut_in_percent_is_refused():
    with pytest.raises(HfsdError, match=r"param_cut is 16\.3"):
        made(param_cut=16.3)


def test_better_needs_the_interval():
    def score(value: float, n: int) -> TaskScore:
        return TaskScore(value, *stats.wilson(value, n), None, None)

    assert stats.compare(score(0.65, 100), score(0.60, 100)) == ""
    assert stats.compare(score(0.65, 10_000), score(0.60, 10_000)) == "better"
    assert stats.compare(score(0.60, 10_000), score(0.65, 10_000)) == "worse"
    assert stats.compare(score(0.60, 10_000), score(0.65, 10_000), higher_is_better=False) == "better"
    assert stats.compare(TaskScore(0.9, None, None, None, None), score(0.1, 100)) == ""
