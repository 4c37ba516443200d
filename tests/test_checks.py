"""Acceptance of rewrites: exact final numbers, leak phrases, empty and cut-off text."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfsd import checks


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
    assert checks.final_number(text) == number


@pytest.mark.parametrize("text", ["", "no number here", "room B12", "2/0", "####", "#### none of 3 things said"[:8]])
def test_no_final_number(text: str) -> None:
    assert checks.final_number(text) is None


@given(st.fractions(max_denominator=1000).filter(lambda f: abs(f) < 10**9))
def test_a_fraction_is_read_exactly(value: Fraction) -> None:
    assert checks.final_number(f"The answer is {value.numerator}/{value.denominator}.") == value


@given(st.integers(-(10**12), 10**12))
def test_an_integer_is_read_with_and_without_commas(value: int) -> None:
    assert checks.final_number(f"#### {value}") == checks.final_number(f"#### {value:,}") == value


@given(st.text(max_size=80))
def test_any_text_parses_or_does_not(text: str) -> None:
    found = checks.final_number(text)
    assert found is None or isinstance(found, Fraction)


def test_two_unparsable_answers_are_not_equal() -> None:
    assert not checks.same_answer("no number", "no number")
    assert checks.same_answer("it is 0.50", "#### 1/2")


@pytest.mark.parametrize(
    ("text", "finish", "task", "reason"),
    [
        ("2 + 2 = 4\n#### 4", "stop", "math", "kept"),
        ("2 + 2 = 5\n#### 5", "stop", "math", "wrong answer"),
        ("2 + 2 = 5", "stop", "instruction", "kept"),
        ("   ", "stop", "math", "empty"),
        ("2 + 2 = 4", "length", "math", "truncated"),
        ("As the Reference Answer says, 4", "stop", "math", "leak"),
        ("### Response:\n4", "stop", "instruction", "leak"),
        ("4", "failed: 503", "math", "failed"),
    ],
)
def test_verdicts(text: str, finish: str, task: str, reason: str) -> None:
    assert checks.verdict(text, "#### 4", finish, task) == reason


def test_the_final_line_is_put_back_once() -> None:
    assert checks.with_final_line("2 + 2 is 4.", "x\n#### 4") == "2 + 2 is 4.\n#### 4"
    assert checks.with_final_line("so\n#### 4", "x\n#### 4") == "so\n#### 4"
    assert checks.with_final_line("text", "no such line") == "text"


def test_every_task_has_a_prompt_with_both_places() -> None:
    for task in ("instruction", "math", "code"):
        text = checks.prompts()[task]
        assert "{prompt}" in text["user"] and "{reference}" in text["user"] and text["system"]
