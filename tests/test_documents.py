"""Documents of a finished evaluation as arrays: the same ones for all variants, and only where they give the score."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy
import pytest

from hfsd import documents
from hfsd.errors import HfsdError
from hfsd.findings import EvalRow
from hfsd.records import Variant

ORIGINAL, PRUNED = Variant("original"), Variant("pruned")


def line(i: int, metrics: dict, task: str = "t", filter_name: str = "none", text: str = "") -> dict:
    """A line as `evaluate.run` documents it."""
    return {"task": task, "id": f"d{i}", "hash": f"{task}{text}{i}", "filter": filter_name, "metrics": metrics}


def row(variant: Variant, value: float, n: int, metric: str = "acc", task: str = "t", **kw) -> EvalRow:
    """A score whose documents are in TASK.docs.jsonl."""
    base = {"version": "1", "filter": "none", "shots": 0, "stderr": None, "chance": 0.25, "higher_is_better": True}
    return EvalRow(variant, task, metric=metric, value=value, n=n, **(base | {"doc_file": f"{task}.docs.jsonl"} | kw))


def write(root: Path, variant: Variant, lines: list[dict], task: str = "t") -> None:
    """One variant's file."""
    folder = root / "evaluate" / variant.id
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({**one, "responses": [-1.0]}) + "\n" for one in lines)
    (folder / f"{task}.docs.jsonl").write_text(text)


def both(root: Path, metric: str, columns: tuple[list, list]) -> None:
    """The original's and the pruned model's documents."""
    for variant, column in zip((ORIGINAL, PRUNED), columns, strict=True):
        write(root, variant, [line(i, {metric: value}) for i, value in enumerate(column)])


def test_shares_sums_and_filters_are_read_each_by_itself(tmp_path):
    lines = [
        line(i, {"acc": float(i < 3), "mc2": i / 4}, filter_name=f) for i in range(4) for f in ("strict", "flexible")
    ]
    lines = [one if one["filter"] == "strict" else {**one, "metrics": {"acc": 1.0}} for one in lines]
    for variant in (ORIGINAL, PRUNED):
        write(tmp_path, variant, lines)
    rows = [
        row(v, value, 4, metric, filter=f)
        for v in (ORIGINAL, PRUNED)
        for metric, f, value in (("acc", "strict", 0.75), ("acc", "flexible", 1.0), ("mc2", "strict", 0.375))
    ]
    found = documents.read(tmp_path, rows)
    assert list(found) == [("t", "acc", "strict"), ("t", "acc", "flexible"), ("t", "mc2", "strict")]
    strict = found["t", "acc", "strict"]
    assert strict.documents[0] == ("t", "d0", "t0") and strict.sums["pruned"].tolist() == [1, 1, 1, 0]
    assert strict.weights["original"].tolist() == [1] * 4 and strict.value("original") == 0.75


@pytest.mark.parametrize(
    ("metric", "score"),
    [
        ("bits_per_byte", lambda r: -r / math.log(2)),
        ("byte_perplexity", lambda r: math.exp(-r)),
        ("word_perplexity", lambda r: math.exp(-r)),
    ],
)
def test_metrics_that_divide_sums_are_those_of_lm_eval(tmp_path, metric, score):
    from lm_eval.api.registry import get_aggregation

    pairs = [[-3.0, 10], [-2.5, 4], [-8.0, 21]]
    theirs = get_aggregation({"bits_per_byte": "bits_per_byte"}.get(metric, "weighted_perplexity"))(pairs)
    assert theirs == pytest.approx(score(-13.5 / 35))
    both(tmp_path, metric, (pairs, pairs))
    found = documents.read(tmp_path, [row(v, theirs, 3, metric) for v in (ORIGINAL, PRUNED)])
    assert found["t", metric, "none"].value("pruned") == pytest.approx(theirs)


@pytest.mark.parametrize(
    ("metric", "columns", "values"),
    [
        ("acc", ([1.0, 0.0], [1.0, 1.0]), (0.5, 0.9)),  # not what the documents of one variant give
        ("f1", ([[1, 1], [0, 1]], [[1, 1], [0, 1]]), (0.5, 0.5)),  # pairs, but no sum and weight
        ("text", (["a", "b"], ["a", "b"]), (0.5, 0.5)),
        ("bits_per_byte", ([[0.0, 0], [0.0, 0]], [[0.0, 0], [0.0, 0]]), (0.5, 0.5)),
    ],
)
def test_what_the_documents_do_not_give_has_no_arrays(tmp_path, metric, columns, values):
    both(tmp_path, metric, columns)
    rows = [row(v, value, 2, metric) for v, value in zip((ORIGINAL, PRUNED), values, strict=True)]
    assert documents.read(tmp_path, rows) == {}


def test_a_group_weighted_by_size_is_one_set_of_documents(tmp_path):
    lines = [line(i, {"acc": 1.0}, "big") for i in range(6)] + [line(i, {"acc": 0.0}, "small") for i in range(2)]
    for variant in (ORIGINAL, PRUNED):
        write(tmp_path, variant, lines, "group")
    by_size = [row(v, 0.75, 8, task="group") for v in (ORIGINAL, PRUNED)]
    (found,) = documents.read(tmp_path, by_size).values()
    assert len(found.documents) == 8 and {d[0] for d in found.documents} == {"big", "small"}
    unweighted = [row(v, 0.5, 8, task="group") for v in (ORIGINAL, PRUNED)]
    assert documents.read(tmp_path, unweighted) == {}


def test_an_order_of_its_own_for_all_variants(tmp_path):
    lines = [line(i, {"acc": float(i == 7)}) for i in (10, 7, 9)]
    for variant in (ORIGINAL, PRUNED):
        write(tmp_path, variant, lines)
    (found,) = documents.read(tmp_path, [row(v, 1 / 3, 3) for v in (ORIGINAL, PRUNED)]).values()
    assert [d[1] for d in found.documents] == ["d10", "d7", "d9"]
    assert numpy.array_equal(found.sums["pruned"], [0, 1, 0])


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ([line(0, {"acc": 1.0})], "t: 2 documents of original, 1 of pruned; variants are compared on the same"),
        ([line(1, {"acc": 1.0}), line(0, {"acc": 1.0})], "document 0 (from 0) is d0 of original and d1 of pruned;"),
        (
            [line(0, {"acc": 1.0}), line(1, {"acc": 1.0}, text="other")],
            "document 1 (from 0) is d1 of original and d1 of pruned of another text (t1, tother1);",
        ),
        ([], "t (acc, none): pruned has no documents; evaluate it again"),
        ([line(i, {"other": 1.0}) for i in range(2)], "t (acc, none): pruned has no documents"),
    ],
)
def test_other_documents_are_refused_in_one_line(tmp_path, theirs, says):
    write(tmp_path, ORIGINAL, [line(i, {"acc": 1.0}) for i in range(2)])
    write(tmp_path, PRUNED, theirs)
    with pytest.raises(HfsdError, match=re.escape(says)) as caught:
        documents.read(tmp_path, [row(v, 1.0, 2) for v in (ORIGINAL, PRUNED)])
    assert "\n" not in str(caught.value)


def test_a_variant_without_documents_is_one_line(tmp_path):
    write(tmp_path, ORIGINAL, [line(0, {"acc": 1.0})])
    with pytest.raises(HfsdError, match=r"^pruned has no documents: .*t\.docs\.jsonl is not there; evaluate it again$"):
        documents.read(tmp_path, [row(v, 1.0, 1) for v in (ORIGINAL, PRUNED)])


def test_a_line_that_is_cut_off_is_told_by_file_and_number(tmp_path):
    write(tmp_path, ORIGINAL, [line(0, {"acc": 1.0})])
    path = tmp_path / "evaluate" / "original" / "t.docs.jsonl"
    path.write_text(path.read_text() + '{"task": "t", "id"')
    with pytest.raises(HfsdError, match=r"t\.docs\.jsonl, line 2: .*; evaluate original again"):
        documents.read(tmp_path, [row(ORIGINAL, 1.0, 1)])


def test_rows_of_other_tasks_do_not_meet(tmp_path):
    write(tmp_path, ORIGINAL, [line(0, {"acc": 1.0})])
    write(tmp_path, ORIGINAL, [line(0, {"acc": 0.0}, "u")], "u")
    rows = [row(ORIGINAL, 1.0, 1), row(ORIGINAL, 0.0, 1, task="u")]
    found = documents.read(tmp_path, rows)
    assert [t.value("original") for t in found.values()] == [1.0, 0.0]
