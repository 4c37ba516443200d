"""Rewriting: modes, candidates, gates, what is written, and that nothing is lost."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfsd import chat, checks, drafts, figures, rewrite, shapes
from hfsd.blocks_recovery import Rewrite as RewriteRecipe
from hfsd.engines import Answered, Completion, Engine, Request, Sampling
from hfsd.errors import BadRequest, HfsdError
from hfsd.plain import load
from hfsd.records import Example, Rewrite, TrainSet

ROWS = [shapes.example(f"What is {i} + 1?", f"{i} + 1 = {i + 1}.\n#### {i + 1}") for i in range(10)]
SPARE = [shapes.example(f"What is {i} + 2?", f"{i} + 2 = {i + 2}.\n#### {i + 2}") for i in range(20)]


class Fake(Engine):
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
    assert load(TrainSet, tmp_path / "stats.json") == stats and stats.used == 10
    words, references = 10 * len("It is 4") + 1, sum(len(r.reference) for r in ROWS)  # one has two digits
    assert stats.length_change == pytest.approx(words / references - 1)
    assert stats.tokens_per_second == pytest.approx(30 / stats.seconds, rel=0.01)


def test_every_line_says_by_what_it_was_made(tmp_path: Path) -> None:
    sampling = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 64}
    asked = RewriteRecipe(task="math", mode="self", **sampling)
    for model, said in (
        (f"org/tiny@{'a' * 40}", f"org/tiny@{'a' * 40}"),
        ("/home/joe/tiny@sha256:ab", "tiny@sha256:ab"),
    ):
        out = tmp_path / said[:4]
        rewrite.run(lambda: Fake(_right), ROWS, SPARE, asked, "key", out, model)
        lines = [json.loads(line) for line in (out / "rewrites.jsonl").read_text().splitlines()]
        assert len(lines) == 10 and len(rewrite.read(out)) == 10
        for line in lines:
            assert (line["engine"], line["model"], line["sampling"]) == ("transformers", said, sampling)
            assert line["reason"] and line["n_tokens"] == 3


def _on_a_full_disk(out: Path, name: str) -> None:
    """Whatever writes the file, by whichever temporary name, writes to a device that is full."""
    out.mkdir()
    for hidden in (f".{name}.tmp", f".{name}.{os.getpid()}.tmp"):
        (out / hidden).symlink_to("/dev/full")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's full device")
@pytest.mark.parametrize("name", ["reference.parquet", "self-distilled.parquet"])
def test_a_full_disk_leaves_no_torn_text(tmp_path: Path, name: str) -> None:
    _on_a_full_disk(tmp_path / "out", name)
    told = rf"^cannot write \S+{name}: No space left on device; free some space or give another --out$"
    with pytest.raises(HfsdError, match=told):
        _run(Fake(_right), tmp_path / "out")
    assert not (tmp_path / "out" / name).exists() and not (tmp_path / "out" / "stats.json").exists()
    engine = Fake(_right)
    assert _run(engine, tmp_path / "out").rows == 10 and engine.batches == []  # nothing is generated twice


OWN = """
math:
  system: Be a pirate.
  user: "{prompt} Say it in your words: {reference}"
leaks: [Ahoy]
headings: ["The Task"]
"""


def test_prompts_leaks_and_headings_of_ones_own(tmp_path: Path) -> None:
    own, answers = tmp_path / "own.yaml", ["It is {}", "ahoy, it is {}", "## The Task:\nIt is {}", "my response: {}"]
    own.write_text(OWN)

    def answer(request: Request, _: int) -> str:
        number = int(_right(request, 0).split()[-1])
        return answers[number % 4].format(number)

    engine = Fake(answer)
    stats = _run(engine, tmp_path / "out", mode="reference", prompts=str(own), min_similarity=0.0)
    said = {"kept": 0, "leak": 1, "echo": 2}
    expected = {reason: sum((i + 1) % 4 == at for i in range(10)) for reason, at in said.items()}
    expected["kept"] += sum((i + 1) % 4 == 3 for i in range(10))  # what the packaged list calls a leak
    assert stats.reasons == expected
    asked = {m.messages[0]["content"] for m in engine.asked}, engine.asked[0].messages[-1]["content"]
    row = next(r for r in ROWS if r.id == engine.asked[0].id)
    assert asked == ({"Be a pirate."}, f"{row.prompt} Say it in your words: {row.reference}")
    assert stats.asked[-1]["content"] == "{prompt} Say it in your words: {reference}"
    assert checks.prompts(str(own))["code"] == checks.prompts()["code"]  # what it does not name stays


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot read .*: .*No such file"),
        ("math: [", "cannot read .*: while parsing"),
        ("- math", "must map some of instruction, math, code, headings, leaks to texts"),
        ("maths: {}", r"unknown key 'maths' \(did you mean 'math'\?\); known are: instruction, math"),
        ("math: {user: '{prompt} {reference}'}", "math must hold the texts system and user, with the places"),
        ("math: {system: a, user: '{prompt}'}", "math must hold the texts system and user, with the places"),
        ("leaks: the reference", "leaks must be a list of texts"),
        ("headings: [3]", "headings must be a list of texts"),
    ],
)
def test_prompts_of_another_shape_are_told_in_one_line(tmp_path: Path, text: str | None, told: str) -> None:
    own = tmp_path / "own.yaml"
    if text is not None:
        own.write_text(text)
    asked = RewriteRecipe(prompts=str(own))
    (line,) = rewrite.faults(asked)
    assert re.search(told, line) and "\n" not in line and line.startswith("rewrite.prompts: ")
    with pytest.raises(BadRequest, match=told):
        _run(Fake(_right), tmp_path / "out", mode="reference", prompts=str(own))
    assert "prompts" not in rewrite.inputs(asked)


def test_what_rewrites_depend_on_beside_the_recipe(tmp_path: Path) -> None:
    own, given = tmp_path / "own.yaml", tmp_path / "mine.jsonl"
    own.write_text(OWN)
    given.write_text("{}")
    asked = RewriteRecipe(**{"prompts": str(own), "from": str(given)})
    before, packaged = rewrite.inputs(asked), rewrite.inputs(RewriteRecipe())
    assert set(before) == {"prompts", "from"} and set(packaged) == {"prompts"} and rewrite.faults(asked) == []
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in before.values())
    assert before["prompts"] != packaged["prompts"]
    own.write_text(f"# a comment\n{OWN}")
    assert rewrite.inputs(asked) == before
    own.write_text(OWN.replace("pirate", "poet"))
    given.write_text("{ }")
    after = rewrite.inputs(asked)
    assert after["prompts"] != before["prompts"] and after["from"] != before["from"]
    given.unlink()
    assert set(rewrite.inputs(asked)) == {"prompts"}


def _pair(reference: int, words: int, similarity: float, nats: tuple[float, float] | None) -> tuple[Example, Rewrite]:
    row = Example(f"r{reference}", "p", "x" * reference)
    before, after = nats or (None, None)
    return row, Rewrite(row.id, "y" * words, True, "kept", 3, "stop", "self", after, before, similarity)


def _bars(axes: Any) -> list[list[int]]:
    """Heights of the bars of each histogram."""
    return [[int(bar.get_height()) for bar in drawn] for drawn in axes.containers]


def test_the_picture_of_the_shift_counts_every_row(tmp_path: Path) -> None:
    pairs = [_pair(100 + i, 150 + i, i / 10, (2.0 + i / 10, 1.0)) for i in range(9)]
    pairs.append(_pair(100, 900, 1.0, None))  # too long for the axis of ratios, and of no likelihood
    drawn = figures.rewrite_shift(pairs)
    length, ratio, similarity, perplexity = drawn.axes
    assert [[sum(bars) for bars in _bars(axes)] for axes in drawn.axes] == [[10, 10], [10], [10], [9, 9]]
    assert _bars(ratio)[0][-1] == 1 and _bars(similarity)[0][0] == 1
    assert [t.get_text() for t in length.get_legend().get_texts()] == ["references, mean 104", "rewrites, mean 229"]
    assert length.get_xlabel() == "characters (900: 900 and more)"
    ticks = {
        label.get_text(): at for at, label in zip(perplexity.get_xticks(), perplexity.get_xticklabels(), strict=True)
    }
    assert {"1", "2", "5", "10"} <= set(ticks) and all(at == pytest.approx(math.log(int(t))) for t, at in ticks.items())
    assert perplexity.get_xlabel().startswith("perplexity under the original")
    assert [axis.get_xlabel() for axis in perplexity.child_axes] == ["loss (nats per token)"]
    told = [t.get_text() for t in perplexity.get_legend().get_texts()]
    assert told == [
        "references, mean loss 2.40 nats (perplexity 11.0)",
        "rewrites, mean loss 1.00 nats (perplexity 2.7)",
    ]
    for one in ([_pair(1, 1, 1.0, (0.0, 0.0))], [_pair(1, 0, 0.0, (14.0, 12.0))], [_pair(3, 3, 0.5, None)] * 2):
        figures.draw_rewrites(one, tmp_path)
    assert len(figures.rewrite_shift([_pair(3, 3, 0.5, None)]).axes) == 3


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
    assert (stats.sampling, stats.tokens_per_second) == ({}, None)
    (line,) = map(json.loads, (tmp_path / "rewrites.jsonl").read_text().splitlines())
    assert (line["engine"], line["model"], line["sampling"]) == ("from mine.jsonl", None, {})


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
    assert stats.used == stats.trained_rows == len(kept)
    with pytest.raises(BadRequest, match="none of 10 rewrites was accepted and on_reject is drop"):
        _run(Fake(lambda *_: "wrong: 99"), tmp_path / "none", on_reject="drop")


def _log(out: Path) -> list[dict[str, Any]]:
    """The batches of the log, in its order, without the time that each took."""
    lines = [json.loads(line) for line in (out / "work" / "batches.jsonl").read_text().splitlines()]
    assert all(line.pop("seconds") >= 0 for line in lines)
    return lines


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
        assert (out / "rewrites.jsonl").read_bytes() == (tmp_path / "whole" / "rewrites.jsonl").read_bytes()
        assert _log(out) == _log(tmp_path / "whole")


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
