"""Do two texts end in the same answer? Compared exactly; what cannot be parsed equals nothing, not even itself."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction
from typing import Any

FINAL_LINE = re.compile(r"^####\s*(.+?)\s*$", re.MULTILINE)
# An integer with or without thousands commas, then a decimal part, a fraction or a mixed number is handled around it.
NUMBER = re.compile(r"(?<![\w.])[-−]?[$£€¥]?[-−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:\s?/\s?\d+)?%?")
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
LATEX_FRACTION = re.compile(r"([-−]?)\\d?frac\{([^{}]+)\}\{([^{}]+)\}")
ANSWER_IS = re.compile(r"(?:final answer|answer)\s*(?:is|:|=)\s*(.+)", re.IGNORECASE)
CHOICE = re.compile(r"(?<![A-Za-z])\(?([A-J])(?![A-Za-z'])\)?")
# A variable or a root in a product, sum or power; `\\boxed{5 apples}` and `x = 5` are plain numbers.
FORMULA = re.compile(
    r"(?<![A-Za-z])[A-Za-z]\s*[\^+*/]|[\^+*/]\s*\(?[A-Za-z](?![A-Za-z])|(?<![A-Za-z])[A-Za-z]\s+-\s+\d|\\(?:sqrt|pi)|\d[xyz]\b"
)


def same_answer(text: str, truth: str) -> bool:
    """Whether both end in the same number, compared exactly, or in the same formula.

    What cannot be parsed equals nothing, not even itself.
    """
    stated = [_stated(t) for t in (text, truth)]
    if all(answer is not None and FORMULA.search(answer) for answer in stated):
        return _same_formula(*map(str, stated))
    mine, theirs = final_number(text), final_number(truth)
    return mine is not None and mine == theirs


def same_text(text: str, truth: str) -> bool:
    """Whether the final answers are the same text, but for case, spacing and a full stop."""
    mine, theirs = (_plain(final_text(t)) for t in (text, truth))
    return bool(mine) and mine == theirs


def same_choice(text: str, truth: str) -> bool:
    """Whether both choose the same letter: `(B)`, `B.`, `the answer is B`; a text with none equals nothing."""
    mine, theirs = final_choice(text), final_choice(truth)
    return mine is not None and mine == theirs


def same_calls(text: str, truth: str) -> bool:
    """Whether both hold the same tool calls: names and arguments, in any order of the calls and of the arguments."""
    mine, theirs = tool_calls(text), tool_calls(truth)
    return bool(mine) and mine == theirs


CHECKS: dict[str, Callable[[str, str], bool]] = {
    "math": same_answer,
    "exact": same_text,
    "choice": same_choice,
    "json": same_calls,
}


def final_text(text: str) -> str:
    """The final answer as text: the last `#### ...` line, `\\boxed{}`, or what follows "answer is"; else all of it."""
    if (answer := _stated(text)) is not None:
        return answer
    found = ANSWER_IS.findall(text)
    return str(found[-1] if found else text).strip()


def final_choice(text: str) -> str | None:
    """The letter, A to J, that a text chooses; the last one where it names several."""
    answer = final_text(text)
    found = CHOICE.findall(answer)
    if not found and re.fullmatch(r"[a-jA-J][.)]?", answer):
        found = [answer[0].upper()]
    return found[-1] if found else None


def tool_calls(text: str) -> list[str]:
    """The tool calls in a text (objects with `name` and `arguments`), each in one canonical spelling, sorted."""
    return sorted(json.dumps(call, sort_keys=True) for value in _json_values(text) for call in _calls(value))


def _calls(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, list):
        for part in value:
            yield from _calls(part)
    elif isinstance(value, dict):
        inner = value.get("function", value)  # OpenAI wraps it
        if isinstance(inner, dict) and isinstance(inner.get("name"), str):
            arguments = inner.get("arguments", inner.get("parameters", {}))
            if isinstance(arguments, str):
                with suppress(ValueError):  # a plain text is an argument too
                    arguments = json.loads(arguments)
            yield {"name": inner["name"], "arguments": arguments}


def _json_values(text: str) -> Iterator[Any]:
    """Every JSON object or array in a text, outermost ones only."""
    decoder, at = json.JSONDecoder(), 0
    while (found := re.compile(r"[{\[]").search(text, at)) is not None:
        try:
            value, at = decoder.raw_decode(text, found.start())
            yield value
        except ValueError:
            at = found.end()


def _stated(text: str) -> str | None:
    """What the last `#### ...` line says, else the last `\\boxed{}`."""
    for pattern in (FINAL_LINE, BOXED):
        if found := pattern.findall(text):
            return str(found[-1]).strip()
    return None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".").strip()


def _same_formula(text: str, truth: str) -> bool:
    """Equality of final answers that are no plain numbers, such as `\\boxed{x^2 + 1}`, by math-verify."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of what the next line does on purpose
    # No time limits: they are set by signals, which only a process's main thread may use.
    mine, theirs = (math_verify.parse(f"${t}$", parsing_timeout=None) for t in (text, truth))
    return bool(mine and theirs) and bool(math_verify.verify(theirs, mine, timeout_seconds=None))


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
