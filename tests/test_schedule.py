"""The order of training: equal for all texts, known before a model is loaded, within a budget of rows or tokens."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfsd import schedule
from hfsd.errors import BadRequest
from hfsd.schedule import Pace, Rows

LENGTHS = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=40)


def _rows(pairs: list[tuple[int, int]]) -> Rows:
    lengths = {"reference": [a for a, _ in pairs], "self-distilled": [b for _, b in pairs]}
    return Rows({}, lengths, lengths, 0)


def _pace(**changes: object) -> Pace:
    return Pace(**{"per_step": 4, "epochs": 1.0, "max_steps": -1, "strategy": "group_by_length"} | _more(changes))


def _more(changes: dict[str, object]) -> dict[str, object]:
    return {"budget": "rows", "seed": 0} | changes


@settings(deadline=None)  # torch is imported in the first example
@given(LENGTHS, st.sampled_from(schedule.STRATEGIES), st.integers(0, 5), st.integers(1, 3))
def test_every_epoch_holds_every_row_once(pairs: list, strategy: str, seed: int, epochs: int) -> None:
    rows, pace = _rows(pairs), _pace(strategy=strategy, seed=seed, epochs=float(epochs))
    found = schedule.order(rows, pace)
    assert found == schedule.order(rows, pace)
    assert len(found) % pace.per_step == 0 and found[len(pairs) * epochs :] == found[: -len(pairs) * epochs % 4]
    for at in range(epochs):
        assert sorted(found[at * len(pairs) : (at + 1) * len(pairs)]) == list(range(len(pairs)))


@settings(deadline=None)  # torch is imported in the first example
@given(LENGTHS)
def test_the_order_does_not_depend_on_which_text_is_the_longer(pairs: list) -> None:
    swapped = [(b, a) for a, b in pairs]
    assert schedule.order(_rows(pairs), _pace()) == schedule.order(_rows(swapped), _pace())


def test_rows_of_like_length_stand_together() -> None:
    rows = _rows([(n, 1) for n in range(400)])
    found = schedule.order(rows, _pace())
    spread = sum(max(found[i : i + 4]) - min(found[i : i + 4]) for i in range(0, 400, 4)) / 100
    assert spread < 40 < 200 and Counter(found) == Counter(range(400))


def test_parts_of_an_epoch_and_a_number_of_steps() -> None:
    rows = _rows([(5, 5)] * 10)
    assert len(schedule.order(rows, _pace(epochs=0.5))) == 8  # five rows fill two steps
    assert len(schedule.order(rows, _pace(epochs=0.01))) == 4
    assert len(schedule.order(rows, _pace(max_steps=7))) == 28
    assert schedule.order(rows, _pace(strategy="sequential")) == [*range(10), 0, 1]
    with pytest.raises(BadRequest, match="train_sampling_strategy is 'weighted'; it is group_by_length, random"):
        schedule.order(rows, _pace(strategy="weighted"))


@settings(deadline=None)  # torch is imported in the first example
@given(LENGTHS, st.integers(1, 2))
def test_a_budget_of_tokens_is_met_to_the_nearest_step(pairs: list, epochs: int) -> None:
    rows, pace = _rows(pairs), _pace(budget="tokens", epochs=float(epochs))
    whole = schedule.order(rows, pace)
    target = min(sum(rows.trained[text][i] for i in whole) for text in rows.trained)
    for text, counts in rows.trained.items():
        mine = schedule.within_budget(rows, whole, text, pace)
        assert mine == whole[: len(mine)] and len(mine) % pace.per_step == 0 < len(mine)
        sums = {k: sum(counts[i] for i in whole[:k]) for k in range(4, len(whole) + 1, 4)}
        assert abs(sums[len(mine)] - target) == min(abs(s - target) for s in sums.values())
    assert schedule.within_budget(rows, whole, "reference", _pace(epochs=float(epochs))) == whole
