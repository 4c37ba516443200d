"""Acceptance of rewrites: the checks, leak phrases, echoes, likeness, empty and cut-off text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfsd import checks
from hfsd.blocks_recovery import Rewrite as RewriteRecipe
from hfsd.checks import Draft
from hfsd.records import Example


@pytest.mark.parametrize(
    ("text", "finish", "task", "reason"),
    [
        ("2 + 2 = 4\n#### 4", "stop", "math", "kept"),
        ("2 + 2 = 5\n#### 5", "stop", "math", "wrong answer"),
        ("2 + 2 = 5", "stop", "instruction", "kept"),
        ("   ", "stop", "math", "empty"),
        ("2 + 2 = 4", "length", "math", "truncated"),
        ("As the Reference Answer says, 4", "stop", "math", "leak"),
        ("I'm ready to help. What's the task?", "stop", "instruction", "leak"),
        ("### Response:\n4", "stop", "instruction", "echo"),
        ("**Instruction**\nAdd 2 and 2: 4", "stop", "instruction", "echo"),
        ("### Response: 4", "stop", "instruction", "echo"),
        ("**Response:** 4", "stop", "instruction", "echo"),
        ("Your response: 4", "stop", "instruction", "echo"),
        ("The response is: 4", "stop", "instruction", "kept"),
        ("Question: what is 2+2? It is 4.", "stop", "instruction", "kept"),
        ("* Response: 4", "stop", "instruction", "kept"),
        ("Based on the reference, it is 4", "stop", "instruction", "leak"),
        ("Here is your response: 4", "stop", "instruction", "leak"),
        ("It returns the reference to the node.", "stop", "code", "kept"),
        ("I look forward to your response.", "stop", "instruction", "kept"),
        ("4 " * 300, "stop", "instruction", "too long"),
        ("4", "failed: 503", "math", "failed"),
    ],
)
def test_verdicts(text: str, finish: str, task: str, reason: str) -> None:
    rules = RewriteRecipe(task=task, min_similarity=0)
    assert checks.verdict(Draft("r", text, 1, finish, "self"), Example("r", "2+2?", "#### 4"), None, rules) == reason


def test_a_rewrite_must_be_like_its_reference_and_as_likely() -> None:
    row, rules = Example("r", "Why?", "the sky is blue"), RewriteRecipe(min_similarity=0.3)

    def judged(nats: float | None, similarity: float) -> str:
        return checks.verdict(Draft("r", "blue sky", 3, "stop", "self", nats, similarity), row, 1.5, rules)

    assert [judged(1.5, 0.3), judged(1.6, 0.3), judged(1.0, 0.2), judged(None, 0.9)] == [
        "kept",
        "unlikely",
        "unlike",
        "kept",
    ]
    loose = rules.model_copy(update={"likelier": False})
    assert checks.verdict(Draft("r", "blue sky", 3, "stop", "self", 9.0, 0.5), row, 1.5, loose) == "kept"


@pytest.mark.parametrize("text", ["It is my response to you.", "### Question: 4\nWhy?"])
def test_what_the_row_says_itself_is_no_leak_and_no_echo(text: str) -> None:
    rules = RewriteRecipe(min_similarity=0)
    found = [
        checks.verdict(Draft("r", text, 1, "stop", "self"), Example("r", "Write.", reference), None, rules)
        for reference in (text, "Another text.")
    ]
    assert found[0] == "kept" and found[1] in ("leak", "echo")


@given(st.text(max_size=60), st.text(max_size=60))
def test_overlap_is_symmetric_and_one_for_the_same_text(one: str, other: str) -> None:
    found = checks.overlap(one, other)
    assert 0 <= found <= 1 and found == checks.overlap(other, one)
    assert checks.overlap(one, one) == 1


@pytest.mark.parametrize(
    ("one", "alike", "other"),
    [
        ("the cat sat", "The cat, sat!", "a dog ran"),
        ("✓", "✓", "✗"),
        ("天空是蓝色的", "天空为什么是蓝色的", "我喜欢吃苹果"),
        ("空が青いのは光の散乱のためです", "光が散乱するので空は青く見えます", "私は昨日友達と映画を見ました"),
        ("ท้องฟ้าเป็นสีฟ้าเพราะแสงกระเจิง", "ท้องฟ้ามีสีฟ้าเนื่องจากการกระเจิงของแสง", "ฉันชอบกินข้าวผัดกุ้งมาก"),
    ],
)
def test_words_are_counted_in_every_script(one: str, alike: str, other: str) -> None:
    assert checks.overlap(one, alike) > 0.5 > 0.3 > checks.overlap(one, other)


def test_the_final_answer_may_stand_apart_from_the_reference() -> None:
    row, rules = (
        Example("r", "2+2?", "It is as everyone knows.", answer="4"),
        RewriteRecipe(task="math", min_similarity=0),
    )
    for text, reason in (("So 4.", "kept"), ("So 5.", "wrong answer")):
        assert checks.verdict(Draft("r", text, 1, "stop", "self"), row, None, rules) == reason
    row = Example("r", "p?", "See.", answer="x^2+1")  # stated, though it has no mark
    for text, reason in ((r"\boxed{1+x^2}", "kept"), (r"\boxed{x^3+1}", "wrong answer")):
        assert checks.verdict(Draft("r", text, 1, "stop", "self"), row, None, rules) == reason


@pytest.mark.parametrize(
    ("check", "text", "truth", "same"),
    [
        ("math", r"\boxed{x^2}", r"\boxed{x^3}", False),
        ("math", "#### none", "#### none", False),
        ("exact", "The answer is  Paris.", "#### paris", True),
        ("exact", "Paris or Rome", "Paris", False),
        ("choice", "The answer is (B).", "B", True),
        ("choice", "A is wrong, so it is C", "B", False),
        ("choice", "it is hot", "it is hot", False),
        (
            "json",
            '{"name": "f", "arguments": {"a": 1, "b": [2]}}',
            '[{"name": "f", "arguments": {"b": [2], "a": 1}}]',
            True,
        ),
        (
            "json",
            'Sure: <tool_call>{"name": "f", "arguments": {}}</tool_call>',
            '{"name": "f", "arguments": {"a": 1}}',
            False,
        ),
        (
            "json",
            '{"function": {"name": "f", "arguments": "{\\"a\\": 1}"}}',
            '{"name": "f", "arguments": {"a": 1}}',
            True,
        ),
        (
            "json",
            '{"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}]}',
            '{"name": "f", "parameters": {"a": 1}}',
            True,
        ),
        ("json", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', False),
        ("json", "no call", "no call", False),
    ],
)
def test_final_answers(check: str, text: str, truth: str, same: bool) -> None:
    assert checks.CHECKS[check](text, truth) is same


@pytest.mark.parametrize("text", ["[" * 5000, "[" * 400 + "]" * 400, '{"tool_calls": ' * 400 + "1" + "}" * 400])
def test_brackets_without_end_hold_no_call(text: str) -> None:
    assert checks.tool_calls(text) == []


def test_the_check_follows_the_task() -> None:
    call = Example("r", "p", '{"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}')
    plain = Example("r", "p", '{"name": "Bob"}')
    found = [
        checks.check_of(RewriteRecipe(task=t), row) for t in ("math", "instruction", "code") for row in (call, plain)
    ]
    assert found == ["math", "math", "none", "none", "json", "none"]
    assert checks.check_of(RewriteRecipe(task="math", check="exact"), plain) == "exact"


def test_every_task_has_a_prompt_with_both_places() -> None:
    for task in ("instruction", "math", "code"):
        text = checks.prompts()[task]
        assert "{prompt}" in text["user"] and "{reference}" in text["user"] and text["system"]
