"""Do two texts end in the same answer? Compared exactly; what cannot be parsed equals nothing, not even itself."""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

FINAL_LINE = re.compile(r"^[^\S\n]*####(?!#)[^\S\n]*(\S.*?)[^\S\n]*$", re.MULTILINE)
# The answer, and whether it begins on a later line than the words do.
ANSWER_IS = re.compile(r"\banswer[*_ \t]*(?:is\b(?!\s+not\b)|:|=)[*_ \t:]*(\n\s*)?(.*)", re.IGNORECASE)
CLAUSE_END = re.compile(
    r"[.!?;](?=[\s*]|$)|,(?=\s+(?!(?:and|or)\b)[^\W\d_]{2})|\s(?:because|since|as|so|which|where|while|but)\s"
)
# A letter that is a choice: in parentheses or bare. A bare A or I is a word, unless it is punctuated or explained.
CHOICE = re.compile(
    r"(?<![A-Za-z])(?<!not )(?<!not \()(?:\(([A-J])\)|([B-HJ])(?![A-Za-z'’])"
    r"|([AI])(?=\s*(?:[]).,:;*}`\"”–—]|$)|\s+(?:because|since|as|which|is|and|or|-)\s))"
)

CURRENCY = "$£€¥₹₩"
DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
NUMBER = re.compile(
    rf"(?<![\w.])(?!(?<=\d,)\d{{3}}(?!\d))-?[{CURRENCY}]?\s?-?(?:\\frac\{{-?\d+\}}\{{\d+\}}"
    rf"|{DIGITS}(?:[eE][-+]?\d{{1,3}})?(?:\s?/\s?\d+(?:\.\d+)?)?)(?!\d|\.\d)(?:\s?%)?"
)
# What may follow a number and leave it one: a unit in words. Letters of algebra are none: `5xy`, `2ab`, `3n`.
LETTER = r"[^\W\d_]"
UNIT = re.compile(
    rf"[\s{CURRENCY}]*(?:(?:(?<=\d)-|/\s?|\()?(?![a-cx-z]{{1,3}}(?!{LETTER}))"
    rf"(?:{LETTER}{{3,}}|[a-z][eiou]|[eiou][a-z]|[ckm]m|kg|m[glLs]?|ft|yd|lb|hr|[APap][Mm]|th|[snr][td]|sq|cu"
    rf"|[gshlLKCFVWJNA]|[^\W\d_A-Za-z\u0370-\u03ff]+)(?!{LETTER})[²³]?(?:[\s/().,'’-]+{LETTER}+[²³]?)*)?[\s).$*]*"
)
# A number between these is a part of a formula.
OPERATOR = r"\\(?:times|cdot|div|pm|sqrt|pi|log|ln|sin|cos|tan)(?![A-Za-z])"
BEFORE = re.compile(rf"(?:[\w)}}\]]\s*[*×·÷+/]|\d\s*x|[\d)}}\]]\s+-|[\^_{{]|{OPERATOR})\s*$")
AFTER = re.compile(rf"\s*(?:[\^_]|[*×·÷+/]\s*(?:[(\\]|{LETTER}(?!{LETTER}))|{OPERATOR}|[xyzn](?!{LETTER}))")

LABEL = re.compile(r"[A-Za-z][A-Za-z' ]+(?::|\s(?:is|are)\b)[\s*_:]*")
EQUALS = re.compile(r"(?<![<>!\\:=])=(?![=>])|\\approx(?![a-z])|≈")
NAME = re.compile(r"(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?(?:\([a-z]\))?")
COMMAND = re.compile(r"\\(?:begin|end)\{\w+\*?\}|\\[A-Za-z]+")
TEXT = re.compile(r"\\(?:text\w*|math(?:rm|bf|it)|mbox|operatorname)\s*\{([^{}]*)\}")
TEXT_UNIT = re.compile(r"(?<=[^\s=,])\s*\\(?:text|mathrm|mbox)\s*\{[^{}]*\}\s*$")
FUNCTIONS = "and or sin cos tan cot sec csc log ln exp sqrt pi mod gcd lcm max min".split()
FORMULA = re.compile(r"\d|\\[A-Za-z]|[A-Za-z]\s*[-+*/^(<>]|^[A-Za-z]$")

MIXED = re.compile(
    r"(?<![\w.,/}])(\d{1,12})(?:\s*\\frac\{(\d{1,9})\}\{(\d{1,9})\}|\s(\d{1,9})\s?/\s?(\d{1,9})(?![\d/]))"
)
TIDY = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"<<[^<>\n]*>>", ""),  # GSM8K's calculator
        ("−", "-"),
        (r"(?<=[\w)}])\*\*(?=[\w({\\])", "^"),
        (r"\*\*|__", " "),
        (r"(?<!\\)\\([%$])", r"\1"),
        (r"\{,\}", ","),
        (r"(?<!\\)\\!", ""),
        (r"(?<=\d)\\[,;: ](?=\d{3}(?!\d))", ""),
        (r"(?<!\\)\\(?:[][(),;: ]|q?quad\b)|~", " "),
        (r"\\(?:left|right|displaystyle)(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|°|\\degree", ""),
        (r"(\\(?:text|mathrm|mbox)\s*\{[^{}]*\})\^\{?-?\d\}?", r"\1"),  # of units, as in `5 cm^2`
        (r"((?:\d\s|\b[cdkm])m|\b(?:ft|in|yd|[A-Za-z]{4,}))\^\{?[23]\}?", r"\1"),
        (r"[^\S\n]+", " "),
    )
]
# What is longer, takes more seconds, or grows to more bits is not compared: sympy itself knows no limit.
LONGEST, SECONDS, BITS, VARIABLE_BITS = 200, 5, 1e6, 4e4
# Worked out as soon as it is parsed.
HEAVY = re.compile(r"(?=.*\\(?:[dt]?binom|gcd|lcm)).*(?:\d{4}|[\^!])")
BASE = re.compile(r"\d_\{?(\w+)")  # of a number such as 1011_2; math-verify leaves it out


@dataclass(frozen=True)
class _Answer:
    """A final answer: its LaTeX, and its value where it is one number. `name` is the x of `x = 5`."""

    formula: str
    number: Fraction | None = None
    percent: bool = False
    name: str = ""


def same_answer(text: str, truth: str) -> bool:
    """Whether both end in the same number, compared exactly but for its unit, or in the same formula.

    What cannot be parsed equals nothing, not even itself.
    """
    mine, theirs = _final(text), _final(truth)
    if mine is None or theirs is None or (mine.name and theirs.name and mine.name != theirs.name):
        return False
    if mine.number is None or theirs.number is None:
        return _same_formula(mine.formula, theirs.formula)
    return mine.number == theirs.number or _same_percentage(mine, theirs) or _same_percentage(theirs, mine)


def same_text(text: str, truth: str) -> bool:
    """Whether the final answers are the same text, but for case, spacing and a full stop."""
    mine, theirs = (_plain(final_text(t)) for t in (text, truth))
    return bool(mine) and mine == theirs


def same_choice(text: str, truth: str) -> bool:
    """Whether both choose the same letter: `(B)`, `B.`, `the answer is B`; a text with none equals nothing."""
    mine, theirs = final_choice(text), final_choice(truth)
    return mine is not None and mine == theirs


def stated(answer: str) -> str:
    """A final answer that comes without a solution, marked as one: all of it counts, not only its last number."""
    return answer if FINAL_LINE.search(answer) else "#### " + re.sub(r"\s*\n\s*", " ", answer.strip())


def with_final_line(text: str, reference: str) -> str:
    """The text with the reference's `#### n` line, where the reference has one and the text's final answer is the same.

    Metrics read no other spelling of that line, so a line such as `#### Answer: $18` is replaced.
    """
    lines = FINAL_LINE.findall(reference)
    # Where more follows, it is a heading of that level.
    if not lines or not reference.rstrip().endswith(lines[-1]) or not _agree(text, line := f"#### {lines[-1]}"):
        return text
    for found in reversed(list(FINAL_LINE.finditer(text))):
        if _agree(found.group(), line):
            return text[: found.start()] + line + text[found.end() :]
    return f"{text.rstrip()}\n{line}"


def final_text(text: str) -> str:
    """The final answer as text: the last `#### ...` line, `\\boxed{}`, or what follows "answer is"; else all of it."""
    if (answer := _stated(text)) is not None:
        return answer
    found = [clause for _, clause in ANSWER_IS.findall(text) if clause]
    return (found[-1] if found else text).strip()


def final_choice(text: str) -> str | None:
    """The letter, A to J, that a text chooses: the first one stated or after "answer is", else the last one named."""
    answer = _stated(text)
    clauses = [answer] if answer is not None else [clause for _, clause in reversed(ANSWER_IS.findall(text))]
    for said in clauses:
        if letters := _choices(said):
            return letters[0]
    letters = _choices(text) if answer is None else []
    return letters[-1] if letters else None


def _choices(text: str) -> list[str]:
    if re.fullmatch(r"\(?[a-j][.)]*", text.strip()):
        return [text.strip("(). \n").upper()]
    return ["".join(groups) for groups in CHOICE.findall(text)]


def _agree(text: str, truth: str) -> bool:
    return any(same(text, truth) for same in (same_answer, same_text, same_choice))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).lstrip("*_ ").rstrip("*_. ")


def _stated(text: str) -> str | None:
    """What the last `#### ...` line says, else the last `\\boxed{}`."""
    lines = FINAL_LINE.findall(text)
    return lines[-1] if lines else _boxed(text)


def _boxed(text: str) -> str | None:
    """What the last `\\boxed{}` holds that is closed."""
    for found in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
        if (end := _closing(text, found.end())) is not None:
            return text[found.end() : end].strip()
    return None


def _closing(text: str, at: int) -> int | None:
    """Where the brace closes that is open at `at`."""
    depth = 1
    for brace in re.compile(r"(?<!\\)[{}]").finditer(text, at):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return brace.start()
    return None


def final_number(text: str) -> Fraction | None:
    """The final answer of a worked solution, exactly; None where there is none, or where it is not one number.

    Looked for in this order: the last `#### n` line, the last `\\boxed{}`, the last "answer is ...", the last number.
    Understands thousands commas, decimals, fractions, mixed numbers, percent (50% is 1/2), currency signs, units and
    negative numbers.
    """
    answer = _final(text)
    return answer.number if answer else None


def _final(text: str) -> _Answer | None:
    lines = FINAL_LINE.findall(text)
    for line in reversed(lines):  # one that says no answer is a heading, unless it is the end
        if answer := _parsed(line):
            return answer
    if lines and text.rstrip().endswith(lines[-1]):
        return None
    if (box := _boxed(text)) is not None:
        return _parsed(box)
    for later, clause in reversed(ANSWER_IS.findall(text)):
        clause = _tidy(CLAUSE_END.split(clause, maxsplit=1)[0])
        if answer := _parsed(clause) or (None if later else _number_in(clause.rpartition("=")[2], 0)):
            return answer
    written = [line for line in text.splitlines() if re.search(r"\d|\\", line)] or [text]
    return _parsed(written[-1]) or _number_in(_tidy(text), -1)


def _parsed(text: str) -> _Answer | None:
    """An answer that is one number, with a unit perhaps, or a formula; None where it is anything else."""
    name, value = _sides(_unwrapped(text))
    plain = TEXT.sub(r" \1", value).strip()
    found = NUMBER.match(plain)
    if found and UNIT.fullmatch(plain, found.end()):
        return _number(found.group(), name)
    formula = TEXT.sub(r" \1", TEXT_UNIT.sub("", value)).replace("$", "").strip()
    return _Answer(formula, name=name) if _is_formula(formula) else None


def _number_in(text: str, which: int) -> _Answer | None:
    """The first or last number of a prose text, where it is no part of a formula."""
    found = list(NUMBER.finditer(text))
    if not found:
        return None
    number = found[which]
    line = text[text.rfind("\n", 0, number.start()) + 1 : number.start()]
    return None if BEFORE.search(line) or AFTER.match(text, number.end()) else _number(number.group())


def _number(token: str, name: str = "") -> _Answer | None:
    digits = re.sub(rf"[\s,{CURRENCY}%]", "", token).replace("\\frac{", "").replace("}{", "/").rstrip("}")
    top, _, bottom = digits.partition("/")
    try:
        value = Fraction(top) / Fraction(bottom or 1) / (100 if token.endswith("%") else 1)
        formula = rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    except (ValueError, ZeroDivisionError):  # more digits than Python reads or writes, or a division by 0
        return None
    return _Answer(formula, value, token.endswith("%"), name)


def _same_percentage(one: _Answer, other: _Answer) -> bool:
    """Whether the second is the first without its percent sign, which may be left out like any unit: 50% and 50.

    Not below 1: 0.5% against 0.5 is a mistake by a factor of 100.
    """
    if one.number is None or not one.percent or other.percent:
        return False
    return other.number == one.number * 100 and abs(other.number) >= 1


def _tidy(text: str) -> str:
    """A text in one spelling: plain spaces, signs and fractions, mixed numbers as fractions."""
    text = re.sub("[¼-¾⅐-⅞]", lambda m: " " + unicodedata.normalize("NFKC", m[0]).replace("⁄", "/"), text)
    for pattern, new in TIDY:
        text = pattern.sub(new, text)
    return MIXED.sub(_improper, text)


def _improper(mixed: re.Match[str]) -> str:
    whole, top, bottom = (int(g) for g in mixed.groups() if g is not None)
    return rf"\frac{{{whole * bottom + top}}}{{{bottom}}}" if top < bottom else mixed.group()


def _unwrapped(text: str) -> str:
    """An answer without its box, emphasis, dollars, full stop and a label such as `Answer:`."""
    box = _boxed(text)
    text = _tidy(text if box is None else box).strip(" \n*_,;:").rstrip(" .")
    text = LABEL.sub("", text, count=1) if LABEL.match(text) else text
    if dollars := re.fullmatch(r"\$+([^$]+)\$+", text.strip()):
        text = dollars[1]
    return re.sub(r"^(?:\+|(-)\s+)\s*", r"\1", text.strip(" \n*_,;:").rstrip(" ."))


def _sides(text: str) -> tuple[str, str]:
    """Name and value of `x = 5`; no name and the value of `2 + 3 = 5` and `cost = 5`; any other equation whole."""
    first, *others = (part.strip() for part in EQUALS.split(text))
    if not others or any(re.search(r",(?!\d{3})|;|\b(?:and|or)\b", part) for part in others[:-1]):
        return "", text
    if NAME.fullmatch(first):
        return first, others[-1]
    algebra = _is_formula(first) and re.search(r"[A-Za-z]", COMMAND.sub("", first))
    return "", text if algebra else others[-1]


def _is_formula(text: str) -> bool:
    """Whether a text can be a formula: no words but functions, and products of two or three letters."""
    words = re.findall(r"[^\W\d_]{2,}", COMMAND.sub(" ", text))
    prose = any(w not in FUNCTIONS and not re.fullmatch("[a-dfghj-np-tv-z]{2,3}", w) for w in words)
    return bool(FORMULA.search(text)) and not prose and not re.search(r"[?#@`\"]|[.:;]\s", text)


def _same_formula(text: str, truth: str) -> bool:
    """Equality of final answers that are no plain numbers, such as `\\boxed{x^2 + 1}`, by math-verify."""
    if any(len(t) > LONGEST or HEAVY.search(t) for t in (text, truth)) or BASE.findall(text) != BASE.findall(truth):
        return False
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of having no time limit
    # Its time limits are set by signals, which only a process's main thread may use; elsewhere by processes.
    limit = SECONDS if os.name == "posix" and threading.current_thread() is threading.main_thread() else None
    latex = [math_verify.LatexExtractionConfig()]
    mine, theirs = (
        math_verify.parse(f"${t}$", latex, fallback_mode="no_fallback", parsing_timeout=limit) for t in (text, truth)
    )
    # It is not symmetric: it takes `1` for `x + y = 1`. At 6 decimals, its default, 1.414214 would be the root of 2.
    return (
        bool(mine and theirs)
        and _size(mine[0]) + _size(theirs[0]) < BITS
        and all(
            math_verify.verify(one, other, float_rounding=12, timeout_seconds=limit)
            for one, other in ((theirs, mine), (mine, theirs))
        )
    )


def _size(value: Any) -> float:
    """A bound on the bits of what is worked out to compare a formula; infinite for a tower of powers.

    A variable has a weight that allows small powers of a sum of variables, which sympy multiplies out.
    """
    import sympy

    sizes = [_size(part) for part in (value.flat() if isinstance(value, sympy.MatrixBase) else value.args)]
    if isinstance(value, sympy.Sum | sympy.Product | sympy.Integral | sympy.Limit | sympy.Derivative):
        return math.inf
    if isinstance(value, sympy.Pow | sympy.exp | sympy.factorial) and value.args[-1].is_number:
        times = 1 + abs(complex(value.args[-1].doit())) if sizes[-1] < 1000 else math.inf
        return sizes[0] + times if value.args[0].is_Symbol else (sizes[0] + 1) * times
    if isinstance(value, sympy.Rational):
        return value.p.bit_length() + value.q.bit_length()
    return VARIABLE_BITS if isinstance(value, sympy.Symbol) else 1 + sum(sizes)
