"""Records survive JSON, and refuse what JSON cannot carry."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfsd.plain import dumps, from_json, to_json
from hfsd.records import BlockScores, Candidate, ModelRef, PrunePlan, Receipt, Scan, Variant

finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.integers(2, 12), st.data())
def test_plans_round_trip_and_say_what_they_remove(n_layers: int, data: st.DataObject) -> None:
    kept = tuple(sorted(data.draw(st.sets(st.integers(0, n_layers - 1), min_size=1))))
    plan = PrunePlan(n_layers, kept, "why")
    assert from_json(PrunePlan, json.loads(dumps(plan))) == plan
    assert sorted(plan.kept + plan.removed) == list(range(n_layers))
    assert f"keeps {len(kept)}" in plan.sentence


def test_the_sentence_of_a_range() -> None:
    plan = PrunePlan(30, (*range(12), *range(18, 30)), "")
    assert plan.sentence == (
        "removes blocks [12, 18) of 30, counted from 0 (first removed 12, last removed 17); keeps 24"
    )


@given(st.dictionaries(st.integers(1, 5), st.lists(finite, max_size=4)), st.none() | st.text(max_size=9), finite)
def test_nested_records_round_trip(values: dict[int, list[float]], revision: str | None, loss: float) -> None:
    scores = {"all": BlockScores("angular", "all", 3, 9, values)}
    plan = PrunePlan(4, (0, 3), "x")
    scan = Scan(scores, [Candidate((1, 2), loss, "all tokens")], loss, plan, ModelRef("a/b", revision), 1.5)
    assert from_json(Scan, json.loads(dumps(scan))) == scan


def test_variant_ids() -> None:
    assert [Variant("original").id, Variant("sft", "gsm8k").id, Variant("sft", "gsm8k", 0).id] == [
        "original",
        "sft-gsm8k",
        "sft-gsm8k-s0",
    ]


def test_numpy_scalars_become_plain_and_nan_is_refused() -> None:
    assert to_json({"a": np.float32(0.5), "b": np.int64(3)}) == {"a": 0.5, "b": 3}
    for bad in (float("nan"), float("inf"), np.float32("nan")):
        with pytest.raises(ValueError, match="may not carry"):
            to_json({"a": [bad]})
    with pytest.raises(ValueError, match="unknown keys"):
        from_json(Receipt, {"repo": "a", "kind": "model", "commit": "c", "url": "u", "nope": 1})
