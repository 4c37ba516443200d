"""Plans of what is computed once: every text is there, nothing is computed that is not needed, batches fit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfsd import prefixes
from hfsd.prefixes import Node, Text

TOKENS = st.lists(st.integers(0, 2), min_size=2, max_size=40).map(tuple)


@st.composite
def texts(draw: st.DrawFn) -> list[Text]:
    """Texts that continue a few stems, since those drawn at random would share nothing."""
    stems = draw(st.lists(TOKENS, min_size=1, max_size=3))
    made = [draw(st.sampled_from(stems)) + draw(TOKENS) for _ in range(draw(st.integers(1, 12)))]
    return sorted({Text(tokens, draw(st.integers(1, len(tokens) - 1))) for tokens in made}, key=lambda t: t.tokens)


def everyone(nodes: Sequence[Node]) -> list[Node]:
    return [node for top in nodes for node in (top, *everyone(top.children))]


@settings(max_examples=60, deadline=None)
@given(texts(), st.booleans())
def test_every_text_is_at_the_node_that_reads_it(asked: list[Text], share: bool) -> None:
    top = prefixes.tree(asked, share)
    nodes = everyone(top)
    found = [(text, node) for node in nodes for text in node.texts]
    assert sorted((t.tokens, t.start) for t, _ in found) == sorted((t.tokens, t.start) for t in asked)
    assert all(node.tokens == text.tokens[:-1] for text, node in found)
    assert {node.part for node in top} == {0}
    for node in nodes:
        below = everyone([node])
        assert node.low == min(t.start for n in below for t in n.texts)
        if node.children:
            assert share and node.end - node.part >= prefixes.SHORTEST
            assert len(node.children) + bool(node.texts) > 1
        for child in node.children:
            assert child.part == node.end < child.end and child.tokens[: node.end] == node.tokens
    read, whole = (sum(n.end - n.part for n in group) for group in (nodes, prefixes.tree(asked, False)))
    assert read <= whole


@settings(max_examples=60, deadline=None)
@given(texts())
def test_two_continuations_share_all_but_a_short_stretch(asked: list[Text]) -> None:
    """What two nodes have in common is their ancestors' but for less than SHORTEST tokens."""
    for siblings in [prefixes.tree(asked), *(n.children for n in everyone(prefixes.tree(asked)))]:
        for a, b in itertools.pairwise(siblings):
            assert prefixes.common(a.tokens, b.tokens) - a.part < prefixes.SHORTEST


def test_shots_contexts_and_choices_nest() -> None:
    shots, questions = tuple(range(100)), [tuple(range(200 + 20 * q, 220 + 20 * q)) for q in range(3)]
    asked = [Text(shots + q + (c, 300 + c, 9), 120) for q in questions for c in range(4)]
    (trunk,) = prefixes.tree(asked)
    assert (trunk.end, len(trunk.children), trunk.low) == (100, 3, 120)
    assert [(n.part, n.end, len(n.children)) for n in trunk.children] == [(100, 120, 4)] * 3
    assert sum(n.end - n.part for n in everyone([trunk])) == 100 + 3 * (20 + 4 * 2)
    letters = prefixes.tree([Text((*shots, letter), 100) for letter in range(4)])
    assert [(n.end, len(n.texts), n.children) for n in letters] == [(100, 4, [])]  # one position predicts them all


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 60)), min_size=1, max_size=30), st.integers(20, 200))
def test_batches_are_whole_and_fit(sizes: list[tuple[int, int]], budget: int) -> None:
    nodes = [Node((0,) * (part + own), part) for part, own in sizes]
    plan = prefixes.batches(nodes, budget)
    assert sorted(map(id, (n for batch in plan for n in batch))) == sorted(map(id, nodes))
    for batch in plan:
        end, part = max(n.end for n in batch), min(n.part for n in batch)
        held = len(batch) * end <= prefixes.WHOLE * budget
        assert len(batch) == 1 or (held and len(batch) * (end - part) <= budget)
    assert sum(map(prefixes._cost, plan)) <= sum(prefixes._cost([n]) for n in nodes)


def test_batches_keep_apart_what_is_not_alike() -> None:
    nodes = [Node((0,) * length) for length in (10, 500, 11, 498, 12, 505)]
    assert [sorted(n.end for n in batch) for batch in prefixes.batches(nodes, 2048)] == [[10, 11, 12], [498, 500, 505]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), max_size=30))
def test_rows_fill_the_budget(sizes: list[int]) -> None:
    plan = prefixes.fill(sizes, 256)
    assert sorted(i for batch in plan for i in batch) == list(range(len(sizes)))
    assert all(len(batch) == 1 or sizes[batch[0]] * len(batch) <= 256 for batch in plan)
    assert all(sizes[i] <= sizes[batch[0]] for batch in plan for i in batch)


@pytest.mark.parametrize("length", [0, 1, 7, 1000])
def test_common(length: int) -> None:
    assert prefixes.common((*range(length), 1, 2), (*range(length), 3)) == length
