"""Acceptance of rewrites: exact final numbers, leak phrases, empty and cut-off text."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfsd import answers, checks
from hfsd.checks import Draft
from hfsd.recipe import Rewrite as RewriteRecipe
from hfsd.records import Example


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234", 1234),
        ("first #### 3\n#### 4", 4),
        ("the answer is $5.", 5),
        ("The final answer is: -3 apples, not 4", -3),
        ("so x = -3", -3),
        (r"hence \boxed{\frac{1}{2}}", Fraction(1, 2)),
        (r"hence \boxed{-\dfrac{3}{4}} of 9", Fraction(-3, 4)),
        ("it is 50%", Fraction(1, 2)),
        ("about 1/2", Fraction(1, 2)),
        ("17 + 36 = 53 pebbles.", 53),
        ("3-2=1", 1),
        ("#### £28080", 28080),
        ("#### -$1,000.50", Fraction("-1000.5")),
        ("12 \u2212 3 = \u22129", -9),
        ("costs 3.50", Fraction(7, 2)),
        ("ends with 7.", 7),
        ("#### 0.1", Fraction(1, 10)),
    ],
)
def test_final_numbers(text: str, number: Fraction | int) -> None:
    assert answers.final_number(text) == number


@pytest.mark.parametrize("text", ["", "no number here", "room B12", "2/0", "####", "#### none of 3 things said"[:8]])
def test_no_final_number(text: str) -> None:
    assert answers.final_number(text) is None


@given(st.fractions(max_denominator=1000).filter(lambda f: abs(f) < 10**9))
def test_a_fraction_is_read_exactly(value: Fraction) -> None:
    assert answers.final_number(f"The answer is {value.numerator}/{value.denominator}.") == value


@given(st.integers(-(10**12), 10**12))
def test_an_integer_is_read_with_and_without_commas(value: int) -> None:
    assert answers.final_number(f"#### {value}") == answers.final_number(f"#### {value:,}") == value


@given(st.text(max_size=80))
def test_any_text_parses_or_does_not(text: str) -> None:
    found = answers.final_number(text)
    assert found is None or isinstance(found, Fraction)


def test_two_unparsable_answers_are_not_equal() -> None:
    assert not answers.same_answer("no number", "no number")
    assert answers.same_answer("it is 0.50", "#### 1/2")


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
        ("The response is: 4", "stop", "instruction", "kept"),
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


@given(st.text(max_size=60), st.text(max_size=60))
def test_overlap_is_symmetric_and_one_only_for_the_same_words(one: str, other: str) -> None:
    found = checks.overlap(one, other)
    assert 0 <= found <= 1 and found == checks.overlap(other, one)
    assert checks.overlap("the cat sat", "The cat, sat!") == 1 and checks.overlap("a b", "c d") == 0


def test_the_final_answer_may_stand_apart_from_the_reference() -> None:
    row, rules = (
        Example("r", "2+2?", "It is as everyone knows.", answer="4"),
        RewriteRecipe(task="math", min_similarity=0),
    )
    for text, reason in (("So 4.", "kept"), ("So 5.", "wrong answer")):
        assert checks.verdict(Draft("r", text, 1, "stop", "self"), row, None, rules) == reason


@pytest.mark.parametrize(
    ("check", "text", "truth", "same"),
    [
        ("math", r"so \boxed{x^2+1}", r"\boxed{1+x^2}", True),
        ("math", r"\boxed{x^2}", r"\boxed{x^3}", False),
        ("math", r"\boxed{5 \text{ apples}}", "#### 5", True),
        ("math", "#### none", "#### none", False),
        ("math", "at 3 m/h * 4 it is 12", "so 2 a/b is 12", True),
        ("exact", "The answer is  Paris.", "#### paris", True),
        ("exact", "Paris or Rome", "Paris", False),
        ("exact", "", "", False),
        ("choice", "The answer is (B).", "B", True),
        ("choice", "b)", "B", True),
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
        ("json", "no call", "no call", False),
    ],
)
def test_final_answers(check: str, text: str, truth: str, same: bool) -> None:
    assert answers.CHECKS[check](text, truth) is same


def test_the_check_follows_the_task() -> None:
    call = Example("r", "p", '{"name": "f", "arguments": {}}')
    plain = Example("r", "p", "print(1)")
    found = [
        checks.check_of(RewriteRecipe(task=t), row) for t in ("math", "instruction", "code") for row in (call, plain)
    ]
    assert found == ["math", "math", "none", "none", "json", "none"]
    assert checks.check_of(RewriteRecipe(task="math", check="exact"), plain) == "exact"


def test_the_final_line_is_put_back_once() -> None:
    assert answers.with_final_line("2 + 2 is 4.", "x\n#### 4") == "2 + 2 is 4.\n#### 4"
    assert answers.with_final_line("so\n#### 4", "x\n#### 4") == "so\n#### 4"
    assert answers.with_final_line("text", "no such line") == "text"


def test_every_task_has_a_prompt_with_both_places() -> None:
    for task in ("instruction", "math", "code"):
        text = checks.prompts()[task]
        assert "{prompt}" in text["user"] and "{reference}" in text["user"] and text["system"]
