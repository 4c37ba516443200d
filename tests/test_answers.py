"""Final answers: what they are, when two are the same, and the line that metrics read."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hfsd import answers
from hfsd.answers import same_answer, with_final_line

FORMULAS = [
    r"\boxed{x^2+1}",
    r"\boxed{\frac{\sqrt{3}}{2}}",
    r"\boxed{(3,2)}",
    r"\boxed{5+3i}",
    r"\boxed{1011_2}",
    "7 \\times 10^5",
    "The answer is $x^2 - 1$.",
    "#### 1 1/2",
    "#### 50%",
    "#### x = 5",
    r"\boxed{x=1, y=2}",
]
UNPARSABLE = ["", "no number", "#### none", "2/0", "#### 2/0", r"\boxed{}", r"\boxed{\foo{3}}", "####", "So 4.\n#### ?"]
NUMBERS = st.integers(-(10**12), 10**12)
PROSE = st.sampled_from(["", "Let us see.", "It took 3 days and 4 nights.", "**Step 1**: 2 + 3 = 5, as 5 - 3 = 2."])


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
        ("#### $-5", -5),
        ("#### - 5", -5),
        ("12 \u2212 3 = \u22129", -9),
        ("costs 3.50", Fraction(7, 2)),
        ("ends with 7.", 7),
        ("#### 0.1", Fraction(1, 10)),
        (r"\boxed{1\frac{1}{2}}", Fraction(3, 2)),
        (r"\boxed{-2\frac34}", Fraction(-11, 4)),
        ("#### 1 1/2 cups", Fraction(3, 2)),
        ("it weighs 2½ kg", Fraction(5, 2)),
        ("Answer:\nAda has 5 pens. 5+3 = 8.", 8),
        ("Answer:\n5 apples.\n\nExplanation: 2 of 7 are gone.", 5),
        ("**Answer:** 5", 5),
        ("The answer is 2 + 3 = 5", 5),
        ("The answer is 5 because 8 - 3 = 5, which is 2 less than 7.", 5),
        ("The answer is $5 + $3 = $8.", 8),
        ("The answer is not 5 but 6", 6),
        (r"\boxed{10{,}000}", 10000),
        (r"\boxed{10\,000}", 10000),
        (r"\boxed{5\,\text{cm}^2}", 5),
        (r"\boxed{90^\circ}", 90),
        ("It has 5 m^2 and 7 cm^{2}", 7),
        ("It has 5 m^2", 5),
        ("#### 5 dollars a week", 5),
        ("#### 18 €", 18),
        ("#### 5个", 5),
        ("#### 2.5e-3", Fraction(1, 400)),
        ("#### Answer: 18", 18),
        ("####18", 18),
        ("#### The total is $18.", 18),
        ("x = 2 + 3 = 5", 5),
        ("She needs 3 * 5 = <<3*5=15>>15 dollars.", 15),
        ("#### Step 1: add\n2 + 3\n#### Step 2: say\nIt is 5.", 5),
        (r"\boxed{5} is written, then \boxed{6", 5),
    ],
)
def test_final_numbers(text: str, number: Fraction | int) -> None:
    assert answers.final_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        *UNPARSABLE,
        "room B12",
        r"\boxed{x^2+5}",
        r"\boxed{5x}",
        r"\boxed{2ab}",
        r"\boxed{5m^2}",
        r"\boxed{5i}",
        r"\boxed{5\pi}",
        r"\boxed{(1,2)}",
        "2^{10}",
        "so it is 7 × 10^5 in all",
        "#### 5 apples and 3 pears",
        "#### 1,2345",
        "version 1.2.3",
        "9" * 5000,
        "9" * 5000 + " 1/2",
        "9" * 4000 + "e999",
    ],
)
def test_no_final_number(text: str) -> None:
    assert answers.final_number(text) is None


@given(st.fractions(max_denominator=1000).filter(lambda f: abs(f) < 10**9))
def test_a_fraction_is_read_exactly(value: Fraction) -> None:
    assert answers.final_number(f"The answer is {value.numerator}/{value.denominator}.") == value
    whole, part = divmod(abs(value), 1)
    mixed = rf"{'-' if value < 0 else ''}{whole}\frac{{{part.numerator}}}{{{part.denominator}}}"
    assert answers.final_number(rf"\boxed{{{mixed}}}") == value


@given(
    NUMBERS, st.sampled_from(["{}", "{:,}", "{}.00", "${:,}", "{} apples", "{:,} km/h", r"{} \text{{ cm}}^2", "{}°"])
)
def test_a_number_is_read_in_every_spelling(value: int, spelling: str) -> None:
    written = spelling.format(value)
    for text in (f"#### {written}", rf"\boxed{{{written}}}", f"The answer is {written}.", f"That makes {written}"):
        assert answers.final_number(text) == value, text
    assert answers.final_number(f"#### {value:,}%") == Fraction(value, 100)


@given(NUMBERS, NUMBERS, PROSE, PROSE)
def test_prose_around_an_answer_changes_nothing(mine: int, theirs: int, before: str, after: str) -> None:
    for mark in ("#### {}", r"\boxed{{{}}}", "The answer is {}."):
        text = f"{before}\n{mark.format(mine)}\n{after}"
        assert same_answer(text, f"#### {theirs}") is same_answer(f"#### {theirs}", text) is (mine == theirs)


@settings(deadline=None)  # a formula takes math-verify a while
@given(st.text(max_size=80), st.text(max_size=80))
@example(r"\boxed{x^2+y^2=1}", "#### 1")
@example("9" * 5000, "9" * 5000 + r"\frac{1}{2}")
def test_any_two_texts_are_compared_the_same_way_round_and_back(one: str, other: str) -> None:
    assert same_answer(one, other) is same_answer(other, one)
    assert isinstance(answers.final_number(one), Fraction | None)


@settings(deadline=None)
@given(st.sampled_from(FORMULAS), st.sampled_from(FORMULAS))
def test_an_answer_equals_itself_and_no_other(one: str, other: str) -> None:
    assert same_answer(one, other) is (one == other)


@given(st.sampled_from(UNPARSABLE), st.sampled_from(UNPARSABLE + FORMULAS))
def test_what_cannot_be_parsed_equals_nothing(one: str, other: str) -> None:
    assert not same_answer(one, other) and not same_answer(one, one)


@pytest.mark.parametrize(
    ("text", "truth", "same"),
    [
        ("it is 0.50", "#### 1/2", True),
        (r"so \boxed{x^2+1}", r"\boxed{1+x^2}", True),
        (r"\boxed{x^2+5}", "#### 5", False),
        (r"\boxed{3^{10}}", r"\boxed{2^{10}}", False),
        (r"\boxed{2^{10}}", "#### 1024", True),
        (r"7 \times 10^5", r"2 \times 10^5", False),
        (r"Hence y = 7 × 10^5.", "#### 700,000", True),
        (r"\boxed{5+3i}", r"\boxed{2+3i}", False),
        (r"\boxed{(3,2)}", r"\boxed{(1,2)}", False),
        (r"\boxed{\frac{\sqrt{3}}{2}}", r"\boxed{\frac{\sqrt{2}}{2}}", False),
        (r"\boxed{\frac{\sqrt3}{2}}", r"\boxed{\frac{\sqrt{3}}{2}}", True),
        (r"\boxed{\sqrt{x+\sqrt{y}}}", r"\boxed{\sqrt{\sqrt{y}+x}}", True),
        (r"\boxed{3\pi \text{ cm}^2}", r"\boxed{3\pi}", True),
        (r"\boxed{1011_2}", r"\boxed{1011_3}", False),
        (r"\boxed{\sqrt{2}}", "#### 1.414214", False),
        (r"\boxed{\frac{1}{3}}", "#### 0.333333", False),
        (r"\boxed{2.5x}", r"\boxed{\frac{5}{2}x}", True),
        (r"\boxed{5\text{ or }7}", r"\boxed{7, 5}", True),
        (r"\boxed{\begin{pmatrix}1\\ 2\end{pmatrix}}", r"\boxed{\begin{pmatrix}1\\ 3\end{pmatrix}}", False),
        (r"\boxed{f(x) = 2x}", r"\boxed{2x}", True),
        ("#### x = 5", "#### 5", True),
        ("#### x = 5", "#### y = 5", False),
        ("2x = 10", "#### 10", False),
        (r"\boxed{\text{Monday}}", r"\boxed{\text{Monday}}", False),
        (r"\boxed{5 \text{ apples}}", "#### 5", True),
        ("#### 1 1/2", "#### 1/2", False),
        ("The answer is 2 + 3 = 5", "#### 2", False),
        ("at 3 m/h * 4 it is 12", "so 2 a/b is 12", True),
        ("#### 50%", "#### 0.5", True),
        ("#### 50%", "#### 50", True),  # the unit is left out
        ("#### 0.5%", "#### 0.5", False),
        ("#### 50%", "#### 0.5%", False),
    ],
)
def test_final_answers(text: str, truth: str, same: bool) -> None:
    assert same_answer(text, truth) is same
    assert same_answer(truth, text) is same


@pytest.mark.parametrize(
    "formula",
    [
        "9^{9^{9^9}}",
        "(10000000)!",
        "((999)!)!",
        "(x+y+z)^{1000}",
        r"\binom{100000000}{50000000}",
        r"\gcd(10^{10^{10}},3)",
        r"\sum_{k=1}^{100000} k^k",
        "e^{e^{e^{79}}}",
        "x+" * 2000 + "1",
    ],
)
def test_what_would_never_end_is_not_worked_out(formula: str) -> None:
    start = time.monotonic()
    assert not same_answer(rf"\boxed{{{formula}}}", rf"\boxed{{{formula} + 1}}")
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("The answer is (B) A dog.", "B"),
        ("The answer is B. I hope this helps", "B"),
        ("The answer is A because B is wrong.", "A"),
        ("The answer is not A, it is C", "C"),
        ("Answer: A", "A"),
        ("Answer:\n(A) A dog", "A"),
        ("The correct answer is **I**.", "I"),
        ("the answer is b.", "B"),
        ("b)", "B"),
        ("A", "A"),
        ("A dog, so D", "D"),
        ("I think that A is wrong, so it is C", "C"),
        ("#### (D) I", "D"),
        (r"\boxed{\text{(A)}}", "A"),
        ("I like a dog", None),
        ("A dog", None),
        ("it is hot", None),
    ],
)
def test_choices(text: str, choice: str | None) -> None:
    assert answers.final_choice(text) == choice


@pytest.mark.parametrize(
    ("text", "truth", "same"),
    [
        ("The answer is  Paris.", "#### paris", True),
        ("The answer is **Paris**.", "#### **Paris**", True),
        ("Answer:\nParis", "Paris", True),
        ("Paris or Rome", "Paris", False),
        ("", "", False),
    ],
)
def test_exact_texts(text: str, truth: str, same: bool) -> None:
    assert answers.same_text(text, truth) is same


@pytest.mark.parametrize(
    ("text", "reference", "written"),
    [
        ("2 + 2 is 4.", "x\n#### 4", "2 + 2 is 4.\n#### 4"),
        ("so\n#### 4", "x\n#### 4", "so\n#### 4"),
        ("text", "no such line", "text"),
        ("so\n#### Answer: 18", "x\n#### 18", "so\n#### 18"),
        ("so\n#### $18\nDone.", "x\n#### 18", "so\n#### 18\nDone."),
        ("so\n####18", "x\n#### 18", "so\n#### 18"),
        ("so\n#### 1800", "x\n#### 1,800", "so\n#### 1,800"),
        ("#### Step 1\nIt is 18", "x\n#### 18", "#### Step 1\nIt is 18\n#### 18"),
        ("it is 5", "x\n#### 4", "it is 5"),  # not checked, as the task is not math
        ("so\n#### 5", "x\n#### 4", "so\n#### 5"),
        ("It is Paris", "x\n#### Rome", "It is Paris"),
        ("The answer is (B).", "x\n#### B", "The answer is (B).\n#### B"),
        ("So 5.", "#### 5 tips\nSleep.", "So 5."),  # a heading
    ],
)
def test_the_final_line_is_that_of_the_reference_where_the_answer_is(text: str, reference: str, written: str) -> None:
    assert with_final_line(text, reference) == written
    assert with_final_line(written, reference) == written


def test_an_answer_that_stands_alone_counts_whole() -> None:
    assert answers.stated(" x^2+1\n") == "#### x^2+1" and answers.stated("#### 5") == "#### 5"
    assert not same_answer(r"\boxed{x^3+1}", answers.stated("x^2+1"))
    assert same_answer(r"\boxed{1+x^2}", answers.stated("x^2\n+1"))
