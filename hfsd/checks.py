"""Is a rewrite acceptable? Leak phrases, empty or cut-off text, and the task's own check."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import yaml

KEPT = "kept"
FINAL_LINE = re.compile(r"^####\s*(.+?)\s*$", re.MULTILINE)
# An integer with or without thousands commas, then a decimal part, a fraction or a mixed number is handled around it.
NUMBER = re.compile(r"(?<![\w.])[-−]?[$£€¥]?[-−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:\s?/\s?\d+)?%?")
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
LATEX_FRACTION = re.compile(r"([-−]?)\\d?frac\{([^{}]+)\}\{([^{}]+)\}")
ANSWER_IS = re.compile(r"(?:final answer|answer)\s*(?:is|:|=)\s*(.+)", re.IGNORECASE)


@cache
def prompts() -> dict[str, Any]:
    """prompts.yaml: per task kind the system and user text, and the leak phrases."""
    return yaml.safe_load((Path(__file__).parent / "prompts.yaml").read_text(encoding="utf-8"))


def verdict(text: str, reference: str, finish: str, task: str) -> str:
    """`kept`, or why the reference is used instead: `failed`, `empty`, `truncated`, `leak`, `wrong answer`."""
    if finish.startswith("failed"):
        return "failed"
    if not text.strip():
        return "empty"
    if finish == "length":
        return "truncated"
    folded = text.casefold()
    if any(phrase in folded for phrase in prompts()["leaks"]):
        return "leak"
    if task == "math" and not same_answer(text, reference):
        return "wrong answer"
    return KEPT


def same_answer(text: str, reference: str) -> bool:
    """Whether both end in the same number, compared exactly. What cannot be parsed equals nothing, not even itself."""
    mine, theirs = final_number(text), final_number(reference)
    return mine is not None and mine == theirs


def final_number(text: str) -> Fraction | None:
    """The final answer of a worked solution, exactly; None where there is none.

    Looked for in this order: the last `#### n` line, the last `\\boxed{}`, the last "answer is ...", the last number.
    Understands thousands commas, decimals, fractions, percent (50% is 1/2), currency signs and negative numbers.
    """
    for pattern in (FINAL_LINE, BOXED, ANSWER_IS):
        found = pattern.findall(text)
        if found:
            numbers = _numbers(found[-1])
            if pattern is not ANSWER_IS:
                return numbers[-1] if numbers else None
            if numbers:
                return numbers[0]
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def with_final_line(text: str, reference: str) -> str:
    """The text with the reference's `#### n` line put back where the reference has one and the text does not."""
    line = FINAL_LINE.findall(reference)
    if not line or FINAL_LINE.search(text):
        return text
    return f"{text.rstrip()}\n#### {line[-1]}"


def _numbers(text: str) -> list[Fraction]:
    text = LATEX_FRACTION.sub(r"\1\2/\3", text).replace("\\%", "%").replace("\\$", "$").replace("{,}", ",")
    return [n for m in NUMBER.finditer(text) if (n := _fraction(m.group())) is not None]


def _fraction(token: str) -> Fraction | None:
    digits = re.sub(r"[\s,$£€¥%]", "", token).replace("−", "-")
    if not re.search(r"\d", digits):
        return None
    top, _, bottom = digits.partition("/")
    try:
        value = Fraction(top) / (Fraction(bottom) if bottom else 1)
    except (ValueError, ZeroDivisionError):
        return None
    return value / 100 if token.rstrip().endswith("%") else value
