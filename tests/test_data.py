"""Rows of known shapes, splits by template, chat rendering."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfsd import chat, data, shapes
from hfsd.blocks_cut import Data
from hfsd.errors import BadRequest
from hfsd.records import Example
from tests import tiny
from tests.hub import hub_env, run_client
from tests.hub.server import LoopbackHub

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


CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock", "arguments": {}}]}


def _talk(*said: str) -> list[dict]:
    """Turns by the first letter of their role: `u:Hi`."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[text[0]], "content": text[2:]} for text in said]


def test_turns_that_answer_no_user_are_told_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        _talk("u:Hi", "a:Hello"),
        [*_talk("u:Time?"), CALL, *_talk("t:noon", "a:It is noon.", "u:Thanks", "a:Any time")],
        _talk("a:Welcome", "u:Hi", "a:Hello", "a:there"),
        _talk("u:Hi", "a: ", "u:And?", "a:Yes"),
    ]
    found = _load(tmp_path, *({"messages": turns} for turns in rows))
    assert [(e.prompt, e.reference) for e in found] == [
        ("Hi", "Hello"),
        ("Thanks", "Any time"),
        ("Hi", "Hello"),
        ("And?", "Yes"),
    ]
    assert [m["role"] for m in found[1].history] == ["user", "assistant", "tool", "assistant"]
    assert found[2].history == ({"role": "assistant", "content": "Welcome"},)
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path / 'rows.jsonl'}: 3 of 4 rows have assistant turns that are empty or answer no user turn, 5 in all: "
        "2, 3, 4 (counted from 1); these turns are left out"
    ]


def test_a_conversation_without_an_answer_is_left_out_by_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [[], _talk("u:Hi"), [*_talk("u:Hi"), {"role": "assistant"}], ["Hi"], [*_talk("u:Time?"), CALL], None]
    rows = [{"messages": turns} for turns in (_talk("u:Hi", "a:Hello"), *bad)]
    (one,) = _load(tmp_path, *rows)
    assert (one.prompt, one.reference) == ("Hi", "Hello")
    told = "6 of 7 rows lack a prompt or a reference: 2, 3, 4, 5, 6, 7 (counted from 1); they are left out\n"
    assert capsys.readouterr().err.endswith(told)
    with pytest.raises(BadRequest, match=r"6 of 6 rows lack a prompt or a reference: 1, 2, 3, 4, 5, 6 \(counted"):
        _load(tmp_path, *rows[1:])


def test_calibration_leaves_out_rows_without_messages_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": _talk("u:Hi", "a:Hello")}) + '\n{"messages": []}\n')
    assert data.passages(Data(source=str(path))) == [_talk("u:Hi", "a:Hello")]
    assert "1 of 2 rows have no messages with role and content: 2 (counted from 1)" in capsys.readouterr().err
    path.write_text('{"messages": []}\n')
    with pytest.raises(BadRequest, match="1 of 1 rows have no messages with role and content: 1"):
        data.passages(Data(source=str(path)))


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        (_talk("u:Hi", "a:Hello", "u:Time?", "t:noon"), _talk("a:It is noon.")),
        (_talk("u:Hi", "a:Hello"), _talk("u:no answer")),
        (_talk("u:Hi", "a:Hello", "u:Time?"), _talk("a: ")),
        (_talk("u:Hi", "a:Hello", "u:Time?"), _talk("a:noon", "a:or one")),
        (_talk("u:Hi", "a:Hello", "u:Time?"), "noon"),
        ("Time?", _talk("a:noon")),
        ([], "noon"),
    ],
)
def test_a_completion_answers_the_last_turn_or_the_row_is_left_out(
    prompt: object, completion: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"prompt": _talk("u:Hi", "a:Hello", "u:Time?"), "completion": _talk("a:noon")}
    (one,) = _load(tmp_path, {"prompt": prompt, "completion": completion}, good)
    assert (one.prompt, one.reference, list(one.history)) == ("Time?", "noon", _talk("u:Hi", "a:Hello"))
    assert "1 of 2 rows lack a prompt or a reference: 1 (counted from 1)" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (0.0, "0.0"), (False, "False")])
def test_zero_is_an_answer(value: object, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = _load(tmp_path, {"question": "1-1?", "answer": value})
    (other,) = _load(tmp_path, {"question": value, "generated_solution": "It is 0.", "expected_answer": value})
    assert (one.reference, other.prompt, other.answer, capsys.readouterr().err) == (text, text, text, "")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question": "Who?", "context": "Ada came.", "answer": "Ada"}, "Who?\n\nAda came."),
        ({"context": "", "question": "Who?", "answer": "Ada"}, "Who?"),
        ({"problem": "Who?", "input": "Ada came.", "generated_solution": "Ada"}, "Who?\n\nAda came."),
        ({"Query": "Who?", "Context": "Ada came.", "Response": "Ada"}, "Who?\n\nAda came."),
        (
            {"instruction": "Who?", "context": "Ada came.", "input": "Now.", "output": "Ada"},
            "Who?\n\nNow.\n\nAda came.",
        ),
        ({"question": "Who?", "context": ["Ada", "Ben"], "answer": "Ada"}, 'Who?\n\n["Ada", "Ben"]'),
        ({"input": "Who?", "output": "Ada"}, "Who?"),
    ],
)
def test_a_context_is_part_of_the_prompt(row: dict, prompt: str, tmp_path: Path) -> None:
    (one,) = _load(tmp_path, row)
    assert (one.prompt, one.reference) == (prompt, "Ada")


def test_completions_as_messages_and_answers_stated_apart(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "1+1?"}], "completion": [{"role": "assistant", "content": "2"}]}
    (one,) = _load(tmp_path, row)
    assert (one.prompt, one.reference, one.history) == ("1+1?", "2", ())
    (other,) = _load(tmp_path, {"problem": "1+1?", "generated_solution": "It is two.", "expected_answer": "2"})
    assert (other.reference, other.answer) == ("It is two.", "2")
    (numeric,) = _load(tmp_path, {"question": "1+1?", "generated_solution": "It is two.", "expected_answer": 2})
    assert (numeric.prompt, numeric.reference, numeric.answer) == ("1+1?", "It is two.", "2")
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


@pytest.mark.parametrize("shape", ["q", "question", "messages"])
@pytest.mark.parametrize(("given", "missing"), [("prompt", "reference"), ("reference", "prompt")])
def test_one_column_alone_is_refused(shape: str, given: str, missing: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({shape: _talk("u:Hi", "a:Hello") if shape == "messages" else "1+1?", "answer": "2"}))
    with pytest.raises(BadRequest, match=f"^data.{missing}_column is missing beside data.{given}_column: give both"):
        data.load(Data(**{"source": str(path), f"{given}_column": shape}))


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


def test_a_small_table_leaves_room_for_long_fields_elsewhere(tmp_path: Path) -> None:
    before = csv.field_size_limit(131072)
    try:
        path = tmp_path / "rows.csv"
        for length, limit in ((9, 131072), (200_000, 200_020)):
            path.write_text(f"question,answer\n1+1?,{'2' * length}\n")
            assert len(data.load(Data(source=str(path)))[0].reference) == length
            assert csv.field_size_limit() >= limit
    finally:
        csv.field_size_limit(before)


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


def test_a_template_that_strips_the_system_turn_has_one() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}: {{ m['content'] | trim }}]{% endfor %}"
    messages = [{"role": "system", "content": "be brief\n"}, *chat.single_turn("hello")]
    assert chat.render(tokenizer, messages) == "[system: be brief][user: hello]"


COMMIT = """
from hfsd import data
from hfsd.blocks_cut import Data
asked = [("tester/rows", None), ("tester/rows", "main"), ("tester/none", None), ("gym:gsm_symbolic", None)]
for source, revision in asked:
    print(data.commit(Data(source=source, revision=revision)))
"""


def test_the_commit_of_a_hub_dataset_is_told(tmp_path: Path) -> None:
    upload = """
    from huggingface_hub import HfApi
    place = {"repo_id": "tester/rows", "repo_type": "dataset"}
    HfApi().create_repo(**place)
    print(HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="a.jsonl", **place).oid)
    """
    with LoopbackHub(tmp_path / "hub", users={"hf_loopback": "tester"}) as hub:
        commit = run_client(upload, hub_env(hub, "hf_loopback", tmp_path / "home")).strip()
        env = hub_env(hub, None, tmp_path / "home")
        found = run_client(COMMIT, env).splitlines()
        offline = run_client(COMMIT, env | {"HF_HUB_OFFLINE": "1"}).splitlines()
    assert found == [commit, commit, "None", "None"] and offline == ["None"] * 4
    pinned = Data(source="tester/rows", revision=commit)
    assert data.commit(pinned) == commit and data.commit(Data(source="rows.jsonl")) is None


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
