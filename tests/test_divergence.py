"""Distances between distributions: equal to sums written out, nought for a model itself, weighted by tokens."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfsd import divergence, models
from hfsd.divergence import Distance, Text

LOGITS = st.lists(st.floats(-8, 8), min_size=5, max_size=5)
PAIRS = st.lists(st.tuples(LOGITS, LOGITS, st.integers(0, 4)), min_size=1, max_size=6)


def _softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    weights = [math.exp(x / temperature) for x in row]
    return [w / sum(weights) for w in weights]


@settings(max_examples=60, deadline=None)
@given(PAIRS, st.floats(0.3, 3))
def test_distances_equal_sums_written_out(pairs: list, temperature: float) -> None:
    import torch

    text = Text("t", [0], [token for _, _, token in pairs])
    found = divergence.distance(
        torch.tensor([p for p, _, _ in pairs]), torch.tensor([q for _, q, _ in pairs]), text, temperature
    )
    kl = variation = accepted = 0.0
    for one, other, _ in pairs:
        p, q = _softmax(one), _softmax(other)
        kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        variation += sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
        accepted += sum(map(min, _softmax(one, temperature), _softmax(other, temperature)))
    n = len(pairs)
    assert (found.id, found.tokens) == ("t", n)
    assert found.kl == pytest.approx(kl / n, abs=1e-5)
    assert found.overlap == pytest.approx(1 - variation / n, abs=1e-5)
    assert found.accepted == pytest.approx(accepted / n, abs=1e-5)


def test_what_is_put_first_and_parts_of_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    p = torch.eye(5)  # puts token t first at position t
    q = p[[0, 1, 3, 2, 4]]
    text = Text("t", [0], [0, 0, 3, 3, 4])
    found = divergence.distance(p, q, text)
    assert found.top1 == pytest.approx(3 / 5) and found.first == pytest.approx(3 / 5)
    assert divergence.distance(p, p, text) == Distance("t", 5, 0.0, 1.0, pytest.approx(3 / 5), *[pytest.approx(1)] * 2)
    monkeypatch.setattr(divergence, "CHUNK", 2)
    parts = divergence.distance(p, q, text)
    assert parts.kl == pytest.approx(found.kl) and parts.overlap == pytest.approx(found.overlap)
    assert (parts.top1, parts.first) == (found.top1, found.first)


def test_means_are_over_tokens_and_spreads_over_texts() -> None:
    made = [Distance(str(i), n, kl, 0.5, 0.5, 1 - kl, 0.0) for i, (n, kl) in enumerate([(1, 0.4), (3, 0.2), (6, 0.1)])]
    found = divergence.along(made)
    assert found.kl == pytest.approx((0.4 + 3 * 0.2 + 6 * 0.1) / 10) and found.overlap == pytest.approx(1 - found.kl)
    assert (found.prompts, found.n_tokens, found.kls) == (3, 10, [0.4, 0.2, 0.1])
    even = [0.4, 0.2, 0.9]
    assert divergence.stderr(even, [7, 7, 7]) == pytest.approx(statistics.stdev(even) / math.sqrt(3))
    assert divergence.stderr([0.4], [7]) is None and divergence.along(made[:1]).kl_stderr is None


def test_the_stated_spread_is_the_one_that_repeated_draws_show() -> None:
    import random

    draw = random.Random(0)
    texts = [(draw.randint(1, 20), draw.random()) for _ in range(200)]
    means, stated = [], []
    for _ in range(400):
        chosen = draw.choices(texts, k=30)
        sizes, values = [n for n, _ in chosen], [v for _, v in chosen]
        means.append(divergence.mean(values, sizes))
        stated.append(divergence.stderr(values, sizes))
    assert statistics.mean(stated) == pytest.approx(statistics.stdev(means), rel=0.1)


def test_logits_are_those_of_the_text_alone(model_folder: Path) -> None:
    import torch

    model = models.load(model_folder)
    text = Text("t", [5, 6, 7], [8, 9])
    with torch.inference_mode():
        whole = model(torch.tensor([text.head + text.tail])).logits[0]  # [5, V]
    torch.testing.assert_close(divergence.logits(model, text), whole[2:4])
