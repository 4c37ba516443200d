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


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    # of any printed table
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (30, 2.042), (31, 2.040), (120, 1.980)],
)
def test_known_quantiles_of_student(degrees, quantile):
    assert stats.t95(degrees) == pytest.approx(quantile, abs=6e-4)
    assert stats.Z95 < stats.t95(degrees + 1) < stats.t95(degrees)


def test_intervals_over_prompts():
    assert stats.over_prompts(0.5, 0.1, 8) == Estimate(
        0.5, pytest.approx(0.26354, abs=1e-5), pytest.approx(0.73646, abs=1e-5)
    )
    assert stats.over_prompts(0.9, 0.1, 8, top=1.0).high == 1.0 and stats.over_prompts(0.1, 0.1, 8).low == 0.0
    assert stats.over_prompts(0.5, None, 1) == Estimate(0.5)


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
    assert "tiny_match, tiny_rank, tiny_bpb: no paired interval" in " ".join(text.notes(results))
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


def gsm8k(*scores: tuple[float, ...]) -> Results:
    """Both filters of one task, the strict one first, as lm-eval gives them."""
    filters = zip(("strict-match", "flexible-extract"), scores, strict=True)
    return made(rows=[r for f, s in filters for r in rows({"gsm8k": s}, metric="exact_match", filter=f, chance=0.0)])


def test_a_metric_that_the_original_does_not_clear_leaves_the_place_to_the_next() -> None:
    results = gsm8k((0.03, 0.01, 0.02, 0.02), (0.40, 0.10, 0.20, 0.30))
    strict, flexible = results.tasks
    assert (strict.in_mean, flexible.in_mean) == (False, True) and "less than 10 points" in strict.note
    assert results.variants[1].recovery.value == pytest.approx(25)
    strict, flexible = gsm8k((0.38, 0.01, 0.02, 0.02), (0.40, 0.10, 0.20, 0.30)).tasks
    assert (strict.in_mean, flexible.note) == (True, "another metric or filter of this task is counted")
    # where none counts, none is said to
    assert ["less than 10" in t.note for t in gsm8k((0.03, 0.01, 0.02, 0.02), (0.04, 0.1, 0.2, 0.3)).tasks] == [
        True
    ] * 2
    preferred = rows({"t": (0.30, 0.2, 0.2, 0.2)}, metric="acc_norm") + rows({"t": (0.6, 0.4, 0.5, 0.5)})
    assert [(t.metric, t.in_mean) for t in made(rows=preferred).tasks] == [("acc_norm", False), ("acc", True)]


def test_a_correlation_is_no_share() -> None:
    mcc = row(ORIGINAL, "cola", 0.4, metric="mcc", chance=None, stderr=0.1)
    assert not stats.is_share("mcc", None, True) and stats.interval(mcc) == pytest.approx((0.204, 0.596), abs=1e-3)
    assert all(stats.is_share(m, None, True) for m in ("acc", "acc_norm", "exact_match", "mc1", "mc2"))


def test_a_mean_of_tasks_whatever_their_sizes_has_their_interval() -> None:
    """Wilson's would take it for a share of all documents, of which the large tasks have most."""
    results = made(rows=rows({"group": (0.7, 0.4, 0.5, 0.6)}, n=10_000, pooled=False, stderr=0.05), documents={})
    (task,) = results.tasks
    assert (task.scores["original"].low, task.scores["original"].high) == pytest.approx((0.602, 0.798), abs=1e-3)
    assert "a mean of its tasks' scores whatever their sizes" in text.notes(results)[0]
    high = row(ORIGINAL, "group", 0.98, pooled=False, stderr=0.05)
    assert stats.interval(high)[1] == 1.0
    (task,) = made(rows=rows({"group": (0.7, 0.4, 0.5, 0.6)}, pooled=False), documents={}).tasks
    assert not task.in_mean and "no interval that could be clear of chance" in task.note


def test_what_a_reader_has_to_know_of_a_task_is_said_under_the_table() -> None:
    """A variant with another tokenizer may be asked in another way; what the model does not read is counted."""
    plain, cut = Setup(), Setup(chat_template=True, multiturn=True, truncated=3)
    setups = (cut, cut, plain, cut)
    mine = [
        row(r.variant, r.task, r.value, setup=s) for r, s in zip(rows({"t": (0.7, 0.4, 0.5, 0.6)}), setups, strict=True)
    ]
    results = made(rows=mine)
    assert results.tasks[0].in_mean
    said = text.notes(results)[0]
    assert (
        f"original, pruned, {DISTILLED.id} asked in the chat template, each shot a turn; {SFT.id} asked without" in said
    )
    assert f"3 of 200 documents of original, pruned, {DISTILLED.id} were longer than the model reads and lost" in said
    all_cut = made(rows=rows({"t": (0.7, 0.4, 0.5, 0.6)}, setup=Setup(truncated=7)))
    assert all_cut.tasks[0].remarks == ("7 of 200 documents were longer than the model reads and lost their beginning",)
    assert made().tasks[0].remarks == ()


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
