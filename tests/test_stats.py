"""Intervals, which tasks count, recovery, and what an interval allows to be said. All records are made up."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfsd import plain, report, stats, text
from hfsd.errors import HfsdError
from hfsd.findings import Estimate, Results, Setup
from hfsd.records import Variant
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


right = st.integers(0, 120)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(right, right, right, right), min_size=1, max_size=4))
def test_mean_and_recovery_of_any_scores(values):
    results = made(rows=rows({f"tiny_{i}": tuple(v / 120 for v in vs) for i, vs in enumerate(values)}, 120), scan=None)
    counted = [t for t in results.tasks if t.in_mean]
    for line in results.variants:
        if not counted:
            assert {line.mean, line.recovery, line.mean_of_ratios, line.chance_corrected} == {None}
            continue
        scores = [t.scores[line.variant.id].value for t in counted]
        assert line.mean.value == pytest.approx(sum(scores) / len(scores))
        for estimate in (line.mean, line.recovery, line.mean_of_ratios, line.chance_corrected):
            assert estimate.low <= estimate.value <= estimate.high and math.isfinite(estimate.high - estimate.low)
    if counted:
        first = results.variants[0]
        assert first.recovery == first.mean_of_ratios == first.chance_corrected == Estimate(100.0, 100.0, 100.0)
    assert not re.search(r"\b(nan|inf|None)\b", everything(results))
    plain.dumps(results)


def everything(results: Results) -> str:
    """All that is said of a run."""
    tables = (text.table, text.paired_table, text.seeds_table, text.draft_table, text.cost_table)
    cells = [cell for table in tables for row in table(results) for cell in row]
    lines = [*text.notes(results), *text.draft_notes(results), *text.cost_notes(results), *text.verdicts(results)]
    lost = [line for v in results.variants for line in text.losses(results, v.variant.id)]
    told = [text.recovery_text(results, v) for v in results.variants]
    return "\n".join([text.headline(results), *cells, *lines, *lost, *told])


def test_recoveries_are_ratios_of_means_and_a_mean_of_ratios():
    line = {v.variant.id: v for v in made().variants}[DISTILLED.id]
    assert line.mean.value == pytest.approx(0.60)
    assert line.recovery.value == pytest.approx(100 * 0.60 / 0.65)
    assert line.mean_of_ratios.value == pytest.approx(100 * (0.65 / 0.70 + 0.55 / 0.60) / 2)
    assert line.chance_corrected.value == pytest.approx(100 * (0.60 - 0.25) / (0.65 - 0.25))
    assert line.chance_corrected.high - line.chance_corrected.low > line.recovery.high - line.recovery.low > 5
    task = made().tasks[0].scores[DISTILLED.id]
    assert task.recovery.value == pytest.approx(100 * 0.65 / 0.70)
    assert task.chance_corrected.value == pytest.approx(100 * 0.40 / 0.45)


def test_without_documents_there_is_a_recovery_but_no_interval_and_no_verdict():
    results = made(documents={})
    line = {v.variant.id: v for v in results.variants}[DISTILLED.id]
    assert line.recovery == Estimate(line.recovery.value) and line.recovery.value == pytest.approx(100 * 0.60 / 0.65)
    assert results.paired == [] and text.verdicts(results) == [] and text.paired_table(results) == []
    # the mean's bounds are then the means of the tasks' bounds, as if the tasks moved together
    assert line.mean.low == pytest.approx(sum(t.scores[DISTILLED.id].low for t in results.tasks[:2]) / 2)
    assert "tiny_match, tiny_rank: no paired interval" in " ".join(text.notes(results))
    assert "92.3 [no interval]" in text.table(results)[4]
    assert "not compared, since the score is no mean over documents" in text.losses(results, DISTILLED.id)[0]


def test_of_one_task_the_mean_is_the_task():
    line = made(rows=rows({"tiny_match": GOOD["tiny_match"]})).variants[1]
    task = made().tasks[0].scores["pruned"]
    assert (line.mean.low, line.mean.high) == pytest.approx((task.low, task.high))
    assert line.recovery == task.recovery and line.mean_of_ratios == line.recovery


@pytest.mark.parametrize(
    ("scores", "n", "why"),
    [
        ((0.30, 0.25, 0.28, 0.29), 100_000, "less than 10 points above chance"),
        ((0.40, 0.25, 0.28, 0.29), 10, "not clear of chance"),
        ((0.0, 0.0, 0.1, 0.1), 100, "less than 10 points above chance"),
    ],
)
def test_a_task_that_the_original_does_not_clear_is_out(scores, n, why):
    task = made(rows=rows({"tiny_match": scores}, n), documents={}).tasks[0]
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
    both = made(rows=rows({"tiny_match": (0.0, 0.0, 0.5, 0.5), "tiny_rank": GOOD["tiny_rank"]}, chance=0.0))
    assert both.variants[1].recovery is not None and not re.search(r"\b(nan|inf|None)\b", everything(both))


def test_no_task_qualifies():
    results = made(rows=rows({"tiny_match": (0.25, 0.25, 0.25, 0.25)}))
    assert [v.mean for v in results.variants] == [None] * 4
    assert "cannot be judged by recovery" in text.headline(results)
    assert "n/a" in report.table(results)[1]
    assert "on tiny_match 0.0 points" in text.headline(results) and "not told apart at this n" in text.headline(results)
    assert not re.search(r"\b(nan|inf|None)\b", everything(results))
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
        (
            [row(ORIGINAL, "t", 0.6), row(PRUNED, "t", 0.5, setup=Setup(seed=1))],
            "t: variants differ in seed (original 0, pruned 1)",
        ),
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
