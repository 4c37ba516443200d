"""Rewriting: modes, candidates, gates, what is written, and that nothing is lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfsd import chat, drafts, rewrite, shapes
from hfsd.engines import Answered, Completion, Request, Sampling
from hfsd.errors import BadRequest, HfsdError
from hfsd.recipe import Rewrite as RewriteRecipe
from hfsd.records import Example, TrainSet

ROWS = [shapes.example(f"What is {i} + 1?", f"{i} + 1 = {i + 1}.\n#### {i + 1}") for i in range(10)]
SPARE = [shapes.example(f"What is {i} + 2?", f"{i} + 2 = {i + 2}.\n#### {i + 2}") for i in range(20)]


class Fake:
    """Answers by a function of the request, the seed and how often it was asked; likelihood by the text's length."""

    name = "fake"

    def __init__(self, answer: Callable[[Request, int], str], fails_at: int | None = None) -> None:
        self.answer, self.fails_at = answer, fails_at
        self.asked: list[Request] = []
        self.batches: list[tuple[tuple[str, ...], int]] = []

    def generate(self, requests: Sequence[Request], sampling: Sampling, seed: int) -> list[Completion]:
        if self.fails_at == len(self.batches):
            raise HfsdError("the engine is gone")
        self.asked += requests
        self.batches.append((tuple(r.id for r in requests), seed))
        return [Completion(r.id, self.answer(r, seed), 3, "stop") for r in requests]

    def nats(self, answers: Sequence[Answered]) -> list[float | None]:
        return [len(text) / 10 for _, text in answers]


def _right(request: Request, _: int) -> str:
    digits = request.messages[-1]["content"].split("What is ")[1].split("?")[0]
    return f"It is {sum(int(n) for n in digits.split(' + '))}"


def _run(engine: Fake, out: Path, rows: Sequence[Example] = ROWS, **changes: Any) -> TrainSet:
    asked = RewriteRecipe(**{"task": "math", "batch_rows": 4, "mode": "self"} | changes)
    return rewrite.run(lambda: engine, rows, SPARE, asked, "key", out)


def _arms(out: Path) -> dict[str, list[dict[str, Any]]]:
    import pyarrow.parquet as pq

    return {c: pq.read_table(out / f"{c}.parquet").to_pylist() for c in ("reference", "self-distilled")}


def test_the_arms_differ_in_nothing_but_the_text(tmp_path: Path) -> None:
    stats = _run(Fake(_right), tmp_path)
    arms = _arms(tmp_path)
    reference, own = arms["reference"], arms["self-distilled"]
    assert [r["id"] for r in reference] == [r["id"] for r in own] == [r.id for r in ROWS]
    assert [r["prompt"] for r in reference] == [r["prompt"] for r in own] == [chat.asked(r) for r in ROWS]
    assert [r["completion"][0]["content"] for r in reference] == [r.reference for r in ROWS]
    assert own[3]["completion"][0]["content"] == "It is 4\n#### 4"  # the line that the metric reads is put back
    assert (stats.rows, stats.kept_fraction, stats.n_tokens, stats.modes) == (10, 1.0, 30, {"self": 10})
    assert stats.rewrite_nats == pytest.approx(0.71) and stats.reference_nats > stats.rewrite_nats
    assert [e for e, _ in rewrite.read(tmp_path)] == ROWS and stats.asked == ()
    assert (tmp_path / "shift.png").read_bytes().startswith(b"\x89PNG")


def test_the_reference_is_asked_with_and_never_trained_with(tmp_path: Path) -> None:
    row = Example("e", "a {reference} in the prompt", "the {prompt} reference")
    text = drafts.messages(row, "instruction", "reference")[-1]["content"]
    assert text.count("the {prompt} reference") == 1 and "a {reference} in the prompt" in text
    assert drafts.messages(row, "instruction", "self") == chat.single_turn(row.prompt)
    given = tmp_path / "mine.jsonl"
    given.write_text(json.dumps({"id": "e", "text": "my words in the prompt reference"}) + "\n")
    recipe = RewriteRecipe(**{"from": str(given)})
    stats = rewrite.run(lambda: pytest.fail("no engine is needed"), [row], [], recipe, "k", tmp_path)
    arms = {name: rows[0] for name, rows in _arms(tmp_path).items()}
    assert arms["reference"]["prompt"] == arms["self-distilled"]["prompt"] == chat.single_turn(row.prompt)
    assert arms["reference"]["completion"][0]["content"] == row.reference
    assert arms["self-distilled"]["completion"][0]["content"] == "my words in the prompt reference"
    assert (stats.mode, stats.reference_nats) == ("given", None)


def test_the_turns_before_are_the_context_of_a_rewrite() -> None:
    history = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    row = Example("e", "And now?", "Bye", history=(*history, {"role": "assistant", "content": "Hello"}))
    made = drafts.messages(row, "instruction", "reference")
    assert [m["role"] for m in made] == ["system", "user", "assistant", "user"]
    assert made[0]["content"].startswith("Be brief.\n\nBelow are an instruction")
    assert [m["content"] for m in made[1:3]] == ["Hi", "Hello"] and "And now?" in made[3]["content"]


def test_few_shot_shows_worked_rewrites_of_rows_that_are_not_trained_on(tmp_path: Path) -> None:
    engine = Fake(_right)
    _run(engine, tmp_path, mode="few-shot")
    last = engine.asked[-1].messages
    assert [m["role"] for m in last] == ["system", *["user", "assistant"] * drafts.SHOTS, "user"]
    shown = [m["content"] for m in last[1:-1:2]]
    assert all(any(spare.reference in text for spare in SPARE) for text in shown)
    assert [m["content"] for m in last[2:-1:2]] == [_right(Request("", [m]), 0) for m in last[1:-1:2]]
    assert not {r.id for r in ROWS} & {i for ids, _ in engine.batches[:4] for i in ids}
    with pytest.raises(BadRequest, match="0 of 16 rows kept for calibration have an acceptable rewrite to show"):
        _run(Fake(lambda *_: "no number"), tmp_path / "bad", mode="few-shot")


def test_best_does_without_few_shot_where_nothing_can_be_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(request: Request, _: int) -> str:
        return "no number" if len(request.messages) > 1 else _right(request, 0)

    assert _run(Fake(answer), tmp_path, mode="best").modes == {"self": 10}
    assert "so the best is taken of two modes, without few-shot" in capsys.readouterr().err


def test_best_takes_the_likeliest_acceptable_draft(tmp_path: Path) -> None:
    def answer(request: Request, _: int) -> str:
        modes = {1: "self", 2: "reference"}
        mode = modes.get(len(request.messages), "few-shot")
        number = _right(request, 0).split()[-1]
        short = {"self": "No: 99", "reference": f"So it must be {number}", "few-shot": f"So {number}"}
        return f"It is {number}" if request.id in {r.id for r in SPARE} else short[mode]

    stats = _run(Fake(answer), tmp_path, mode="best", min_similarity=0.0)
    assert stats.modes == {"few-shot": 10} and stats.n_tokens == 3 * (30 + 16)
    assert {r.text[:3] for _, r in rewrite.read(tmp_path)} == {"So "}


def test_candidates_are_drawn_until_one_is_accepted(tmp_path: Path) -> None:
    seen: dict[str, int] = {}

    def answer(request: Request, _: int) -> str:
        seen[request.id] = seen.get(request.id, 0) + 1
        late = int(request.messages[-1]["content"].split()[2]) % 3
        return _right(request, 0) if seen[request.id] > late else "wrong: 99"

    stats = _run(Fake(answer), tmp_path, candidates=2, temperature=0.7)
    by_row = {r.prompt: seen[r.id] for r in ROWS}
    assert set(by_row.values()) == {1, 2}
    wrong = [int(r.prompt.split()[2]) % 3 for r in ROWS].count(2)
    assert stats.reasons == {"kept": 10 - wrong, "wrong answer": wrong}
    assert stats.n_tokens == 3 * sum(by_row.values())


def test_rejected_rows_may_leave_both_arms(tmp_path: Path) -> None:
    def answer(request: Request, _: int) -> str:
        return _right(request, 0) if request.id < "8" else "wrong: 99"

    stats = _run(Fake(answer), tmp_path, on_reject="drop")
    arms = _arms(tmp_path)
    kept = [r.id for r in ROWS if r.id < "8"]
    assert [[r["id"] for r in rows] for rows in arms.values()] == [kept, kept] and 0 < len(kept) < 10
    assert stats.rows == 10 and len(rewrite.read(tmp_path)) == 10
    with pytest.raises(BadRequest, match="none of 10 rewrites was accepted and on_reject is drop"):
        _run(Fake(lambda *_: "wrong: 99"), tmp_path / "none", on_reject="drop")


@pytest.mark.parametrize("mode", ["self", "few-shot", "best"])
def test_an_engine_that_dies_costs_the_batch_in_flight_and_nothing_else(tmp_path: Path, mode: str) -> None:
    whole = Fake(_right)
    _run(whole, tmp_path / "whole", mode=mode)
    for at in range(len(whole.batches)):
        out = tmp_path / f"{mode}{at}"
        first, second = Fake(_right, fails_at=at), Fake(_right)
        with pytest.raises(HfsdError, match="the engine is gone"):
            _run(first, out, mode=mode)
        if at:  # a kill in the middle of a write
            with open(out / "work" / "batches.jsonl", "ab") as handle:
                handle.write(b'{"round": "self/0", "bat')
        _run(second, out, mode=mode)
        assert first.batches + second.batches == whole.batches  # the same rows, the same seeds, each once
        for name in ("rewrites.jsonl", "work/batches.jsonl"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_full_disk_keeps_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HfsdError, match="No space left on device; free some space and run again, finished batches are"):
        _run(Fake(_right), tmp_path)
    monkeypatch.setattr(os, "fsync", real)
    engine = Fake(_right)
    assert _run(engine, tmp_path).kept_fraction == 1.0 and len(engine.batches) < 3


def test_batches_of_other_rows_are_refused(tmp_path: Path) -> None:
    _run(Fake(_right), tmp_path)
    with pytest.raises(HfsdError, match="batch self/0 0 is of other rows; make it again: --redo rewrite"):
        _run(Fake(_right), tmp_path, rows=SPARE)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=60), st.integers(1, 9))
def test_every_row_is_in_one_batch(lengths: list[int], size: int) -> None:
    rows = [Example(f"r{i}", "p" * n, "a") for i, n in enumerate(lengths)]
    plan = drafts.plan_batches(rows, size)
    assert sorted(i for batch in plan for i in batch) == list(range(len(rows)))
    assert all(len(batch) == size for batch in plan[:-1]) and 0 < len(plan[-1]) <= size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": 2}, "at temperature 0 all of them are the same text"),
        ({"mode": "best", "engine": "endpoint", "endpoint": {"url": "http://x"}}, "a chat endpoint does not give"),
        ({"engine": "endpoint"}, "go together"),
    ],
)
def test_what_cannot_work_is_refused_in_the_recipe(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewriteRecipe(**changes)
