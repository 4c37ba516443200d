"""Demo documents: the right choice is right, the wrong ones are wrong in one step, and only the seed decides."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfsd import taskdata
from hfsd.errors import BadRequest
from hfsd.records import Example

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve")


def number(value: int | Decimal, commas: bool, decimals: int) -> str:
    return format(value, f"{',' if commas else ''}.{decimals}f")


@st.composite
def solutions(draw: st.DrawFn) -> str:
    """Worked solutions of one to three sums, their result written in the ways that generated problems write them."""
    steps, total = [], draw(st.integers(1, 9999))
    for _ in range(draw(st.integers(1, 3))):
        more = draw(st.integers(1, 99999))
        sign = draw(st.sampled_from(("", "$", "£", "€")))
        commas, decimals = draw(st.booleans()), draw(st.sampled_from((0, 1, 2)))
        result = f"{sign}{number(total + more, commas, decimals)}"
        steps.append(f"{draw(st.sampled_from(NAMES))} has {sign}{total} + {sign}{more} = {result} now.")
        total += more
    close = draw(st.sampled_from(("", f"\nThat makes {total:,} in all.")))
    return "\n".join(steps) + close + f"\n#### {draw(st.sampled_from((str(total), f'{total}.0', f'{total:,}')))}"


def values(text: str) -> list[Decimal]:
    return [taskdata._value(m) for m in taskdata.NUMBER.findall(text)]


@settings(max_examples=200, deadline=None)
@given(solutions(), st.integers(0, 2**32))
def test_a_miscalculation_is_one_step_carried_to_the_answer(right: str, seed: int) -> None:
    wrong = taskdata.miscalculated(right, 3, random.Random(seed))
    assert wrong is not None
    assert len({right, *wrong}) == 4
    start = right.rindex("= ")
    answer = values(right)[-1]
    for text in wrong:
        assert len(text) == len(right)  # length gives nothing away
        assert text[:start] == right[:start]  # nothing before the last result differs
        assert re.sub(r"\d", "0", text) == re.sub(r"\d", "0", right)  # nothing but digits differs
        changed = {(a, b) for a, b in zip(values(right), values(text), strict=True) if a != b}
        assert len(changed) == 1 and {a for a, _ in changed} == {answer}  # one number, everywhere the same
        assert answer not in values(text[start:])  # and nowhere left behind
        left, result = re.findall(r"(\S+ \+ \S+) = (\S+)", text)[-1]
        assert sum(values(left)) != values(result)[0]  # the step is wrong
        earlier = re.findall(r"(\S+ \+ \S+) = (\S+)", text)[:-1]
        assert all(sum(values(a)) == values(b)[0] for a, b in earlier)  # the others are right


@pytest.mark.parametrize(
    "text",
    [
        "He has 4 pens.\n#### 4",  # no step
        "8 - 4 = 4 pens\n#### 4",  # an operand equals the result
        "He needs 62 minutes because 31 x 2 = 62\n#### 62",  # announced before the step
        "2 + 2 = 5\n#### 4",  # the last step is not the answer
        "14 / 56 = 1/4 of it\n#### 1",  # the result goes on
        "2 - 2 = 0\n#### 0",  # no digit to be off by
        "2 + 3 = 5",  # no answer line
        "2 - 7 = -5\n#### -5",
        "",
    ],
)
def test_no_clean_last_step_gives_none(text: str) -> None:
    assert taskdata.miscalculated(text, 3, random.Random(0)) is None


def examples(groups: int = 3, each: int = 6) -> list[Example]:
    made = []
    for group in range(groups):
        for i in range(each):
            a, b, name = 10 * group + i + 2, 7 * i + 11, NAMES[i % len(NAMES)]
            text = f"{name} counts.\nIn all {a} + {b} = {a + b} pens.\n#### {a + b}"
            made.append(Example(f"{group}-{i}", f"{name} has {a} pens and buys {b}.", text, f"template {group}"))
    return made


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 20))
def test_documents_are_sound(seed: int, limit: int) -> None:
    rows = {e.id: e for e in examples()}
    docs = taskdata.build(list(rows.values()), limit, seed)
    count = min(limit, 18)
    assert {task: len(d) for task, d in docs.items()} == dict.fromkeys(("demo_match", "demo_rank", "demo_bpb"), count)
    assert len({d["id"] for d in docs["demo_match"]}) == count
    for match, rank, bpb in zip(docs["demo_match"], docs["demo_rank"], docs["demo_bpb"], strict=True):
        row = rows[match["id"]]
        others = {e.reference for e in rows.values() if e.group == row.group} - {row.reference}
        assert match["id"] == rank["id"] == bpb["id"]
        for doc in (match, rank, bpb):
            assert doc["question"] == row.prompt and doc["choices"][doc["gold"]] == row.reference
        assert len(set(match["choices"])) == len(set(rank["choices"])) == 4
        assert set(match["choices"]) - {row.reference} <= others
        assert not set(rank["choices"]) & others
        assert bpb["choices"] == [row.reference]


def test_templates_come_in_turn() -> None:
    docs = taskdata.build(examples(groups=4), 4, seed=1)
    assert len({d["group"] for d in docs["demo_match"]}) == 4


def test_gold_moves_and_the_order_of_rows_does_not_matter() -> None:
    rows = examples(groups=6)
    docs = taskdata.build(rows, None, 0)
    for task in ("demo_match", "demo_rank"):
        assert {d["gold"] for d in docs[task]} == {0, 1, 2, 3}
    assert taskdata.build(rows[::-1], None, 0) == docs
    assert taskdata.build(rows, None, 1) != docs


def test_documents_do_not_depend_on_the_hash_seed() -> None:
    code = (
        "import json; from hfsd import taskdata; from tests.test_taskdata import examples;"
        "print(json.dumps(taskdata.build(examples(), 8, 3)))"
    )
    texts = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            cwd=Path(__file__).parents[1],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in (1, 2)
    ]
    assert texts[0] == texts[1]
    assert json.loads(texts[0]) == taskdata.build(examples(), 8, 3)


def test_nothing_to_build_from_is_said() -> None:
    with pytest.raises(BadRequest, match="none of the 3 held-out rows serves"):
        taskdata.build(examples(groups=1, each=3), None, 0)


def test_write_round_trip(tmp_path: Path) -> None:
    docs = taskdata.build(examples(), 5, 0)
    taskdata.write(docs, tmp_path / "docs")
    assert sorted(p.name for p in (tmp_path / "docs").iterdir()) == [f"{t}.jsonl" for t in sorted(docs)]
    for task, wanted in docs.items():
        lines = (tmp_path / "docs" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == wanted


def test_generated_word_problems_serve() -> None:
    gym = pytest.importorskip("reasoning_gym")
    rows = []
    for i, row in enumerate(gym.create_dataset("gsm_symbolic", size=150, seed=3)):
        group = ",".join(sorted(row["metadata"]["variables"]))
        rows.append(Example(f"{i:03}", row["question"], row["metadata"]["answer_cot"].strip(), group))
    clean = [r for r in rows if taskdata.miscalculated(r.reference, 3, random.Random(0))]
    assert len(clean) > 0.8 * len(rows)
    docs = taskdata.build(rows, 16, 0)
    assert len(docs["demo_rank"]) == 16
