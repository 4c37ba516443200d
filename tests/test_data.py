"""Rows of known shapes, splits by template, chat rendering."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfsd import chat, data, shapes
from hfsd.errors import BadRequest
from hfsd.recipe import Data
from hfsd.records import Example
from tests import tiny

ROWS = {
    "gsm8k": {"question": "1+1?", "answer": "two\n#### 2"},
    "alpaca": {"instruction": "Add.", "input": "1 and 1", "output": "2"},
    "dolly": {"instruction": "Add.", "context": "", "response": "2", "category": "math"},
    "openmath": {"problem": "1+1?", "generated_solution": "2", "expected_answer": "2"},
    "prompt": {"prompt": "1+1?", "completion": "2"},
}
PROMPTS = {"gsm8k": "1+1?", "alpaca": "Add.\n\n1 and 1", "dolly": "Add.", "openmath": "1+1?", "prompt": "1+1?"}


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_known_shapes_in_every_file_format(shape: str, suffix: str, tmp_path: Path) -> None:
    path, row = tmp_path / f"rows{suffix}", ROWS[shape]
    if suffix == ".csv":
        with open(path, "w", newline="") as handle:
            writer = csv.DictWriter(handle, row)
            writer.writeheader()
            writer.writerow(row)
    elif suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps([row] if suffix == ".json" else row))
    (example,) = data.load(Data(source=str(path)))
    assert (example.prompt, example.reference) == (PROMPTS[shape], row[shapes.detect_columns(list(row))[1]])  # type: ignore[index]


def _load(tmp_path: Path, *rows: dict) -> list[Example]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data.load(Data(source=str(path)))


def test_every_assistant_turn_of_a_conversation_is_a_row(tmp_path: Path) -> None:
    said = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you")]
    turns = [{"role": role, "content": content} for role, content in said]
    first, second = _load(tmp_path, {"messages": turns})
    assert (first.prompt, first.reference, list(first.history)) == ("Hi", "Hello", turns[:1])
    assert (second.prompt, second.reference, list(second.history)) == ("Bye", "See you", turns[:3])
    assert first.group == second.group != "" and first.id != second.id
    assert chat.conversation(second) == turns


def test_completions_as_messages_and_answers_stated_apart(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "1+1?"}], "completion": [{"role": "assistant", "content": "2"}]}
    (one,) = _load(tmp_path, row)
    assert (one.prompt, one.reference, one.history) == ("1+1?", "2", ())
    (other,) = _load(tmp_path, {"problem": "1+1?", "generated_solution": "It is two.", "expected_answer": "2"})
    assert (other.reference, other.answer) == ("It is two.", "2")
    (plain,) = _load(tmp_path, {"id": 3, "Query": "1+1?", "Response": "2"})
    assert (plain.prompt, plain.reference) == ("1+1?", "2")


def test_rows_without_an_answer_are_told_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": q, "answer": a} for q, a in (("a", "b"), ("c", " "), ("", "d"))]
    assert [e.prompt for e in _load(tmp_path, *rows)] == ["a"]
    told = "2 of 3 rows lack a prompt or a reference: 2, 3 (counted from 1); they are left out"
    assert told in capsys.readouterr().err


def test_columns_may_be_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "1+1?", "a": "2"}\n')
    (example,) = data.load(Data(source=str(path), prompt_column="q", reference_column="a"))
    assert (example.prompt, example.reference) == ("1+1?", "2")
    with pytest.raises(BadRequest, match=r"columns \['a', 'q'\], which is no known shape; set data.prompt_column"):
        data.load(Data(source=str(path)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ('{"question": "a", "answer": ""}\n', r"1 of 1 rows lack a prompt or a reference: 1 \(counted from 1\)"),
        ('{"question": "a", "answer": "b"}\n{"question"\n', "line 2 is not JSON"),
        ("3\n", "not a list of objects"),
    ],
)
def test_bad_files_say_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(BadRequest, match=message):
        data.load(Data(source=str(path)))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "\xff"}')
    with pytest.raises(BadRequest, match="not UTF-8 text"):
        data.load(Data(source=str(path)))
    with pytest.raises(BadRequest, match="no data set 'gsm_symbolik'.*gsm_symbolic"):
        data.load(Data(source="gym:gsm_symbolik"))


def test_duplicates_leave_and_generated_rows_repeat(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n' * 3)
    assert len(data.load(Data(source=str(path)))) == 1
    asked = Data(source="gym:gsm_symbolic", pool=40, seed=3)
    assert data.load(asked) == data.load(asked) != data.load(Data(source="gym:gsm_symbolic", pool=40, seed=4))


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers()), min_size=30, max_size=60, unique=True),
    st.integers(0, 5),
    st.randoms(),
)
def test_no_template_straddles_a_split(pairs: list[tuple[int, int]], seed: int, rng) -> None:
    rows = [Example(f"{g}-{i}", str(i), str(g), f"g{g}") for g, i in pairs]
    asked = Data(source="x.jsonl", seed=seed)
    if len({r.group for r in rows}) < 5:
        return
    splits = data.split(rows, asked)
    parts = [splits.train, splits.calibration, splits.held_out]
    groups = [{r.group for r in part} for part in parts]
    assert all(groups) and not (groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2])
    assert sorted(r.id for part in parts for r in part) == sorted(r.id for r in rows)
    shuffled = rows[:]
    rng.shuffle(shuffled)
    assert data.split(shuffled, asked) == splits  # order in, order out: only the seed decides


def test_too_few_groups_are_refused() -> None:
    with pytest.raises(BadRequest, match="2 rows in 2 groups are too few"):
        data.split([Example("a", "p", "r"), Example("b", "p", "r")], Data(source="x.jsonl"))


def test_a_template_without_a_system_role_gets_it_in_the_user_turn() -> None:
    tokenizer = tiny.tokenizer()
    messages = [{"role": "system", "content": "be brief"}, *chat.single_turn("hello")]
    assert "<|im_start|>system\nbe brief<|im_end|>" in chat.render(tokenizer, messages)
    user_only = "{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]{% endif %}{% endfor %}"
    tokenizer.chat_template = user_only
    assert chat.render(tokenizer, messages) == "[be brief\n\nhello]"
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + user_only
    )
    assert chat.render(tokenizer, messages) == "[be brief\n\nhello]"
    tokenizer.chat_template = None
    assert chat.render(tokenizer, messages) == "be brief\n\nhello\n\n"
